"""Train one small GPT in torch, go on in JAX with optax, and go back, on the same memory.

The parameters of a torch module and the state of its AdamW are bound to handles. torch trains for
some steps; then JAX goes on from the very same bytes, parameters and moments and step counters,
with optax; then torch again. Nothing is copied, converted or saved in between. The costs of every
step are compared with those of runs in torch alone and in JAX alone from the same start, and with a
control in which the moments start anew at the switch, as they would if only the weights went over.

    python examples/train_across_frameworks.py
    python examples/train_across_frameworks.py --steps 100 --plot costs.png

It exits with 1 when the curves differ by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from rich.console import Console

import rlx_driver as rlx
import tiny_gpt
from cost_curves import cost_table, difference, plot
from rlx_driver.integrations.jax import bind_pytree
from rlx_driver.integrations.torch import bind_module, bind_optimizer, require_bound
from train_tiny_gpt import corpus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PHASES = ("torch", "jax", "torch")
LEARNING_RATE, BETAS, EPSILON, DECAY = 3e-3, (0.9, 0.98), 1e-8, 0.1
TOLERANCE = 1e-4
"""How much costs may differ in relation to their size: what rounding grows to in such a run."""

# Adam in two words: what torch calls exp_avg is mu in optax. Both divide the corrected mean by the
# root of the corrected square plus epsilon, and decay the weight itself, by learning rate x decay.
OPTAX_IN_TORCH = {
    "params": "",
    "optimizer/0/count": "adamw/step",
    "optimizer/0/mu": "adamw/exp_avg",
    "optimizer/0/nu": "adamw/exp_avg_sq",
}


# torch ------------------------------------------------------------------------------------------


def module_of(arrays: dict[str, np.ndarray]) -> torch.nn.Module:
    """Make a module whose parameters have the dotted names of a flat dictionary."""
    root = torch.nn.Module()
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]
        owner.register_parameter(leaf, torch.nn.Parameter(torch.tensor(array)))
    return root


def torch_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """Make AdamW as a torch program would; gains do not decay."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    # Fused keeps its step counters beside the parameters, on a GPU too.
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)


def torch_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: np.ndarray,
    config: tiny_gpt.Config,
) -> float:
    """Train on a batch of ``(batch, tokens + 1)``; give the cost in nats a token."""
    params = dict(model.named_parameters())
    batch = torch.from_numpy(tokens).to(next(iter(params.values())).device, torch.int64)
    _, logits = tiny_gpt.forward(params, batch[:, :-1], None, 0, config=config)
    cost = torch.nn.functional.cross_entropy(
        logits.reshape(-1, config.vocab), batch[:, 1:].reshape(-1)
    )
    optimizer.zero_grad()
    cost.backward()
    optimizer.step()
    return cost.item()


# JAX --------------------------------------------------------------------------------------------


def optax_optimizer() -> optax.GradientTransformation:
    """Make AdamW as a JAX program would: optax.adamw, whose gains do not decay."""
    return optax.adamw(
        LEARNING_RATE,
        *BETAS,
        eps=EPSILON,
        weight_decay=DECAY,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )


def optax_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Describe parameters and the state of optax, with a counter for each parameter as in torch."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    adam, *rest = jax.eval_shape(optax_optimizer().init, params)
    counts = dict.fromkeys(params, jax.ShapeDtypeStruct((), jnp.float32))
    return {"params": params, "optimizer": (adam._replace(count=counts), *rest)}


