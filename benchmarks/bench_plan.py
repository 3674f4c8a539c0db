"""Planners side by side: size over the lower bound, and the time of one plan, for each trace.

Every planner gets the same lives, and sizes rounded up to 64 bytes (tinygrad's: to 256, as it
does itself). What is said of a plan is computed here from its offsets.
"""

from __future__ import annotations

import csv
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import omnimalloc
from omnimalloc.allocators import OmniAllocator
from tinygrad.runtime.support.memory import TLSFAllocator

import rlx_driver as rlx
from benchmarks.harness import Score

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Trace = list[tuple[int, int, int, int]]

TRACES = Path(__file__).parent / "data" / "planner"
CAPACITY = 1_048_576
GRAIN = 64
OURS = "ours"
REPEAT = 5
SLOW = 20_000  # buffers; above that the others take too long, or refuse


def run() -> list[Score]:
    scores = []
    traces = {path.stem: load(path) for path in sorted(TRACES.glob("*.csv"))}
    for layers in (700, 7_000):
        trace = training(layers)
        traces[f"synthetic training, {len(trace):,}"] = trace
    for name, trace in traces.items():
        scores += compare(name, trace)
    return scores


def compare(name: str, trace: Trace) -> list[Score]:
    """Score every planner on one trace."""
    hard = name.startswith("minimalloc")
    planners: dict[str, Callable[[Trace], NDArray[np.int64]]] = {OURS: ours}
    if hard:
        planners["ours, 1 s"] = lambda trace: ours(trace, time_limit=1.0)
        planners["ours, exact"] = lambda trace: ours(trace, exact=True, capacity=CAPACITY)
    planners["tinygrad TLSF"] = tlsf
    if len(trace) <= SLOW:
        planners["greedy by size"] = greedy_by_size
        planners["omnimalloc portfolio"] = portfolio
    bound = rlx.plan_memory(trace, alignment=GRAIN).lower_bound
    return [score(name, trace, bound, *each) for each in planners.items()]


def score(
    name: str,
    trace: Trace,
    bound: int,
    planner: str,
    plan: Callable[[Trace], NDArray[np.int64]],
) -> Score:
    best = float("inf")
    for _ in range(REPEAT if planner == OURS else 1):
        gc.collect()
        start = time.perf_counter()
        offsets = plan(trace)
        best = min(best, time.perf_counter() - start)
    check(trace, offsets)
    size = max(int(offset) + each[1] for offset, each in zip(offsets, trace, strict=True))
    ratio_target, time_target = targets(name, len(trace), planner, bound)
    return Score(name, planner, len(trace), size, bound, best, ratio_target, time_target)


def targets(name: str, count: int, planner: str, bound: int) -> tuple[float | None, float | None]:
    """Give the bounds on the ratio and on the seconds; None where there is none."""
    if name.startswith("minimalloc"):
        reached = planner == "ours, exact" and not name.endswith("D")
        return (CAPACITY / bound, 3.0) if reached else (None, None)
    if planner != OURS:
        return None, None
    return (1.005, 0.05) if count <= 10_000 else (1.01, 1.0)


def check(trace: Trace, offsets: NDArray[np.int64]) -> None:
    """Refuse a plan in which two share memory; another's plan passes our validator too."""
    given = {each[0]: int(offset) for each, offset in zip(trace, offsets, strict=True)}
    rlx.MemoryPlan.from_offsets(trace, given, alignment=1)


def ours(trace: Trace, **options: object) -> NDArray[np.int64]:
    return rlx.plan_memory(trace, alignment=GRAIN, **options).offsets


def greedy_by_size(trace: Trace) -> NDArray[np.int64]:
    """Lay the largest first, each into the smallest gap that holds it (TFLite, XLA, RLX)."""
    size = rounded(trace, GRAIN)
    first, last = column(trace, 2), column(trace, 3)
    low = np.zeros(len(trace), np.int64)
    high = np.zeros(len(trace), np.int64)
    laid: list[int] = []
    for each in np.argsort(-size, kind="stable").tolist():
        done = np.array(laid, np.int64)
        meets = done[(first[done] <= last[each]) & (last[done] >= first[each])]
        meets = meets[np.argsort(low[meets], kind="stable")]
        ends = np.maximum.accumulate(np.concatenate([[0], high[meets]]))
        gaps = low[meets] - ends[:-1]
        fits = np.flatnonzero(gaps >= size[each])
        low[each] = ends[fits[gaps[fits].argmin()]] if len(fits) else ends[-1]
        high[each] = low[each] + size[each]
        laid.append(each)
    return low


def portfolio(trace: Trace) -> NDArray[np.int64]:
    size = rounded(trace, GRAIN).tolist()
    given = tuple(
        omnimalloc.Allocation(id=row, size=bytes_, start=first, end=last + 1)
        for row, (bytes_, (_, _, first, last)) in enumerate(zip(size, trace, strict=True))
    )
    offsets = np.zeros(len(trace), np.int64)
    for each in OmniAllocator().allocate(given):
        offsets[each.id] = each.offset
    return offsets


def tlsf(trace: Trace) -> NDArray[np.int64]:
    """Allocate and free in the order of time with the allocator that tinygrad's planner uses."""
    size = rounded(trace, 256)
    heap = TLSFAllocator(2 * int(size.sum()), block_size=256, lv2_cnt=32)
    # What ends before a step is freed before what starts at it.
    events = sorted(
        [(each[2], 1, row) for row, each in enumerate(trace)]
        + [(each[3] + 1, 0, row) for row, each in enumerate(trace)]
    )
    offsets = np.zeros(len(trace), np.int64)
    for _, opens, row in events:
        if opens:
            offsets[row] = heap.alloc(int(size[row]))
        else:
            heap.free(int(offsets[row]))
    return offsets


def column(trace: Trace, which: int) -> NDArray[np.int64]:
    return np.array([each[which] for each in trace], np.int64)


def rounded(trace: Trace, grain: int) -> NDArray[np.int64]:
    return -(-column(trace, 1) // grain) * grain


def load(path: Path) -> Trace:
    with path.open() as file:
        return [
            (int(row["id"]), int(row["size"]), int(row["lower"]), int(row["upper"]) - 1)
            for row in csv.DictReader(file)
        ]


def training(layers: int) -> Trace:
    """Make up the buffers of a forward and a backward pass.

    Of each layer a few are kept for the backward pass, which frees them in the opposite order and
    leaves gradients behind; in between come temporaries.
    """
    random = np.random.default_rng(layers)
    steps = 14 * layers
    buffers: list[tuple[int, int, int]] = []
    for layer in range(layers):
        for each in range(7):
            at = 7 * layer + each
            size = int(random.choice([4, 512, 4_096, 131_072, 524_288]))
            end = steps - at
            if each % 2 == 0:
                buffers.append((size, at, end))
            buffers.append((size, at, at + int(random.integers(1, 4))))
            buffers.append((size, end, end + int(random.integers(1, 4))))
        buffers.append((65_536, steps - 7 * layer, steps + 3))
    return [(row, *each) for row, each in enumerate(buffers)]
