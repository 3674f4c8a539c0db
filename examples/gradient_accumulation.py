"""Accumulate one gradient in torch and JAX by turns: ``param.grad`` lives in handles.

A batch is cut into pieces. torch runs backward on every other piece and adds to ``param.grad``; JAX
takes the rest and adds in place to the same bytes. Then torch's optimizer steps. The weights follow
those of a program in torch alone that runs backward on the whole batch.

    python examples/gradient_accumulation.py

It exits with 1 when they do not.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console

import rlx_driver as rlx
from rlx_driver.integrations.torch import bind_gradients, bind_module

if TYPE_CHECKING:
    from collections.abc import Sequence

PIECES = 4


def make_model() -> torch.nn.Module:
    """Make the same small network each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


def cost_in_torch(model: torch.nn.Module, x: np.ndarray, y: np.ndarray) -> torch.Tensor:
    """Give the sum of squares, as a part of the mean over the whole batch."""
    place = next(model.parameters()).device
    errors = model(torch.from_numpy(x).to(place)) - torch.from_numpy(y).to(place)
    return (errors**2).sum()


def add_gradient(grads: dict[str, Any], params: dict[str, Any], x: Any, y: Any) -> dict[str, Any]:
    """Do the same in JAX, and add the gradient to what is there: a step for `rlx.update`."""

    def cost(params: dict[str, Any]) -> Any:
        hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
        return jnp.sum((hidden @ params["2.weight"].T + params["2.bias"] - y) ** 2)

    return jax.tree.map(jnp.add, grads, jax.grad(cost)(params))


def main(argv: Sequence[str] | None = None) -> int:
    """Train both ways, compare, and return 0 if every check passes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    device = rlx.Device(args.device)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_default_device", jax.devices(device.kind)[device.index])
    with rlx.command_stream(device):
        return demo(args.steps, device)


def demo(steps: int, device: rlx.Device) -> int:
    """Run the two programs side by side."""
    alone, model = make_model().to(str(device)), make_model().to(str(device))
    plain = torch.optim.SGD(alone.parameters(), lr=1e-3, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)  # before it is bound

    region = rlx.HandleRegion(device)
    params = bind_module(model, region)
    grads = bind_gradients(model, region)
    homes = [parameter.grad.data_ptr() for parameter in model.parameters()]

    generator = np.random.default_rng(0)
    furthest = 0.0
    with rlx.no_copies():
        for _ in range(steps):
            x = generator.standard_normal((32, 16), np.float32)
            y = np.sin(x.sum(1, keepdims=True))

            optimizer.zero_grad(set_to_none=False)  # zeros, in place
            for i, (part, wanted) in enumerate(
                zip(np.split(x, PIECES), np.split(y, PIECES), strict=True)
            ):
                if i % 2 == 0:
                    cost_in_torch(model, part, wanted).backward()  # adds to param.grad
                else:
                    rlx.update(grads, add_gradient, params, part, wanted)  # adds there too
            optimizer.step()

            plain.zero_grad()
            cost_in_torch(alone, x, y).backward()
            plain.step()
            for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
                furthest = max(furthest, float((mine - theirs).detach().abs().max()))

    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{steps} steps of {PIECES} pieces on {device}; weights differ by at most {furthest:.1e}"
    )
    checks = {
        "the weights are those of torch alone within 1e-5": furthest < 1e-5,
        "every gradient lies where it lay at the start, in its handle": (
            homes == [parameter.grad.data_ptr() for parameter in model.parameters()]
            and homes == [handle.address for handle in grads.values()]
        ),
    }
    for text, passed in checks.items():
        console.print("ok  " if passed else "FAIL", text, style="green" if passed else "bold red")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
