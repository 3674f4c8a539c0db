"""Exchange: what shares memory really does, a copy really is one, and `explain` knows which."""

from __future__ import annotations

import threading
import types
import warnings
import weakref

import ml_dtypes
import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver._dlpack_abi import managed
from rlx_driver._ledger import LedgerCounts
from rlx_driver.dtypes import TABLE
from rlx_driver.registry import registry
from support import (
    COPIES,
    Exporter,
    address,
    aligned,
    each_way,
    frameworks,
    gone,
    make,
    must_run,
    needs,
    offset,
    other_bytes,
    pairs,
    read_bytes,
    refusal,
    write_bytes,
    x64,
)

ASKED = "copy=True was asked for"


def can_write(framework):
    return framework != "jax"


def has(framework, row):
    """Whether a framework, as it is installed here, has a dtype."""
    if framework == "numpy":
        return True
    name = getattr(row, framework)
    module = pytest.importorskip("torch" if framework == "torch" else "jax.numpy")
    return name is not None and hasattr(module, name)


ROWS = [row for row in TABLE.values() if row.dlpack is not None]
PAIRS_AND_DTYPES = [
    pytest.param(source, target, row, marks=needs(source, target), id=f"{source}-{target}-{row}")
    for source, target in (p.values for p in pairs())
    for row in (row.name for row in ROWS if "torch" not in (source, target) or row.torch)
]


@pytest.fixture
def wide(request):
    """64-bit types in JAX, where JAX takes part."""
    if "jax" not in (request.getfixturevalue("source"), request.getfixturevalue("target")):
        yield
        return
    with x64():
        yield


# --- every pair, every dtype ---------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target", "name"), PAIRS_AND_DTYPES)
@pytest.mark.usefixtures("wide")
class TestEveryPairAndDtype:
    @pytest.fixture
    def x(self, source, target, name):
        row = rlx.dtypes.info(name)
        if not has(source, row) or not has(target, row):
            pytest.skip(f"the installed frameworks do not both have {name}")
        return make(source, row.dtype)

    @pytest.mark.parametrize("copy", [False, None])
    def test_shares_memory(self, x, source, target, copy):
        before = read_bytes(x)
        for y in each_way(x, target, copy):
            assert registry.for_array(y).name == target
            assert address(y) == address(x)
            assert rlx.dtype(y.dtype) == rlx.dtype(x.dtype)
            assert tuple(y.shape) == tuple(x.shape)
            assert rlx.Device.of(y) == rlx.Device("cpu")
            assert read_bytes(y) == before
            mutable = x if can_write(source) else y
            if can_write(source) or target == "torch":
                write_bytes(mutable, other_bytes(x))
                assert read_bytes(y) == read_bytes(x) == other_bytes(x)
                write_bytes(mutable, before)
        assert rlx.ledger.copies == 0
        assert rlx.ledger.exchanges == 3

    def test_copies_when_asked(self, x, source, target):
        before = read_bytes(x)
        for y in each_way(x, target, True):
            assert registry.for_array(y).name == target
            assert address(y) != address(x)
            assert rlx.dtype(y.dtype) == rlx.dtype(x.dtype)
            assert tuple(y.shape) == tuple(x.shape)
            assert read_bytes(y) == before
            if can_write(source):
                write_bytes(x, other_bytes(x))
                assert read_bytes(y) == before
                write_bytes(x, before)
            if can_write(target):
                write_bytes(y, other_bytes(x))
                assert read_bytes(x) == before
        assert rlx.ledger.reasons == {ASKED: rlx.ledger.reasons[ASKED]}
        assert rlx.ledger.copies == 3
        assert rlx.ledger.bytes_copied == 3 * len(before)


# --- shapes, sides, lifetimes --------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), pairs())
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (1, 1, 1), (2, 3, 4, 5)])
@pytest.mark.parametrize("copy", COPIES)
def test_every_shape_survives(source, target, shape, copy):
    x = make(source, "float32", shape)
    for y in each_way(x, target, copy):
        assert tuple(y.shape) == shape
        assert rlx.dtype(y.dtype) == np.float32
        assert read_bytes(y) == read_bytes(x)
        if read_bytes(x):
            assert (address(y) == address(x)) is (copy is not True)


@pytest.mark.parametrize("name", frameworks())
@pytest.mark.parametrize("copy", [False, None])
def test_an_array_of_the_framework_itself_is_given_back(name, copy):
    x = make(name)
    assert all(y is x for y in each_way(x, name, copy))
    assert rlx.ledger.copies == 0


@pytest.mark.parametrize("name", frameworks())
def test_a_copy_in_the_framework_itself_is_one(name):
    x = make(name, "bfloat16")
    for y in each_way(x, name, True):
        assert y is not x
        assert address(y) != address(x)
        assert read_bytes(y) == read_bytes(x)
    assert rlx.ledger.reasons[ASKED].copies == 3


