"""What the driver did with bytes: exchanges, copies with their reasons, and host waits.

The ledger is how a program proves that its hot loop copies nothing: look at `ledger`, or wrap the
loop in `no_copies` and let the first copy raise.
"""

from __future__ import annotations

import itertools
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlx_driver.errors import ZeroCopyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["CopyCount", "Ledger", "LedgerCounts", "ledger", "no_copies"]

_copies_forbidden: ContextVar[bool] = ContextVar("rlx_driver_no_copies", default=False)


@dataclass(frozen=True, slots=True)
class CopyCount:
    """How many copies were made for one reason.

    Attributes
    ----------
    copies
        The number of copies.
    bytes
        Their sum in bytes.
    """

    copies: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """The counters of a ledger at one moment, or the difference of two moments.

    Attributes
    ----------
    exchanges
        Arrays handed from one framework to another, shared or copied.
    copies, bytes_copied
        Copies of array memory made by the driver, and their bytes.
    host_waits
        Times the driver made the calling thread wait for a device or for asynchronous work.
    reasons
        For each reason of a copy, how many and how many bytes.
    """

    exchanges: int = 0
    copies: int = 0
    bytes_copied: int = 0
    host_waits: int = 0
    reasons: Mapping[str, CopyCount] = field(default_factory=dict)

    def __sub__(self, earlier: LedgerCounts) -> LedgerCounts:
        reasons = {}
        for reason, now in self.reasons.items():
            was = earlier.reasons.get(reason, CopyCount())
            if now.copies != was.copies:
                reasons[reason] = CopyCount(now.copies - was.copies, now.bytes - was.bytes)
        return LedgerCounts(
            self.exchanges - earlier.exchanges,
            self.copies - earlier.copies,
            self.bytes_copied - earlier.bytes_copied,
            self.host_waits - earlier.host_waits,
            reasons,
        )

    def __str__(self) -> str:
        lines = [
            f"{self.exchanges} exchanges, {self.copies} copies ({self.bytes_copied:,} bytes), "
            f"{self.host_waits} host waits"
        ]
        lines += [
            f"  {count.copies} x {reason} ({count.bytes:,} bytes)"
            for reason, count in sorted(self.reasons.items())
        ]
        return "\n".join(lines)


class Ledger:
    """Counts what the driver did; thread-safe.

    `exchanges`, `copies`, `bytes_copied`, `host_waits` and `reasons` read the counters,
    `snapshot` all of them at one moment, and `record` counts a block of code. Copies that NumPy,
    torch or JAX make by themselves, outside a call of the driver, are not seen. Nor are the
    private copies that `update` takes of its NumPy arguments, which are values, not memory to
    share.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    @property
    def exchanges(self) -> int:
        """Arrays handed from one framework to another, shared or copied."""
        return _value(self._exchanges)

    @property
    def copies(self) -> int:
        """Copies of array memory made by the driver."""
        return self.snapshot().copies

    @property
    def bytes_copied(self) -> int:
        """Bytes of those copies."""
        return self.snapshot().bytes_copied

    @property
    def host_waits(self) -> int:
        """Times the driver made the calling thread wait."""
        return _value(self._host_waits)

    @property
    def reasons(self) -> Mapping[str, CopyCount]:
        """For each reason of a copy, how many and how many bytes."""
        return self.snapshot().reasons

    def snapshot(self) -> LedgerCounts:
        """Give all counters as they are now, as a value that does not change."""
        with self._lock:
            reasons = dict(self._reasons)
            return LedgerCounts(
                _value(self._exchanges),
                sum(count.copies for count in reasons.values()),
                sum(count.bytes for count in reasons.values()),
                _value(self._host_waits),
                reasons,
            )

    def reset(self) -> None:
        """Set every counter to zero."""
        with self._lock:
            self._exchanges = itertools.count()
            self._host_waits = itertools.count()
            self._reasons: dict[str, CopyCount] = {}
            # Counting on the hot paths is one atomic call, which needs no lock.
            self.count_exchange: Callable[[], object] = self._exchanges.__next__
            self.count_host_wait: Callable[[], object] = self._host_waits.__next__

    @contextmanager
    def record(self) -> Iterator[LedgerRecord]:
        """Count a block of code: ``with ledger.record() as r: ...``, then read ``r.counts``.

        Yields
        ------
        LedgerRecord
            Its ``counts`` are live inside the block and stay as they are after it.
        """
        part = LedgerRecord(self)
        try:
            yield part
        finally:
            part.stop()

    def will_copy(self, nbytes: int, reason: str, remedy: str = "") -> None:
        """Announce a copy before any byte moves.

        Parameters
        ----------
        nbytes
            Bytes about to be copied.
        reason
            Why the memory cannot be shared or reused; one of a small set of phrases.
        remedy
            What a caller who is not allowed to copy can do.

        Raises
        ------
        ZeroCopyError
            Inside `no_copies`; then nothing is counted.
        """
        self.require_copies(nbytes, reason, remedy)
        self.count_copy(nbytes, reason)

    def count_copy(self, nbytes: int, reason: str) -> None:
        """Count a copy that nothing can hold up any more."""
        with self._lock:
            was = self._reasons.get(reason, CopyCount())
            self._reasons[reason] = CopyCount(was.copies + 1, was.bytes + nbytes)

    def require_copies(self, nbytes: int, reason: str, remedy: str = "") -> None:
        """Raise `ZeroCopyError` inside `no_copies`; counts nothing."""
        if _copies_forbidden.get():
            raise ZeroCopyError(
                f"a copy of {nbytes:,} bytes was needed inside no_copies(): {reason}"
                + (f"; {remedy}" if remedy else ". Nothing was copied")
            )

    def __repr__(self) -> str:
        return f"<Ledger: {self.snapshot()}>"


class LedgerRecord:
    """The counts of one block of code; see `Ledger.record`."""

    def __init__(self, source: Ledger) -> None:
        self._source = source
        self._start = source.snapshot()
        self._end: LedgerCounts | None = None

    @property
    def counts(self) -> LedgerCounts:
        """What was counted since the block began, up to its end."""
        return (self._end or self._source.snapshot()) - self._start

    def stop(self) -> None:
        """End the block; `counts` no longer changes."""
        self._end = self._source.snapshot()


def _value(counter: itertools.count[int]) -> int:
    """Read a counter without counting; its ``repr`` is the one way that leaves it as it is."""
    return int(repr(counter)[len("count(") : -1])


ledger = Ledger()
"""The ledger of this process."""


@contextmanager
def no_copies() -> Iterator[None]:
    """Make every copy by the driver inside the block raise `ZeroCopyError`.

    It holds for the calling thread (and asyncio task), for explicit transfers such as
    ``copy_from`` and ``to_host`` as for hidden ones. Taking over a user's donated result
    (``commit``) moves no bytes and is allowed; so are the private copies that `update` takes of
    NumPy arrays among its arguments, which are values and not memory to share.

    Raises
    ------
    ZeroCopyError
        From the call that would have copied; no bytes have moved.
    """
    token = _copies_forbidden.set(True)
    try:
        yield
    finally:
        _copies_forbidden.reset(token)
