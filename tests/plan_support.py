"""Intervals to plan, and a brute-force search for the best plan of few of them."""

from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rlx_driver as rlx

TRACES = Path(__file__).resolve().parent.parent / "benchmarks" / "data" / "planner"


def trace(name: str) -> list[tuple[int, int, int, int]]:
    with (TRACES / f"{name}.csv").open() as file:
        return [
            (int(row["id"]), int(row["size"]), int(row["lower"]), int(row["upper"]) - 1)
            for row in csv.DictReader(file)
        ]


def smallest(intervals: list[rlx.Interval], alignment: int) -> int:
    """Give the size of the best plan there is, by trying every order of lowest fits.

    A best plan, slot by slot in the order of its offsets, is no lower than the lowest fits are.
    """
    intervals = [each for each in intervals if each.size]
    fixed = [(each, each.offset) for each in intervals if each.offset is not None]
    free = [each for each in intervals if each.offset is None]
    best = 2**62
    for order in itertools.permutations(free):
        laid = list(fixed)
        for each in order:
            laid.append((each, lowest(each, laid, each.alignment or alignment)))
        best = min(best, max((offset + each.size for each, offset in laid), default=0))
    return best


def lowest(each: rlx.Interval, laid: list[tuple[rlx.Interval, int]], alignment: int) -> int:
    meets = [
        (start, start + other.size)
        for other, start in laid
        if other.first <= each.last and other.last >= each.first
    ]
    starts = sorted({0, *(-(-end // alignment) * alignment for _, end in meets)})
    return next(
        start
        for start in starts
        if all(start + each.size <= low or start >= high for low, high in meets)
    )


def clashes(plan: rlx.MemoryPlan) -> list[tuple[object, object]]:
    """Give pairs of roots that share a byte while both are alive, by looking at every pair."""
    roots = [node for node in plan if plan.root(node) == node and plan.interval(node).size]
    found = []
    for one, other in itertools.combinations(roots, 2):
        (a, b), (c, d) = plan.life(one), plan.life(other)
        low, high = plan.offset(one), plan.offset(one) + plan.interval(one).size
        start, end = plan.offset(other), plan.offset(other) + plan.interval(other).size
        if a <= d and c <= b and low < end and start < high:
            found.append((one, other))
    return found


def training(layers: int, seed: int = 0) -> list[tuple[str, int, int, int]]:
    """Make the intervals of a forward and a backward pass: nested lives, temporaries, gradients."""
    random_ = random.Random(seed)
    steps = 8 * layers
    made = []
    for layer in range(layers):
        for each in range(4):
            at = 4 * layer + each
            size = random_.choice([256, 4096, 65536, 1 << 20])
            made.append((f"kept {layer}.{each}", size, at, steps - at))
            made.append((f"temporary {layer}.{each}", size // 2, at, at + 1))
            made.append((f"backward {layer}.{each}", size, steps - at, steps - at + 2))
        made.append((f"gradient {layer}", 4096, steps - 4 * layer, steps + 2))
    return made


def tiling(count: int, width: int, height: int, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """Cut a rectangle of steps and bytes into tiles, so that the best size is its height."""
    random_ = random.Random(seed)
    tiles = [(0, width, 0, height)]
    while len(tiles) < count:
        tiles.sort(key=lambda tile: (tile[1] - tile[0]) * (tile[3] - tile[2]))
        left, right, low, high = tiles.pop()
        if random_.random() < 0.5 and right - left > 1:
            cut = random_.randrange(left + 1, right)
            tiles += [(left, cut, low, high), (cut, right, low, high)]
        elif high - low > 64:
            cut = random_.randrange(low // 64 + 1, high // 64) * 64
            tiles += [(left, right, low, cut), (left, right, cut, high)]
        else:
            tiles.append((left, right, low, high))
            break
    random_.shuffle(tiles)
    return [
        (node, high - low, left, right - 1) for node, (left, right, low, high) in enumerate(tiles)
    ]
