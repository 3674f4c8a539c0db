"""What order costs and what its absence does: one matrix that JAX reads and torch overwrites.

Three programs do the same hand-over again and again: JAX starts a slow computation on a matrix,
and before it is done the matrix is overwritten for the next round, by NumPy on the CPU and by torch
on a GPU. The first program shares memory by hand, as a DLPack tutorial would. The second also waits
by hand after every step. The third goes through a Buffer. Then the race checker looks at the first.

    python examples/order.py
    python examples/order.py --device cuda:0

It exits with 1 when the Buffer gives a wrong result.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import rlx_driver as rlx

SIDE = 512
ROUNDS = 20


@jax.jit
def slow_sum(x: Any) -> Any:
    """Sum a matrix of equal elements, slowly, so that there is time to overwrite it."""
    y = x
    for _ in range(20):
        y = (y @ x) / (SIDE * x[0, 0])
    return y.sum()


class Hands:
    """The memory without a driver: a Buffer's arrays, taken once and used without asking it."""

    def __init__(self, device: rlx.Device, waits: bool) -> None:
        self.memory = rlx.Buffer.zeros((SIDE, SIDE), "f32", device)
        self.array = self.memory.numpy() if device.is_host else self.memory.torch()
        self.theirs = jnp.from_dlpack(self.memory)
        self.waits = waits

    def write(self, value: int) -> None:
        """Overwrite the matrix."""
        self.array[...] = value
        if self.waits and not self.memory.device.is_host:
            import torch

            torch.cuda.synchronize()

    def read(self) -> Any:
        """Start to read it."""
        total = slow_sum(self.theirs)
        return total.block_until_ready() if self.waits else total


class Driver:
    """The same through a Buffer."""

    def __init__(self, device: rlx.Device) -> None:
        self.memory = rlx.Buffer.zeros((SIDE, SIDE), "f32", device)
        self.framework = "numpy" if device.is_host else "torch"

    def write(self, value: int) -> None:
        """Overwrite the matrix, after whoever reads it."""
        with self.memory.write(self.framework) as array:
            array[...] = value

    def read(self) -> Any:
        """Start to read it."""
        return slow_sum(self.memory.jax())


def hand_over(memory: Hands | Driver) -> tuple[int, float]:
    """Write and read in turn; give how many sums are wrong, and the seconds a round took."""
    for _ in range(3):  # compiled and warm, the fence too
        memory.write(1)
        memory.read().block_until_ready()
    start = time.perf_counter()
    sums = []
    for value in range(1, ROUNDS + 1):
        memory.write(value)
        sums.append(memory.read())
    found = [float(total) for total in sums]
    seconds = (time.perf_counter() - start) / ROUNDS
    wrong = sum(
        not np.isclose(total, value * SIDE * SIDE, rtol=1e-3)
        for value, total in enumerate(found, 1)
    )
    return wrong, seconds


def checked(device: rlx.Device) -> str:
    """Let the race checker look at a plain write while a JAX array is in use."""
    memory = rlx.Buffer.zeros((SIDE, SIDE), "f32", device)
    try:
        with rlx.checking():
            array = memory.numpy() if device.is_host else memory.torch()
            theirs = memory.jax()
            array[...] = 1  # round the driver, while JAX has the memory
            del theirs
    except rlx.RaceError as error:
        return str(error)
    return "nothing"


def main() -> int:
    """Run the three programs and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0")
    device = rlx.Device(parser.parse_args().device)
    console = Console(soft_wrap=True)
    table = Table("how", "wrong sums", "a round", title=f"{ROUNDS} hand-overs on {device}")
    stream = rlx.command_stream(device)  # on a GPU, the one that JAX computes on
    rows = [
        ("by hand, no waiting", Hands(device, waits=False), nullcontext()),
        ("by hand, waiting after each step", Hands(device, waits=True), nullcontext()),
        ("through a Buffer", Driver(device), stream),
    ]
    results = []
    for name, memory, current in rows:
        with current:
            wrong, seconds = hand_over(memory)
        results.append(wrong)
        table.add_row(name, f"{wrong} of {ROUNDS}", f"{seconds * 1e3:.2f} ms")
    console.print(table)
    console.print(f"order on {device}: {stream.explain()}", highlight=False)
    console.rule("what the race checker says of the first")
    console.print(checked(device), highlight=False, markup=False)
    return 1 if results[-1] else 0


if __name__ == "__main__":
    sys.exit(main())
