"""The errors of the driver: each is a `DriverError` and the built-in a caller would expect.

Every message says what was asked, what was found, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlx_driver._races import Race

__all__ = [
    "AccessTimeoutError",
    "ArenaCorruptionError",
    "CapacityError",
    "CaptureError",
    "ClosedHandleError",
    "DTypeError",
    "DeviceUnavailableError",
    "DriverError",
    "DuplicateError",
    "LeakError",
    "MissingPackageError",
    "OutOfDeviceMemory",
    "PlanError",
    "RaceError",
    "RaceWarning",
    "RecompilationWarning",
    "ShapeError",
    "SnapshotError",
    "StaleViewError",
    "StreamError",
    "TransformError",
    "UnboundNameError",
    "UnknownFrameworkError",
    "UpdateFailedError",
    "ZeroCopyError",
]


class DriverError(Exception):
    """Base of every error the driver raises on purpose."""


class ZeroCopyError(DriverError, BufferError):
    """Memory cannot be shared (or taken over in place) and a copy was not allowed."""


class DTypeError(DriverError, TypeError):
    """A dtype is unknown, or the framework asked for has no counterpart of it."""


class ShapeError(DriverError, ValueError):
    """A shape, a tree of shapes or a number of elements does not fit."""


class DuplicateError(ShapeError):
    """A buffer, or memory of it, stands twice in a tree, or a name twice in a region."""


class DeviceUnavailableError(DriverError, RuntimeError):
    """A device, or the package that drives it, is missing on this machine."""


class MissingPackageError(DriverError, ModuleNotFoundError):
    """Something was asked for that needs an optional package; the text says how to install it."""


class UnknownFrameworkError(DriverError, ValueError):
    """No backend and no module of that name can take part in an exchange."""


class ClosedHandleError(DriverError, ValueError):
    """A buffer, handle or region was used after `close()`."""


class OutOfDeviceMemory(DriverError, MemoryError):  # noqa: N818 - the contract's name
    """An allocation is larger than the memory that is left on its device."""


class PlanError(DriverError, ValueError):
    """Intervals that make no sense together, or offsets that do not keep them apart."""


class CapacityError(PlanError, OutOfDeviceMemory):
    """No plan was found within the capacity; the text shows the peak and who is alive at it."""


class ArenaCorruptionError(DriverError, RuntimeError):
    """A debug arena found bytes changed that nobody was to write."""


class SnapshotError(DriverError, ValueError):
    """A file is no snapshot, is damaged, or does not fit what it is loaded into."""


class LeakError(DriverError, AssertionError):
    """Memory that was made inside `no_leaks` was still open at its end."""


class StaleViewError(DriverError, RuntimeError):
    """An accessor was asked for bytes that are changing, were given away, or belong elsewhere.

    Raised inside a write scope, from a callback of the buffer's own update, under a JAX trace, in
    a forked child, and by `jax`, `update` and the scopes after a user's own donation that was
    never committed.
    """


class AccessTimeoutError(DriverError, TimeoutError):
    """A scope was not entered in time, because others held the buffer."""


class UpdateFailedError(DriverError, RuntimeError):
    """A donated program failed while it ran: the bytes of its buffers are undefined."""


class StreamError(DriverError, RuntimeError):
    """Streams or events were asked for something that they cannot do together."""


class CaptureError(StreamError):
    """Work was asked for that a graph cannot record, or a graph that was never finished."""


class TransformError(DriverError, NotImplementedError):
    """A transform of JAX (a derivative, a batch) was asked of a call that has no rule for it."""


class UnboundNameError(DriverError, KeyError):
    """A name has no value bound to it."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument
        return str(self.args[0]) if self.args else ""


class RaceError(DriverError, RuntimeError):
    """Accesses went round the driver, as `rlx_driver.checking` found; `races` lists them.

    Parameters
    ----------
    text
        All that was found.
    races
        The same, one by one.
    """

    def __init__(self, text: str, races: Sequence[Race] = ()) -> None:
        super().__init__(text)
        self.races = list(races)


class RaceWarning(UserWarning):
    """An access went round the driver; see `rlx_driver.checking`."""


class RecompilationWarning(UserWarning):
    """The same step was traced again and again: pass one function object, with stable shapes."""
