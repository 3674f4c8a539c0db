"""Typed I/O: float32 values into raw bytes of any dtype, by value, and back.

`write_typed_from_f32` and `read_typed_to_f32` check what they are given before a byte changes,
and leave the conversion to the backend whose memory it is.
"""

from __future__ import annotations

import operator
from typing import Any, TypeVar, overload

import numpy as np

from rlx_driver import dtypes
from rlx_driver._casts import read_cast, write_cast
from rlx_driver._ledger import ledger
from rlx_driver._typed_values import Source, place_of
from rlx_driver.backends.base import Backend, FunctionalBackend
from rlx_driver.buffer import Buffer
from rlx_driver.errors import CaptureError, DTypeError, ShapeError, ZeroCopyError
from rlx_driver.registry import registry

__all__ = ["read_typed_to_f32", "write_typed_from_f32"]

_BYTE, _FLOAT = np.dtype(np.uint8), np.dtype(np.float32)
_Result = TypeVar("_Result", bound=np.ndarray[Any, Any])


def write_typed_from_f32(dst: Any, dtype: Any, src: Any, max_elems: int | None = None) -> int:
    """Convert float32 values to a dtype and write them to the start of raw bytes.

    Finite values and infinities become what ml_dtypes (and NumPy) make of them: rounded to the
    nearest, ties to even, with the overflow rule of each type. NaN becomes a NaN of any payload;
    types without one take what ml_dtypes gives. Integers truncate toward zero and saturate, NaN
    gives 0. bool is whether the value is not zero (NaN is not). The imaginary part of complex
    numbers is 0. Types of fewer than eight bits take one byte an element.

    Parameters
    ----------
    dst
        Bytes to write: a one-dimensional contiguous uint8 array of NumPy or torch on any device, a
        uint8 Buffer in C order, or anything with a writable buffer (bytearray, memoryview, mmap),
        at any address.
    dtype
        Anything `rlx_driver.dtype` takes.
    src
        float32 values, taken in C order: an array of NumPy, torch or JAX on any device, a Buffer,
        a Python number, or a sequence of them (rounded to float32 first). It may overlap `dst`.
    max_elems
        Write at most so many; None writes all.

    Returns
    -------
    int
        The number of elements written. Bytes of `dst` behind them are left as they are.

    Raises
    ------
    ShapeError
        More elements than `dst` holds; `dst` has gaps or more axes; `max_elems` is negative.
    DTypeError
        No such dtype; `src` is an array of another dtype than float32; `dst` one of another than
        uint8.
    ZeroCopyError
        `dst` cannot be written (read-only, JAX), `src` cannot be read (requires_grad, traced), or
        inside `no_copies`.
    CaptureError
        While a CUDA graph is captured.

    In every case no byte was changed.

    Notes
    -----
    Copies: always, for that is its work; the ledger counts the bytes written. Blocks: until `src`
    may be changed. On a GPU the bytes are written in the order of torch's current stream. Aliases:
    nothing.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> memory = bytearray(4)
    >>> rlx.write_typed_from_f32(memory, "bf16", [1.0, -2.0])
    2
    >>> rlx.read_typed_to_f32(memory, "bf16", 2).tolist()
    [1.0, -2.0]
    """
    dt = dtypes.info(dtype).dtype
    limit = None if max_elems is None else _count(max_elems, "max_elems")
    # The same as below for everyday arrays, in few steps: after each conversion of some MiB the
    # caches hold none of what a step needs, and each takes microseconds.
    if (
        type(dst) is type(src) is np.ndarray
        and dst.dtype is _BYTE
        and src.dtype is _FLOAT
        and dst.ndim == src.ndim == 1
        and dst.flags.carray
        and src.flags.c_contiguous
    ):
        count = src.size if limit is None else min(src.size, limit)
        needed = count * dt.itemsize
        if 0 < needed <= dst.size:
            ledger.will_copy(needed, "write_typed_from_f32")
            write_cast(
                dst if needed == dst.size else dst[:needed],
                dt,
                src if count == src.size else src[:count],
            )
            return int(count)
    source = Source(src)
    count = source.size if limit is None else min(source.size, limit)
    needed = count * dt.itemsize
    if isinstance(dst, Buffer):
        whole, held = None, _size_of(dst, "dst")
    else:
        whole, owner = _bytes(dst, "dst", to_write=True)
        held = int(whole.shape[0])
    if needed > held:
        room = held // dt.itemsize
        raise ShapeError(
            f"{count:,} elements of {dt.name} need {needed:,} bytes, and dst has {held:,}, which "
            f"hold {room:,}: pass max_elems={room}, or more memory. Nothing was changed"
        )
    if not count:
        return 0
    ledger.will_copy(needed, "write_typed_from_f32")
    if whole is None:
        _write_buffer(_part(dst, needed), dt, source, count)
    else:
        part = whole if needed == held else owner.index(whole, slice(0, needed))
        owner.write_f32(part, dt, source.taken(owner, count))
    return count


