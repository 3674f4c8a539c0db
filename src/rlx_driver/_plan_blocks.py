"""The free blocks of a sweep: best fit, in one loop over what starts and what ends."""

from __future__ import annotations

from bisect import bisect_left, insort

__all__ = ["FreeBlocks"]


class FreeBlocks:
    """The free blocks below the top of an arena, by size and by both ends."""

    __slots__ = ("_by_end", "_by_start", "_held", "_keys", "_shift", "replayed", "top")

    def __init__(self, gaps: list[tuple[int, int]], top: int, shift: int) -> None:
        self._by_start = dict(gaps)
        self._by_end = {end: start for start, end in gaps}
        self._keys = sorted((end - start) << shift | start for start, end in gaps)
        self._shift = shift
        self.top = top
        self.replayed = 0  # events, to say how much work it was
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
                    self.replayed += events.index(event)
                    return False
            offset[event] = start
        self.replayed += len(events)
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
