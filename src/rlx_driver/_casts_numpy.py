"""Casts between float32 and any dtype by NumPy: tables, saturation, blocks that fit the cache.

A *kernel* takes contiguous bytes, aligned for the dtype, and as many float32 values; it converts
one way. It is called with the floating-point warnings of NumPy off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

__all__ = [
    "BLOCK",
    "Kernel",
    "is_integer",
    "read_table",
    "reader",
    "saturation",
    "write_table",
    "writer",
]

Kernel = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], object]

BLOCK = 1 << 16
"""Elements of a block: large against the cost of a call, and near the size of the cache."""

_SMALL = 1 << 11  # elements below which making a table, or looking into it, does not pay
_WORDS = (np.dtype(np.int8), np.dtype(np.uint8))


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Tell whether a dtype is an integer, those of fewer than eight bits included."""
    return dtype.kind in "iu" or "int" in dtype.name


def saturation(dtype: np.dtype[Any]) -> tuple[float, float, float | None, int]:
    """Say how float32 values saturate to an integer dtype.

    Returns
    -------
    tuple
        The bounds to clip to, both float32 values; the value from which the largest integer is
        meant, where float32 does not have that integer, else None; the largest integer.
    """
    limits = ml_dtypes.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)
    if float(np.float32(high)) == high:
        return float(low), float(high), None, high
    above = np.float32(high + 1)  # a power of two
    return float(low), float(np.nextafter(above, np.float32(0))), float(above), high


