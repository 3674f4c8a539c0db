"""Command streams: order of work on one device, with one interface over the frameworks."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, runtime_checkable

from rlx_driver import _pytree
from rlx_driver._ledger import ledger
from rlx_driver.backends.base import FunctionalBackend
from rlx_driver.device import Device
from rlx_driver.errors import CaptureError, DeviceUnavailableError, StreamError
from rlx_driver.events import DeviceEvent, Event, HostEvent, waited_for
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from rlx_driver.backends.stream_order import Sharing
    from rlx_driver.buffer import Buffer
    from rlx_driver.graph import CommandGraph

__all__ = ["CommandStream", "JaxStream", "SyncStream", "TorchStream", "command_stream"]

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


class _Stream:
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


class SyncStream(_Stream):
    """Host work, which is done when the call that enqueues it returns.

    JAX work that is launched or tracked on it is asynchronous all the same: `wait` waits for it.

    Parameters
    ----------
    device
        The host.

    Raises
    ------
    DeviceUnavailableError
        For any other device.
    """

    def __init__(self, device: Device | str = "cpu") -> None:
        super().__init__(Device(device))
        if not self._device.is_host:
            raise DeviceUnavailableError(
                f"work on {self._device} is not host work: use rlx_driver.command_stream"
            )


class TorchStream(_Stream):
    """A stream of torch on CUDA or ROCm; on Metal the one queue that torch has there.

    On CUDA it adopts the stream on which JAX computes, so that ``with stream:`` puts torch work
    (eager, compiled, graphs) and JAX work in one order without an event or a host wait. It does so
    from the moment that JAX is in use, also when that is after the stream was made.

    Parameters
    ----------
    device
        A device that torch serves.
    stream
        A ``torch.cuda.Stream`` to wrap; left out, the one shared with JAX, or a new one.
    side
        A stream of its own, for work that is to overlap.
    order
        Force how torch and JAX are ordered under this stream: ``"shared"``, ``"events"`` or
        ``"host"``. The environment variable ``RLX_STREAM_ORDER`` does so for the whole process.

    Raises
    ------
    DeviceUnavailableError
        When torch, or the device, is missing.
    StreamError
        When `stream` belongs to another device, or `order` is unknown or cannot be had.
    """

    def __init__(
        self,
        device: Device | str = "cuda",
        stream: Any = None,
        *,
        side: bool = False,
        order: str | None = None,
    ) -> None:
        super().__init__(Device(device))
        backend: Any = self._device.backend
        if not hasattr(backend, "new_stream"):
            raise DeviceUnavailableError(f"torch has no streams on {self._device}")
        self._backend = backend
        self._order = backend.way_of(order)
        self._adopts = stream is None and not side and self._device.kind == "cuda"
        self._stream = stream
        if stream is not None:
            place = backend.device_of_stream(stream)
            if place != self._device:
                raise StreamError(
                    f"{stream!r} is on {place or 'no device of torch'} and was given for "
                    f"{self._device}: make the CommandStream on the device of the stream"
                )
        elif not self._adopts or self._adopted() is None:
            if self._order == "shared" and self.sharing.way is not None:
                raise StreamError(f"one stream for torch and JAX cannot be had: {self.sharing}")
            self._stream = backend.new_stream(self._device)

    @property
    def native(self) -> Any:
        """The ``torch.cuda.Stream`` that work goes to now; None on Metal."""
        if self._adopts and (theirs := self._adopted()) is not None:
            if self._stream is not None:  # JAX came later: its work comes after what is on ours
                self._backend.wait_event(theirs, self._stream)
                self._stream = None
            return theirs
        return self._stream

    @property
    def sharing(self) -> Sharing:
        """How torch and JAX are ordered on this device under this stream, and why."""
        return self._backend.sharing(  # type: ignore[no-any-return]
            self._device, self._order, adopts=self._adopts
        )

    def explain(self) -> str:
        """Say in words how work on this stream is ordered with that of JAX."""
        return f"torch and JAX on {self._device}: {self.sharing}"

    def record(self) -> Event:
        """Give an event for all work enqueued until now; never blocks."""
        native = self._backend.record_event(self.native)
        self._backend.keep_alive()
        return DeviceEvent(self._device, native, self._error)

    def capture(
        self, *, writes: Iterable[Buffer] = (), reads: Iterable[Buffer] = ()
    ) -> AbstractContextManager[CommandGraph]:
        """Record torch work as a CUDA graph: ``with stream.capture() as graph: ...``.

        Nothing runs inside the block; `CommandGraph.replay` runs it. Buffers whose views are taken
        inside the block (``kv.torch()``, ``kv.read("torch")``, ``kv.write("torch")``) are ordered
        and fenced at every replay. Tensors of the block live in memory of the graph.

        Parameters
        ----------
        writes, reads
            Buffers whose views were taken before, and which the work writes or reads.

        Raises
        ------
        CaptureError
            When the work cannot be captured (JAX work, copies to or from the host, waiting), or a
            capture stands in another one. No Buffer was changed.
        """
        from rlx_driver.graph import captured  # the driver's buffers come after its streams

        if self._device.kind != "cuda":
            return super().capture(writes=writes, reads=reads)
        return captured(self, self._backend, writes, reads)

    def __cuda_stream__(self) -> tuple[int, int]:
        """Give the stream by the protocol of cuda.core, Numba and CuPy: (version, handle)."""
        if self.native is None or self._device.kind != "cuda":
            raise StreamError(f"{self!r} is no CUDA stream")
        return 0, int(self.native.cuda_stream)

    def _adopted(self) -> Any:
        return self._backend.streams(self._device).adopted(self._order)

    def _wait_for(self, event: Event) -> None:
        if isinstance(event, DeviceEvent) and event.device.kind == self._device.kind:
            self._backend.wait_event(self.native, event.native)
            return
        arrays = list(event.arrays) if isinstance(event, HostEvent) else []
        if arrays and all(Device.of(array) == self._device for array in arrays):
            for array in arrays:
                self._backend.order_after(self._device, self.native, array)
        else:
            super()._wait_for(event)

    def _track_functional(self, array: Any) -> None:
        if Device.of(array) == self._device:
            self._backend.order_after(self._device, self.native, array)

    def _keep(self, *objects: Any) -> None:
        if objects:
            event = self._backend.record_event(self.native, timing=False)
            self._backend.keep_alive(event, *objects)

    def as_current(self) -> AbstractContextManager[Any]:
        """Make it the current stream as ``with stream:`` does, at no cost where it is already."""
        return nullcontext() if self._is_current() else self._current()

    def _is_current(self) -> bool:
        if self._device.kind != "cuda" or self._order is not None:
            return False
        return bool(self._backend.streams(self._device).current() == self.native.cuda_stream)

    def _current(self) -> AbstractContextManager[Any]:
        return self._backend.using_stream(self.native, self._order)  # type: ignore[no-any-return]

    def _finish(self) -> None:
        ledger.count_host_wait()
        self._backend.synchronize(self._device, self.native)

    def _how(self) -> str:
        return "" if self._device.kind != "cuda" else f", {self.sharing}"


class JaxStream(_Stream):
    """JAX work: the arrays that are tracked, waited for with ``jax.block_until_ready``.

    JAX orders programs on a device by itself; what it lacks is a handle on them, which this is.

    Parameters
    ----------
    device
        A device that JAX sees.

    Raises
    ------
    DeviceUnavailableError
        When JAX is missing, or does not see the device.
    """

    def __init__(self, device: Device | str = "cpu") -> None:
        super().__init__(Device(device))
        self._backend: Any = registry.get("jax")
        present = self._backend.devices(self._device.kind)
        if self._device not in present:
            seen = ", ".join(map(str, present)) or "none"
            raise DeviceUnavailableError(
                f"JAX sees no {self._device}; it sees of that kind: {seen}"
            )

    def explain(self) -> str:
        """Say in words how work on this stream is ordered with that of other frameworks."""
        return f"JAX orders its programs on {self._device} by itself; others wait for its results"

    def _wait_for(self, event: Event) -> None:
        if self._device.is_host or not self._backend.wait_on_device(self._device, event):
            super()._wait_for(event)

    def _current(self) -> AbstractContextManager[Any]:
        return self._backend.on_device(self._device)  # type: ignore[no-any-return]


def command_stream(
    device: Device | str = "cpu", *, side: bool = False, order: str | None = None
) -> CommandStream:
    """Give a stream for a device, of the framework that owns its memory.

    Parameters
    ----------
    device
        Where.
    side
        A stream of its own for work that is to overlap, where the device has such (CUDA, ROCm).
    order
        Force how torch and JAX are ordered on CUDA: ``"shared"`` (one stream), ``"events"``
        (each waits for the other on the device) or ``"host"`` (the host waits).

    Returns
    -------
    CommandStream
        `SyncStream` on the host, `TorchStream` on CUDA, ROCm and Metal, `JaxStream` on TPU.

    Raises
    ------
    DeviceUnavailableError
        When the device is not there.
    StreamError
        When `order` is unknown or cannot be had.
    """
    place = Device(device)
    backend = place.backend
    if not side and order is None:
        return backend.stream(place)  # type: ignore[no-any-return]
    return backend.stream(place, side=side, order=order)  # type: ignore[no-any-return]
