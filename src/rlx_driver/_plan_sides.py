"""Free blocks that choose a side: a slot is laid beside the neighbour that stays the longer.

Best fit says which block a slot goes into, and this at which end of it. What dies soon then lies
next to what dies soon, and the gaps that they leave join. A chain of layers, in which each slot
meets only the one before and the one behind, is laid from the bottom and from the top in turn.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from rlx_driver._plan_blocks import FreeBlocks

__all__ = ["SidedBlocks"]

_NEVER = 1 << 62


class SidedBlocks(FreeBlocks):
    """Free blocks that know when what lies beside them is freed; for slots aligned alike.

    Parameters
    ----------
    gaps, top, shift
        As for `FreeBlocks`.
    freed
        When each slot is freed, in the order of the sweep.
    alike
        Lay a slot beside the neighbour that is freed most nearly when it is itself, not beside the
        one that stays the longest.
    """

    __slots__ = ("_above", "_alike", "_below", "_freed")

    def __init__(
        self, gaps: list[tuple[int, int]], top: int, shift: int, freed: list[int], *, alike: bool
    ) -> None:
        super().__init__(gaps, top, shift)
        self._freed = freed
        self._alike = alike
        self._above: dict[int, int] = {}  # by its lower end: when what lies there is freed
        self._below: dict[int, int] = {}  # by its upper end

    def replay(
        self,
        events: list[int],
        size: list[int],
        step: list[int] | None,
        offset: list[int],
        limit: int,
    ) -> bool:
        """Place and free slots in turn; False when the top would pass `limit`."""
        if step is not None:
            return super().replay(events, size, step, offset, limit)
        keys, by_start, by_end, shift = self._keys, self._by_start, self._by_end, self._shift
        above, below, freed, alike = self._above, self._below, self._freed, self._alike
        mask = (1 << shift) - 1
        for event in events:
            if event < 0:
                start = offset[~event]
                end = start + size[~event]
                if start in by_end:
                    low = by_end.pop(start)
                    del keys[bisect_left(keys, (start - low) << shift | low)]
                    start = low
                if end in by_start:
                    high = by_start.pop(end)
                    del keys[bisect_left(keys, (high - end) << shift | end)]
                    end = high
                by_start[start] = end
                by_end[end] = start
                insort(keys, (end - start) << shift | start)
                continue
            need, mine = size[event], freed[event]
            at = bisect_left(keys, need << shift)
            if at < len(keys):
                start = keys.pop(at) & mask
                end = by_start.pop(start)
                rest = start + need
                if rest == end:
                    del by_end[end]
                else:
                    # Dead neighbours leave old entries, but the one alive was the last to write.
                    over, under = above.get(end, _NEVER), below.get(start, _NEVER)
                    if abs(over - mine) < abs(under - mine) if alike else over > under:
                        low, high, start = start, end - need, end - need
                        del by_end[end]
                    else:
                        low, high = rest, end
                    by_start[low] = high
                    by_end[high] = low
                    insort(keys, (high - low) << shift | low)
            else:
                start = self._grow(need, 1)
                if self.top > limit:
                    self.replayed += events.index(event)
                    return False
            offset[event] = start
            above[start] = below[start + need] = mine
        self.replayed += len(events)
        return True
