"""The address of a NumPy array in 100 ns instead of 700.

CPython NumPy keeps the data pointer in the first word behind the object header. That is not
documented, so it is probed once against ``__array_interface__``, which stays the way round.
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["choose", "pointer", "slow_pointer"]

_DATA_OFFSET = object.__basicsize__


def slow_pointer(array: np.ndarray[Any, Any]) -> int:
    """Give the address of element zero by the documented interface."""
    return int(array.__array_interface__["data"][0])


def _fast_pointer(
    array: np.ndarray[Any, Any],
    _read: Callable[[int], Any] = ctypes.c_size_t.from_address,
    _offset: int = _DATA_OFFSET,
) -> int:
    return _read(id(array) + _offset).value


def choose(candidate: Callable[[np.ndarray[Any, Any]], int] = _fast_pointer) -> Callable[..., int]:
    """Probe a fast way on arrays of several kinds; the slow way when it is ever wrong."""
    if sys.implementation.name != "cpython" or hasattr(sys, "gettotalrefcount"):
        return slow_pointer
    base = np.arange(24, dtype=np.int16).reshape(4, 6)
    probes = [base, base[1:, 2:], base.T, base[:, ::-1], base[0, 0:0], np.array(1.0), np.zeros(9)]
    if all(candidate(probe) == slow_pointer(probe) for probe in probes):
        return candidate
    return slow_pointer


pointer: Callable[[np.ndarray[Any, Any]], int] = choose()
"""Gives the address of element zero of an array."""
