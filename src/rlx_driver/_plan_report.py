"""Plans in words: the report, and what to read when nothing fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rlx_driver._plan_intervals import Table
    from rlx_driver._plan_slots import Slots
    from rlx_driver.memory_plan import MemoryPlan

__all__ = ["amount", "capacity_text", "peak_rows", "report_text"]

_SHOWN = 8


def amount(size: int) -> str:
    """Give bytes as a person reads them."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.4g} {unit}"


def peak_rows(table: Table, slots: Slots) -> list[int]:
    """Give the rows of the slots alive at the peak, the largest first."""
    if not len(slots):
        return []
    alive = (slots.start <= slots.peak) & (slots.stop > slots.peak)
    rows = slots.rows[alive]
    largest = np.argsort(-table.sizes[rows], kind="stable")
    return [int(row) for row in rows[largest]]


def report_text(plan: MemoryPlan, table: Table, slots: Slots, found_by: str) -> str:
    """Write `MemoryPlan.report`."""
    aliases = int((table.root != np.arange(len(table.nodes))).sum())
    empty = len(table.nodes) - aliases - len(slots)
    total = int(slots.size.sum())
    proof = ", proven to be the smallest" if plan.optimal else ""
    lines = [
        f"size         {plan.size} bytes ({amount(plan.size)})",
        f"lower bound  {plan.lower_bound} bytes ({amount(plan.lower_bound)})",
        f"ratio        {plan.ratio:.4f}{proof}",
        f"nodes        {len(plan)}: {len(slots)} slots, {aliases} aliases, {empty} empty",
        f"no reuse     {total} bytes ({amount(total)})",
        f"alignment    {plan.alignment} bytes",
        f"found by     {found_by}",
    ]
    if plan.capacity is not None:
        lines.insert(1, f"capacity     {plan.capacity} bytes ({amount(plan.capacity)})")
    if len(slots):
        lines += ["", *_peak_lines(table, slots, plan)]
    return "\n".join(lines)


def _peak_lines(table: Table, slots: Slots, plan: MemoryPlan | None = None) -> list[str]:
    rows = peak_rows(table, slots)
    total = int(table.sizes[rows].sum())
    step = int(slots.steps[slots.peak])
    lines = [f"peak at step {step}: {len(rows)} alive, {total} bytes ({amount(total)})"]
    for row in rows[:_SHOWN]:
        where = "" if plan is None else f" at {plan.offsets[row]}"
        life = f"steps {table.start[row]} to {table.stop[row] - 1}"
        lines.append(f"  {_short(table.nodes[row])}: {table.sizes[row]} bytes{where}, {life}")
    if len(rows) > _SHOWN:
        rest = int(table.sizes[rows[_SHOWN:]].sum())
        lines.append(f"  and {len(rows) - _SHOWN} more: {rest} bytes")
    return lines


def _short(node: object) -> str:
    text = repr(node)
    return text if len(text) <= 60 else f"{text[:57]}..."


def capacity_text(table: Table, slots: Slots, capacity: int, best: int) -> str:
    """Say that nothing fits, and who needs the memory."""
    if capacity < slots.bound:
        lines = [
            f"no plan fits in {capacity} bytes ({amount(capacity)}): the slots alive at the peak "
            f"need {slots.bound} bytes ({amount(slots.bound)}), {slots.bound - capacity} more, and "
            f"the best plan found has {best}; make slots smaller or lives shorter"
        ]
    else:
        lines = [
            f"no plan was found within {capacity} bytes ({amount(capacity)}): the best has {best} "
            f"bytes, the peak alone needs {slots.bound}; give time_limit= or exact=True to "
            "search on"
        ]
    return "\n".join([*lines, *_peak_lines(table, slots)])
