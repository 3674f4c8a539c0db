"""The discipline of access to one piece of memory: who reads, who writes, what is pending.

Every buffer has an `Access`; slices and reinterpreted views share that of their base. It knows

* the scopes: many readers or one writer, between threads;
* the *leases*: arrays of a functional framework (JAX) over the memory, which of them were handed
  out, and whose value is still being computed;
* the fence that a write needs, so that no reader sees bytes change underneath;
* the epoch, which counts writes by the driver.

One lock for all of them makes taking many at once atomic, so that no order of taking deadlocks. It
is held for a few comparisons, never while a framework is called.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from rlx_driver._ledger import ledger
from rlx_driver.errors import (
    AccessTimeoutError,
    ClosedHandleError,
    StaleViewError,
    UpdateFailedError,
    ZeroCopyError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rlx_driver.backends.base import Backend, FunctionalBackend, Order

__all__ = [
    "Access",
    "Lease",
    "acquire",
    "acquire_one",
    "fence",
    "release",
    "release_one",
    "written",
]

_lock = threading.Lock()
_changed = threading.Condition(_lock)
_sleepers = 0
_alive: weakref.WeakSet[Access] = weakref.WeakSet()


class Lease:
    """One array of a functional framework over a piece of memory, renewed by every write.

    `array` is the living one, or None when it has to be imported anew; `handed` is the same once
    a user has it, so that somebody may be reading.
    """

    __slots__ = (
        "address",
        "array",
        "backend",
        "clean",
        "handed",
        "is_dead",
        "options",
        "program",
        "shape",
        "step",
    )

    def __init__(self, backend: FunctionalBackend, address: int, shape: tuple[int, ...]) -> None:
        self.backend = backend
        self.address = address
        self.shape = shape
        self.array: Any = None
        self.handed: Any = None
        # Kept here for the hot path of `Buffer.jax`.
        self.is_dead = backend.is_dead
        self.clean = backend.trace_state_clean
        # The program of the last update: (weak reference to its step, options, program).
        self.step: Callable[[], Any] | None = None
        self.options: tuple[bool, int | tuple[int, ...]] = (False, ())
        self.program: Callable[..., Any] = _nothing


class Access:
    """The discipline of one piece of memory; see the module."""

    __slots__ = (
        "__weakref__",
        "epoch",
        "functional_ready",
        "handed",
        "label",
        "leases",
        "lock",
        "marks",
        "native_out",
        "native_ready",
        "order",
        "owner",
        "pending",
        "readers",
        "retired",
        "state",
        "synchronous",
        "waiting",
        "writer",
    )

    def __init__(self, label: str, order: Order) -> None:
        self.label = label
        self.order = order
        self.synchronous = order.synchronous
        self.owner: Any = None
        self.epoch = 0
        self.state = "open"
        self.writer = 0
        self.readers: dict[int, int] = {}
        self.waiting = 0
        self.leases: dict[Any, Lease] = {}
        self.handed: dict[Lease, None] = {}
        self.retired: list[tuple[FunctionalBackend, Any]] = []
        self.pending: Lease | None = None
        self.native_out = False
        self.marks: list[tuple[Backend, list[Any]]] = []
        # One flag each for the two kinds of views: everything that makes the hot path valid.
        self.native_ready = self.synchronous
        self.functional_ready = True
        self.lock = threading.RLock()
        _alive.add(self)

    # --- state

    def require_open(self) -> None:
        """Raise when the memory was closed, or belongs to the parent of this process."""
        if self.state == "closed":
            raise ClosedHandleError(
                f"{self.label} is closed. Views taken before stay valid as long as you hold "
                "them; make a new buffer or handle to go on"
            )
        if self.state == "lost":
            raise UpdateFailedError(
                f"{self.label} lost its memory, which its framework owned, to a program that "
                "failed: close it and make a new one, and drop every view taken from it"
            )
        if self.state == "forked":
            raise StaleViewError(
                f"{self.label} belongs to the parent process: after a fork neither JAX nor CUDA "
                "can order accesses in the child. Start children with the 'spawn' method"
            )

    def refresh(self) -> None:
        """Set the flags of the hot paths from what is true now."""
        free = self.state == "open" and not self.writer
        settled = self.synchronous
        self.native_ready = free and settled and self.pending is None
        self.functional_ready = free and (settled or not self.native_out)

    def close(self) -> None:
        """Let go of everything; views outside keep what they need."""
        acquire([self])
        self.state = "closed"
        self.leases.clear()
        self.handed.clear()
        self.retired.clear()
        self.marks.clear()
        self.pending = self.owner = None
        release([self])

    # --- order

    def settle(self) -> None:
        """Order native work after pending results: the host waits, a GPU's stream does."""
        lease = self.pending
        if lease is None:
            if not self.synchronous:
                self.order.before_native(_nothing, None)
            return
        if lease.array is None or lease.is_dead(lease.array):
            raise uncommitted(self)
        if self.order.before_native(lambda: self.wait(lease), lease.array):
            self.pending = None
            self.refresh()

    def settle_for(self, lease: Lease) -> None:
        """Order work of a functional framework on one lease after results of another one."""
        if self.pending is not None and self.pending is not lease and self.synchronous:
            self.settle()

    def wait(self, lease: Lease) -> None:
        """Block until the value of a lease is there.

        Raises
        ------
        UpdateFailedError
            When its program failed.
        """
        if _in_foreign_thread() and not lease.backend.is_ready(lease.array):
            raise StaleViewError(
                f"{self.label} is being updated and this thread was not started by Python, so it "
                "may be a callback of that very update: waiting here could hang for ever. Pass "
                "what the callback needs as its arguments"
            )
        ledger.count_host_wait()
        try:
            lease.backend.wait(lease.array)
        except Exception as error:
            raise self.failed(lease, error) from error

    def failed(self, lease: Lease, error: BaseException) -> UpdateFailedError:
        """Note that a donated program failed while it ran, and give the error for it."""
        if self.owner is not None:
            self._keep_owned_memory(lease)
        lease.array = lease.handed = None
        self.handed.pop(lease, None)
        if self.pending is lease:
            self.pending = None
        self.written()
        self.refresh()
        return UpdateFailedError(
            f"the program that updates {self.label} in place failed while it ran: {error}. The "
            "bytes are undefined now: write them anew (copy_from) before you read them"
        )

    def _keep_owned_memory(self, lease: Lease) -> None:
        """Save memory that the framework owned and that its failed result still holds."""
        if lease.array is not None and not lease.is_dead(lease.array):
            self.owner.remains = lease.array
        else:  # the call itself failed: nothing holds the memory any more
            self.state = "lost"

    def written(self) -> None:
        """Note a write: a new epoch, and autograd is told."""
        written((self,))


