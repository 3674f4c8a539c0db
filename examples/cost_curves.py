"""Cost curves of several training runs, side by side: a table of them and a picture.

`train_across_frameworks.py` compares its runs with these. The first run in a dictionary is the one
in question, and ``"torch alone"`` is what all are compared with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

REFERENCE = "torch alone"


def difference(costs: Sequence[float], reference: Sequence[float]) -> np.ndarray:
    """Give by how much each cost differs, in relation to the reference."""
    return np.abs(np.array(costs) / np.array(reference) - 1)


def cost_table(curves: dict[str, list[float]], phases: Sequence[str]) -> Table:
    """Show mean costs by phase for each run, and the largest difference of a step from torch's."""
    table = Table(title="Mean cost in nats a token, and the largest relative difference of a step")
    table.add_column("run")
    steps = len(curves[REFERENCE]) // len(phases)
    for number, framework in enumerate(phases):
        first = number * steps
        table.add_column(f"steps {first + 1}-{first + steps}\n({framework} in the first row)")
    for name, costs in curves.items():
        cells = []
        for number in range(len(phases)):
            part = slice(number * steps, (number + 1) * steps)
            worst = difference(costs, curves[REFERENCE])[part].max()
            cells.append(f"{np.mean(costs[part]):.5f}  {worst:.1e}")
        table.add_row(name, *cells)
    return table


def plot(path: str, curves: dict[str, list[float]], phases: int, tolerance: float) -> None:
    """Draw the costs of all runs, and below how far each is from torch's."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
    x = np.arange(1, len(curves[REFERENCE]) + 1)
    for i, ((name, costs), style) in enumerate(
        zip(curves.items(), ("-", "--", ":", "-."), strict=True)
    ):
        top.plot(x, costs, style, color=f"C{i}", label=name)
        if name != REFERENCE:
            apart = np.maximum(difference(costs, curves[REFERENCE]), 1e-9)
            bottom.semilogy(x, apart, style, color=f"C{i}", label=name)
    bottom.axhline(tolerance, color="grey", linewidth=0.8)
    steps = len(x) // phases
    for axes in (top, bottom):
        axes.axvspan(steps + 0.5, 2 * steps + 0.5, color="grey", alpha=0.15)
        axes.legend()
    top.set(ylabel="cost (nats a token)", title="Shaded: JAX trains, on torch's memory")
    bottom.set(xlabel="step", ylabel="difference from torch alone")
    figure.savefig(path)
    plt.close(figure)
