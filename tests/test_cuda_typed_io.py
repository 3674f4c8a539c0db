"""Typed I/O on a CUDA device: the same bits as on the host, in order, from any memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import rlx_driver as rlx
from typed_support import (
    DTYPES,
    INTEGERS,
    assert_same,
    expected,
    random_values,
    telling_values,
)

torch = pytest.importorskip("torch")

from rlx_driver.backends import _cuda_staging as staging  # noqa: E402
from rlx_driver.backends import _torch_typed as typed  # noqa: E402
from rlx_driver.backends._torch_casts import device_reader, device_writer  # noqa: E402

pytestmark = pytest.mark.cuda
DEVICE = "cuda:0"
BF16 = rlx.dtype("bf16")


def fetched(memory, dtype, count):
    raw = memory[: count * dtype.itemsize].cpu().numpy()
    return np.frombuffer(raw.tobytes(), dtype)


def pinned(values):
    """The values in pinned memory, as NumPy sees it."""
    tensor = torch.empty(values.size, pin_memory=True)
    tensor.numpy()[:] = values
    assert tensor.is_pinned()
    return tensor.numpy()


@pytest.fixture(scope="module")
def heavy():
    matrix = torch.full((4096, 4096), 0.01, device=DEVICE)
    spin(matrix)
    torch.cuda.synchronize()
    return matrix


def spin(matrix):
    """Keep the current stream busy for some tens of milliseconds."""
    for _ in range(30):
        matrix = matrix @ matrix * 1e-4
    return matrix


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks from few elements."""
    monkeypatch.setattr(staging, "DIRECT_CHUNK", 1 << 16)
    monkeypatch.setattr(staging, "CHUNK", 1 << 16)
    monkeypatch.setattr(staging, "pools", {0: staging.Pool(1 << 16, 4)})
    monkeypatch.setattr(typed, "SMALL", 1 << 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_host(dtype):
    values = np.concatenate([telling_values(dtype), random_values(100_000)])
    if dtype in INTEGERS:
        values = values[-120_000:]
    wanted = expected(dtype, values)
    with np.errstate(all="ignore"):
        back = wanted.real.astype(np.float32)
    memory = torch.zeros(wanted.nbytes + 64, dtype=torch.uint8, device=DEVICE)
    for source in (values, pinned(values), torch.from_numpy(values).to(DEVICE)):
        memory.fill_(0xEE)
        assert rlx.write_typed_from_f32(memory, dtype, source) == values.size
        assert_same(fetched(memory, dtype, values.size), wanted)
        assert (memory[wanted.nbytes :] == 0xEE).all()
    assert_same(rlx.read_typed_to_f32(memory, dtype, values.size), back)
    for out in (np.zeros_like(values), pinned(np.zeros_like(values))):
        assert rlx.read_typed_to_f32(memory, dtype, values.size, out) is out
        assert_same(out, back)
    for count in (1, 3, 700):
        assert rlx.write_typed_from_f32(memory, dtype, values[-count:]) == count
        assert_same(fetched(memory, dtype, count), wanted[-count:])
        assert_same(rlx.read_typed_to_f32(memory, dtype, count), back[-count:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_device_has_a_cast_for_nearly_every_dtype(dtype):
    device = torch.device(DEVICE)
    if dtype.name not in ("uint16", "uint32", "uint64"):
        assert device_writer(dtype, device) is not None
        assert device_reader(dtype, device) is not None


@pytest.mark.parametrize("dtype", ["bf16", "f8_e4m3fn", "i32", "c128", "int4"])
@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 9])
def test_sizes_around_the_borders_of_chunks(small_chunks, dtype, chunks, extra):
    dtype = rlx.dtype(dtype)
    for size in (4, max(dtype.itemsize, 4)):
        count = chunks * ((1 << 16) // size) + extra
        values = random_values(count)[:count]
        wanted = expected(dtype, values)
        memory = torch.full((wanted.nbytes + 17,), 0xEE, dtype=torch.uint8, device=DEVICE)
        for source in (values, pinned(values)):
            assert rlx.write_typed_from_f32(memory, dtype, source) == count
            assert_same(fetched(memory, dtype, count), wanted)
            assert (memory[wanted.nbytes :] == 0xEE).all()
        with np.errstate(all="ignore"):
            back = wanted.real.astype(np.float32)
        assert_same(rlx.read_typed_to_f32(memory, dtype, count), back)
        for whole in (np.full(count + 2, 7, np.float32), pinned(np.full(count + 2, 7, np.float32))):
            out = whole[1:-1]
            assert rlx.read_typed_to_f32(memory, dtype, count, out) is out
            assert_same(out, back)
            assert (whole[0], whole[-1]) == (7, 7)


@pytest.mark.parametrize("dtype", ["bf16", "f32", "i16", "f64", "c64", "f8_e5m2"])
def test_bytes_may_lie_at_any_address(small_chunks, dtype):
    dtype = rlx.dtype(dtype)
    values = random_values(30_000)
    wanted = expected(dtype, values)
    for start in range(1, dtype.itemsize + 1):
        whole = torch.full((wanted.nbytes + 40,), 0xEE, dtype=torch.uint8, device=DEVICE)
        memory = whole[start : start + wanted.nbytes]
        for source in (values, pinned(values), torch.from_numpy(values).to(DEVICE), values[:100]):
            rlx.write_typed_from_f32(memory, dtype, source)
        assert_same(fetched(memory, dtype, values.size), wanted)
        assert (whole[:start] == 0xEE).all()
        assert (whole[start + wanted.nbytes :] == 0xEE).all()
        with np.errstate(all="ignore"):
            found = rlx.read_typed_to_f32(memory, dtype, values.size)
            assert_same(found, wanted.real.astype(np.float32))


@pytest.mark.parametrize("kind", ["pageable", "pinned", "small", "device"])
@pytest.mark.parametrize("side", [False, True])
def test_a_write_is_ordered_with_the_current_stream(heavy, kind, side):
    count = 700 if kind == "small" else 4 << 20
    values = np.full(count, 2.0, np.float32)
    source = {"pinned": pinned, "device": lambda x: torch.from_numpy(x).to(DEVICE)}.get(
        kind, np.copy
    )(values)
    memory = torch.zeros(count * 2, dtype=torch.uint8, device=DEVICE)
    typed_view = memory.view(torch.bfloat16)
    before, after = torch.empty_like(typed_view), torch.empty_like(typed_view)
    rlx.write_typed_from_f32(memory, "bf16", source)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        for value in range(3, 8):
            typed_view.fill_(value - 1)
            source[:] = value
            typed_view.add_(spin(heavy).flatten()[0].to(torch.bfloat16) * 0)
            before.copy_(typed_view)  # earlier work, still waiting: must not see the write
            rlx.write_typed_from_f32(memory, "bf16", source)
            if kind != "device":
                source[:] = -1  # the caller may change it now
            after.copy_(typed_view)
            torch.cuda.current_stream().synchronize()
            assert (before == value - 1).all()
            assert (after == value).all()


@pytest.mark.parametrize("side", [False, True])
def test_a_read_is_ordered_with_the_current_stream(heavy, side):
    count = 4 << 20
    memory = torch.zeros(count * 2, dtype=torch.uint8, device=DEVICE)
    typed_view = memory.view(torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        for value in range(1, 6):
            typed_view.copy_(spin(heavy).flatten()[:1].to(torch.bfloat16) * 0 + value)
            found = rlx.read_typed_to_f32(memory, "bf16", count)
            typed_view.fill_(-1)
            assert (found == value).all()
            few = typed_view.fill_(value + 0.5)
            assert (rlx.read_typed_to_f32(memory, "bf16", 10) == value + 0.5).all()
            del few


@pytest.mark.parametrize("kind", ["pageable", "pinned", "small"])
def test_a_read_into_an_array_is_ordered_with_the_current_stream(heavy, kind):
    count = 700 if kind == "small" else 4 << 20
    make = pinned if kind == "pinned" else np.copy
    out = make(np.zeros(count, np.float32))
    memory = torch.zeros(count * 2, dtype=torch.uint8, device=DEVICE)
    typed_view = memory.view(torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for value in range(1, 6):
            typed_view.copy_(spin(heavy).flatten()[:1].to(torch.bfloat16) * 0 + value)
            assert rlx.read_typed_to_f32(memory, "bf16", count, out) is out
            assert (out == value).all(), "the values are there when the call returns"
            typed_view.fill_(-1)
            assert (out == value).all()


def test_pinned_memory_is_filled_without_the_copy_between(monkeypatch):
    count = 1 << 20
    memory = torch.zeros(count * 2, dtype=torch.uint8, device=DEVICE)
    rlx.write_typed_from_f32(memory, "bf16", np.full(count, 3, np.float32))
    monkeypatch.setattr(typed, "read_through", None)
    out = pinned(np.zeros(count, np.float32))
    assert (rlx.read_typed_to_f32(memory, "bf16", count, out) == 3).all()
    buffer = rlx.Buffer.zeros(count * 2, "u8", DEVICE)
    buffer.copy_from(memory)
    out[:] = 0
    assert (rlx.read_typed_to_f32(buffer, "bf16", count, out) == 3).all()


@pytest.mark.parametrize("threads", [1, 64])
def test_the_host_and_the_device_give_the_same(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for dtype in (BF16, rlx.dtype("f16")):
        assert typed.host_converts(dtype) == ((threads == 64),) * 2
        values = np.concatenate([telling_values(dtype), random_values(3 << 20)])
        wanted = expected(dtype, values)
        memory = torch.full((wanted.nbytes + 8,), 0xEE, dtype=torch.uint8, device=DEVICE)
        rlx.write_typed_from_f32(memory, dtype, values)
        assert_same(fetched(memory, dtype, values.size), wanted)
        assert (memory[wanted.nbytes :] == 0xEE).all()
        with np.errstate(all="ignore"):
            back = wanted.astype(np.float32)
        assert_same(rlx.read_typed_to_f32(memory, dtype, values.size), back)


@pytest.mark.parametrize("count", [10, 1 << 20])
def test_autograd_is_told_of_a_write(count):
    memory = torch.zeros(count * 2, dtype=torch.uint8, device=DEVICE)
    version = memory._version
    rlx.write_typed_from_f32(memory, "bf16", np.ones(count, np.float32))
    assert memory._version > version


def test_values_may_overlap_the_bytes():
    values = random_values(1 << 20)
    for shift in (0, 4, 2 << 20):
        memory = torch.zeros(values.nbytes + shift, dtype=torch.uint8, device=DEVICE)
        source = memory[: values.nbytes].view(torch.float32)
        source.copy_(torch.from_numpy(values))
        rlx.write_typed_from_f32(memory[shift:], "bf16", source)
        assert_same(fetched(memory[shift:], BF16, values.size), expected(BF16, values))


def test_buffers_and_values_of_every_framework():
    jax = pytest.importorskip("jax")
    values = random_values(300_000)
    wanted = expected(BF16, values)
    buffer = rlx.Buffer.zeros((2, values.size), "u8", DEVICE)
    old = buffer.jax()
    theirs = jax.device_put(values, jax.devices("cuda")[0])
    host = torch.from_numpy(values)
    for source in (values, host, host.pin_memory(), host.to(DEVICE), theirs, theirs * 1):
        buffer[...] = 0
        epoch = buffer.epoch
        assert rlx.write_typed_from_f32(buffer, "bf16", source) == values.size
        assert buffer.epoch == epoch + 1
        found = np.frombuffer(buffer.to_host().numpy().tobytes(), BF16)
        assert_same(found, wanted)
        assert_same(rlx.read_typed_to_f32(buffer, "bf16", values.size), wanted.astype(np.float32))
        raw = bytearray(wanted.nbytes)
        assert rlx.write_typed_from_f32(raw, "bf16", source) == values.size
        assert_same(np.frombuffer(raw, BF16), wanted)
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        float(old.sum())
    floats = rlx.Buffer.from_array(host.to(DEVICE), copy=True)
    memory = floats.view("u8", (values.nbytes,))
    for view in (floats.torch, floats.jax):
        floats.copy_from(values)
        rlx.write_typed_from_f32(memory[2:], "bf16", view())
        found = memory[2 : 2 + wanted.nbytes].to_host().numpy()
        assert_same(np.frombuffer(found.tobytes(), BF16), wanted)


def test_threads_transfer_at_once(small_chunks):
    errors = []

    def work(seed):
        try:
            values = random_values(200_000, seed)
            memory = torch.zeros(values.size * 2, dtype=torch.uint8, device=DEVICE)
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(5):
                    rlx.write_typed_from_f32(memory, "bf16", values)
                    found = rlx.read_typed_to_f32(memory, "bf16", values.size)
                    assert_same(found, expected(BF16, values).astype(np.float32))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_modes_of_torch_change_nothing(small_chunks):
    values = random_values(100_000)
    device_writer.cache_clear()
    device_reader.cache_clear()
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        memory = torch.zeros(values.size, dtype=torch.uint8, device=DEVICE)
        with mode:
            rlx.write_typed_from_f32(memory, "f8_e3m4", values)
            found = rlx.read_typed_to_f32(memory, "f8_e3m4", values.size)
        assert_same(found, expected(rlx.dtype("f8_e3m4"), values).astype(np.float32))
        version = memory._version
        rlx.write_typed_from_f32(memory, "f8_e3m4", values)
        assert memory._version > version


@pytest.mark.parametrize("count", [10, 1 << 20])
def test_a_capture_refuses_it_and_nothing_is_changed(count):
    values = np.ones(count, np.float32)
    memory = torch.zeros(count * 2, dtype=torch.uint8, device=DEVICE)
    rlx.write_typed_from_f32(memory, "bf16", values * 3)
    buffer = rlx.Buffer.zeros(count * 2, "u8", DEVICE)
    stream = rlx.command_stream(DEVICE)
    with stream.capture() as graph:
        with pytest.raises(rlx.CaptureError, match="typed write"):
            rlx.write_typed_from_f32(memory, "bf16", values)
        out = np.full(count, 7, np.float32)
        for place in (None, out):
            with pytest.raises(rlx.CaptureError, match="typed read"):
                rlx.read_typed_to_f32(memory, "bf16", count, place)
        assert (out == 7).all()
        with pytest.raises(rlx.CaptureError):
            rlx.write_typed_from_f32(buffer, "bf16", values)
        memory.view(torch.bfloat16).add_(1)
    assert (rlx.read_typed_to_f32(memory, "bf16", count) == 3).all()
    del graph


def test_where_no_memory_can_be_pinned_it_still_works(monkeypatch):
    def refuse(engine, nbytes):
        raise RuntimeError("no memory to lock")

    monkeypatch.setattr(staging, "pools", {})
    monkeypatch.setattr(staging.CudaEngine, "pinned", refuse)
    values = random_values(200_000)
    memory = torch.zeros(values.size * 2, dtype=torch.uint8, device=DEVICE)
    rlx.write_typed_from_f32(memory, "bf16", values)
    found = rlx.read_typed_to_f32(memory, "bf16", values.size)
    assert_same(found, expected(BF16, values).astype(np.float32))


def test_chunks_are_kept_within_a_bound_and_freed_by_reset(monkeypatch):
    monkeypatch.setattr(staging, "pools", {})
    values = np.ones(8 << 20, np.float32)
    memory = torch.zeros(values.size * 2, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        rlx.write_typed_from_f32(memory, "bf16", values)
    pool = staging.pools[0]
    assert 1 <= len(pool._free) <= staging.LANES
    staging.reset()
    assert not pool._free
    rlx.write_typed_from_f32(memory, "bf16", values)
    assert (rlx.read_typed_to_f32(memory, "bf16", values.size) == 1).all()


def test_more_than_fits_raises_before_a_byte_changes():
    memory = torch.full((11,), 0xEE, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(rlx.ShapeError, match="max_elems=5"):
        rlx.write_typed_from_f32(memory, "bf16", np.zeros(6, np.float32))
    with pytest.raises(rlx.ShapeError, match="C order"):
        rlx.write_typed_from_f32(memory[::2], "bf16", [1.0])
    with pytest.raises(rlx.DTypeError, match="uint8"):
        rlx.write_typed_from_f32(memory.view(torch.int8), "bf16", [1.0])
    assert (memory == 0xEE).all()
    assert rlx.write_typed_from_f32(memory, "bf16", [1.0] * 9, max_elems=5) == 5
