"""Taking accesses: many readers or one writer each, several at once, all or none.

An access has a *token*, in the list `Access.vacant` while nobody holds it. A writer takes it; so
does the first of a group of readers, and the last one gives it back. Popping it from the list is
atomic, so an update of one buffer needs no lock (which would be a tenth of its cost). Everything
else goes by one lock for all accesses, which makes taking many at once atomic: no order of taking
deadlocks. It is held for a few comparisons, never while a framework is called.
"""

from __future__ import annotations

import os
import threading
import time
from threading import get_ident
from typing import TYPE_CHECKING

from rlx_driver.access import alive, foreign_thread, own_scope
from rlx_driver.errors import AccessTimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rlx_driver.access import Access

__all__ = ["acquire", "release", "sleepers", "wake"]

_lock = threading.Lock()
_changed = threading.Condition(_lock)
sleepers = 0
"""Threads that wait, or are about to look whether they have to."""


def acquire(
    writes: Sequence[Access], reads: Sequence[Access] = (), *, timeout: float | None = None
) -> None:
    """Take several accesses at once, some for writing and some for reading.

    Parameters
    ----------
    writes, reads
        Each access at most once.
    timeout
        Seconds to wait for other threads; None for ever.

    Raises
    ------
    ClosedHandleError, UpdateFailedError
        When one is closed, or its memory is lost.
    StaleViewError
        When this very thread holds one in a way that waiting would never end, or after a fork.
    AccessTimeoutError
        When others held one for too long. Nothing is held then.
    """
    global sleepers
    me = get_ident()
    with _lock:
        blocker = _take(writes, reads, me)
        if blocker is None:
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        sleepers += 1  # before looking again: see `release`
        for access in writes:
            access.waiting += 1  # keeps new readers out, so that they cannot starve a writer
        try:
            while (blocker := _take(writes, reads, me)) is not None:
                _require_an_end(writes, reads, me)
                if foreign_thread():
                    raise own_scope(blocker, writing=True)
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or not _changed.wait(left):
                    holders = f"{len(blocker.readers)} reader(s)" if blocker.readers else "a writer"
                    raise AccessTimeoutError(
                        f"{blocker.label} could not be taken within {timeout} s: it is held by "
                        f"{holders}. Nothing was changed"
                    )
        finally:
            sleepers -= 1
            for access in writes:
                access.waiting -= 1
            _changed.notify_all()  # a writer that gave up may have kept readers out


def release(writes: Iterable[Access], reads: Iterable[Access] = ()) -> None:
    """Give accesses back.

    The token goes back before `sleepers` is read, and a thread that goes to sleep counts itself
    before it looks for the token: one of the two sees the other.
    """
    me = get_ident()
    for access in writes:
        # `Access.refresh`, spelled out: this loop is the hot end of every update of a tree.
        settled = access.synchronous
        free = access.state == "open"
        access.native_ready = free and settled and access.pending is None
        access.functional_ready = free and (settled or not access.native_out)
        access.writer = 0
        if free:
            access.vacant.append(None)
    if reads:
        with _lock:
            for access in reads:
                _leave(access, me)
    if sleepers:
        wake()


def wake() -> None:
    """Make every sleeper look again."""
    with _lock:
        _changed.notify_all()


def _take(writes: Sequence[Access], reads: Sequence[Access], me: int) -> Access | None:
    """Take all with the lock held, or none: then give one that is held by others."""
    taken = 0
    try:
        for access in writes:
            access.vacant.pop()
            taken += 1
    except IndexError:
        for access in writes[:taken]:
            access.vacant.append(None)
        return writes[taken]
    for entered, access in enumerate(reads):
        if not _enter(access, me, also_writes=bool(writes)):
            for other in reads[:entered]:
                _leave(other, me)
            for other in writes:
                other.vacant.append(None)
            return access
    for access in writes:
        access.writer = me
        access.native_ready = access.functional_ready = False
    return None


def _enter(access: Access, me: int, *, also_writes: bool) -> bool:
    """Join the readers of an access, with the lock held."""
    # A waiting writer keeps new readers out, but not one that it waits for itself, and not one
    # that is a waiting writer too: those two would wait for each other.
    if access.waiting and me not in access.readers and not also_writes:
        return False
    if not access.readers:
        try:
            access.vacant.pop()
        except IndexError:
            return False
    access.readers[me] = access.readers.get(me, 0) + 1
    return True


def _leave(access: Access, me: int) -> None:
    """Leave the readers of an access, with the lock held."""
    if access.readers.get(me, 0) > 1:
        access.readers[me] -= 1
    elif access.readers.pop(me, None) and not access.readers and access.state == "open":
        access.vacant.append(None)


def _require_an_end(writes: Sequence[Access], reads: Sequence[Access], me: int) -> None:
    """Raise where waiting would never end."""
    for access in (*writes, *reads):
        access.require_open()
        if access.writer == me:
            raise own_scope(access, writing=True)
    for access in writes:
        if me in access.readers:
            raise own_scope(access, writing=False)


def _after_fork_in_child() -> None:
    global _lock, _changed, sleepers
    _lock = threading.Lock()  # another thread may have held the old one
    _changed = threading.Condition(_lock)
    sleepers = 0
    for access in list(alive):
        access.state = "forked"
        access.writer = 0
        access.readers.clear()
        access.vacant.clear()
        access.refresh()


os.register_at_fork(after_in_child=_after_fork_in_child)
