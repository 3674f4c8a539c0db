"""Making memory that a functional framework owns, and what keeps it alive."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlx_driver.access import Lease
from rlx_driver.backends.base import (
    ArrayFacts,
    FunctionalBackend,
    accounting,
    row_major_strides,
)
from rlx_driver.errors import DeviceUnavailableError, ZeroCopyError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    import numpy as np

    from rlx_driver.backends.base import Backend
    from rlx_driver.device import Device

__all__ = ["Owner", "make_owned", "owning_backend"]


class Owner:
    """Keeps memory of a functional framework alive: the newest array of the chain of donations."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.remains: Any = None  # a failed result that still holds the memory


def owning_backend(device: Device, name: str | None) -> Backend:
    """Give the backend whose framework owns memory on a device; None: the device's native one.

    Raises
    ------
    DeviceUnavailableError
        When that framework does not see the device.
    """
    if name is None:
        return device.backend
    backend = registry.get(name)
    if device not in backend.devices(device.kind):
        raise DeviceUnavailableError(f"{backend.name} does not see {device}")
    return backend


def make_owned(
    backend: FunctionalBackend, device: Device, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[Any, Backend, Owner]:
    """Allocate zero bytes that a framework owns: the native array, its backend, and the owner.

    Raises
    ------
    ZeroCopyError
        When the framework would make something else of the dtype (x64 off, sub-byte dtypes).

    Notes
    -----
    On the host the native array is a NumPy view by address, which keeps the owner alive. Elsewhere
    only the framework reaches the memory.
    """
    wanted = ArrayFacts(0, shape, row_major_strides(shape, dtype.itemsize), dtype, device)
    if (obstacle := backend.lease_obstacle(wanted)) is not None:
        raise ZeroCopyError(f"{backend.name} cannot own {dtype.name}{list(shape)}: {obstacle}")
    array = backend.owned(device, shape, dtype)
    if tuple(array.shape) != shape or array.dtype != dtype:
        raise ZeroCopyError(
            f"{backend.name} was asked for {dtype.name}{list(shape)} and made "
            f"{array.dtype}{list(array.shape)}"
        )
    lease = Lease(backend, backend.address(array) if array.size else 0)
    lease.array = array
    owner = Owner(lease)
    accounting.add(device, array.nbytes, owner)
    if device.is_host:
        from rlx_driver.backends.numpy import array_at

        return array_at(lease.address, shape, dtype, owner), registry.get("numpy"), owner
    from rlx_driver.backends.owned import OwnedArray, OwnedMemory

    facts = replace(wanted, address=lease.address)
    return OwnedArray(lease, facts), OwnedMemory(backend), owner
