"""A torch function inside a jitted JAX step, against leaving the program for a write scope.

The step is JAX, torch, JAX: a row is appended, torch scales it in place, and JAX sums the row.
"""

import jax
import jax.numpy as jnp
import numpy as np

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

STEPS = 200
WIDTH = 1024


def scale(t, position):
    t[int(position)] *= 0.5


def append(kv, row, position):
    return jax.lax.dynamic_update_slice(kv, row, (position, 0))


def first(kv, row, position):
    return append(kv, row, position)


def last(kv, position):
    return kv, jax.lax.dynamic_slice(kv, (position, 0), (1, WIDTH)).sum()


def whole(kv, row, position):
    return last(rlx.jax_call(scale, append(kv, row, position), position), position)


def untouched(kv, row, position):
    return last(append(kv, row, position), position)


def ways(nbytes):
    """Give four ways: inside jit, JAX alone, out of jit and back, and by copies of the state."""
    shape = (nbytes // 4 // WIDTH, WIDTH)
    row = jnp.ones((1, WIDTH))
    positions = [(jnp.int32(i % shape[0]), i % shape[0]) for i in range(STEPS)]
    one, two, three = (rlx.Buffer.zeros(shape) for _ in range(3))
    functional = jax.jit(append)

    def inside():
        for position, _ in positions:
            one.update(whole, row, position, has_aux=True)

    def alone():
        for position, _ in positions:
            two.update(untouched, row, position, has_aux=True)

    def leaving():
        for position, at in positions:
            three.update(first, row, position)
            with three.write("torch") as t:
                scale(t, at)
            three.update(last, position, has_aux=True)

    def copying():
        kv = jnp.zeros(shape)
        for position, at in positions[:10]:
            host = np.array(functional(kv, row, position))
            host[at] *= 0.5
            kv, _ = last(jnp.array(host), position)
        jax.block_until_ready(kv)

    return inside, alone, leaving, copying


def run() -> list[Row]:
    rows = []
    for label, nbytes in (("1 MiB", 1 << 20), ("64 MiB", 64 << 20)):
        inside, alone, leaving, copying = ways(nbytes)
        spent = best_of(inside, alone, leaving, number=1, repeat=15)
        ours, bare, scopes = (each / STEPS for each in spent)
        (copies,) = best_of(copying, number=1, repeat=3)
        name = f"jax_call in a step, {label}"
        rows.append(Row(name, ours, "update, write scope, update", scopes, 1.0))
        rows.append(Row(name, ours, "the step without the call", bare))
        rows.append(Row(name, ours, "to NumPy and back by copies", copies / 10, faster=True))
    return rows
