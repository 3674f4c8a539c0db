"""The search for a plan: which method runs when, for how long, and when it stops."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rlx_driver._plan_check import validate
from rlx_driver._plan_exact import SECONDS as EXACT_SECONDS
from rlx_driver._plan_exact import refusal, solve
from rlx_driver._plan_greedy import greedy, greedy_orders
from rlx_driver._plan_skyline import Skyline
from rlx_driver._plan_split import GREEDY, Split
from rlx_driver._plan_sweep import SIDES, PeakSweep
from rlx_driver.errors import PlanError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlx_driver._plan_intervals import Table
    from rlx_driver._plan_slots import Slots

__all__ = ["Search"]

# Work is counted in slots placed by a sweep, about a microsecond each.
_SKYLINE_SLOTS = 2000  # above that a try takes too long to learn from


def _work(count: int) -> int:
    """Give the work to be done without a time limit.

    Reading and checking take their share of the time too: 50 ms for 10,000 slots, all in all, and
    a second for 100,000.
    """
    if count <= 10_000:
        return 42_000 - 24 * count // 10
    return min(18_000 + 6 * (count - 10_000), 400_000)


@dataclass(slots=True)
class Search:
    """The best offsets found so far, what found them, and when to stop.

    Parameters
    ----------
    slots
        What to place.
    goal
        Bytes at which the search stops: the lower bound, or the capacity if that is more.
    time_limit
        Seconds; without one the work is bounded by counts, and the same every time.
    seed
        Of the random restarts.
    table
        Where the slots come from, to ask the exact solver too; None to do without.
    began
        When the time limit began to run, by `time.monotonic`; None for now.
    """

    slots: Slots
    goal: int
    time_limit: float | None
    seed: int
    table: Table | None = None
    began: float | None = None
    size: int = field(default=2**62, init=False)
    offsets: NDArray[np.int64] = field(init=False)
    found_by: str = field(default="nothing to place", init=False)
    tried: int = field(default=0, init=False)
    proven: bool = field(default=False, init=False)
    note: str = field(default="", init=False)
    _end: float = field(default=0.0, init=False)
    _left: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.offsets = np.zeros(len(self.slots), np.int64)
        self._left = _work(len(self.slots))
        if self.time_limit is not None:
            began = time.monotonic() if self.began is None else self.began
            self._end = began + self.time_limit

    def late(self) -> bool:
        """Whether the time is up."""
        return self.time_limit is not None and time.monotonic() >= self._end

    @property
    def done(self) -> bool:
        """Whether the goal is reached, or the time is up."""
        return self.proven or self.size <= self.goal or (self.tried > 0 and self.late())

    def offer(self, offsets: NDArray[np.int64] | None, found_by: str) -> bool:
        """Take offsets that are better than the best; whether they are."""
        self.tried += 1
        if offsets is None:
            return False
        size = int((offsets + self.slots.size).max(initial=0))
        if size >= self.size:
            return False
        self.size, self.offsets, self.found_by = size, offsets, found_by
        return True

    def run(self) -> None:
        """Search: what is done without a time limit first, then whatever the time allows."""
        if not len(self.slots):
            self.size = 0
            return
        sweep = PeakSweep(self.slots)
        self._bounded(sweep)
        if self.table is not None and not self.done:
            self._exact(self.table)
        if self.time_limit is not None:
            self._left = 2**62
            self._unbounded(sweep)

    @property
    def _simple(self) -> bool:
        """Whether all slots may lie anywhere, and are aligned alike."""
        slots = self.slots
        return bool((slots.pin < 0).all() and (slots.alignment == slots.alignment[0]).all())

    def _may(self, cost: int) -> bool:
        """Whether there is work left to spend on something; spends it."""
        if self.done or cost > self._left:
            return False
        self._left -= cost
        return True

    def _bounded(self, sweep: PeakSweep) -> None:
        count = len(self.slots)
        orders = list(sweep.orders())
        passes = [(side, *each) for side in SIDES for each in orders]
        if count > 2000:  # the ones that most often reach the bound
            passes = [passes[0], passes[1], passes[6], passes[14], passes[8]]
        early = 6 if count <= 2000 else 4 if count <= 10_000 else 2
        self._sweep(sweep, passes[:early])
        if early == 2 and self.size > 1.1 * self.slots.bound:  # no strip of small slots mends that
            early = 3
            self._sweep(sweep, passes[2:3])
        if self._simple:
            self._split()
        self._sweep(sweep, passes[early:])
        for each, (name, order) in enumerate(greedy_orders(self.slots)):
            if each < 3 and self._may(GREEDY * count):
                self._fit(name, order, best_fit=False)
        if self._simple and count <= _SKYLINE_SLOTS:
            self._skyline()

    def _sweep(self, sweep: PeakSweep, passes: list[tuple[str, str, NDArray[np.int64]]]) -> None:
        for side, name, order in passes:
            first, before = not self.tried, sweep.work
            if self.done or not (first or self._left >= len(self.slots) // 2):
                return
            self.offer(sweep.plan(order, self.size - 1, side=side), f"peak sweep, {name}, {side}")
            if not first:
                self._left -= sweep.work - before

    def _split(self) -> None:
        split = Split(self.slots, max(self.goal, self.slots.bound))
        for share in split.SHARES:
            if not self._may(2 * len(self.slots)):
                return
            for found_by, cost, plan in split.plans(share):
                if self._may(cost):
                    self.offer(plan(), f"large slots first, {found_by}")

    def _exact(self, table: Table) -> None:
        why = refusal(self.slots)
        if why is not None:
            self.note = f"omnimalloc was not asked: {why}"
            return
        seconds = EXACT_SECONDS if self.time_limit is None else self._end - time.monotonic()
        for answer in solve(table, self.slots, self.goal, seconds):
            rows = self.slots.rows
            laid = np.maximum(table.pin, 0)
            laid[rows] = answer.offsets
            try:
                validate(table, table.spread(laid))
            except PlanError as error:
                self.note = f"an answer of omnimalloc was thrown away: {error}"
                continue
            self.offer(answer.offsets, "omnimalloc")
            size = int((answer.offsets + self.slots.size).max())
            self.proven = answer.proven and self.size == size
            if self.done:
                return

    def _fit(self, name: str, order: NDArray[np.int64], *, best_fit: bool) -> None:
        how = "best fit" if best_fit else "first fit"
        found = greedy(self.slots, order, self.size - 1, best_fit=best_fit, late=self.late)
        self.offer(found, f"greedy {how}, {name}")

    def _skyline(self) -> None:
        skyline = Skyline(self.slots, self.seed)
        while not self.done and self._left > 0:
            before = skyline.work
            self.offer(skyline.attempt(self.size - 1), "skyline")
            self._left -= skyline.work - before

    def _unbounded(self, sweep: PeakSweep) -> None:
        self._sweep(sweep, [(side, *each) for side in SIDES for each in sweep.orders()])
        if self._simple:
            self._split()
        for best_fit in (False, True):
            for name, order in greedy_orders(self.slots):
                if self.done:
                    return
                self._fit(name, order, best_fit=best_fit)
        if self._simple and len(self.slots) <= _SKYLINE_SLOTS:
            self._skyline()
        self._shuffle(sweep)

    def _shuffle(self, sweep: PeakSweep) -> None:
        """Sweep and fit in orders that are a little off, until the time is up."""
        random = np.random.default_rng(self.seed)
        orders = [order for _, order in greedy_orders(self.slots)]
        stacks = [order for _, order in sweep.orders()]
        while not self.done:
            spread = random.choice([0.01, 0.03, 0.1])
            stack = _disturbed(stacks[random.integers(len(stacks))], spread, random)
            side = SIDES[random.integers(len(SIDES))]
            self.offer(sweep.plan(stack, self.size - 1, side=side), "peak sweep, shuffled")
            if len(self.slots) <= 5000 and not self.done:
                order = _disturbed(orders[random.integers(len(orders))], spread, random)
                self._fit("shuffled", order, best_fit=False)


def _disturbed(
    order: NDArray[np.int64], spread: float, random: np.random.Generator
) -> NDArray[np.int64]:
    places = np.arange(len(order)) + random.normal(0, spread * len(order), len(order))
    return order[np.argsort(places)]
