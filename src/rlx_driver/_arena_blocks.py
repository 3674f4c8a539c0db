"""Which slots of a plan can reuse each other's bytes, by way of others or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rlx_driver.plan import MemoryPlan

__all__ = ["disjoint_blocks"]


def disjoint_blocks(plan: MemoryPlan, label: str) -> tuple[list[int], list[int], list[str]]:
    """Cut an arena where no slot lies across: starts, ends (bytes, ascending) and names.

    A block of one node is called after it. There is at least one block.
    """
    sizes, offsets = plan.sizes, plan.offsets
    taken = np.flatnonzero(sizes)
    if not taken.size:
        return [0], [0], [label]
    order = taken[np.argsort(offsets[taken], kind="stable")]
    starts = offsets[order]
    reach = np.maximum.accumulate(starts + sizes[order])
    first = np.flatnonzero(np.concatenate(([True], starts[1:] >= reach[:-1])))
    ends = reach[np.append(first[1:], starts.size) - 1]
    members = np.diff(np.append(first, starts.size))
    names = [
        f"slot {plan.nodes[order[i]]!r} of {label}"
        if count == 1
        else f"memory at bytes {start:,} to {end:,} of {label}"
        for i, count, start, end in zip(first, members, starts[first], ends, strict=True)
    ]
    return starts[first].tolist(), ends.tolist(), names
