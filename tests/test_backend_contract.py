"""The contract of a backend, kept by each of them: one suite, run on every device at hand.

What serves TPUs (JAX) and GPUs (torch) is run on the host here, so that it is tried everywhere.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver import Device, MemoryInfo
from rlx_driver.backends.base import ALIGNMENT, Backend
from rlx_driver.dtypes import TABLE
from rlx_driver.registry import registry
from support import (
    address,
    aligned,
    installed,
    make,
    needs,
    offset,
    other_bytes,
    pattern,
    read_bytes,
    write_bytes,
    x64,
)

PLACES = [
    pytest.param(("numpy", "cpu"), id="numpy-cpu"),
    pytest.param(("torch", "cpu"), id="torch-cpu", marks=needs("torch")),
    pytest.param(("jax", "cpu"), id="jax-cpu", marks=needs("jax")),
    pytest.param(("torch", "cuda:0"), id="torch-cuda", marks=needs("torch", "cuda")),
]
EVERYDAY = ["bool", "int8", "uint8", "int32", "float16", "float32", "complex64", "bfloat16"]
OFFSETS = [0, 256, 1024]


@pytest.fixture(params=PLACES, autouse=True)
def place(request):
    return request.param


@pytest.fixture
def backend(place):
    return registry.get(place[0])


@pytest.fixture
def device(place):
    return Device(place[1])


@pytest.fixture(autouse=True)
def wide(place):
    """64-bit types, which JAX has only when it is asked for them."""
    if not installed("jax"):
        yield
        return
    with x64():
        yield


@pytest.fixture
def typed(backend, device):
    """Makes a typed array in memory of the backend, with these bytes."""

    def make_typed(dtype="float32", shape=(4, 6), seed=0):
        host = make("numpy", dtype, shape, seed)
        memory = backend.allocate(device, max(host.nbytes, 1))
        array = backend.view(memory, 0, shape, np.dtype(host.dtype))
        return backend.copy_in(array, host) if backend.functional else _filled(backend, array, host)

    return make_typed


def _filled(backend, array, host):
    backend.copy_in(array, host)
    return array


# --- what there is -------------------------------------------------------------------------------


def test_it_says_who_it_is(backend, place):
    assert isinstance(backend, Backend)
    assert backend.name == place[0]
    assert backend.functional is (place[0] == "jax")
    assert backend.packages
    assert set(backend.kinds) <= set(Device.kinds())
    assert hasattr(backend.namespace(), "from_dlpack")
    for kind in Device.kinds():
        assert all(d.kind == kind for d in backend.devices(kind))


def test_it_knows_its_own(backend, typed):
    x = typed()
    assert backend.owns(x)
    for other in ("numpy", "torch", "jax"):
        if other != backend.name and installed(other):
            assert not backend.owns(make(other))
    for stranger in (None, 5, [1.0], np.float32(1), np.dtype("f4"), object()):
        assert not backend.owns(stranger)


# --- allocating ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 7, 256, 1000, 65_537])
def test_memory_is_zero_bytes(backend, device, nbytes):
    for _ in range(3):
        memory = backend.allocate(device, nbytes)
        facts = backend.facts(memory)
        assert facts.shape == (nbytes,)
        assert facts.dtype == np.uint8
        assert facts.device == device
        assert backend.copy_out(memory).tobytes() == bytes(nbytes)
        del memory
        waste = make("numpy", "uint8", (nbytes,))  # so that used memory would be seen to come back
        del waste


@pytest.mark.parametrize("nbytes", [1, 100, 4096, 1 << 20])
def test_memory_is_aligned(backend, device, nbytes):
    promised = 64 if backend.name == "jax" else ALIGNMENT
    memories = [backend.allocate(device, nbytes) for _ in range(5)]
    places = [backend.facts(memory).address for memory in memories]
    assert all(place % promised == 0 for place in places)
    assert len(set(places)) == 5


def test_no_bytes_are_memory_too(backend, device):
    memory = backend.allocate(device, 0)
    assert backend.facts(memory).shape == (0,)
    view = backend.view(memory, 0, (0, 3), np.dtype("float32"))
    assert backend.facts(view).shape == (0, 3)


@pytest.mark.parametrize("nbytes", [1 << 50, 1 << 60, (1 << 62) + 1])
def test_more_than_there_is_is_refused_and_says_so(backend, device, nbytes):
    before = backend.memory(device).in_use
    with pytest.raises(rlx.OutOfDeviceMemory) as caught:
        backend.allocate(device, nbytes)
    assert isinstance(caught.value, MemoryError)
    text = str(caught.value)
    assert f"{nbytes:,} bytes" in text
    assert str(device) in text
    assert "free" in text
    assert backend.memory(device).in_use == before


def test_memory_in_use_goes_up_and_comes_back(backend, device):
    gc.collect()
    before = backend.memory(device)
    assert isinstance(before, MemoryInfo)
    assert 0 < before.free <= before.total
    first = backend.allocate(device, 1000)
    second = backend.allocate(device, 500)
    assert backend.memory(device).in_use == before.in_use + 1500
    del first
    gc.collect()
    assert backend.memory(device).in_use == before.in_use + 500
    if not backend.functional:
        view = backend.view(second, 100, (10,), np.dtype("float32"))
        del second
        gc.collect()
        assert backend.memory(device).in_use == before.in_use + 500, "the view holds it"
        del view
    else:
        del second
    gc.collect()
    assert backend.memory(device).in_use == before.in_use


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", OFFSETS)
def test_a_view_begins_at_its_offset(backend, device, start):
    check_view(backend, device, "float32", start)


def test_a_view_has_any_dtype(backend, device):
    for row in TABLE.values():
        if row.dlpack and (backend.name != "torch" or row.torch):
            check_view(backend, device, row.name, 256)


def check_view(backend, device, dtype, start):
    row = rlx.dtypes.info(dtype)
    size = row.dtype.itemsize
    memory = backend.allocate(device, 2048)
    content = pattern(2048) % 2 if dtype == "bool" else pattern(2048)
    if backend.functional:
        memory = backend.copy_in(memory, content)
    else:
        backend.copy_in(memory, content)
    view = backend.view(memory, start, (3, 5), row.dtype)
    facts = backend.facts(view)
    assert facts.dtype == row.dtype
    assert facts.shape == (3, 5)
    assert facts.strides == (5 * size, size)
    assert facts.is_row_major
    expected = content[start : start + 15 * size].tobytes()
    assert backend.copy_out(view).tobytes() == expected
    if backend.functional:
        return  # it has no views: the bytes were read
    assert facts.address == backend.facts(memory).address + start
    host = make("numpy", dtype, (3, 5), seed=60)
    backend.copy_in(view, host)
    assert backend.copy_out(memory)[start : start + 15 * size].tobytes() == host.tobytes()
    assert backend.copy_out(memory)[:start].tobytes() == content[:start].tobytes()
    assert backend.copy_out(memory)[start + 15 * size :].tobytes() == (
        content[start + 15 * size :].tobytes()
    )


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (1, 1, 4), (2, 3, 4, 5)])
def test_a_view_has_any_shape(backend, device, shape):
    memory = backend.allocate(device, 1024)
    view = backend.view(memory, 256, shape, np.dtype("float32"))
    assert backend.facts(view).shape == shape
    assert backend.copy_out(view).tobytes() == bytes(4 * int(np.prod(shape)))


# --- facts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERYDAY)
def test_facts_are_right(backend, device, typed, dtype):
    x = typed(dtype)
    facts = backend.facts(x)
    size = rlx.dtype(dtype).itemsize
    assert facts.address == address(x)
    assert facts.shape == (4, 6)
    assert facts.strides == (6 * size, size)
    assert facts.dtype == rlx.dtype(dtype)
    assert facts.device == backend.device_of(x) == device
    assert facts.num_elements == 24
    assert facts.byte_size == 24 * size
    assert facts.is_row_major
    assert not facts.read_only
    assert facts.immutable is backend.functional
    assert facts.obstacle is None


def test_facts_of_other_layouts(backend, typed):
    if backend.functional:
        pytest.skip("its arrays are compact")
    x = typed()
    facts = backend.facts(x.T)
    assert facts.shape == (6, 4)
    assert facts.strides == (4, 24)
    assert not facts.is_row_major
    facts = backend.facts(x[1:, ::2])
    assert facts.address == address(x) + 24
    assert facts.strides == (24, 8)
    assert backend.facts(x[:0]).num_elements == 0
    assert backend.facts(x[0, 0:1].reshape(())).strides == ()


# --- copying -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERYDAY)
def test_copy_in_writes_in_place(backend, typed, dtype):
    x = typed(dtype)
    where = address(x)
    host = make("numpy", dtype, seed=40)
    result = backend.copy_in(x, host)
    if backend.functional:
        assert x.is_deleted(), "the array before was given away"
        x = result
    assert address(x) == where
    assert read_bytes(x) == host.tobytes()
    before = read_bytes(x)
    write_bytes(host, other_bytes(host))
    assert read_bytes(x) == before, "the host array may be reused at once"


@pytest.mark.parametrize("start", [0, 4])
def test_a_big_host_array_may_be_reused_as_soon_as_copy_in_returns(backend, device, start):
    host = offset(1 << 23, "float32", start)
    memory = backend.allocate(device, host.nbytes)
    x = backend.view(memory, 0, host.shape, host.dtype)
    for value in (1, 2, 3):
        host[:] = value
        result = backend.copy_in(x, host)
        host[:] = 0
        x = result if backend.functional else x
        assert (backend.copy_out(x) == value).all()


def test_copy_in_takes_any_layout(backend, typed):
    x = typed("float32", (3, 4))
    host = make("numpy", "float32", (8, 3), seed=9)[::2].T
    result = backend.copy_in(x, host)
    x = result if backend.functional else x
    assert read_bytes(x) == host.tobytes()


@pytest.mark.parametrize("dtype", EVERYDAY)
def test_copy_out_is_a_copy_on_the_host(backend, typed, dtype):
    x = typed(dtype)
    out = backend.copy_out(x)
    assert type(out) is np.ndarray
    assert out.dtype == rlx.dtype(dtype)
    assert out.shape == (4, 6)
    assert out.flags.writeable
    assert out.flags.c_contiguous
    assert out.tobytes() == read_bytes(x)
    before = out.tobytes()
    write_bytes(out, other_bytes(out))
    assert read_bytes(x) == before


@pytest.mark.parametrize("dtype", EVERYDAY)
def test_copy_across_writes_in_place(backend, typed, dtype):
    x, y = typed(dtype), typed(dtype, seed=30)
    where, expected = address(x), read_bytes(y)
    assert read_bytes(x) != expected or dtype == "bool"
    result = backend.copy_across(x, y)
    x = result if backend.functional else x
    assert address(x) == where
    assert read_bytes(x) == expected
    assert read_bytes(y) == expected, "the source is as it was"
    assert address(y) != where


@pytest.mark.parametrize("dtype", EVERYDAY)
def test_duplicate_really_copies(backend, typed, dtype):
    x = typed(dtype)
    y = backend.duplicate(x)
    assert backend.owns(y)
    assert address(y) != address(x)
    facts = backend.facts(y)
    assert facts.is_row_major
    assert (facts.dtype, facts.shape, facts.device) == (
        rlx.dtype(dtype),
        (4, 6),
        backend.device_of(x),
    )
    assert facts.address % 64 == 0
    before = read_bytes(x)
    assert read_bytes(y) == before
    if backend.functional:
        result = backend.copy_in(x, make("numpy", dtype, seed=40))
        assert read_bytes(y) == before
        assert read_bytes(result) != before or dtype == "bool"
        return
    backend.copy_in(x, make("numpy", dtype, seed=40))
    assert read_bytes(y) == before


def test_duplicate_makes_it_compact(backend, typed):
    if backend.functional:
        pytest.skip("its arrays are compact")
    x = typed().T[1::2]
    y = backend.duplicate(x)
    assert backend.facts(y).is_row_major
    assert read_bytes(y) == read_bytes(x)


# --- sharing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERYDAY)
def test_share_takes_memory_of_the_others(backend, device, dtype):
    if not device.is_host:
        pytest.skip("the others are on the host")
    for other in ("numpy", "torch", "jax"):
        if other == backend.name or not installed(other):
            continue
        x = make(other, dtype)
        facts = registry.get(other).facts(x)
        assert backend.obstacle(facts) is None
        y = backend.share(x, facts)
        assert backend.owns(y)
        assert backend.facts(y).address == facts.address
        assert backend.facts(y).dtype == facts.dtype
        assert read_bytes(y) == read_bytes(x)


def test_an_obstacle_is_a_reason_with_a_remedy(backend):
    nowhere = rlx.backends.base.ArrayFacts(0, (3,), (4,), np.dtype("float32"), Device("fpga"))
    obstacle = backend.obstacle(nowhere)
    assert obstacle.kind == "device"
    assert "fpga:0" in obstacle.text
    assert obstacle.remedy
    assert str(obstacle) == f"{obstacle.text}; {obstacle.remedy}"


# --- the rest of it ------------------------------------------------------------------------------


def test_slices_stay_arrays(backend, typed):
    x = typed()
    for key in (0, slice(1, 3), (0, 1), (slice(None), 2), ..., (..., 1), (2, slice(0, 4, 2))):
        y = backend.index(x, key)
        assert backend.owns(y)
        assert read_bytes(y) == np.ascontiguousarray(backend.copy_out(x)[key]).tobytes()
        if not backend.functional:
            assert backend.overlaps(x, y)


def test_bytes_can_be_seen_as_another_dtype(backend, typed):
    if backend.functional:
        pytest.skip("it has no views")
    x = typed("float32", (4, 6))
    y = backend.reinterpret(x, np.dtype("uint8"), (8, 12))
    assert backend.facts(y).address == address(x)
    assert backend.facts(y).shape == (8, 12)
    assert read_bytes(y) == read_bytes(x)
    z = backend.reinterpret(y, rlx.dtype("bf16"), (48,))
    assert backend.facts(z).dtype == rlx.dtype("bf16")
    assert read_bytes(z) == read_bytes(x)


def test_its_stream_runs_work(backend, device):
    stream = backend.stream(device)
    assert isinstance(stream, rlx.CommandStream)
    assert stream.device == device
    assert stream.launch(lambda: 5) == 5
    stream.wait()


def test_views_made_plainly_may_be_kept(backend, typed):
    x = typed()
    assert backend.may_cache(x)
    assert backend.is_pristine(x)
    with backend.writing(), backend.exporting(backend.device_of(x)):
        assert backend.owns(backend.renewed(x))
    backend.mark_written([] if backend.functional else [x])


def test_a_host_array_keeps_its_bytes_through_the_backend(backend, typed):
    x = aligned((4, 6))
    write_bytes(x, pattern(x.nbytes).tobytes())
    assert backend.copy_out(typed("float32")).tobytes() == make("numpy").tobytes() == x.tobytes()
