"""The geometry of a plan: rectangles in steps and bytes, their peak, and the lower bound.

Lives are half open here, and steps are counted only where it matters: between two starts with
no end in between nothing can change for the better, so such steps are one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlx_driver._plan_intervals import Table

__all__ = ["Slots", "lower_bound", "make_slots", "round_up"]


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Slots to be placed, as columns.

    Attributes
    ----------
    rows
        The row of each slot in its `Table`.
    size, alignment, pin
        Bytes; pin is -1 for a slot that may lie anywhere.
    start, stop
        Life ``[start, stop)`` in compressed steps.
    steps
        The step that each compressed step stands for.
    bound
        Bytes that no plan can do without.
    peak
        The compressed step at which they are needed.
    """

    rows: NDArray[np.int64]
    size: NDArray[np.int64]
    alignment: NDArray[np.int64]
    pin: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    steps: NDArray[np.int64]
    bound: int
    peak: int

    def __len__(self) -> int:
        return len(self.rows)


def round_up(value: NDArray[np.int64], to: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Round up to a multiple of a power of two."""
    rounded: NDArray[np.int64] = (value + (to - 1)) & -to
    return rounded


def make_slots(table: Table) -> Slots:
    """Take the slots of a table, with compressed steps and the lower bound."""
    rows = table.slots()
    begin, end = table.start[rows], table.stop[rows]
    steps = _compress(begin, end)
    start = np.searchsorted(steps, begin)  # the first step kept at or after it
    stop = np.searchsorted(steps, end)
    size, alignment, pin = table.sizes[rows], table.alignment[rows], table.pin[rows]
    bound, peak = lower_bound(size, alignment, start, stop, len(steps))
    bound = max(bound, int((pin + size)[pin >= 0].max(initial=0)))
    return Slots(rows, size, alignment, pin, start, stop, steps, bound, peak)


def _compress(begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the starts after which something ends before the next start."""
    starts = np.unique(begin)
    if not len(starts):
        return starts
    # Number of ends at or before each start, and one more than any for the last.
    ended = np.searchsorted(np.sort(end), starts, side="right")
    kept: NDArray[np.int64] = starts[np.append(ended[1:] > ended[:-1], True)]
    return kept


def lower_bound(
    size: NDArray[np.int64],
    alignment: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    steps: int,
) -> tuple[int, int]:
    """Give the bytes that no plan can do without, and the step at which they are needed.

    At one step all offsets are multiples of the smallest alignment alive, so every slot but the
    topmost takes up its size rounded up to that; the topmost may be the one that gains most.
    """
    if not len(size):
        return 0, 0
    floor = _smallest_alive(alignment, start, stop, steps)
    best, peak = -1, 0
    for grain in np.unique(floor[floor > 0]):  # nothing is alive where it is 0
        rounded = round_up(size, int(grain))
        load = _load(rounded, start, stop, steps)
        load[floor != grain] = -1
        # Only a step within one grain of the highest can have the highest bound.
        near = np.flatnonzero(load > load.max() - grain)
        slack = _largest_alive(rounded - size, start, stop, near)
        exact = load[near] - slack
        at = int(exact.argmax())
        if exact[at] > best:
            best, peak = int(exact[at]), int(near[at])
    return best, peak


def _load(
    size: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64], steps: int
) -> NDArray[np.int64]:
    change = np.zeros(steps + 1, np.int64)
    np.add.at(change, start, size)
    np.subtract.at(change, stop, size)
    return np.cumsum(change)[:-1]


def _smallest_alive(
    alignment: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64], steps: int
) -> NDArray[np.int64]:
    floor = np.zeros(steps, np.int64)
    for value in np.unique(alignment)[::-1]:
        these = alignment == value
        ones = np.ones(int(these.sum()), np.int64)
        floor[_load(ones, start[these], stop[these], steps) > 0] = value
    return floor


def _largest_alive(
    value: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    at: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Give the largest value alive at each of the steps `at`, which rise.

    Each life is covered by two runs of the same power of two; the runs are then handed down to
    runs of half their length, until they are single steps.
    """
    low, high = np.searchsorted(at, start), np.searchsorted(at, stop)
    alive = (high > low) & (value > 0)
    low, high, value = low[alive], high[alive], value[alive]
    levels = max(1, len(at).bit_length())
    runs = np.zeros((levels, len(at)), np.int64)
    level = np.frexp(high - low)[1] - 1  # floor of the logarithm
    np.maximum.at(runs, (level, low), value)
    np.maximum.at(runs, (level, high - (1 << level.astype(np.int64))), value)
    for each in range(levels - 1, 0, -1):
        half = 1 << (each - 1)
        np.maximum(runs[each - 1], runs[each], out=runs[each - 1])
        np.maximum(runs[each - 1, half:], runs[each, :-half], out=runs[each - 1, half:])
    largest: NDArray[np.int64] = runs[0]
    return largest
