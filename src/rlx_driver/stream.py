"""Command streams: order of work on one device, with one interface over the frameworks."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, runtime_checkable

from rlx_driver._ledger import ledger
from rlx_driver.device import Device
from rlx_driver.errors import DeviceUnavailableError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["CommandStream", "JaxStream", "SyncStream", "TorchStream", "command_stream"]

T = TypeVar("T")


@runtime_checkable
class CommandStream(Protocol):
    """Order of work on one device.

    Work is enqueued by `launch`, or by the framework itself inside ``with stream:``. `submit` makes
    sure that it is on its way, `wait` that it is done. This is the first form: events, and waiting
    of one stream for another, are still to come.
    """

    @property
    def device(self) -> Device:
        """Where the work runs."""

    def submit(self) -> None:
        """Make sure that enqueued work is on its way; never blocks."""

    def wait(self) -> None:
        """Block until the work is done; raises the error of a failed launch."""

    def submit_and_wait(self) -> None:
        """Do both."""

    def launch(self, function: Callable[..., T], *args: Any) -> T | None:
        """Run a function under the stream and track what it returns."""

    def track(self, *arrays: Any) -> None:
        """Count arrays, and trees of them, to the work that `wait` waits for."""

    def __enter__(self) -> Self:
        """Make it the current stream."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Make the stream before it current again; does not wait."""


class _Stream:
    """What all streams share: poisoning by a failed launch, and nesting."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._error: BaseException | None = None
        self._entered: list[ExitStack] = []

    @property
    def device(self) -> Device:
        """Where the work runs."""
        return self._device

    def submit(self) -> None:
        """Do nothing: the frameworks send work on its way as it is enqueued."""

    def wait(self) -> None:
        """Block until the work is done.

        Raises
        ------
        BaseException
            The error of the first launch that failed, with its traceback. The stream is usable
            again afterwards.
        """
        try:
            self._finish()
        finally:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def submit_and_wait(self) -> None:
        """Do both; raises as `wait`."""
        self.submit()
        self.wait()

    def launch(self, function: Callable[..., T], *args: Any) -> T | None:
        """Run a function under the stream and track the arrays it returns.

        Parameters
        ----------
        function, args
            Called at once as ``function(*args)``; its array work is asynchronous as far as the
            framework makes it so.

        Returns
        -------
        result
            What the function returned; None when it failed, or when an earlier launch did: a
            failure poisons the stream, later launches do not run, and `wait` raises it.
        """
        if self._error is not None:
            return None
        try:
            with self._current():
                result = function(*args)
        except Exception as error:
            self._error = error
            return None
        self.track(result)
        return result

    def track(self, *arrays: Any) -> None:
        """Count arrays to the work of this stream; order of enqueueing does it here."""

    def _current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _finish(self) -> None:
        """Block until the work is done."""

    def __enter__(self) -> Self:
        stack = ExitStack()
        stack.enter_context(self._current())
        self._entered.append(stack)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered.pop().close()

    def __repr__(self) -> str:
        state = ", poisoned" if self._error is not None else ""
        return f"<{type(self).__name__} on {self._device}{state}>"


class SyncStream(_Stream):
    """Host work, which is done when the call that enqueues it returns.

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


class TorchStream(_Stream):
    """A torch stream on CUDA or ROCm; on Metal the one queue that torch has there.

    Parameters
    ----------
    device
        A device that torch serves.
    stream
        A ``torch.cuda.Stream`` to wrap; left out, a new one.

    Raises
    ------
    DeviceUnavailableError
        When torch, or the device, is missing.
    """

    def __init__(self, device: Device | str = "cuda", stream: Any = None) -> None:
        super().__init__(Device(device))
        backend: Any = self._device.backend
        if not hasattr(backend, "new_stream"):
            raise DeviceUnavailableError(f"torch has no streams on {self._device}")
        self._backend = backend
        self._stream = backend.new_stream(self._device) if stream is None else stream

    @property
    def native(self) -> Any:
        """The ``torch.cuda.Stream``; None on Metal."""
        return self._stream

    def _current(self) -> AbstractContextManager[Any]:
        return self._backend.using_stream(self._stream)  # type: ignore[no-any-return]

    def _finish(self) -> None:
        ledger.count_host_wait()
        self._backend.synchronize(self._device, self._stream)


class JaxStream(_Stream):
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
        self._tracked: list[Any] = []

    def track(self, *arrays: Any) -> None:
        """Keep arrays, and those in trees, until `wait`.

        Finished and donated ones are let go; one that has failed by now poisons the stream.
        """
        backend = self._backend
        leaves = [leaf for leaf in backend.flatten(arrays)[0] if backend.owns(leaf)]
        fresh = [leaf for leaf in leaves if backend.may_cache(leaf)]  # traced values do no work
        self._tracked = [array for array in self._tracked + fresh if self._is_pending(array)]

    def _is_pending(self, array: Any) -> bool:
        if array.is_deleted():
            return False
        is_ready = getattr(array, "is_ready", None)  # which keys do not have
        if is_ready is None or not is_ready():
            return True
        try:
            array.block_until_ready()  # at once; an error of its computation would be lost with it
        except Exception as error:
            self._error = self._error or error
        return False

    def _current(self) -> AbstractContextManager[Any]:
        return self._backend.on_device(self._device)  # type: ignore[no-any-return]

    def _finish(self) -> None:
        tracked, self._tracked = self._tracked, []
        alive = [array for array in tracked if not array.is_deleted()]
        if alive:
            ledger.count_host_wait()
            self._backend.wait(alive)


def command_stream(device: Device | str = "cpu") -> CommandStream:
    """Give a stream for a device, of the framework that owns its memory.

    Parameters
    ----------
    device
        Where.

    Returns
    -------
    CommandStream
        `SyncStream` on the host, `TorchStream` on CUDA, ROCm and Metal, `JaxStream` on TPU.

    Raises
    ------
    DeviceUnavailableError
        When the device is not there.
    """
    place = Device(device)
    return place.backend.stream(place)  # type: ignore[no-any-return]
