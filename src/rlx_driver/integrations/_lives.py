"""Values of a traced program, with the steps over which they are used: what tracers fill in."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rlx_driver import dtypes
from rlx_driver.errors import DTypeError
from rlx_driver.interval import Interval, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

__all__ = ["Value", "known_dtype", "peak_bytes", "to_intervals"]


@dataclass(slots=True, eq=False)
class Value:
    """A tensor of a program: bytes ``[start, start + size)`` of the memory of `root`.

    A value without a root owns its memory. Where a traced storage starts is arbitrary: only
    differences of `start` count.
    """

    name: str
    size: int
    first: int
    last: int
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None
    kind: Kind = "intermediate"
    start: int = 0
    root: Value | None = None

    def use(self, step: int) -> None:
        """Keep the value up to this step."""
        self.last = max(self.last, step)


def known_dtype(dtype: object) -> np.dtype[Any] | None:
    """Give the NumPy dtype that a framework's dtype means, or None where NumPy has none."""
    try:
        return dtypes.dtype(dtype)
    except DTypeError:
        return None


def to_intervals(values: Sequence[Value]) -> list[Interval]:
    """Give the intervals of values, in their order."""
    _extend_roots(values)
    return [
        Interval(
            value.name,
            value.size,
            value.first,
            value.last,
            dtype=value.dtype,
            shape=value.shape,
            alias_of=None if value.root is None else value.root.name,
            alias_offset=0 if value.root is None else value.start - value.root.start,
            kind=value.kind,
        )
        for value in values
    ]


def peak_bytes(values: Sequence[Value]) -> int:
    """Give the largest sum of the sizes of values alive at one step; their roots alone count."""
    _extend_roots(values)
    roots = [value for value in values if value.root is None]
    changes = [0] * (max((value.last for value in roots), default=0) + 2)
    for value in roots:
        changes[value.first] += value.size
        changes[value.last + 1] -= value.size
    return max(accumulate(changes))


def _extend_roots(values: Sequence[Value]) -> None:
    for value in values:
        if value.root is not None:
            value.root.last = max(value.root.last, value.last)
