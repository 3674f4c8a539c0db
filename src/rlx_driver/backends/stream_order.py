"""Order of work on one piece of memory, on a device whose frameworks enqueue it on streams.

The native framework (torch) has streams, one of them current; the functional one (JAX) runs its
programs on a stream of its own, or on the very same. `StreamOrder` remembers which streams have
written the memory and which have read it since, and makes a stream wait, on the device, for those
it has to come after. What a stream and an event are is the business of a `Streams`.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from threading import get_ident
from typing import TYPE_CHECKING, Any, ClassVar

from rlx_driver._ledger import ledger
from rlx_driver.backends.base import Order
from rlx_driver.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from rlx_driver.backends.base import Recording

__all__ = ["Sharing", "StreamOrder", "Streams", "Way"]

_NOWHERE = object()


class Way(StrEnum):
    """How the work of two frameworks on one device is ordered, the cheapest first."""

    SHARED = "shared"
    """Both enqueue on one stream."""
    EVENTS = "events"
    """Each one's stream waits for events of the other's, on the device."""
    HOST = "host"
    """The host waits for one before it lets the other go on."""

    @property
    def words(self) -> str:
        """The way in words."""
        return {"shared": "shared stream", "events": "device events", "host": "host waits"}[self]


@dataclass(frozen=True, slots=True)
class Sharing:
    """How two frameworks are ordered on one device, and why.

    Attributes
    ----------
    way
        None while only one of them is in use.
    stream
        The functional framework's stream, where it shows it.
    reason
        Why this way.
    """

    way: Way | None
    stream: Any
    reason: str

    def __str__(self) -> str:
        return f"{'no sharing' if self.way is None else self.way.words} ({self.reason})"


class Streams(ABC):
    """The streams of one device; a stream is named by a hashable key, `==` meaning the same one."""

    _kept: tuple[tuple[Any, Any], ...] = ()

    current: Callable[[], Hashable]
    """Gives the native framework's current stream. An attribute, for it is on the hot path."""

    @abstractmethod
    def functional(self) -> Hashable | None:
        """Give the stream on which the functional framework runs programs; None when hidden.

        Where it is hidden the host has to wait.
        """

    @abstractmethod
    def record(self, stream: Hashable, event: Any = None) -> Any:
        """Give an event for what is enqueued on a stream now; may record an old one anew.

        Its ``query()`` tells whether it is done.
        """

    @abstractmethod
    def wait_event(self, stream: Hashable, event: Any) -> None:
        """Make a stream wait for an event, on the device."""

    @abstractmethod
    def wait_result(self, stream: Hashable, array: Any) -> None:
        """Make a stream wait for the value of a functional array, on the device."""

    @abstractmethod
    def synchronize(self, event: Any) -> None:
        """Make the host wait for an event."""

    def keep(self, stream: Hashable, *objects: Any) -> None:
        """Keep objects until what a stream holds now is done."""
        self.let_go()
        self._kept = (*self._kept, (self.record(stream), objects))

    def let_go(self) -> None:
        """Let go of what was kept for work that is done."""
        if self._kept:
            self._kept = tuple(entry for entry in self._kept if not entry[0].query())

    @abstractmethod
    def host_copies(self) -> AbstractContextManager[Hashable]:
        """Make a stream for copies to the host the current one."""

    def uses(self, memory: Any, stream: Hashable) -> None:  # noqa: B027 - most need no telling
        """Tell the allocator that a stream uses memory, which it may then not reuse too early."""

    def recording(self) -> Recording | None:
        """Give the capture of a graph that the calling thread is in."""
        return None

    def explain(self) -> str:
        """Say in words how frameworks are ordered here."""
        return "host waits" if self.functional() is None else "each stream waits for the other"


