"""Order between torch and JAX work on one CUDA device, without a host wait where it can be had.

torch work is ordered by torch's current stream. A JAX result makes that stream wait on the device
by ``__dlpack__(stream=)``; the other way round JAX's compute stream waits for a torch event. Where
JAX does not show its stream the host waits instead.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rlx_driver._ledger import ledger
from rlx_driver.backends.base import Order

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlx_driver.device import Device

__all__ = ["CudaOrder"]

_LEGACY_DEFAULT_STREAM = 1  # DLPack's number for torch's stream 0


class CudaOrder(Order):
    """Orders the accesses of one buffer family on one CUDA device."""

    synchronous: ClassVar[bool] = False

    def __init__(self, device: Device) -> None:
        self._index = device.index
        self._written: torch.cuda.Event | None = None
        self._written_on = 0

    def before_native(self, pending: Callable[[], None], result: Any | None) -> bool:
        """Make torch's current stream wait for a JAX result and for writes on other streams."""
        stream = torch.cuda.current_stream(self._index)
        if self._written is not None and self._written_on != stream.cuda_stream:
            stream.wait_event(self._written)
        if result is None:
            return True
        # The capsule is dropped at once: its only use is that the stream waits.
        result.__dlpack__(stream=stream.cuda_stream or _LEGACY_DEFAULT_STREAM)
        return False

    def after_native(self) -> None:
        """Remember where torch wrote, and make JAX wait for it."""
        stream = torch.cuda.current_stream(self._index)
        self._written = stream.record_event()
        self._written_on = stream.cuda_stream
        self._jax_waits(stream, self._written)

    def before_functional(self) -> None:
        """Make JAX wait for what torch's current stream holds now."""
        stream = torch.cuda.current_stream(self._index)
        if self._written is not None and self._written_on != stream.cuda_stream:
            stream.wait_event(self._written)
        self._jax_waits(stream, None)

    def _jax_waits(self, stream: torch.cuda.Stream, event: torch.cuda.Event | None) -> None:
        if "jax" not in sys.modules:
            return
        theirs = self._jax_stream()
        if theirs is None:
            ledger.count_host_wait()
            stream.synchronize()
        elif theirs.cuda_stream != stream.cuda_stream:
            theirs.wait_event(event or stream.record_event())

    def _jax_stream(self) -> torch.cuda.ExternalStream | None:
        from rlx_driver.registry import registry

        # JAX's first call may leave another device current; torch's is put back.
        with torch.cuda.device(self._index):
            handle = registry.get("jax").gpu_stream(self._index)  # type: ignore[attr-defined]
        if handle is None:
            return None
        return torch.cuda.ExternalStream(handle, device=torch.device("cuda", self._index))
