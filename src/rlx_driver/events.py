"""Events: points in the work of a stream that can be asked for, waited for, and timed."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rlx_driver._ledger import ledger
from rlx_driver.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlx_driver.device import Device

__all__ = ["DeviceEvent", "Event", "HostEvent", "waited_for"]


@runtime_checkable
class Event(Protocol):
    """A point in the work of a stream; `CommandStream.record` makes one."""

    @property
    def device(self) -> Device:
        """Where the stream works."""

    def is_ready(self) -> bool:
        """Tell whether the work before it is done; never blocks."""

    def wait(self) -> None:
        """Block until the work before it is done.

        Raises
        ------
        BaseException
            The error of a launch that had failed when the event was recorded, or of a computation
            before it.
        """

    def elapsed_ms(self, other: Event) -> float:
        """Give the milliseconds from this event to another one; negative when that came first.

        Blocks until both are done.

        Raises
        ------
        StreamError
            When the two are not timed by the same clock.
        """


class _Event:
    """What both kinds of events share."""

    def __init__(self, device: Device, error: BaseException | None) -> None:
        self.device = device
        self.error = error

    def _finish(self) -> None:
        """Block until the work before it is done."""

    def wait(self) -> None:
        """Block until the work before it is done; see `Event.wait`."""
        self._finish()
        if self.error is not None:
            raise self.error

    def __repr__(self) -> str:
        state = "failed" if self.error is not None else "ready" if self.is_ready() else "pending"
        return f"<{type(self).__name__} on {self.device}, {state}>"

    def is_ready(self) -> bool:
        """Tell whether the work before it is done; never blocks."""
        raise NotImplementedError


class DeviceEvent(_Event):
    """An event that a device records and times by itself (CUDA, ROCm, Metal).

    Parameters
    ----------
    device
        Where.
    native
        The ``torch.cuda.Event``.
    error
        What had failed on the stream by then.
    """

    def __init__(self, device: Device, native: Any, error: BaseException | None = None) -> None:
        super().__init__(device, error)
        self._native = native

    @property
    def native(self) -> Any:
        """The framework's event."""
        return self._native

    def is_ready(self) -> bool:
        """Tell whether the work before it is done; never blocks."""
        return bool(self._native.query())

    def _finish(self) -> None:
        ledger.count_host_wait()
        self._native.synchronize()

    def elapsed_ms(self, other: Event) -> float:
        """Give the milliseconds to another event of the device, by its own clock."""
        if not isinstance(other, DeviceEvent) or other.device != self.device:
            raise _two_clocks(self, other)
        self._finish()
        other._finish()
        return float(self._native.elapsed_time(other._native))


class HostEvent(_Event):
    """An event of host work, or of arrays of a functional framework, timed by the host's clock.

    Parameters
    ----------
    device
        Where the work runs.
    tracked
        What has to be computed: arrays, each with its backend. With none the event is ready; else a
        thread waits for them, so that the time is that of their completion.
    error
        What had failed on the stream by then.
    """

    def __init__(
        self,
        device: Device,
        tracked: Sequence[tuple[Any, Any]] = (),
        error: BaseException | None = None,
    ) -> None:
        super().__init__(device, error)
        self._tracked = list(tracked)
        self._done = threading.Event()
        self._seconds = time.perf_counter()
        if not self._tracked:
            self._done.set()
        else:
            threading.Thread(target=self._watch, name="rlx-event", daemon=True).start()

    def _watch(self) -> None:
        self.error = self.error or waited_for(self._tracked)
        self._seconds = time.perf_counter()
        self._tracked = []
        self._done.set()

    @property
    def arrays(self) -> list[Any]:
        """The arrays that were not known to be computed when it was last asked."""
        return [array for _, array in self._tracked]

    def is_ready(self) -> bool:
        """Tell whether the work before it is done; never blocks."""
        return self._done.is_set()

    def _finish(self) -> None:
        if not self._done.is_set():
            self._done.wait()

    def elapsed_ms(self, other: Event) -> float:
        """Give the milliseconds to another event, by the host's clock."""
        if not isinstance(other, HostEvent):
            raise _two_clocks(self, other)
        self._finish()
        other._finish()
        return (other._seconds - self._seconds) * 1e3


def waited_for(tracked: Sequence[tuple[Any, Any]]) -> BaseException | None:
    """Block until arrays, each with its backend, are computed; give the first error of one."""
    for backend in dict.fromkeys(backend for backend, _ in tracked):
        ledger.count_host_wait()
        arrays = [array for owner, array in tracked if owner is backend]
        try:
            backend.wait(arrays)
        except Exception:
            for array in arrays:  # one may have been donated meanwhile, to later work: no error
                try:
                    if not array.is_deleted():
                        backend.wait([array])
                except Exception as error:
                    if not array.is_deleted():
                        return error
    return None


def _two_clocks(first: Any, second: Any) -> StreamError:
    return StreamError(
        f"{first!r} and {second!r} are not timed by one clock: record both on streams of one kind "
        "and device"
    )
