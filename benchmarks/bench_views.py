"""The cost of a view after the first call, against importing again each time."""

import jax.numpy as jnp
import torch

import rlx_driver as rlx
from benchmarks.harness import Row, best_of


def run() -> list[Row]:
    kv = rlx.BufferHandle("kv", (32, 1024), "f32")
    array = kv.numpy()
    jax_call, jax_import = best_of(kv.jax, lambda: jnp.from_dlpack(array), number=2000)
    torch_call, torch_import = best_of(kv.torch, lambda: torch.from_dlpack(array), number=20000)
    (numpy_call,) = best_of(kv.numpy, number=20000)
    kv.close()
    return [
        Row("kv.jax(), time", jax_call, "target", 300e-9, 300e-9, absolute=True),
        Row("kv.torch(), time", torch_call, "target", 120e-9, 120e-9, absolute=True),
        Row("kv.numpy(), time", numpy_call, "target", 120e-9, 120e-9, absolute=True),
        Row("kv.jax()", jax_call, "jnp.from_dlpack", jax_import, 60, faster=True),
        Row("kv.torch()", torch_call, "torch.from_dlpack", torch_import, 8, faster=True),
    ]
