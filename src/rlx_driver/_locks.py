"""Taking accesses: many readers or one writer each, several at once, all or none.

One lock for all of them makes taking many at once atomic, so that no order of taking deadlocks. It
is held for a few comparisons, never while a framework is called.
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

__all__ = ["acquire", "lock", "release", "sleepers", "wake"]

lock = threading.Lock()
_changed = threading.Condition(lock)
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
    StaleViewError
        When this very thread holds one in a way that waiting would never end.
    AccessTimeoutError
        When others held one for too long. Nothing is held then.
    """
    me = get_ident()
    with lock:
        for access in writes:
            if access.writer or access.readers or access.state != "open":
                break
        else:
            for access in reads:
                if access.writer or access.state != "open" or (access.waiting and not writes):
                    break
            else:
                _take(writes, reads, me)
                return
        _wait_for(writes, reads, me, timeout)


def release(writes: Iterable[Access], reads: Iterable[Access] = ()) -> None:
    """Give accesses back."""
    me = get_ident()
    with lock:
        for access in writes:
            access.writer = 0
            # `refresh`, spelled out: this loop is the hot end of every update of a tree.
            free = access.state == "open"
            settled = access.synchronous
            access.native_ready = free and settled and access.pending is None
            access.functional_ready = free and (settled or not access.native_out)
        for access in reads:
            if access.readers.get(me, 0) > 1:
                access.readers[me] -= 1
            else:
                access.readers.pop(me, None)
        if sleepers:
            _changed.notify_all()


def wake() -> None:
    """Make every sleeper look again."""
    with lock:
        _changed.notify_all()


def _take(writes: Iterable[Access], reads: Iterable[Access], me: int) -> None:
    for access in writes:
        access.writer = me
        access.native_ready = access.functional_ready = False
    for access in reads:
        access.readers[me] = access.readers.get(me, 0) + 1


def _wait_for(
    writes: Sequence[Access], reads: Sequence[Access], me: int, timeout: float | None
) -> None:
    """Wait, with the lock held, until all can be taken, and take them."""
    global sleepers
    deadline = None if timeout is None else time.monotonic() + timeout
    sleepers += 1
    for access in writes:
        access.waiting += 1  # keeps new readers out, so that they cannot starve a writer
    try:
        while (blocker := _blocker(writes, reads, me)) is not None:
            if foreign_thread():
                raise own_scope(blocker, writing=True)
            left = None if deadline is None else deadline - time.monotonic()
            if (left is not None and left <= 0) or not _changed.wait(left):
                holders = "a writer" if blocker.writer else f"{len(blocker.readers)} reader(s)"
                raise AccessTimeoutError(
                    f"{blocker.label} could not be taken within {timeout} s: it is held by "
                    f"{holders}. Nothing was changed"
                )
        _take(writes, reads, me)
    finally:
        sleepers -= 1
        for access in writes:
            access.waiting -= 1
        _changed.notify_all()  # a writer that gave up may have kept readers out


def _blocker(writes: Sequence[Access], reads: Sequence[Access], me: int) -> Access | None:
    """Find an access that has to be waited for; raise where waiting would never end."""
    found = None
    for access in writes:
        access.require_open()
        if access.writer == me or me in access.readers:
            raise own_scope(access, writing=access.writer == me)
        if access.writer or access.readers:
            found = access
    for access in reads:
        access.require_open()
        if access.writer == me:
            raise own_scope(access, writing=True)
        # A waiting writer keeps new readers out, but not one that it waits for itself, and not
        # one that is a waiting writer too: those two would wait for each other.
        kept_out = access.waiting and not writes and me not in access.readers
        if access.writer or kept_out:
            found = access
    return found


def _after_fork_in_child() -> None:
    global lock, _changed, sleepers
    lock = threading.Lock()  # another thread may have held the old one
    _changed = threading.Condition(lock)
    sleepers = 0
    for access in list(alive):
        access.state = "forked"
        access.writer = 0
        access.readers.clear()
        access.refresh()


os.register_at_fork(after_in_child=_after_fork_in_child)
