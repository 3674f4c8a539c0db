"""How much memory the driver holds, and the refusal of what could never fit."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING

from rlx_driver.errors import OutOfDeviceMemory

if TYPE_CHECKING:
    from rlx_driver.device import Device, MemoryInfo

__all__ = ["accounting", "require_memory"]


class _Accounting:
    """Bytes that the driver has allocated on each device and that are still alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_use: Counter[Device] = Counter()

    def add(self, device: Device, nbytes: int, owner: object) -> None:
        """Count an allocation until its owner is collected."""
        with self._lock:
            self._in_use[device] += nbytes
        weakref.finalize(owner, self._release, device, nbytes).atexit = False

    def _release(self, device: Device, nbytes: int) -> None:
        with self._lock:
            self._in_use[device] -= nbytes

    def in_use(self, device: Device) -> int:
        """Give the bytes alive on a device."""
        return self._in_use[device]


accounting = _Accounting()
"""Allocation statistics of this process."""


def require_memory(nbytes: int, info: MemoryInfo, device: Device) -> None:
    """Refuse an allocation that the device could never hold.

    Raises
    ------
    OutOfDeviceMemory
        When `nbytes` exceeds the device's total memory.
    """
    if nbytes > info.total:
        raise OutOfDeviceMemory(
            f"{nbytes:,} bytes were asked for on {device}, which has {info.total:,} in all "
            f"({info.free:,} free, {info.in_use:,} in use by the driver); ask for less"
        )