def written(accesses: Iterable[Access]) -> None:
    """Note a write to several: new epochs, and each framework is told once."""
    told: dict[Backend, list[Any]] = {}
    for access in accesses:
        access.epoch += 1
        for backend, views in access.marks:
            if backend in told:
                told[backend] += views
            else:
                told[backend] = views.copy()
    for backend, views in told.items():
        backend.mark_written(views)


def uncommitted(access: Access) -> StaleViewError:
    """Give the error for an array that its user donated or deleted."""
    return StaleViewError(
        f"an array handed out by {access.label}.jax() was donated or deleted, and the result never "
        "came back: pass it to rlx_driver.commit(...) or copy_from(...), which takes it over "
        "without a copy"
    )


# --- scopes --------------------------------------------------------------------------------------


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
    me = threading.get_ident()
    with _lock:
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
    me = threading.get_ident()
    with _lock:
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
        if _sleepers:
            _changed.notify_all()


def acquire_one(access: Access) -> None:
    """Take one access for writing: `acquire` for the hot path of an update."""
    with _lock:
        if not access.writer and not access.readers and access.state == "open":
            access.writer = threading.get_ident()
            access.native_ready = access.functional_ready = False
            return
    acquire((access,))


def release_one(access: Access) -> None:
    """Give one access back that was taken for writing.

    The flags come first and `writer` last. The lock is taken only to wake sleepers: a thread that
    goes to sleep counts itself before it looks at `writer`, so one of the two sees the other.
    """
    settled = access.synchronous
    access.native_ready = settled and access.pending is None
    access.functional_ready = settled or not access.native_out
    access.writer = 0
    if _sleepers:
        with _lock:
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
    global _sleepers
    deadline = None if timeout is None else time.monotonic() + timeout
    _sleepers += 1
    for access in writes:
        access.waiting += 1  # keeps new readers out, so that they cannot starve a writer
    try:
        while (blocker := _blocker(writes, reads, me)) is not None:
            if _in_foreign_thread():
                raise _own_scope(blocker, writing=True)
            left = None if deadline is None else deadline - time.monotonic()
            if (left is not None and left <= 0) or not _changed.wait(left):
                holders = "a writer" if blocker.writer else f"{len(blocker.readers)} reader(s)"
                raise AccessTimeoutError(
                    f"{blocker.label} could not be taken within {timeout} s: it is held by "
                    f"{holders}. Nothing was changed"
                )
        _take(writes, reads, me)
    finally:
        _sleepers -= 1
        for access in writes:
            access.waiting -= 1
        _changed.notify_all()  # a writer that gave up may have kept readers out


