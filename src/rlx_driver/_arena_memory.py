"""The memory behind an arena, and the slots in it."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver import _hooks
from rlx_driver._arena_blocks import disjoint_blocks, name_of
from rlx_driver._arena_owned import OwnedBytes, require_going_on, require_own_process
from rlx_driver._arena_values import bytes_of
from rlx_driver._fence import fence
from rlx_driver._ledger import ledger
from rlx_driver._locks import acquire, release
from rlx_driver._owned import make_owned, owning_backend
from rlx_driver._slices import byte_size
from rlx_driver.backends.base import (
    ALIGNMENT,
    ArrayFacts,
    Backend,
    FunctionalBackend,
    row_major_strides,
)
from rlx_driver.buffer import Buffer
from rlx_driver.errors import CaptureError, ZeroCopyError
from rlx_driver.typed_io import read_typed_to_f32, write_typed_from_f32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlx_driver.access import Access
    from rlx_driver.device import Device
    from rlx_driver.plan import MemoryPlan

__all__ = ["Memory", "make_memory"]

_BYTE = np.dtype(np.uint8)
_WHOLE = -1
"""The block of a debug arena that is all of its memory."""


def make_memory(
    plan: MemoryPlan, device: Device, owner: str | None, label: str, *, margin: int = 0
) -> Memory | OwnedBytes:
    """Allocate what a plan needs.

    Parameters
    ----------
    owner
        The backend whose framework owns the memory; None for the device's native one.
    margin
        Bytes to leave free before offset 0 and behind the end.

    Raises
    ------
    DeviceUnavailableError, OutOfDeviceMemory
        As for `Arena`.
    ZeroCopyError
        A margin was asked for where the memory has no views.
    """
    backend = owning_backend(device, owner)
    nbytes = plan.size + 2 * margin
    if isinstance(backend, FunctionalBackend):
        # Such a framework chooses the alignment by itself.
        slack = widest_alignment(plan) if device.is_host else 0
        native, found, keep = make_owned(backend, device, (nbytes + slack,), _BYTE)
        if not found.has_views:
            if margin:
                raise ZeroCopyError(
                    f"a debug arena looks at its bytes, and memory that {backend.name} owns on "
                    f"{device} has no views: debug the program on the host"
                )
            return OwnedBytes(backend, keep, device, label, plan)
        return Memory(native, found, device, owner, label, plan, margin)
    slack = widest if (widest := widest_alignment(plan)) > ALIGNMENT else 0
    native = backend.allocate(device, nbytes + slack)
    return Memory(native, backend, device, owner, label, plan, margin)


def widest_alignment(plan: MemoryPlan) -> int:
    """Give the alignment that offset 0 gets."""
    return max(ALIGNMENT, plan.widest_alignment)


class Memory:
    """Bytes of a framework that has views; slots are Buffers on them.

    Bytes that no two slots share are in different *blocks*. Each block has an `Access` of its own.
    """

    has_views = True

    def __init__(
        self,
        native: Any,
        backend: Backend,
        device: Device,
        owner: str | None,
        label: str,
        plan: MemoryPlan,
        margin: int,
    ) -> None:
        self.lock = threading.RLock()
        self.backend = backend
        self.margin = margin
        self._device = device
        self._owner = owner
        self._label = label
        self._plan = plan
        self._native = native
        self._facts = backend.facts(native)
        self._shift = _shift(self._facts.address, margin, widest_alignment(plan))
        self.address = self._facts.address + self._shift
        self._process = os.getpid()
        # What fills the memory may still be on its way, on the stream of now.
        self._born = backend.order(device, native)
        self._end: str | None = None
        self._starts, self._ends, self._alone = disjoint_blocks(plan)
        self._bases: dict[int, Buffer] = {}
        self._raw: dict[tuple[int, int], Buffer] = {}

    # --- slots

    def slot(self, offset: int, dt: np.dtype[Any], shape: tuple[int, ...]) -> Buffer:
        """Make the Buffer of a slot; the caller has checked that it fits.

        Raises
        ------
        ZeroCopyError
            The framework that owns the memory cannot see it so.
        """
        facts = self._facts_of(offset, dt, shape)
        if (obstacle := self.backend.obstacle(facts)) is not None:
            raise ZeroCopyError(
                f"{dt.name}{list(shape)} at byte {offset:,} of {self._label} cannot be seen by "
                f"{self.backend.name}: {obstacle.text}; read() and write() copy it"
            )
        block = max(bisect_right(self._starts, offset) - 1, 0)
        base = self._base(block)
        low = offset - self._starts[block]
        high = low + byte_size(shape, dt)

        def derivation(backend: Backend, view: Any) -> Any:
            part = backend.index(view, slice(low, high))
            if type(backend).reinterpret is Backend.reinterpret:  # it can only see plain bytes so
                return backend.view(part, 0, shape, dt)
            return backend.reinterpret(part, dt, shape)

        return base._derived(derivation)

    def sees(self, offset: int, dt: np.dtype[Any], shape: tuple[int, ...]) -> bool:
        """Tell whether `slot` can make such a Buffer."""
        return self.backend.obstacle(self._facts_of(offset, dt, shape)) is None

    def whole(self) -> Buffer:
        """Give all bytes, margins included, as one block more, which is for debug arenas only."""
        made = self._bases.get(_WHOLE)  # without the lock, which a save may hold for long
        return made or self._made(_WHOLE, -self.margin, self._plan.size + self.margin)

    def used_blocks(self) -> list[tuple[int, int, Access]]:
        """List the blocks that somebody has asked for, as places in `whole`: starts, ends."""
        return [
            (start, end, base._access)
            for block, base in list(self._bases.items())
            if block != _WHOLE
            and (start := self._starts[block] + self.margin)
            < (end := self._ends[block] + self.margin)
        ]

    def _facts_of(self, offset: int, dt: np.dtype[Any], shape: tuple[int, ...]) -> ArrayFacts:
        strides = row_major_strides(shape, dt.itemsize)
        return ArrayFacts(self.address + offset, shape, strides, dt, self._device)

    def _base(self, block: int) -> Buffer:
        return self._made(block, self._starts[block], self._ends[block])

    def _made(self, block: int, start: int, end: int) -> Buffer:
        with self.lock:
            base = self._bases.get(block)
            if base is None:
                require_going_on(self._label, self._end)
                require_own_process(self._label, self._process)
                if self._born.recording() is None:
                    self._born.before_native(_nothing, None, writes=False)
                native = self.backend.view(self._native, self._shift + start, (end - start,), _BYTE)
                base = Buffer._adopt(native, self.backend, self._name(block, start, end))
                base._access.keeper = self._label
                self._bases[block] = base
            return base

    def _name(self, block: int, start: int, end: int) -> str:
        row = -1 if block == _WHOLE else self._alone[block]
        if row >= 0:
            return f"slot {name_of(self._plan.nodes[row])} of {self._label}"
        return f"memory at bytes {start:,} to {end:,} of {self._label}"

    def _bytes(self, offset: int, nbytes: int) -> Buffer:
        """Give a slot as bytes."""
        with self.lock:
            raw = self._raw.get((offset, nbytes))
            if raw is None:
                if len(self._raw) >= 64 + 2 * len(self._plan):  # parts of many lengths
                    self._raw.clear()
                raw = self._raw[offset, nbytes] = self.slot(offset, _BYTE, (nbytes,))
            return raw

    # --- copies

    def put(self, offset: int, value: np.ndarray[Any, Any]) -> None:
        """Copy a host array to an offset, whatever the framework thinks of its dtype."""
        self._bytes(offset, value.nbytes).copy_from(bytes_of(value))

    def read(self, offset: int, dt: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Copy from an offset to the host."""
        nbytes = byte_size(shape, dt)
        ledger.will_copy(nbytes, "arena.read")
        with self._bytes(offset, nbytes).read(self.backend.name) as native:
            return self.backend.copy_out(native).view(dt).reshape(shape)

    def write_f32(self, offset: int, size: int, dt: np.dtype[Any], data: Any) -> int:
        """Convert float32 values into a slot of a size, as many as fit."""
        return write_typed_from_f32(self._bytes(offset, size), dt, data, size // dt.itemsize)

    def read_f32(self, offset: int, size: int, dt: np.dtype[Any], count: int, out: Any) -> Any:
        """Convert the first elements of a slot of a size to float32."""
        return read_typed_to_f32(self._bytes(offset, size), dt, count, out)

    # --- life

    @contextmanager
    def exclusive(self) -> Iterator[list[Access]]:
        """Have all accesses for writing, and the lock, so that nobody makes a slot meanwhile.

        Who holds an access may be waiting for the lock, and the other way round: whoever has one
        tries for the other, and steps back.
        """
        while True:
            with self.lock:
                bases = list(self._bases.values())
            taken = [base._access for base in bases]
            acquire(taken)
            try:
                if self.lock.acquire(blocking=False):
                    try:
                        if len(self._bases) == len(bases):
                            yield taken
                            return
                    finally:
                        self.lock.release()
            finally:
                release(taken)

    def renewed(self, plan: MemoryPlan, taken: list[Access]) -> Memory:
        """Make everything taken so far stale, and give zeroed memory for a plan."""
        require_own_process(self._label, self._process)
        if self._born.recording() is not None:
            raise CaptureError(
                f"{self._label} was to be reset or planned anew inside a capture, and a CUDA graph "
                "keeps its addresses: do it before or after. Nothing was changed"
            )
        shift = _shift(self._facts.address, self.margin, widest_alignment(plan))
        fits = shift + plan.size + self.margin <= self._facts.byte_size
        fresh: Memory | None = None
        if not fits:  # first, for it may fail
            made = make_memory(plan, self._device, self._owner, self._label, margin=self.margin)
            assert isinstance(made, Memory)
            fresh = made
        fence(taken)
        _before_close(taken)
        for access in taken:
            access.settle()
        if fits:
            self._born.before_native(_nothing, None)  # nobody else may have come after it
            with self.backend.writing():
                self._native[...] = 0
        for access in taken:
            access.after_native()
            access.written()
            access.close("stale")
        self._end = "stale"
        return fresh or Memory(
            self._native, self.backend, self._device, self._owner, self._label, plan, self.margin
        )

    def close(self, taken: list[Access]) -> None:
        """Give the memory up."""
        _before_close(taken)
        for access in taken:
            access.close()
        self._end = "closed"
        self._bases.clear()
        self._raw.clear()
        self._native = None


def _nothing() -> None:
    pass


def _before_close(accesses: list[Access]) -> None:
    if _hooks.checker is not None:
        for access in accesses:
            _hooks.checker.before_close(access)


def _shift(address: int, margin: int, alignment: int) -> int:
    """Give the bytes from an address to an aligned one behind a margin."""
    return margin + -(address + margin) % alignment
