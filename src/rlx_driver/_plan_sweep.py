"""The peak sweep: stack what is alive at the peak, then sweep away from it both ways.

At the step of the peak all slots alive are stacked without a gap, which is the lower bound. From
there one best-fit sweep runs forward in time and another backward; the slots of the two never
meet, and what is left to decide is the order of the stack. One pass costs about a microsecond
a slot.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from rlx_driver._plan_slots import Slots

__all__ = ["PeakSweep"]


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

    def plan(self, order: NDArray[np.int64], limit: int) -> NDArray[np.int64] | None:
        """Give offsets in bytes for one order of the stack, or None above `limit` bytes."""
        stack = order.tolist()
        if self._topmost >= 0:
            stack.remove(self._topmost)
            stack.append(self._topmost)
        offset = [0] * len(self._size)
        most = -(-limit // self.grain)
        for events in (self._forward, self._backward):
            if not self._run(stack, events, offset, most):
                return None
        offsets = np.array(offset, np.int64) * self.grain
        offsets[self._pinned] = self.slots.pin[self._pinned]
        return offsets

    def _run(self, stack: list[int], events: list[int], offset: list[int], limit: int) -> bool:
        size, step = self._size, self._step
        blocks = _FreeBlocks(self._gaps, self._base, self._shift)
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


class _FreeBlocks:
    """The free blocks below the top of an arena, by size and by both ends."""

    __slots__ = ("_by_end", "_by_start", "_held", "_keys", "_shift", "top")

    def __init__(self, gaps: list[tuple[int, int]], top: int, shift: int) -> None:
        self._by_start = dict(gaps)
        self._by_end = {end: start for start, end in gaps}
        self._keys = sorted((end - start) << shift | start for start, end in gaps)
        self._shift = shift
        self.top = top
        self._held = -1

    def replay(  # one loop, because calls would double its time
        self,
        events: list[int],
        size: list[int],
        step: list[int] | None,
        offset: list[int],
        limit: int,
    ) -> bool:
        """Place and free slots in turn; False when the top would pass `limit`."""
        keys, by_start, by_end, shift = self._keys, self._by_start, self._by_end, self._shift
        mask = (1 << shift) - 1
        for event in events:
            if event < 0:
                start = offset[~event]
                end = start + size[~event]
                if start in by_end:  # join the free block below
                    low = by_end.pop(start)
                    del keys[bisect_left(keys, (start - low) << shift | low)]
                    start = low
                if end in by_start:  # and the one above
                    high = by_start.pop(end)
                    del keys[bisect_left(keys, (high - end) << shift | end)]
                    end = high
                by_start[start] = end
                by_end[end] = start
                insort(keys, (end - start) << shift | start)
                continue
            need = size[event]
            at = bisect_left(keys, need << shift)
            if step is not None and step[event] > 1:
                at = self._aligned(at, need, step[event])
            if at < len(keys):
                start = keys.pop(at) & mask
                end = by_start.pop(start)
                if step is not None and start % step[event]:
                    low, start = start, start + -start % step[event]
                    by_start[low] = start
                    by_end[start] = low
                    insort(keys, (start - low) << shift | low)
                rest = start + need
                if rest == end:
                    del by_end[end]
                else:
                    by_start[rest] = end
                    by_end[end] = rest
                    insort(keys, (end - rest) << shift | rest)
            else:
                start = self._grow(need, 1 if step is None else step[event])
                if self.top > limit:
                    return False
            offset[event] = start
        return True

    def _aligned(self, at: int, need: int, step: int) -> int:
        """Give the first block at or after `at` that holds it from a multiple of `step`."""
        mask = (1 << self._shift) - 1
        for each in range(at, len(self._keys)):
            start = self._keys[each] & mask
            if start + -start % step + need <= self._by_start[start]:
                return each
        return len(self._keys)

    def _grow(self, need: int, step: int) -> int:
        """Raise the top, by as little as the free block below it allows."""
        if self._held >= 0:  # no part of a grain any more
            held, self._held = self._held, -1
            self.free(held, held + 1)
        start = self.top
        if start in self._by_end:
            start = self._by_end.pop(start)
            del self._by_start[start]
            del self._keys[bisect_left(self._keys, (self.top - start) << self._shift | start)]
        if start % step:
            low, start = start, start + -start % step
            self.free(low, start)
        self.top = start + need
        return start

    def free(self, start: int, end: int, *, hold_last: bool = False) -> None:
        """Give back a block; with `hold_last` its last grain stays taken until the top rises."""
        if hold_last:
            end -= 1
            self._held = end
        if start == end:
            return
        if start in self._by_end:
            low = self._by_end.pop(start)
            del self._keys[bisect_left(self._keys, (start - low) << self._shift | low)]
            start = low
        if end in self._by_start:
            high = self._by_start.pop(end)
            del self._keys[bisect_left(self._keys, (high - end) << self._shift | end)]
            end = high
        self._by_start[start] = end
        self._by_end[end] = start
        insort(self._keys, (end - start) << self._shift | start)
