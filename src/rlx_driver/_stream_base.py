"""The protocol of command streams, and what the streams of all frameworks share."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, runtime_checkable

from rlx_driver import _pytree
from rlx_driver.backends.base import FunctionalBackend
from rlx_driver.errors import CaptureError, StreamError
from rlx_driver.events import DeviceEvent, Event, HostEvent, waited_for
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from rlx_driver.buffer import Buffer
    from rlx_driver.device import Device
    from rlx_driver.graph import CommandGraph

__all__ = ["BaseStream", "CommandStream"]

T = TypeVar("T")


@runtime_checkable
class CommandStream(Protocol):
    """Order of work on one device.

    Work is enqueued by `launch`, or by the framework itself inside ``with stream:``. `submit` makes
    sure that it is on its way, `wait` that it is done.
    """

    @property
    def device(self) -> Device:
        """Where the work runs."""

    def submit(self) -> None:
        """Make sure that enqueued work is on its way; never blocks."""

    def wait(self) -> None:
        """Block until the work is done; raises the error of a failed launch."""

    def submit_and_wait(self) -> None:
        """Do both."""

    def launch(self, function: Callable[..., T], *args: Any) -> T | None:
        """Run a function under the stream and track what it returns."""

    def track(self, *arrays: Any) -> None:
        """Count arrays, and trees of them, to the work that `wait` waits for."""

    def record(self) -> Event:
        """Give an event for all work enqueued until now."""

    def wait_for(self, other: Any) -> None:
        """Make later work come after an event, or after all of another stream until now."""

    def __enter__(self) -> Self:
        """Make it the current stream."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Make the stream before it current again; does not wait."""


class BaseStream:
    """What all streams share: tracked results, poisoning by a failed launch, and nesting."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._error: BaseException | None = None
        self._entered: dict[int, list[ExitStack]] = {}  # by thread
        self._tracked: list[tuple[Any, Any]] = []

    @property
    def device(self) -> Device:
        """Where the work runs."""
        return self._device

    def explain(self) -> str:
        """Say in words how work on this stream is ordered with that of other frameworks."""
        return "the call that enqueues work waits for what it needs"

    def submit(self) -> None:
        """Make sure that work is on its way: the frameworks send it as it is enqueued.

        Never blocks. What finished work has kept alive is let go.
        """
        self._tracked = self._pending(self._tracked)

    def wait(self) -> None:
        """Block until the work is done.

        Raises
        ------
        BaseException
            The error of the first launch, or tracked computation, that failed, with its traceback.
            The stream is usable again afterwards.
        """
        tracked, self._tracked = self._pending(self._tracked), []
        self._error = self._error or waited_for(tracked)
        try:
            self._finish()
        finally:
            failure, self._error = self._error, None
        if failure is not None:
            raise failure

    def submit_and_wait(self) -> None:
        """Do both; raises as `wait`."""
        self.submit()
        self.wait()

    def launch(self, function: Callable[..., T], *args: Any) -> T | None:
        """Run a function under the stream and track the arrays it returns.

        Parameters
        ----------
        function, args
            Called at once as ``function(*args)``; its array work is asynchronous as far as the
            framework makes it so. Arguments and result stay alive until it is done.

        Returns
        -------
        result
            What the function returned; None when it failed, or when an earlier launch did: a
            failure poisons the stream, later launches do not run, and `wait` raises it.
        """
        if self._error is not None:
            return None
        try:
            with self._current():
                result = function(*args)
        except Exception as error:
            self._error = error
            return None
        self.track(result, *args)
        return result

    def track(self, *arrays: Any) -> None:
        """Count arrays, and those in trees, to the work that `wait` waits for.

        Finished and donated ones are let go; one that has failed by now poisons the stream.
        """
        fresh = []
        # JAX's own trees count once it is in use; asking for them would start it.
        flatten = _pytree.functions()[0] if "jax" in registry.loaded else _pytree.flatten
        for leaf in flatten(arrays)[0]:
            backend = registry.for_array(leaf)
            # A traced value does no work.
            if isinstance(backend, FunctionalBackend) and backend.may_cache(leaf):
                fresh.append((backend, leaf))
                self._track_functional(leaf)
        self._tracked = self._pending(self._tracked + fresh)
        self._keep(arrays)

    def record(self) -> Event:
        """Give an event for all work enqueued until now; never blocks.

        A stream that is poisoned hands its error on: waiting for the event raises it.
        """
        self._tracked = self._pending(self._tracked)
        return HostEvent(self._device, self._tracked, self._error)

    def wait_for(self, other: Any) -> None:
        """Make later work come after an event, or after all of another stream until now.

        Blocks: never between streams of one kind of GPU; host work waits here and now, and so does
        whatever cannot wait on its device. A failure of the other stream poisons this one.

        Parameters
        ----------
        other
            A `CommandStream` or an `Event` of any framework and device; or a ``torch.cuda`` stream
            or event.

        Raises
        ------
        StreamError
            When it is neither. Nothing was changed.
        """
        event = other.record() if isinstance(other, CommandStream) else other
        if not isinstance(event, Event):
            event = self._foreign(event)
        error = getattr(event, "error", None)
        self._error = self._error or error
        if error is None:
            self._wait_for(event)

    def _wait_for(self, event: Event) -> None:
        try:
            event.wait()
        except Exception as error:
            self._error = self._error or error

    def _foreign(self, event: Any) -> Event:
        torch: Any = registry.get("torch") if "torch" in type(event).__module__ else None
        device = None if torch is None else torch.device_of_stream(event)
        if device is None:
            raise StreamError(
                f"{self!r} cannot wait for a {type(event).__qualname__}: give a CommandStream, an "
                "Event that one recorded, or a stream or event of torch.cuda. Nothing was changed"
            )
        if hasattr(event, "wait_stream"):
            event = torch.record_event(event, timing=False)
        return DeviceEvent(device, event)

    def capture(
        self, *, writes: Iterable[Buffer] = (), reads: Iterable[Buffer] = ()
    ) -> AbstractContextManager[CommandGraph]:
        """Record work as a graph to replay; only streams of CUDA can.

        Raises
        ------
        CaptureError
            Anywhere else.
        """
        raise CaptureError(
            f"{self!r} has no graphs to record work in: only streams on CUDA do. Nothing was run"
        )

    def _pending(self, tracked: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        return [entry for entry in tracked if self._is_pending(*entry)]

    def _is_pending(self, backend: Any, array: Any) -> bool:
        if array.is_deleted():
            return False
        is_ready = getattr(array, "is_ready", None)  # which keys do not have
        if is_ready is None or not is_ready():
            return True
        try:
            backend.wait([array])  # at once; an error of its computation would be lost with it
        except Exception as error:
            self._error = self._error or error
        return False

    def _track_functional(self, array: Any) -> None:
        """Order this stream after an array of a functional framework, on its device."""

    def _keep(self, *objects: Any) -> None:
        """Keep what pending work uses; functional frameworks do so themselves."""

    def _current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _finish(self) -> None:
        """Block until the work is done."""

    def __enter__(self) -> Self:
        stack = ExitStack()
        stack.enter_context(self._current())
        self._entered.setdefault(get_ident(), []).append(stack)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered[get_ident()].pop().close()

    def __repr__(self) -> str:
        state = ", poisoned" if self._error is not None else ""
        return f"<{type(self).__name__} on {self._device}{self._how()}{state}>"

    def _how(self) -> str:
        return ""
