"""The parts of a transfer between the host and a GPU, with the cast on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rlx_driver._casts import read_cast, write_cast
from rlx_driver.backends import _cuda_staging as staging
from rlx_driver.backends._torch_casts import host_tensor

if TYPE_CHECKING:
    import numpy as np

    from rlx_driver.backends._cuda_staging import Engine, Lane, Piece, Pool
    from rlx_driver.backends._torch_casts import Cast

__all__ = [
    "NoPinnedMemory",
    "cast_into",
    "read_pinned",
    "read_through",
    "write_pinned",
    "write_through",
]


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
            cast_into(engine, cast, dtype, destination[start * size : end * size], there)
    finally:
        engine.record().synchronize()  # until then the device may read what the caller may change


def read_pinned(
    engine: Engine,
    source: torch.Tensor,
    dtype: np.dtype[Any],
    out: np.ndarray[Any, Any],
    cast: Cast,
) -> None:
    """Convert on the device, and fetch float32 values straight into pinned memory; blocks."""
    size, result = dtype.itemsize, torch.from_numpy(out)
    parts = staging.pieces(out.size, staging.DIRECT_CHUNK // 4)
    scratch = staging.as_floats(engine.scratch(4 * min(out.size, staging.DIRECT_CHUNK // 4)))
    try:
        for start, end in parts:
            there = scratch[: end - start]
            _cast_out(engine, cast, dtype, there, source[start * size : end * size])
            engine.copy(result[start:end], there)
    finally:
        engine.record().synchronize()  # until then the device may write what the caller may free


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
                cast_into(engine, cast, dtype, destination[start * size : end * size], there)

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


def cast_into(
    engine: Engine, cast: Cast, dtype: np.dtype[Any], target: torch.Tensor, values: torch.Tensor
) -> None:
    """Convert values on the device into bytes at any address."""
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


class NoPinnedMemory(Exception):  # noqa: N818 - it is a way round, not an error to be seen
    """Not one chunk of pinned memory can be had."""


class _lanes:  # noqa: N801 - used as a function
    """Take the lanes for a transfer, no more than it has parts."""

    def __init__(self, engine: Engine, pool: Pool, parts: int) -> None:
        self._scope = pool.lanes(engine, min(staging.LANES, parts))

    def __enter__(self) -> list[Lane]:
        try:
            return self._scope.__enter__()
        except RuntimeError as error:
            raise NoPinnedMemory from error

    def __exit__(self, *error: Any) -> None:
        self._scope.__exit__(*error)
