"""How much memory the driver holds, who made it, and the refusal of what could never fit."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from rlx_driver.errors import OutOfDeviceMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rlx_driver.device import Device, MemoryInfo

__all__ = ["Allocation", "Count", "Counter", "Pool", "accounting", "require_memory"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_UNSETTLED_LIMIT = 4096
"""Events that may wait for somebody to look at the counters."""


class Count(NamedTuple):
    """What a `Counter` says at one moment."""

    current: int = 0
    peak: int = 0
    allocations: int = 0


class Counter:
    """Bytes alive of a device or of a part of it, the most there were, and how many allocations."""

    __slots__ = ("allocations", "current", "peak")

    def __init__(self) -> None:
        self.current = self.peak = self.allocations = 0

    def apply(self, nbytes: int, allocations: int) -> None:
        """Count the bytes of a new allocation, or, negative ones, the end of one."""
        self.current = current = self.current + nbytes
        self.allocations += allocations
        if current > self.peak:
            self.peak = current


class Pool:
    """Memory that is counted together: of a region, of an arena, or of all Buffers of a device."""

    __slots__ = ("counter", "device", "kind", "label")

    def __init__(self, kind: str, label: str, device: Device) -> None:
        self.kind = kind
        self.label = label
        self.device = device
        self.counter = Counter()


class Allocation(weakref.ref[Any]):
    """One allocation of the driver, as long as it is alive: a weak reference to what keeps it.

    Attributes
    ----------
    device, nbytes
        Where, and how many bytes.
    counter
        That of its device.
    makers, pool
        Who made it, and where it is counted beside its device, once somebody has claimed it.
    """

    __slots__ = ("counter", "device", "makers", "nbytes", "pool")

    device: Device
    nbytes: int
    counter: Counter
    makers: Sequence[Any]
    pool: Pool | None

    def claim(self, makers: Sequence[Any], pool: Pool) -> None:
        """Say who made it, and count it there too; the caller holds its memory."""
        self.makers = makers
        self.pool = pool
        accounting.events.append((pool.counter, None, self.nbytes, 1))


class _Thread(threading.local):
    made: list[Allocation] | None = None


class _Accounting:
    """Bytes that the driver has allocated on each device and that are still alive.

    What happens is noted in a queue, which takes no lock, because memory is let go whenever the
    garbage collector likes, in the middle of anything. Whoever reads a counter settles the queue.
    Its order is that of the events, so a peak is exact across threads.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._settling = False
        # (counter, pool, bytes, allocations); whoever claims an allocation adds to it.
        self.events: deque[tuple[Counter, Pool | None, int, int]] = deque()
        self._counters: dict[Device, Counter] = {}
        self._live: dict[int, Allocation] = {}
        self._thread = _Thread()

    def add(self, device: Device, nbytes: int, owner: object) -> Allocation:
        """Count an allocation until its owner is collected.

        Parameters
        ----------
        device, nbytes
            Where, and how many bytes.
        owner
            What every array over the memory keeps alive; weakly referenced.
        """
        counter = self._counters.get(device) or self._counters.setdefault(device, Counter())
        allocation = Allocation(owner, self._gone)
        allocation.device = device
        allocation.nbytes = nbytes
        allocation.counter = counter
        allocation.makers = ()
        allocation.pool = None
        self._live[id(allocation)] = allocation
        events = self.events
        events.append((counter, None, nbytes, 1))
        if len(events) > _UNSETTLED_LIMIT:
            self.settle()
        if (made := self._thread.made) is not None:
            made.append(allocation)
        return allocation

    def _gone(self, allocation: Allocation) -> None:
        self._live.pop(id(allocation), None)
        self.events.append((allocation.counter, allocation.pool, -allocation.nbytes, 0))

    def record(
        self, make: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> tuple[_T, list[Allocation]]:
        """Call a function; give its result, and what this thread allocated in it."""
        thread = self._thread
        outer = thread.made
        made: list[Allocation] = []
        thread.made = made
        try:
            return make(*args, **kwargs), made
        finally:
            thread.made = outer

    def settle(self) -> None:
        """Bring the counters up to date."""
        with self._lock:
            if self._settling:
                return  # called by what a garbage collection runs in the middle of the loop below
            self._settling = True
            try:
                events = self.events
                while events:
                    counter, pool, nbytes, allocations = events.popleft()
                    counter.apply(nbytes, allocations)
                    if pool is not None:
                        pool.counter.apply(nbytes, allocations)
            finally:
                self._settling = False

    def in_use(self, device: Device) -> int:
        """Give the bytes alive on a device."""
        self.settle()
        counter = self._counters.get(device)
        return 0 if counter is None else counter.current

    def counts(self) -> dict[Device, Count]:
        """Tell of all devices that ever had an allocation."""
        with self._lock:
            self.settle()
            found = list(self._counters.items())
            return {device: Count(c.current, c.peak, c.allocations) for device, c in found}

    def live(self) -> list[Allocation]:
        """List the allocations that something still holds."""
        return list(self._live.values())

    def reset_peaks(self, device: Device | None, pools: Iterable[Pool]) -> None:
        """Let the peaks of a device (None: of all) and of some pools begin anew, at what is now."""
        with self._lock:
            self.settle()
            devices = [c for d, c in list(self._counters.items()) if device in (None, d)]
            for counter in [*devices, *(pool.counter for pool in pools)]:
                counter.peak = counter.current


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
