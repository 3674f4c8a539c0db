"""Who made which memory: the makers that are alive, where they were made, and leaks among them.

Whatever owns memory of the driver registers itself here, weakly: base Buffers, handles, regions
and arenas. `rlx_driver._memory_report` puts that together with what `backends.accounting` counts.
"""

from __future__ import annotations

import gc
import itertools
import os
import threading
import weakref
from contextlib import contextmanager
from traceback import StackSummary
from typing import TYPE_CHECKING, Any, NamedTuple

from rlx_driver._races import Place, here
from rlx_driver._sharing import facts_of
from rlx_driver.backends.accounting import Pool, accounting
from rlx_driver.errors import LeakError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np

    from rlx_driver.backends.accounting import Allocation
    from rlx_driver.backends.facts import ArrayFacts
    from rlx_driver.buffer import Buffer
    from rlx_driver.device import Device

__all__ = [
    "Contents",
    "Maker",
    "Pool",
    "Slot",
    "common_pool",
    "common_pools",
    "is_open",
    "makers",
    "no_leaks",
    "register",
    "register_array",
    "register_buffer",
    "trace_memory",
]

_DEPTH = 4
"""Frames that are kept of a stack, the innermost ones."""

_LISTED = 20
"""Leaks of which an error tells more than that they are there."""


