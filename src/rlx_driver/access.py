"""The discipline of access to one piece of memory: who reads, who writes, what is pending.

Every buffer has an `Access`; slices and reinterpreted views share that of their base. It knows

* the scopes: many readers or one writer, between threads;
* the *leases*: arrays of a functional framework (JAX) over the memory, which of them were handed
  out, and whose value is still being computed;
* the fence that a write needs, so that no reader sees bytes change underneath;
* the epoch, which counts writes by the driver.

Taking and giving back is in `rlx_driver._locks`.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import TYPE_CHECKING, Any

from rlx_driver import _hooks
from rlx_driver._ledger import ledger
from rlx_driver.errors import (
    ClosedHandleError,
    StaleViewError,
    UpdateFailedError,
    ZeroCopyError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from rlx_driver.backends.base import FunctionalBackend, Order

__all__ = [
    "Access",
    "Lease",
    "alive",
    "foreign_thread",
    "held_by_alias",
    "own_scope",
    "tell",
    "uncommitted",
    "written",
]

alive: weakref.WeakSet[Access] = weakref.WeakSet()

_RETIRED_LIMIT = 16
"""Older arrays of one memory that are kept for a user who may read them."""


class Lease:
    """One array of a functional framework over a piece of memory, renewed by every write.

    `array` is the living one, or None when it has to be imported anew; `handed` is the same once
    a user has it, so that somebody may be reading.
    """

    __slots__ = (
        "__weakref__",
        "address",
        "after",
        "alias",
        "array",
        "as_of",
        "backend",
        "clean",
        "donated_address",
        "handed",
        "has_aux",
        "is_dead",
        "plain",
        "program",
        "static",
        "step",
        "wait_one",
    )

    def __init__(self, backend: FunctionalBackend, address: int) -> None:
        self.backend = backend
        self.address = address
        self.array: Any = None
        self.handed: Any = None
        # A weak reference to what a user has in place of `array` while races are looked for.
        self.alias: Callable[[], Any] = _nothing
        # On a device with streams: the writes of others that `array` comes after by itself, so
        # that a copy of it by another stream than the programs' sees them. See `Access.is_fresh`.
        self.as_of: int | None = None
        self.after: Any = None
        # Kept here for the hot path of `Buffer.jax`.
        self.is_dead = backend.is_dead
        self.clean = backend.trace_state_clean
        self.plain = backend.plain_arguments
        self.donated_address = backend.donated_address
        self.wait_one = backend.wait_one
        # The program of the last update, and what it was made for: a weak reference to its step.
        self.step: Callable[[], Any] = _nothing
        self.has_aux = False
        self.static: int | tuple[int, ...] = ()
        self.program: Callable[..., Any] = _nothing

    def is_own(self, array: Any) -> bool:
        """Tell whether an array is the living one, or stands for it."""
        return array is self.array or array is self.alias()


class Access:
    """The discipline of one piece of memory; see the module."""

    __slots__ = (
        "__weakref__",
        "epoch",
        "fast",
        "functional_ready",
        "handed",
        "keeper",
        "label",
        "leases",
        "lock",
        "marks",
        "native_out",
        "native_ready",
        "native_writes",
        "order",
        "owner",
        "pending",
        "quiet",
        "readers",
        "retired",
        "state",
        "synchronous",
        "vacant",
        "version",
        "waiting",
        "writer",
    )

    def __init__(self, label: str, order: Order) -> None:
        self.label = label
        self.keeper: str | None = None  # who alone may close it: the arena it is part of
        self.order = order
        self.synchronous = order.synchronous
        self.fast = order.synchronous  # whether the cached views need no look at the order
        self.owner: Any = None
        self.epoch = 0
        self.state = "open"
        self.writer = 0
        self.readers: dict[int, int] = {}
        self.waiting: list[Any] = []  # who stands in line; see rlx_driver._locks
        self.vacant: list[None] = [None]  # see rlx_driver._locks
        self.leases: dict[Any, Lease] = {}
        self.handed: dict[Lease, None] = {}
        self.retired: list[tuple[FunctionalBackend, Any]] = []
        self.pending: Lease | None = None
        self.native_out = False
        self.quiet = True  # no native access since a functional array last went out
        self.native_writes = 0
        self.version: Callable[[], int] | None = None
        self.marks: list[tuple[Callable[[list[Any]], None], list[Any]]] = []
        # One flag each for the two kinds of views: everything that makes the hot path valid.
        self.native_ready = self.synchronous
        self.functional_ready = True
        self.lock = threading.RLock()
        alive.add(self)

    # --- state

    def require_open(self) -> None:
        """Raise when the memory was closed, or belongs to the parent of this process."""
        if self.state == "closed":
            raise ClosedHandleError(
                f"{self.label} is closed. Views taken before stay valid as long as you hold "
                "them; make a new buffer or handle to go on"
            )
        if self.state == "stale":
            raise StaleViewError(
                f"{self.label} was taken before {self.keeper} was reset or planned anew: ask the "
                "arena for it again. NumPy and torch views taken before show whatever lies there "
                "now"
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
        settled = self.fast
        self.native_ready = free and settled and self.pending is None
        self.functional_ready = free and (settled or self.quiet)

    def close(self, state: str = "closed") -> None:
        """Let go of everything; views outside keep what they need. The caller holds it."""
        self.state = state
        self.leases.clear()
        self.handed.clear()
        self.retired.clear()
        self.marks.clear()
        self.pending = self.owner = None

    # --- order

    def is_settled(self) -> bool:
        """Tell, on a device with streams, whether a native access has nothing to wait for."""
        return (
            not self.synchronous
            and self.state == "open"
            and not self.writer
            and _hooks.checker is None
            and self.order.is_settled()
        )

    def is_shared(self) -> bool:
        """Tell, on a device with streams, whether a functional access has nothing to wait for."""
        return (
            not self.synchronous
            and self.state == "open"
            and not self.writer
            and self.order.is_shared()
        )

    def is_recording(self) -> bool:
        """Tell whether this thread records a graph, so that nothing runs now."""
        return not self.synchronous and self.order.recording() is not None

    def settle(self, *, writes: bool = True) -> None:
        """Order native work after all before it: the host waits, a GPU's stream does."""
        if not self.synchronous and (recording := self.order.recording()) is not None:
            recording.note(self, writes=writes)
            return
        result, pending = self._pending()
        if result is None and self.synchronous:
            return
        with self.lock:  # readers of several threads order themselves
            finished = self.order.before_native(pending, result, writes=writes)
        if finished and result is not None:
            self.pending = None
            self.refresh()

    def settle_for_host(self) -> AbstractContextManager[None]:
        """Enter what a copy to the host needs, ordered after the producers of this memory alone."""
        result, pending = self._pending()
        return self.order.for_host(pending, result)

    def _pending(self) -> tuple[Any | None, Callable[[], None]]:
        """Give the pending result, and how to wait for it on the host."""
        lease = self.pending
        if lease is None:
            return None, _nothing
        if lease.array is None or lease.is_dead(lease.array):
            raise uncommitted(self)
        return lease.array, functools.partial(self.wait, lease)

    def after_native(self, *, wrote: bool = True) -> None:
        """Note that a read or write by the native framework ends here, as far as enqueued."""
        if not self.synchronous and not self.is_recording():
            with self.lock:
                self.quiet = self.functional_ready = False
                self.order.after_native(wrote=wrote)
                self.native_writes += wrote

    def view_out(self) -> None:
        """Note that a native view goes out, on the current stream."""
        if not self.synchronous and not self.is_recording():
            self.order.view_out()

    def watch(self, version: Callable[[], int]) -> None:
        """Take a native view's count of writes, so that plain writes through it are noticed."""
        before = self.foreign_writes()
        self.version = version
        for lease in self.leases.values():
            # A count of before may by chance be one of after, so it is not kept.
            lease.as_of = self.foreign_writes() if lease.as_of == before else None

    def foreign_writes(self) -> int:
        """Count writes that functional arrays made before do not come after by themselves.

        A driver's write raises both the epoch and the version of every view.
        """
        if self.version is None:
            return self.native_writes
        return self.version() - self.epoch + self.native_writes

    def is_fresh(self, lease: Lease) -> bool:
        """Tell, on a device with streams, whether every consumer of an array is in order.

        Programs are ordered by their stream. What copies an array to the host or to another device
        runs on a stream of its own and waits for the array's own producer only, so after a write by
        anyone else the array has to be made anew.
        """
        last = self.pending
        if last is not None and last is not lease and lease.after is not last.array:
            return False
        version = self.version  # `foreign_writes`, spelled out for the hot path of `Buffer.jax`
        known = self.native_writes
        return lease.as_of == (known if version is None else version() - self.epoch + known)

    def note_fresh(self, lease: Lease) -> None:
        """Note that an array was made after all writes until now."""
        lease.as_of = self.foreign_writes()
        lease.after = None if self.pending is None else self.pending.array

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
        if foreign_thread() and not lease.backend.is_ready(lease.array):
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
        self.order.functional_wrote()
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

    def retire(self, backend: FunctionalBackend, array: Any) -> None:
        """Keep an array that a user may still read, beside a newer one, until the next fence."""
        self.retired.append((backend, array))
        if len(self.retired) > _RETIRED_LIMIT:
            fenced: list[tuple[Access, Lease | None, Any]] = [
                (self, None, a) for b, a in self.retired if b is backend
            ]
            self.retired = [(b, a) for b, a in self.retired if b is not backend]
            from rlx_driver._fence import fence_one  # which needs this module

            fence_one(backend, fenced)

    def written(self) -> None:
        """Note a write: a new epoch, and autograd is told."""
        written((self,))


