"""A torch function inside a jitted JAX step, against leaving the program for a write scope.

The step: torch scales one row of a cache in place, and JAX appends another.
"""

import jax
import jax.numpy as jnp

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

STEPS = 100
WIDTH = 1024


def scale(t, position):
    t[int(position)] *= 0.5


def append(kv, row, position):
    return jax.lax.dynamic_update_slice(kv, row, (position, 0))


def call_first(kv, row, position):
    return append(rlx.jax_call(scale, kv, position), row, position)


def call_last(kv, row, position):
    return rlx.jax_call(scale, append(kv, row, position), position)


def ways(nbytes):
    """Give four ways: the call before and after the append, JAX alone, and a write scope."""
    shape = (nbytes // 4 // WIDTH, WIDTH)
    row = jnp.ones((1, WIDTH))
    positions = [(jnp.int32(i % shape[0]), i % shape[0]) for i in range(STEPS)]

    def updating(step):
        buffer = rlx.Buffer.zeros(shape)

        def work():
            for position, _ in positions:
                buffer.update(step, row, position)
            buffer.numpy()

        return work

    outside = rlx.Buffer.zeros(shape)

    def leaving():
        for position, at in positions:
            with outside.write("torch") as t:
                scale(t, at)
            outside.update(append, row, position)
        outside.numpy()

    return updating(call_first), updating(call_last), updating(append), leaving


def run() -> list[Row]:
    rows = []
    for label, nbytes in (("1 MiB", 1 << 20), ("64 MiB", 64 << 20)):
        times = best_of(*ways(nbytes), number=1, repeat=10)
        first, last, alone, leaving = (spent / STEPS for spent in times)
        scope = "write scope, then update"
        rows.append(Row(f"jax_call, then append, {label}", first, scope, leaving))
        rows.append(Row(f"append, then jax_call, {label}", last, scope, leaving))
        rows.append(Row(f"jax_call, then append, {label}", first, "append alone", alone))
    return rows
