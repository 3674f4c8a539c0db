"""A real model's weights in one region for three frameworks: peaks of memory, and loading them."""

import sys
from pathlib import Path

from safetensors.numpy import load_file

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import minilm
import minilm_memory

FRAMEWORKS = ("numpy", "torch", "jax")


def run() -> list[Row]:
    peaks = minilm_memory.measure(FRAMEWORKS)
    path = minilm.model_folder() / "model.safetensors"
    ours, theirs = best_of(
        lambda: rlx.HandleRegion.load(path).close(), lambda: load_file(path), number=1, repeat=5
    )
    together = peaks.together.whole
    limit = minilm_memory.LIMIT
    return [
        Row(
            "MiniLM in three frameworks, one region, peak",
            together,
            "in one, and the other runtimes started",
            peaks.least,
            limit,
            unit="B",
        ),
        Row("the same", together, "weights of its own for each", peaks.copies.whole, unit="B"),
        Row("HandleRegion.load, 87 MiB, 104 tensors", ours, "safetensors load_file", theirs),
    ]
