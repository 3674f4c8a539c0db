"""Reorder a key-value cache by beam index, in place, in each framework.

Beam search keeps the best few continuations. After each step beam ``i`` goes on from beam
``index[i]``, and the cache has to follow. In a handle it is reordered where it lies: the address
stays, so that a view, a module or a captured graph that holds the cache goes on working. NumPy,
torch and JAX take turns here, and the cache is compared with a plain copy that NumPy reorders.

    python examples/beam_reorder.py

It exits with 1 when they differ.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

import rlx_driver as rlx

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYERS, BEAMS, HEADS, TOKENS, WIDTH = 2, 4, 2, 32, 16
BEAM_AXIS = 2


def in_numpy(kv: np.ndarray, index: np.ndarray) -> None:
    """Reorder in place: what is taken is a new array, so no beam is read after it was written."""
    kv[...] = np.take(kv, index, axis=BEAM_AXIS)


def in_torch(kv: Any, index: np.ndarray) -> None:
    """Do the same in torch."""
    import torch

    kv.copy_(kv.index_select(BEAM_AXIS, torch.from_numpy(index).to(kv.device)))


def in_jax(kv: Any, index: Any) -> Any:
    """Do the same in JAX: the result takes the memory of the cache, which was donated."""
    import jax.numpy as jnp

    return jnp.take(kv, index, axis=BEAM_AXIS)


STEPS = {"numpy": in_numpy, "torch": in_torch, "jax": in_jax}


def main(argv: Sequence[str] | None = None) -> int:
    """Reorder in turn, compare, and return 0 if every check passes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args(argv)
    device = rlx.Device(args.device)
    frameworks = [name for name in STEPS if name != "numpy" or device.is_host]

    shape = (LAYERS, 2, BEAMS, HEADS, TOKENS, WIDTH)
    generator = np.random.default_rng(0)
    expected = generator.standard_normal(shape, np.float32)
    kv = rlx.BufferHandle("kv", shape, "f32", device=device)
    kv.copy_from(expected)
    held, home = kv.torch(), kv.address

    equal = True
    with rlx.command_stream(device), rlx.ledger.record() as record:
        for turn in range(args.rounds):
            framework = frameworks[turn % len(frameworks)]
            index = generator.integers(0, BEAMS, BEAMS)
            with rlx.no_copies():
                kv.update(STEPS[framework], index, framework=framework)
            copies = record.counts.copies
            expected = np.take(expected, index, axis=BEAM_AXIS)
            # Something new in every beam, as the next token writes it.
            row = generator.standard_normal((*shape[:4], 1, WIDTH), np.float32)
            token = (*[slice(None)] * 4, slice(turn % TOKENS, turn % TOKENS + 1))
            with kv.write("torch") as view:
                view[token] = view.new_tensor(row)
            expected[token] = row
            equal &= bool(np.array_equal(held.cpu().numpy(), expected))

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{args.rounds} rounds on {device}, by {', '.join(frameworks)} in turn")
    checks = {
        "a tensor held from the start shows the right cache after every round": equal,
        "the cache has not moved": kv.address == home == held.data_ptr(),
        "0 bytes copied by the driver": copies == 0,
    }
    for text, passed in checks.items():
        console.print("ok  " if passed else "FAIL", text, style="green" if passed else "bold red")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
