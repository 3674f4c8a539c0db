"""The memory behind an arena that is one array, which only its framework reaches."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._arena_values import bytes_of
from rlx_driver._ledger import ledger
from rlx_driver._owned import make_owned
from rlx_driver._slices import byte_size
from rlx_driver.errors import ZeroCopyError
from rlx_driver.typed_io import read_typed_to_f32, write_typed_from_f32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rlx_driver._owned import Owner
    from rlx_driver.access import Access
    from rlx_driver.backends.base import FunctionalBackend
    from rlx_driver.buffer import Buffer
    from rlx_driver.device import Device
    from rlx_driver.plan import MemoryPlan

__all__ = ["OwnedBytes"]

_BYTE = np.dtype(np.uint8)


class OwnedBytes:
    """One byte array that only its framework reaches, as on TPU: read and written, not viewed.

    Each write donates the array, so that the memory stays where it is.
    """

    has_views = False

    def __init__(
        self, backend: FunctionalBackend, owner: Owner, device: Device, label: str, plan: MemoryPlan
    ) -> None:
        self.lock = threading.RLock()
        self.backend = backend
        self._owner: Owner | None = owner
        self._device = device
        self._label = label
        self._room = plan.size

    @property
    def address(self) -> int:
        """Address of offset 0."""
        return self.backend.address(self._array)

    @property
    def _array(self) -> Any:
        assert self._owner is not None
        return self._owner.lease.array

    def slot(self, offset: int, dt: np.dtype[Any], shape: tuple[int, ...]) -> Buffer:
        """Refuse: there are no views of parts."""
        raise ZeroCopyError(
            f"{self._label} is one array of {self.backend.name} on {self._device}, which has no "
            "views of parts: use read() and write(), which change it in place"
        )

    def sees(self, offset: int, dt: np.dtype[Any], shape: tuple[int, ...]) -> bool:
        """Tell that there are no Buffers."""
        return False

    def native_view(self, buffer: Buffer) -> Callable[[], Any]:
        """Refuse; see `slot`."""
        raise NotImplementedError

    def whole(self) -> Buffer:
        """Refuse; see `slot`."""
        return self.slot(0, _BYTE, (0,))

    def put(self, offset: int, value: np.ndarray[Any, Any]) -> None:
        """Copy a host array to an offset; blocks until the array is free again."""
        ledger.will_copy(value.nbytes, "arena.write")
        if value.nbytes and self._owner is not None:
            with self.lock:
                lease = self._owner.lease
                lease.array = self.backend.put(lease.array, offset, bytes_of(value))

    def read(self, offset: int, dt: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Copy from an offset to the host."""
        nbytes = byte_size(shape, dt)
        ledger.will_copy(nbytes, "arena.read")
        with self.lock:
            part = self.backend.view(self._array, offset, (nbytes,), _BYTE)
        return self.backend.copy_out(part).view(dt).reshape(shape)

    def write_f32(self, offset: int, size: int, dt: np.dtype[Any], data: Any) -> int:
        """Convert float32 values on the host, as many as fit, and copy them."""
        raw = np.empty(size, np.uint8)
        count = write_typed_from_f32(raw, dt, data, size // dt.itemsize)
        self.put(offset, raw[: count * dt.itemsize])
        return count

    def read_f32(self, offset: int, size: int, dt: np.dtype[Any], count: int, out: Any) -> Any:
        """Copy to the host, and convert there."""
        raw = self.read(offset, _BYTE, (count * dt.itemsize,))
        return read_typed_to_f32(raw, dt, count, out)

    @contextmanager
    def exclusive(self) -> Iterator[list[Access]]:
        """Have the memory alone; there are no accesses."""
        with self.lock:
            yield []

    def renewed(self, plan: MemoryPlan, taken: list[Access]) -> OwnedBytes:
        """Give zeroed memory for a plan."""
        with self.lock:
            owner = self._owner
            if plan.size > self._room or owner is None:
                owner = make_owned(self.backend, self._device, (plan.size,), _BYTE)[2]
            else:
                zeros = np.zeros(owner.lease.array.shape, np.uint8)
                owner.lease.array = self.backend.put(owner.lease.array, 0, zeros)
            fresh = OwnedBytes(self.backend, owner, self._device, self._label, plan)
            fresh._room = max(self._room, plan.size)
            return fresh

    def close(self, taken: list[Access]) -> None:
        """Give the memory up."""
        self._owner = None