@pytest.mark.jax
@pytest.mark.parametrize("copy", [False, None])
def test_numpy_sees_jax_memory_read_only(copy):
    for y in each_way(make("jax"), "numpy", copy):
        assert not y.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            y[0, 0] = 1


@pytest.mark.jax
def test_a_copy_from_jax_is_writable():
    for y in each_way(make("jax"), "numpy", True):
        y[...] = 1


@pytest.mark.torch
def test_numpy_and_torch_write_to_each_other():
    x = make("numpy")
    for t in each_way(x, "torch", False):
        t[1, 2] = 77
        assert x[1, 2] == 77
        for back in each_way(t, "numpy", False):
            back[3, 3] = 88
            assert x[3, 3] == t[3, 3] == 88


def _owner(x):
    """The NumPy array that the memory of a view belongs to."""
    return x if x.base is None else _owner(x.base)


@pytest.mark.parametrize(("source", "target"), pairs())
def test_the_result_keeps_the_memory_alive_and_lets_it_go(source, target):
    for way in range(3):
        x = make(source, "float32", (64,), seed=way)
        # JAX's own arrays are not weakly tied to their memory: its view is what counts there.
        owner = weakref.ref(_owner(x)) if source == "numpy" else None
        expected = read_bytes(x)
        y = each_way(x, target, False)[way]
        del x
        filler = [make(source, "float32", (64,), seed=90) for _ in range(8)]
        assert read_bytes(y) == expected
        assert owner is None or owner() is not None
        del y, filler
        assert owner is None or gone(owner)


@pytest.mark.parametrize(("source", "target"), pairs())
def test_there_and_back_is_the_same_memory(source, target):
    x = make(source, "bfloat16")
    for y in each_way(x, target, False):
        for z in each_way(y, source, False):
            assert address(z) == address(x)
            assert read_bytes(z) == read_bytes(x)


@pytest.mark.jax
@pytest.mark.parametrize("target", frameworks("numpy", "torch"))
@pytest.mark.parametrize("copy", COPIES)
def test_pending_jax_results_are_waited_for(target, copy):
    import jax
    import jax.numpy as jnp

    def slow(x):
        for _ in range(6):
            x = x @ x * 1e-3
        return x

    slow = jax.jit(slow)
    x = jnp.ones((500, 500))
    expected = read_bytes(jax.block_until_ready(slow(x)))
    for _ in range(3):
        registry.lanes.clear()
        assert read_bytes(rlx.exchange(slow(x), target, copy=copy)) == expected
        assert read_bytes(rlx.exchange(slow(x), target, copy=copy)) == expected
        assert rlx.explain(slow(x), target)


# --- targets -------------------------------------------------------------------------------------


def _module(name):
    return pytest.importorskip(name)


@pytest.mark.parametrize(
    ("module", "framework"),
    [
        ("numpy", "numpy"),
        ("torch", "torch"),
        ("jax", "jax"),
        ("jax.numpy", "jax"),
        ("array_api_compat.numpy", "numpy"),
        ("array_api_compat.torch", "torch"),
    ],
)
@pytest.mark.parametrize("source", frameworks())
def test_a_framework_is_meant_by_its_modules_too(module, framework, source):
    module = _module(module)
    x = make(source)
    for y in each_way(x, module, False):
        assert registry.for_array(y).name == framework
        assert address(y) == address(x)
    assert str(rlx.explain(x, module)) == str(rlx.explain(x, framework))


def test_every_namespace_of_a_device_is_a_target():
    x = make("numpy")
    assert address(rlx.exchange(x, rlx.Device("cpu").xp, copy=False)) == address(x)


