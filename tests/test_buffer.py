"""Buffers: making them, what they say, the views of their memory, slices, protocols, lifetimes."""

import copy
import gc
import itertools
import operator
import pickle
import types
import weakref

import ml_dtypes
import numpy as np
import pytest

import rlx_driver as rlx

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402

from buffer_support import address, in_thread, run_python, start, x64  # noqa: E402
from rlx_driver import dtypes  # noqa: E402

pytestmark = [
    pytest.mark.jax,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::rlx_driver.errors.RecompilationWarning"),
]

FRAMEWORKS = ["numpy", "torch", "jax"]
TABLE = list(dtypes.TABLE.values())
NAMES = [row.name for row in TABLE]
TORCH = [row for row in TABLE if row.torch and row.dlpack is not None and hasattr(torch, row.torch)]
JAX = [row for row in TABLE if row.jax and row.dlpack is not None]


def plus_one(x):
    return x + 1


def in_use():
    gc.collect()
    return rlx.Device("cpu").memory().in_use


def aranged(shape=(4, 16), dtype=np.float32):
    count = int(np.prod(shape))
    return rlx.Buffer.from_array(np.arange(count, dtype=dtype).reshape(shape), copy=True)


# --- making one ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [rlx.Buffer.zeros, rlx.Buffer.empty])
@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_empty_in_every_dtype(make, name):
    b = make((3, 5), name)
    assert (b.shape, b.dtype, b.device) == ((3, 5), rlx.dtype(name), rlx.Device("cpu"))
    assert (b.ndim, b.num_elements, len(b)) == (2, 15, 3)
    assert b.byte_size == 15 * b.dtype.itemsize
    assert b.strides == (5 * b.dtype.itemsize, b.dtype.itemsize)
    assert b.is_contiguous
    assert not b.is_closed
    assert b.epoch == 0
    assert b.address % 256 == 0
    assert bytes(b.host_bytes()) == bytes(b.byte_size)
    assert b


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), 7, (1, 1), np.int64(3), [2, 3]])
def test_odd_shapes(shape):
    b = rlx.Buffer.zeros(shape)
    expected = np.zeros(shape, np.float32)
    assert b.shape == expected.shape
    assert b.num_elements == expected.size
    for framework in FRAMEWORKS:
        a = b.array(framework)
        assert tuple(a.shape) == expected.shape
        if expected.size:
            assert address(a) == b.address
    assert bool(b)


@pytest.mark.parametrize("shape", [(-1,), (2, -3), (1.5,), "ab", None, (2, "x")])
def test_a_bad_shape(shape):
    with pytest.raises(rlx.ShapeError, match=r"negative|integers"):
        rlx.Buffer.zeros(shape)


def test_other_bad_arguments():
    with pytest.raises(rlx.DTypeError, match="float7"):
        rlx.Buffer.zeros(3, "float7")
    with pytest.raises(rlx.DeviceUnavailableError, match="fpga"):
        rlx.Buffer.zeros(3, device="fpga")
    with pytest.raises(TypeError, match=r"Buffer\.zeros"):
        rlx.Buffer()


def test_every_allocation_is_aligned():
    kept = [rlx.Buffer.zeros(n, "u8") for n in range(1, 64)]
    assert all(b.address % 256 == 0 for b in kept)
    spans = sorted((b.address, b.address + b.byte_size) for b in kept)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("nbytes", [1 << 46, 1 << 60, 1 << 62])
def test_more_than_the_memory_is_refused(nbytes):
    before = in_use()
    with pytest.raises(rlx.OutOfDeviceMemory, match=f"{nbytes:,} bytes.*cpu") as caught:
        rlx.Buffer.zeros(nbytes, "u8")
    assert isinstance(caught.value, MemoryError)
    assert in_use() == before


def test_a_size_that_overflows_64_bits_is_refused_too():
    with pytest.raises(rlx.OutOfDeviceMemory):
        rlx.Buffer.zeros((1 << 40, 1 << 40), "f64")


