"""Command streams: order of work on one device, with one interface over the frameworks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlx_driver._stream_base import BaseStream, CommandStream
from rlx_driver._torch_stream import TorchStream
from rlx_driver.device import Device
from rlx_driver.errors import DeviceUnavailableError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rlx_driver.events import Event

__all__ = ["CommandStream", "JaxStream", "SyncStream", "TorchStream", "command_stream"]


class SyncStream(BaseStream):
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


class JaxStream(BaseStream):
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
