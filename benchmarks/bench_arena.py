"""What a slot costs: making an arena of many, and taking one's view again."""

import time

import numpy as np

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

NODES = 100_000
SLOT = 1024


def run() -> list[Row]:
    plan = rlx.plan_memory([(node, SLOT, node, node + 3) for node in range(NODES)])
    made = min(_time(lambda: rlx.Arena(plan)) for _ in range(5))
    first = _first_views(plan)
    alone = min(_time(lambda: [np.zeros(SLOT, np.uint8) for _ in range(NODES)]) for _ in range(5))
    small = rlx.plan_memory(
        [rlx.Interval(node, 4096, 0, 3, dtype="f32", shape=(32, 32)) for node in range(64)]
    )
    with rlx.Arena(small) as arena:
        memory = np.zeros(small.size, np.uint8)
        offset = small.offset(7)
        view, by_hand = best_of(
            lambda: arena.view(7),
            lambda: memory[offset : offset + 4096].view(np.float32).reshape(32, 32),
            number=20_000,
        )
        value = np.ones((32, 32), np.float32)
        written, copied = best_of(
            lambda: arena.write(7, value),
            lambda: np.copyto(by_slice(memory, offset), value),
            number=5_000,
        )
    return [
        Row("arena.view(node), time", view, "target", 300e-9, 300e-9, absolute=True),
        Row("arena.view(node)", view, "slice, view and reshape in NumPy", by_hand),
        Row("arena.write(node, 4 KiB)", written, "the same by hand in NumPy", copied),
        Row("Arena of 100,000 nodes, time", made, "target", 1.0, 1.0, absolute=True),
        Row("first view of each of 100,000 nodes", first, "100,000 np.zeros(1024)", alone),
    ]


def by_slice(memory: np.ndarray, offset: int) -> np.ndarray:
    """Give the slot as a careful user without an arena does."""
    return memory[offset : offset + 4096].view(np.float32).reshape(32, 32)


def _first_views(plan: rlx.MemoryPlan) -> float:
    with rlx.Arena(plan) as arena:
        return _time(lambda: [arena.view(node) for node in plan.nodes])


def _time(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
