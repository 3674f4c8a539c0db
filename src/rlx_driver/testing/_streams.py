"""What the driver asks of the streams of a fake device, and its command streams."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from rlx_driver._ledger import ledger
from rlx_driver.backends.stream_order import Sharing, Streams, Way
from rlx_driver.errors import StreamError
from rlx_driver.registry import registry
from rlx_driver.stream import TorchStream
from rlx_driver.testing._machine import COMPUTE, STAGING
from rlx_driver.testing._memory import Allocation
from rlx_driver.testing._stream import FakeEvent, FakeStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlx_driver.device import Device
    from rlx_driver.testing._machine import Machine

__all__ = ["FakeCommandStream", "FakeStreams", "StreamsMixin"]

_forced: ContextVar[Way | None] = ContextVar("rlx_driver_fake_order", default=None)


class FakeStreams(Streams):
    """The streams of one fake device; a key is the `FakeStream` itself."""

    def __init__(self, machine: Machine, device: Device) -> None:
        self._machine = machine
        self._device = device
        self.current = functools.partial(machine.scheduler.current, device)

    def sharing(self, *, load: bool = False) -> Sharing:
        """Say how the two frameworks are ordered, once the functional one is in use."""
        if not load and self._machine.functional_name not in registry.loaded:
            return Sharing(None, None, "the functional framework is not in use")
        if self._machine.way is Way.HOST:
            return Sharing(Way.HOST, None, "the fake device hides its compute stream")
        compute = self._machine.stream(self._device, COMPUTE)
        return Sharing(self._machine.way, compute, "the fake device shows its compute stream")

    def adopted(self, wanted: Way | None) -> FakeStream | None:
        """Give the compute stream, where the native framework is to run on it."""
        sharing = self.sharing(load=True)
        shared = (wanted or sharing.way) is Way.SHARED
        return sharing.stream if shared else None

    def explain(self) -> str:
        """Say which way is in force, and why."""
        return str(self.sharing(load=True))

    def functional(self) -> FakeStream | None:
        """Give the compute stream; None where the host is to wait."""
        return None if _forced.get() is Way.HOST else self.sharing().stream

    def record(self, stream: Any, event: Any = None) -> FakeEvent:
        """Record an event on a stream."""
        recorded: FakeEvent = stream.record_event(event)
        return recorded

    def wait_event(self, stream: Any, event: Any) -> None:
        """Make a stream wait for an event."""
        stream.wait_event(event)

    def wait_result(self, stream: Any, array: Any) -> None:
        """Make a stream wait for the value of a functional array."""
        stream.wait_mark(array.definition.mark)

    def synchronize(self, event: Any) -> None:
        """Make the host wait for an event."""
        event.synchronize()

    @contextmanager
    def host_copies(self) -> Iterator[FakeStream]:
        """Make the stream for copies to the host the current one."""
        with self._machine.stream(self._device, STAGING) as staging:
            yield staging

    def uses(self, memory: Any, stream: Any) -> None:
        """Keep memory from being used again before a stream has come to its end."""
        if isinstance(memory._owner, Allocation):
            memory._owner.streams.add(stream)


class StreamsMixin:
    """The part of the native backend that `TorchStream` is made of."""

    _numbers = itertools.count(1)

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._streams = {device: FakeStreams(machine, device) for device in machine.devices}
        self._kept: deque[tuple[FakeEvent, tuple[Any, ...]]] = deque()

    def streams(self, device: Device) -> FakeStreams:
        """Give the streams of a device."""
        return self._streams[device]

    def stream(
        self, device: Device, *, side: bool = False, order: str | None = None
    ) -> FakeCommandStream:
        """Give a command stream; without options, in the way that the device shares."""
        return FakeCommandStream(device, self, side=side, order=order)

    def new_stream(self, device: Device) -> FakeStream:
        """Make a stream."""
        return self._machine.stream(device, f"stream {next(self._numbers)}")

    @contextmanager
    def using_stream(self, stream: FakeStream, order: Way | None) -> Iterator[None]:
        """Make a stream the current one, and a way of ordering the one in force."""
        token = _forced.set(order or _forced.get())
        try:
            with stream:
                yield
        finally:
            _forced.reset(token)

    @staticmethod
    def way_of(name: str | None) -> Way | None:
        """Give the way that a user names."""
        try:
            return Way(name) if name else None
        except ValueError:
            known = ", ".join(repr(way.value) for way in Way)
            raise StreamError(f"{name!r} is no way to order; known are {known}") from None

    def sharing(self, device: Device, wanted: Way | None, *, adopts: bool) -> Sharing:
        """Say how the frameworks are ordered under a stream."""
        found = self.streams(device).sharing(load=True)
        if found.way is Way.HOST:
            return found
        if wanted is not None:
            return Sharing(wanted, found.stream, "asked for by order=")
        if not adopts and found.way is Way.SHARED:
            return Sharing(Way.EVENTS, found.stream, "a stream apart from the compute stream")
        return found

    def order_after(self, device: Device, stream: FakeStream, array: Any) -> None:
        """Make a stream wait for a functional array, on the device where it can."""
        streams = self.streams(device)
        theirs = streams.functional()
        if theirs is None:
            ledger.count_host_wait()
            array.block_until_ready()
        elif stream is not theirs:
            streams.wait_result(stream, array)

    def synchronize(self, device: Device, stream: FakeStream) -> None:
        """Make the host wait for a stream."""
        stream.synchronize()
        self.keep_alive()

    def device_of_stream(self, stream: Any) -> Device | None:
        """Tell whose stream an object is; None for any other object."""
        return stream.device if isinstance(stream, FakeStream) else None

    def record_event(self, stream: FakeStream, *, timing: bool = True) -> FakeEvent:
        """Record an event on a stream."""
        return stream.record_event()

    def wait_event(self, stream: FakeStream, event: FakeEvent | FakeStream) -> None:
        """Make a stream wait for an event, or for all of another stream."""
        if isinstance(event, FakeStream):
            stream.wait_stream(event)
        else:
            stream.wait_event(event)

    def keep_alive(self, event: FakeEvent | None = None, *objects: Any) -> None:
        """Keep objects until an event is reached, and let go of those whose event is."""
        if event is not None:
            self._kept.append((event, objects))
        self._kept = deque(kept for kept in self._kept if not kept[0].query())


class FakeCommandStream(TorchStream):
    """A command stream of a fake device: that of CUDA, over fake streams."""

    def __init__(
        self, device: Device, backend: StreamsMixin, *, side: bool, order: str | None
    ) -> None:
        super(TorchStream, self).__init__(device)
        self._backend = backend
        self._order = backend.way_of(order)
        self._adopts = not side
        self._stream = None
        if side or self._adopted() is None:
            if self._order is Way.SHARED:
                raise StreamError(f"one stream for both frameworks cannot be had: {self.sharing}")
            self._stream = backend.new_stream(device)
