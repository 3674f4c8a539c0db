"""The skyline search: fill the lowest floor first, restart with other priorities.

The heights over time are a skyline. Where it is lowest, the slot of the highest priority that
fits between the walls is laid; where none fits, the floor is raised to the lower wall, and what is
lost by that can never come back. So a try ends as soon as, at some step, loss and load together
pass the limit. The slots that were missing there get a higher priority for the next try.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlx_driver._plan_slots import Slots

__all__ = ["Skyline"]

_FIRST = ((1.0, 0.5), (0.25, 1.0), (1.0, 0.0), (0.5, 1.0), (1.0, 1.0), (0.0, 1.0))
_NOISE = 0.05  # of each try, in the logarithm of a priority
_LESSON = 0.3  # what a missing slot gains
_PATIENCE = 150  # failures in a row before starting over


class Skyline:
    """Tries of one instance; without pins, and with one alignment.

    Sizes are counted in multiples of the alignment.
    """

    def __init__(self, slots: Slots, seed: int) -> None:
        self.grain = int(slots.alignment[0])
        size = -(-slots.size // self.grain)
        self._size: list[int] = size.tolist()
        self._start: list[int] = slots.start.tolist()
        self._stop: list[int] = slots.stop.tolist()
        self._steps = len(slots.steps)
        load = np.zeros(self._steps + 1, np.int64)
        np.add.at(load, slots.start, size)
        np.subtract.at(load, slots.stop, size)
        self._load = np.cumsum(load)[:-1]
        life = (slots.stop - slots.start).astype(float)
        self._log_size, self._log_life = np.log(size), np.log(life)
        self._random = np.random.default_rng(seed)
        self._fixed = list(_FIRST)
        self._best = self._weight = self._log_life.copy()
        self._failures = 0
        self.work = 0  # of all tries, in microseconds or so

    def attempt(self, limit: int) -> NDArray[np.int64] | None:
        """Give offsets in bytes below `limit`, or None and learn from the failure."""
        if self._fixed:
            by_size, by_life = self._fixed.pop()
            weight = by_size * self._log_size + by_life * self._log_life
        else:
            weight = self._weight + self._random.normal(0, _NOISE, len(self._weight))
        self.work += 30
        offsets, missed = self._lay(weight, limit)
        if offsets is not None:
            self._weight, self._best, self._failures = weight.copy(), weight, 0
            return offsets
        self._weight[missed] += _LESSON
        self._failures += 1
        if self._failures > _PATIENCE:
            self._failures = 0
            self._start_over()
        return None

    def _start_over(self) -> None:
        if self._random.random() < 0.7:
            self._weight = self._best + self._random.normal(0, 0.3, len(self._best))
        else:
            self._weight = self._random.random() * self._log_size + self._log_life

    def _lay(
        self, weight: NDArray[np.float64], limit: int
    ) -> tuple[NDArray[np.int64] | None, list[int]]:
        """Lay all slots below `limit` bytes, or give those that were missing where it failed."""
        most = limit // self.grain
        order = np.argsort(-weight, kind="stable").tolist()
        start, stop, size = self._start, self._stop, self._size
        total = self._load.copy()  # load and loss
        offset = [0] * len(size)
        # Segments of the skyline: their left ends, their heights; the last one is a wall.
        lefts, heights = [0, self._steps], [0, most + 1]
        while order:
            floor = min(heights)
            at = heights.index(floor)
            left, right = lefts[at], lefts[at + 1]
            for slot in order:
                if start[slot] >= left and stop[slot] <= right:
                    break
            else:  # nothing fits: raise the floor to the lower wall
                before = heights[at - 1] if at else most + 1
                wall = min(before, heights[at + 1])
                self.work += 4 + len(order) // 20
                part = total[left:right]
                part += wall - floor
                if part.max() > most:
                    waiting = [each for each in order if start[each] < right and stop[each] > left]
                    if waiting:
                        return None, waiting
                heights[at] = wall
                if wall == heights[at + 1] and at + 2 < len(lefts):
                    del heights[at + 1], lefts[at + 1]
                if at and before == wall:
                    del heights[at], lefts[at]
                continue
            order.remove(slot)
            top = floor + size[slot]
            if top > most:
                return None, [slot]
            offset[slot] = floor
            self.work += 2
            begin, end = start[slot], stop[slot]
            # Replace the segment by what is left of it at both sides and the new step.
            new_lefts, new_heights = [], []
            if begin > left:
                new_lefts.append(left)
                new_heights.append(floor)
            elif at and heights[at - 1] == top:
                at -= 1
                begin = lefts[at]
                del lefts[at], heights[at]
            new_lefts.append(begin)
            new_heights.append(top)
            if end < right:
                new_lefts.append(end)
                new_heights.append(floor)
            lefts[at : at + 1] = new_lefts
            heights[at : at + 1] = new_heights
        return np.array(offset, np.int64) * self.grain, []
