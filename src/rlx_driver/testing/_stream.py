"""The streams of a fake device: queues of work, which may be held, and events in them."""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rlx_driver.device import Device
    from rlx_driver.testing._scheduler import Scheduler

__all__ = ["FakeEvent", "FakeStream", "Mark"]


class Mark:
    """A point in the queue of a stream."""

    __slots__ = ("event", "label", "passed_at", "stream")

    def __init__(self, stream: FakeStream, label: str, event: str | None) -> None:
        self.stream = stream
        self.label = label
        self.event = event  # the name of the event that stands for it, which goes to the log
        self.passed_at: int | None = None

    @property
    def is_passed(self) -> bool:
        """Whether everything before it has run."""
        return self.passed_at is not None


class _Work(NamedTuple):
    label: str
    function: Callable[[], object]


class _Wait(NamedTuple):
    mark: Mark
    event: str | None


class FakeEvent:
    """A point in the work of a stream, as those of CUDA: recorded anew it stands for a later one.

    A wait is for the point that the event stood for when the wait was enqueued.
    """

    _numbers = itertools.count(1)

    def __init__(self, name: str | None = None) -> None:
        self.name = name or f"event {next(self._numbers)}"
        self._mark: Mark | None = None

    def record(self, stream: FakeStream) -> None:
        """Let it stand for all that is enqueued on a stream now."""
        self._mark = stream.mark(self.name, self.name)

    def query(self) -> bool:
        """Tell whether the work before it is done; one that was never recorded is."""
        return self._mark is None or self._mark.is_passed

    def synchronize(self) -> None:
        """Make the host wait for it."""
        if self._mark is not None:
            self._mark.stream.scheduler.finish(self._mark)

    def elapsed_time(self, other: FakeEvent) -> float:
        """Give the milliseconds to another event; every piece of work takes one, everywhere."""
        times = [event._mark.passed_at for event in (self, other) if event._mark is not None]
        if len(times) < 2 or None in times:
            raise RuntimeError("both events have to be recorded and reached")
        return float(times[1] - times[0])  # type: ignore[operator]

    def __repr__(self) -> str:
        return f"<FakeEvent {self.name!r}, {'reached' if self.query() else 'not reached'}>"


class FakeStream:
    """A queue of work on a device; ``with stream:`` makes it the thread's current one there.

    Work runs as soon as it is enqueued, unless it comes after something that has not run: behind
    a `hold`, or behind an event of another stream.
    """

    def __init__(self, scheduler: Scheduler, device: Device, name: str) -> None:
        self.scheduler = scheduler
        self.device = device
        self.name = name
        self.error: BaseException | None = None
        self._queue: deque[_Work | _Wait | Mark] = deque()
        self._held = scheduler.holds
        self._credit = 0
        self._passing = False  # since the last piece of work that was released, for what follows it
        self._is_running = False

    # --- holding

    def hold(self) -> None:
        """Let nothing run that is enqueued from here on, as behind a very long piece of work."""
        self._held, self._credit, self._passing = True, 0, False

    def release(self, count: int | None = None) -> None:
        """Let the work run that was held back, and what comes later too.

        Parameters
        ----------
        count
            How many pieces of work to let through before it holds again; None for all.
        """
        if count is None:
            self._held = False
        else:
            self._credit += count
        self.scheduler.run()

    @property
    def is_held(self) -> bool:
        """Whether `hold` was called, and `release` was not."""
        return self._held

    @property
    def pending(self) -> tuple[str, ...]:
        """Labels of the work that has not run yet."""
        return tuple(entry.label for entry in self._queue if isinstance(entry, _Work))

    # --- enqueueing

    def enqueue(self, label: str, function: Callable[[], object]) -> None:
        """Add a piece of work."""
        self._queue.append(_Work(label, function))
        self.scheduler.run()

    def mark(self, label: str, event: str | None = None) -> Mark:
        """Mark the end of what is enqueued now."""
        mark = Mark(self, label, event)
        self._queue.append(mark)
        self.scheduler.run()
        return mark

    def mark_later(self, label: str) -> Mark:
        """Do the same without running anything: a finalizer may come at any moment."""
        mark = Mark(self, label, None)
        self._queue.append(mark)
        return mark

    def wait_mark(self, mark: Mark, event: str | None = None) -> None:
        """Let later work come after a mark."""
        self._queue.append(_Wait(mark, event))
        self.scheduler.run()

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        """Record an event, or a new one."""
        event = event or FakeEvent()
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        """Let later work come after an event; one that was never recorded is no event at all."""
        if event._mark is not None:
            self.wait_mark(event._mark, event.name)

    def wait_stream(self, other: FakeStream) -> None:
        """Let later work come after all that is on another stream now."""
        self.wait_event(other.record_event())

    def query(self) -> bool:
        """Tell whether all work is done."""
        return not self._queue

    def synchronize(self) -> None:
        """Make the host wait for all work; raises the error of work that failed."""
        self.scheduler.finish(self.mark(f"all of {self.name!r}"))

    def __enter__(self) -> Self:
        self.scheduler.entered(self.device).append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.scheduler.entered(self.device).pop()

    def __repr__(self) -> str:
        state = ", held" if self._held else ""
        return f"<FakeStream {self.name!r} on {self.device}{state}, {len(self.pending)} pending>"

    # --- running

    def advance(self, *, forced: bool = False) -> bool:
        """Run the next entry of the queue, if it may run; the scheduler calls this."""
        if self._is_running:
            return False
        if not self._queue:
            self._passing = False
            return False
        entry = self._queue[0]
        if not (forced or self._lets_pass(entry)) or _is_blocked(entry):
            return False
        self._queue.popleft()
        if isinstance(entry, _Work):
            self._credit = max(self._credit - 1, 0)
            self._passing = True
            self._run(entry)
        elif isinstance(entry, Mark):
            entry.passed_at = self.scheduler.clock
            if entry.event is not None:
                self.scheduler.note(self, "record", entry.event)
        elif entry.event is not None:
            self.scheduler.note(self, "wait", entry.event)
        return True

    def _lets_pass(self, entry: _Work | _Wait | Mark) -> bool:
        if not self._held or self._credit:
            return True
        # Behind the last piece of work that was released comes what was enqueued with it.
        self._passing = self._passing and not isinstance(entry, _Work)
        return self._passing

    def _run(self, work: _Work) -> None:
        self.scheduler.note(self, "work", work.label)
        self.scheduler.clock += 1
        self._is_running = True
        try:
            work.function()
        except Exception as error:  # the host hears of it when it waits
            self.error = self.error or error
        finally:
            self._is_running = False

    def held_by(self) -> Iterator[FakeStream]:
        """Give the streams, from this one to a held one, of which each waits for the next."""
        yield self
        if self._queue and not self._is_running:
            entry = self._queue[0]
            if isinstance(entry, _Wait) and self._lets_pass(entry):
                yield from entry.mark.stream.held_by()

    def reach(self, mark: Mark) -> None:
        """Run what comes before a mark of this stream, held or not, and nothing else."""
        while not mark.is_passed and not self._is_running:
            entry = self._queue[0]
            if isinstance(entry, _Wait):
                entry.mark.stream.reach(entry.mark)
            if not self.advance(forced=True):
                return


def _is_blocked(entry: _Work | _Wait | Mark) -> bool:
    return isinstance(entry, _Wait) and not entry.mark.is_passed
