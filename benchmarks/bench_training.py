"""Training on bound state against training on the frameworks' own.

In torch nothing but the place of the tensors differs. In JAX a step goes through `rlx.update` over
a tree of handles, of which torch holds views, against a plain donated jit.
"""

import jax
import jax.numpy as jnp
import torch

import rlx_driver as rlx
from benchmarks.harness import Row, best_of
from rlx_driver.integrations.torch import bind_module, bind_optimizer

STEPS = 10
LAYERS = 8


def make_model(width):
    torch.manual_seed(0)
    layers = []
    for _ in range(LAYERS):
        layers += [torch.nn.Linear(width, width), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers)


def torch_row(width, kind) -> Row:
    x = torch.ones(32, width)

    def training(bound):
        model = make_model(width)
        optimizer = torch.optim.AdamW(model.parameters(), **kind)
        region = rlx.HandleRegion()
        if bound:
            bind_module(model, region)
            bind_optimizer(optimizer, region)

        def steps():
            for _ in range(STEPS):
                optimizer.zero_grad()
                (model(x) ** 2).sum().backward()
                optimizer.step()

        return steps

    ours, theirs = best_of(training(True), training(False), number=1, repeat=25)
    how = "fused" if kind.get("fused") else "foreach"
    name = f"torch step, {LAYERS} bound layers of {width}, AdamW {how}"
    return Row(name, ours / STEPS, "the same unbound", theirs / STEPS, 1.05)


def forward(params, x):
    for layer in range(LAYERS):
        x = jnp.tanh(x @ params[f"{2 * layer}.weight"].T + params[f"{2 * layer}.bias"])
    return jnp.sum(x**2)


def jax_step(state, x):
    """Adam, without the corrections."""
    params, mean, square = state
    grads = jax.grad(forward)(params, x)
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
    square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, square, grads)
    params = jax.tree.map(lambda p, m, v: p - 1e-3 * m / (jnp.sqrt(v) + 1e-8), params, mean, square)
    return params, mean, square


def jax_row(width, target) -> Row:
    model = make_model(width)
    region = rlx.HandleRegion()
    optimizer = torch.optim.AdamW(model.parameters())
    params = bind_module(model, region)
    moments = bind_optimizer(optimizer, region)
    state = (params, moments["exp_avg"], moments["exp_avg_sq"])
    x = jnp.ones((32, width))

    plain = [jax.tree.map(lambda view: jnp.array(view, copy=True), rlx.views(state, "jax"))]
    donating = jax.jit(jax_step, donate_argnums=0)

    def ours():
        for _ in range(STEPS):
            rlx.update(state, jax_step, x)

    def theirs():
        arrays = plain[0]
        for _ in range(STEPS):
            arrays = donating(arrays, x)
            jax.block_until_ready(arrays)  # as ours does: torch holds the parameters
        plain[0] = arrays

    us, them = best_of(ours, theirs, number=1, repeat=25)
    name = f"JAX step on torch's memory, {LAYERS} layers of {width}, {6 * LAYERS} handles"
    return Row(name, us / STEPS, "a plain donated jit, waited for", them / STEPS, target)


def run() -> list[Row]:
    torch.set_num_threads(1)
    rows = [torch_row(256, {"foreach": True}), torch_row(256, {"fused": True})]
    return [*rows, jax_row(256, 1.2), jax_row(16, None)]
