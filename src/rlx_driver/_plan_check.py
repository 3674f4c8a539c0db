"""The check that every plan passes: no two slots share a byte at the same step."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

import numpy as np

from rlx_driver.errors import PlanError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlx_driver._plan_intervals import Table

__all__ = ["check_pins", "validate"]

_CHUNK = 1000


def validate(table: Table, offsets: NDArray[np.int64]) -> None:
    """Check offsets, one a node, against lives, alignments, pins and aliases: O(n log n).

    Raises
    ------
    PlanError
        Names the nodes, with their offsets and lives.
    """
    _check_offsets(table, offsets)
    _check_apart(table, offsets, table.slots())


def check_pins(table: Table) -> None:
    """Check that pinned slots leave each other alone.

    Raises
    ------
    PlanError
        Names two that do not.
    """
    rows = table.slots()
    _check_apart(table, table.pin, rows[table.pin[rows] >= 0])


def _check_apart(table: Table, offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
    begin, end = table.start[rows], table.stop[rows]
    count = len(rows)
    # Ends come before starts of the same step: lives are half open.
    when = np.concatenate([end, begin])
    is_start = np.repeat(np.array([0, 1]), count)
    which = np.concatenate([~rows, rows])
    events = which[np.lexsort((is_start, when))].tolist()
    low = offsets.tolist()
    high = (offsets + table.sizes).tolist()
    _sweep(table, offsets, events, low, high)


def _sweep(
    table: Table, offsets: NDArray[np.int64], events: list[int], low: list[int], high: list[int]
) -> None:
    # A new slot needs to look at its two neighbours only. The offsets alive are kept in chunks, so
    # that one more moves few of them; chunk c holds those from bounds[c] up.
    chunks: list[list[int]] = [[]]
    bounds = [-1]
    owner: dict[int, int] = {}
    for event in events:
        if event < 0:
            start = low[~event]
            at = bisect_right(bounds, start) - 1
            chunk = chunks[at]
            del chunk[bisect_left(chunk, start)]
            if not chunk and at:
                del chunks[at], bounds[at]
            continue
        start = low[event]
        at = bisect_right(bounds, start) - 1
        chunk = chunks[at]
        place = bisect_left(chunk, start)
        above = chunk[place : place + 1] or (chunks[at + 1][:1] if at + 1 < len(chunks) else [])
        if above and above[0] < high[event]:
            raise _overlap(table, offsets, owner[above[0]], event)
        below = chunk[place - 1 : place] if place else chunks[at - 1][-1:] if at else []
        if below and high[owner[below[0]]] > start:
            raise _overlap(table, offsets, owner[below[0]], event)
        chunk.insert(place, start)
        owner[start] = event
        if len(chunk) > _CHUNK:
            half = len(chunk) // 2
            chunks.insert(at + 1, chunk[half:])
            bounds.insert(at + 1, chunk[half])
            del chunk[half:]


def _check_offsets(table: Table, offsets: NDArray[np.int64]) -> None:
    if (offsets < 0).any():
        row = int((offsets < 0).argmax())
        raise PlanError(f"node {table.nodes[row]!r} lies at offset {offsets[row]}; they start at 0")
    roots = table.root == np.arange(len(table.nodes))
    bad = roots & (offsets % table.alignment != 0) & (table.sizes > 0)
    if bad.any():
        row = int(bad.argmax())
        raise PlanError(
            f"node {table.nodes[row]!r} lies at offset {offsets[row]}, which is no multiple of its "
            f"alignment, {table.alignment[row]} bytes"
        )
    moved = roots & (table.pin >= 0) & (table.pin != offsets)
    if moved.any():
        row = int(moved.argmax())
        raise PlanError(
            f"node {table.nodes[row]!r} is pinned to offset {table.pin[row]} and lies at "
            f"{offsets[row]}"
        )
    apart = offsets != table.spread(offsets)
    if apart.any():
        row = int(apart.argmax())
        root = int(table.root[row])
        raise PlanError(
            f"node {table.nodes[row]!r} is an alias {table.shift[row]} bytes into "
            f"{table.nodes[root]!r} at offset {offsets[root]}, and lies at {offsets[row]}"
        )


def _overlap(table: Table, offsets: NDArray[np.int64], one: int, other: int) -> PlanError:
    return PlanError(
        f"{_where(table, offsets, one)} and {_where(table, offsets, other)} share memory while "
        "both are alive"
    )


def _where(table: Table, offsets: NDArray[np.int64], row: int) -> str:
    start, size = int(offsets[row]), int(table.sizes[row])
    return (
        f"node {table.nodes[row]!r} (bytes {start} to {start + size}, steps {table.start[row]} to "
        f"{table.stop[row] - 1})"
    )
