"""One array of a functional framework that a user got: is it held, and have its bytes changed."""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
import weakref
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver.access import Access, Lease, foreign_thread
from rlx_driver.errors import CaptureError
from rlx_driver.transfer import span_of

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterator
    from types import FrameType

    from rlx_driver._checking import Check
    from rlx_driver._races import Place
    from rlx_driver._views import ViewsMixin

    Writers = deque[tuple[Any, Place]]

__all__ = ["Watch", "used_in"]


class Watch:
    """One array handed out.

    The user has an alias of the lease's own array, over the same buffer of the framework, so that
    a weak reference tells when it is let go. Where a framework has no aliases the user has the
    very array, and references to it are counted instead.

    Parameters
    ----------
    buffer, lease, origin
        Whose array it is, and the lease's own one.
    place
        Where it was handed out.
    check
        The block that it was handed out in.
    writers
        The mutable views of its memory that were handed out, to which others are added.
    """

    __slots__ = (
        "_access",
        "_lease",
        "_native",
        "alias",
        "backend",
        "check",
        "expected",
        "label",
        "native_backend",
        "origin",
        "place",
        "span",
        "told",
        "writers",
        "written_at",
    )

    def __init__(
        self,
        buffer: ViewsMixin,
        lease: Lease,
        origin: Any,
        place: Place,
        check: Check,
        writers: Writers,
    ) -> None:
        self._access = weakref.ref(buffer._access)
        self.label = buffer._access.label
        self.backend = lease.backend
        # Weakly, and what it is made of strongly only while the user's array keeps it alive too:
        # the checker is not to keep memory.
        self._lease = weakref.ref(lease)
        self._native: Callable[[], Any] = functools.partial(_given, buffer._native)
        self.native_backend = buffer._backend
        self.origin = origin
        self.check = check
        self.writers = writers
        self.span = span_of(buffer._facts)
        self.place = place
        self.alias: weakref.ref[Any] | None = None
        self.expected: int | None = None  # the checksum; None while there is nothing to compare
        self.written_at: Place | None = None  # the last write by the driver that may have ended it
        self.told = False  # its missing commit was reported

    @property
    def access(self) -> Access | None:
        """The discipline of its memory, while that is alive."""
        return self._access()

    @property
    def newest(self) -> Any | None:
        """The array that its lease has now."""
        lease = self._lease()
        return None if lease is None else lease.array

    # --- its life

    def given(self) -> Any | None:
        """Give the array that the user has, or None when it was let go."""
        return self.origin if self.alias is None else self.alias()

    def is_dead(self) -> bool:
        """Tell whether the array was donated or deleted, by the driver or by the user."""
        return self.backend.is_dead(self.origin)

    def expect_death(self) -> None:
        """Keep the memory no longer: a donation follows, or has been."""
        if (native := self._native()) is not None:
            self._native = weakref.ref(native)

    def is_held(self, others: int = 0) -> bool:
        """Tell whether the user holds it; `others` is how many references our callers have."""
        if self.alias is not None:
            return self.alias() is not None
        access = self.access
        ours = _REFERENCES + others + (self.newest is self.origin)
        if access is not None:
            ours += sum(array is self.origin for _, array in access.retired)
            ours += sum(lease.after is self.origin for lease in list(access.leases.values()))
        return sys.getrefcount(self.origin) > ours

    def was_given_away(self) -> bool:
        """Tell whether it was donated, and its lease has no newer array."""
        return self.newest is self.origin and self.is_dead()

    def is_uncommitted(self, holder: int = 0) -> bool:
        """Tell whether it was given away by the user, who has not committed the result.

        An update by the driver looks like that for a moment, but holds the access meanwhile, and
        has replaced the array before it gives that back. `holder` is as for `is_changed`.
        """
        access = self.access
        return (
            access is not None
            and access.state == "open"
            and self.was_given_away()
            and access.writer in (0, holder)
            and self.was_given_away()
        )

    def matters(self) -> bool:
        """Tell whether anything may still be found of it."""
        return not self.is_dead() or self.is_held() or self.was_given_away()

    def overlaps(self, span: tuple[int, int]) -> bool:
        """Tell whether its memory overlaps another piece."""
        return self.span[0] < span[1] and span[0] < self.span[1]

    # --- its bytes

    def remember(self, access: Access) -> None:
        """Take the checksum, as soon as the value is there."""
        origin = self.origin
        if access.owner is not None and not self.backend.device_of(origin).is_host:
            return  # only its owner reaches such memory, so nobody can go round the driver
        if self.span[0] == self.span[1] or access.is_recording():
            return
        try:
            if foreign_thread() and not self.backend.is_ready(origin):
                return  # maybe a callback of the very program that computes it
            self.backend.wait(origin)
            if access.synchronous:
                self.expected = self.checksum()
            else:
                with access.settle_for_host():
                    self.expected = self.checksum()
        except Exception:  # its program failed: who looks at the value gets that error
            self.expected = None

    def checksum(self) -> int | None:
        """Give the checksum of the bytes as they are; None when they cannot be looked at."""
        native = self._native()
        if native is None:
            return None
        try:
            host = (
                native if isinstance(native, np.ndarray) else self.native_backend.copy_out(native)
            )
        except CaptureError:  # a graph of the user's own, in which nothing can be copied now
            return None
        raw = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        return zlib.crc32(raw)  # type: ignore[arg-type]

    def is_changed(self, holder: int = 0) -> bool:
        """Tell whether the bytes changed, and no write by the driver or by a donation did it.

        Parameters
        ----------
        holder
            The thread that calls, when it has the access for writing.
        """
        if self.expected is None or self._is_explained():
            return False
        access = self.access
        if access is not None and not access.synchronous and access.is_recording():
            return False
        found = self.checksum()
        # In this order: an update shows as a writer until its donation shows.
        writer = 0 if access is None else access.writer
        if found is None or found == self.expected:
            return False
        return writer in (0, holder) and not self._is_explained()

    def _is_explained(self) -> bool:
        """Tell whether the bytes may change: it is dead, or another array of its memory is.

        Another one that is dead was donated by the user, who has yet to commit the result.
        """
        access = self.access
        others = [] if access is None else list(access.leases.values())
        return self.is_dead() or any(
            lease.array is not None and lease.is_dead(lease.array) for lease in others
        )


