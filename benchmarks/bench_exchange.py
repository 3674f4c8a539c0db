"""One verified exchange, against the importer of the framework itself, which verifies nothing."""

import jax.numpy as jnp
import numpy as np
import torch

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

TARGETS = {
    ("numpy", "jax"): 0.4,
    ("torch", "jax"): 0.45,
    ("jax", "torch"): 0.8,
    ("numpy", "torch"): 1.5,
    ("torch", "numpy"): 1.2,
    ("jax", "numpy"): 1.0,
}


def run() -> list[Row]:
    own = {
        "numpy": ("np.from_dlpack", np.from_dlpack),
        "torch": ("torch.from_dlpack", torch.from_dlpack),
        "jax": ("jnp.from_dlpack", jnp.from_dlpack),
    }
    arrays = {
        "numpy": rlx.Buffer.zeros((32, 1024)).numpy(),
        "torch": torch.zeros(32, 1024),
        "jax": jnp.zeros((32, 1024)),
    }
    rows = []
    for (source, target), bound in TARGETS.items():
        name, importer = own[target]
        x = arrays[source]
        ours, theirs = best_of(
            lambda x=x, target=target: rlx.exchange(x, target, copy=False),
            lambda x=x, importer=importer: importer(x),
            number=3000,
        )
        rows.append(Row(f"exchange {source} to {target}", ours, name, theirs, bound))
    return rows