@overload
def read_typed_to_f32(
    src: Any, dtype: Any, n: int, out: None = None
) -> np.ndarray[Any, np.dtype[np.float32]]: ...


@overload
def read_typed_to_f32(src: Any, dtype: Any, n: int, out: _Result) -> _Result: ...


def read_typed_to_f32(src: Any, dtype: Any, n: int, out: Any = None) -> Any:
    """Convert the first `n` elements of raw bytes to float32.

    Exact for every dtype of at most 24 bits of precision; float64 and wider integers are rounded
    to the nearest float32 as NumPy does. Of complex numbers it takes the real part.

    Parameters
    ----------
    src
        Bytes to read: a one-dimensional contiguous uint8 array of any framework and device, a
        uint8 Buffer in C order, or anything with a buffer, at any address.
    dtype
        What the bytes mean; anything `rlx_driver.dtype` takes.
    n
        The number of elements.
    out
        A float32 array of NumPy to fill: writable, in C order, of any shape with exactly `n`
        elements; it may overlap `src`. From a GPU pinned memory is filled without a copy between.
        The framework of a view is not told, as of any write to one. None makes new memory, whose
        pages take longer to come by than the values.

    Returns
    -------
    numpy.ndarray
        `out` itself; without one, new memory of float32 and of shape ``(n,)``.

    Raises
    ------
    ShapeError
        `n` is negative or more than `src` holds; `src` has gaps or more axes; `out` has gaps, or
        more or fewer elements.
    DTypeError
        No such dtype; `src` is an array of another dtype than uint8, `out` one of another than
        float32, or not one of NumPy.
    ZeroCopyError
        `src` cannot be read, `out` cannot be written, or inside `no_copies`.
    CaptureError
        While a CUDA graph is captured.

    In every case `out` was not changed.

    Notes
    -----
    Copies: always; the ledger counts the bytes read. Blocks: until the values are there. Aliases:
    nothing but `out`.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> rlx.read_typed_to_f32(bytes([0x38, 0x7F]), "f8_e4m3fn", 2).tolist()
    [1.0, nan]
    """
    dt = dtypes.info(dtype).dtype
    count = _count(n, "n")
    needed = count * dt.itemsize
    place = None if out is None else place_of(out, count)
    if (  # again an everyday array
        type(src) is np.ndarray
        and src.dtype is _BYTE
        and src.ndim == 1
        and src.flags.c_contiguous
        and 0 < needed <= src.size
        and (place is None or place.flags.aligned)
    ):
        ledger.will_copy(needed, "read_typed_to_f32")
        result = np.empty(count, np.float32) if place is None else place
        read_cast(src if needed == src.size else src[:needed], dt, result)
        return result if out is None else out
    if isinstance(src, Buffer):
        whole, held = None, _size_of(src, "src")
    else:
        whole, owner = _bytes(src, "src")
        held = int(whole.shape[0])
    if needed > held:
        raise ShapeError(
            f"{count:,} elements of {dt.name} were asked for, which are {needed:,} bytes; there "
            f"are {held:,} bytes, which hold {held // dt.itemsize:,}"
        )
    if not count:
        return np.empty(0, np.float32) if out is None else out
    ledger.will_copy(needed, "read_typed_to_f32")
    filled = None if place is None or not place.flags.aligned else place
    if whole is not None:
        part = whole if needed == held else owner.index(whole, slice(0, needed))
        found = owner.read_f32(part, dt, filled)
    else:
        part = _part(src, needed)
        _require_no_capture(part, "read")
        with part.read(part._backend.name) as native:
            found = part._backend.read_f32(native, dt, filled)
    if place is not None and filled is None:
        np.copyto(place, found)
    return found if out is None else out


