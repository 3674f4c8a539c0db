"""Transfers between host memory and a GPU in chunks, through pinned memory, with a cast on the way.

A *lane* is a chunk of pinned memory and the event after which it may be used again. While the GPU
fetches one lane, the host fills the next. Everything on the device is enqueued on one stream, the
caller's current one, so that order before and after needs no further thought; a cast takes a few
hundredths of the time of its chunk on the bus.

What is done by CUDA goes through `Engine`, of which tests have a slow one on the host.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rlx_driver.errors import OutOfDeviceMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["CudaEngine", "Engine", "Event", "Lane", "Pool", "pipeline", "pools", "reset"]

LANES = 3
"""Chunks in flight in one transfer."""
MOST_LANES = 12
"""Chunks of a device in all, so that a few threads can transfer at once."""
CHUNK = 8 << 20
"""Bytes of a chunk of pinned memory."""
DIRECT_CHUNK = 32 << 20
"""Bytes of float32 sent at once from memory that is pinned already: only the device needs room."""


class Event(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Block until the work before it is done."""


class Engine(Protocol):
    """The work of one stream of one device, done in the order in which it was asked for."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Allocate host memory that the device can reach, as uint8."""

    def scratch(self, nbytes: int) -> torch.Tensor:
        """Allocate device memory as uint8, for use on the stream."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy of equal shapes and dtypes."""

    def launch(self, work: Callable[..., object], *args: torch.Tensor) -> None:
        """Enqueue work on tensors of the device."""

    def record(self) -> Event:
        """Record an event."""


class CudaEngine:
    """The current stream of a CUDA device.

    Parameters
    ----------
    device
        The device; it is to be torch's current one while the engine is used.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.current_stream(device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Allocate page-locked memory, which outlives any mode of the caller."""
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def scratch(self, nbytes: int) -> torch.Tensor:
        """Allocate from torch's cache, for the current stream."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(
                f"{nbytes:,} bytes to convert in were asked for on {self.device}: {error}"
            ) from error

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy without waiting, as both are pinned or on the device."""
        target.copy_(source, non_blocking=True)

    def launch(self, work: Callable[..., object], *args: torch.Tensor) -> None:
        """Launch kernels."""
        work(*args)

    def record(self) -> Event:
        """Record an event that does not keep time."""
        event = torch.cuda.Event()
        event.record(self.stream)
        found: Event = event
        return found


class Lane:
    """A chunk of pinned memory.

    Attributes
    ----------
    memory
        The chunk, as uint8.
    busy
        The event after which the device no longer uses it; None when it is free.
    """

    __slots__ = ("busy", "memory")

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.busy: Event | None = None

    def wait(self) -> None:
        """Block until the device no longer uses it."""
        if self.busy is not None:
            self.busy.synchronize()
            self.busy = None


class Pool:
    """The lanes of one device: made on first use, kept, and never more than a bound.

    Parameters
    ----------
    chunk
        Bytes of a lane.
    most
        The bound.
    """

    def __init__(self, chunk: int = CHUNK, most: int = MOST_LANES) -> None:
        self.chunk = chunk
        self._room = most
        self._free: list[Lane] = []
        self._changed = threading.Condition()

    @contextmanager
    def lanes(self, engine: Engine, wanted: int = LANES) -> Iterator[list[Lane]]:
        """Take up to `wanted` lanes; blocks while other threads have all of them.

        Raises
        ------
        RuntimeError
            When not one can be allocated, and none is there to wait for.
        """
        taken = self._take(engine, wanted)
        try:
            yield taken
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()

    def _take(self, engine: Engine, wanted: int) -> list[Lane]:
        taken: list[Lane] = []
        with self._changed:
            while True:
                while self._free and len(taken) < wanted:
                    taken.append(self._free.pop())
                fresh = min(wanted - len(taken), self._room)
                self._room -= fresh
                if taken or fresh:
                    break
                self._changed.wait()
        made = 0
        try:
            for _ in range(fresh):
                taken.append(Lane(engine.pinned(self.chunk)))
                made += 1
        except RuntimeError:  # no more memory can be locked: fewer lanes do
            if not taken:
                raise
        finally:
            if made < fresh:
                with self._changed:
                    self._room += fresh - made
                    if not taken:
                        self._changed.notify_all()
        return taken

    def reset(self) -> None:
        """Free the lanes that no transfer uses now; blocks until the device is done with them."""
        with self._changed:
            free, self._free = self._free, []
        for lane in free:
            lane.wait()
        with self._changed:
            self._room += len(free)
            self._changed.notify_all()


pools: dict[int, Pool] = {}
_making = threading.Lock()


def pool_of(index: int) -> Pool:
    """Give the pool of a CUDA device."""
    found = pools.get(index)
    if found is None:
        with _making:
            found = pools.setdefault(index, Pool())
    return found


def reset() -> None:
    """Free the pinned memory that typed I/O keeps for later, of every device."""
    for pool in list(pools.values()):
        pool.reset()


Piece = tuple[int, int]
"""A part of a transfer: its first element and the one behind its last."""


def pieces(count: int, size: int) -> list[Piece]:
    """Divide `count` elements into parts of at most `size`."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def pipeline(
    parts: Sequence[Piece],
    lanes: Sequence[Lane],
    engine: Engine,
    begin: Callable[[Lane, Piece], None],
    finish: Callable[[Lane, Piece], None] | None = None,
) -> None:
    """Take every part through a lane, the lanes in turn.

    Parameters
    ----------
    parts
        What is to be done.
    lanes
        At least one; each has one part at a time.
    engine
        Gives the events.
    begin
        Called for a part when its lane is free: fills it and enqueues the work of the device.
    finish
        Called, in order, once the device is done with a part; without it nothing waits for the
        last parts, and their lanes stay busy.

    Notes
    -----
    When something fails, the device is done with every lane before the error is passed on, for
    work may be enqueued that reads or writes memory of the caller.
    """
    running: deque[tuple[Lane, Piece]] = deque()

    def complete() -> None:
        lane, part = running[0]
        lane.wait()
        running.popleft()
        if finish is not None:
            finish(lane, part)

    try:
        for position, part in enumerate(parts):
            lane = lanes[position % len(lanes)]
            if len(running) == len(lanes):
                complete()
            lane.wait()  # of an earlier transfer
            try:
                begin(lane, part)
            finally:
                lane.busy = engine.record()
            running.append((lane, part))
        if finish is not None:
            while running:
                complete()
    except BaseException:
        for lane in lanes:
            lane.wait()
        raise


def as_floats(memory: torch.Tensor) -> Any:
    """See bytes as float32."""
    return memory.view(torch.float32)
