"""Recording torch work as a CUDA graph, on a stream apart from the one that JAX runs on."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from rlx_driver.errors import CaptureError, DriverError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlx_driver.backends._cuda_streams import CudaStreams
    from rlx_driver.backends.base import Recording

__all__ = ["capturing"]


@contextmanager
def capturing(streams: CudaStreams, index: int) -> Iterator[tuple[torch.cuda.CUDAGraph, Recording]]:
    """Record what torch enqueues on a device in this thread, and the accesses to buffers.

    Raises
    ------
    CaptureError
        When torch or CUDA refuses to capture some of it. The graph is of no use then.
    """
    if torch.cuda.is_current_stream_capturing() or streams.recording() is not None:
        raise CaptureError(
            "a capture was begun inside another one: end that first. Nothing was run"
        )
    graph = torch.cuda.CUDAGraph()
    apart = torch.cuda.Stream(torch.device("cuda", index))
    # thread_local: what JAX's own threads do meanwhile, allocation too, is none of its business.
    capture = torch.cuda.graph(graph, stream=apart, capture_error_mode="thread_local")
    before = torch.cuda.current_stream(index)
    with (
        torch.cuda.device(index),
        torch.cuda.stream(before),  # comes back also when a failed capture leaves another current
        streams.record_accesses() as recording,
    ):
        capture.__enter__()
        try:
            yield graph, recording
        except BaseException as error:
            _abandon(capture)
            if isinstance(error, (DriverError, KeyboardInterrupt)) or not _is_of_capture(error):
                raise
            raise _refused(error) from error
        try:
            capture.__exit__(None, None, None)
        except RuntimeError as error:
            _abandon(None)
            raise _refused(error) from error


def _abandon(capture: torch.cuda.graph | None) -> None:
    """End a capture whose graph nobody wants; torch's generator must not go on counting for it."""
    if capture is not None:
        with suppress(RuntimeError):
            capture.__exit__(None, None, None)
    with suppress(RuntimeError):
        torch.cuda.synchronize()  # a failed capture leaves its error behind: take it here


def _is_of_capture(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "captur" in str(error).lower()


def _refused(error: BaseException) -> CaptureError:
    first = str(error).strip().partition("\n")[0]
    return CaptureError(
        f"this work cannot be captured: {first}. A graph records torch work on the device: no "
        "waiting, no .item(), no printing of values, no copies from pageable memory. Nothing was "
        "run"
    )
