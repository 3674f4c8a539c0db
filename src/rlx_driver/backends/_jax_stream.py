"""Streams of JAX: its compute stream on a GPU, as `jax.experimental.buffer_callback` shows it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from rlx_driver.registry import registry

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rlx_driver.device import Device

__all__ = ["StreamServices", "compute_stream"]


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


class StreamServices:
    """The part of `JaxBackend` that has to do with streams."""

    if TYPE_CHECKING:

        def device_of(self, array: Any) -> Device: ...
        def jax_device(self, device: Device) -> Any: ...

    def gpu_stream(self, index: int) -> tuple[int | None, str]:
        """Give the raw handle of JAX's compute stream on a CUDA device, or None; and why."""
        try:
            device = jax.local_devices(backend="cuda")[index]
        except (RuntimeError, IndexError):
            return None, f"JAX does not run on cuda:{index}"
        return compute_stream(device)

    def wait_on_device(self, device: Device, event: Any) -> bool:
        """Make programs on a device come after an event; False where only the host can wait."""
        arrays = getattr(event, "arrays", None)
        if arrays is not None:  # JAX orders its own programs on one device
            return bool(arrays) and all(self.device_of(array) == device for array in arrays)
        if device.kind != "cuda" or event.device.kind != "cuda":
            return False
        streams = registry.get("torch").streams(device)  # type: ignore[attr-defined]
        theirs = streams.functional()
        if theirs is not None:
            streams.wait_event(theirs, event.native)
        return theirs is not None

    def stream(self, device: Device, *, side: bool = False, order: str | None = None) -> Any:
        """Give a stream that tracks arrays."""
        from rlx_driver.stream import JaxStream

        return JaxStream(device)

    def on_device(self, device: Device) -> AbstractContextManager[Any]:
        """Make a device the default for new arrays."""
        return jax.default_device(self.jax_device(device))
