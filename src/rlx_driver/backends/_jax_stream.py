"""JAX's compute stream on a GPU, as `jax.experimental.buffer_callback` shows it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["compute_stream"]


@functools.lru_cache(maxsize=64)
def compute_stream(device: Any) -> tuple[int | None, str]:
    """Give the raw handle of the stream on which JAX runs programs, or None; and why.

    Compiles and runs one tiny program and waits for it, once a device.
    """
    try:
        from jax.experimental.buffer_callback import buffer_callback
    except ImportError:
        return None, "this JAX has no buffer_callback to show its stream"
    seen: list[int] = []

    def look(context: Any, out: Any, _: Any) -> None:
        seen.append(int(context.stream))

    try:
        call = buffer_callback(look, jax.ShapeDtypeStruct((), jnp.float32))
        argument = jax.device_put(jnp.float32(0), device)
        for _ in range(2):
            jax.block_until_ready(jax.jit(call)(argument))
    except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
        return None, f"JAX did not show its stream: {error}"
    if len(set(seen)) != 1:  # one of a pool
        return None, f"JAX showed {len(set(seen))} streams for one program run twice"
    return seen[0], "JAX shows its compute stream"