@functools.cache
def write_table(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Give the bytes of a one-byte dtype for the upper halves of float32 values.

    The lowest bit of the index is *sticky*: set, too, where the lower half is not zero. No dtype
    in question has more than four bits of fraction, so that this bit lies below the rounding bit.
    """
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        if is_integer(dtype):
            low, high, _, _ = saturation(dtype)
            whole = np.where(np.isnan(values), np.float32(0), np.clip(values, low, high))
            table = whole.astype(np.int8).astype(dtype)
        else:
            table = values.astype(dtype)
    return _constant(table.view(np.uint8))


@functools.cache
def read_table(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Give the float32 value of every byte of a one-byte dtype."""
    patterns = np.arange(256, dtype=np.uint8)
    if dtype.kind == "b":
        return _constant((patterns != 0).astype(np.float32))
    return _constant(patterns.view(dtype).astype(np.float32))


@functools.cache
def _read_pairs(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Give the two float32 values of every two bytes, as one 64-bit word."""
    pairs = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return _constant(read_table(dtype)[pairs].view(np.uint64))


@functools.cache
def _is_exponent_alone(dtype: np.dtype[Any]) -> bool:
    """Tell whether `_write_exponents` gives what ml_dtypes gives for float8_e8m0fnu."""
    if dtype.name != "float8_e8m0fnu":
        return False
    ends = np.arange(1 << 17, dtype=np.uint32) << 15
    values = np.concatenate([ends - 1, ends, ends + 1]).view(np.float32)
    raw = np.empty(values.size, np.uint8)
    _write_exponents(raw, values)
    with np.errstate(all="ignore"):
        return bool((raw == values.astype(dtype).view(np.uint8)).all())


def writer(dtype: np.dtype[Any], count: int) -> Kernel:
    """Give the kernel that converts `count` float32 values to a dtype."""
    return _writer(dtype, count < _SMALL)


@functools.cache  # for the name of a dtype, among others, takes microseconds
def _writer(dtype: np.dtype[Any], few: bool) -> Kernel:
    if dtype.kind == "b":
        return _write_bool
    if is_integer(dtype) and (dtype.kind in "iu" or few):
        return functools.partial(_write_integers, dtype)
    if dtype.itemsize == 1 and not few:
        if _is_exponent_alone(dtype):
            return _write_exponents
        return functools.partial(_write_by_table, write_table(dtype))
    return functools.partial(_write_plain, dtype)


def reader(dtype: np.dtype[Any], count: int) -> Kernel:
    """Give the kernel that converts `count` elements of a dtype to float32."""
    return _reader(dtype, count < 2 * _SMALL)


@functools.cache
def _reader(dtype: np.dtype[Any], few: bool) -> Kernel:
    if dtype.itemsize > 1 or dtype in _WORDS:
        return functools.partial(_read_plain, dtype)
    if few:
        return functools.partial(_read_by_table, read_table(dtype))
    return functools.partial(_read_by_pairs, dtype)


def _write_plain(
    dtype: np.dtype[Any], raw: np.ndarray[Any, Any], source: np.ndarray[Any, Any]
) -> None:
    np.copyto(raw.view(dtype), source, casting="unsafe")


def _write_bool(raw: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> None:
    np.not_equal(source, 0, out=raw.view(np.bool_))


def _write_by_table(
    table: np.ndarray[Any, Any], raw: np.ndarray[Any, Any], source: np.ndarray[Any, Any]
) -> None:
    bits = source.view(np.uint32)
    size = min(source.size, BLOCK)
    halves, index = np.empty(size, np.uint32), np.empty(size, np.intp)
    for start in range(0, source.size, BLOCK):
        part = bits[start : start + BLOCK]
        n = part.size
        half = halves[:n]
        # The carry of (lower half + 0xffff) is the sticky bit.
        np.bitwise_and(part, 0xFFFF, out=half)
        np.add(half, 0xFFFF, out=half)
        np.bitwise_or(half, part, out=half)
        np.right_shift(half, 16, out=half)
        np.copyto(index[:n], half)
        # "clip" is the mode in which take writes straight into out; no index is out of range
        np.take(table, index[:n], out=raw[start : start + n], mode="clip")


def _write_exponents(raw: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> None:
    """Round positive values to a power of two, of which the exponent is the byte; else NaN."""
    bits = source.view(np.uint32)
    size = min(source.size, BLOCK)
    words, found = np.empty(size, np.uint32), np.empty(size, np.bool_)
    for start in range(0, source.size, BLOCK):
        part, place = bits[start : start + BLOCK], raw[start : start + BLOCK]
        word, mask = words[: part.size], found[: part.size]
        np.add(part, 0x400000, out=word)  # half of the fraction: the middle is rounded up
        np.right_shift(word, 23, out=word)
        np.copyto(place, word, casting="unsafe")
        np.subtract(part, 1, out=word)  # zero, what is negative, infinity and NaN are now large
        np.greater_equal(word, 0x7F7FFFFF, out=mask)
        np.bitwise_or(place, np.negative(mask.view(np.uint8)), out=place)
        if np.equal(part, 0x400000, out=mask).any():  # 2**-127 itself is subnormal, and no middle
            place[mask] = 0


def _write_integers(
    dtype: np.dtype[Any], raw: np.ndarray[Any, Any], source: np.ndarray[Any, Any]
) -> None:
    low, high, above, largest = saturation(dtype)
    target = raw.view(dtype)
    size = min(source.size, BLOCK)
    values, found = np.empty(size, np.float32), np.empty(size, np.bool_)
    for start in range(0, source.size, BLOCK):
        part = source[start : start + BLOCK]
        n = part.size
        value, mask, place = values[:n], found[:n], target[start : start + n]
        np.clip(part, low, high, out=value)
        if np.isnan(value, out=mask).any():
            value[mask] = 0
        if dtype.kind in "iu":
            np.copyto(place, value, casting="unsafe")
        else:  # four bits and fewer wrap in ml_dtypes, from whole numbers too
            np.copyto(place, value.astype(np.int8).astype(dtype))
        if above is not None and np.greater_equal(part, above, out=mask).any():
            place[mask] = largest


def _read_plain(dtype: np.dtype[Any], raw: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    values = raw.view(dtype)
    np.copyto(out, values.real if dtype.kind == "c" else values, casting="unsafe")


def _read_by_table(
    table: np.ndarray[Any, Any], raw: np.ndarray[Any, Any], out: np.ndarray[Any, Any]
) -> None:
    np.take(table, raw, out=out, mode="clip")


def _read_by_pairs(
    dtype: np.dtype[Any], raw: np.ndarray[Any, Any], out: np.ndarray[Any, Any]
) -> None:
    even = out.size & ~1
    pairs, words, table = raw[:even].view(np.uint16), out[:even].view(np.uint64), _read_pairs(dtype)
    for start in range(0, pairs.size, BLOCK):
        end = start + BLOCK
        np.take(table, pairs[start:end], out=words[start:end], mode="clip")
    if even < out.size:
        out[even] = read_table(dtype)[raw[even]]


def _constant(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    table.flags.writeable = False
    return table