class Slot(NamedTuple):
    """A part of an arena, for the report."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    byte_size: int


class Contents(NamedTuple):
    """What an arena says of itself: bytes that its slots cover together, and the slots."""

    in_use: int
    slots: Sequence[Slot]


class Maker(weakref.ref[Any]):
    """A weak reference to what owns memory, and what is known of it after its end too.

    Attributes
    ----------
    serial
        Rises from one maker to the next.
    kind, name
        What it is: ``"buffer"``, ``"handle"``, ``"region"`` or ``"arena"``, and how it is called.
    pool
        Where it is reported.
    facts
        Shape and dtype of a buffer or handle.
    shared
        Whether its memory is somebody else's.
    place
        Where it was made, when that was traced.
    contents
        Gives what is in an arena.
    """

    __slots__ = ("contents", "facts", "kind", "name", "place", "pool", "serial", "shared")

    serial: int
    kind: str
    name: str
    pool: Pool
    facts: ArrayFacts | None
    shared: bool
    place: Place | None
    contents: Callable[[Any], Contents] | None

    def claim(self, made: Sequence[Allocation]) -> None:
        """Say that it made these allocations; `accounting.record` gives them."""
        for allocation in made:
            allocation.claim((self,), self.pool)

    @property
    def title(self) -> str:
        """What it is, in words."""
        what = "Buffer" if self.kind == "buffer" else f"{self.kind} {self.name!r}"
        if self.kind in ("region", "arena"):
            what = self.name
        if self.facts is not None:
            what += f" {self.facts.dtype.name}{list(self.facts.shape)}"
        return what if str(self.pool.device) in what else f"{what} on {self.pool.device}"


_makers: dict[int, Maker] = {}
_serial = itertools.count()
_pools: dict[tuple[str, str, int], Pool] = {}


def _forget(maker: Maker, forget: Callable[..., Any] = _makers.pop) -> None:
    forget(maker.serial, None)  # bound early: modules are taken apart before the last objects die


def register(
    obj: Any,
    kind: str,
    name: str,
    pool: Pool,
    facts: ArrayFacts | None = None,
    made: Sequence[Allocation] = (),
    *,
    shared: bool = False,
    contents: Callable[[Any], Contents] | None = None,
) -> Maker:
    """Take note, weakly, of something that owns memory; parameters as the attributes of `Maker`.

    Parameters
    ----------
    obj
        The owner. It is open until its ``is_closed`` is true or it is collected.
    made
        Its allocations so far; more by `Maker.claim`.
    contents
        Called with `obj` for a report; it is to hold no reference to it, and to raise nothing.
    """
    maker = Maker(obj, _forget)
    maker.serial = serial = next(_serial)
    maker.kind = kind
    maker.name = name
    maker.pool = pool
    maker.facts = facts
    maker.shared = shared
    maker.contents = contents
    maker.place = _here() if _tracing.depth else None
    _makers[serial] = maker
    for allocation in made:
        allocation.claim((maker,), pool)
    return maker


def register_buffer(buffer: Buffer, made: Sequence[Allocation], *, shared: bool = False) -> Buffer:
    """Take note of a base Buffer, and give it back."""
    facts = buffer._facts
    pool = common_pool("buffers", facts.device)
    register(buffer, "buffer", "Buffer", pool, facts, made, shared=shared)
    return buffer


def register_array(buffer: Buffer, source: Any, copy: bool | None) -> Buffer:
    """Take note of a Buffer on an array, which counts when it is a copy; give the Buffer back.

    Parameters
    ----------
    source
        What the caller has given, and still holds.
    copy
        As the caller of `Buffer.from_array` has asked.
    """
    facts, native = buffer._facts, buffer._native
    shared = copy is False or source is native
    if not shared and copy is None:
        shared = facts_of(source).address == facts.address
    owner = None if shared else buffer._backend.memory_owner(native)
    made = [] if owner is None else [accounting.add(facts.device, facts.byte_size, owner)]
    return register_buffer(buffer, made, shared=shared)


def _here() -> Place:
    place = here("made at")
    return Place(place.what, StackSummary.from_list(place.stack[-_DEPTH:]))


def makers() -> list[Maker]:
    """List what is registered and has not been collected, the oldest first."""
    return list(_makers.values())


def common_pool(kind: str, device: Device) -> Pool:
    """Give the pool of all buffers, or of all handles without a region, on a device."""
    key = kind, device._kind, device._index  # what compares faster than the device
    return _pools.get(key) or _pools.setdefault(key, Pool(kind, kind, device))


def common_pools() -> list[Pool]:
    """List the pools that do not end with what is in them."""
    return list(_pools.values())


def is_open(obj: Any) -> bool:
    """Tell whether what a maker refers to is there and was not closed."""
    return obj is not None and not getattr(obj, "is_closed", False)


# --- tracing and leaks ---------------------------------------------------------------------------


class _Tracing:
    """How many ask for places to be remembered."""

    def __init__(self) -> None:
        self.depth = int(os.environ.get("RLX_TRACE_MEMORY", "0") not in ("", "0"))
        self._lock = threading.Lock()

    @contextmanager
    def on(self) -> Iterator[None]:
        with self._lock:
            self.depth += 1
        try:
            yield
        finally:
            with self._lock:
                self.depth -= 1


_tracing = _Tracing()


@contextmanager
def trace_memory() -> Iterator[None]:
    """Remember where memory is made, inside the block, for `memory_report`.

    A short stack is kept for each Buffer, handle, region and arena that any thread makes: the
    frames of the program, not those of the driver. It costs some 10 us each. ``RLX_TRACE_MEMORY=1``
    in the environment traces the whole process.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> with rlx.trace_memory():
    ...     traced = rlx.BufferHandle("traced", (2, 4))
    >>> (entry,) = rlx.memory_report("cpu").find("traced")
    >>> entry.created.endswith("in <module>")
    True
    >>> traced.close()
    """
    with _tracing.on():
        yield


@contextmanager
def no_leaks() -> Iterator[None]:
    """Fail when memory that was made inside the block is still open at its end.

    Open is a Buffer, handle, region or arena that was not closed and that somebody still refers
    to, after a garbage collection. What was collected, closed or not, has given its memory up, and
    slices and views are not counted; `memory_report` shows memory that a view outside still holds.
    It goes for what any thread makes, and blocks may be nested. As a decorator,
    ``@rlx.no_leaks()``, it goes for the function.

    Raises
    ------
    LeakError
        At the end of the block. It lists each leak, its bytes and where it was made. An error that
        leaves the block is left alone, and nothing is looked for.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> kept = []
    >>> try:
    ...     with rlx.no_leaks():
    ...         kept.append(rlx.BufferHandle("kv", (2, 4)))
    ... except rlx.LeakError as error:
    ...     print(str(error).splitlines()[1])
    handle 'kv' float32[2, 4] on cpu, 32 bytes, not allocated
    >>> kept.pop().close()
    """
    first = next(_serial)
    with _tracing.on():
        yield
    gc.collect()
    leaks = [maker for maker in makers() if maker.serial > first and is_open(maker())]
    if leaks:
        raise LeakError(_leak_text(leaks))


def _leak_text(leaks: Sequence[Maker]) -> str:
    count = "one leak" if len(leaks) == 1 else f"{len(leaks)} leaks"
    lines = [
        f"{count}: made inside no_leaks(), and at its end still referred to and not closed. Call "
        "close(), or let go of the last reference"
    ]
    for maker in leaks[:_LISTED]:
        lines += [f"{maker.title}, {_size(maker())}", str(maker.place)]
    if len(leaks) > _LISTED:
        lines.append(f"and {len(leaks) - _LISTED} more")
    return "\n".join(lines)


def _size(obj: Any) -> str:
    nbytes = getattr(obj, "size_bytes", None)  # of an arena
    if nbytes is None:
        nbytes = getattr(obj, "byte_size", 0)
    return f"{nbytes:,} bytes" + ("" if getattr(obj, "is_allocated", True) else ", not allocated")
