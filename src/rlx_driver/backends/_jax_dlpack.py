"""JAX's importer and exporter of DLPack, at the cost of the call and not of the checks around it.

The public functions cost 20 us and 3 us, the two private ones that they end in 3 us and 0.3 us.
They are probed once; the public functions stay the way round.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PrivateDlpack", "probe"]


class PrivateDlpack(NamedTuple):
    """The two private functions, probed to do what the public ones do."""

    import_capsule: Callable[[Any, Any, bool | None], Any]
    """Takes (host capsule, JAX CPU device, copy); True aliases for donation, as fact 5 has it."""
    export: Callable[[Any], Any]
    """Takes a single-device array; waits for it, and gives an unversioned capsule."""


def probe(native: Any = None) -> PrivateDlpack | None:
    """Find the private functions and try them on memory; None when anything is unexpected."""
    try:
        if native is None:
            native = importlib.import_module("jax._src.lib")._jax
        device = jax.devices("cpu")[0]

        def import_capsule(capsule: Any, device: Any, copy: bool | None) -> Any:
            return native.dlpack_managed_tensor_to_buffer(capsule, device, None, copy, 1)

        def export(array: Any) -> Any:
            return native.buffer_to_dlpack_managed_tensor(array, stream=None)

        raw = np.zeros(256, np.uint8)
        start = -raw.__array_interface__["data"][0] % 64
        source = raw[start : start + 64].view(np.float32)
        for copy in (None, True):
            array = import_capsule(source.__dlpack__(), device, copy)
            source[0] += 1
            if not _shows(array, source):
                return None
        exported = jnp.arange(4.0)
        back = import_capsule(export(exported), device, None)
        if back.unsafe_buffer_pointer() != exported.unsafe_buffer_pointer():
            return None
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return PrivateDlpack(import_capsule, export)


def _shows(array: Any, source: np.ndarray[Any, Any]) -> bool:
    return bool(
        isinstance(array, jax.Array)
        and array.unsafe_buffer_pointer() == source.__array_interface__["data"][0]
        and array.dtype == source.dtype
        and np.array_equal(np.asarray(array), source)
    )
