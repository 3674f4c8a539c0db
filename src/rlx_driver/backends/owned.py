"""Memory of a device that only a functional framework can reach, such as a TPU with JAX.

Nothing sees it by its address, so what a Buffer holds there is not a view but the newest array of
a chain of donations, which stays where it is. NumPy and torch get copies, on purpose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rlx_driver.backends.base import ArrayFacts, Backend, FunctionalBackend, Obstacle
from rlx_driver.errors import DeviceUnavailableError, ZeroCopyError

if TYPE_CHECKING:
    from types import ModuleType

    from rlx_driver.access import Lease
    from rlx_driver.device import Device, MemoryInfo

__all__ = ["OwnedArray", "OwnedMemory"]


class OwnedArray:
    """The memory behind a lease, whichever array is the newest over it."""

    def __init__(self, lease: Lease, facts: ArrayFacts) -> None:
        self.lease = lease
        self.facts = facts

    def __setitem__(self, key: Any, value: Any) -> None:
        if key is not Ellipsis:
            raise ZeroCopyError("memory that is reached by one framework only has no parts")
        full = np.full(self.facts.shape, value, self.facts.dtype)
        self.lease.array = self.lease.backend.copy_in(self.lease.array, full)


class OwnedMemory(Backend):
    """The native side of such memory; it wraps the functional backend that owns it.

    Parameters
    ----------
    owner
        The backend whose framework allocates and updates the memory.
    """

    name: ClassVar[str] = "owned"
    packages: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = ()
    has_views: ClassVar[bool] = False

    def __init__(self, owner: FunctionalBackend) -> None:
        self._owner = owner

    def devices(self, kind: str) -> list[Device]:
        """List the devices of the owner."""
        return self._owner.devices(kind)

    def namespace(self) -> ModuleType:
        """Give the owner's namespace."""
        return self._owner.namespace()

    def owns(self, obj: Any) -> bool:
        """Tell whether an object stands for such memory."""
        return isinstance(obj, OwnedArray)

    def facts(self, array: OwnedArray) -> ArrayFacts:
        """Describe the memory."""
        return array.facts

    def memory(self, device: Device) -> MemoryInfo:
        """Give the memory statistics as the owner counts them."""
        return self._owner.memory(device)

    def allocate(self, device: Device, nbytes: int) -> Any:
        """Refuse: arrays are made whole by the owner."""
        raise DeviceUnavailableError(f"{self._owner.name} makes whole arrays on {device}, no bytes")

    def view(self, memory: Any, byte_offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """Refuse: there are no parts."""
        raise DeviceUnavailableError(f"{self._owner.name} has no views of bytes")

    def copy_in(self, destination: OwnedArray, source: np.ndarray[Any, Any]) -> None:
        """Replace the value by a host array, in its own memory."""
        lease = destination.lease
        lease.array = self._owner.copy_in(lease.array, source)

    def copy_out(self, array: OwnedArray) -> np.ndarray[Any, Any]:
        """Copy the value to new host memory; blocks until it is there."""
        return self._owner.copy_out(array.lease.array)

    def copy_across(self, destination: OwnedArray, source: Any) -> None:
        """Replace the value by another array of the owner, in its own memory."""
        lease = destination.lease
        value = source.lease.array if isinstance(source, OwnedArray) else source
        lease.array = self._owner.copy_across(lease.array, value)

    def obstacle(self, facts: ArrayFacts) -> Obstacle | None:
        """Nothing else can be shared with it."""
        return Obstacle(
            "device", f"only {self._owner.name} reaches {facts.device}", "copy it (copy_from)"
        )

    def share(self, array: Any, facts: ArrayFacts) -> Any:
        """Refuse; see `obstacle`."""
        raise ZeroCopyError(str(self.obstacle(facts)))

    def duplicate(self, array: OwnedArray) -> Any:
        """Copy the value into a new array of the owner."""
        return self._owner.duplicate(array.lease.array)

    def index(self, view: OwnedArray, key: Any) -> Any:
        """Refuse slices: arrays of the owner have no parts."""
        if key is Ellipsis:
            return view
        raise ZeroCopyError(
            f"memory on {view.facts.device} has no parts: slice the array that "
            f"{self._owner.name}() gives"
        )