def _blocker(writes: Sequence[Access], reads: Sequence[Access], me: int) -> Access | None:
    """Find an access that has to be waited for; raise where waiting would never end."""
    found = None
    for access in writes:
        access.require_open()
        if access.writer == me or me in access.readers:
            raise _own_scope(access, writing=access.writer == me)
        if access.writer or access.readers:
            found = access
    for access in reads:
        access.require_open()
        if access.writer == me:
            raise _own_scope(access, writing=True)
        # A waiting writer keeps new readers out, but not one that it waits for itself, and not
        # one that is a waiting writer too: those two would wait for each other.
        kept_out = access.waiting and not writes and me not in access.readers
        if access.writer or kept_out:
            found = access
    return found


def _own_scope(access: Access, *, writing: bool) -> StaleViewError:
    if writing:
        return StaleViewError(
            f"{access.label} is being written by a scope or an update that this call stands in "
            "(or by a callback of it): use the array that the scope or the step gave you"
        )
    return StaleViewError(
        f"{access.label} is being read by a scope that this call stands in, so a write would "
        "wait for itself: leave the read scope first"
    )


def _in_foreign_thread() -> bool:
    """Tell whether Python did not start this thread, as for callbacks of XLA."""
    return isinstance(threading.current_thread(), threading._DummyThread)


# --- the fence -----------------------------------------------------------------------------------


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
        for lease in access.handed:
            if lease not in keep:
                if lease.is_dead(lease.array):
                    raise uncommitted(access)
                by_backend.setdefault(lease.backend, []).append((access, lease, lease.array))
        for backend, array in access.retired:
            if not backend.is_dead(array):
                by_backend.setdefault(backend, []).append((access, None, array))
    for backend, entries in by_backend.items():
        _fence_one(backend, entries)


def _fence_one(backend: FunctionalBackend, entries: list[tuple[Access, Lease | None, Any]]) -> None:
    fresh = backend.fence([array for _, _, array in entries])
    held: Access | None = None
    ordered = []
    for (access, lease, old), new in zip(entries, fresh, strict=True):
        if not backend.is_dead(old):
            held = access
            continue
        ordered.append(new)
        if lease is None:
            access.retired = [(b, a) for b, a in access.retired if a is not old]
            continue
        lease.array, lease.handed = new, None
        del access.handed[lease]
        if access.pending is None and not access.synchronous:
            access.pending = lease  # the next native access waits on the device
    if ordered and entries[0][0].synchronous:
        if _in_foreign_thread():
            raise _own_scope(entries[0][0], writing=True)
        try:
            backend.wait(ordered)
        except Exception:
            for access, lease, _ in entries:  # find the one whose program failed
                if lease is not None and lease.array is not None:
                    access.wait(lease)
            raise
    if held is not None:
        raise ZeroCopyError(
            f"an array handed out by {held.label}.jax() is held by a NumPy, torch or memoryview "
            "alias made from it, so its readers cannot be fenced. Drop that alias (take "
            f"{held.label}.numpy() or .torch() instead of converting the JAX array). No byte was "
            "changed"
        )


def _nothing(*_: Any) -> None:
    pass


# --- fork ----------------------------------------------------------------------------------------


def _after_fork_in_child() -> None:
    global _lock, _changed, _sleepers
    _lock = threading.Lock()  # another thread may have held the old one
    _changed = threading.Condition(_lock)
    _sleepers = 0
    for access in list(_alive):
        access.state = "forked"
        access.writer = 0
        access.readers.clear()
        access.refresh()


os.register_at_fork(after_in_child=_after_fork_in_child)