class Wrapped:
    """An array of a library that the driver has never heard of."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def library(name="somelib", change=lambda array: array):
    """A module that can import, as a third-party library does."""
    module = types.ModuleType(name)
    module.from_dlpack = lambda x: Wrapped(change(np.from_dlpack(x)))
    return module


@pytest.mark.parametrize("source", frameworks())
@pytest.mark.parametrize("copy", COPIES)
def test_any_module_with_from_dlpack_is_a_target(source, copy):
    x = make(source)
    for y in each_way(x, library(), copy):
        assert isinstance(y, Wrapped)
        assert y.array.tobytes() == read_bytes(x)
        assert (address(y) == address(x)) is (copy is not True)
    assert rlx.ledger.copies == (3 if copy else 0)
    assert bool(rlx.explain(x, library()))


@pytest.mark.parametrize("source", frameworks())
def test_array_api_strict_is_a_target(source):
    strict = pytest.importorskip("array_api_strict")
    x = make(source)
    for y in each_way(x, strict, False):
        assert address(y) == address(x)
        assert address(rlx.exchange(y, source, copy=False)) == address(x)


def test_a_module_that_copies_without_a_word_is_found_out():
    x = make("numpy")
    text = refusal(x, library(change=np.copy), False)
    assert hex(address(x)) in text
    assert "address" in text


def test_a_module_that_can_only_copy_is_of_use_where_a_copy_is_allowed():
    x = make("numpy")
    y = rlx.exchange(x, library(change=np.copy))
    assert read_bytes(y.array) == read_bytes(x)
    assert rlx.ledger.copies >= 1
    z = rlx.exchange(x, library(change=np.copy), copy=True)
    assert read_bytes(z.array) == read_bytes(x)
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError):
        rlx.exchange(x, library(change=np.copy))


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda array: array.astype(np.float64), "dtype float32 became float64"),
        (lambda array: array.reshape(-1), "shape (4, 6) became (24,)"),
    ],
)
def test_a_module_that_changes_values_is_found_out(copy, change, says):
    x = make("numpy")
    before = read_bytes(x)
    with pytest.raises(rlx.ZeroCopyError) as caught:
        rlx.exchange(x, library(change=change), copy=copy)
    assert says in str(caught.value)
    assert read_bytes(x) == before


def test_a_module_that_mixes_up_strides_is_found_out():
    x = aligned((4, 4))
    text = refusal(x, library(change=lambda array: array.T), False)
    assert "strides" in text


class Elsewhere(Wrapped):
    """The same memory, said to be a GPU's: what JAX makes of torch's pinned memory."""

    def __dlpack__(self, stream=None, **options):
        return super().__dlpack__(**options)

    def __dlpack_device__(self):
        return (2, 0)


@pytest.mark.parametrize("copy", COPIES)
def test_a_module_that_changes_the_device_is_found_out(copy):
    module = types.ModuleType("mover")
    module.from_dlpack = lambda x: Elsewhere(np.from_dlpack(x))
    with pytest.raises(rlx.ZeroCopyError, match=r"device cpu.* became cuda"):
        rlx.exchange(make("numpy"), module, copy=copy)


@pytest.mark.parametrize("error", [BufferError, ValueError, AssertionError, KeyError, OSError])
def test_a_module_that_refuses_is_a_zero_copy_error(error):
    def refuse(x):
        raise error("out of order")

    module = types.ModuleType("broken")
    module.from_dlpack = refuse
    text = refusal(make("numpy"), module, False)
    assert "broken" in text
    assert "out of order" in text


def test_a_module_that_gives_no_array_is_told_from_a_bad_source():
    module = types.ModuleType("odd")
    module.from_dlpack = lambda x: 5
    with pytest.raises(rlx.DriverError) as caught:
        rlx.exchange(make("numpy"), module)
    assert "odd" in str(caught.value)


# --- foreign exporters ---------------------------------------------------------------------------


@pytest.mark.parametrize("target", frameworks())
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("dtype", ["float32", "int8", "bool", "complex64"])
def test_any_exporter_is_taken(target, copy, dtype):
    x = make("numpy", dtype)
    for y in each_way(Exporter(x), target, copy):
        assert registry.for_array(y).name == target
        assert read_bytes(y) == read_bytes(x)
        assert (address(y) == address(x)) is (copy is not True)


@pytest.mark.torch
@pytest.mark.parametrize("target", frameworks())
def test_an_exporter_of_bfloat16_is_taken(target):
    x = make("torch", "bfloat16")
    for y in each_way(Exporter(x), target, False):
        assert rlx.dtype(y.dtype) == ml_dtypes.bfloat16
        assert address(y) == address(x)


class OldExporter:
    """From before DLPack 1.0: no argument, or the stream alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)


class OldestExporter(OldExporter):
    def __dlpack__(self):
        return self.array.__dlpack__()


@pytest.mark.parametrize("kind", [OldExporter, OldestExporter])
@pytest.mark.parametrize("target", frameworks())
@pytest.mark.parametrize("copy", COPIES)
def test_an_exporter_from_before_dlpack_1_is_taken(kind, target, copy):
    x = make("numpy")
    foreign = kind(x)
    shares = rlx.explain(foreign, target).shares
    for y in each_way(foreign, target, copy):
        assert read_bytes(y) == read_bytes(x)
        assert (address(y) == address(x)) is (shares and copy is not True)


class Malformed:
    def __init__(self, capsule=None, device=(1, 0)):
        self.capsule = capsule
        self.device = device

    def __dlpack__(self, **options):
        if isinstance(self.capsule, Exception):
            raise self.capsule
        return self.capsule

    def __dlpack_device__(self):
        if isinstance(self.device, Exception):
            raise self.device
        return self.device


@pytest.mark.parametrize("target", frameworks())
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("capsule", [None, 5, "dltensor", b"dltensor", Ellipsis], ids=repr)
def test_garbage_for_a_capsule_is_refused(target, copy, capsule):
    text = refusal(Malformed(capsule), target, copy)
    assert "Malformed" in text
    assert type(capsule).__name__ in text


