"""Greedy fits: slots in some order, each at the lowest offset that is free for all its life."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from rlx_driver._plan_slots import Slots

__all__ = ["greedy", "greedy_orders"]


def greedy_orders(slots: Slots) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Give orders in which greedy fits do well, the best on average first."""
    life = slots.stop - slots.start
    given = np.arange(len(slots))
    yield "largest first", np.lexsort((given, -life, -slots.size))
    yield "largest area first", np.lexsort((given, -slots.size * life))
    yield "as given", given
    yield "longest life first", np.lexsort((given, -slots.size, -life))
    yield "first start first", np.lexsort((given, -slots.size, slots.start))


def greedy(
    slots: Slots,
    order: NDArray[np.int64],
    limit: int,
    *,
    best_fit: bool = False,
    late: Callable[[], bool] | None = None,
) -> NDArray[np.int64] | None:
    """Give offsets in bytes, or None once one of them ends above `limit`.

    Pinned slots are placed first. With `best_fit` a slot goes into the smallest gap that holds
    it, not the lowest. `late` is asked now and then whether to give up.
    """
    fixed = np.flatnonzero(slots.pin >= 0)
    fixed = fixed[np.argsort(slots.pin[fixed], kind="stable")]
    order = order[slots.pin[order] < 0]
    offsets = slots.pin.copy()
    laid = _Laid(slots, fixed)
    start, stop = slots.start[order].tolist(), slots.stop[order].tolist()
    size, alignment = slots.size[order].tolist(), slots.alignment[order].tolist()
    places = []
    for each in range(len(order)):
        if late is not None and each % 64 == 0 and late():
            return None
        low, high = laid.alive(start[each], stop[each])
        place = _place(low, high, size[each], alignment[each], best_fit)
        if place + size[each] > limit:
            return None
        laid.add(start[each], stop[each], place, place + size[each])
        places.append(place)
    offsets[order] = places
    return offsets


class _Laid:
    """What is laid already, as columns in the order of offsets."""

    __slots__ = ("_count", "_high", "_low", "_start", "_stop")

    def __init__(self, slots: Slots, fixed: NDArray[np.int64]) -> None:
        self._count = len(fixed)
        self._start = np.zeros(len(slots), np.int32)
        self._stop = np.zeros(len(slots), np.int32)
        self._low = np.zeros(len(slots), np.int64)
        self._high = np.zeros(len(slots), np.int64)
        self._start[: len(fixed)] = slots.start[fixed]
        self._stop[: len(fixed)] = slots.stop[fixed]
        self._low[: len(fixed)] = slots.pin[fixed]
        self._high[: len(fixed)] = slots.pin[fixed] + slots.size[fixed]

    def alive(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the ends of what is alive in ``[start, stop)``, lower ends rising."""
        count = self._count
        meets = ((self._start[:count] < stop) & (self._stop[:count] > start)).nonzero()[0]
        return self._low[meets], self._high[meets]

    def add(self, start: int, stop: int, low: int, high: int) -> None:
        count = self._count
        at = int(self._low[:count].searchsorted(low))
        for column, value in (
            (self._start, start),
            (self._stop, stop),
            (self._low, low),
            (self._high, high),
        ):
            column[at + 1 : count + 1] = column[at:count]
            column[at] = value
        self._count = count + 1


def _place(
    low: NDArray[np.int64], high: NDArray[np.int64], size: int, alignment: int, best_fit: bool
) -> int:
    if not len(low) or (low[0] >= size and not best_fit):
        return 0
    floor = np.maximum.accumulate(high)
    floor += -floor % alignment
    room = low[1:] - floor[:-1]
    fits = (room >= size).nonzero()[0]
    if best_fit:
        best = int(room[fits].min()) if len(fits) else 2**62
        if size <= low[0] <= best:
            return 0
        if len(fits):
            return int(floor[fits[room[fits].argmin()]])
    elif len(fits):
        return int(floor[fits[0]])
    return int(floor[-1])