def used_in(error: BaseException, dead: list[Watch]) -> list[Watch]:
    """Find the dead arrays that were used: those of the innermost frame that has any.

    Where no frame has one, all that somebody still holds.
    """
    backends = {watch.backend for watch in dead}
    # Functions around the block still run. Before 3.13 a look at the variables of one would keep
    # what is in them until it returns, and so views that it lets go of later.
    keeps = sys.version_info < (3, 13)
    running = {frame for frame, _ in traceback.walk_stack(None)} if keeps else set()
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        if frame in running and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            continue
        found = [
            value
            for value in _values(frame)
            for backend in backends
            if backend.owns(value) and backend.is_concrete(value) and backend.is_dead(value)
        ]
        if found:
            return [watch for watch in dead if any(watch.given() is value for value in found)]
    return [watch for watch in dead if watch.is_held()]


def _values(frame: FrameType) -> Iterator[Any]:
    """Give the local variables of a frame, and what lies in containers among them."""
    level = list(frame.f_locals.values())
    for _ in range(3):
        yield from level
        level = [
            inner
            for value in level
            if type(value) in (list, tuple, dict)
            for inner in (value.values() if type(value) is dict else value)
        ]


def _given(native: Any) -> Any:
    return native


class _Counted:
    """Finds how many references `sys.getrefcount` counts for an attribute that nobody else has."""

    def __init__(self) -> None:
        self.origin = object()

    def count(self) -> int:
        return sys.getrefcount(self.origin)


_REFERENCES = _Counted().count()
