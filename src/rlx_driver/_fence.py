"""The reader fence: what a write needs, so that no reader sees bytes change underneath.

Every array handed out is donated to the identity, whose result is ready only after all readers of
the array; the array itself is dead then.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from rlx_driver import _hooks
from rlx_driver._ledger import ledger
from rlx_driver.access import Access, Lease, foreign_thread, held_by_alias, own_scope, uncommitted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rlx_driver.backends.base import FunctionalBackend

__all__ = ["fence", "fence_one"]


def fence(accesses: Iterable[Access], keep: Sequence[Lease] = ()) -> None:
    """Make every array handed out dead, and later native work wait for its readers.

    Parameters
    ----------
    accesses
        Taken for writing by the caller.
    keep
        Leases that the caller's own program donates, which orders their readers by itself.

    Raises
    ------
    ZeroCopyError
        When something holds the memory of such an array by a reference of its own: its readers
        cannot be known. No byte was changed.
    StaleViewError
        When a user donated one and never committed the result.
    """
    by_backend: dict[FunctionalBackend, list[tuple[Access, Lease | None, Any]]] = {}
    for access in accesses:
        if not access.synchronous and access.is_recording():
            continue  # a replay will fence
        if _hooks.checker is not None:
            _hooks.checker.before_write(access)
        for lease in access.handed:
            if lease not in keep:
                if lease.is_dead(lease.array):
                    raise uncommitted(access)
                by_backend.setdefault(lease.backend, []).append((access, lease, lease.array))
        for backend, array in access.retired:
            if not backend.is_dead(array):
                by_backend.setdefault(backend, []).append((access, None, array))
    for backend, entries in by_backend.items():
        fence_one(backend, entries)


def fence_one(backend: FunctionalBackend, entries: list[tuple[Access, Lease | None, Any]]) -> None:
    """Fence arrays of one framework; those beside the newest of a memory have no lease."""
    fresh = backend.fence([array for _, _, array in entries])
    held: Access | None = None
    ordered = []
    for (access, lease, old), new in zip(entries, fresh, strict=True):
        if not backend.is_dead(old):
            held = access
            continue
        ordered.append(new)
        if not access.synchronous:
            access.order.wait_result(new, functools.partial(_wait_for, backend, new))
        if lease is None:
            access.retired = [(b, a) for b, a in access.retired if a is not old]
            continue
        lease.array, lease.handed = new, None
        del access.handed[lease]
    if ordered and entries[0][0].synchronous:
        if foreign_thread():
            raise own_scope(entries[0][0], writing=True)
        try:
            backend.wait(ordered)
        except Exception:
            for access, lease, _ in entries:  # find the one whose program failed
                if lease is not None and lease.array is not None:
                    access.wait(lease)
            raise
    if held is not None:
        raise held_by_alias(held)


def _wait_for(backend: FunctionalBackend, array: Any) -> None:
    ledger.count_host_wait()
    backend.wait(array)
