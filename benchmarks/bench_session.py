"""`Compiled.run` on a step that does nothing but touch a handle, against the bare call.

What a run adds is little against a step that does something, and all there is to measure here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

SIZE = 64


def grow(*, x, acc):
    return {"acc": acc + x}, None


def add_in_torch(*, x, acc):
    acc.add_(x)
    return {}, None


def add_in_numpy(*, x, acc):
    acc += x
    return {}, None


def run() -> list[Row]:
    torch.set_num_threads(1)
    return [*jax_rows(), *torch_rows(), *numpy_rows()]


def bound(step, framework, **options):
    """Compile a step over a handle in a session of its own, with the value zero."""
    compiled = rlx.Session().compile(step, {"acc": (SIZE, "f32")}, framework, **options)
    compiled.bind_handle("acc", 0)
    return compiled


def compare(name, ours, bare, target) -> list[Row]:
    us, them = best_of(ours, bare, number=300, repeat=25)
    rows = [Row(name, us, "the bare call", them)]
    if target is not None:
        rows.append(
            Row(f"{name}, what it adds", us - them, "target", target, target, absolute=True)
        )
    return rows


def jax_rows() -> list[Row]:
    plain = jax.jit(lambda x, acc: acc + x, donate_argnums=1)
    ones = jnp.ones(SIZE)
    state = [jnp.zeros(SIZE)]

    def bare():
        state[0] = plain(ones, state[0])

    compiled = bound(grow, "jax")
    return compare("compiled.run, jitted JAX step", lambda: compiled.run(x=ones), bare, 15e-6)


def torch_rows() -> list[Row]:
    ones, state = torch.ones(SIZE), torch.zeros(SIZE)
    rows = []
    for name, bare, options in (
        ("compiled.run, eager torch step", add_in_torch, {"eager": True}),
        ("compiled.run, compiled torch step", torch.compile(add_in_torch), {}),
    ):
        compiled = bound(add_in_torch, "torch", **options)
        rows += compare(
            name,
            lambda compiled=compiled: compiled.run(x=ones),
            lambda bare=bare: bare(x=ones, acc=state),
            10e-6,
        )
    return rows


def numpy_rows() -> list[Row]:
    ones, state = np.ones(SIZE, np.float32), np.zeros(SIZE, np.float32)
    compiled = bound(add_in_numpy, "numpy")
    return compare(
        "compiled.run, NumPy step",
        lambda: compiled.run(x=ones),
        lambda: add_in_numpy(x=ones, acc=state),
        None,
    )
