"""Typed I/O of torch: on the host by its kernels, on CUDA through pinned chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlx_driver._casts import read_cast, write_cast
from rlx_driver.backends import _cuda_staging as staging
from rlx_driver.backends._torch_casts import (
    device_reader,
    device_writer,
    host_kernels,
    host_tensor,
)
from rlx_driver.backends._torch_streams import StreamServices
from rlx_driver.backends.base import Backend
from rlx_driver.errors import CaptureError

if TYPE_CHECKING:
    from rlx_driver._casts_numpy import Kernel
    from rlx_driver.backends._cuda_staging import Engine, Lane, Piece, Pool
    from rlx_driver.backends._torch_casts import Cast

__all__ = [
    "SMALL",
    "TypedServices",
    "read_through",
    "require_no_capture",
    "write_pinned",
    "write_through",
]

SMALL = 64 << 10
"""Bytes of float32 up to which a transfer is converted on the host and sent at once."""


class TypedServices(StreamServices, Backend):
    """The part of `TorchBackend` that has to do with typed I/O."""

    def write_f32(self, destination: torch.Tensor, dtype: np.dtype[Any], source: Any) -> None:
        """Convert values into a tensor of bytes, on torch's current stream where it is on CUDA."""
        if isinstance(source, torch.Tensor) and source.device.type == "cpu":
            source = source.detach().numpy()
        if destination.is_cuda:
            require_no_capture("a typed write")
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

    def read_f32(self, source: torch.Tensor, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """Convert the bytes of a tensor to float32 values of the host."""
        if not source.is_cuda and source.device.type != "cpu":
            return super().read_f32(source, dtype)
        out = np.empty(source.numel() // dtype.itemsize, np.float32)
        if source.is_cuda:
            require_no_capture("a typed read")
            with torch.no_grad(), torch.cuda.device(source.device):
                _read_cuda(source, dtype, out)
        else:
            read_cast(source.detach().numpy(), dtype, out)
        return out

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
    pool = None if values.nbytes <= SMALL else staging.pool_of(destination.device.index)
    cast = None if pool is None else device_writer(dtype, destination.device)
    if pool is not None and cast is not None and _is_pinned(values):
        write_pinned(engine, destination, dtype, values, cast)
        return
    if pool is not None:
        try:
            write_through(engine, pool, destination, dtype, values, cast)
            return
        except _NoPinnedMemory:
            pass
    raw = np.empty(destination.numel(), np.uint8)
    write_cast(raw, dtype, values)
    destination.copy_(torch.from_numpy(raw))


def _read_cuda(source: torch.Tensor, dtype: np.dtype[Any], out: np.ndarray[Any, Any]) -> None:
    if out.nbytes > SMALL:
        cast = device_reader(dtype, source.device)
        engine = staging.CudaEngine(source.device)
        try:
            read_through(engine, staging.pool_of(source.device.index), source, dtype, out, cast)
            return
        except _NoPinnedMemory:
            pass
    read_cast(source.cpu().numpy(), dtype, out)


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
        _cast_into(engine, cast, dtype, destination[start * size : end * size], values[start:end])


def write_pinned(
    engine: Engine,
    destination: torch.Tensor,
    dtype: np.dtype[Any],
    values: np.ndarray[Any, Any],
    cast: Cast,
) -> None:
    """Send float32 values straight from pinned memory, and convert them on the device; blocks."""
    size, source = dtype.itemsize, host_tensor(values)
    parts = staging.pieces(values.size, staging.DIRECT_CHUNK // 4)
    scratch = staging.as_floats(engine.scratch(4 * min(values.size, staging.DIRECT_CHUNK // 4)))
    try:
        for start, end in parts:
            there = scratch[: end - start]
            engine.copy(there, source[start:end])
            _cast_into(engine, cast, dtype, destination[start * size : end * size], there)
    finally:
        engine.record().synchronize()  # until then the device may read what the caller may change


def write_through(
    engine: Engine,
    pool: Pool,
    destination: torch.Tensor,
    dtype: np.dtype[Any],
    values: np.ndarray[Any, Any],
    cast: Cast | None,
) -> None:
    """Send values through pinned chunks; with a `cast` as float32, else converted on the host.

    Returns when the values were read; the device may not be done.
    """
    size = dtype.itemsize
    wide = max(size, 4) if cast is None else 4
    parts = staging.pieces(values.size, pool.chunk // wide)
    with _lanes(engine, pool, len(parts)) as lanes:
        if cast is None:

            def begin(lane: Lane, part: Piece) -> None:
                start, end = part
                here = lane.memory[: (end - start) * size]
                write_cast(here.numpy(), dtype, values[start:end])
                engine.copy(destination[start * size : end * size], here)
        else:
            source = host_tensor(values)
            scratch = staging.as_floats(engine.scratch(4 * min(values.size, pool.chunk // 4)))

            def begin(lane: Lane, part: Piece) -> None:
                start, end = part
                here = staging.as_floats(lane.memory)[: end - start]
                here.copy_(source[start:end])
                there = scratch[: end - start]
                engine.copy(there, here)
                _cast_into(engine, cast, dtype, destination[start * size : end * size], there)

        staging.pipeline(parts, lanes, engine, begin)


def read_through(
    engine: Engine,
    pool: Pool,
    source: torch.Tensor,
    dtype: np.dtype[Any],
    out: np.ndarray[Any, Any],
    cast: Cast | None,
) -> None:
    """Fetch values through pinned chunks, converted on the device, or without a `cast` here."""
    size = dtype.itemsize
    wide = max(size, 4)
    parts = staging.pieces(out.size, pool.chunk // wide)
    with _lanes(engine, pool, len(parts)) as lanes:
        if cast is None:

            def begin(lane: Lane, part: Piece) -> None:
                start, end = part
                engine.copy(lane.memory[: (end - start) * size], source[start * size : end * size])

            def finish(lane: Lane, part: Piece) -> None:
                start, end = part
                read_cast(lane.memory[: (end - start) * size].numpy(), dtype, out[start:end])
        else:
            result = torch.from_numpy(out)
            scratch = staging.as_floats(engine.scratch(4 * min(out.size, pool.chunk // wide)))

            def begin(lane: Lane, part: Piece) -> None:
                start, end = part
                there = scratch[: end - start]
                _cast_out(engine, cast, dtype, there, source[start * size : end * size])
                engine.copy(staging.as_floats(lane.memory)[: end - start], there)

            def finish(lane: Lane, part: Piece) -> None:
                start, end = part
                result[start:end].copy_(staging.as_floats(lane.memory)[: end - start])

        staging.pipeline(parts, lanes, engine, begin, finish)


def _cast_into(
    engine: Engine, cast: Cast, dtype: np.dtype[Any], target: torch.Tensor, values: torch.Tensor
) -> None:
    if _aligned(target, dtype):
        engine.launch(cast, target, values)
        return
    between = engine.scratch(target.numel())
    engine.launch(cast, between, values)
    engine.copy(target, between)


def _cast_out(
    engine: Engine, cast: Cast, dtype: np.dtype[Any], values: torch.Tensor, source: torch.Tensor
) -> None:
    if not _aligned(source, dtype):
        between = engine.scratch(source.numel())
        engine.copy(between, source)
        source = between
    engine.launch(cast, values, source)


def _aligned(memory: torch.Tensor, dtype: np.dtype[Any]) -> bool:
    """Tell whether bytes can be seen as a dtype: a kernel on others would fault."""
    size = dtype.itemsize
    return memory.data_ptr() % size == 0 and memory.storage_offset() % size == 0


def _share_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    a, b = first.data_ptr(), second.data_ptr()
    return a < b + second.nbytes and b < a + first.nbytes


class _NoPinnedMemory(Exception):  # noqa: N818 - it is a way round, not an error to be seen
    """Not one chunk of pinned memory can be had."""


class _lanes:  # noqa: N801 - used as a function
    """Take the lanes for a transfer, no more than it has parts."""

    def __init__(self, engine: Engine, pool: Pool, parts: int) -> None:
        self._scope = pool.lanes(engine, min(staging.LANES, parts))

    def __enter__(self) -> list[Lane]:
        try:
            return self._scope.__enter__()
        except RuntimeError as error:
            raise _NoPinnedMemory from error

    def __exit__(self, *error: Any) -> None:
        self._scope.__exit__(*error)


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