def written(accesses: Sequence[Access]) -> None:
    """Note a write to several: new epochs, and each framework is told once."""
    marked = []
    for access in accesses:
        if not access.synchronous and access.is_recording():
            continue  # nothing runs now
        access.epoch += 1
        if access.marks:
            marked.append(access)
    tell(marked)


def tell(accesses: Iterable[Access]) -> None:
    """Tell the frameworks that keep track of writes, each once."""
    told: dict[Callable[[list[Any]], None], list[Any]] = {}
    for access in accesses:
        for mark, views in access.marks:
            if mark in told:
                told[mark] += views
            else:
                told[mark] = views.copy()
    for mark, views in told.items():
        mark(views)


def uncommitted(access: Access) -> StaleViewError:
    """Give the error for an array that its user donated or deleted."""
    return StaleViewError(
        f"an array handed out by {access.label}.jax() was donated or deleted, and the result never "
        "came back: pass it to rlx_driver.commit(...) or copy_from(...), which takes it over "
        "without a copy"
    )


def held_by_alias(access: Access) -> ZeroCopyError:
    """Give the error for an array whose readers cannot be known."""
    return ZeroCopyError(
        f"an array handed out by {access.label}.jax() is held by a NumPy, torch or memoryview "
        "alias made from it, so its readers cannot be fenced. Drop that alias, and take "
        f"{access.label}.numpy() or .torch() instead of converting the JAX array (in JAX 0.11 "
        "numpy.asarray or repr of a bfloat16 or float8 array on the host holds it for good). "
        "No byte was changed"
    )


def own_scope(access: Access, *, writing: bool) -> StaleViewError:
    """Give the error for an access from inside a scope or update of the same thread."""
    if writing:
        return StaleViewError(
            f"{access.label} is being written by a scope or an update that this call stands in "
            "(or by a callback of it): use the array that the scope or the step gave you"
        )
    return StaleViewError(
        f"{access.label} is being read by a scope that this call stands in, so a write would "
        "wait for itself: leave the read scope first"
    )


def foreign_thread() -> bool:
    """Tell whether Python did not start this thread, as for callbacks of XLA."""
    return isinstance(threading.current_thread(), threading._DummyThread)


def _nothing(*_: Any) -> None:
    pass
