"""Aliases: nodes that see memory of another, collapsed onto the root of their chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rlx_driver._plan_intervals import Table

__all__ = ["collapse"]


def collapse(
    table: Table,
    alias_of: Sequence[Any],
    offsets: NDArray[np.int64],
    own_alignment: Sequence[bool],
) -> None:
    """Point every alias at its root, and give the root the lives, pins and alignments of all.

    Parameters
    ----------
    table
        Its `root`, `shift`, `start`, `stop`, `alignment` and `pin` are changed in place.
    alias_of
        The node that each row is an alias of, or None.
    offsets
        Bytes from the start of that node.
    own_alignment
        Which rows asked for an alignment themselves; those of the others do not bind an alias.
    """
    parents = _parents(table, alias_of, offsets)
    for row in range(len(parents)):
        _follow(table, parents, offsets, row)
    aliases = np.flatnonzero(table.root != np.arange(len(parents)))
    _check_inside(table, aliases)
    roots = table.root[aliases]
    np.minimum.at(table.start, roots, table.start[aliases])
    np.maximum.at(table.stop, roots, table.stop[aliases])
    asked_pins = [row for row in aliases.tolist() if table.pin[row] >= 0]
    for row in aliases.tolist():
        if own_alignment[row]:
            _align(table, row)
    for row in asked_pins:
        _pin(table, row)


def _parents(table: Table, alias_of: Sequence[Any], offsets: NDArray[np.int64]) -> list[int]:
    parents = []
    for row, target in enumerate(alias_of):
        node = table.nodes[row]
        if target is None:
            if offsets[row]:
                raise PlanError(
                    f"node {node!r} has alias_offset {offsets[row]} and is no alias; "
                    "give alias_of too"
                )
            parents.append(row)
            continue
        try:
            parent = table.index.get(target)
        except TypeError:  # not hashable
            parent = None
        if parent is None:
            raise PlanError(
                f"node {node!r} is an alias of {target!r}, which has no interval; add one"
            )
        if parent == row:
            raise PlanError(f"node {node!r} is an alias of itself")
        if offsets[row] < 0:
            raise PlanError(
                f"node {node!r}: its alias_offset is {offsets[row]}; offsets start at 0"
            )
        parents.append(parent)
    return parents


def _follow(table: Table, parents: list[int], offsets: NDArray[np.int64], row: int) -> None:
    chain: list[int] = []
    walked: set[int] = set()
    at = row
    while parents[at] != at:
        if at in walked:
            names = [repr(table.nodes[each]) for each in [*chain[chain.index(at) :], at]]
            raise PlanError(f"aliases go round in a circle: {' -> '.join(names)}")
        walked.add(at)
        chain.append(at)
        if table.root[at] != at:  # done before
            break
        at = parents[at]
    for each in reversed(chain):
        parent = parents[each]
        table.root[each] = table.root[parent]
        table.shift[each] = table.shift[parent] + offsets[each]


def _check_inside(table: Table, aliases: NDArray[np.int64]) -> None:
    ends = table.shift[aliases] + table.sizes[aliases]
    room = table.sizes[table.root[aliases]]
    if (ends > room).any():
        at = int((ends > room).argmax())
        row = aliases[at]
        raise PlanError(
            f"node {table.nodes[row]!r} is an alias of {table.nodes[table.root[row]]!r} from byte "
            f"{table.shift[row]} to {ends[at]}, and that has {room[at]} bytes"
        )


def _align(table: Table, row: int) -> None:
    """Give the root an alignment that aligns this alias too."""
    root, asked = table.root[row], table.alignment[row]
    if table.shift[row] % asked:
        raise PlanError(
            f"node {table.nodes[row]!r} asks for an alignment of {asked} bytes and starts "
            f"{table.shift[row]} bytes into {table.nodes[root]!r}; no offset aligns both"
        )
    table.alignment[root] = max(table.alignment[root], asked)


def _pin(table: Table, row: int) -> None:
    """Pin the root where the pin of an alias puts it."""
    root = table.root[row]
    start = int(table.pin[row] - table.shift[row])
    if start < 0:
        raise PlanError(
            f"node {table.nodes[row]!r} is pinned to {table.pin[row]}, and lies {table.shift[row]} "
            f"bytes into {table.nodes[root]!r}, which would start below 0"
        )
    if table.pin[root] not in (-1, start):
        raise PlanError(
            f"node {table.nodes[row]!r} is pinned to {table.pin[row]}, {table.shift[row]} bytes "
            f"into {table.nodes[root]!r}, which would start at {start} and is pinned to "
            f"{table.pin[root]}"
        )
    table.pin[root] = start
