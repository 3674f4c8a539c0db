"""What every benchmark shares: timing side by side, a row of results, and the report."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("rlx-driver", "numpy", "ml_dtypes", "torch", "jax", "jaxlib")
PLANNERS = ("numpy", "omnimalloc", "tinygrad")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes
    ----------
    name
        What is compared.
    ours, theirs
        Seconds each, or bytes for memory.
    against
        What a user would do instead.
    ratio
        ``ours / theirs``, or the other way round where `faster` is set.
    target
        The bound on the ratio, or on `ours` where `absolute` says so; None for information.
    faster
        The ratio is how many times faster we are, and the target is a lower bound.
    absolute
        The target bounds `ours` in seconds.
    unit
        "s" or "B".
    """

    name: str
    ours: float
    against: str
    theirs: float
    target: float | None = None
    faster: bool = False
    absolute: bool = False
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """How we compare."""
        return self.theirs / self.ours if self.faster else self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        if self.absolute:
            return self.ours <= self.target
        return self.ratio >= self.target if self.faster else self.ratio <= self.target


@dataclass(frozen=True)
class Score:
    """One plan of one trace by one planner.

    Attributes
    ----------
    name, planner
        The trace, and who planned it.
    buffers
        How many the trace has.
    size, bound
        Bytes of the plan, and of the lower bound.
    seconds
        Time of one plan.
    ratio_target, time_target
        Bounds on the ratio and on the seconds; None for information.
    """

    name: str
    planner: str
    buffers: int
    size: int
    bound: int
    seconds: float
    ratio_target: float | None = None
    time_target: float | None = None

    @property
    def ratio(self) -> float:
        """Size over lower bound."""
        return self.size / self.bound

    @property
    def met(self) -> bool | None:
        """Whether both targets are met; None without any."""
        if self.ratio_target is None or self.time_target is None:
            return None
        return self.ratio <= self.ratio_target and self.seconds <= self.time_target


def best_of(
    *functions: Callable[[], object], number: int, repeat: int = 9, warmup: int = 2
) -> list[float]:
    """Time functions in turns and give the best time of one call of each, in seconds.

    Turns share the machine's moods; the best is what the code costs without them.
    """
    best = [float("inf")] * len(functions)
    for turn in range(warmup + repeat):
        for position, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(number):
                function()
            spent = (time.perf_counter() - start) / number
            if turn >= warmup:
                best[position] = min(best[position], spent)
    return best


def machine(device: str) -> dict[str, str]:
    """Say where and with what a run was made."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": "cpu" if device == "plan" else device,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    for package in PLANNERS if device == "plan" else PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.startswith("cuda"):
        import torch

        facts["device"] = torch.cuda.get_device_name(0)
    return facts


def report(label: str, rows: list[Row] | list[Score], facts: dict[str, str], folder: Path) -> str:
    """Write ``label.json`` and ``label.md``, and give the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    data = [asdict(row) | {"ratio": row.ratio, "met": row.met} for row in rows]
    (folder / f"{label}.json").write_text(
        json.dumps({"machine": facts, "rows": data}, indent=1) + "\n"
    )
    measured = ", ".join(f"{key} {value}" for key, value in facts.items())
    scores = [row for row in rows if isinstance(row, Score)]
    table = _scores(scores) if scores else _table([row for row in rows if isinstance(row, Row)])
    text = f"Measured {measured}.\n\n{table}\n"
    (folder / f"{label}.md").write_text(text)
    return text


def _table(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        ratio = f"{row.ratio:,.0f} x faster" if row.faster else f"{row.ratio:.2f}"
        met = {None: "", True: "yes", False: "**no**"}[row.met]
        ours, theirs = _amount(row.ours, row.unit), _amount(row.theirs, row.unit)
        cells.append([row.name, ours, row.against, theirs, ratio, _target(row), met])
    headers = ["what", "ours", "against", "theirs", "ratio", "target", "met"]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def _scores(scores: list[Score]) -> str:
    """Give a line for each trace, and in it ratio and time of each planner."""
    planners = list(dict.fromkeys(score.planner for score in scores))
    cells = []
    for name in dict.fromkeys(score.name for score in scores):
        these = {score.planner: score for score in scores if score.name == name}
        found = [these.get(planner) for planner in planners]
        met = {score.met for score in these.values()} - {None}
        cells.append(
            [
                name,
                f"{next(iter(these.values())).buffers:,}",
                *("" if each is None else _score(each) for each in found),
                "**no**" if False in met else "yes" if met else "",
            ]
        )
    headers = ["trace", "buffers", *planners, "met"]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def _score(score: Score) -> str:
    return f"{score.ratio:.4f}, {_amount(score.seconds, 's')}"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    if row.absolute:
        return f"<= {_amount(row.target, row.unit)}"
    return f">= {row.target:g} x" if row.faster else f"<= {row.target:g}"


def _amount(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 2**20:,.1f} MiB"
    for scale, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value * 1e9:.0f} ns"
