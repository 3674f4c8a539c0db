"""The life of an arena: begin anew, be laid out anew, end."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rlx_driver import _hooks
from rlx_driver._arena_debug import guarded
from rlx_driver.backends.base import accounting
from rlx_driver.errors import ClosedHandleError, PlanError, StaleViewError
from rlx_driver.memory_plan import MemoryPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rlx_driver._arena_debug import Inspector
    from rlx_driver._arena_memory import Memory
    from rlx_driver._arena_owned import OwnedBytes
    from rlx_driver._memory import Maker
    from rlx_driver.access import Access
    from rlx_driver.buffer import Buffer

__all__ = ["LifeMixin", "require_plan"]


class LifeMixin:
    """`reset`, `replan` and `close` of `Arena`."""

    if TYPE_CHECKING:
        _asked: MemoryPlan
        _buffers: dict[Any, Buffer]
        _debug: bool
        _generation: int
        _inspector: Inspector | None
        _maker: Maker
        _memory: Memory | OwnedBytes | None
        _plan: MemoryPlan
        _views: dict[Any, Callable[[], Any]]

        def _open(self) -> Memory | OwnedBytes: ...

        def _look(self) -> None: ...

        def _inspect(self) -> None: ...

    def reset(self) -> None:
        """Begin anew: the bytes are zero again, and whatever was taken before is stale.

        Blocks until readers and scopes are done. JAX arrays of slots die, their Buffers raise
        `StaleViewError`; NumPy and torch views taken before still see the arena's memory.

        Raises
        ------
        ZeroCopyError
            An alias of a JAX array holds a slot's memory (see `Buffer.write`). Nothing was changed.
        StaleViewError
            From inside a scope of a slot; or when a JAX array of a slot was donated and its result
            never came back. Nothing was changed.
        UpdateFailedError
            An update of a slot that was still running failed. Reset once more.
        CaptureError
            While a CUDA graph is captured.
        ArenaCorruptionError
            Of a debug arena: see `check`.
        """
        self._open()
        self._look()
        self._renew(None)

    def replan(self, plan: MemoryPlan) -> None:
        """Lay the arena out by another plan; else as `reset`. Contents are not kept.

        The allocation stays where it is when it is large enough; else there is a new one, and the
        old one is freed with the last view of it.

        Raises
        ------
        PlanError, OutOfDeviceMemory
            It is no plan, or the device has not that much memory. Nothing was changed.
        ZeroCopyError, StaleViewError, UpdateFailedError, CaptureError, ArenaCorruptionError
            As for `reset`.
        """
        self._open()
        require_plan(plan)
        self._look()
        self._renew(plan)

    def _renew(self, asked: MemoryPlan | None) -> None:
        with self._alone() as (memory, taken):
            if self._inspector is not None:  # once more, for now nobody is in a scope
                self._inspector.check(taken)
            if asked is not None:
                plan = guarded(asked) if self._debug else asked
            else:
                plan, asked = self._plan, self._asked
            renewed: Memory | OwnedBytes
            renewed, made = accounting.record(memory.renewed, plan, taken)
            self._maker.claim(made)
            # First: whoever finds the new memory is to find its plan too.
            self._plan, self._asked = plan, asked
            self._memory = renewed
            self._buffers = {}
            self._views = {}
            self._generation += 1
            self._inspect()
        if _hooks.checker is not None:
            _hooks.checker.announce()

    @contextmanager
    def _alone(self) -> Iterator[tuple[Memory | OwnedBytes, list[Access]]]:
        """Have the memory for this thread alone, whoever resets or closes the arena meanwhile."""
        entered = False
        while not entered:
            memory = self._open()
            try:
                with memory.exclusive() as taken:
                    if memory is self._memory:
                        entered = True
                        yield memory, taken
            except (ClosedHandleError, StaleViewError):
                if entered or memory is self._memory:
                    raise

    def close(self) -> None:
        """Give the memory up; it is freed when the last view of it is gone. Twice is fine.

        Blocks until scopes of other threads are left. Later accesses raise `ClosedHandleError`.

        Raises
        ------
        StaleViewError
            From inside a scope of a slot. Nothing was closed.
        ArenaCorruptionError
            Of a debug arena, which is closed all the same: see `check`.
        """
        if self._memory is None:
            return
        try:
            self._look()
        finally:
            with suppress(ClosedHandleError), self._alone() as (memory, taken):
                try:
                    if self._inspector is not None:  # once more, for now nobody is in a scope
                        self._inspector.check(taken)
                finally:
                    memory.close(taken)
                    self._memory = self._inspector = None
                    self._buffers = {}
                    self._views = {}
            if _hooks.checker is not None:
                _hooks.checker.announce()  # may raise, as warnings do where they are errors


def require_plan(plan: Any) -> None:
    """Raise when something is no plan."""
    if not isinstance(plan, MemoryPlan):
        raise PlanError(
            f"an arena is laid out by a MemoryPlan; got a {type(plan).__qualname__}: make one with "
            "rlx_driver.plan_memory(intervals)"
        )
