"""How a debug arena reaches its raw memory beside those who use the slots: it never waits for them.

The bytes of a block that somebody has used are taken by the block's own access, all others (guard
bytes, margins, blocks not used yet) by that of the memory as a whole, which no user ever holds.
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rlx_driver._fence import fence
from rlx_driver._locks import acquire, release
from rlx_driver.access import foreign_thread
from rlx_driver.errors import AccessTimeoutError, StaleViewError, ZeroCopyError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from rlx_driver._arena_memory import Memory
    from rlx_driver.access import Access, Lease

__all__ = ["Run", "looking", "overwriting", "owners_of"]

Run = tuple[int, int]
"""Bytes from the start of the memory, its first margin included: start and end."""


@contextmanager
def looking(memory: Memory, held: Collection[Access]) -> Iterator[list[Run] | None]:
    """Order a look by the host after all work on the memory before it.

    Gives the bytes that cannot be looked at now, for somebody writes them; None: that is all.

    Parameters
    ----------
    held
        Accesses that the caller has.

    Raises
    ------
    ClosedHandleError, StaleViewError
        The memory came to its end meanwhile.
    """
    whole = memory.whole()._access
    with ExitStack() as stack:
        if whole.is_recording() or not _joined(whole, held, stack):
            yield None
            return
        _entered(whole, held, stack)
        yield [
            (start, end)
            for start, end, access in memory.used_blocks()
            if not _entered(access, held, stack)
        ]


def _joined(access: Access, held: Collection[Access], stack: ExitStack) -> bool:
    """Join the readers of an access, if that needs no waiting."""
    access.require_open()
    if access not in held:
        if not _taken((), [access]):
            return False
        stack.callback(release, (), [access])
    return True


def _entered(access: Access, held: Collection[Access], stack: ExitStack) -> bool:
    """Order a look after the writers of an access, if nobody is writing now."""
    if access.synchronous and access.pending is None:
        return access in held or not access.writer  # nothing to wait for: hold nobody up
    if access.is_settled():
        return True  # the same, on this stream
    if not _joined(access, held, stack) or not _is_computed(access):
        return False
    access.settle(writes=False)
    stack.callback(access.after_native, wrote=False)
    return True


def _is_computed(access: Access) -> bool:
    """Wait on the host for a pending result; tell whether it came.

    What its user has donated, and what failed, is told to him when he asks for it himself.
    """
    lease = access.pending
    if lease is None:
        return True
    array = lease.array
    if array is None or lease.is_dead(array):
        return False
    if not access.synchronous:
        return True  # a stream waits for it
    if foreign_thread() and not lease.backend.is_ready(array):
        return False
    try:
        lease.backend.wait(array)
    except Exception:
        return False
    return True


def _taken(writes: list[Access] | tuple[()], reads: list[Access] | tuple[()]) -> bool:
    try:
        acquire(writes, reads, timeout=0)
    except (AccessTimeoutError, StaleViewError):
        for access in (*writes, *reads):
            access.require_open()
        return False
    return True


@contextmanager
def overwriting(
    memory: Memory, access: Access, runs: list[Run], held: Collection[Access]
) -> Iterator[bool]:
    """Order a write to some bytes of an access after all work on them before it.

    JAX arrays of these bytes die; those of other slots stay alive. Gives False when it cannot be
    now: somebody holds the bytes.
    """
    access.require_open()
    mine = access not in held
    if mine and not _taken([access], ()):
        yield False
        return
    try:
        try:
            keep = [lease for lease in access.leases.values() if not _touches(memory, lease, runs)]
            fence([access], keep=keep)
            access.settle()
        except (StaleViewError, ZeroCopyError):  # donated by its user, or held by an alias
            yield False
            return
        yield True
        access.after_native()
    finally:
        if mine:
            release([access])


def _touches(memory: Memory, lease: Lease, runs: list[Run]) -> bool:
    if lease.array is None or lease.is_dead(lease.array):
        return False
    start = lease.address - memory.address + memory.margin
    end = start + int(lease.array.nbytes)
    return any(low < end and start < high for low, high in runs)


def owners_of(memory: Memory, runs: Iterable[Run]) -> dict[Access, list[Run]]:
    """Say of stretches of bytes by which access each part of them is taken."""
    whole = memory.whole()._access
    used = sorted(memory.used_blocks(), key=lambda block: block[0])
    ends = [end for _, end, _ in used]
    parts: dict[Access, list[Run]] = {}
    for start, end in runs:
        at = bisect_right(ends, start)
        while start < end:
            low, high, access = used[at] if at < len(used) else (end, end, whole)
            if start < low:  # before the next block
                stop = min(low, end)
                parts.setdefault(whole, []).append((start, stop))
            else:
                stop = min(high, end)
                parts.setdefault(access, []).append((start, stop))
                at += 1
            start = stop
    return parts