def aligned(shape, dtype=np.float32):
    """Memory of NumPy that every framework can share."""
    raw = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 64, np.uint8)
    begin = -address(raw) % 64
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return raw[begin : begin + count].view(dtype).reshape(shape)


def read_only(a):
    a.flags.writeable = False
    return a


MUTABLE_SOURCES = {
    "numpy": lambda: aligned((4, 16)),
    "torch": lambda: torch.zeros(4, 16),
    "strided numpy": lambda: aligned((4, 32))[:, ::2],
    "reversed numpy": lambda: aligned((4, 16))[::-1],
    "fortran": lambda: aligned((16, 4)).T,
    "transposed torch": lambda: torch.zeros(16, 4).T,
    "torch bf16": lambda: torch.zeros(4, 16, dtype=torch.bfloat16),
    "numpy bf16": lambda: aligned((4, 16), ml_dtypes.bfloat16),
    "torch with storage offset": lambda: torch.zeros(5, 16)[1:],
    "zero axes": lambda: aligned(()),
}
FIXED_SOURCES = {
    "read-only numpy": lambda: read_only(aligned((4, 16))),
    "jax": lambda: jnp.zeros((4, 16)),
    "jax bf16": lambda: jnp.zeros((4, 16), jnp.bfloat16),
}


class Foreign:
    """A DLPack exporter of no known framework."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


MUTABLE_SOURCES["foreign"] = lambda: Foreign(aligned((4, 16)))
FIXED_SOURCES["foreign read-only"] = lambda: Foreign(read_only(aligned((4, 16))))


def raw_of(source):
    return source.array if isinstance(source, Foreign) else source


def values_of(source):
    source = raw_of(source)
    return source.float().numpy() if isinstance(source, torch.Tensor) else np.asarray(source)


@pytest.mark.parametrize("copy", [False, None])
@pytest.mark.parametrize("make", MUTABLE_SOURCES.values(), ids=MUTABLE_SOURCES.keys())
def test_from_array_shares_what_can_be_written(make, copy):
    source = make()
    with rlx.no_copies():
        b = rlx.Buffer.from_array(source, copy=copy)
    assert b.address == address(raw_of(source))
    assert b.shape == tuple(raw_of(source).shape)
    b[...] = 3
    assert (values_of(source) == 3).all()
    raw_of(source)[...] = 4
    assert (b.numpy() == 4).all()
    b.update(lambda x: np.add(x, 1, out=x, casting="unsafe"), framework="numpy")
    assert (values_of(source) == 5).all()


@pytest.mark.parametrize("make", FIXED_SOURCES.values(), ids=FIXED_SOURCES.keys())
def test_from_array_copies_what_must_not_be_written(make):
    source = make()
    with pytest.raises(rlx.ZeroCopyError, match=r"copy=None|copy it|writ"):
        rlx.Buffer.from_array(source, copy=False)
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError, match="no_copies"):
        rlx.Buffer.from_array(source)
    with rlx.ledger.record() as r:
        b = rlx.Buffer.from_array(source)
    assert r.counts.copies == 1
    assert r.counts.bytes_copied == b.byte_size
    assert "read-only" in next(iter(r.counts.reasons))
    assert b.address != address(raw_of(source))
    assert b.address % 64 == 0
    b[...] = 3
    assert (values_of(source) == 0).all()
    b.update(lambda x: x + 1)
    assert (b.numpy() == 4).all()


ALL_SOURCES = {**MUTABLE_SOURCES, **FIXED_SOURCES}


@pytest.mark.parametrize("make", ALL_SOURCES.values(), ids=ALL_SOURCES.keys())
def test_from_array_with_copy_true_copies(make):
    source = make()
    with rlx.ledger.record() as r:
        b = rlx.Buffer.from_array(source, copy=True)
    assert r.counts.copies == 1
    assert b.is_contiguous
    assert b.address % 64 == 0
    assert b.dtype == rlx.dtype(raw_of(source).dtype)
    b[...] = 3
    assert (values_of(source) == 0).all()
    b.update(lambda x: x + 1)
    assert (b.numpy() == 4).all()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: torch.zeros(3, requires_grad=True), rlx.ZeroCopyError, "detach"),
        (lambda: np.array([object()]), rlx.ZeroCopyError, "dtype"),
        (lambda: np.zeros(3, "S5"), rlx.ZeroCopyError, "dtype"),
        (lambda: [1, 2], rlx.UnknownFrameworkError, "list"),
        (lambda: 3.0, rlx.UnknownFrameworkError, "float"),
        (lambda: torch.zeros(3, device="meta"), rlx.DriverError, "meta"),
    ],
    ids=["grad", "object", "bytes", "list", "float", "meta"],
)
@pytest.mark.parametrize("copy", [False, None, True])
def test_from_array_of_what_is_no_memory(make, error, text, copy):
    with pytest.raises(error, match=text):
        rlx.Buffer.from_array(make(), copy=copy)


def test_shared_memory_that_jax_cannot_see_says_so():
    source = aligned((65,))[1:]
    b = rlx.Buffer.from_array(source, copy=False)
    assert b.torch().data_ptr() == b.address
    with pytest.raises(rlx.ZeroCopyError, match="align"):
        b.jax()
    with pytest.raises(rlx.ZeroCopyError, match="align"):
        b.update(plus_one)
    assert b.epoch == 0
    assert rlx.Buffer.from_array(source, copy=True).jax().shape == (64,)


def test_from_bytes():
    data = np.arange(6, dtype=np.float32)
    for raw in (data.tobytes(), bytearray(data.tobytes()), memoryview(data), data.data.cast("B")):
        b = rlx.Buffer.from_bytes(raw, (2, 3), "f32")
        assert b.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert b.address % 256 == 0
        assert b.address != address(data)
    b[...] = 9
    assert data[0] == 0
    assert rlx.Buffer.from_bytes(b"", (0, 3), "f32").shape == (0, 3)
    assert rlx.Buffer.from_bytes(b"\x80\x3f", (), "bf16").numpy() == 1
    with pytest.raises(rlx.ShapeError, match=r"5 bytes.*takes 8"):
        rlx.Buffer.from_bytes(b"12345", 2, "f32")
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError):
        rlx.Buffer.from_bytes(b"1234", 1, "f32")


@pytest.mark.parametrize("name", NAMES)
def test_from_bytes_in_every_dtype(name):
    raw = bytes([0, 1] * 32)
    b = rlx.Buffer.from_bytes(raw, 64 // rlx.dtype(name).itemsize, name)
    assert bytes(b.host_bytes()) == raw


# --- views -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TORCH, ids=lambda row: row.name)
def test_torch_views_in_every_dtype(row):
    b = rlx.Buffer.zeros((3, 4), row.dtype)
    with rlx.no_copies():
        t = b.torch()
    assert t.dtype is getattr(torch, row.torch)
    assert (address(t), tuple(t.shape)) == (b.address, (3, 4))
    t.view(torch.uint8).fill_(1)
    assert set(bytes(b.host_bytes())) == {1}
    b.host_bytes()[:] = bytes(b.byte_size)
    assert not t.view(torch.uint8).any()


@pytest.mark.parametrize("row", JAX, ids=lambda row: row.name)
def test_jax_views_in_every_dtype(row):
    b = rlx.Buffer.zeros((3, 4), row.dtype)
    with x64(True), rlx.no_copies():
        j = b.jax()
        assert j.dtype == row.dtype
        assert (address(j), j.shape) == (b.address, (3, 4))
        b.host_bytes()[:] = bytes([1]) * b.byte_size
        assert set(np.asarray(j).tobytes()) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_a_dtype_that_a_framework_lacks_is_refused_by_name(name):
    b = rlx.Buffer.zeros((3, 4), name)
    for framework, known in (("torch", TORCH), ("jax", JAX)):
        if b.dtype in [row.dtype for row in known]:
            continue
        with pytest.raises(rlx.ZeroCopyError, match=framework if framework == "torch" else "JAX"):
            b.array(framework)
    assert b.numpy().dtype == b.dtype


def test_views_of_all_frameworks_share_one_memory():
    b = rlx.Buffer.zeros((4, 16))
    with rlx.no_copies():
        n, t, j = b.numpy(), b.torch(), b.jax()
    assert {address(n), address(t), address(j)} == {b.address}
    n[0, 0] = 1
    t[0, 1] = 2
    assert np.asarray(j)[0, :2].tolist() == [1, 2]
    b.update(lambda x: x * 10)
    assert n[0, :2].tolist() == t[0, :2].tolist() == [10, 20]
    assert n.flags.writeable
    assert not t.requires_grad


def test_the_second_call_gives_the_same_object():
    b = rlx.Buffer.zeros((4, 16))
    first = [b.numpy(), b.torch(), b.jax()]
    with rlx.ledger.record() as r:
        for _ in range(3):
            again = [b.numpy(), b.torch(), b.jax()]
            assert all(map(operator.is_, first, again))
        for framework, module in zip(FRAMEWORKS, (np, torch, jax), strict=True):
            assert b.array(framework) is b.array(module) is rlx.exchange(b, framework)
            assert b.array(framework) is first[FRAMEWORKS.index(framework)]
    assert r.counts.copies == 0
    b.update(plus_one)
    assert b.numpy() is first[0]
    assert b.torch() is first[1]
    assert b.jax() is b.jax() is not first[2]
    assert b.array(jnp) is b.jax()


def test_a_module_of_a_stranger_gets_a_verified_view():
    stranger = types.ModuleType("stranger")
    stranger.from_dlpack = np.from_dlpack
    b = rlx.Buffer.zeros((4, 16))
    a = b.array(stranger)
    assert address(a) == b.address
    assert b.array(stranger) is a
    liar = types.ModuleType("liar")
    liar.from_dlpack = lambda x: np.from_dlpack(x).copy()
    with pytest.raises(rlx.ZeroCopyError, match="address"):
        b.array(liar)
    with pytest.raises(rlx.UnknownFrameworkError):
        b.array(types.ModuleType("empty"))
    with pytest.raises(rlx.UnknownFrameworkError):
        b.array("tensorflow")


def test_views_from_several_threads():
    b = rlx.Buffer.zeros(64)
    n, t, j = b.numpy(), b.torch(), b.jax()
    for view, method in ((n, b.numpy), (t, b.torch), (j, b.jax)):
        assert in_thread(method) is view


# --- slices ----------------------------------------------------------------------------------

KEYS = [
    np.s_[1],
    np.s_[-1],
    np.s_[1:3],
    np.s_[:, 2],
    np.s_[1, 2],
    np.s_[...],
    np.s_[..., 3],
    np.s_[1, ...],
    np.s_[None],
    np.s_[:, None, 2:5],
    np.s_[::2, ::3],
    np.s_[::-1],
    np.s_[::-2, 5:1:-1],
    np.s_[2:2],
    np.s_[10:],
    np.s_[np.int64(1)],
    np.s_[np.array(1)],
    np.s_[:, np.int8(-1)],
    np.s_[()],
    np.s_[1, 2, ...],
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_slice_is_a_buffer_on_the_same_bytes(key):
    b = aranged()
    n = b.numpy()
    expected = n[key] if isinstance(n[key], np.ndarray) else np.asarray(n[key])
    with rlx.no_copies():
        part = b[key]
        view = part.numpy()
    assert type(part) is rlx.Buffer
    assert (part.shape, part.dtype, part.device) == (expected.shape, b.dtype, b.device)
    assert isinstance(view, np.ndarray)
    assert np.array_equal(view, expected)
    if part.num_elements:
        assert address(view) == part.address
        assert b.address <= part.address < b.address + b.byte_size
        part[...] = -7
        assert (n[key] == -7).all()
        assert b.epoch == part.epoch == 1
        n[key] = 5
        assert (view == 5).all()


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_torch_and_jax_views_of_slices_share_or_say_why_not(key):
    b = aranged()
    part = b[key]
    n = part.numpy()
    negative = any(s < 0 for s in part.strides)
    if negative and part.num_elements:
        with pytest.raises(rlx.ZeroCopyError, match="negative"):
            part.torch()
    elif not negative:
        t = part.torch()
        assert tuple(t.shape) == part.shape
        if part.num_elements:
            assert address(t) == part.address
            t[...] = -3
            assert (n == -3).all()
            assert (b.torch().numpy() == -3).sum() == part.num_elements
    if part.is_contiguous and part.address % 64 == 0:
        j = part.jax()
        assert np.array_equal(np.asarray(j), n)
        if part.num_elements:
            assert address(j) == part.address
    elif part.num_elements:
        with pytest.raises(rlx.ZeroCopyError, match=r"align|strides"):
            part.jax()


@pytest.mark.parametrize(
    "key",
    [
        [0, 1],
        np.array([0, 1]),
        np.array([1]),
        np.array(True),
        (0, [1]),
        True,
        np.True_,
        (True, 0),
        np.zeros((4, 16), bool),
        1.0,
        "a",
        torch.tensor([1]),
        jnp.array([0]),
        (slice(None), np.array([1, 2])),
    ],
    ids=str,
)
def test_an_index_that_would_copy_is_refused(key):
    b = aranged()
    with pytest.raises(rlx.DTypeError, match=r"slices|index"):
        b[key]
    with pytest.raises(rlx.DTypeError, match=r"slices|index"):
        b[key] = 0
    assert b.epoch == 0


@pytest.mark.parametrize("key", [4, -5, (0, 16), (0, 0, 0), (..., ...)])
def test_an_index_out_of_range(key):
    b = aranged()
    with pytest.raises(IndexError):
        b[key]


def test_slices_of_slices_and_iteration():
    b = aranged()
    part = b[1:][:, 4:8][1]
    assert part.numpy().tolist() == [36, 37, 38, 39]
    part[...] = 0
    assert b.numpy()[2, 3:9].tolist() == [35, 0, 0, 0, 0, 40]
    rows = list(b)
    assert [row.address for row in rows] == [b.address + 64 * i for i in range(4)]
    with pytest.raises(TypeError, match="length"):
        len(rlx.Buffer.zeros(()))
    assert b[1].epoch == b.epoch == part.epoch == 1


def test_torch_views_of_slices_share_the_version_counter():
    b = aranged()
    part, whole = b[1].torch(), b.torch()
    assert part._version == whole._version
    b.update(plus_one)
    assert part._version == whole._version == b[2].torch()._version


# --- reinterpretation ------------------------------------------------------------------------


def test_view_as_another_dtype():
    b = rlx.Buffer.from_array(np.ones((2, 4), ml_dtypes.bfloat16), copy=True)
    with rlx.no_copies():
        bits = b.view("uint16")
    assert (bits.shape, bits.dtype, bits.address) == ((2, 4), np.dtype(np.uint16), b.address)
    assert (bits.numpy() == 0x3F80).all()
    bits[0] = 0x4000
    assert b.numpy()[0].tolist() == [2, 2, 2, 2]
    assert bits.epoch == b.epoch == 1
    assert bits.torch().dtype is torch.uint16
    assert bits.jax().dtype == jnp.uint16
    bits.update(lambda x: x + 0)
    assert b.epoch == 2


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("u8", None, (4, 64)),
        ("f64", None, (4, 8)),
        ("bf16", None, (4, 32)),
        ("f32", (64,), (64,)),
        ("f32", 64, (64,)),
        ("u8", (2, 2, 64), (2, 2, 64)),
        ("complex64", (32,), (32,)),
        ("bool", None, (4, 64)),
        ("float8_e4m3fn", (256,), (256,)),
    ],
)
def test_view_shapes(dtype, shape, expected):
    b = rlx.Buffer.zeros((4, 16))
    part = b.view(dtype, shape)
    assert part.shape == expected
    assert part.byte_size == b.byte_size
    assert address(part.numpy()) == b.address
    part.view("u8").host_bytes()[3] = 1
    assert b.view("u8").numpy().flat[3] == 1


@pytest.mark.parametrize(
    ("buffer", "arguments", "error", "text"),
    [
        (lambda: rlx.Buffer.zeros(3), ("f64",), rlx.ShapeError, "does not divide"),
        (lambda: rlx.Buffer.zeros(()), ("u8",), rlx.ShapeError, "give a shape"),
        (lambda: rlx.Buffer.zeros(4), ("u8", (15,)), rlx.ShapeError, "15 bytes.*16"),
        (lambda: rlx.Buffer.zeros(4), ("f32", (-1,)), rlx.ShapeError, "negative"),
        (lambda: rlx.Buffer.zeros(4), ("float7",), rlx.DTypeError, "float7"),
        (lambda: rlx.Buffer.zeros((4, 4))[:, 1], ("u8",), rlx.ZeroCopyError, "contiguous"),
        (lambda: rlx.Buffer.zeros(4)[::-1], ("u8",), rlx.ZeroCopyError, "contiguous"),
    ],
)
def test_view_that_does_not_fit(buffer, arguments, error, text):
    with pytest.raises(error, match=text):
        buffer().view(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_view_as_bytes_and_back_in_every_dtype(name):
    b = rlx.Buffer.zeros((4, 16), name)
    raw = b.view("u8", (b.byte_size,))
    again = raw.view(name, (4, 16))
    raw.numpy()[-1] = 1
    assert again.numpy().tobytes() == b.numpy().tobytes() == bytes(b.byte_size - 1) + b"\x01"
    assert again.epoch == b.epoch


# --- the host --------------------------------------------------------------------------------


def test_host_bytes_are_the_memory():
    b = aranged()
    raw = b.host_bytes()
    assert (raw.nbytes, raw.format, raw.readonly, raw.ndim) == (256, "B", False, 1)
    raw[:4] = np.float32(9).tobytes()
    assert b.numpy()[0, 0] == 9
    assert bytes(b[1].host_bytes()) == b.numpy()[1].tobytes()
    with pytest.raises(rlx.ZeroCopyError, match="contiguous"):
        b[:, 1].host_bytes()
    assert rlx.Buffer.zeros((0, 3)).host_bytes().nbytes == 0


def test_as_f32_sees_and_never_converts():
    b = aranged()
    assert b.as_f32() is b.numpy()
    with pytest.raises(rlx.DTypeError, match=r"bfloat16.*astype"):
        rlx.Buffer.zeros(3, "bf16").as_f32()


def test_array_protocol():
    b = aranged()
    a = np.asarray(b)
    assert address(a) == b.address
    a[0, 0] = 9
    assert b.numpy()[0, 0] == 9
    assert address(np.array(b, copy=False)) == b.address
    assert address(np.array(b)) != b.address
    assert address(np.array(b, copy=True)) != b.address
    converted = np.asarray(b, dtype=np.float64)
    assert converted.dtype == np.float64
    assert converted[0, 0] == 9
    assert np.asarray(b, dtype=np.float32) is a or address(np.asarray(b, dtype=np.float32)) == (
        b.address
    )
    with pytest.raises((ValueError, TypeError)):
        np.array(b, dtype=np.float64, copy=False)
    with rlx.no_copies():
        assert address(np.asarray(b)) == b.address
        for copied in (lambda: np.array(b), lambda: np.asarray(b, dtype=np.float64)):
            with pytest.raises(rlx.ZeroCopyError, match="no_copies"):
                copied()
    assert np.asarray(rlx.Buffer.zeros(3, "bf16")).dtype == ml_dtypes.bfloat16


def test_from_dlpack_of_every_framework():
    b = aranged()
    for from_dlpack in (np.from_dlpack, torch.from_dlpack, jnp.from_dlpack):
        a = from_dlpack(b)
        assert address(a) == b.address
        b[0, 0] = 7
        assert float(a[0, 0]) == 7
    torch.from_dlpack(b)[0, 1] = 8
    np.from_dlpack(b)[0, 2] = 9
    assert b.numpy()[0, :3].tolist() == [7, 8, 9]
    half = rlx.Buffer.zeros(64, "bf16")
    assert torch.from_dlpack(half).dtype is torch.bfloat16
    assert jnp.from_dlpack(half).dtype == jnp.bfloat16
    assert torch.from_dlpack(b[1:, ::2]).stride() == (16, 2)


def test_dlpack_protocol():
    b = aranged()
    assert b.__dlpack_device__() == (1, 0)
    for options in (
        {},
        {"max_version": (1, 0)},
        {"stream": None},
        {"dl_device": (1, 0)},
        {"copy": False},
        {"copy": None, "max_version": (1, 1), "dl_device": (1, 0), "stream": None},
    ):
        capsule = b.__dlpack__(**options)
        name = "versioned" if "max_version" in options else "dltensor"
        assert name in repr(capsule)
        assert rlx.dlpack.inspect(capsule).address == b.address
    copied = b.__dlpack__(copy=True, max_version=(1, 0))
    assert rlx.dlpack.inspect(copied).address != b.address
    with pytest.raises((rlx.DriverError, BufferError, ValueError)):
        b.__dlpack__(stream=3)
    with pytest.raises((rlx.DriverError, BufferError, ValueError)):
        b.__dlpack__(dl_device=(2, 0))
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError, match="no_copies"):
        b.__dlpack__(copy=True)
    assert rlx.ledger.bytes_copied == 2 * b.byte_size  # that it was made with, and that asked for


def test_no_cuda_array_interface_on_the_host():
    b = aranged()
    assert not hasattr(b, "__cuda_array_interface__")
    with pytest.raises(AttributeError, match="cpu"):
        b.__cuda_array_interface__  # noqa: B018


def test_a_buffer_refuses_to_be_pickled_or_copied():
    for b in (aranged(), aranged()[1], rlx.BufferHandle("h", 3)):
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(rlx.DTypeError, match=r"does not pickle.*to_host"):
                attempt(b)


def test_repr():
    b = rlx.Buffer.zeros((2, 3), "bf16")
    assert repr(b) == "<Buffer bfloat16[2, 3] on cpu, epoch 0>"
    b.close()
    assert "closed" in repr(b)


# --- lifetimes -------------------------------------------------------------------------------


def test_closing_with_views_out():
    b = aranged()
    part, n, t, j = b[1], b.numpy(), b.torch(), b.jax()
    b.close()
    b.close()
    assert b.is_closed
    assert part.is_closed
    n[0, 0] = 5
    assert float(t[0, 0]) == 5 == np.asarray(j)[0, 0]
    for use in (b.numpy, b.torch, b.jax, lambda: b.update(plus_one), lambda: b[0], part.numpy,
                part.jax, lambda: b.copy_from(n), lambda: np.asarray(b), b.host_bytes,
                b.to_host, lambda: b.view("u8"), lambda: b.to("cpu")):  # fmt: skip
        with pytest.raises(rlx.ClosedHandleError, match="is closed"):
            use()


VIEWS = {
    "numpy": lambda b: b.numpy(),
    "torch": lambda b: b.torch(),
    "jax": lambda b: b.jax(),
    "slice": lambda b: b[100:200],
    "numpy of a slice": lambda b: b[100:].numpy(),
    "torch of a slice": lambda b: b[100:].torch(),
    "jax of a slice": lambda b: b[64:].jax(),
    "memoryview": lambda b: b.host_bytes(),
    "asarray": np.asarray,
    "torch.from_dlpack": torch.from_dlpack,
    "jnp.from_dlpack": jnp.from_dlpack,
    "capsule": lambda b: b.__dlpack__(max_version=(1, 0)),
    "parameter": lambda b: torch.nn.Parameter(b.torch()),
    "updated jax": lambda b: (b.jax(), b.update(plus_one), b.jax())[2],
    "numpy of jax": lambda b: np.asarray(b.jax()),
}


@pytest.mark.parametrize("take", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("closing", [False, True])
def test_memory_lives_as_long_as_the_last_view(take, closing):
    before = in_use()
    b = rlx.Buffer.zeros(1000)
    gone = weakref.ref(b)
    view = take(b)
    if closing and not isinstance(view, rlx.Buffer):
        b.close()
    del b
    gc.collect()
    assert (gone() is None) == (not isinstance(view, rlx.Buffer))
    assert in_use() == before + 4000
    del view
    assert in_use() == before


def test_a_buffer_with_all_kinds_of_views_frees_its_memory():
    before = in_use()
    for _ in range(3):
        b = rlx.Buffer.zeros((64, 64))
        b.numpy(), b.torch(), b.jax(), b[1].torch(), b[2].jax(), b.view("u8").numpy()
        b.update(plus_one)
        with b.write("torch") as t:
            t += 1
        rlx.commit(b, jax.jit(plus_one, donate_argnums=0)(b.jax()))
        del b, t
    assert in_use() == before


def test_shared_memory_keeps_its_owner_alive():
    source = torch.zeros(64)
    storage = weakref.ref(source)
    b = rlx.Buffer.from_array(source, copy=False)
    n = b.numpy()
    where = address(source)
    del source, b
    gc.collect()
    n += 1
    assert address(n) == where
    assert n.sum() == 64
    del storage


def test_memory_of_many_threads_is_accounted():
    before = in_use()

    def many():
        kept = [rlx.Buffer.zeros(100) for _ in range(50)]
        for b in kept:
            b.numpy()

    for future in [start(many) for _ in range(4)]:
        future.result(timeout=60)
    gc.collect()
    assert in_use() == before


# --- fork ------------------------------------------------------------------------------------


def test_after_a_fork_the_childs_use_raises_and_the_parent_goes_on():
    out = run_python(
        """
        import os, signal, sys, warnings
        warnings.simplefilter("ignore")
        import numpy as np, jax, torch, rlx_driver as rlx
        b, h = rlx.Buffer.zeros((4, 16)), rlx.BufferHandle("h", (4, 16))
        unused = rlx.BufferHandle("unused", 3)
        part = b[1]
        step = lambda x: x + 1
        b.update(step), h.update(step)
        for x in (b, h, part):
            x.numpy(), x.torch(), x.jax()
        scope = b.read("numpy")
        scope.__enter__()
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # a hang in the child ends it
            failed = []
            for x in (b, h, part, unused):
                for use in (x.numpy, x.torch, x.jax, lambda: x.update(step), lambda: x[0],
                            lambda: x.copy_from(np.zeros(x.shape, np.float32)),
                            lambda: x.read("numpy").__enter__(),
                            lambda: x.write("numpy").__enter__(),
                            lambda: np.asarray(x), lambda: rlx.views([x], "numpy"),
                            lambda: x.__setitem__(..., 0), x.to_host, x.__dlpack__):
                    try:
                        use()
                    except rlx.StaleViewError as error:
                        if "parent" not in str(error) or "spawn" not in str(error):
                            failed.append(str(error))
                    else:
                        failed.append(f"{x!r} {use}")
            fresh = rlx.Buffer.zeros(3)  # memory of the child's own
            with fresh.write("numpy") as n:
                n += 1
            sys.stderr.write("\\n".join(failed))
            os._exit(len(failed))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        scope.__exit__(None, None, None)
        for x in (b, h):
            x.update(step)
            assert (x.numpy() == 2).all() and (np.asarray(x.jax()) == 2).all()
        print("parent")
        """
    )
    assert out.strip() == "parent"


@pytest.mark.parametrize("copy", [None, False])
def test_a_buffer_made_of_a_buffer_shares_its_discipline(copy):
    b = rlx.Buffer.zeros((4, 16))
    again = rlx.Buffer.from_array(b, copy=copy)
    assert again.address == b.address
    with b.write("numpy"), pytest.raises(rlx.StaleViewError):
        again.numpy()
    assert again.epoch == b.epoch == 1
    apart = rlx.Buffer.from_array(b, copy=True)
    assert apart.address != b.address
    with b.write("numpy"):
        assert (apart.numpy() == 0).all()
