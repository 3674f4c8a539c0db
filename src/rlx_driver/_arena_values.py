"""What an arena is given: arrays of any framework, Buffers, Python numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._exchange import exchange
from rlx_driver.buffer import Buffer
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["as_value", "bytes_of", "native_accessor", "on_host"]


def as_value(x: Any) -> tuple[Any, np.dtype[Any], tuple[int, ...]]:
    """Give a value as something that `Buffer.copy_from` takes, its dtype and its shape."""
    if isinstance(x, Buffer):
        return x, x.dtype, x.shape
    backend = registry.for_array(x)
    if backend is None and not hasattr(x, "__dlpack__"):
        x = np.asarray(x)
        backend = registry.get("numpy")
    if backend is None:
        x = exchange(x, "numpy", copy=None)
        backend = registry.get("numpy")
    facts = backend.facts(x)
    if facts.obstacle is not None:
        # Whatever it is, an exchange says so in its own words, or makes an array without it.
        x = exchange(x, backend.name, copy=True)
        facts = backend.facts(x)
    return x, facts.dtype, facts.shape


def on_host(value: Any) -> np.ndarray[Any, Any]:
    """Copy or share a value as a host array."""
    if isinstance(value, Buffer):
        return value.numpy() if value.device.is_host else value.to_host().numpy()
    result: np.ndarray[Any, Any] = exchange(value, "numpy", copy=None)
    return result


def bytes_of(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Give the elements of a host array in C order, as bytes; copies where they are not."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def native_accessor(buffer: Buffer) -> Callable[[], Any]:
    """Give what gives a Buffer as an array of the framework that owns its memory."""
    name = buffer._backend.name
    known = {"numpy": buffer.numpy, "torch": buffer.torch}
    return known.get(name) or (lambda: buffer.array(name))
