"""A picture of a plan: a rectangle for each slot, offsets over steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._plan_report import amount
from rlx_driver.errors import MissingPackageError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from rlx_driver._plan_intervals import Table
    from rlx_driver._plan_slots import Slots
    from rlx_driver.memory_plan import MemoryPlan

__all__ = ["draw"]

_INK = "#333333"
_MARK = "#c0392b"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_OUTLINED = 400  # slots; the outlines of more would hide the colours
_PAINTED = 5000  # slots; more are painted as pixels in PDF and SVG too


def draw(plan: MemoryPlan, table: Table, slots: Slots, path: str | os.PathLike[str]) -> None:
    """Draw a plan into a file; `MemoryPlan.plot`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "plot needs matplotlib, which is not installed; pip install rlx-driver[viz]"
        ) from error
    # A figure of its own, so that neither pyplot's state nor its backend is touched.
    figure = Figure(figsize=(10, 5.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    power = _power(plan.size)
    scale = float(1024**power)
    if len(slots):
        _slots(figure, axes, plan, table, slots, scale)
    _marks(axes, plan, scale)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x == round(x) else "")
    axes.set_ylabel(f"offset ({_UNITS[power]})")
    how = "optimal" if plan.optimal else f"{plan.ratio:.4f} of the lower bound"
    axes.set_title(
        f"{len(slots):,} slots in {amount(plan.size)}, {how}", loc="left", color=_INK, pad=18
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def _power(size: int) -> int:
    power = 0
    while power < len(_UNITS) - 1 and size >= 4 * 1024 ** (power + 1):
        power += 1
    return power


def _slots(
    figure: Any, axes: Any, plan: MemoryPlan, table: Table, slots: Slots, scale: float
) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator

    left, right = table.start[slots.rows], table.stop[slots.rows]
    low = plan.offsets[slots.rows] / scale
    corners = _corners(left, right, low, low + slots.size / scale)
    smallest, largest = int(slots.size.min()), int(slots.size.max())
    # What is tiny shares the palest colour, so that the others tell apart.
    norm = LogNorm(max(smallest, largest >> 16, 1), max(largest, smallest + 1), clip=True)
    outlined = len(slots) <= _OUTLINED
    boxes = PolyCollection(
        list(corners),
        array=slots.size.astype(float),
        norm=norm,
        cmap="YlGnBu",
        edgecolors="white" if outlined else "face",
        linewidths=0.3 if outlined else 0.1,
        rasterized=len(slots) > _PAINTED,
    )
    axes.add_collection(boxes)
    bar = figure.colorbar(boxes, ax=axes, pad=0.015, aspect=32)
    bar.ax.yaxis.set_major_locator(LogLocator(base=4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: amount(round(x))))
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    bar.set_label("size of the slot", color=_INK)
    axes.set_xlim(int(left.min()), int(right.max()))


def _corners(
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> NDArray[np.float64]:
    x = np.stack([left, right, right, left], axis=1)
    y = np.stack([low, low, high, high], axis=1)
    return np.stack([x.astype(float), y], axis=2)


def _marks(axes: Any, plan: MemoryPlan, scale: float) -> None:
    axes.set_ylim(0, max(plan.size, 1) / scale * 1.02)
    bound = plan.lower_bound / scale
    axes.axhline(bound, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        f"lower bound {amount(plan.lower_bound)}",
        (0, bound),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=8,
        color=_INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        annotation_clip=False,
    )
    if plan.peak_step is None:
        return
    axes.axvline(plan.peak_step + 0.5, color=_MARK, linewidth=1)
    left, right = axes.get_xlim()
    middle = plan.peak_step > (left + right) / 2
    axes.annotate(
        f"peak at step {plan.peak_step}",
        (plan.peak_step + 0.5, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if middle else 4, 4),
        textcoords="offset points",
        ha="right" if middle else "left",
        fontsize=8,
        color=_MARK,
        annotation_clip=False,
    )
