"""Which slots of a plan can reuse each other's bytes, by way of others or not."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rlx_driver.plan import MemoryPlan

__all__ = ["disjoint_blocks", "name_of"]


def disjoint_blocks(plan: MemoryPlan) -> tuple[list[int], list[int], list[int]]:
    """Cut an arena where no slot lies across: starts, ends (bytes, ascending), and of whom.

    The last is the index of the node that has a block alone, or -1. There is at least one block.
    """
    sizes, offsets = plan.sizes, plan.offsets
    taken = np.flatnonzero(sizes)
    if not taken.size:
        return [0], [0], [-1]
    order = taken[np.argsort(offsets[taken], kind="stable")]
    starts = offsets[order]
    reach = np.maximum.accumulate(starts + sizes[order])
    first = np.flatnonzero(np.concatenate(([True], starts[1:] >= reach[:-1])))
    ends = reach[np.append(first[1:], starts.size) - 1]
    alone = np.diff(np.append(first, starts.size)) == 1
    return starts[first].tolist(), ends.tolist(), np.where(alone, order[first], -1).tolist()


def name_of(node: Any) -> str:
    """Give a short text for a node, whatever its own ``repr`` does."""
    try:
        return reprlib.repr(node)
    except Exception:
        return f"<{type(node).__qualname__}>"