@pytest.mark.parametrize("target", frameworks())
def test_a_consumed_capsule_is_refused(target):
    capsule = make("numpy").__dlpack__()
    np.from_dlpack(Malformed(capsule))
    assert "consumed" in refusal(Malformed(capsule), target, None)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize(
    "error",
    [
        BufferError("not now"),
        RuntimeError("not now"),
        AssertionError("not now"),
        KeyError("not now"),
        OSError("not now"),
        ZeroDivisionError("not now"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exporter_that_raises_is_refused(copy, error):
    for foreign in (Malformed(error), Malformed(device=error)):
        assert "not now" in refusal(foreign, "numpy", copy)
        with pytest.raises(rlx.ZeroCopyError, match="not now"):
            rlx.explain(foreign, "numpy")


@pytest.mark.parametrize(
    "device", [(1,), (1, 0, 0), None, 5, "cpu", ("a", "b"), (1, -1), ()], ids=repr
)
def test_a_device_that_is_no_pair_is_refused(device):
    foreign = Malformed(make("numpy").__dlpack__(), device)
    assert "Malformed" in refusal(foreign, "numpy", None)


def test_a_device_type_without_a_kind_is_named():
    foreign = Malformed(make("numpy").__dlpack__(), (99, 0))
    assert "99" in refusal(foreign, "numpy", None, rlx.UnknownFrameworkError)


@pytest.mark.parametrize(
    "x", [[1.0, 2.0], (1,), 1, 1.5, True, None, "text", b"bytes", {}, np.float32(1), object()]
)
@pytest.mark.parametrize("target", frameworks())
def test_what_is_no_array_is_refused(x, target):
    for copy in COPIES:
        text = refusal(x, target, copy, rlx.UnknownFrameworkError)
        assert type(x).__name__ in text
        assert "numpy.asarray" in text
    with pytest.raises(rlx.UnknownFrameworkError):
        rlx.explain(x, target)


@pytest.mark.parametrize(
    "framework", ["tensorflow", "", None, 5, np.ndarray, object(), types.ModuleType("empty"), []]
)
def test_an_unknown_framework_is_refused(framework):
    text = refusal(make("numpy"), framework, None, rlx.UnknownFrameworkError)
    assert "numpy" in text
    assert "from_dlpack" in text
    with pytest.raises(rlx.UnknownFrameworkError):
        rlx.explain(make("numpy"), framework)


# --- buffers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", frameworks())
@pytest.mark.parametrize("copy", COPIES)
def test_a_buffer_is_an_array_too(target, copy):
    b = rlx.Buffer.from_array(make("numpy", "bfloat16"), copy=True)
    for y in each_way(b, target, copy):
        assert registry.for_array(y).name == target
        assert read_bytes(y) == read_bytes(b)
        assert (address(y) == b.address) is (copy is not True)


@pytest.mark.jax
def test_a_buffer_that_jax_cannot_see_is_copied_where_that_is_allowed():
    b = rlx.Buffer.from_array(offset(8, "float32", 4), copy=False)
    e = rlx.explain(b, "jax")
    assert not e
    assert e.can_copy
    assert "aligned" in refusal(b, "jax", False)
    rlx.ledger.reset()
    for copy in (None, True):
        for y in each_way(b, "jax", copy):
            assert read_bytes(y) == read_bytes(b)
            assert address(y) != b.address
    assert rlx.ledger.copies == 6


# --- no_copies and the ledger --------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), pairs())
def test_no_copies_lets_sharing_through_and_stops_a_copy(source, target):
    x = make(source)
    with rlx.no_copies():
        for y in each_way(x, target, None):
            assert address(y) == address(x)
        text = refusal(x, target, True)
    assert "no_copies" in text
    assert f"{len(read_bytes(x))} bytes" in text
    rlx.exchange(x, target, copy=True)


@pytest.mark.torch
def test_no_copies_says_why_a_copy_was_needed():
    x = make("numpy")
    x.flags.writeable = False
    with rlx.no_copies():
        assert "read-only" in refusal(x, "torch", None)


@pytest.mark.torch
def test_the_reason_of_a_copy_is_in_the_ledger():
    x = make("numpy")
    x.flags.writeable = False
    with rlx.ledger.record() as record:
        rlx.exchange(x, "torch")
        rlx.exchange(x, "torch", copy=True)
    assert record.counts.reasons["read-only (to torch)"].bytes == x.nbytes
    assert record.counts.reasons[ASKED].bytes == x.nbytes
    assert (record.counts.exchanges, record.counts.copies) == (2, 2)
    assert record.counts.bytes_copied == 2 * x.nbytes


@pytest.mark.torch
def test_the_ledger_counts_every_exchange_of_many_threads():
    shared, copied = make("numpy"), make("numpy")
    copied.flags.writeable = False
    errors = []

    def work():
        try:
            for _ in range(200):
                rlx.exchange(shared, "torch")
                rlx.exchange(copied, "torch")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert rlx.ledger.exchanges == 8 * 400
    assert rlx.ledger.copies == 8 * 200
    assert rlx.ledger.bytes_copied == 8 * 200 * copied.nbytes


# --- explain agrees with exchange ----------------------------------------------------------------

SHARES, COPIED, REFUSED = "shares", "copies", "refused"


def _torch():
    import torch

    return torch


def _jnp():
    import jax.numpy as jnp

    return jnp


def _fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return _torch().ones(3)


def _deleted():
    x = make("jax")
    x.delete()
    return x


def _key():
    import jax

    return jax.random.key(0)


def _read_only(x):
    x.flags.writeable = False
    return x


def _field():
    return np.zeros(4, [("a", "u1"), ("b", "<f4")])["b"]


def _overlapping(shape, strides):
    return np.lib.stride_tricks.as_strided(aligned(64), shape, strides)


def _imaginary(dtype):
    """A tensor with the neg bit: the imaginary part of a conjugate."""
    return _torch().tensor([1 + 2j, 3 - 4j], dtype=dtype).conj().imag


def _nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return _torch().nested.nested_tensor([_torch().ones(2), _torch().ones(3)])


def _buffer(dtype="float32", shape=(4, 6)):
    return rlx.Buffer.from_array(make("numpy", dtype, shape), copy=True)


class Int4Exporter(Exporter):
    """An array of a dtype that no framework here reads alike."""

    def __dlpack__(self, **options):
        capsule = super().__dlpack__(**options)
        managed(capsule).dl_tensor.dtype.bits = 4
        return capsule


# id, array, target, what happens, the kind of obstacle, a piece of what is said about it
TRAPS = [
    # NumPy to torch
    ("plain", lambda: make("numpy"), "torch", SHARES, None, ""),
    ("bfloat16", lambda: make("numpy", "bfloat16"), "torch", SHARES, None, ""),
    ("transposed", lambda: make("numpy").T, "torch", SHARES, None, ""),
    ("strided", lambda: make("numpy")[::2, ::3], "torch", SHARES, None, ""),
    ("overlapping", lambda: _overlapping((4, 6), (0, 4)), "torch", SHARES, None, ""),
    ("strided-bfloat16", lambda: make("numpy", "bfloat16")[::2, ::3], "torch", SHARES, None, ""),
    ("empty", lambda: make("numpy", shape=(0, 3)), "torch", SHARES, None, ""),
    ("read-only", lambda: _read_only(make("numpy")), "torch", COPIED, "read-only", "writable"),
    ("negative", lambda: make("numpy")[::-1], "torch", COPIED, "strides", "negative"),
    ("negative-bf16", lambda: make("numpy", "bfloat16")[::-1], "torch", COPIED, "strides", "neg"),
    ("negative-unit", lambda: _overlapping((1, 8), (-4, 4)), "torch", SHARES, None, ""),
    ("odd-strides", _field, "torch", COPIED, None, ""),
    ("odd-address", lambda: offset(4, "float32", 1), "torch", COPIED, "alignment", "aligned"),
    ("odd-empty", lambda: _overlapping((0, 8), (5, 4)), "torch", None, None, ""),
    ("byte-swapped", lambda: np.ones(3, ">f4"), "torch", REFUSED, "dtype", "byte order"),
    ("structured", lambda: np.zeros(3, [("a", "f4")]), "torch", REFUSED, "dtype", "structured"),
    ("object", lambda: np.array([1, None], object), "torch", REFUSED, "dtype", "object"),
    ("text", lambda: np.array(["a"]), "torch", REFUSED, "dtype", "text"),
    ("dates", lambda: np.zeros(2, "M8[s]"), "torch", REFUSED, "dtype", "int64"),
    ("longdouble", lambda: np.zeros(2, np.longdouble), "torch", REFUSED, "dtype", ""),
    ("int4", lambda: np.zeros(4, ml_dtypes.int4), "torch", REFUSED, "dtype", "int4"),
    ("e3m4", lambda: np.zeros(4, ml_dtypes.float8_e3m4), "torch", REFUSED, "dtype", "float8_e3m4"),
    ("masked", lambda: np.ma.masked_array([1.0, 2.0], [0, 1]), "torch", REFUSED, None, "mask"),
    # NumPy to JAX
    ("plain", lambda: make("numpy"), "jax", SHARES, None, ""),
    ("bfloat16", lambda: make("numpy", "bfloat16"), "jax", SHARES, None, ""),
    ("transposed", lambda: make("numpy", shape=(2, 3, 4)).T, "jax", SHARES, None, ""),
    ("read-only", lambda: _read_only(make("numpy")), "jax", SHARES, None, ""),
    ("read-only-bf16", lambda: _read_only(make("numpy", "bfloat16")), "jax", SHARES, None, ""),
    ("unit-axis", lambda: _overlapping((1, 8), (12, 4)), "jax", SHARES, None, ""),
    ("misaligned", lambda: offset(4, "float32", 4), "jax", COPIED, "alignment", "64"),
    ("misaligned-bf16", lambda: offset(4, "bfloat16", 2), "jax", COPIED, "alignment", "64"),
    ("strided", lambda: make("numpy")[::2], "jax", COPIED, "strides", "compact"),
    ("negative", lambda: make("numpy")[::-1], "jax", COPIED, "strides", ""),
    ("overlapping", lambda: _overlapping((4, 6), (0, 4)), "jax", COPIED, "strides", ""),
    ("int64", lambda: make("numpy", "int64"), "jax", REFUSED, "x64", "jax_enable_x64"),
    ("uint64", lambda: make("numpy", "uint64"), "jax", REFUSED, "x64", "jax_enable_x64"),
    ("float64", lambda: make("numpy", "float64"), "jax", REFUSED, "x64", "jax_enable_x64"),
    ("complex128", lambda: make("numpy", "complex128"), "jax", REFUSED, "x64", "jax_enable_x64"),
    ("int64-misaligned", lambda: offset(4, "int64", 8), "jax", REFUSED, "x64", "jax_enable_x64"),
    ("byte-swapped", lambda: np.ones(3, ">f4"), "jax", REFUSED, "dtype", "byte order"),
    ("int4", lambda: np.zeros(4, ml_dtypes.int4), "jax", REFUSED, "dtype", "int4"),
    ("masked", lambda: np.ma.masked_array(aligned(2), [0, 1]), "jax", REFUSED, None, "mask"),
    # torch to NumPy
    ("plain", lambda: make("torch"), "numpy", SHARES, None, ""),
    ("bfloat16", lambda: make("torch", "bfloat16"), "numpy", SHARES, None, ""),
    ("transposed", lambda: make("torch").T, "numpy", SHARES, None, ""),
    ("expanded", lambda: make("torch", shape=(1, 6)).expand(4, 6), "numpy", SHARES, None, ""),
    ("conj", lambda: make("torch", "complex64").conj(), "numpy", COPIED, "conj", "resolve_conj"),
    ("neg", lambda: _imaginary(_torch().complex64), "numpy", COPIED, "neg", "resolve_neg"),
    ("neg-compact", lambda: _torch()._neg_view(make("torch")), "numpy", COPIED, "neg", ""),
    ("grad", lambda: make("torch").requires_grad_(), "numpy", REFUSED, "requires_grad", "detach"),
    ("sparse", lambda: make("torch").to_sparse(), "numpy", REFUSED, "protocol", "to_dense"),
    ("meta", lambda: make("torch").to("meta"), "numpy", REFUSED, "trace", "meta"),
    ("fake", _fake, "numpy", REFUSED, "trace", "fake"),
    ("nested", _nested, "numpy", REFUSED, None, ""),
    ("int4", lambda: _torch().empty(4, dtype=_torch().int4), "numpy", REFUSED, "dtype", "int4"),
    ("uint4", lambda: _torch().empty(4, dtype=_torch().uint4), "numpy", REFUSED, "dtype", "uint4"),
    # torch to JAX
    ("plain", lambda: make("torch"), "jax", SHARES, None, ""),
    ("bfloat16", lambda: make("torch", "bfloat16"), "jax", SHARES, None, ""),
    ("transposed", lambda: make("torch", shape=(2, 3, 4)).mT, "jax", SHARES, None, ""),
    ("misaligned", lambda: make("torch", shape=(8,))[1:], "jax", COPIED, "alignment", "64"),
    ("strided", lambda: make("torch")[:, ::2], "jax", COPIED, "strides", "compact"),
    ("expanded", lambda: make("torch", shape=(1, 6)).expand(4, 6), "jax", COPIED, "strides", ""),
    ("conj", lambda: make("torch", "complex64").conj(), "jax", COPIED, "conj", "resolve_conj"),
    ("neg", lambda: _imaginary(_torch().complex64), "jax", COPIED, "neg", "resolve_neg"),
    ("neg-compact", lambda: _torch()._neg_view(make("torch")), "jax", COPIED, "neg", "resolve_neg"),
    ("conj-128", lambda: make("torch", "complex128").conj(), "jax", REFUSED, "x64", ""),
    ("neg-64", lambda: _imaginary(_torch().complex128), "jax", REFUSED, "x64", ""),
    ("grad", lambda: make("torch").requires_grad_(), "jax", REFUSED, "requires_grad", "detach"),
    ("int64", lambda: make("torch", "int64"), "jax", REFUSED, "x64", "jax_enable_x64"),
    ("sparse", lambda: make("torch").to_sparse(), "jax", REFUSED, "protocol", "to_dense"),
    ("mkldnn", lambda: make("torch").to_mkldnn(), "jax", REFUSED, "protocol", "to_dense"),
    ("meta", lambda: make("torch").to("meta"), "jax", REFUSED, "trace", "meta"),
    ("fake", _fake, "jax", REFUSED, "trace", "fake"),
    ("nested", _nested, "jax", REFUSED, None, ""),
    ("int4", lambda: _torch().empty(4, dtype=_torch().int4), "jax", REFUSED, "dtype", "int4"),
    # JAX to NumPy and torch
    *(
        row
        for target in ("numpy", "torch")
        for row in (
            ("plain", lambda: make("jax"), target, SHARES, None, ""),
            ("bfloat16", lambda: make("jax", "bfloat16"), target, SHARES, None, ""),
            ("deleted", _deleted, target, REFUSED, "trace", "deleted"),
            ("key", _key, target, REFUSED, "dtype", "key_data"),
            ("int4", lambda: _jnp().zeros(4, "int4"), target, REFUSED, "dtype", "int4"),
        )
    ),
    ("e3m4", lambda: make("jax", "float8_e3m4"), "torch", REFUSED, "dtype", "float8_e3m4"),
    ("e3m4", lambda: make("jax", "float8_e3m4"), "numpy", SHARES, None, ""),
    # foreign exporters
    ("foreign", lambda: Exporter(make("numpy")), "numpy", SHARES, None, ""),
    ("foreign", lambda: Exporter(make("numpy")), "torch", SHARES, None, ""),
    ("foreign", lambda: Exporter(make("numpy")), "jax", SHARES, None, ""),
    ("foreign-ro", lambda: Exporter(_read_only(make("numpy"))), "numpy", SHARES, None, ""),
    ("foreign-ro", lambda: Exporter(_read_only(make("numpy"))), "torch", COPIED, "read-only", ""),
    ("foreign-ro", lambda: Exporter(_read_only(make("numpy"))), "jax", None, None, ""),
    ("foreign-neg", lambda: Exporter(make("numpy")[::-1]), "numpy", SHARES, None, ""),
    ("foreign-neg", lambda: Exporter(make("numpy")[::-1]), "torch", COPIED, "strides", ""),
    ("foreign-neg", lambda: Exporter(make("numpy")[::-1]), "jax", COPIED, "strides", ""),
    ("foreign-off", lambda: Exporter(offset(4, "float32", 4)), "jax", COPIED, "alignment", "64"),
    ("foreign-64", lambda: Exporter(make("numpy", "int64")), "jax", REFUSED, "x64", ""),
    ("foreign-int4", lambda: Int4Exporter(aligned(4, "int8")), "numpy", REFUSED, "dtype", "4 bits"),
    ("foreign-int4", lambda: Int4Exporter(aligned(4, "int8")), "jax", REFUSED, "dtype", "4 bits"),
    # buffers
    ("buffer", _buffer, "numpy", SHARES, None, ""),
    ("buffer", _buffer, "torch", SHARES, None, ""),
    ("buffer", _buffer, "jax", SHARES, None, ""),
    ("buffer-64", lambda: _buffer("int64"), "jax", REFUSED, "x64", "jax_enable_x64"),
    ("buffer-strided", lambda: _buffer()[:, ::2], "torch", SHARES, None, ""),
    ("buffer-strided", lambda: _buffer()[:, ::2], "jax", COPIED, "strides", "compact"),
    # a library's module
    ("plain", lambda: make("numpy"), library(), SHARES, None, ""),
    ("negative", lambda: make("numpy")[::-1], library(), COPIED, "strides", "negative"),
    ("read-only", lambda: _read_only(make("numpy")), library(), None, None, ""),
    ("grad", lambda: make("torch").requires_grad_(), library(), REFUSED, "requires_grad", ""),
    ("neg", lambda: _imaginary(_torch().complex64), library(), COPIED, "neg", ""),
    ("conj", lambda: make("torch", "complex64").conj(), library(), COPIED, "conj", ""),
]


def _needed(trap):
    code = trap[1].__code__
    text = " ".join(map(str, (*code.co_names, *code.co_consts, trap[1].__name__, trap[2])))
    names = {"torch": "_torch", "jax": "_jnp"}
    return {
        name
        for name, helper in names.items()
        if name in text.split() or helper in text or trap[2] == name
    }


def _trap_id(trap):
    target = trap[2] if isinstance(trap[2], str) else trap[2].__name__
    return f"{trap[0]}-to-{target}"


@pytest.mark.parametrize(
    "trap", [pytest.param(t, marks=needs(*_needed(t)), id=_trap_id(t)) for t in TRAPS]
)
class TestExplainAgrees:
    """For every trap: what `explain` says is what the contract says and what `exchange` does."""

    def test_says_what_the_contract_says(self, trap):
        _, build, target, outcome, kind, says = trap
        x = build()
        e = rlx.explain(x, target)
        found = SHARES if e else COPIED if e.can_copy else REFUSED
        assert outcome in (None, found)
        assert bool(e) is e.shares is (e.obstacle is None) is (e.reason is None)
        if kind is not None:
            assert e.reason == kind
        text = str(e)
        assert says in text
        assert f"to {target if isinstance(target, str) else target.__name__}" in text
        if e:
            assert "shares its memory" in text
            return
        assert e.obstacle.text in text
        assert e.obstacle.remedy in text
        if e.can_copy:
            assert f"would be copied ({e.byte_size:,} bytes)" in text
        else:
            assert "is refused, with a copy or without" in text

    def test_does_nothing(self, trap):
        _, build, target, *_ = trap
        x = build()
        alive = not (hasattr(x, "is_deleted") and x.is_deleted())
        where = address(x) if alive and _has_memory(x) else None
        before = read_bytes(x) if where else None
        rlx.ledger.reset()
        for _ in range(3):
            with rlx.no_copies():
                rlx.explain(x, target)
        assert rlx.ledger.snapshot() == LedgerCounts()
        if where:
            assert address(x) == where
            assert read_bytes(x) == before
        assert alive is not (hasattr(x, "is_deleted") and x.is_deleted())

    @pytest.mark.parametrize("copy", COPIES)
    def test_is_what_exchange_does(self, trap, copy):
        _, build, target, *_ = trap
        x = build()
        e = rlx.explain(x, target)
        if not e and (copy is False or not e.can_copy):
            text = refusal(x, target, copy)
            assert e.obstacle.text in text
            assert e.obstacle.remedy in text
            return
        name = target if isinstance(target, str) else target.__name__
        rlx.ledger.reset()  # of what building it took
        results = each_way(x, target, copy)
        source = x.array if isinstance(x, Exporter) else x
        expected = read_bytes(source)
        for y in results:
            assert read_bytes(y) == expected
            assert tuple(y.shape) == tuple(source.shape)
            assert rlx.dtype(y.dtype) == rlx.dtype(source.dtype)
            if expected:
                shared = address(y) == address(source)
                assert shared is (e.shares and copy is not True)
        reasons = {} if e else {f"{e.reason} (to {name})"}
        assert set(rlx.ledger.reasons) == ({ASKED} if copy else set(reasons))
        assert rlx.ledger.bytes_copied == (0 if e and not copy else 3 * e.byte_size)
        assert e.byte_size == len(expected)


def _has_memory(x):
    """Whether the bytes of an array can be read, to see that nobody touches them."""
    dtype = str(getattr(x, "dtype", ""))
    if dtype.startswith("key") or "int4" in dtype or getattr(x, "is_nested", False):
        return isinstance(x, np.ndarray)
    if not hasattr(x, "layout"):
        return hasattr(x, "shape")
    torch = _torch()
    return type(x) is torch.Tensor and x.layout is torch.strided and x.device.type != "meta"


def test_an_explanation_is_a_value_that_says_why():
    x = make("numpy")[::-1]
    e = rlx.explain(x, library("otherlib"))
    assert isinstance(e, rlx.Explanation)
    assert e.target == "otherlib"
    assert e == rlx.explain(x, library("otherlib"))
    with pytest.raises(AttributeError):
        e.shares = True
    assert "float32 numpy array of shape (4, 6) on cpu" in str(e)
    assert e.byte_size == x.nbytes


def test_explain_drops_the_capsule_it_looked_at():
    x = make("numpy")
    held = weakref.ref(x)
    foreign = Exporter(x)
    assert rlx.explain(foreign, "numpy")
    del x, foreign
    assert gone(held)


# --- copies in the framework itself, of odd arrays -----------------------------------------------


def test_a_copy_of_object_arrays_does_not_crash():
    must_run(
        """
import numpy as np, rlx_driver as rlx
x = np.array([1, None, "text", [2]] * 8, object)
try:
    y = rlx.exchange(x, "numpy", copy=True)
except rlx.DriverError:
    pass
else:
    assert y is not x and y.tolist() == x.tolist()
"""
    )


@pytest.mark.torch
def test_a_copy_within_torch_never_loses_a_gradient():
    x = make("torch").requires_grad_()
    assert "detach" in refusal(x, "torch", True)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: make("torch").to_sparse(), marks=pytest.mark.torch, id="sparse"),
        pytest.param(_fake, marks=pytest.mark.torch, id="fake"),
        pytest.param(
            lambda: _torch().empty(4, dtype=_torch().int4), marks=pytest.mark.torch, id="int4"
        ),
        pytest.param(_deleted, marks=pytest.mark.jax, id="deleted"),
    ],
)
def test_a_copy_within_a_framework_that_cannot_be_made_is_our_error(build):
    x = build()
    with pytest.raises(rlx.DriverError):
        rlx.exchange(x, registry.for_array(x).name, copy=True)
    assert rlx.ledger.copies == 0


@pytest.mark.torch
def test_a_copy_within_torch_resolves_lazy_bits():
    torch = _torch()
    for x in (make("torch", "complex64").conj(), _imaginary(torch.complex64)):
        y = rlx.exchange(x, "torch", copy=True)
        assert not y.is_conj()
        assert not y.is_neg()
        assert torch.equal(x, y)
