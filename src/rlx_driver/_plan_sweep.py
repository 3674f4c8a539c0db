"""The peak sweep: stack what is alive at the peak, then sweep away from it both ways.

At the step of the peak all slots alive are stacked without a gap, which is the lower bound. From
there one best-fit sweep runs forward in time and another backward; the slots of the two never
meet, and what is left to decide is the order of the stack. One pass costs about a microsecond
a slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlx_driver._plan_blocks import FreeBlocks
from rlx_driver._plan_sides import SidedBlocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from rlx_driver._plan_slots import Slots

__all__ = ["SIDES", "PeakSweep"]

SIDES = ("low", "last", "alike")


class PeakSweep:
    """Plans by sweeping away from the peak, one for each order of the stack.

    Sizes and offsets are counted in grains here, the smallest alignment of all, which keeps the
    numbers small. Pinned slots are kept clear for the whole run.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.grain = int(slots.alignment.min(initial=2**60))
        units = -(-slots.size // self.grain)
        step = slots.alignment // self.grain
        self.target = -(-slots.bound // self.grain)
        self._size: list[int] = units.tolist()
        self._step: list[int] | None = None if (step == 1).all() else step.tolist()
        self._shift = (int(units.sum() + step.sum()) + self._pinned_end()).bit_length()
        self.work = 0  # slots swept so far
        self._prepare(units)

    def _pinned_end(self) -> int:
        pinned = self.slots.pin >= 0
        ends = (self.slots.pin + self.slots.size)[pinned]
        return -(-int(ends.max(initial=0)) // self.grain)

    def _prepare(self, units: NDArray[np.int64]) -> None:
        slots, peak = self.slots, self.slots.peak
        free = slots.pin < 0
        self._pinned = np.flatnonzero(~free)
        self._gaps = self._between_pins(units)
        start, stop = slots.start, slots.stop
        alive = (start <= peak) & (stop > peak)
        last = len(slots.steps)
        self._stack = np.flatnonzero(alive & free)
        after = np.flatnonzero((start > peak) & free)
        before = np.flatnonzero((stop <= peak) & free)
        self._forward = _events(after, self._stack, start, stop, units, last)
        self._backward = _events(before, self._stack, last - stop, last - start, units, last)
        # The topmost of the stack is the one whose size gains most by rounding; see lower_bound.
        self._topmost = -1
        if slots.bound < self.target * self.grain and len(self._stack):
            slack = units[self._stack] * self.grain - slots.size[self._stack]
            self._topmost = int(self._stack[slack.argmax()])

    def _between_pins(self, units: NDArray[np.int64]) -> list[tuple[int, int]]:
        gaps, end = [], 0
        for each in self._pinned[np.argsort(self.slots.pin[self._pinned], kind="stable")].tolist():
            start = int(self.slots.pin[each]) // self.grain
            if start > end:
                gaps.append((end, start))
            end = max(end, start + int(units[each]))
        self._base = end
        return gaps

    def orders(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Give orders of the stack, the ones that most often reach the bound first."""
        stack, slots = self._stack, self.slots
        start, stop, size = slots.start[stack], slots.stop[stack], slots.size[stack]
        life = stop - start
        for name, keys in (
            ("last end first", (start, -stop)),
            ("first end first", (-start, stop)),
            ("first start first", (-stop, start)),
            ("longest life first", (-size, -life)),
            ("largest first", (-life, -size)),
            ("largest area first", (-life, -size * life)),
        ):
            yield name, stack[np.lexsort(keys)]

    def plan(
        self, order: NDArray[np.int64], limit: int, *, side: str = "low"
    ) -> NDArray[np.int64] | None:
        """Give offsets in bytes for one order of the stack, or None above `limit` bytes.

        `side` says at which end of a free block a slot is laid: always "low", beside the neighbour
        that is the "last" to be freed, or the one that is freed when it is itself, "alike".
        """
        stack = order.tolist()
        if self._topmost >= 0:
            stack.remove(self._topmost)
            stack.append(self._topmost)
        offset = [0] * len(self._size)
        most = -(-limit // self.grain)
        last = len(self.slots.steps)
        for events, freed in (
            (self._forward, self.slots.stop),
            (self._backward, last - self.slots.start),
        ):
            blocks = FreeBlocks(self._gaps, self._base, self._shift)
            if side != "low":
                blocks = SidedBlocks(
                    self._gaps, self._base, self._shift, freed.tolist(), alike=side == "alike"
                )
            fits = self._run(blocks, stack, events, offset, most)
            self.work += blocks.replayed * (3 if side == "low" else 4) // 6
            if not fits:
                return None
        offsets = np.array(offset, np.int64) * self.grain
        offsets[self._pinned] = self.slots.pin[self._pinned]
        return offsets

    def _run(
        self,
        blocks: FreeBlocks,
        stack: list[int],
        events: list[int],
        offset: list[int],
        limit: int,
    ) -> bool:
        size, step = self._size, self._step
        if not blocks.replay(stack, size, step, offset, limit):
            return False
        if self._topmost < 0 or ~self._topmost not in events:
            return blocks.replay(events, size, step, offset, limit)
        # The bound ends inside the last grain, so what the topmost leaves lacks that grain.
        at, top = events.index(~self._topmost), blocks.top
        if not blocks.replay(events[:at], size, step, offset, limit):
            return False
        start = offset[self._topmost]
        blocks.free(start, start + size[self._topmost], hold_last=blocks.top == top)
        return blocks.replay(events[at + 1 :], size, step, offset, limit)


def _events(
    slots: NDArray[np.int64],
    stack: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    size: NDArray[np.int64],
    last: int,
) -> list[int]:
    """Give slots to place, and complements of slots to free, in the order of time.

    At one step what ends is freed first, and what starts is placed largest first.
    """
    ending = np.concatenate([stack, slots])
    ending = ending[stop[ending] < last]
    when = np.concatenate([2 * stop[ending], 2 * start[slots] + 1])
    tie = np.concatenate([np.zeros(len(ending), np.int64), -size[slots]])
    events: list[int] = np.concatenate([~ending, slots])[np.lexsort((tie, when))].tolist()
    return events
