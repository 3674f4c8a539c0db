"""Typed I/O: float32 into raw bytes of every dtype by value, and back."""

from __future__ import annotations

import array
import mmap
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver import _casts
from rlx_driver._casts_numpy import writer
from rlx_driver.dtypes import TABLE
from support import installed, must_run, offset
from typed_support import (
    DTYPES,
    INTEGERS,
    NARROW,
    assert_same,
    expected,
    random_values,
    telling_values,
)

BF16 = rlx.dtype("bf16")


@pytest.fixture(params=["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def way(request, monkeypatch):
    """Both ways of converting: as if torch were not loaded, and with it."""
    if request.param == "torch":
        pytest.importorskip("torch")
    else:
        monkeypatch.setattr(_casts, "framework_kernels", lambda dtype: (None, None))
    return request.param


def written(dtype, values, **options):
    raw = bytearray(values.size * dtype.itemsize)
    assert rlx.write_typed_from_f32(raw, dtype, values, **options) == values.size
    return np.frombuffer(raw, dtype)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_can_tell_are_written_as_ml_dtypes_does(way, dtype):
    values = telling_values(dtype)
    if values.size < 1 << 17:  # enough for the ways of large arrays, and an odd number
        many = np.tile(values, (1 << 17) // values.size + 1)
        assert_same(written(dtype, many)[: values.size], expected(dtype, values))
        assert_same(written(dtype, many)[-values.size :], expected(dtype, values))
    else:
        assert_same(written(dtype, values), expected(dtype, values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_values_are_written_as_many_are(way, dtype):
    values = telling_values(dtype)[-700:]
    assert_same(written(dtype, values), expected(dtype, values))
    for value in (0.0, -0.0, 1.5, -1.5, 1e30, np.nan, np.inf, -np.inf):
        one = np.array([value], np.float32)
        assert_same(written(dtype, one), expected(dtype, one))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_values_are_written_as_ml_dtypes_does(way, dtype):
    values = random_values(50_000 if dtype in INTEGERS else 1_000_000, seed=3)
    assert_same(written(dtype, values), expected(dtype, values))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_upper_half_of_a_float32_is_written_as_ml_dtypes_does(way, dtype):
    halves = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    bits = halves | np.array([0, 1, 0x4000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = bits.reshape(-1).view(np.float32)
    assert_same(written(dtype, values), expected(dtype, values))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize <= 2], ids=str)
def test_every_pattern_is_read_as_its_value(way, dtype):
    patterns = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}")
    if dtype.kind == "b":
        wanted = (patterns != 0).astype(np.float32)
    else:
        with np.errstate(all="ignore"):
            wanted = patterns.view(dtype).astype(np.float32)
    assert_same(rlx.read_typed_to_f32(patterns.view(np.uint8), dtype, patterns.size), wanted)
    many = np.tile(patterns.view(np.uint8), 1 << 9)[: -dtype.itemsize]
    found = rlx.read_typed_to_f32(many, dtype, many.size // dtype.itemsize)
    assert_same(found, np.tile(wanted, 1 << 9)[:-1])


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize > 2], ids=str)
def test_wide_dtypes_are_read_as_numpy_reads_them(way, dtype):
    generator = np.random.default_rng(1)
    if dtype in INTEGERS:
        bits = generator.integers(0, 1 << 63, 100_000, np.uint64) * 2
        bits >>= generator.integers(0, 64, bits.size).astype(np.uint64)
        near = [(1 << k) + j for k in range(24, 63) for j in (-1, 0, 1, 1 << (k - 24))]
        values = np.concatenate([bits.astype(dtype), np.array(near, np.uint64).astype(dtype)])
        wanted = values.astype(np.float32)
    else:
        with np.errstate(all="ignore"):
            wide = random_values(50_000).astype(np.float64) * (1 + 2.0**-25)
            values = np.append(wide, [1e300, -1e300, 5e-324, np.nan, np.inf]).astype(dtype)
            values = values + np.array(1j).astype(dtype) if dtype.kind == "c" else values
            wanted = values.real.astype(np.float32)
    assert_same(rlx.read_typed_to_f32(values.view(np.uint8), dtype, values.size), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_read_is_written_back_the_same(way, dtype):
    if dtype.itemsize > 2:
        values = np.arange(-70_000, 70_000, dtype=np.float32)
        if dtype in INTEGERS and dtype.kind == "u":
            values = np.abs(values)
        raw = written(dtype, values)
        assert_same(rlx.read_typed_to_f32(raw.view(np.uint8), dtype, values.size), values)
        return
    patterns = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(np.uint8)
    values = rlx.read_typed_to_f32(patterns, dtype, patterns.size // dtype.itemsize)
    again = written(dtype, np.tile(values, 70))[: values.size]
    assert_same(rlx.read_typed_to_f32(again.view(np.uint8), dtype, values.size), values)


def test_infinity_and_nan_into_integers_give_the_ends_and_zero(way):
    x = np.array([np.inf, -np.inf, np.nan, 3e9, -3e9, 1e20, -1e20], np.float32)
    for dtype in INTEGERS:
        low, high = (int(getattr(ml_dtypes.iinfo(dtype), end)) for end in ("min", "max"))
        got = [int(v) for v in written(dtype, x)]
        assert got[:3] == [high, low, 0]
        assert got[5:] == [high, low]


# --- bytes ---------------------------------------------------------------------------------------


def writable_kinds():
    kinds = ["bytearray", "memoryview", "mmap", "numpy", "array", "buffer", "buffer 2-d", "slice"]
    return [*kinds, *(pytest.param(f"torch{x}", marks=pytest.mark.torch) for x in ("", " slice"))]


def make(kind, nbytes):
    """Memory of `nbytes` of 0xEE, and a function that gives its bytes."""
    if kind == "bytearray":
        found = bytearray(b"\xee" * nbytes)
        return found, lambda: bytes(found)
    if kind == "memoryview":
        whole = bytearray(b"\xee" * (nbytes + 3))
        return memoryview(whole)[3:], lambda: bytes(whole[3:])
    if kind == "mmap":
        mapped = mmap.mmap(-1, nbytes)
        mapped[:] = b"\xee" * nbytes
        return mapped, lambda: mapped[:]
    if kind == "numpy":
        raw = offset(nbytes, np.uint8, 1)
        raw[:] = 0xEE
        return raw, raw.tobytes
    if kind == "array":
        words = array.array("H", [0xEEEE] * (nbytes // 2))
        return words, words.tobytes
    if kind.startswith("torch"):
        import torch

        memory = torch.full((nbytes + 1,), 0xEE, dtype=torch.uint8)
        memory = memory[1:] if kind == "torch slice" else memory[:-1]
        return memory, lambda: memory.numpy().tobytes()
    buffer = rlx.Buffer.zeros((2, nbytes // 2) if kind == "buffer 2-d" else nbytes + 5, "u8")
    if kind == "slice":
        buffer = buffer[5:]
    elif kind == "buffer":
        buffer = buffer[:nbytes]
    buffer[...] = 0xEE
    return buffer, lambda: buffer.numpy().tobytes()


@pytest.mark.parametrize("count", [1, 3, 5000, 70_001])
@pytest.mark.parametrize("dtype", ["bf16", "f8_e4m3fn", "i32", "f64", "c128", "int4", "bool"])
@pytest.mark.parametrize("kind", writable_kinds())
def test_bytes_of_every_kind_are_written_and_read(way, kind, dtype, count):
    dtype = rlx.dtype(dtype)
    values = random_values(count)[:count]
    used = count * dtype.itemsize
    memory, content = make(kind, used + 6 + used % 2)
    assert rlx.write_typed_from_f32(memory, dtype, values) == count
    found = content()
    assert_same(np.frombuffer(found[:used], dtype), expected(dtype, values))
    assert set(found[used:]) == {0xEE}, "bytes behind the last element are left alone"
    with np.errstate(all="ignore"):
        wanted = np.frombuffer(found[:used], dtype).real.astype(np.float32)
    assert_same(rlx.read_typed_to_f32(memory, dtype, count), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_may_lie_at_any_address(way, dtype):
    values = random_values(40_000)
    for start in range(1, dtype.itemsize + 1):
        raw = np.full(values.size * dtype.itemsize + start + 9, 0xEE, np.uint8)
        inside = raw[start : start + values.size * dtype.itemsize]
        rlx.write_typed_from_f32(inside, dtype, values)
        assert (raw[:start] == 0xEE).all()
        assert (raw[start + inside.size :] == 0xEE).all()
        found = np.frombuffer(inside.tobytes(), dtype)
        if dtype not in INTEGERS:
            assert_same(found, expected(dtype, values))
        with np.errstate(all="ignore"):
            wanted = found.real.astype(np.float32)
        assert_same(rlx.read_typed_to_f32(inside, dtype, values.size), wanted)


def test_values_may_lie_at_any_address(way):
    raw = np.zeros(40_000 * 4 + 1, np.uint8)
    values = raw[1:].view(np.float32)
    values[:] = random_values(20_000)
    assert not values.flags.aligned
    assert_same(written(BF16, values), expected(BF16, values))


@pytest.mark.torch
@pytest.mark.jax
def test_arrays_of_every_framework_are_read():
    import jax.numpy as jnp
    import torch

    raw = written(BF16, np.arange(6, dtype=np.float32)).view(np.uint8)
    read_only = raw.copy()
    read_only.flags.writeable = False
    held = rlx.Buffer.from_array(raw.reshape(3, 4), copy=True)
    for bytes_ in (raw, read_only, raw.tobytes(), jnp.array(raw), torch.tensor(raw), held):
        assert rlx.read_typed_to_f32(bytes_, "bf16", 6).tolist() == [0, 1, 2, 3, 4, 5]
        assert rlx.read_typed_to_f32(bytes_, "bf16", 2).tolist() == [0, 1]


# --- values of every kind ------------------------------------------------------------------------


def sources():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    strided = np.zeros((4, 6), np.float32)
    strided[::2, ::2] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    return {
        "numpy": x,
        "transposed": np.asfortranarray(x),
        "strided": strided[::2, ::2],
        "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": read_only,
        "list": [0, 1.0, 2, 3, 4, 5],
        "nested": [[0, 1, 2], [3, 4, 5]],
        "tuple": (0, True, 2, 3, 4.0, np.float32(5)),
        "range": range(6),
        "memoryview": memoryview(x),
        "array": array.array("f", range(6)),
        "buffer": rlx.Buffer.from_array(x, copy=True),
    }


@pytest.mark.parametrize("kind", list(sources()))
def test_values_of_every_kind_are_taken_in_c_order(kind):
    raw = bytearray(12)
    assert rlx.write_typed_from_f32(raw, "bf16", sources()[kind]) == 6
    assert np.frombuffer(raw, BF16).astype(np.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.torch
@pytest.mark.jax
def test_values_of_every_framework_are_taken_in_c_order():
    import jax.numpy as jnp
    import torch

    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    t = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    negative = torch.complex(torch.zeros(2, 3), -t).conj().imag  # carries the negative bit
    assert negative.is_neg()
    transposed = torch.tensor(np.asfortranarray(x).T.copy()).T
    for values in (t, transposed, negative, jnp.array(x), jnp.array(x.T).T):
        tensor = torch.zeros(12, dtype=torch.uint8)
        for memory in (bytearray(12), tensor, rlx.Buffer.zeros(12, "u8")):
            assert rlx.write_typed_from_f32(memory, "bf16", values) == 6
            assert rlx.read_typed_to_f32(memory, "bf16", 6).tolist() == [0, 1, 2, 3, 4, 5]
            assert rlx.write_typed_from_f32(memory, "bf16", values, max_elems=2) == 2


def test_numbers_are_rounded_to_float32_first():
    for value in (1.5, np.float32(1.5), np.array(1.5, np.float32)):
        raw = bytearray(4)
        assert rlx.write_typed_from_f32(raw, "f32", value) == 1
        assert np.frombuffer(raw, np.float32) == 1.5
    raw = bytearray(24)
    assert rlx.write_typed_from_f32(raw, "f64", [1e300, 10**30, 0.1]) == 3
    assert np.frombuffer(raw, np.float64).tolist() == [np.inf, np.float32(1e30), np.float32(0.1)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros(2), "astype"),
        (np.zeros(2, np.float16), "astype"),
        (np.zeros(2, ">f4"), "astype"),
        (np.zeros(2, ml_dtypes.bfloat16), "astype"),
        (np.zeros(2, np.int32), "astype"),
        (np.float16(1), "astype"),
        (bytearray(8), "astype"),
        (array.array("d", [1]), "astype"),
        (rlx.Buffer.zeros(2, "u8"), "view"),
        ("1.5", "number"),
        (["1.5"], "number"),
        ([1, None], "number"),
        ([1j], "number"),
        ([[1, 2], [3]], "number"),
        pytest.param(object(), "number", id="object"),
        (None, "number"),
    ],
    ids=repr,
)
def test_other_values_are_refused(values, says):
    raw = bytearray(b"\xee" * 64)
    with pytest.raises(rlx.DTypeError, match=says):
        rlx.write_typed_from_f32(raw, "bf16", values)
    assert set(raw) == {0xEE}


@pytest.mark.torch
@pytest.mark.jax
def test_arrays_whose_values_cannot_be_read_are_refused():
    import jax
    import jax.numpy as jnp
    import torch

    raw = bytearray(b"\xee" * 8)
    with pytest.raises(rlx.ZeroCopyError, match="detach"):
        rlx.write_typed_from_f32(raw, "f32", torch.zeros(2, requires_grad=True))
    with pytest.raises(rlx.ZeroCopyError, match="memory"):
        rlx.write_typed_from_f32(raw, "f32", torch.zeros(2, device="meta"))
    with pytest.raises(rlx.ZeroCopyError, match="mask"):
        rlx.write_typed_from_f32(raw, "f32", np.ma.zeros(2, np.float32))
    for values in (torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(rlx.DTypeError, match="float"):
            rlx.write_typed_from_f32(raw, "f32", values)
    with pytest.raises(rlx.DTypeError, match="float32"):
        rlx.write_typed_from_f32(raw, "f32", jnp.zeros(2, jnp.int32))
    with pytest.raises((rlx.ZeroCopyError, rlx.DTypeError)):
        jax.jit(lambda x: rlx.write_typed_from_f32(raw, "f32", x))(jnp.zeros(2))
    assert set(raw) == {0xEE}


# --- bad input -----------------------------------------------------------------------------------


def test_more_than_fits_raises_before_a_byte_changes():
    for memory in (bytearray(b"\xee" * 11), np.full(11, 0xEE, np.uint8)):
        with pytest.raises(rlx.ShapeError, match="max_elems=5"):
            rlx.write_typed_from_f32(memory, "bf16", np.zeros(6, np.float32))
        assert set(bytes(memory)) == {0xEE}
    buffer = rlx.Buffer.zeros(11, "u8")
    with pytest.raises(rlx.ShapeError, match="max_elems=5"):
        rlx.write_typed_from_f32(buffer, "bf16", np.ones(6, np.float32))
    assert buffer.epoch == 0
    assert not buffer.numpy().any()
    with pytest.raises(rlx.ShapeError, match="hold 5"):
        rlx.read_typed_to_f32(bytes(11), "bf16", 6)
    with pytest.raises(rlx.ShapeError, match="hold 5"):
        rlx.read_typed_to_f32(buffer, "bf16", 6)


def test_max_elems_writes_so_many():
    raw = bytearray(b"\xee" * 6)
    values = np.arange(1, 9, dtype=np.float32)
    assert rlx.write_typed_from_f32(raw, "bf16", values, max_elems=2) == 2
    assert rlx.read_typed_to_f32(raw, "bf16", 2).tolist() == [1, 2]
    assert raw[4:] == b"\xee\xee"
    assert rlx.write_typed_from_f32(raw, "bf16", values, max_elems=np.int64(3)) == 3
    assert rlx.write_typed_from_f32(raw, "bf16", values[:1], max_elems=100) == 1


@pytest.mark.parametrize("bad", [-1, 1.5, "3", np.int64(-2), [1]])
def test_a_number_of_elements_is_one(bad):
    raw = bytearray(8)
    with pytest.raises(rlx.ShapeError, match="max_elems"):
        rlx.write_typed_from_f32(raw, "bf16", [1.0], max_elems=bad)
    with pytest.raises(rlx.ShapeError, match="number of elements"):
        rlx.read_typed_to_f32(raw, "bf16", bad)
    assert not any(raw)


def test_memory_that_cannot_be_written_is_refused():
    frozen = np.zeros(8, np.uint8)
    frozen.flags.writeable = False
    for memory in (b"12345678", memoryview(b"12345678"), frozen):
        with pytest.raises(rlx.ZeroCopyError, match="read-only"):
            rlx.write_typed_from_f32(memory, "bf16", [1.0])


def test_memory_of_another_form_is_refused():
    for memory in (np.zeros((2, 4), np.uint8), np.zeros(16, np.uint8)[::2]):
        with pytest.raises(rlx.ShapeError, match="C order"):
            rlx.write_typed_from_f32(memory, "bf16", [1.0])
    with pytest.raises(rlx.ShapeError, match="gaps"):
        rlx.write_typed_from_f32(memoryview(bytearray(16))[::2], "bf16", [1.0])
    with pytest.raises(rlx.ShapeError, match="gaps"):
        rlx.write_typed_from_f32(rlx.Buffer.zeros((4, 4), "u8")[:, :2], "bf16", [1.0])
    for memory in (np.zeros(8, np.int8), rlx.Buffer.zeros(8, "bf16"), np.zeros(8, object)):
        with pytest.raises((rlx.DTypeError, rlx.ZeroCopyError), match=r"uint8|references"):
            rlx.write_typed_from_f32(memory, "bf16", [1.0])
    for memory in (7, None, [0] * 8, "text"):
        with pytest.raises(rlx.DTypeError, match="uint8"):
            rlx.write_typed_from_f32(memory, "bf16", [1.0])
    with pytest.raises(rlx.DTypeError, match="float99"):
        rlx.write_typed_from_f32(bytearray(8), "float99", [1.0])
    with pytest.raises(rlx.DTypeError, match="float99"):
        rlx.read_typed_to_f32(bytearray(8), "float99", 1)


@pytest.mark.torch
def test_tensors_of_another_form_are_refused():
    import torch

    for memory in (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)[::2]):
        with pytest.raises(rlx.ShapeError, match="C order"):
            rlx.write_typed_from_f32(memory, "bf16", [1.0])
    for dtype in (torch.int8, torch.bool, torch.float32):
        with pytest.raises(rlx.DTypeError, match="uint8"):
            rlx.write_typed_from_f32(torch.zeros(8, dtype=dtype), "bf16", [1.0])
    for memory in (
        torch.zeros(8, dtype=torch.uint8, device="meta"),
        torch.zeros(8, dtype=torch.uint8).to_sparse(),
    ):
        with pytest.raises(rlx.ZeroCopyError):
            rlx.write_typed_from_f32(memory, "bf16", [1.0])
        with pytest.raises(rlx.ZeroCopyError):
            rlx.read_typed_to_f32(memory, "bf16", 1)

    def traced(memory):
        with pytest.raises(rlx.ZeroCopyError):
            rlx.write_typed_from_f32(memory, "bf16", [1.0])
        return memory

    assert not torch.func.vmap(traced)(torch.zeros(3, 8, dtype=torch.uint8)).any()
    kept = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    assert rlx.write_typed_from_f32(kept, "bf16", [1.0]) == 1
    assert rlx.read_typed_to_f32(kept, "bf16", 2).tolist() == [1, 0]


@pytest.mark.jax
def test_an_array_of_jax_is_not_written():
    import jax.numpy as jnp

    with pytest.raises(rlx.ZeroCopyError, match="immutable"):
        rlx.write_typed_from_f32(jnp.zeros(8, jnp.uint8), "bf16", [1.0])


def test_nothing_is_written_and_read():
    for memory in (bytearray(), bytearray(5), np.zeros(0, np.uint8), rlx.Buffer.zeros(0, "u8")):
        assert rlx.write_typed_from_f32(memory, "f64", np.zeros((0, 3), np.float32)) == 0
        assert rlx.write_typed_from_f32(memory, "f64", []) == 0
        assert rlx.write_typed_from_f32(memory, "f64", [1.0], max_elems=0) == 0
        empty = rlx.read_typed_to_f32(memory, "f64", 0)
        assert empty.shape == (0,)
        assert empty.dtype == np.float32
    with pytest.raises(rlx.ZeroCopyError):
        rlx.write_typed_from_f32(b"", "f64", [])


# --- a read into memory that is there ------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_into_an_array(way, dtype):
    for count in (7, 3000, 40_001):
        stored = expected(dtype, random_values(count)[:count])
        with np.errstate(all="ignore"):
            wanted = stored.real.astype(np.float32)
        whole = np.full(count + 2, 7, np.float32)
        out = whole[1:-1]
        assert rlx.read_typed_to_f32(stored.view(np.uint8), dtype, count, out) is out
        assert_same(out, wanted)
        assert (whole[0], whole[-1]) == (7, 7)


@pytest.mark.parametrize("count", [6, 40_002])
@pytest.mark.parametrize("kind", writable_kinds())
def test_bytes_of_every_kind_are_read_into_an_array(way, kind, count):
    values = expected(BF16, random_values(count)[:count])
    memory, _ = make(kind, 2 * count + 6)
    rlx.write_typed_from_f32(memory, "bf16", values.astype(np.float32))
    for shape in ((count,), (2, count // 2), (1, 2, count // 2, 1)):
        out = np.zeros(shape, np.float32)
        address = out.ctypes.data
        assert rlx.read_typed_to_f32(memory, "bf16", count, out=out) is out
        assert out.ctypes.data == address
        assert_same(out.reshape(-1), values.astype(np.float32))


def test_an_array_of_any_address_or_class_is_filled(way, tmp_path):
    values = expected(BF16, random_values(20_000))
    raw, count = values.view(np.uint8), values.size
    bytes_ = np.zeros(4 * count + 1, np.uint8)
    odd = bytes_[1:].view(np.float32)
    assert not odd.flags.aligned
    mapped = np.memmap(tmp_path / "out", np.float32, "w+", shape=(count,))
    matrix = np.zeros((2, count // 2), np.float32).view(np.matrix)
    for out in (odd, mapped, matrix):
        for source in (raw, raw.tobytes(), rlx.Buffer.from_array(raw, copy=True)):
            out[...] = 0
            assert rlx.read_typed_to_f32(source, "bf16", count, out) is out
            assert_same(np.asarray(out).reshape(-1).copy(), values.astype(np.float32))
    mapped.flush()
    on_disk = np.fromfile(tmp_path / "out", np.float32)
    assert_same(on_disk, values.astype(np.float32))


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 4000, 79_996])
@pytest.mark.parametrize("dtype", ["bf16", "f8_e4m3fn", "f32", "i16", "f64", "int4"])
@pytest.mark.parametrize("kind", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def test_an_array_may_overlap_the_bytes(way, kind, dtype, shift):
    dtype, count = rlx.dtype(dtype), 20_000
    for bytes_first in (True, False):
        memory = np.zeros(count * 12 + 80_000, np.uint8)
        start, place = (0, shift - shift % 4) if bytes_first else (shift, 0)
        stored = expected(dtype, random_values(count)[:count])
        source = memory[start : start + stored.nbytes]
        source[:] = stored.view(np.uint8)
        out = memory[place : place + 4 * count].view(np.float32)
        if kind == "torch":
            import torch

            source = torch.from_numpy(source)
        assert rlx.read_typed_to_f32(source, dtype, count, out) is out
        with np.errstate(all="ignore"):
            assert_same(out.copy(), stored.real.astype(np.float32))


def test_an_array_may_be_a_view_of_the_buffer():
    values = expected(BF16, random_values(20_000))
    buffer = rlx.Buffer.zeros(4 * values.size, "u8")
    buffer.numpy()[: 2 * values.size] = values.view(np.uint8)
    out = buffer.numpy().view(np.float32)
    assert rlx.read_typed_to_f32(buffer, "bf16", values.size, out) is out
    assert_same(out.copy(), values.astype(np.float32))


@pytest.mark.jax
@pytest.mark.torch
def test_other_memory_is_read_into_an_array():
    import jax.numpy as jnp
    import torch

    from rlx_driver.testing import FakeDevice

    values = expected(BF16, random_values(3000))
    raw, wanted = values.view(np.uint8), values.astype(np.float32)
    with FakeDevice() as fake:
        far = rlx.Buffer.from_array(raw, copy=True).to(fake.device)
        for source in (jnp.array(raw), far, torch.from_numpy(raw.copy())):
            tensor = torch.zeros(2, values.size // 2)
            out = tensor.numpy()
            assert rlx.read_typed_to_f32(source, "bf16", values.size, out) is out
            assert_same(tensor.numpy().reshape(-1), wanted)


def refused_places():
    read_only = np.full(6, 7, np.float32)
    read_only.flags.writeable = False
    return [
        (np.full(5, 7, np.float32), rlx.ShapeError, "5 elements and 6"),
        (np.full((2, 4), 7, np.float32), rlx.ShapeError, "8 elements and 6"),
        (np.full(12, 7, np.float32)[::2], rlx.ShapeError, "C order"),
        (np.full((3, 2), 7, np.float32).T, rlx.ShapeError, "C order"),
        (np.full(6, 7, np.float64), rlx.DTypeError, "float32"),
        (np.full(6, 7, ">f4"), rlx.DTypeError, "float32"),
        (np.full(6, 7, np.uint32), rlx.DTypeError, "float32"),
        (np.ma.array(np.full(6, 7, np.float32)), rlx.DTypeError, "NumPy"),
        (read_only, rlx.ZeroCopyError, "read-only"),
    ]


@pytest.mark.parametrize("position", range(len(refused_places())))
def test_an_array_that_does_not_fit_is_refused_and_left_alone(position):
    out, error, says = refused_places()[position]
    for source in (bytes(12), np.zeros(12, np.uint8), rlx.Buffer.zeros(12, "u8")):
        with pytest.raises(error, match=says):
            rlx.read_typed_to_f32(source, "bf16", 6, out)
    assert (np.asarray(out) == 7).all()


@pytest.mark.torch
def test_an_array_is_left_alone_by_every_other_error():
    import torch

    out = np.full(6, 7, np.float32)
    for place in (torch.zeros(6), rlx.Buffer.zeros(6), bytearray(24), [0.0] * 6):
        with pytest.raises(rlx.DTypeError, match=r"tensor\.numpy\(\)"):
            rlx.read_typed_to_f32(bytes(12), "bf16", 6, place)
    for source in (bytes(11), np.zeros(11, np.uint8), rlx.Buffer.zeros(11, "u8")):
        with pytest.raises(rlx.ShapeError, match="hold 5"):
            rlx.read_typed_to_f32(source, "bf16", 6, out)
    with pytest.raises(rlx.ShapeError, match="C order"):
        rlx.read_typed_to_f32(np.zeros(24, np.uint8)[::2], "bf16", 6, out)
    with pytest.raises(rlx.DTypeError, match="uint8"):
        rlx.read_typed_to_f32(np.zeros(12, np.int8), "bf16", 6, out)
    with pytest.raises(rlx.DTypeError, match="float99"):
        rlx.read_typed_to_f32(bytes(12), "float99", 6, out)
    for source in (bytes(12), np.zeros(12, np.uint8), rlx.Buffer.zeros(12, "u8")):
        with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError):
            rlx.read_typed_to_f32(source, "bf16", 6, out)
    assert (out == 7).all()
    empty = np.zeros((0, 3), np.float32)
    assert rlx.read_typed_to_f32(b"", "bf16", 0, empty) is empty


# --- memory that overlaps ------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 2, 4000, 79_996])
@pytest.mark.parametrize("dtype", ["bf16", "f8_e4m3fn", "f32", "i16", "f64", "int4"])
def test_values_may_overlap_the_bytes(way, dtype, shift):
    dtype = rlx.dtype(dtype)
    raw = np.zeros(20_000 * 4 + 20_000 * 8 + shift, np.uint8)
    values = raw[: 20_000 * 4].view(np.float32)
    values[:] = random_values(20_000)[:20_000]
    wanted = expected(dtype, values.copy())
    rlx.write_typed_from_f32(raw[shift:], dtype, values)
    end = shift + wanted.nbytes
    assert_same(np.frombuffer(raw[shift:end].tobytes(), dtype), wanted)


@pytest.mark.torch
@pytest.mark.jax
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "buffer"])
def test_values_may_be_a_view_of_the_buffer(framework):
    values = random_values(20_000)
    buffer = rlx.Buffer.from_array(values, copy=True)
    memory = buffer.view("u8", (values.nbytes,))
    source = buffer if framework == "buffer" else buffer.array(framework)
    assert rlx.write_typed_from_f32(memory[2:], "bf16", source) == values.size
    del source
    found = memory.numpy()[2 : 2 + 2 * values.size].tobytes()
    assert_same(np.frombuffer(found, BF16), expected(BF16, values))


@pytest.mark.jax
def test_values_may_be_an_array_of_jax_from_another_part_of_the_buffer():
    values = random_values(4096)
    buffer = rlx.Buffer.from_array(np.concatenate([values, values]), copy=True)
    half = values.nbytes
    memory = buffer.view("u8", (2 * half,))
    source = buffer[: values.size].jax()
    assert rlx.write_typed_from_f32(memory[half:], "bf16", source) == values.size
    found = memory.numpy()[half : half + 2 * values.size].tobytes()
    assert_same(np.frombuffer(found, BF16), expected(BF16, values))


# --- the discipline of memory --------------------------------------------------------------------


def test_a_write_counts_in_the_epoch_and_the_ledger():
    buffer = rlx.Buffer.zeros(8, "u8")
    rlx.ledger.reset()
    rlx.write_typed_from_f32(buffer, "bf16", [1.0, 2.0])
    assert buffer.epoch == 1
    assert rlx.ledger.bytes_copied == 4
    rlx.read_typed_to_f32(buffer, "bf16", 4)
    assert buffer.epoch == 1
    assert rlx.ledger.bytes_copied == 12
    with rlx.no_copies():
        with pytest.raises(rlx.ZeroCopyError):
            rlx.write_typed_from_f32(buffer, "bf16", [3.0])
        with pytest.raises(rlx.ZeroCopyError):
            rlx.read_typed_to_f32(buffer, "bf16", 1)
    assert buffer.epoch == 1
    assert rlx.read_typed_to_f32(buffer, "bf16", 2).tolist() == [1, 2]


def test_a_buffer_in_use_is_not_written():
    buffer = rlx.Buffer.zeros(8, "u8")
    with buffer.write("numpy"), pytest.raises(rlx.StaleViewError):
        rlx.write_typed_from_f32(buffer, "bf16", [1.0])
    buffer.close()
    with pytest.raises(rlx.ClosedHandleError):
        rlx.write_typed_from_f32(buffer, "bf16", [1.0])
    with pytest.raises(rlx.ClosedHandleError):
        rlx.read_typed_to_f32(buffer, "bf16", 1)


def test_a_handle_is_made_by_its_first_write():
    handle = rlx.BufferHandle("bytes", (8,), "u8")
    assert rlx.write_typed_from_f32(handle, "f16", [1.0, 2.0]) == 2
    assert rlx.read_typed_to_f32(handle, "f16", 4).tolist() == [1, 2, 0, 0]
    handle.close()


@pytest.mark.jax
def test_an_array_of_jax_taken_before_is_dead_after_a_write():
    buffer = rlx.Buffer.zeros(64, "u8")
    old = buffer.jax()
    rlx.write_typed_from_f32(buffer, "bf16", [1.0])
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        old.sum().block_until_ready()


@pytest.mark.torch
def test_autograd_is_told_of_a_write():
    import torch

    memory = torch.zeros(40_000, dtype=torch.uint8)
    version = memory._version
    rlx.write_typed_from_f32(memory[2:], "bf16", [1.0])
    rlx.write_typed_from_f32(memory, "bf16", np.zeros(20_000, np.float32))
    assert memory._version == version + 2


@pytest.mark.torch
def test_modes_of_torch_change_nothing():
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    values = random_values(20_000)
    for dtype in map(rlx.dtype, ("bf16", "f8_e4m3fn", "f16", "f8_e5m2")):
        for mode in (FakeTensorMode(), torch.inference_mode(), torch.device("meta")):
            with mode:
                assert_same(written(dtype, values), expected(dtype, values))
                raw = expected(dtype, values).view(np.uint8)
                found = rlx.read_typed_to_f32(raw, dtype, values.size)
            assert_same(found, expected(dtype, values).astype(np.float32))
        inside = []

        def traced(x, dtype=dtype, inside=inside):
            inside.append(written(dtype, values))
            return x

        torch.func.vmap(traced)(torch.ones(3))
        assert_same(inside[0], expected(dtype, values))
    with torch.inference_mode():
        memory = torch.zeros(8, dtype=torch.uint8)
        rlx.write_typed_from_f32(memory, "bf16", [1.0, 2.0])
        assert rlx.read_typed_to_f32(memory, "bf16", 2).tolist() == [1, 2]


def test_other_devices_take_the_default_way():
    from rlx_driver.testing import FakeDevice

    values = random_values(3000)
    with FakeDevice() as fake:
        buffer = rlx.Buffer.zeros(values.size * 2 + 3, "u8", fake.device)
        assert rlx.write_typed_from_f32(buffer, "bf16", values) == values.size
        assert_same(
            rlx.read_typed_to_f32(buffer, "bf16", values.size),
            expected(BF16, values).astype(np.float32),
        )
        source = rlx.Buffer.from_array(values, copy=True).to(fake.device)
        again = rlx.Buffer.zeros(values.size * 2, "u8", fake.device)
        assert rlx.write_typed_from_f32(again, "bf16", source.array("fake")) == values.size
        raw = bytearray(values.size * 2)
        assert rlx.write_typed_from_f32(raw, "bf16", source.array("fake")) == values.size
        for memory in (again, raw):
            assert_same(
                rlx.read_typed_to_f32(memory, "bf16", values.size),
                expected(BF16, values).astype(np.float32),
            )


def test_threads_convert_at_once(way):
    values = [random_values(100_000, seed) for seed in range(4)]
    dtypes = [rlx.dtype(name) for name in ("f8_e4m3fn", "f8_e3m4", "bf16", "f8_e8m0fnu")]
    found = [None] * 4

    def work(k):
        found[k] = [written(dtypes[k], values[k]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for dtype, x, results in zip(dtypes, values, found, strict=True):
        for result in results:
            assert_same(result, expected(dtype, x))


# --- torch is used where it is loaded, and never imported ----------------------------------------

EVERY_DTYPE = """
import sys
import numpy as np
import rlx_driver as rlx
from rlx_driver.dtypes import TABLE
x = np.arange(-20_000, 20_000, dtype=np.float32) / 16
for dtype in TABLE:
    raw = bytearray(x.size * dtype.itemsize)
    assert rlx.write_typed_from_f32(raw, dtype, x) == x.size
    assert rlx.read_typed_to_f32(raw, dtype, x.size).shape == x.shape
"""


def test_torch_is_not_imported_for_it():
    must_run(EVERY_DTYPE + "assert 'torch' not in sys.modules and 'jax' not in sys.modules")


def test_a_torch_that_is_broken_does_no_harm():
    must_run("import sys, types\nsys.modules['torch'] = types.ModuleType('torch')\n" + EVERY_DTYPE)


@pytest.mark.torch
def test_torch_is_used_where_it_is_loaded():
    pytest.importorskip("torch")
    for name in ("bf16", "f16", "f32"):
        assert None not in _casts.framework_kernels(rlx.dtype(name)), name
    assert _casts.framework_kernels(rlx.dtype("f8_e4m3fn"))[0] is not None
    assert _casts.framework_kernels(rlx.dtype("f8_e3m4")) == (None, None)


@pytest.mark.torch
def test_a_kernel_that_is_wrong_is_found_out():
    torch = pytest.importorskip("torch")
    from rlx_driver.backends import _torch_casts as casts

    pairs = [
        ("f8_e4m3fn", torch.float8_e4m3fnuz),
        ("f8_e5m2", torch.float8_e5m2fnuz),
        ("f8_e8m0fnu", torch.float8_e8m0fnu),
        ("bf16", torch.float16),
        ("f16", torch.bfloat16),
    ]
    with np.errstate(all="ignore"):
        for name, theirs in pairs:
            assert casts._host_writer(rlx.dtype(name), theirs) is None
            if name != "f8_e8m0fnu":
                assert casts._host_reader(rlx.dtype(name), theirs) is None


@pytest.mark.torch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts_of_a_device_agree(dtype):
    torch = pytest.importorskip("torch")
    from rlx_driver.backends._torch_casts import device_reader, device_writer

    host = torch.device("cpu")
    write, read = device_writer(dtype, host), device_reader(dtype, host)
    assert write is not None or dtype in INTEGERS
    assert read is not None
    values = np.concatenate([telling_values(dtype), random_values(3000)])
    wanted = expected(dtype, values)
    if write is not None:
        target = torch.zeros(values.size * dtype.itemsize, dtype=torch.uint8)
        write(target, torch.from_numpy(values))
        assert_same(target.numpy().view(dtype), wanted)
    found = torch.zeros(values.size)
    read(found, torch.from_numpy(wanted.view(np.uint8).copy()))
    with np.errstate(all="ignore"):
        assert_same(found.numpy(), wanted.real.astype(np.float32))


def test_float8_e8m0fnu_is_written_by_its_bits():
    dtype = rlx.dtype("f8_e8m0fnu")
    assert writer(dtype, 1 << 16) is writer(dtype, 1 << 20)
    assert writer(dtype, 1 << 16).__name__ == "_write_exponents"


def test_every_dtype_of_the_table_is_covered():
    assert set(DTYPES) == set(TABLE)
    assert installed("ml_dtypes")


def test_the_table_of_the_documentation_is_true():
    page = Path(__file__).parent.parent / "docs" / "typed_io.md"
    rows = {}
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 6 and cells[0] != "dtype":
            rows[cells[0]] = np.array([float(cell) for cell in cells[1:]], np.float32)
    assert list(rows) == [row.name for row in TABLE.values()]
    for name, said in rows.items():
        raw = bytearray(5 * 16)
        rlx.write_typed_from_f32(raw, name, [3e38, -3e38, np.inf, np.nan, -0.75])
        found = rlx.read_typed_to_f32(raw, name, 5)
        np.testing.assert_allclose(found, said, rtol=1e-3, err_msg=name)
