"""Taking accesses: many readers or one writer each, several at once, all or none, in turn.

An access has a *token*, in the list `Access.vacant` while nobody holds it. A writer takes it; so
does the first of a group of readers, and the last one gives it back. Popping it from the list is
atomic, so an update of one buffer needs no lock (which would be a tenth of its cost). Everything
else goes by one lock for all accesses, which makes taking many at once atomic. It is held for a
few comparisons, never while a framework is called.

Who cannot have all at once stands in line: in `sleepers`, and at each of its accesses in
`Access.waiting`. While an access has a line its free token is kept for it, so that a request for
many gathers them one by one. Whoever gives a token back serves the line before going on, so a
thread that takes and gives back in a loop does not get ahead. A request comes after the older ones
that it conflicts with, except after one that waits, by way of others or not, for the very thread
that asks. So none waits for ever but threads that each hold what another one waits for, in a
circle; the thread that would close it gets an error.
"""

from __future__ import annotations

import os
import threading
from threading import get_ident
from typing import TYPE_CHECKING

from rlx_driver.access import alive, foreign_thread, own_scope
from rlx_driver.errors import AccessTimeoutError, StaleViewError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from rlx_driver.access import Access

__all__ = ["acquire", "release", "sleepers", "wake"]


class _Request:
    """What one thread waits for."""

    __slots__ = ("accesses", "done", "foreign", "lacking", "reads", "thread", "writes")

    def __init__(self, thread: int, writes: Sequence[Access], reads: Sequence[Access]) -> None:
        self.thread = thread
        self.foreign = foreign_thread()
        self.writes = dict.fromkeys(writes)
        self.reads = reads
        self.accesses = (*writes, *reads)
        self.lacking: Access | None = self.accesses[0]  # None as soon as all is taken
        self.done = threading.Event()


