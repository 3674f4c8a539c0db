"""`Interval`: how many bytes a node of a program needs, and from when to when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Hashable

    import numpy as np

__all__ = ["WHOLE_RUN", "Interval", "Kind"]

Kind = Literal["intermediate", "input", "output", "constant"]

WHOLE_RUN: frozenset[str] = frozenset({"input", "output", "constant"})
"""Kinds of nodes that keep their slot from the first step of a program to the last."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The memory that one node of a program needs, and the steps over which it needs it.

    `rlx_driver.plan_memory` checks what is said here, all nodes together.

    Parameters
    ----------
    node
        Names the node: anything hashable, once in a plan.
    size
        Bytes; 0 for a node that has no elements.
    first, last
        First and last step at which the node is used, both inclusive, as in RLX.
    dtype, shape
        What the slot holds, so that an arena can give it as an array; left out, it is bytes.
    alias_of
        A node whose memory this one sees too (a reshape or a slice of it). The two share the
        root's slot, and the root lives until the last of its aliases does.
    alias_offset
        Bytes from the start of `alias_of` to the start of this node.
    offset
        Pins the slot to this offset in the arena, in bytes.
    alignment
        Alignment of this slot in bytes, a power of two; left out, that of the plan.
    kind
        Inputs, outputs and constants live for the whole run, whatever `first` and `last` say.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> rlx.Interval("x", 4096, 0, 3)
    Interval('x', 4096, 0, 3)
    >>> rlx.Interval("w", 4096, 0, 0, kind="constant")
    Interval('w', 4096, 0, 0, kind='constant')
    """

    node: Hashable
    size: int
    first: int
    last: int
    dtype: np.dtype[np.generic] | str | None = None
    shape: tuple[int, ...] | None = None
    alias_of: Hashable | None = None
    alias_offset: int = 0
    offset: int | None = None
    alignment: int | None = None
    kind: Kind = "intermediate"

    @classmethod
    def half_open(cls, node: Hashable, size: int, lower: int, upper: int) -> Interval:
        """Make the interval of a node that lives over ``[lower, upper)``, as traces often say."""
        return cls(node, size, lower, upper - 1)

    @property
    def whole_run(self) -> bool:
        """Whether the node keeps its slot from the first step to the last."""
        return self.kind in WHOLE_RUN

    def __repr__(self) -> str:
        said = ", ".join(
            f"{name}={value!r}"
            for name, default in _REST.items()
            if (value := getattr(self, name)) != default
        )
        rest = f", {said}" if said else ""
        return f"Interval({self.node!r}, {self.size}, {self.first}, {self.last}{rest})"


_REST = {
    "dtype": None,
    "shape": None,
    "alias_of": None,
    "alias_offset": 0,
    "offset": None,
    "alignment": None,
    "kind": "intermediate",
}
