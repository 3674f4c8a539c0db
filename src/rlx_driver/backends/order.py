"""The contract of ordering: what the core asks for around every access to a piece of memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Order", "Recording"]


class Recording:
    """The capture of a graph: which memory the captured work reads and writes.

    Nothing runs while it is recorded, so accesses are noted here instead of being ordered.
    """

    def __init__(self) -> None:
        self.reads: dict[Any, None] = {}
        self.writes: dict[Any, None] = {}

    def note(self, access: Any, *, writes: bool) -> None:
        """Note one access."""
        if writes:
            self.reads.pop(access, None)
            self.writes[access] = None
        elif access not in self.writes:
            self.reads[access] = None


class Order:
    """Orders the accesses of one buffer family; the base class serves synchronous frameworks.

    The core calls these around every access. On the host the only asynchronous framework is JAX,
    whose pending result the core waits for itself, so there is nothing to do here; for devices with
    streams there is `rlx_driver.backends.stream_order.StreamOrder`.
    """

    synchronous: ClassVar[bool] = True
    """Whether memory is settled for every framework once pending results are waited for."""

    def explain(self) -> str:
        """Say in words how frameworks are ordered here."""
        return "the host waits for results that are on their way"

    def recording(self) -> Recording | None:
        """Give the capture of a graph that the calling thread is in."""
        return None

    def is_settled(self) -> bool:
        """Tell whether a native access has nothing to wait for, on a device with streams."""
        return False

    def is_shared(self) -> bool:
        """Tell whether a functional access has nothing to wait for, on a device with streams."""
        return False

    def before_native(
        self, pending: Callable[[], None], result: Any | None, *, writes: bool = True
    ) -> bool:
        """Order the native framework's next work after all that was done before.

        Parameters
        ----------
        pending
            Waits on the host for the result; raises its error.
        result
            The pending array of a functional framework, or None.
        writes
            The work writes, so that it comes after readers too.

        Returns
        -------
        bool
            Whether the result is known to be finished, so that it can be forgotten.
        """
        if result is not None:
            pending()
        return True

    def after_native(self, *, wrote: bool = True) -> None:
        """Note that a piece of native work ends here, as far as it is enqueued."""

    def view_out(self) -> None:
        """Note that a native view goes out, which may be read and written from here on."""

    def before_functional(self, *, writes: bool = True) -> None:
        """Order a functional framework's next work after native work enqueued until now."""

    def functional_wrote(self) -> None:
        """Note a program of a functional framework that writes, and that came after all else."""

    def keep(self, *objects: Any) -> None:
        """Keep what enqueued native work reads until that is done."""

    def wait_result(self, array: Any, pending: Callable[[], None]) -> None:
        """Order native work after one functional array, which `pending` waits for on the host."""
        pending()

    @contextmanager
    def for_host(self, pending: Callable[[], None], result: Any | None) -> Iterator[None]:
        """Enter what copying to the host needs around it, ordered after the memory's producers."""
        self.before_native(pending, result, writes=False)
        yield
