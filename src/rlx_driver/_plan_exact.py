"""Exact search by omnimalloc, when it is installed: branch and bound in C++.

The work is in two parts. "Does it fit in so many bytes?" is the easier question, so it is asked
first; the smallest size is looked for in the time that is left. Nothing of the answer is taken on
trust but the proof that there is no smaller one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._plan_slots import round_up
from rlx_driver.errors import MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from rlx_driver._plan_intervals import Table
    from rlx_driver._plan_slots import Slots

__all__ = ["SECONDS", "Exact", "refusal", "require", "solve"]

SECONDS = 10.0  # without a time limit
_LARGEST = 10_000  # slots; above that setting up takes longer than it helps
# The solver divides its threads over orders and bounds; fewer than this leaves some of them out,
# and on few cores they still take turns.
_THREADS = 12


@dataclass(frozen=True, slots=True, eq=False)
class Exact:
    """An answer of the solver: offsets in bytes, and whether there is no smaller size."""

    offsets: NDArray[np.int64]
    proven: bool


def require() -> None:
    """Raise unless omnimalloc is there."""
    try:
        import omnimalloc  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "exact=True needs omnimalloc, which is not installed; "
            "pip install rlx-driver[planner], or plan without exact"
        ) from error


def refusal(slots: Slots) -> str | None:
    """Say why the solver cannot be asked; None if it can."""
    if (slots.pin >= 0).any():
        return "its exact solver takes no pinned slots"
    if len(slots) > _LARGEST:
        return f"{len(slots)} slots are too many for it"
    return None


def solve(table: Table, slots: Slots, goal: int, seconds: float) -> Iterator[Exact]:
    """Give answers of the solver, the first one that fits in `goal` bytes, or the last one best.

    Sizes are rounded up to the largest alignment, which makes all offsets multiples of it; that
    is exact for one alignment, and safe for several.
    """
    from omnimalloc import Allocation

    end = time.monotonic() + seconds
    grain = int(slots.alignment.max())
    size = round_up(slots.size, grain)
    start, stop = table.start[slots.rows], table.stop[slots.rows]
    base = int(start.min())
    columns = zip(size.tolist(), (start - base).tolist(), (stop - base).tolist(), strict=True)
    work = [
        Allocation(id=each, size=bytes_, start=first, end=last)
        for each, (bytes_, first, last) in enumerate(columns)
    ]
    after = int(stop.max()) - base
    # A slot after all others that fills the goal alone: reaching it is then the lower bound.
    filler = Allocation(id=len(work), size=max(goal, grain), start=after, end=after + 1)
    aim = [*work, filler] if goal > slots.bound else work
    fits = _decide(tuple(aim), max(goal, _peak(slots, size)), seconds / 2)
    if fits is not None:
        yield Exact(_offsets(fits, len(slots)), False)
    from omnimalloc.allocators import SupermallocAllocator

    left = end - time.monotonic()
    if left <= 0:
        return
    solver = SupermallocAllocator(timeout=left, num_threads=_THREADS)
    result = solver.solve(tuple(work))
    exact = bool((size == slots.size).all())  # else the proof is of the sizes rounded up
    yield Exact(_offsets(result.allocations, len(slots)), result.proved_optimal and exact)


def _peak(slots: Slots, size: NDArray[np.int64]) -> int:
    change = np.zeros(len(slots.steps) + 1, np.int64)
    np.add.at(change, slots.start, size)
    np.subtract.at(change, slots.stop, size)
    return int(np.cumsum(change).max())


def _decide(allocations: tuple[Any, ...], goal: int, seconds: float) -> Any | None:
    """Give allocations within `goal` bytes, or None; by what omnimalloc does not publish.

    Its public solver climbs down from the best known size, which takes a few times as long. None
    if these parts are gone, or changed: the public one does without.
    """
    try:
        from omnimalloc._cpp import Partition, try_solve_many
        from omnimalloc.allocators.supermalloc import DEFAULT_HEURISTICS

        base = Partition.from_allocations(allocations)
        orders = [base.reorder("".join(keys)) for keys in DEFAULT_HEURISTICS]
        found = try_solve_many(
            [order.with_bound(goal + 1) for order in orders],
            goal + 1,
            None,
            canonical=True,
            dominance=True,
            floor_inference=True,
            monotonic_floor=True,
            decompose=True,
            timeout=seconds,
            num_threads=_THREADS,
        )
        return None if found is None else found.allocations
    except (ImportError, AttributeError, TypeError):
        return None


def _offsets(allocations: Any, count: int) -> NDArray[np.int64]:
    offsets = np.full(count, -1, np.int64)
    for each in allocations:
        if each.id < count and each.offset is not None:
            offsets[each.id] = each.offset
    return offsets
