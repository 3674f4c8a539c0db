"""Bytes between memory of a backend and a file, a chunk at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver import _snapshot_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rlx_driver._snapshot_file import Snapshot
    from rlx_driver.backends.base import Backend

__all__ = ["chunks", "fill", "pieces", "read_chunks"]

_BYTE = np.dtype(np.uint8)


def chunks(nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut bytes into pieces: starts and ends."""
    step = _snapshot_file.CHUNK
    for start in range(0, nbytes, step):
        yield start, min(start + step, nbytes)


def pieces(backend: Backend, native: Any) -> Iterator[memoryview]:
    """Give the bytes of a contiguous array of a backend, to be used before the next is taken.

    Host memory is seen as it is; anything else is copied to the host, a chunk at a time where the
    backend has views.
    """
    if not backend.has_views:
        yield backend.copy_out(native).reshape(-1).view(_BYTE).data
        return
    flat = _as_bytes(backend, native)
    for start, end in chunks(int(flat.shape[0])):
        part = backend.index(flat, slice(start, end))
        yield (part if isinstance(part, np.ndarray) else backend.copy_out(part)).data


def fill(
    file: Snapshot, offset: int, backend: Backend, native: Any, advance: Callable[[int], None]
) -> None:
    """Read bytes of a file into a contiguous array of a backend that has views; blocks."""
    flat = _as_bytes(backend, native)
    if not isinstance(flat, np.ndarray):
        for start, part in read_chunks(file, offset, int(flat.shape[0]), advance):
            backend.copy_in(backend.index(flat, slice(start, start + part.size)), part)
        return
    for start, end in chunks(flat.size):
        file.read_into(offset + start, flat[start:end].data)
        advance(end - start)


def read_chunks(
    file: Snapshot, offset: int, nbytes: int, advance: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.uint8]]]]:
    """Give where each piece begins, and its bytes, in memory that the next piece uses again."""
    room = np.empty(min(nbytes, _snapshot_file.CHUNK), _BYTE)
    for start, end in chunks(nbytes):
        part = room[: end - start]
        file.read_into(offset + start, part.data)
        yield start, part
        advance(end - start)


def _as_bytes(backend: Backend, native: Any) -> Any:
    facts = backend.facts(native)
    if facts.dtype == _BYTE and len(facts.shape) == 1:
        return native
    return backend.reinterpret(native, _BYTE, (facts.byte_size,))
