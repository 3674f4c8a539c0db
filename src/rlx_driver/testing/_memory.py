"""The memory of a fake device: an address space far from the host's, of limited size."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlx_driver.backends.base import ALIGNMENT, require_memory
from rlx_driver.device import Device, MemoryInfo
from rlx_driver.errors import OutOfDeviceMemory

if TYPE_CHECKING:
    from rlx_driver.testing._stream import FakeStream, Mark

__all__ = ["AddressSpace", "Allocation", "LiveAllocation"]

_FIRST_ADDRESS = 0xFA4E << 40
_GARBAGE = 0xA5

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class LiveAllocation(NamedTuple):
    """Memory that something still holds.

    Attributes
    ----------
    device, address, nbytes
        Where it is, and how much.
    by_driver
        Whether the driver has asked for it, or a framework.
    """

    device: Device
    address: int
    nbytes: int
    by_driver: bool


class Allocation:
    """What arrays of one allocation hold: the memory is free when nobody does."""

    __slots__ = ("__weakref__", "address", "streams")

    def __init__(self, address: int, streams: set[FakeStream]) -> None:
        self.address = address
        self.streams = streams


@dataclass(frozen=True, slots=True)
class _Free:
    """Memory to be used again by work of the stream that had it first."""

    address: int
    memory: Bytes
    stream: FakeStream
    not_before: list[Mark]


class AddressSpace:
    """Allocates the memory of one device.

    As the allocators of CUDA do, it gives freed memory to later work of the stream that had it
    first, without waiting: work on other streams that still uses it must be made known.

    Parameters
    ----------
    device
        Whose.
    size
        Bytes in all.
    """

    def __init__(self, device: Device, size: int) -> None:
        self.device = device
        self.size = size
        self._live: dict[int, LiveAllocation] = {}
        self._free: list[_Free] = []
        self._next = _FIRST_ADDRESS + (device.index << 36)

    @property
    def live(self) -> list[LiveAllocation]:
        """What is still held."""
        return sorted(self._live.values())

    def info(self) -> MemoryInfo:
        """Give the statistics of the memory."""
        live = self.live
        used = sum(entry.nbytes for entry in live)
        driver = sum(entry.nbytes for entry in live if entry.by_driver)
        return MemoryInfo(self.size, self.size - used, driver)

    def allocate(
        self, nbytes: int, stream: FakeStream, *, by_driver: bool = False
    ) -> tuple[Allocation, Bytes]:
        """Allocate bytes with anything in them, to be used first by work on a stream.

        Raises
        ------
        OutOfDeviceMemory
            When there is not that much left.
        """
        info = self.info()
        require_memory(nbytes, info, self.device)
        if nbytes > info.free:
            raise OutOfDeviceMemory(
                f"{nbytes:,} bytes were asked for on {self.device}, which has {info.free:,} of "
                f"{info.total:,} free"
            )
        padded = max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
        address, memory = self._used_before(padded, stream) or self._fresh(padded)
        streams = {stream}
        allocation = Allocation(address, streams)
        self._live[address] = LiveAllocation(self.device, address, nbytes, by_driver)
        give_back = weakref.finalize(allocation, self._give_back, address, memory, stream, streams)
        give_back.atexit = False
        return allocation, memory[:nbytes]

    def _fresh(self, padded: int) -> tuple[int, Bytes]:
        address = self._next
        self._next += padded + ALIGNMENT
        return address, np.full(padded, _GARBAGE, np.uint8)

    def _used_before(self, padded: int, stream: FakeStream) -> tuple[int, Bytes] | None:
        stream.scheduler.run()  # past the marks that `_give_back` has set
        for free in reversed(list(self._free)):  # the last first, which shows mistakes soonest
            if (
                free.memory.size == padded
                and free.stream is stream
                and all(mark.is_passed for mark in free.not_before)
            ):
                self._free.remove(free)
                return free.address, free.memory
        return None

    def _give_back(
        self, address: int, memory: Bytes, first: FakeStream, streams: set[FakeStream]
    ) -> None:
        del self._live[address]
        later = [stream.mark_later("the last use") for stream in streams if stream is not first]
        self._free.append(_Free(address, memory, first, later))
