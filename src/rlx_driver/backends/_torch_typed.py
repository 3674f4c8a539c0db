"""Typed I/O of torch: on the host by its kernels, on CUDA through pinned chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

from rlx_driver._casts import framework_kernels, read_cast, write_cast
from rlx_driver.backends import _cuda_staging as staging
from rlx_driver.backends._cuda_transfers import (
    NoPinnedMemory,
    cast_into,
    read_pinned,
    read_through,
    write_pinned,
    write_through,
)
from rlx_driver.backends._torch_casts import (
    device_reader,
    device_writer,
    host_kernels,
    host_tensor,
)
from rlx_driver.backends._torch_streams import StreamServices
from rlx_driver.backends._torch_tensors import is_wrapped
from rlx_driver.backends.base import Backend
from rlx_driver.errors import CaptureError

if TYPE_CHECKING:
    from rlx_driver._casts_numpy import Kernel
    from rlx_driver.backends._cuda_staging import Engine

__all__ = [
    "HOST_THREADS",
    "SMALL",
    "TypedServices",
    "host_converts",
    "require_no_capture",
]

SMALL = 64 << 10
"""Bytes of float32 up to which a transfer is converted on the host and sent at once."""
HOST_THREADS = 8
"""Threads of torch from which the host converts values of two bytes; see `host_converts`."""

_BY_HOST = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


class TypedServices(StreamServices, Backend):
    """The part of `TorchBackend` that has to do with typed I/O."""

    def write_f32(self, destination: torch.Tensor, dtype: np.dtype[Any], source: Any) -> None:
        """Convert values into a tensor of bytes, on torch's current stream where it is on CUDA."""
        if isinstance(source, torch.Tensor) and source.device.type == "cpu":
            source = source.detach().numpy()
        if destination.is_cuda:
            require_no_capture("a typed write")
            if type(source) is np.ndarray and source.nbytes <= SMALL:
                # torch makes the device current and tells autograd; bytes are in no graph of its
                _send(destination, dtype, source.reshape(-1))
                return
            with torch.no_grad(), torch.cuda.device(destination.device):
                _write_cuda(destination, dtype, source)
                if isinstance(source, torch.Tensor):  # maybe of JAX, which frees in its own order
                    stream = torch.cuda.current_stream()
                    self.keep_alive(self.record_event(stream, timing=False), source)
        elif destination.device.type == "cpu":
            if not isinstance(source, np.ndarray):
                source = self.copy_out(source)
            write_cast(destination.detach().numpy(), dtype, source.reshape(-1))
        else:
            super().write_f32(destination, dtype, source)
            return
        if not destination.is_inference():
            self.mark_written([destination])

    def read_f32(
        self, source: torch.Tensor, dtype: np.dtype[Any], out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Convert the bytes of a tensor to float32 values of the host."""
        if not source.is_cuda and source.device.type != "cpu":
            return super().read_f32(source, dtype, out)
        if out is None:
            out = np.empty(source.numel() // dtype.itemsize, np.float32)
        if source.is_cuda:
            require_no_capture("a typed read")
            if out.nbytes <= SMALL:
                read_cast(source.cpu().numpy(), dtype, out)
                return out
            with torch.no_grad(), torch.cuda.device(source.device):
                _read_cuda(source, dtype, out)
        else:
            read_cast(source.detach().numpy(), dtype, out)
        return out

    def is_plain_bytes(self, array: torch.Tensor) -> bool:
        """Tell quickly that a tensor is one run of bytes with memory of its own."""
        return (
            type(array) is torch.Tensor
            and array.dtype is torch.uint8
            and array.layout is torch.strided
            and array.dim() == 1
            and (array.is_cuda or array.device.type == "cpu")
            and array.is_contiguous()
            and not array.is_nested
            and not array.is_neg()
            and is_wrapped(array) is False
        )

    def host_casts(self, dtype: np.dtype[Any]) -> tuple[Kernel | None, Kernel | None]:
        """Give torch's kernels for memory of the host, where they agree with ml_dtypes."""
        return host_kernels(dtype)


def _write_cuda(
    destination: torch.Tensor, dtype: np.dtype[Any], source: np.ndarray[Any, Any] | torch.Tensor
) -> None:
    engine = staging.CudaEngine(destination.device)
    if isinstance(source, torch.Tensor):
        _write_from_device(engine, destination, dtype, source)
        return
    values = source.reshape(-1)
    is_pinned = _is_pinned(values)
    by_host = not is_pinned and host_converts(dtype)[0]
    cast = None if by_host else device_writer(dtype, destination.device)
    if cast is not None and is_pinned:
        write_pinned(engine, destination, dtype, values, cast)
        return
    try:
        pool = staging.pool_of(destination.device.index)
        write_through(engine, pool, destination, dtype, values, cast)
    except NoPinnedMemory:
        _send(destination, dtype, values)


def _send(destination: torch.Tensor, dtype: np.dtype[Any], values: np.ndarray[Any, Any]) -> None:
    """Convert on the host, then copy at once; blocks."""
    raw = np.empty(destination.numel(), np.uint8)
    write_cast(raw, dtype, values)
    destination.copy_(torch.from_numpy(raw))


def _read_cuda(source: torch.Tensor, dtype: np.dtype[Any], out: np.ndarray[Any, Any]) -> None:
    engine = staging.CudaEngine(source.device)
    if _share_bytes(source, torch.from_numpy(out)):  # managed memory
        source = source.clone()
    is_pinned = _is_pinned(out)
    by_host = not is_pinned and host_converts(dtype)[1]
    cast = None if by_host else device_reader(dtype, source.device)
    if cast is not None and is_pinned:
        read_pinned(engine, source, dtype, out, cast)
        return
    try:
        read_through(engine, staging.pool_of(source.device.index), source, dtype, out, cast)
    except NoPinnedMemory:
        read_cast(source.cpu().numpy(), dtype, out)


def host_converts(dtype: np.dtype[Any]) -> tuple[bool, bool]:
    """Tell whether the host converts (to write, to read) pageable memory rather than the device.

    Such memory is copied to or from a pinned chunk anyway. Where torch's kernels, which use its
    threads, convert on the way as fast as they copy, half of the bytes on the bus are saved. That
    was measured of bfloat16 and float16 on sixteen cores: 0.7 to 0.9 of the time. Types of one
    byte and integers took longer so, and few threads are slower than the bus.
    """
    if dtype not in _BY_HOST or torch.get_num_threads() < HOST_THREADS:
        return False, False
    write, read = framework_kernels(dtype)
    return write is not None, read is not None


def _write_from_device(
    engine: Engine, destination: torch.Tensor, dtype: np.dtype[Any], source: torch.Tensor
) -> None:
    values = source.detach().reshape(-1)
    if values.device != destination.device:
        values = values.to(destination.device)
    elif _share_bytes(values, destination):
        values = values.clone()
    cast = device_writer(dtype, destination.device)
    if cast is None:
        raw = np.empty(destination.numel(), np.uint8)
        write_cast(raw, dtype, values.cpu().numpy())
        destination.copy_(torch.from_numpy(raw))
        return
    size = dtype.itemsize
    for start, end in staging.pieces(values.numel(), staging.DIRECT_CHUNK // 4):
        cast_into(engine, cast, dtype, destination[start * size : end * size], values[start:end])


def _share_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    a, b = first.data_ptr(), second.data_ptr()
    return a < b + second.nbytes and b < a + first.nbytes


def _is_pinned(values: np.ndarray[Any, Any]) -> bool:
    tensor = host_tensor(values)
    return tensor[:1].is_pinned() and tensor[-1:].is_pinned()


def require_no_capture(what: str) -> None:
    """Refuse what the host takes part in, while the current stream is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            f"{what} was asked for inside a capture, where the host cannot take part: do it before "
            "or after. Nothing was changed"
        )