# --- the bytes -----------------------------------------------------------------------------------


def _bytes(x: Any, name: str, *, to_write: bool = False) -> tuple[Any, Backend]:
    """Give one run of bytes, and the backend of its array."""
    backend = registry.for_array(x)
    if backend is None:
        x, backend = _exported(x, name), registry.get("numpy")
    if backend.is_plain_bytes(x):
        return x, backend
    facts = backend.facts(x)
    if facts.obstacle is not None and facts.obstacle.kind != "dtype":
        raise ZeroCopyError(f"{name} cannot be taken as bytes: {facts.obstacle}")
    _require_bytes(x.dtype, facts.dtype, name)
    if len(facts.shape) != 1 or not facts.is_row_major:
        raise ShapeError(
            f"{name} is to be one run of bytes, and is an array of shape {facts.shape} and strides "
            f"{facts.strides}: pass it in C order, with one axis. Nothing was changed"
        )
    if to_write and isinstance(backend, FunctionalBackend):
        raise ZeroCopyError(
            f"{name} is an array of {backend.name}, which is immutable: write to a Buffer, or to "
            "an array of NumPy or torch. Nothing was changed"
        )
    if to_write and facts.read_only:
        raise ZeroCopyError(
            f"{name} is read-only: pass memory that may be written, such as a bytearray. Nothing "
            "was changed"
        )
    return x, backend


def _exported(x: Any, name: str) -> np.ndarray[Any, Any]:
    """See what exports a buffer as bytes."""
    try:
        view = memoryview(x)
    except TypeError:
        raise DTypeError(
            f"{name} is a {type(x).__qualname__}, which is no memory the driver knows: pass a "
            "uint8 array of NumPy or torch, a uint8 Buffer, or an object with a buffer (bytearray, "
            "memoryview, mmap). Nothing was changed"
        ) from None
    if not view.c_contiguous:
        raise ShapeError(
            f"{name} is a {type(x).__qualname__} with gaps between its elements: pass one that "
            "lies in C order. Nothing was changed"
        )
    return np.frombuffer(view, np.uint8)


def _size_of(buffer: Buffer, name: str) -> int:
    buffer._materialise()
    _require_bytes(buffer.dtype, buffer.dtype, name)
    if not buffer.is_contiguous:
        raise ShapeError(
            f"{name} is a Buffer with gaps between its bytes (strides {buffer.strides}): pass one "
            "that lies in C order. Nothing was changed"
        )
    return buffer.byte_size


def _part(buffer: Buffer, nbytes: int) -> Buffer:
    """Give the first bytes of a Buffer, with one axis."""
    flat = buffer if buffer.ndim == 1 else buffer.view(_BYTE, (buffer.byte_size,))
    return flat[:nbytes]


def _require_no_capture(part: Buffer, what: str) -> None:
    """Refuse before a scope is entered, which the graph would take for a part of it."""
    if part._access.is_recording():
        raise CaptureError(
            f"a typed {what} was asked for inside a capture, where the host cannot take part: do "
            "it before or after. Nothing was changed"
        )


def _require_bytes(theirs: Any, dtype: np.dtype[Any], name: str) -> None:
    if dtype != _BYTE:
        raise DTypeError(
            f"{name} is to be raw bytes, and its dtype is {theirs}: pass it viewed as uint8. "
            "Nothing was changed"
        )


def _write_buffer(part: Buffer, dt: np.dtype[Any], source: Source, count: int) -> None:
    _require_no_capture(part, "write")
    owner = part._backend
    if isinstance(owner, FunctionalBackend):
        raw = np.empty(part.byte_size, np.uint8)
        write_cast(raw, dt, source.taken(registry.get("numpy"), count))
        part.copy_from(raw)
        return
    values = source.taken(owner, count, part)
    with part.write(owner.name) as native:
        owner.write_f32(native, dt, values)


def _count(n: Any, name: str) -> int:
    try:
        count = operator.index(n)
    except TypeError:
        raise ShapeError(f"{name} is a number of elements, not {n!r}") from None
    if count < 0:
        raise ShapeError(f"{name} is a number of elements, and {count} is negative")
    return count
