"""The reader fence on the CPU: what a write costs more when a JAX array of the memory is out."""

import time

import jax
import jax.numpy as jnp
import numpy as np

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

REPEATS = 15
NUMBER = 300
TARGET = 12e-6


def run() -> list[Row]:
    rows = []
    fences = {}
    for label, nbytes in (("1 MiB", 1 << 20), ("1 GiB", 1 << 30)):
        kv = rlx.Buffer.zeros((nbytes // 4,))
        source = kv.numpy()
        free, fenced = (write_scope(kv, with_array=out) for out in (False, True))
        (copied,) = best_of(lambda a=source: a_copy(a), number=1, repeat=3)
        fences[label] = fenced - free
        name = f"fence before a write, {label}"
        against = "a copy of the array instead"
        rows.append(Row(name, fences[label], against, copied, TARGET, absolute=True))
        rows.append(Row(f"write scope with an array out, {label}", fenced, "with none out", free))
    rows.append(Row("fence at 1 GiB", fences["1 GiB"], "at 1 MiB", fences["1 MiB"], 1.25))
    return rows


def a_copy(array):
    jax.block_until_ready(jnp.array(np.array(array)))


def write_scope(kv: rlx.Buffer, *, with_array: bool) -> float:
    """Time one write scope, in seconds; the array is taken outside of the time."""
    best = float("inf")
    for _ in range(REPEATS):
        spent = 0.0
        for _ in range(NUMBER):
            if with_array:
                kv.jax()
            start = time.perf_counter()
            with kv.write("numpy"):
                pass
            spent += time.perf_counter() - start
        best = min(best, spent / NUMBER)
    return best
