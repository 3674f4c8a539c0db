"""What random programs compute, in NumPy, torch and JAX, and the device on which they do.

Every value is a whole number below `MODULUS`, so that float32 is exact and no order of summing
matters; every change mixes old and new, so that a change that is lost, doubled or late shows.
"""

from __future__ import annotations

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import rlx_driver as rlx

if TYPE_CHECKING:
    from random_programs import Op

MODULUS = 61
PRODUCTS = 12
TORCH = {"float32": torch.float32, "int32": torch.int32}


def mixed(x: Any, k: Any, a: Any = 0) -> Any:
    """Give the next value of a matrix, in any framework."""
    return (3 * x + a + k) % MODULUS


def pattern(side: int, k: int) -> np.ndarray[Any, Any]:
    """Give a matrix of telling whole numbers."""
    return (np.arange(side)[:, None] * 7 + np.arange(side) * 3 + k).astype(np.int32) % MODULUS


def checksum(x: Any) -> int:
    """Sum a NumPy array, each place with a weight of its own."""
    rows, columns = x.shape
    weights = (np.arange(rows)[:, None] * 31 + np.arange(columns) * 17) % 97 + 1
    return int((x.astype(np.int64) * weights).sum())


def products(busy):
    """Give zero after some milliseconds of work on a matrix of 1/side."""
    for _ in range(PRODUCTS):
        busy = busy @ busy
    return busy[0, 0] * 0


def spun(busy):
    """Give JAX's `products` as a whole number."""
    return products(busy).astype(jnp.int32)


def jax_checksum(x, zero=0):
    """Give `checksum` of a matrix that is read when `zero` is known."""
    rows = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return ((x.astype(jnp.int32) + zero) * ((rows * 31 + columns * 17) % 97 + 1)).sum()


@jax.jit
def late_sum(arrays, busy):
    """Read matrices, after some milliseconds."""
    zero = spun(busy)
    return sum(jax_checksum(x, zero) for x in arrays)


def step(x, zero, k):
    """Change a matrix when `zero` is known; all steps do."""
    return mixed(x, k + zero)


def step_with(x, a, zero, k):
    return mixed(x, k + zero, a.astype(x.dtype)), jax_checksum(x)


def step_of_two(state, zero, k):
    (x, y), aux = state, jax_checksum(state[0]) + jax_checksum(state[1])
    k = k + zero
    return [mixed(x, k, y.astype(x.dtype)), mixed(y, k, x.astype(y.dtype))], aux


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def own_step(state, others, zero, k):
    """Change matrices by a program of the user's own, which donates them."""
    if len(state) == 2:
        return step_of_two(state, zero, k)
    if others:
        new, aux = step_with(state[0], others[0], zero, k)
        return [new], aux
    return [step(state[0], zero, k)], None


STEPS = {"": step, "donating": jax.jit(step, donate_argnums=0), "plain": jax.jit(step)}
late_token = jax.jit(spun)
see = jax.jit(jax_checksum)
late_copy = jax.jit(lambda x, zero: x + zero.astype(x.dtype))


def native_step(x, k):
    x[...] = mixed(x, k)


def native_step_with(x, a, k):
    old = native_checksum(x)
    x[...] = mixed(x, k, native_cast(a, x.dtype))
    return None, old


def native_step_of_two(state, k):
    """Return new values, which the driver copies into place."""
    x, y = state
    aux = native_checksum(x) + native_checksum(y)
    return [mixed(x, k, native_cast(y, x.dtype)), mixed(y, k, native_cast(x, y.dtype))], aux


def native_cast(x, dtype):
    return x.to(dtype) if isinstance(x, torch.Tensor) else x.astype(dtype)


def native_checksum(x, zero=0):
    """Give `checksum`; torch's is a tensor, for which nobody has waited."""
    if not isinstance(x, torch.Tensor):
        return checksum(x)
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return ((x.long() + zero) * ((rows[:, None] * 31 + columns * 17) % 97 + 1)).sum()


def on_host(x):
    """Give a NumPy array of an array of any framework; waits for it."""
    return x.cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


class Place:
    """A device with its streams, threads to call from, and work that keeps it busy."""

    def __init__(self, device: str = "cpu", order: str | None = None) -> None:
        self.device = device
        self.cuda = device.startswith("cuda")
        self.natives = ("torch",) if self.cuda else ("numpy", "torch")
        self.shared = order == "shared"
        self.jax = jax.devices("cuda" if self.cuda else "cpu")[0]
        self.host = jax.devices("cpu")[0]
        side = 2048 if self.cuda else 256
        self.busy = jax.device_put(np.full((side, side), 1 / side, np.float32), self.jax)
        self.torch_busy = torch.full((side, side), 1 / side, device=device)
        self.zero = late_token(self.busy)
        self.streams: list[Any] = [None]
        if self.cuda:
            self.streams += [torch.cuda.Stream(device), torch.cuda.Stream(device)]
        self.synchronize()
        self.threads = [None, ThreadPoolExecutor(1), ThreadPoolExecutor(1)]

    def synchronize(self) -> None:
        """Wait for everything that torch does on any stream."""
        if self.cuda:
            torch.cuda.synchronize()

    def token(self, late: bool) -> jax.Array:
        """Give JAX's zero, known now or later."""
        return late_token(self.busy) if late else self.zero

    def torch_token(self, late: bool) -> Any:
        """Give torch's zero; on the host torch is never late."""
        return products(self.torch_busy).long() if late and self.cuda else 0

    def array(self, by: str, side: int, k: int, dtype: str) -> Any:
        """Give a fresh array of a framework with a pattern; JAX's is late."""
        value = pattern(side, k).astype(dtype)
        if by == "jax":
            return late_copy(jax.device_put(value, self.jax), self.token(True))
        return torch.from_numpy(value).to(self.device) if by == "torch" else value

    def call(self, op: Op, function: Any) -> Any:
        """Run an operation in its thread and on its stream."""
        thread = self.threads[op.thread]
        if thread is None:
            return self._on_stream(op, function)
        return thread.submit(self._on_stream, op, function).result()

    def _on_stream(self, op: Op, function: Any) -> Any:
        context: Any = contextlib.nullcontext()
        if op.stream:
            context = torch.cuda.stream(self.streams[op.stream])
        elif self.shared and self.cuda:
            context = rlx.command_stream(self.device)
        with context:
            return function(op)


def read_late(views: Any, by: str, place: Place) -> Any:
    """Start a slow reader of views."""
    if by == "jax":
        return late_sum(list(views), place.busy)
    zero = place.torch_token(True)
    return sum(native_checksum(view, zero) for view in views)
