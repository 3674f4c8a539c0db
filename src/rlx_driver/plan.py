"""`plan_memory`: lay the nodes of a program into one arena."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from rlx_driver._plan_check import check_pins
from rlx_driver._plan_exact import require
from rlx_driver._plan_intervals import check_alignment, read_intervals
from rlx_driver._plan_report import capacity_text
from rlx_driver._plan_search import Search
from rlx_driver._plan_slots import make_slots
from rlx_driver.errors import CapacityError, PlanError
from rlx_driver.memory_plan import MemoryPlan

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from rlx_driver.interval import Interval

__all__ = ["MemoryPlan", "plan_memory"]


def plan_memory(
    intervals: Iterable[Interval | tuple[Hashable, int, int, int]],
    *,
    alignment: int = 64,
    capacity: int | None = None,
    time_limit: float | None = None,
    exact: bool = False,
    seed: int = 0,
) -> MemoryPlan:
    """Lay nodes into one arena, so that those alive at the same step share no byte.

    Parameters
    ----------
    intervals
        Each an `Interval`, or a tuple (node, size in bytes, first step, last step), both steps
        inclusive.
    alignment
        Of every slot that asks for none of its own, in bytes, a power of two.
    capacity
        Bytes the plan has to fit in; the search stops when it does.
    time_limit
        Seconds from the call to the end of the search, unless it reaches the lower bound first; the
        check of the plan comes after, some microseconds a slot. Left out, the
        work is bounded by its amount, and the plan is the same every time. With a limit it is
        the same but for where the clock stops it, and never worse than without, if the time
        allows what is done without.
    exact
        Ask the solver of omnimalloc too (``pip install rlx-driver[planner]``), for 10 seconds at
        most without a `time_limit`; its answer is checked, and the better one taken. It takes no
        pinned slots, and none above 10,000: the plan is then our own, and its report says so.
    seed
        Of the random restarts.

    Returns
    -------
    MemoryPlan
        Checked; `MemoryPlan.optimal` says whether it is proven to be the smallest.

    Raises
    ------
    PlanError
        The intervals make no sense together; the text names the node.
    DuplicateError
        A node stands in it twice.
    CapacityError
        No plan was found within `capacity`; the text shows the peak and who is alive at it.
    MissingPackageError
        `exact` was asked for and omnimalloc is not installed.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> rlx.plan_memory([("x", 4096, 0, 1), ("y", 4096, 1, 2), ("z", 4096, 2, 3)]).size
    8192
    """
    began = time.monotonic()
    alignment = check_alignment(alignment, "the plan")
    _check_options(capacity, time_limit, seed)
    table = read_intervals(intervals, alignment)
    check_pins(table)
    slots = make_slots(table)
    goal = slots.bound if capacity is None else max(slots.bound, capacity)
    if exact:
        require()
    search = Search(slots, goal, time_limit, seed, table if exact else None, began)
    if capacity is not None and capacity < slots.bound:  # hopeless: only how far it is off
        search = Search(slots, goal, None, seed)
    search.run()
    if capacity is not None and search.size > capacity:
        raise CapacityError(capacity_text(table, slots, capacity, search.size))
    offsets = np.maximum(table.pin, 0)
    offsets[slots.rows] = search.offsets
    found_by = f"{search.found_by}; {search.note}" if search.note else search.found_by
    return MemoryPlan._make(
        table, slots, table.spread(offsets), alignment, found_by, capacity, search.proven
    )


def _check_options(capacity: object, time_limit: object, seed: object) -> None:
    if capacity is not None and (
        isinstance(capacity, bool) or not isinstance(capacity, int | np.integer) or capacity < 0
    ):
        raise PlanError(f"capacity is {capacity!r}; give bytes, or None")
    if time_limit is not None and not (
        isinstance(time_limit, int | float | np.number) and time_limit >= 0
    ):
        raise PlanError(f"time_limit is {time_limit!r}; give seconds, or None")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise PlanError(f"seed is {seed!r}; give an integer, 0 or more")
