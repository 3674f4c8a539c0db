"""Runs the work of fake streams, one piece after the other, and keeps a log of it.

No thread works here. Whoever enqueues work, or releases a stream, runs what may run now, stream by
stream in the order in which they were made.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rlx_driver.testing._stream import FakeStream, Mark

if TYPE_CHECKING:
    from rlx_driver.device import Device

__all__ = ["HangError", "LogEntry", "Scheduler"]


class HangError(BaseException):
    """The host waits for work that is held: on a device it would wait for ever.

    It is no `Exception`, so that nobody takes it for a failure of the work that is waited for.
    """


class LogEntry(NamedTuple):
    """One thing that happened, in the order in which it did.

    Attributes
    ----------
    device
        Where.
    stream
        The name of the stream; for a host wait, of the stream that the host waited for.
    kind
        ``"work"``, ``"record"`` and ``"wait"`` (an event was reached, or waited for, on the
        stream), or ``"host wait"``.
    label
        Which work, or which event.
    """

    device: Device
    stream: str
    kind: Literal["work", "record", "wait", "host wait"]
    label: str

    def __str__(self) -> str:
        if self.kind == "work":
            return f"{self.stream}: {self.label}"
        if self.kind == "host wait":
            return f"host waits on {self.stream} for {self.label}"
        return f"{self.stream}: {self.kind} {self.label}"


class Scheduler:
    """Runs the work of all streams, and keeps the log.

    Attributes
    ----------
    log
        What happened until now.
    on_host_wait
        What a wait of the host for held work does: ``"raise"`` a `HangError`, or ``"release"``
        just the work that is waited for.
    holds
        Whether streams made from now on are held.
    clock
        How many pieces of work have begun.
    """

    def __init__(self, on_host_wait: Literal["raise", "release"] = "raise") -> None:
        self.log: list[LogEntry] = []
        self.on_host_wait = on_host_wait
        self.holds = False
        self.clock = 0
        self._lock = threading.RLock()
        self._streams: dict[tuple[Device, str], FakeStream] = {}
        self._threads = threading.local()

    @property
    def streams(self) -> list[FakeStream]:
        """Every stream, in the order in which they were made."""
        return list(self._streams.values())

    def stream(self, device: Device, name: str) -> FakeStream:
        """Give the stream of a name, made on first use."""
        with self._lock:
            key = device, name
            if key not in self._streams:
                self._streams[key] = FakeStream(self, device, name)
            return self._streams[key]

    def entered(self, device: Device) -> list[FakeStream]:
        """Give the streams that the calling thread has entered on a device."""
        stacks: dict[Any, list[FakeStream]] = self._threads.__dict__
        return stacks.setdefault(str(device), [])

    def current(self, device: Device) -> FakeStream:
        """Give the current stream of the calling thread on a device."""
        entered = self.entered(device)
        return entered[-1] if entered else self.stream(device, "default")

    def run(self) -> None:
        """Run all work that may run now."""
        with self._lock:
            moved = True
            while moved:
                moved = False
                for stream in self.streams:
                    while stream.advance():
                        moved = True

    def finish(self, mark: Mark) -> None:
        """Make the host wait for a mark; raises the error of work that failed on its stream.

        Raises
        ------
        HangError
            When the work before it is held, unless such waits release it.
        """
        stream = mark.stream
        with self._lock:
            self.run()
            if not mark.is_passed:
                self.note(stream, "host wait", mark.label)
                if self.on_host_wait == "release":
                    stream.reach(mark)
                    self.run()
            if not mark.is_passed:
                raise HangError(_hanging(mark))
            error, stream.error = stream.error, None
        if error is not None:
            raise error

    def note(
        self, stream: FakeStream, kind: Literal["work", "record", "wait", "host wait"], label: str
    ) -> None:
        """Add to the log."""
        self.log.append(LogEntry(stream.device, stream.name, kind, label))


def _hanging(mark: Mark) -> str:
    first, *others = mark.stream.held_by()
    chain = "".join(f", which waits for stream {stream.name!r}" for stream in others)
    last = others[-1] if others else first
    why = "is held" if last.is_held else "runs the very work that waits"
    return (
        f"the host waits for {mark.label} on stream {first.name!r} of {first.device}{chain}, which "
        f"{why}, so it would wait for ever; there {len(last.pending)} pieces of work are pending "
        f"({', '.join(last.pending[:5])}). Release it first (stream.release()), or let such waits "
        'release what they wait for (on_host_wait="release")'
    )
