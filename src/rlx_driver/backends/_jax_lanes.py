"""The fast ways of everyday arrays into JAX and out of it, each with its checks."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rlx_driver.backends._jax_arrays import EVERYDAY, HOST_ALIGNMENT, SHARED, WIDE
from rlx_driver.backends._numpy_pointer import pointer
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Lanes"]


class Lanes:
    """The part of `JaxBackend` that `exchange` takes for everyday arrays."""

    if TYPE_CHECKING:
        _private: Any
        _cpu: Any
        _host_only: bool

    def lane_from(self, source: str) -> Callable[[Any], Any] | None:
        """Give the fast way in for compact, aligned NumPy arrays and host tensors."""
        if self._private is None:
            return None
        if source == "numpy":
            return self._array_of_numpy
        if source == "torch":
            give = getattr(registry.get("torch"), "fast_export", None)
            return None if give is None else functools.partial(self._array_of_tensor, give())
        return None

    def lane_to(self, target: str) -> Callable[[Any], Any] | None:
        """Give the fast way out to NumPy, where JAX has no device but the host."""
        return _numpy_of_array if target == "numpy" and self._host_only else None

    def fast_export(self) -> Callable[[Any], Any] | None:
        """Give the private exporter of host arrays, where JAX has no device but the host."""
        return None if self._private is None or not self._host_only else self._private.export

    def _array_of_numpy(self, array: np.ndarray[Any, Any]) -> Any | None:
        address = pointer(array)
        if (
            address % HOST_ALIGNMENT
            or not array.flags.carray
            or array.dtype not in EVERYDAY
            or type(array) is not np.ndarray
        ):
            return None
        return self._array_of(array.__dlpack__(), array, address, array.dtype)

    def _array_of_tensor(self, export: Callable[[Any], Any], tensor: Any) -> Any | None:
        found = export(tensor)
        if found is None:
            return None
        capsule, address, dtype = found
        if address % HOST_ALIGNMENT or dtype not in SHARED:
            return None
        return self._array_of(capsule, tensor, address, dtype)

    def _array_of(self, capsule: Any, source: Any, address: int, dtype: np.dtype[Any]) -> Any:
        if (dtype in WIDE and not jax.config.jax_enable_x64) or 0 in source.shape:
            return None
        shared = self._private.import_capsule(capsule, self._cpu, None)
        if (
            shared.unsafe_buffer_pointer() == address
            and shared.shape == source.shape
            and shared.dtype == dtype
        ):
            return shared
        return None


def _numpy_of_array(array: Any) -> np.ndarray[Any, Any] | None:
    if array.dtype not in EVERYDAY:
        return None
    view = np.asarray(array)  # waits, so that asking for the address below is safe
    if (
        array.unsafe_buffer_pointer() == pointer(view)
        and view.dtype == array.dtype
        and view.shape == array.shape
        and view.flags.c_contiguous
        and view.size
    ):
        return view
    return None