class StreamOrder(Order):
    """Orders the accesses of one buffer family on one device with streams.

    Parameters
    ----------
    streams
        The device's.
    memory
        The native array; work enqueued on the current stream may still be filling it.
    """

    synchronous: ClassVar[bool] = False

    def __init__(self, streams: Streams, memory: Any) -> None:
        self._streams = streams
        self._memory = weakref.ref(memory)
        here = streams.current()
        self._known = {here}
        self._begun: dict[int, Hashable] = {}  # by thread: where native work begins that ends later
        # Streams to come after, each with its event; None: a view is out on that stream, and what
        # counts is all that it holds at the time of the next access.
        self._writes: dict[Hashable, Any] = {here: streams.record(here)}
        self._reads: dict[Hashable, Any] = {}
        self._view_out = False
        # The streams on which a native access, and a functional one, has nothing to wait for; and
        # the one on which views may be in use without another word to us.
        self._settled_on: Any = _NOWHERE
        self._shared_on: Any = _NOWHERE
        self._in_use_on: Any = _NOWHERE
        self._refresh()

    def explain(self) -> str:
        """Say in words how frameworks are ordered here."""
        return self._streams.explain()

    def recording(self) -> Recording | None:
        """Give the capture that the calling thread is in."""
        return self._streams.recording()

    def is_settled(self) -> bool:
        """Tell whether native work on the current stream comes after everything by itself."""
        return bool(self._streams.current() == self._settled_on)

    def is_shared(self) -> bool:
        """Tell whether the current stream is the functional one, and nothing is elsewhere."""
        return bool(self._streams.current() == self._shared_on)

    def before_native(
        self, pending: Callable[[], None], result: Any | None, *, writes: bool = True
    ) -> bool:
        """Make the current stream wait for a functional result and for other streams."""
        streams = self._streams
        here = streams.current()
        self._begun[get_ident()] = here
        if here == self._settled_on:
            return False
        finished = False
        if result is not None:
            theirs = streams.functional()
            if theirs is None:
                pending()
                finished = True
            elif here != theirs:
                streams.wait_result(here, result)
        self._join(here, writes)
        return finished

    def after_native(self, *, wrote: bool = True) -> None:
        """Remember what the current stream holds now as a write, or a read, of this memory."""
        here = self._streams.current()
        begun = self._begun.pop(get_ident(), here)
        if here == begun == self._shared_on and self._view_out:
            return  # views in use there make later accesses wait for all of that stream anyway
        if begun != here:
            self._streams.wait_event(here, self._streams.record(begun))
            self._join(here, wrote)
        members = self._writes if wrote else self._reads
        event = self._streams.record(here, members.get(here))
        if wrote:
            self._written_by({here: event})
        else:
            self._reads[here] = event
            self._refresh()

    def view_out(self) -> None:
        """Note that a view went out: whatever the current stream holds later may use it."""
        here = self._streams.current()
        self._view_out = True
        self._written_by({here: None})

    def before_functional(self, *, writes: bool = True) -> None:
        """Make the functional framework's stream, or the host, wait for native work."""
        streams = self._streams
        if streams.recording() is not None:
            raise CaptureError(
                "JAX work was asked for inside a capture, and a CUDA graph records torch work "
                "only: do it before or after the capture, or between replays. Nothing was changed"
            )
        here = streams.current()
        if here == self._shared_on:
            return
        theirs = streams.functional()
        if theirs is None:
            self._finish(here)
        else:
            self._join(theirs, writes)
            if self._view_out and here != theirs:
                streams.wait_event(theirs, streams.record(here))
        if theirs is None:
            self._written_by({})  # all of it is done
        else:
            self._refresh()

    def functional_wrote(self) -> None:
        """Note a program that writes, and that came after all there was."""
        self._written_by({})

    def keep(self, *objects: Any) -> None:
        """Keep memory of the functional framework that the current stream reads.

        Its allocator takes memory back for its own stream, and knows of no other.
        """
        here = self._streams.current()
        if here != self._streams.functional():
            self._streams.keep(here, *objects)

    def wait_result(self, array: Any, pending: Callable[[], None]) -> None:
        """Make the current stream wait for a functional array, and later writers for that."""
        theirs, here = self._streams.functional(), self._streams.current()
        if theirs is None:
            pending()
            return
        if here != theirs:
            self._streams.wait_result(here, array)
        self._reads[here] = self._streams.record(here, self._reads.get(here))
        self._refresh()

    @contextmanager
    def for_host(self, pending: Callable[[], None], result: Any | None) -> Iterator[None]:
        """Enter a stream that comes after the producers of this memory, and after nothing else."""
        streams = self._streams
        if self._view_out:  # its holders may have written on the current stream
            self.before_native(pending, result, writes=False)
            yield
            return
        with streams.host_copies() as copies:
            if result is not None:
                if streams.functional() is None:
                    pending()
                else:
                    streams.wait_result(copies, result)
            self._wait_for(copies, self._writes)
            yield

    def _join(self, stream: Hashable, writes: bool) -> None:
        """Make a stream come after the writes, and for a write after the reads."""
        if stream not in self._known:
            self._known.add(stream)
            if (memory := self._memory()) is not None:
                self._streams.uses(memory, stream)
        self._wait_for(stream, self._writes)
        if writes:
            self._wait_for(stream, self._reads)
        if self._in_use_on is not _NOWHERE and self._in_use_on != stream:
            self._streams.wait_event(stream, self._streams.record(self._in_use_on))

    def _wait_for(self, stream: Hashable, members: dict[Hashable, Any]) -> None:
        for other, event in members.items():
            if other != stream:
                self._streams.wait_event(stream, event or self._streams.record(other))

    def _finish(self, here: Hashable) -> None:
        """Make the host wait for all native work that may use the memory."""
        streams = self._streams
        events = [event or streams.record(s) for s, event in (self._writes | self._reads).items()]
        if self._view_out:
            events.append(streams.record(here))
        if events:
            ledger.count_host_wait()
        for event in events:
            streams.synchronize(event)

    def _written_by(self, writers: dict[Hashable, Any]) -> None:
        """Start anew from a write that came after everything else."""
        self._writes, self._reads = writers, {}
        self._in_use_on = _NOWHERE
        self._refresh()

    def _refresh(self) -> None:
        self._streams.let_go()
        theirs = self._streams.functional()
        members = self._writes.keys() | self._reads.keys()
        together = theirs is not None and members <= {theirs}
        self._shared_on = self._settled_on = theirs if together else _NOWHERE
        if not together and len(members) == 1 and self._writes:
            # One stream has written after all else, functional results included.
            (self._settled_on,) = members
        if self._view_out and self._settled_on is not _NOWHERE:
            self._in_use_on = self._settled_on