def make_jax_step(config: tiny_gpt.Config) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Give the training step ``(state, tokens) -> (state, cost)``; state as `optax_state`."""
    transform = optax_optimizer()

    def cost_of(params: dict[str, Any], tokens: Any) -> Any:
        _, logits = tiny_gpt.forward(params, tokens[:, :-1], None, 0, config=config)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(state: dict[str, Any], tokens: Any) -> tuple[dict[str, Any], Any]:
        params, (adam, *rest) = state["params"], state["optimizer"]
        counts = adam.count  # all equal
        cost, grads = jax.value_and_grad(cost_of)(params, tokens)
        adam = adam._replace(count=next(iter(counts.values())))
        updates, (adam, *rest) = transform.update(grads, (adam, *rest), params)
        adam = adam._replace(count=dict.fromkeys(counts, adam.count))
        params = optax.apply_updates(params, updates)
        return {"params": params, "optimizer": (adam, *rest)}, cost

    return step


# The runs ---------------------------------------------------------------------------------------


class Bound:
    """A torch program's model and optimizer, and optax's view of the same state, in handles."""

    def __init__(
        self, config: tiny_gpt.Config, arrays: dict[str, np.ndarray], device: rlx.Device
    ) -> None:
        self.config = config
        self.model = module_of(arrays).to(str(device))
        self.optimizer = torch_optimizer(self.model)
        self.jax_step = make_jax_step(config)

        self.region = rlx.HandleRegion(device)
        bind_module(self.model, self.region)
        bind_optimizer(self.optimizer, self.region)
        shapes = tiny_gpt.param_shapes(config)
        self.state = bind_pytree(optax_state(shapes), self.region, names=OPTAX_IN_TORCH)

    def in_torch(self, tokens: np.ndarray) -> float:
        """Train on a batch in torch, by the program as it was."""
        return torch_step(self.model, self.optimizer, tokens, self.config)

    def in_jax(self, tokens: np.ndarray) -> float:
        """Train on a batch in JAX, in place."""
        return float(rlx.update(self.state, self.jax_step, tokens, has_aux=True))

    def forget(self) -> None:
        """Lose what the optimizer knows, as if only the weights had been handed over."""
        for handle in self.region:
            if handle.name.startswith("adamw/"):
                handle[...] = 0

    def train(self, batches: np.ndarray, *, forget: bool = False) -> list[float]:
        """Train on a third of the batches in each phase."""
        costs: list[float] = []
        for number, (framework, part) in enumerate(
            zip(PHASES, np.split(batches, len(PHASES)), strict=True)
        ):
            if forget and number:
                self.forget()
            step = self.in_torch if framework == "torch" else self.in_jax
            costs += [step(tokens) for tokens in part]
        return costs

    def addresses(self) -> dict[str, set[int]]:
        """Say where torch and JAX themselves see each parameter and each piece of state."""
        params = dict(self.model.named_parameters())
        names = {parameter: name for name, parameter in params.items()}
        seen = {name: {parameter.data_ptr()} for name, parameter in params.items()}
        for parameter, state in self.optimizer.state.items():
            for key, tensor in state.items():
                seen[f"adamw/{key}/{names[parameter]}"] = {tensor.data_ptr()}
        arrays = jax.tree.leaves(rlx.views(self.state, "jax"))
        for handle, array in zip(jax.tree.leaves(self.state), arrays, strict=True):
            seen[handle.name].add(array.block_until_ready().unsafe_buffer_pointer())
        return seen


def in_torch_alone(
    config: tiny_gpt.Config,
    arrays: dict[str, np.ndarray],
    batches: np.ndarray,
    device: rlx.Device,
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Train on all batches in torch, without the driver."""
    model = module_of(arrays).to(str(device))
    optimizer = torch_optimizer(model)
    costs = [torch_step(model, optimizer, tokens, config) for tokens in batches]
    return costs, {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}


def in_jax_alone(
    config: tiny_gpt.Config, arrays: dict[str, np.ndarray], batches: np.ndarray
) -> list[float]:
    """Train on all batches in JAX, without the driver."""
    state = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        optax_state({name: array.shape for name, array in arrays.items()}),
    )
    state["params"] = {name: jnp.array(array) for name, array in arrays.items()}
    step = jax.jit(make_jax_step(config), donate_argnums=0)
    costs = []
    for tokens in batches:
        state, cost = step(state, tokens)
        costs.append(float(cost))
    return costs


def sample_batches(args: argparse.Namespace, config: tiny_gpt.Config) -> np.ndarray:
    """Draw all batches of a run: int32, ``(steps, batch, tokens + 1)``."""
    text = corpus()[0]
    generator = np.random.default_rng(args.seed)
    starts = generator.integers(
        0, len(text) - config.max_seq, (len(PHASES) * args.steps, args.batch)
    )
    return text[starts[..., None] + np.arange(config.max_seq + 1)].astype(np.int32)


