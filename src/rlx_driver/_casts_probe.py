"""What can tell whether a cast of a framework gives what ml_dtypes gives, and what that is.

The functions are called with the floating-point warnings of NumPy off.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlx_driver._casts_numpy import is_integer, saturation, writer

__all__ = ["differ", "expected", "probe_bytes", "probe_values"]


@np.errstate(all="ignore")
def probe_values(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Give the float32 values that can tell whether a cast to a dtype is right.

    Every upper half of a float32 with six lower halves; and, for dtypes of at most two bytes,
    every value of the dtype, the middle between neighbours, and what lies next to each.
    """
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (halves[:, None] | ends).reshape(-1).view(np.float32)
    limits: Any = []
    if is_integer(dtype):
        low, high, above, _ = saturation(dtype)
        limits = [low, high, low - 1, low - 0.5, high + 0.5, high + 1, above or high]
    elif dtype.itemsize <= 2 and dtype.kind != "b":
        patterns = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}")
        values = patterns.view(dtype).astype(np.float32).astype(np.float64)
        values = np.unique(values[np.isfinite(values)])
        step = values[-1] - values[-2]
        beyond = values[-1] + step * np.array([0.5, 1.0, 2.0])
        limits = np.concatenate([values, (values[:-1] + values[1:]) / 2, beyond, -beyond])
    near = np.asarray(limits, np.float64).astype(np.float32)
    around = [near, *(np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf))]
    return np.concatenate([bits, *around])


def expected(dtype: np.dtype[Any], values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Convert float32 values by NumPy and ml_dtypes."""
    raw = np.empty(values.size * dtype.itemsize, np.uint8)
    writer(dtype, values.size)(raw, values)
    return raw.view(dtype)


def probe_bytes(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Give elements of a dtype that can tell whether a cast to float32 is right."""
    if dtype.itemsize <= 2:
        patterns = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}")
        return np.tile(patterns.view(np.uint8), 4 if dtype.itemsize == 1 else 1)
    generator = np.random.default_rng(0)
    if dtype.kind in "iu":
        # Of every length, and half of them a float32 or a middle of two, but for one.
        bits = generator.integers(0, 1 << 63, 1 << 16, np.uint64) * 2
        bits[::2] &= np.uint64(0xFFFFFF8000000000)
        shifts = generator.integers(0, 64, 1 << 16).astype(np.uint64)
        whole = (bits >> shifts)[:, None] + np.arange(-1, 2).astype(np.uint64)
        return whole.astype(dtype).reshape(-1).view(np.uint8)
    wide = probe_values(np.dtype(np.float32)).astype(np.float64)
    # Middles of neighbours in float32, and what lies next to them.
    middles = (wide[:-1] + wide[1:]) / 2
    wide = np.concatenate([wide, middles, np.nextafter(middles, 0), np.nextafter(wide, np.inf)])
    return wide.astype(dtype).view(np.uint8)


def differ(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Tell where two arrays of one dtype differ; NaNs of any payload are equal."""
    size = min(got.dtype.itemsize, 8)
    ours, theirs = (np.ascontiguousarray(x).view(f"u{size}") for x in (got, wanted))
    different: np.ndarray[Any, Any] = (ours != theirs).reshape(got.size, -1).any(1)
    if is_integer(got.dtype) or got.dtype.kind == "b":
        return different
    different &= ~((got != got) & (wanted != wanted))
    return different
