"""Graphs of recorded work over buffers, replayed in order with everything else."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlx_driver._fence import fence
from rlx_driver._locks import acquire, release
from rlx_driver.access import Access, written
from rlx_driver.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rlx_driver.buffer import Buffer
    from rlx_driver.device import Device

__all__ = ["CommandGraph", "captured"]


class CommandGraph:
    """Recorded work, which `replay` runs as often as you like; made by `TorchStream.capture`.

    It keeps the memory of its buffers and of its own tensors alive. A Buffer that was closed
    makes `replay` raise.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._native: Any = None
        self._reads: list[Access] = []
        self._writes: list[Access] = []
        self._memory: list[Any] = []

    @property
    def device(self) -> Device:
        """Where it runs."""
        return self._stream.device  # type: ignore[no-any-return]

    @property
    def native(self) -> Any:
        """The ``torch.cuda.CUDAGraph``; None before the capture has ended well."""
        return self._native

    def replay(self) -> None:
        """Run the recorded work once, on the stream it was captured from.

        It comes after every earlier access to its buffers, by any framework, and later ones come
        after it. Arrays that `jax` handed out of buffers it writes are dead afterwards. Copies:
        never. Blocks: until scopes of other threads are left; on the host for nothing else where
        JAX shows its stream.

        Raises
        ------
        CaptureError
            When the capture did not end well.
        ClosedHandleError
            When a buffer was closed.
        ZeroCopyError
            When an alias blocks the fence of one. Nothing was run.
        """
        if self._native is None:
            raise CaptureError(
                "this graph was never finished: its capture failed, or has not ended. Capture anew"
            )
        acquire(self._writes, self._reads)
        try:
            with self._stream.as_current():
                fence(self._writes)
                for access in self._writes:
                    access.settle()
                for access in self._reads:
                    access.settle(writes=False)
                self._native.replay()
                for access in self._writes:
                    access.after_native()
                for access in self._reads:
                    access.after_native(wrote=False)
            written(self._writes)
        finally:
            release(self._writes, self._reads)

    def __repr__(self) -> str:
        state = "unfinished" if self._native is None else "ready"
        return (
            f"<CommandGraph on {self.device}, {state}: writes {len(self._writes)} and reads "
            f"{len(self._reads)} buffers>"
        )


@contextmanager
def captured(
    stream: Any, backend: Any, writes: Iterable[Buffer], reads: Iterable[Buffer]
) -> Iterator[CommandGraph]:
    """Record the work of a block; see `TorchStream.capture`."""
    graph = CommandGraph(stream)
    named = [(buffer, True) for buffer in writes] + [(buffer, False) for buffer in reads]
    for buffer, _ in named:
        buffer._materialise()
        if buffer.device != stream.device:
            raise CaptureError(
                f"{buffer!r} is not on {stream.device}, where the graph is to run. Nothing was run"
            )
    with backend.capturing(stream.device) as (native, recording):
        for buffer, is_written in named:
            recording.note(buffer._access, writes=is_written)
        yield graph
    graph._writes, graph._reads = list(recording.writes), list(recording.reads)
    graph._native = native