# The report -------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with a message where it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where the memory is: cpu, cuda:0")
    parser.add_argument("--steps", type=int, default=20, help="in each of the three phases")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="draw the costs; needs matplotlib")
    for name, default in (
        ("layers", 2), ("heads", 2), ("head_dim", 16), ("hidden", 96), ("max_seq", 48),
    ):  # fmt: skip
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps must be at least 2: moments matter from the second step on")
    try:
        args.device = rlx.Device(args.device)
        args.device.memory()  # raises if there is no such device
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, print the report, and return 0 if every check passes."""
    args = parse(argv)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave torch some memory
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_default_device", jax.devices(args.device.kind)[args.device.index])
    with rlx.command_stream(args.device):  # on a GPU: torch and JAX on one stream
        return demo(args)


def demo(args: argparse.Namespace) -> int:
    """Train in all ways, and compare."""
    config = tiny_gpt.Config(
        layers=args.layers,
        heads=args.heads,
        head_dim=args.head_dim,
        hidden=args.hidden,
        max_seq=args.max_seq,
    )
    arrays = tiny_gpt.init_params(config, args.seed)
    batches = sample_batches(args, config)

    bound = Bound(config, arrays, args.device)
    before = bound.addresses()
    start = time.perf_counter()
    with rlx.ledger.record() as record, rlx.no_copies():  # any copy by the driver would raise
        across = bound.train(batches)
    seconds = time.perf_counter() - start
    require_bound(bound.model)
    require_bound(bound.optimizer)
    after = bound.addresses()

    alone, weights = in_torch_alone(config, arrays, batches, args.device)
    curves = {
        "torch, JAX, torch": across,
        "torch alone": alone,
        "JAX alone": in_jax_alone(config, arrays, batches),
        "moments forgotten": Bound(config, arrays, args.device).train(batches, forget=True),
    }
    console = Console(
        width=None if sys.stdout.isatty() else 100, highlight=False, markup=False, emoji=False
    )
    console.print(cost_table(curves, PHASES))
    steps = len(batches)
    held = sum(handle.byte_size for handle in bound.region)
    console.print(
        f"{sum(a.size for a in arrays.values()):,} parameters on {args.device}; {len(before)} "
        f"handles of {held:,} bytes hold them and the state of AdamW.\n"
        f"{steps} steps, compilation by JAX included, took {seconds:.1f} s. "
        f"Ledger: {record.counts}\n"
    )
    if args.plot:
        plot(args.plot, curves, len(PHASES), TOLERANCE)

    worst = {name: difference(costs, alone).max() for name, costs in curves.items()}
    ends = {name: bound.region[name].to_host().numpy() for name in weights}
    norm = np.sqrt(sum(np.sum((ends[name] - w) ** 2) for name, w in weights.items()))
    moved = np.sqrt(sum(np.sum((arrays[name] - w) ** 2) for name, w in weights.items()))
    counts = {float(h.to_host().numpy()) for h in bound.region if h.name.startswith("adamw/step")}
    checks = {
        f"every cost equals that of torch alone within {TOLERANCE:g}": (
            worst["torch, JAX, torch"] < TOLERANCE
        ),
        "so does every cost of JAX alone: this is rounding": worst["JAX alone"] < TOLERANCE,
        "without the moments it would not": worst["moments forgotten"] > 2 * TOLERANCE,
        "the weights at the end differ by less than a hundredth of their way": (norm < moved / 100),
        f"all step counters say {steps}": counts == {steps},
        "0 bytes copied by the driver from the first step to the last": record.counts.copies == 0,
        "torch and JAX see all of it at the handles' addresses, before and after": (
            before == after
            and all(seen == {bound.region[name].address} for name, seen in before.items())
        ),
    }
    for text, passed in checks.items():
        console.print("ok  " if passed else "FAIL", text, style="green" if passed else "bold red")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
