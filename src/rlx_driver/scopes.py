"""The scopes ``read`` and ``write``, over one buffer or a tree of them, all or nothing."""

from __future__ import annotations

import threading
import warnings
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any

from rlx_driver import _hooks
from rlx_driver._fence import fence
from rlx_driver._locks import acquire, release
from rlx_driver._sharing import resolve
from rlx_driver.access import Access, written
from rlx_driver.backends.base import Backend, FunctionalBackend
from rlx_driver.errors import ZeroCopyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType, TracebackType

    from rlx_driver.buffer import Buffer

__all__ = ["ReadScope", "WriteScope"]


class _Scope:
    """What both scopes are: buffers taken on entry, arrays given, buffers given back on exit."""

    def __init__(
        self,
        buffers: Sequence[Buffer],
        framework: str | ModuleType,
        timeout: float | None,
        rebuild: Callable[[list[Any]], Any] | None = None,
        reads: Sequence[Access] = (),
    ) -> None:
        self._buffers = buffers
        self._target = resolve(framework)
        self._timeout = timeout
        self._rebuild = rebuild
        self._accesses: list[Access] = []
        self._thread = 0  # the one that entered
        self._reads = reads  # taken together with a writer's own, for the arguments of a step

    def _materialised(self) -> list[Access]:
        if self._accesses:
            raise ZeroCopyError("a scope is entered once at a time: make another one")
        for buffer in self._buffers:
            if buffer._native is None:
                buffer._materialise()
        if len(self._buffers) == 1:
            return [self._buffers[0]._access]
        return list(dict.fromkeys(buffer._access for buffer in self._buffers))

    def _given(self, arrays: list[Any]) -> Any:
        return arrays[0] if self._rebuild is None else self._rebuild(arrays)

    def _entered(self, accesses: list[Access]) -> None:
        self._accesses, self._thread = accesses, get_ident()

    def _note(self, accesses: list[Access]) -> None:
        """Tell the order, and whoever else asks, what was done inside."""
        raise NotImplementedError

    def _give_back(self, accesses: list[Access]) -> None:
        raise NotImplementedError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        accesses, self._accesses = self._accesses, []
        try:
            self._note(accesses)
        finally:
            self._give_back(accesses)

    def __del__(self) -> None:
        accesses = getattr(self, "_accesses", None)  # not there when making it failed
        if not accesses or accesses[0].state == "forked":
            return
        self._accesses = []
        self._note(accesses)
        # The collector may have come while this very thread holds the lock that giving back needs.
        with suppress(RuntimeError):  # the interpreter is on its way out
            threading.Thread(target=self._give_back, args=(accesses,)).start()
        warnings.warn(
            f"a scope on {accesses[0].label} was entered, never left, and is gone now: use it in a "
            "with statement. What it had taken is given back",
            ResourceWarning,
            stacklevel=2,
        )


class ReadScope(_Scope):
    """Shared access for the time of a ``with`` block; see `Buffer.read`."""

    def __enter__(self) -> Any:
        accesses = self._materialised()
        acquire((), accesses, timeout=self._timeout)
        try:
            if isinstance(self._target, FunctionalBackend):
                arrays = [
                    buffer._functional_view(self._target, in_scope=True) for buffer in self._buffers
                ]
                if (checker := _hooks.checker) is not None:
                    arrays = [
                        checker.hand_out(buffer, buffer._leases[self._target.name], array)
                        for buffer, array in zip(self._buffers, arrays, strict=True)
                    ]
            else:
                for access in accesses:
                    with access.lock:
                        access.settle(writes=False)
                arrays = [
                    buffer._mutable_view(self._target, in_scope=True) for buffer in self._buffers
                ]
            given = self._given(arrays)
        except BaseException:
            release((), accesses)
            raise
        self._entered(accesses)
        return given

    def _note(self, accesses: list[Access]) -> None:
        if not isinstance(self._target, FunctionalBackend):
            for access in accesses:
                access.after_native(wrote=False)
        elif _hooks.checker is not None:
            for access in accesses:
                _hooks.checker.after_read(access)

    def _give_back(self, accesses: list[Access]) -> None:
        release((), accesses, self._thread)


class WriteScope(_Scope):
    """Exclusive access for the time of a ``with`` block; see `Buffer.write`."""

    def __enter__(self) -> Any:
        target = self._target
        if isinstance(target, FunctionalBackend):
            raise ZeroCopyError(
                f"{target.name} arrays are immutable, so there is nothing to write through: use "
                "update(step, ...), which changes the memory in place"
            )
        if not isinstance(target, Backend) and not hasattr(target, "from_dlpack"):
            raise ZeroCopyError(f"{target!r} cannot see memory")
        accesses = self._materialised()
        acquire(accesses, self._reads, timeout=self._timeout)
        try:
            fence(accesses)
            for access in accesses:
                if access.pending is not None or not access.synchronous:
                    access.settle()
            given = self._given(
                [buffer._mutable_view(target, in_scope=True) for buffer in self._buffers]
            )
        except BaseException:
            release(accesses, self._reads)
            raise
        self._entered(accesses)
        return given

    def _note(self, accesses: list[Access]) -> None:
        written(accesses)
        for access in accesses:
            if not access.synchronous:
                access.after_native()
        for access in self._reads:
            access.after_native(wrote=False)

    def _give_back(self, accesses: list[Access]) -> None:
        release(accesses, self._reads, self._thread)