_lock = threading.Lock()
sleepers: list[_Request] = []
"""Requests not granted yet, the oldest first."""
_kept: set[Access] = set()
"""Accesses whose token is free, but kept for those in line."""


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
        When waiting would never end, because of this very thread or because others wait for it
        in turn; or after a fork.
    AccessTimeoutError
        When others held one for too long. Nothing is held then.
    """
    me = get_ident()
    with _lock:
        in_line = sleepers and any(access.waiting for access in (*writes, *reads))
        if not in_line and _take(writes, reads, me):
            return
    _wait(_Request(me, writes, reads), timeout)


def release(
    writes: Sequence[Access], reads: Sequence[Access] = (), thread: int | None = None
) -> None:
    """Give accesses back, to those in line if there are any.

    Parameters
    ----------
    writes, reads
        As they were taken.
    thread
        Who took them, when it is another one that gives them back.

    Notes
    -----
    The token goes back before `sleepers` is read, and a thread stands in line before it looks for
    the token: one of the two sees the other.
    """
    me = thread or get_ident()
    for access in writes:
        # `Access.refresh`, spelled out: this loop is the hot end of every update of a tree.
        settled = access.fast
        free = access.state == "open"
        access.native_ready = free and settled and access.pending is None
        access.functional_ready = free and (settled or access.quiet)
        access.writer = 0
        if free:
            access.vacant.append(None)
    if reads:
        with _lock:
            for access in reads:
                _leave(access, me)
    if sleepers:
        wake((*writes, *reads))


def wake(accesses: Sequence[Access]) -> None:
    """Serve those in line for accesses that were given back."""
    if any(access.waiting for access in accesses):
        with _lock:
            _serve()


# --- without waiting, with the lock held ---------------------------------------------------------


def _take(writes: Sequence[Access], reads: Sequence[Access], me: int) -> bool:
    """Take all, or none."""
    taken = 0
    try:
        for access in writes:
            access.vacant.pop()
            taken += 1
        for access in reads:
            if not access.readers:
                access.vacant.pop()
            access.readers[me] = access.readers.get(me, 0) + 1
            taken += 1
    except IndexError:
        for access in writes[:taken]:
            access.vacant.append(None)
        for access in reads[: max(0, taken - len(writes))]:
            _leave(access, me)
        return False
    for access in writes:
        access.writer = me
        access.native_ready = access.functional_ready = False
    return True


def _leave(access: Access, me: int) -> None:
    """Leave the readers of an access."""
    if access.readers.get(me, 0) > 1:
        access.readers[me] -= 1
    elif access.readers.pop(me, None) and not access.readers:
        _give_back(access)


def _give_back(access: Access) -> None:
    if access.state == "open":
        if access.waiting:
            _kept.add(access)
        else:
            access.vacant.append(None)


# --- in line, with the lock held -----------------------------------------------------------------


def _serve() -> None:
    """Grant what can be granted, the oldest first."""
    waited_for = {thread for request in sleepers for _, thread in _obstacles(request)}
    for request in sleepers.copy():
        thread = request.thread
        request.lacking = _lacking(request, waited_for)
        if request.lacking is None:
            _kept.difference_update(request.accesses)
            _leave_line(request)
            for access in request.writes:
                access.writer = thread
                access.native_ready = access.functional_ready = False
            for access in request.reads:
                access.readers[thread] = access.readers.get(thread, 0) + 1
            request.done.set()
        elif any(access.state != "open" for access in request.accesses):
            request.done.set()  # to find out for itself


def _lacking(request: _Request, waited_for: Collection[int]) -> Access | None:
    """Give the first access that a request cannot have yet; keep all that are free for the line."""
    lacking = None
    for access in request.accesses:
        there = _keep(access) or (access.readers and access not in request.writes)
        if not there or not all(
            # Those pass that must not wait at all, or not for each other.
            request.foreign
            or (request.thread in waited_for and _chain(other, request.thread, line=True))
            for other in _before(request, access)
        ):
            lacking = lacking or access
    return lacking


def _keep(access: Access) -> bool:
    """Keep the token of an access for its line, if it is free."""
    if access not in _kept:
        try:
            access.vacant.pop()
        except IndexError:
            return False
        _kept.add(access)
    return True


def _leave_line(request: _Request) -> None:
    sleepers.remove(request)
    for access in request.accesses:
        access.waiting.remove(request)
        if not access.waiting and access in _kept:
            _kept.remove(access)
            _give_back(access)


# --- who waits for whom, with the lock held ------------------------------------------------------


def _require_an_end(request: _Request) -> None:
    """Raise where a thread would wait for itself, or for what is gone."""
    for access in request.accesses:
        access.require_open()
        if access.writer == request.thread:
            raise own_scope(access, writing=True)
    for access in request.writes:
        if request.thread in access.readers:
            raise own_scope(access, writing=False)


def _before(request: _Request, access: Access) -> list[_Request]:
    """Give the requests that come first at an access: older ones, where one of the two writes."""
    older: list[_Request] = access.waiting[: access.waiting.index(request)]
    return older if access in request.writes else [o for o in older if access in o.writes]


def _obstacles(request: _Request, *, line: bool = False) -> Iterator[tuple[Access, int]]:
    """Give the threads a request waits for: those that hold, and if asked those in line before."""
    for access in request.accesses:
        if access.writer:
            yield access, access.writer
        if access in request.writes:
            for thread in access.readers:
                yield access, thread
        if line:
            for other in _before(request, access):
                yield access, other.thread


def _chain(first: _Request, last: int, *, line: bool = False) -> list[tuple[int, Access]]:
    """Find how a request waits for a thread, by way of others: who waits, and for what."""
    asleep = {request.thread: request for request in sleepers}
    chains: dict[int, list[tuple[int, Access]]] = {first.thread: []}
    reached = [first]
    for request in reached:
        for access, thread in _obstacles(request, line=line):
            chain = [*chains[request.thread], (request.thread, access)]
            if thread == last:
                return chain
            if thread in asleep and thread not in chains:
                chains[thread] = chain
                reached.append(asleep[thread])
    return []


# --- waiting -------------------------------------------------------------------------------------


def _wait(request: _Request, timeout: float | None) -> None:
    """Stand in line until a request is granted."""
    circle = []
    try:
        with _lock:
            _require_an_end(request)
            sleepers.append(request)
            for access in request.accesses:
                access.waiting.append(request)
            _serve()  # after standing in line: see `release`
            lacking = request.lacking
            # Who does not wait closes no circle: with timeout=0 a thread may try, and step back.
            if lacking is not None and (timeout is None or timeout > 0):
                circle = _chain(request, request.thread)
        if request.foreign and lacking is not None:
            raise own_scope(lacking, writing=True)
        if circle:
            raise _deadlock(circle)
        if not request.done.wait(timeout):
            names = _thread_names()
            with _lock:
                if request.lacking is not None:
                    raise _too_late(request, request.lacking, timeout, names)
        if request.lacking is not None:
            for access in request.accesses:
                access.require_open()
    except BaseException:
        _withdraw(request)
        raise


def _withdraw(request: _Request) -> None:
    """Undo a request, granted or not."""
    with _lock:
        if request in sleepers:
            _leave_line(request)
            _serve()  # those behind it
    if request.lacking is None:
        release(list(request.writes), request.reads)


def _thread_names() -> dict[int | None, str]:
    return {thread.ident: thread.name for thread in threading.enumerate()}


def _deadlock(circle: list[tuple[int, Access]]) -> StaleViewError:
    names = _thread_names()
    others = ", ".join(
        f"thread {names.get(thread, thread)!r} holds {'that' if i else 'it'} and waits for "
        f"{access.label}"
        for i, (thread, access) in enumerate(circle[1:])
    )
    return StaleViewError(
        f"waiting for {circle[0][1].label} would never end: {others}, which this thread holds. "
        f"Take {'both' if len(circle) == 2 else 'all of them'} in one rlx.write([...]), before "
        "any of them alone. Nothing was taken"
    )


def _too_late(
    request: _Request, access: Access, timeout: float | None, names: dict[int | None, str]
) -> AccessTimeoutError:
    readers = [*access.readers]
    threads = readers or [access.writer]
    holders = f"{len(readers)} reader(s)" if readers else "a writer"
    if access in _kept or (readers and access not in request.writes):
        threads = [other.thread for other in _before(request, access)]
        holders = f"{len(threads)} who asked for it before"
    known = ", ".join(repr(names[thread]) for thread in threads if thread in names)
    return AccessTimeoutError(
        f"{access.label} could not be taken within {timeout} s: it is held by {holders}"
        f"{known and f' (thread {known})'}. Nothing was changed"
    )


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held the old one
    sleepers.clear()
    _kept.clear()
    for access in list(alive):
        access.state = "forked"
        access.writer = 0
        access.readers.clear()
        access.vacant.clear()
        access.waiting.clear()
        access.refresh()


os.register_at_fork(after_in_child=_after_fork_in_child)
