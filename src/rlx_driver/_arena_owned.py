"""The memory behind an arena that is one array, which only its framework reaches."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._arena_values import bytes_of
from rlx_driver._ledger import ledger
from rlx_driver._owned import make_owned
from rlx_driver._slices import byte_size
from rlx_driver.errors import (
    ClosedHandleError,
    StaleViewError,
    UpdateFailedError,
    ZeroCopyError,
)
from rlx_driver.typed_io import read_typed_to_f32, write_typed_from_f32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlx_driver._owned import Owner
    from rlx_driver.access import Access
    from rlx_driver.backends.base import FunctionalBackend
    from rlx_driver.buffer import Buffer
    from rlx_driver.device import Device
    from rlx_driver.plan import MemoryPlan

__all__ = ["OwnedBytes", "require_going_on"]

_BYTE = np.dtype(np.uint8)


def require_going_on(label: str, end: str | None) -> None:
    """Raise when the memory of an arena came to its end while a call was on its way to it."""
    if end == "closed":
        raise ClosedHandleError(f"{label} is closed: make a new one")
    if end is not None:
        raise StaleViewError(
            f"{label} was reset or planned anew by another thread while this call was on its way: "
            "call again. Nothing was changed"
        )


def require_own_process(label: str, process: int) -> None:
    """Raise in a child that the process with this id has forked."""
    if os.getpid() != process:
        raise StaleViewError(
            f"{label} belongs to the parent process: after a fork neither JAX nor CUDA can order "
            "accesses in the child. Start children with the 'spawn' method"
        )


class OwnedBytes:
    """One byte array that only its framework reaches, as on TPU: read and written, not viewed.

    Each write donates the array, so that the memory stays where it is.
    """

    has_views = False

    def __init__(
        self, backend: FunctionalBackend, owner: Owner, device: Device, label: str, plan: MemoryPlan
    ) -> None:
        self.lock = threading.RLock()
        self._end: str | None = None
        self._process = os.getpid()
        self.backend = backend
        self._owner: Owner | None = owner
        self._device = device
        self._label = label
        self._room = plan.size

    @property
    def address(self) -> int:
        """Address of offset 0."""
        with self.lock:
            return self.backend.address(self._array)

    @property
    def _array(self) -> Any:
        """The array of now; the caller has the lock."""
        require_going_on(self._label, self._end)
        require_own_process(self._label, self._process)
        if not self.backend.trace_state_clean():
            raise StaleViewError(
                f"{self._label} was read or written inside a trace, which runs once and not at "
                f"every call: its memory is {self.backend.name}'s own, so do it outside. Nothing "
                "was changed"
            )
        assert self._owner is not None
        array = self._owner.lease.array
        if self.backend.is_dead(array):
            raise UpdateFailedError(
                f"{self._label} lost its memory to a write that failed: reset() makes it anew"
            )
        return array

    def slot(self, offset: int, dt: np.dtype[Any], shape: tuple[int, ...]) -> Buffer:
        """Refuse: there are no views of parts."""
        raise ZeroCopyError(
            f"{self._label} is one array of {self.backend.name} on {self._device}, which has no "
            "views of parts: use read() and write(), which change it in place"
        )

    def sees(self, offset: int, dt: np.dtype[Any], shape: tuple[int, ...]) -> bool:
        """Tell that there are no Buffers."""
        return False

    def put(self, offset: int, value: np.ndarray[Any, Any]) -> None:
        """Copy a host array to an offset; blocks until the array is free again."""
        with self.lock:
            array = self._array
            ledger.will_copy(value.nbytes, "arena.write")
            if value.nbytes:
                self._hold(self.backend.put(array, offset, bytes_of(value)))

    def _hold(self, array: Any) -> None:
        assert self._owner is not None
        self._owner.lease.array = array

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
            require_own_process(self._label, self._process)
            owner = self._owner
            assert owner is not None
            if plan.size > self._room or self.backend.is_dead(owner.lease.array):
                owner = make_owned(self.backend, self._device, (plan.size,), _BYTE)[2]
                room = plan.size
            else:
                array, room = self._array, self._room
                self._hold(self.backend.put(array, 0, np.zeros(array.shape, np.uint8)))
            fresh = OwnedBytes(self.backend, owner, self._device, self._label, plan)
            fresh._room = room
            self._end = "stale"
            return fresh

    def close(self, taken: list[Access]) -> None:
        """Give the memory up."""
        self._end = "closed"
        self._owner = None
