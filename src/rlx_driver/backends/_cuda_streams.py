"""The streams of one CUDA device, and how torch and JAX share one of them.

JAX runs its programs on one compute stream a device. Where it shows that stream, torch can adopt
it, and the work of both is in one order with nothing between; else torch's stream and JAX's wait
for each other's events on the device; and where JAX hides its stream the host waits.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from rlx_driver.backends.base import Recording
from rlx_driver.backends.stream_order import Sharing, Streams, Way
from rlx_driver.errors import StreamError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["ORDER_VARIABLE", "CudaStreams", "forced_way", "probe_current_stream"]

ORDER_VARIABLE = "RLX_STREAM_ORDER"
"""The environment variable that forces a way: shared, events or host."""

_LEGACY_DEFAULT_STREAM = 1  # DLPack's number for torch's stream 0

_forced: ContextVar[Way | None] = ContextVar("rlx_driver_stream_order", default=None)


def way_of(name: str | None) -> Way | None:
    """Give the way that a user names; None for the best that there is.

    Raises
    ------
    StreamError
        For any other name.
    """
    if not name:
        return None
    try:
        return Way(name)
    except ValueError:
        known = ", ".join(repr(way.value) for way in Way)
        raise StreamError(
            f"{name!r} is no way to order torch and JAX; known are {known} (as order=, or in the "
            f"environment variable {ORDER_VARIABLE})"
        ) from None


@contextmanager
def forced_way(way: Way | None) -> Iterator[None]:
    """Force a way for the accesses inside a block."""
    if way is None:
        yield
        return
    token = _forced.set(way)
    try:
        yield
    finally:
        _forced.reset(token)


_private_current = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def probe_current_stream(
    private: Callable[[int], int] | None = _private_current,
) -> Callable[[int], int]:
    """Choose between the private function for the current stream (70 ns) and the public one."""

    def public(index: int) -> int:
        return int(torch.cuda.current_stream(index).cuda_stream)

    if private is None or private(torch.cuda.current_device()) != public(
        torch.cuda.current_device()
    ):
        return public
    return private


class CudaStreams(Streams):
    """The streams of one CUDA device; a key is the raw handle.

    Parameters
    ----------
    index
        Which device.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self.current = functools.partial(probe_current_stream(), index)
        self._lock = threading.Lock()
        self._sharing: Sharing | None = None
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._copies: torch.cuda.Stream | None = None
        self._recordings: dict[int, Recording] = {}

    # --- how JAX and torch share

    def sharing(self, *, load: bool = False) -> Sharing:
        """Say how work of torch and JAX is ordered here; decided once JAX is in use.

        Parameters
        ----------
        load
            Count JAX as in use when it is imported, and not only when the driver has used it.
        """
        if self._sharing is not None:
            return self._sharing
        if "jax" not in registry.loaded and not (load and "jax" in sys.modules):
            return Sharing(None, None, "JAX is not in use")
        with self._lock:
            if self._sharing is None:
                self._sharing = self._decided()
            return self._sharing

    def _decided(self) -> Sharing:
        with torch.cuda.device(self._index):  # JAX's first call may leave another one current
            backend: Any = registry.get("jax")
            stream, reason = backend.gpu_stream(self._index)
            if stream is not None:
                try:
                    self._try(stream)
                except (RuntimeError, TypeError, ValueError) as error:
                    stream, reason = None, f"torch cannot use the stream that JAX shows: {error}"
        wanted = way_of(os.environ.get(ORDER_VARIABLE))
        if stream is None:
            return Sharing(Way.HOST, None, reason)
        if wanted is not None:
            return Sharing(wanted, stream, f"{ORDER_VARIABLE}={wanted.value} asks for it")
        return Sharing(Way.SHARED, stream, reason)

    def _try(self, handle: int) -> None:
        """Use a stream as torch will, so that what does not work fails here."""
        place = torch.device("cuda", self._index)
        adopted = torch.cuda.ExternalStream(handle, device=place)
        with torch.cuda.stream(adopted):
            torch.zeros(1, device=place)
        adopted.record_event().synchronize()
        self._streams[handle] = adopted

    def adopted(self, wanted: Way | None) -> torch.cuda.Stream | None:
        """Give JAX's stream for torch to run on; None where it is not shared."""
        sharing = self.sharing(load=True)
        if sharing.stream is None or (wanted or sharing.way) is not Way.SHARED:
            return None
        return self.stream(sharing.stream)

    def explain(self) -> str:
        """Say which way is in force, and why."""
        return str(self.sharing())

    def functional(self) -> int | None:
        """Give JAX's compute stream; None when hidden, or when the host is to wait."""
        if _forced.get() is Way.HOST:
            return None
        sharing = self._sharing or self.sharing()
        return None if sharing.way is Way.HOST else sharing.stream

    # --- what streams do

    def stream(self, key: int) -> torch.cuda.Stream:
        """Give torch's object for a raw handle."""
        found = self._streams.get(key)
        if found is None:
            if key == self.current():
                found = torch.cuda.current_stream(self._index)
            elif key == 0:
                found = torch.cuda.default_stream(self._index)
            else:
                place = torch.device("cuda", self._index)
                found = torch.cuda.ExternalStream(key, device=place)
            self._streams[key] = found
        return found

    def record(self, stream: Any, event: Any = None) -> torch.cuda.Event:
        """Give an event for what is enqueued on a stream now."""
        event = event or torch.cuda.Event()
        event.record(self.stream(stream))
        return event

    def wait_event(self, stream: Any, event: Any) -> None:
        """Make a stream wait for an event."""
        self.stream(stream).wait_event(event)

    def wait_result(self, stream: Any, array: Any) -> None:
        """Make a stream wait for a JAX array."""
        # The capsule is dropped at once: its only use is that the stream waits.
        array.__dlpack__(stream=stream or _LEGACY_DEFAULT_STREAM)

    def synchronize(self, event: Any) -> None:
        """Make the host wait for an event."""
        event.synchronize()

    @contextmanager
    def host_copies(self) -> Iterator[int]:
        """Make the stream for copies to the host the current one."""
        if self._copies is None:
            self._copies = torch.cuda.Stream(torch.device("cuda", self._index))
        with torch.cuda.stream(self._copies):
            yield self._copies.cuda_stream

    def uses(self, memory: torch.Tensor, stream: Any) -> None:
        """Keep torch's allocator from giving memory away that a stream may still use."""
        memory.record_stream(self.stream(stream))

    # --- capture

    def recording(self) -> Recording | None:
        """Give the capture of a graph that the calling thread is in."""
        return self._recordings.get(get_ident()) if self._recordings else None

    @contextmanager
    def record_accesses(self) -> Iterator[Recording]:
        """Note the accesses of this thread instead of ordering them."""
        me = get_ident()
        recording = self._recordings[me] = Recording()
        try:
            yield recording
        finally:
            del self._recordings[me]
