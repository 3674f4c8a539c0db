"""Files of arenas and handles: saving against a plain write, and loading by a mapping.

An arena of 4 GiB where memory and disk have room for it, else of 1 GiB; ``RLX_SNAPSHOT_MIB`` sets
another size, and ``RLX_SNAPSHOT_DIR`` the folder.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import rlx_driver as rlx
from benchmarks.harness import Row, best_of
from rlx_driver.backends.numpy import array_at

MIB = 1 << 20
NODES = 1_000
TURNS = 3


def size() -> int:
    """Choose how many bytes: the arena, the page cache of two files, and two files."""
    if "RLX_SNAPSHOT_MIB" in os.environ:
        return int(os.environ["RLX_SNAPSHOT_MIB"]) * MIB
    room = min(rlx.Device("cpu").memory().free // 4, shutil.disk_usage(folder()).free // 3)
    return 4096 * MIB if room >= 4096 * MIB else 1024 * MIB


def folder() -> str:
    return os.environ.get("RLX_SNAPSHOT_DIR", tempfile.gettempdir())


def plain_write(path: Path, data: memoryview) -> None:
    """Write bytes to a new file in as few calls as can be, and put it in the old one's place."""
    draft = path.with_suffix(".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    while data.nbytes:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)
    os.close(descriptor)
    draft.replace(path)


def in_turns(first: Callable[[], object], second: Callable[[], object]) -> list[float]:
    """Time two things in turns, the order reversed each time; their best."""
    best = [float("inf")] * 2
    for turn in range(TURNS):
        for which in (0, 1) if turn % 2 else (1, 0):
            spent = time.perf_counter()
            (first, second)[which]()
            best[which] = min(best[which], time.perf_counter() - spent)
    return best


def saving(plan: rlx.MemoryPlan, ours: Path, theirs: Path) -> list[float]:
    """Time saving a full arena, and writing the same bytes."""
    with rlx.Arena(plan, name="big") as arena:
        for node in plan.nodes:
            arena.view(node)[...] = 7
        data = array_at(arena.address, (arena.size_bytes,), np.dtype(np.uint8), arena).data
        return in_turns(lambda: arena.save(ours), lambda: plain_write(theirs, data))


def run() -> list[Row]:
    nbytes = size()
    label = f"{nbytes / (1 << 30):.3g} GiB"
    each = nbytes // NODES // 64 * 64
    plan = rlx.plan_memory([(f"n{i}", each, 0, 1) for i in range(NODES)])
    with tempfile.TemporaryDirectory(dir=folder()) as where:
        ours, theirs = Path(where) / "arena.safetensors", Path(where) / "plain"
        saved, written = saving(plan, ours, theirs)
        (mapped,) = best_of(lambda: rlx.Arena.load(ours).close(), number=1, repeat=5)
        start = time.perf_counter()
        rlx.Arena.load(ours, mmap=False).close()
        read = time.perf_counter() - start
        with rlx.HandleRegion.load(ours, mmap=True) as region:
            plain = region["arena"].host_bytes()
            one, other = in_turns(lambda: region.save(ours), lambda: plain_write(theirs, plain))
    return [
        Row(f"arena.save, {label}, {NODES:,} nodes", saved, "write and fsync", written, 1 / 0.8),
        Row(f"region.save, {label}, one handle", one, "write and fsync", other, 1 / 0.8),
        Row(
            f"Arena.load, mapped, {label}, {NODES:,} nodes",
            mapped,
            "mmap=False",
            read,
            0.02,
            absolute=True,
        ),
    ]
