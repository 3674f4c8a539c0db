"""`TorchStream`: a stream of torch, on CUDA the one that JAX computes on too."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rlx_driver._ledger import ledger
from rlx_driver._stream_base import BaseStream
from rlx_driver.device import Device
from rlx_driver.errors import DeviceUnavailableError, StreamError
from rlx_driver.events import DeviceEvent, Event, HostEvent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rlx_driver.backends.stream_order import Sharing
    from rlx_driver.buffer import Buffer
    from rlx_driver.graph import CommandGraph

__all__ = ["TorchStream"]


class TorchStream(BaseStream):
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
