"""An update in place by JAX on a CPU handle, against a donated chain in JAX alone.

The step is one decode step's write: a row of keys appended to a cache at a position.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

STEPS = 500
ROW = 1024


def append(kv, row, position):
    return jax.lax.dynamic_update_slice(kv, row, (position, 0))


def chains(nbytes):
    """Give three ways to make `STEPS` updates: JAX alone, ours unordered, ours ordered."""
    shape = (nbytes // 4 // ROW, ROW)
    row = jnp.ones((1, ROW))
    positions = [jnp.int32(i % shape[0]) for i in range(STEPS)]
    donated = jax.jit(append, donate_argnums=0)
    state = [jnp.zeros(shape)]
    quiet, held = rlx.Buffer.zeros(shape), rlx.Buffer.zeros(shape)
    held.torch()

    def alone():
        array = state[0]
        for position in positions:
            array = donated(array, row, position)
        array.block_until_ready()
        state[0] = array

    def unordered():
        for position in positions:
            quiet.update(append, row, position, ordered=False)
        with quiet.read("numpy"):
            pass

    def ordered():
        for position in positions:
            held.update(append, row, position)

    return alone, unordered, ordered


def run() -> list[Row]:
    rows = []
    ordered_at = {}
    for label, nbytes in (("1 MiB", 1 << 20), ("64 MiB", 64 << 20), ("1 GiB", 1 << 30)):
        times = best_of(*chains(nbytes), number=1, repeat=15)
        alone, unordered, ordered = (spent / STEPS for spent in times)
        ordered_at[label] = ordered
        against = "donated chain in JAX alone"
        rows.append(Row(f"kv.update ordered, {label}", ordered, against, alone, 1.5))
        rows.append(Row(f"kv.update ordered=False, {label}", unordered, against, alone, 1.3))
    rows.append(
        Row("kv.update at 1 GiB", ordered_at["1 GiB"], "at 1 MiB", ordered_at["1 MiB"], 1.25)
    )
    rows.append(against_copy_back(ordered_at["64 MiB"]))
    rows.append(peak_memory())
    return rows


def against_copy_back(ours: float) -> Row:
    cache = rlx.Buffer.zeros(((64 << 20) // 4 // ROW, ROW)).numpy()
    row, position = jnp.ones((1, ROW)), jnp.int32(3)
    functional = jax.jit(append)

    def copy_back():
        np.copyto(cache, functional(jnp.asarray(cache), row, position))

    (theirs,) = best_of(copy_back, number=3, repeat=5)
    name = "kv.update, 64 MiB"
    return Row(name, ours, "functional update and copy back", theirs, 1500, faster=True)


MEASURE = """
import json, resource
import jax, rlx_driver as rlx
from benchmarks.bench_update import append
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
row = jax.numpy.ones((1, 1024))
small = rlx.Buffer.zeros((8, 1024))
small.update(append, row, 0)
kv = rlx.Buffer.zeros(((1 << 30) // 4096, 1024))
kv.numpy()[...] = 1
before = peak()
for i in range(50):
    kv.update(append, row, i)
kv.numpy()
print(json.dumps({"bytes": kv.byte_size, "grown": peak() - before}))
"""


def peak_memory() -> Row:
    """Measure how much resident memory 50 updates of 1 GiB add; a copy would add 1 GiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    return Row(
        "peak memory added by 50 updates of 1 GiB",
        max(found["grown"], 1),
        "one copy of it",
        found["bytes"],
        0.1,
        unit="B",
    )
