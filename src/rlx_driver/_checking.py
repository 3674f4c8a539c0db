"""`checking`: blocks, or a whole process, in which accesses round the driver are found."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import TYPE_CHECKING

from rlx_driver import _hooks
from rlx_driver._races import Race, text_of
from rlx_driver.errors import RaceError

if TYPE_CHECKING:
    from types import TracebackType

    from rlx_driver._checker import Checker

__all__ = ["Check", "check_as_asked", "checking"]

_lock = threading.RLock()  # blocks of several threads begin and end one by one


class Check:
    """A block of `checking`.

    Attributes
    ----------
    races
        What was found of views that were handed out in the block.
    on_race
        ``"raise"`` or ``"warn"``.
    """

    def __init__(self, on_race: str) -> None:
        if on_race not in ("raise", "warn"):
            raise ValueError(f"on_race is 'raise' or 'warn', not {on_race!r}")
        self.on_race = on_race
        self.races: list[Race] = []
        self._checker: Checker | None = None

    def __enter__(self) -> Check:
        from rlx_driver._checker import Checker

        with _lock:
            if self._checker is not None:
                raise RuntimeError("a block of checking is entered once: make another one")
            checker = _hooks.checker
            if checker is None:
                checker = Checker()
                checker.start()
            checker.checks.append(self)
            self._checker = checker
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        checker = self._checker
        if checker is None or checker is not _hooks.checker:
            return  # a forked child, where the blocks of the parent are not open
        with _lock:
            is_stale = error is not None and checker.find_stale(error, self)
            checker.finish(self)
            if not checker.checks:
                checker.stop()
        if self.on_race == "warn":
            checker.announce()
        elif self.races:
            if error is None:
                raise RaceError(text_of(self.races), self.races)
            if is_stale:
                raise RaceError(text_of(self.races), self.races) from error
            error.add_note(text_of(self.races))  # which is not to hide it

    def note_use(self) -> None:
        """Hear that an array is handed out."""

    def __repr__(self) -> str:
        return f"<checking, {len(self.races)} found>"


class _ProcessCheck(Check):
    """The block that is never left, for RLX_CHECKING=1."""

    _waits = True

    def note_use(self) -> None:
        """Prepare the end; not before, so as to come before what the framework does at the exit."""
        if self._waits:
            self._waits = False
            atexit.register(self._end)

    def _end(self) -> None:
        checker = self._checker
        if checker is None or checker is not _hooks.checker:
            return
        with _lock:
            checker.finish(self)
            checker.stop()
        for race in checker.unsaid():
            print(f"rlx_driver: {race}", file=sys.stderr)


def checking(on_race: str = "raise") -> Check:
    """Find accesses that went round the driver, in a ``with`` block: a sanitizer, which is slow.

    Parameters
    ----------
    on_race
        ``"raise"``: leaving the block raises `RaceError` when there were any. ``"warn"``: each is
        a `RaceWarning` as soon as it is noticed.

    Returns
    -------
    Check
        Its `races` lists each `Race` found so far: bytes that changed under a view that was still
        held, views used after they went stale, donations that were never committed. Copies: the
        bytes of a GPU's buffers, to compare them. Blocks: until what `jax` hands out is computed.

    Raises
    ------
    RaceError
        At the end of the block. It is raised from JAX's own error where a stale view caused that.
        An error of another kind that leaves the block is left alone and gets a note.

    Notes
    -----
    It counts for all threads. A block answers for the views handed out in it; those still held
    when it ends pass to the block around it, if there is one. Views from before are not watched.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> b = rlx.Buffer.zeros(4)
    >>> with rlx.checking() as check:
    ...     b.numpy()[0] = 1.0
    >>> check.races
    []
    """
    return Check(on_race)


def check_as_asked() -> None:
    """Begin to check the process, with warnings, when the environment says RLX_CHECKING=1."""
    if os.environ.get("RLX_CHECKING", "0") not in ("", "0"):
        _ProcessCheck("warn").__enter__()


def _after_fork_in_child() -> None:
    _hooks.checker = None  # accesses of the parent are of no use here


os.register_at_fork(after_in_child=_after_fork_in_child)
