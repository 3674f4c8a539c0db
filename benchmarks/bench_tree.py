"""400 small handles as one tree: one program, one fence."""

import time

import jax
import jax.numpy as jnp

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

COUNT = 400
STEPS = 50


def grow(tree):
    return [leaf + 1 for leaf in tree]


def run() -> list[Row]:
    with rlx.HandleRegion() as region:
        handles = list(region.create({f"h{i}": ((64,), "f32") for i in range(COUNT)}).values())
        return [update_row(handles), write_row(handles)]


def update_row(handles) -> Row:
    plain = jax.jit(grow, donate_argnums=0)
    state = [[jnp.zeros(64) for _ in range(COUNT)]]

    def alone():
        arrays = state[0]
        for _ in range(STEPS):
            arrays = plain(arrays)
        jax.block_until_ready(arrays)
        state[0] = arrays

    def ours():
        for _ in range(STEPS):
            rlx.update(handles, grow)
        with handles[-1].read("numpy"):  # wait, without taking a view that has to be kept right
            pass

    us, them = best_of(ours, alone, number=1, repeat=15)
    against = "the same donated jit on JAX arrays"
    return Row(f"rlx.update, {COUNT} handles", us / STEPS, against, them / STEPS, 1.6)


def write_row(handles) -> Row:
    def scope():
        start = time.perf_counter()
        with rlx.write(handles, "torch"):
            pass
        return time.perf_counter() - start

    def all_fenced():
        rlx.views(handles, "jax")  # somebody may be reading each of them
        return scope()

    spent = min(all_fenced() for _ in range(30))
    name = f"write scope over {COUNT} handles, time"
    return Row(name, spent, "target", 1e-3, 1e-3, absolute=True)
