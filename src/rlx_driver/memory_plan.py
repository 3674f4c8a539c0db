"""`MemoryPlan`: an offset in one arena for every node of a program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from rlx_driver._plan_check import validate
from rlx_driver._plan_intervals import Table, check_alignment, read_intervals
from rlx_driver._plan_report import report_text
from rlx_driver._plan_slots import Slots, make_slots
from rlx_driver.errors import PlanError, UnboundNameError

if TYPE_CHECKING:
    import os
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from rlx_driver.interval import Interval

__all__ = ["MemoryPlan"]


class MemoryPlan:
    """Where each node of a program lies in one arena; immutable.

    Made by `plan_memory`, or by `from_offsets` from offsets that someone else found. Every plan
    has passed `validate`.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> plan = rlx.plan_memory([("a", 128, 0, 1), ("b", 64, 1, 2), ("c", 128, 2, 3)])
    >>> plan
    MemoryPlan(3 nodes, 192 bytes, optimal)
    >>> plan.offset("a") == plan.offset("c")
    True
    """

    __slots__ = (
        "_alignment",
        "_capacity",
        "_found_by",
        "_offsets",
        "_proven",
        "_size",
        "_slots",
        "_table",
    )

    _table: Table
    _slots: Slots
    _offsets: NDArray[np.int64]
    _size: int
    _alignment: int
    _capacity: int | None
    _found_by: str
    _proven: bool

    def __init__(self) -> None:
        raise TypeError("a MemoryPlan comes from plan_memory or MemoryPlan.from_offsets")

    @classmethod
    def _make(
        cls,
        table: Table,
        slots: Slots,
        offsets: NDArray[np.int64],
        alignment: int,
        found_by: str,
        capacity: int | None = None,
        proven: bool = False,
    ) -> MemoryPlan:
        validate(table, offsets)
        offsets.flags.writeable = False
        plan = object.__new__(cls)
        ends = (offsets + table.sizes)[table.sizes > 0]
        for name, value in (
            ("_table", table),
            ("_slots", slots),
            ("_offsets", offsets),
            ("_size", int(ends.max(initial=0))),
            ("_alignment", alignment),
            ("_capacity", capacity),
            ("_found_by", found_by),
            ("_proven", proven),
        ):
            object.__setattr__(plan, name, value)
        return plan

    @classmethod
    def from_offsets(
        cls,
        intervals: Iterable[Interval | tuple[Hashable, int, int, int]],
        offsets: Mapping[Any, int],
        *,
        alignment: int = 64,
    ) -> MemoryPlan:
        """Make a plan of offsets that someone else found, or that were kept in a file.

        Parameters
        ----------
        intervals
            As in `plan_memory`.
        offsets
            Bytes from the start of the arena, for every node. Aliases and nodes of size 0 may be
            left out.
        alignment
            As in `plan_memory`.

        Returns
        -------
        MemoryPlan
            Checked.

        Raises
        ------
        PlanError
            The intervals make no sense, or the offsets break an alignment, a pin or an alias, or
            let two nodes share memory while both are alive. It names them.
        DuplicateError
            A node stands in the plan twice.
        UnboundNameError
            A node has no offset, or an offset has no node.
        """
        alignment = check_alignment(alignment, "the plan")
        table = read_intervals(intervals, alignment)
        found = np.zeros(len(table.nodes), np.int64)
        for node in offsets:
            if node not in table.index:
                raise UnboundNameError(f"offsets has {node!r}, which is none of the intervals")
        said = []
        for row, node in enumerate(table.nodes):
            if node in offsets:
                value = offsets[node]
                if isinstance(value, bool) or not isinstance(value, int | np.integer):
                    raise PlanError(f"node {node!r}: its offset is {value!r}; give an integer")
                if not 0 <= value < 2**61:
                    raise PlanError(f"node {node!r}: its offset is {value}; give 0 or more bytes")
                found[row] = value
                said.append(row)
            elif table.root[row] == row and table.sizes[row] > 0:
                raise UnboundNameError(f"offsets has nothing for node {node!r}")
            elif table.root[row] == row:
                found[row] = max(0, int(table.pin[row]))
        laid = table.spread(found)
        laid[said] = found[said]
        return cls._make(table, make_slots(table), laid, alignment, "offsets given")

    # facts of the whole

    @property
    def size(self) -> int:
        """Bytes of the arena: the highest end of a slot."""
        return self._size

    @property
    def lower_bound(self) -> int:
        """Bytes that no plan of these intervals and alignments can do without."""
        return self._slots.bound

    @property
    def ratio(self) -> float:
        """`size` / `lower_bound`; 1.0 when both are 0."""
        return self._size / self._slots.bound if self._slots.bound else 1.0

    @property
    def optimal(self) -> bool:
        """Whether the size is proven to be the smallest there is.

        By the lower bound; with ``exact=True`` also by omnimalloc, whose proof is taken as it is.
        """
        return self._proven or self._size <= self._slots.bound

    @property
    def alignment(self) -> int:
        """Alignment of the slots that ask for none of their own, in bytes."""
        return self._alignment

    @property
    def widest_alignment(self) -> int:
        """The largest alignment of a slot, in bytes: what the start of the arena needs."""
        return int(self._table.alignment.max(initial=self._alignment))

    @property
    def capacity(self) -> int | None:
        """The capacity asked for, in bytes."""
        return self._capacity

    @property
    def peak_step(self) -> int | None:
        """A step at which the lower bound is needed; None for an empty plan."""
        return int(self._slots.steps[self._slots.peak]) if len(self._slots) else None

    # nodes

    @property
    def nodes(self) -> tuple[Hashable, ...]:
        """All nodes, in the order given."""
        return self._table.nodes

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Bytes from the start of the arena, in the order of `nodes`; read-only."""
        return self._offsets

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of the nodes themselves, in the order of `nodes`; read-only."""
        return self._table.sizes

    @property
    def firsts(self) -> NDArray[np.int64]:
        """First steps as given, inclusive, in the order of `nodes`; read-only."""
        return self._table.firsts

    @property
    def lasts(self) -> NDArray[np.int64]:
        """Last steps as given, inclusive, in the order of `nodes`; read-only."""
        return self._table.lasts

    def offset(self, node: Hashable) -> int:
        """Bytes from the start of the arena to the node; 0 for a node of size 0.

        Raises
        ------
        UnboundNameError
            The plan has no such node.
        """
        return int(self._offsets[self._row(node)])

    def interval(self, node: Hashable) -> Interval:
        """Give the node's interval, as it was given; a tuple as an `Interval`.

        Raises
        ------
        UnboundNameError
            The plan has no such node.
        """
        return self._table.interval(self._row(node))

    def root(self, node: Hashable) -> Hashable:
        """Give the node whose slot this one shares; itself if it is no alias.

        Raises
        ------
        UnboundNameError
            The plan has no such node.
        """
        return self._table.nodes[int(self._table.root[self._row(node)])]

    def life(self, node: Hashable) -> tuple[int, int]:
        """Give the first and last step of the slot that the node lies in, both inclusive.

        That is the life of the root, its aliases counted in; of inputs, outputs and constants
        the whole run.

        Raises
        ------
        UnboundNameError
            The plan has no such node.
        """
        root = self._table.root[self._row(node)]
        return int(self._table.start[root]), int(self._table.stop[root]) - 1

    def alive_at(self, step: int) -> list[Hashable]:
        """Give the roots alive at a step, in the order of `nodes`; empty ones too."""
        table = self._table
        roots = table.root == np.arange(len(table.nodes))
        alive = roots & (table.start <= step) & (step < table.stop)
        return [table.nodes[row] for row in np.flatnonzero(alive)]

    def _row(self, node: Hashable) -> int:
        try:
            return self._table.index[node]
        except (KeyError, TypeError):
            raise UnboundNameError(
                f"the plan has no node {node!r}; it has {len(self)} others"
            ) from None

    def __contains__(self, node: object) -> bool:
        try:
            return node in self._table.index
        except TypeError:
            return False

    def __len__(self) -> int:
        return len(self._table.nodes)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._table.nodes)

    # what to do with it

    def validate(self) -> None:
        """Check the plan once more: O(n log n).

        Raises
        ------
        PlanError
            Names two nodes that share memory while both are alive, with offsets and lives.
        """
        validate(self._table, self._offsets)

    def report(self) -> str:
        """Say in text how large the plan is, how good, and what lies in it at the peak."""
        return report_text(self, self._table, self._slots, self._found_by)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw offsets over time, the peak marked, into a PNG, PDF or SVG file.

        Needs matplotlib: ``pip install rlx-driver[viz]``.

        Parameters
        ----------
        path
            The file; its suffix says the format.

        Raises
        ------
        MissingPackageError
            matplotlib is not installed.
        """
        from rlx_driver._plan_plot import draw

        draw(self, self._table, self._slots, path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _checked_again, (
            self._table.given,
            self._offsets,
            self._alignment,
            self._found_by,
            self._capacity,
            self._proven,
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a MemoryPlan cannot be changed; {name!r} was to be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a MemoryPlan cannot be changed; {name!r} was to be deleted")

    def __repr__(self) -> str:
        how = "optimal" if self.optimal else f"{self.ratio:.4f} of the lower bound"
        return f"MemoryPlan({len(self)} nodes, {self.size} bytes, {how})"


def _checked_again(
    given: tuple[Any, ...],
    offsets: NDArray[np.int64],
    alignment: int,
    found_by: str,
    capacity: int | None,
    proven: bool,
) -> MemoryPlan:
    """Make a plan from what was pickled, by the same check as a new one."""
    table = read_intervals(given, alignment)
    slots = make_slots(table)
    return MemoryPlan._make(table, slots, offsets, alignment, found_by, capacity, proven)
