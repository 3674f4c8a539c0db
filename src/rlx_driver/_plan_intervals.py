"""Intervals as columns: read, checked, and aliases collapsed onto their roots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from rlx_driver import dtypes
from rlx_driver._plan_aliases import collapse
from rlx_driver.errors import DuplicateError, PlanError
from rlx_driver.interval import WHOLE_RUN, Interval, Kind

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from numpy.typing import NDArray

__all__ = ["Table", "check_alignment", "read_intervals"]

_LARGEST = 2**61  # sums and ends of what is below it fit int64
_KINDS = get_args(Kind)
_COUNTS = ("size", "first", "last")


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Intervals as columns, one row a node, in the order given.

    Attributes
    ----------
    given
        What the caller gave: intervals or tuples.
    nodes, index
        The nodes, and the row of each.
    sizes, firsts, lasts
        As given; bytes, and steps, inclusive.
    root, shift
        Row of the node whose slot it shares (its own without an alias), and the bytes from the
        start of that slot.
    start, stop
        Effective life ``[start, stop)``; right for roots.
    alignment, pin
        Bytes; right for roots; pin is -1 for a slot that may lie anywhere.
    """

    given: tuple[Any, ...]
    nodes: tuple[Hashable, ...]
    index: dict[Hashable, int]
    sizes: NDArray[np.int64]
    firsts: NDArray[np.int64]
    lasts: NDArray[np.int64]
    root: NDArray[np.int64]
    shift: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    alignment: NDArray[np.int64]
    pin: NDArray[np.int64]

    def interval(self, row: int) -> Interval:
        """Give the interval of a row; a tuple becomes one here, not before."""
        given = self.given[row]
        return given if isinstance(given, Interval) else Interval(*given)

    def slots(self) -> NDArray[np.int64]:
        """Give the rows that need memory of their own: roots that are not empty."""
        rows = np.arange(len(self.nodes))
        slots: NDArray[np.int64] = rows[(self.root == rows) & (self.sizes > 0)]
        return slots

    def spread(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the offset of every node from those of the roots."""
        laid: NDArray[np.int64] = offsets[self.root] + self.shift
        return laid


def check_alignment(alignment: object, whose: str) -> int:
    """Give an alignment as an int, or raise `PlanError`."""
    if (
        isinstance(alignment, bool)
        or not isinstance(alignment, int | np.integer)
        or not 0 < alignment < _LARGEST
        or int(alignment) & (int(alignment) - 1)
    ):
        raise PlanError(f"{whose}: the alignment is {alignment!r}; give a power of two, in bytes")
    return int(alignment)


def read_intervals(intervals: Iterable[Any], alignment: int) -> Table:
    """Read and check intervals.

    Raises
    ------
    PlanError, DuplicateError, DTypeError
        What is wrong, and with which node.
    """
    given = _rows(intervals)
    rich = _intervals_of(given)
    sizes: Sequence[Any]
    firsts: Sequence[Any]
    lasts: Sequence[Any]
    if rich is None:
        nodes, sizes, firsts, lasts = zip(*given, strict=True) if given else ((), (), (), ())
    else:
        nodes = tuple([each.node for each in rich])
        sizes, firsts, lasts = ([getattr(each, name) for each in rich] for name in _COUNTS)
    index = _index(nodes)
    size = _integers("size", sizes, nodes)
    first = _integers("first step", firsts, nodes)
    last = _integers("last step", lasts, nodes)
    _refuse(nodes, size < 0, lambda row: f"its size is {size[row]} bytes; sizes are 0 or more")
    _refuse(
        nodes,
        last < first,
        lambda row: (
            f"it is last used at step {last[row]}, before its first use at step {first[row]}; "
            "first and last are both inclusive"
        ),
    )
    if size.sum(dtype=float) >= _LARGEST:
        raise PlanError("the sizes add up to 2**61 bytes or more; are they in bytes?")

    count = len(nodes)
    table = Table(
        given,
        nodes,
        index,
        size,
        first,
        last,
        root=np.arange(count),
        shift=np.zeros(count, np.int64),
        start=first.copy(),
        stop=last + 1,
        alignment=np.full(count, alignment, np.int64),
        pin=np.full(count, -1, np.int64),
    )
    if rich is not None:
        _read_extras(table, rich)
    if (table.sizes + table.alignment.astype(float)).sum() >= _LARGEST:
        raise PlanError("sizes rounded up to their alignments add up to 2**61 bytes or more")
    for array in (size, first, last):
        array.flags.writeable = False
    return table


def _rows(intervals: Iterable[Any]) -> tuple[Any, ...]:
    try:
        return tuple(intervals)
    except TypeError:
        raise PlanError(
            f"plan_memory takes intervals, not {type(intervals).__name__}; "
            "give an iterable of Interval or of (node, size, first, last)"
        ) from None


def _intervals_of(given: tuple[Any, ...]) -> Sequence[Interval] | None:
    """Give all rows as intervals, or None if all are tuples and stay so."""
    kinds = set(map(type, given))
    if kinds == {Interval}:
        return given
    for row, each in enumerate(given) if kinds - {tuple, Interval} else ():
        if not isinstance(each, tuple | Interval):
            raise PlanError(
                f"interval {row} is {each!r}; give an Interval or (node, size, first, last)"
            )
    plain = [each for each in given if isinstance(each, tuple)] if len(kinds) > 1 else given
    if set(map(len, plain)) - {4}:
        each = next(each for each in plain if len(each) != 4)
        raise PlanError(
            f"{each!r} is no interval; a tuple is (node, size, first, last), and an Interval "
            "says the rest"
        )
    if len(plain) == len(given):
        return None
    return [each if isinstance(each, Interval) else Interval(*each) for each in given]


def _index(nodes: tuple[Hashable, ...]) -> dict[Hashable, int]:
    try:
        index = dict(zip(nodes, range(len(nodes)), strict=True))
    except TypeError:
        for node in nodes:
            try:
                hash(node)
            except TypeError:
                raise PlanError(
                    f"{node!r} cannot name a node, because it is not hashable; give a str or an int"
                ) from None
        raise
    if len(index) != len(nodes):
        row = next(row for row, node in enumerate(nodes) if index[node] != row)
        raise DuplicateError(
            f"node {nodes[row]!r} stands in the plan more than once (rows {row} and "
            f"{index[nodes[row]]}); give each node one interval"
        )
    return index


def _integers(what: str, column: Sequence[Any], nodes: Sequence[Any]) -> NDArray[np.int64]:
    if set(map(type, column)) - {int}:  # rare: numpy integers, or something that is none
        for node, value in zip(nodes, column, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise PlanError(f"node {node!r}: its {what} is {value!r}; give an integer")
    if column and not -_LARGEST < min(column) <= max(column) < _LARGEST:
        for node, value in zip(nodes, column, strict=True):
            if not -_LARGEST < value < _LARGEST:
                raise PlanError(f"node {node!r}: its {what} is {value}, beyond 2**61")
    return np.array(column, np.int64)


def _refuse(nodes: Sequence[Any], bad: NDArray[np.bool_], why: Any) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise PlanError(f"node {nodes[row]!r}: {why(row)}")


def _read_extras(table: Table, rich: Sequence[Interval]) -> None:
    """Read what an Interval says beyond a tuple; most say nothing of it."""
    dtype = [each.dtype for each in rich]
    shape = [each.shape for each in rich]
    alias_of = [each.alias_of for each in rich]
    alias_offset = [each.alias_offset for each in rich]
    offset = [each.offset for each in rich]
    alignment = [each.alignment for each in rich]
    kind = [each.kind for each in rich]
    if _said(dtype) or _said(shape):
        _check_contents(table, dtype, shape)
    if kind.count("intermediate") != len(kind):
        _whole_run(table, kind)
    if _said(alignment):
        for row, value in enumerate(alignment):
            if value is not None:
                table.alignment[row] = check_alignment(value, f"node {table.nodes[row]!r}")
    if _said(offset):
        for row, value in enumerate(offset):
            if value is not None:
                table.pin[row] = _pin(table.nodes[row], value)
    if _said(alias_of) or alias_offset.count(0) != len(alias_offset):
        shift = _integers("alias_offset", alias_offset, table.nodes)
        collapse(table, alias_of, shift, [value is not None for value in alignment])
    misaligned = (table.pin > 0) & (table.pin % table.alignment != 0)
    _refuse(
        table.nodes,
        misaligned & (table.root == np.arange(len(table.nodes))),
        lambda row: (
            f"it is pinned to offset {table.pin[row]}, which is no multiple of its alignment, "
            f"{table.alignment[row]} bytes"
        ),
    )


def _said(column: list[Any]) -> bool:
    return set(map(type, column)) != {type(None)}


def _pin(node: Hashable, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise PlanError(f"node {node!r}: its pinned offset is {value!r}; give an integer, in bytes")
    if not 0 <= value < _LARGEST:
        raise PlanError(f"node {node!r}: it is pinned to offset {value}; offsets start at 0")
    return int(value)


def _whole_run(table: Table, kinds: Sequence[Any]) -> None:
    for node, kind in zip(table.nodes, kinds, strict=True):
        if kind not in _KINDS:
            raise PlanError(f"node {node!r}: its kind is {kind!r}; give one of {', '.join(_KINDS)}")
    whole = np.fromiter((kind in WHOLE_RUN for kind in kinds), bool, len(kinds))
    table.start[whole] = table.firsts.min()
    table.stop[whole] = table.lasts.max() + 1


def _check_contents(table: Table, kinds: Sequence[Any], shapes: Sequence[Any]) -> None:
    needs: dict[tuple[Any, Any], int] = {}
    for row, (kind, shape) in enumerate(zip(kinds, shapes, strict=True)):
        if kind is None and shape is None:
            continue
        node = table.nodes[row]
        try:
            need = needs[kind, shape]
        except (KeyError, TypeError):
            need = _bytes_of(node, kind, shape)
            if shape is None or isinstance(shape, tuple):
                needs[kind, shape] = need
        if need > table.sizes[row]:
            raise PlanError(
                f"node {node!r}: shape {shape} of {kind or 'bytes'} needs {need} bytes, and its "
                f"size is {table.sizes[row]}"
            )


def _bytes_of(node: Hashable, kind: Any, shape: Any) -> int:
    size = 1 if kind is None else dtypes.dtype(kind).itemsize
    if shape is None:
        return 0
    if not isinstance(shape, tuple) or not all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 0 for n in shape
    ):
        raise PlanError(f"node {node!r}: its shape is {shape!r}; give a tuple of lengths")
    return int(size * math.prod(map(int, shape)))
