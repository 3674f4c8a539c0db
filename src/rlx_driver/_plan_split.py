"""Large slots first: lay those that matter, then fit the small ones in between or above them.

A best-fit sweep breaks when a small slot takes a corner of the gap that a large one needs next.
Few slots make up nearly all of the peak, so those are laid alone, and the small ones go into what
they leave; where that takes too long, they get a strip of their own on top, which costs next to
nothing because they are small.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rlx_driver._plan_greedy import greedy, greedy_orders
from rlx_driver._plan_slots import lower_bound, round_up
from rlx_driver._plan_sweep import PeakSweep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from rlx_driver._plan_slots import Slots

    _Plan = Callable[[], NDArray[np.int64] | None]

__all__ = ["GREEDY", "Split", "take"]

_SWEPT = 120_000  # slots swept in all orders
GREEDY = 12  # the work of fitting one slot, in slots swept


def take(slots: Slots, which: NDArray[np.bool_]) -> Slots:
    """Give some of the slots, with a bound and a peak of their own."""
    size, alignment = slots.size[which], slots.alignment[which]
    start, stop = slots.start[which], slots.stop[which]
    bound, peak = lower_bound(size, alignment, start, stop, len(slots.steps))
    return replace(
        slots,
        rows=slots.rows[which],
        size=size,
        alignment=alignment,
        pin=slots.pin[which],
        start=start,
        stop=stop,
        bound=bound,
        peak=peak,
    )


class Split:
    """Plans that lay the large slots first; for slots without pins.

    Parameters
    ----------
    slots
        What to place.
    goal
        Bytes below which nothing needs to be better.
    """

    SHARES = (0.0005, 0.005)  # of the bound, for all the small slots

    def __init__(self, slots: Slots, goal: int) -> None:
        self._slots = slots
        self._goal = goal
        self._best = 2**62
        self._large = np.ones(len(slots), np.bool_)
        self._upper = slots
        self._found = np.zeros(len(slots), np.int64)

    def plans(self, share: float) -> Iterator[tuple[str, int, _Plan]]:
        """Give what finds plans: its name, the work it takes, and the call."""
        size = _largest_small(self._slots, share)
        if not size or size == self._slots.size.max():
            return
        self._best = 2**62
        self._large = self._slots.size > size
        self._upper = take(self._slots, self._large)
        count, small = len(self._upper), len(self._slots) - len(self._upper)
        yield "swept", count, self._sweep
        # The large ones are the harder half: try more where a strip on top cannot mend it.
        for name, order in greedy_orders(self._upper):
            if self._best <= max(self._upper.bound, self._goal):
                break
            yield name, GREEDY * count, partial(self._fit, order)
        if self._best <= self._goal:
            yield "the small ones between", GREEDY * small, self._fill

    def _sweep(self) -> NDArray[np.int64] | None:
        sweep = PeakSweep(self._upper)
        better = False
        for turn, (_, order) in enumerate(sweep.orders(), 1):
            better |= self._keep(sweep.plan(order, self._best - 1))
            if self._best <= max(self._upper.bound, self._goal) or turn * len(self._upper) > _SWEPT:
                break
        return self._stack() if better else None

    def _fit(self, order: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return self._stack() if self._keep(greedy(self._upper, order, self._best - 1)) else None

    def _keep(self, found: NDArray[np.int64] | None) -> bool:
        if found is None or (size := int((found + self._upper.size).max())) >= self._best:
            return False
        self._best, self._found = size, found
        return True

    def _fill(self) -> NDArray[np.int64] | None:
        """Fit the small slots into what the large ones leave."""
        fixed = np.full(len(self._slots), -1, np.int64)
        fixed[self._large] = self._found
        order = np.lexsort((self._slots.start - self._slots.stop, -self._slots.size))
        return greedy(replace(self._slots, pin=fixed), order, 2**62)

    def _stack(self) -> NDArray[np.int64]:
        """Give the small slots a strip above the large ones."""
        slots, large = self._slots, self._large
        small = take(slots, ~large)
        sweep = PeakSweep(small)
        best, above = 2**62, np.zeros(len(small), np.int64)
        for _, order in sweep.orders():
            plan = sweep.plan(order, best - 1)
            if plan is not None and (size := int((plan + small.size).max(initial=0))) < best:
                best, above = size, plan
            if best <= small.bound or len(small) > 5_000:
                break
        offsets = np.empty(len(slots), np.int64)
        offsets[large] = self._found
        top = np.array([self._best])
        offsets[~large] = above + round_up(top, int(slots.alignment.max()))
        return offsets


def _largest_small(slots: Slots, share: float) -> int:
    """Give the largest size such that all slots up to it need no more than a share of the bound."""
    sizes = np.unique(slots.size)
    low, high = 0, len(sizes)  # sizes[:low] are small enough
    while low < high:
        middle = (low + high + 1) // 2
        small = take(slots, slots.size <= sizes[middle - 1])
        if small.bound <= share * slots.bound:
            low = middle
        else:
            high = middle - 1
    return int(sizes[low - 1]) if low else 0
