"""Streams and events of torch, as `rlx_driver.TorchStream` and the order of buffers need them."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from rlx_driver._ledger import ledger
from rlx_driver.backends._cuda_graph import capturing
from rlx_driver.backends._cuda_streams import CudaStreams, forced_way, way_of
from rlx_driver.backends.stream_order import Sharing, Way
from rlx_driver.device import Device
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlx_driver.backends.order import Recording

__all__ = ["DEVICE_TYPE", "GPU_KIND", "StreamServices", "place_of"]

GPU_KIND = "rocm" if torch.version.hip else "cuda"
DEVICE_TYPE = {"cpu": "cpu", "cuda": "cuda", "rocm": "cuda", "metal": "mps"}


def place_of(device: Device) -> torch.device:
    """Give torch's name of a device."""
    return torch.device(DEVICE_TYPE[device.kind], device.index)


class StreamServices:
    """The part of `TorchBackend` that has to do with streams."""

    def __init__(self) -> None:
        self._streams: dict[int, CudaStreams] = {}
        self._kept: deque[tuple[Any, Any]] = deque()

    def streams(self, device: Device) -> CudaStreams:
        """Give the streams of a CUDA device."""
        found = self._streams.get(device.index)
        if found is None:
            found = self._streams.setdefault(device.index, CudaStreams(device.index))
        return found

    def new_stream(self, device: Device) -> torch.cuda.Stream | None:
        """Make a stream; Metal has only its one queue."""
        return None if device.kind == "metal" else torch.cuda.Stream(place_of(device))

    @contextmanager
    def using_stream(self, stream: torch.cuda.Stream | None, order: Way | None) -> Iterator[None]:
        """Make a stream the current one, and a way of ordering the one in force."""
        with forced_way(order), nullcontext() if stream is None else torch.cuda.stream(stream):
            yield

    way_of = staticmethod(way_of)

    def sharing(self, device: Device, wanted: Way | None, *, adopts: bool) -> Sharing:
        """Say how torch and JAX are ordered on a device under a stream."""
        if device.kind != "cuda":
            return Sharing(None, None, "JAX and torch share no memory here")
        found = self.streams(device).sharing(load=True)
        if found.way is None or found.way is Way.HOST:
            return found
        if wanted is not None:
            return Sharing(wanted, found.stream, "asked for by order=")
        if not adopts and found.way is Way.SHARED:
            return Sharing(Way.EVENTS, found.stream, "a stream apart from JAX's")
        return found

    def order_after(self, device: Device, stream: torch.cuda.Stream, array: Any) -> None:
        """Make a stream wait for a JAX array, on the device where it can."""
        streams = self.streams(device)
        theirs = streams.functional()
        if theirs is None:
            ledger.count_host_wait()
            registry.get("jax").wait(array)  # type: ignore[attr-defined]
        elif stream.cuda_stream != theirs:
            streams.wait_result(stream.cuda_stream, array)

    def synchronize(self, device: Device, stream: torch.cuda.Stream | None) -> None:
        """Block until the work of a stream is done."""
        if stream is None:
            torch.mps.synchronize()
        else:
            stream.synchronize()
        self.keep_alive()

    def device_of_stream(self, stream: Any) -> Device | None:
        """Tell whose stream or event an object of torch is; None for any other object."""
        if isinstance(stream, (torch.cuda.Stream, torch.cuda.Event)):
            index = getattr(stream.device, "index", None)
            return Device(GPU_KIND, torch.cuda.current_device() if index is None else index)
        return None

    def record_event(self, stream: torch.cuda.Stream | None, *, timing: bool = True) -> Any:
        """Record an event on a stream."""
        if stream is None:
            event = torch.mps.event.Event(enable_timing=timing)
            event.record()
            return event
        event = torch.cuda.Event(enable_timing=timing)
        event.record(stream)
        return event

    def wait_event(self, stream: torch.cuda.Stream | None, event: Any) -> None:
        """Make a stream wait on the device for an event, or for all of another stream."""
        if stream is None:
            event.wait()
        elif isinstance(event, torch.cuda.Stream):
            stream.wait_stream(event)
        else:
            stream.wait_event(event)

    @contextmanager
    def capturing(self, device: Device) -> Iterator[tuple[torch.cuda.CUDAGraph, Recording]]:
        """Record torch work of this thread as a CUDA graph."""
        with capturing(self.streams(device), device.index) as captured:
            yield captured

    def keep_alive(self, event: Any = None, *objects: Any) -> None:
        """Keep objects until an event is done, and let go of those whose event is."""
        if objects:
            self._kept.append((event, objects))
        for _ in range(len(self._kept)):
            kept = self._kept.popleft()
            if not kept[0].query():
                self._kept.append(kept)
