"""Saving an arena to a file, and making one of a file: mapped, or read into memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver import _hooks
from rlx_driver._arena_memory import Memory, widest_alignment
from rlx_driver._ledger import ledger
from rlx_driver._locks import acquire, release
from rlx_driver._owned import owning_backend
from rlx_driver._snapshot_bytes import chunks, fill, pieces, read_chunks
from rlx_driver._snapshot_file import Entry, open_snapshot, write_snapshot
from rlx_driver._snapshot_plan import decode_plan, encode_plan
from rlx_driver._snapshot_progress import reporting
from rlx_driver.backends.base import FunctionalBackend
from rlx_driver.device import Device
from rlx_driver.errors import SnapshotError, StaleViewError
from rlx_driver.scopes import WriteScope

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Hashable, Iterator

    from rlx_driver._arena_owned import OwnedBytes
    from rlx_driver._snapshot_file import Snapshot
    from rlx_driver._snapshot_progress import Progress
    from rlx_driver.arena import Arena
    from rlx_driver.buffer import Buffer
    from rlx_driver.plan import MemoryPlan

__all__ = ["ArenaFiles"]

_NAME = "arena"
_FORMAT = "rlx_driver.format"
_PLAN = "rlx_driver.plan"
_VERSION = "arena/1"
_PAGE = 4096  # files are mapped at multiples of it, or of more
_BYTE = np.dtype(np.uint8)


class ArenaFiles:
    """The files of `Arena`."""

    def save(self: Any, path: str | os.PathLike[str], *, progress: Progress = None) -> None:
        """Write the arena, bytes and plan, to a safetensors file; `load` makes an arena of it.

        Parameters
        ----------
        path
            The file. One that is there is replaced when the new one is complete and on the disk;
            until then, and after any failure, it is as it was. Of a symbolic link it is the file
            that it leads to. The new file has the mode that the umask gives.
        progress
            True: a bar in the terminal. A function: called with the bytes done and those in all,
            at the start and after each piece.

        Notes
        -----
        Copies: no, on the host; from a GPU to the host, a chunk at a time. Blocks: until pending
        updates are done and the file is on the disk. Meanwhile writes by the driver wait, and so
        do first uses of slots; who writes through a view of his own is not held up.

        Raises
        ------
        SnapshotError
            A node is something else than str, int, float, bool, None and tuples of these, or
            `path` is no file. Nothing was written.
        OSError
            The file cannot be written.
        MissingPackageError
            safetensors is missing, or rich: ``pip install rlx-driver[snapshots]``.
        ZeroCopyError
            Inside `no_copies`, on a GPU.
        ClosedHandleError, ArenaCorruptionError
            After `close`; of a debug arena, as for `check`.
        """
        self._open()
        self._look()
        _save(self, path, progress)

    @classmethod
    def load(
        cls: Any,
        path: str | os.PathLike[str],
        *,
        mmap: bool = True,
        device: Device | str = "cpu",
        backend: str | None = None,
        name: str | None = None,
        debug: bool = False,
        progress: Progress = None,
    ) -> Arena:
        """Make an arena of a file that `save` wrote.

        Parameters
        ----------
        path
            The file.
        mmap
            Map the file instead of reading it: nothing is read until it is used. It is mapped for
            this process alone, so that what is written does not reach the file, and costs memory a
            page at a time. Where that cannot be (on a GPU, in memory that JAX owns, in a debug
            arena, where a slot asks for more than 4,096 bytes of alignment) the file is read.
        device, backend, name, debug
            As for `Arena`. A debug arena is laid out anew: of slots that take turns in the same
            bytes it gets the earliest right.
        progress
            As for `save`.

        Returns
        -------
        Arena
            Its plan is the one that was saved, checked anew. Copies: no, when it is mapped.
            Blocks: for reading the file, unless it is mapped. Read-only: no. Aliases: the mapped
            file, whose name may go or be given to another file. Who shortens a mapped file in
            place ends the process: replace files, as `save` does.

        Raises
        ------
        SnapshotError
            It is no file of an arena, it is damaged, or its plan makes no sense. The text says
            what was found.
        OSError
            It cannot be read.
        ZeroCopyError
            Inside `no_copies`, unless it is mapped.
        DeviceUnavailableError, OutOfDeviceMemory, MissingPackageError
            As for `Arena` and `save`.
        """
        place = Device(device)
        with open_snapshot(path) as file:
            plan, entry = _contents(file)
            owner = owning_backend(place, backend)
            with reporting(progress, plan.size, "loading") as advance:
                if mmap and place.is_host and not (debug or isinstance(owner, FunctionalBackend)):
                    native = file.mapped()[entry.offset :]
                    if not plan.size or native.ctypes.data % widest_alignment(plan) == 0:
                        advance(plan.size)
                        return cls._over(plan, native, name)  # type: ignore[no-any-return]
                ledger.will_copy(plan.size, "load")
                arena: Arena = cls(plan, place, backend=backend, name=name, debug=debug)
                try:
                    _read(arena, file, entry, advance)
                except BaseException:
                    arena.close()
                    raise
                return arena


# --- saving --------------------------------------------------------------------------------------


def _save(arena: Arena, path: str | os.PathLike[str], progress: Progress) -> None:
    with _reading(arena) as memory:
        plan = arena._asked
        entry = Entry(_NAME, "U8", (plan.size,), plan.size)
        metadata = {_FORMAT: _VERSION, _PLAN: encode_plan(plan)}
        if not arena.device.is_host:
            ledger.will_copy(plan.size, "save")
        with reporting(progress, plan.size, "saving") as advance:
            alignment = min(widest_alignment(plan), _PAGE)
            parts = _parts(arena, memory)
            write_snapshot(path, [entry], metadata, parts, advance, alignment=alignment)


@contextmanager
def _reading(arena: Arena) -> Iterator[Memory | OwnedBytes]:
    """Keep everybody from writing through the driver, and wait for what is pending."""
    while True:
        memory = arena._open()
        if not isinstance(memory, Memory):
            with memory.lock:
                if arena._memory is memory:
                    yield memory
                    return
            continue
        with memory.lock:
            bases = list(memory._bases.values())
        accesses = [base._access for base in bases]
        try:
            acquire((), accesses)
        except StaleViewError:
            if arena._memory is memory:
                raise
            continue  # it was reset meanwhile
        # Who has the lock may wait for what is held here: try, and step back.
        if memory.lock.acquire(blocking=False):
            try:
                if arena._memory is memory and len(memory._bases) == len(bases):
                    _settle(bases)
                    try:
                        yield memory
                    finally:
                        for access in accesses:
                            access.after_native(wrote=False)
                    return
            finally:
                memory.lock.release()
                release((), accesses)
        else:
            release((), accesses)


def _settle(bases: list[Buffer]) -> None:
    for base in bases:
        if _hooks.checker is not None:
            _hooks.checker.before_read(base)
        with base._access.lock:
            base._access.settle(writes=False)


def _parts(arena: Arena, memory: Memory | OwnedBytes) -> Iterator[memoryview]:
    if not isinstance(memory, Memory):
        array, backend = memory._array, memory.backend
        for start, end in chunks(arena._asked.size):
            part = backend.view(array, start, (end - start,), _BYTE)
            yield backend.copy_out(part).data
    elif memory.margin:
        yield _without_guards(arena, memory).data
    else:
        yield from pieces(memory.backend, _native(memory, arena._asked.size))


def _native(memory: Memory, nbytes: int) -> Any:
    return memory.backend.view(memory._native, memory._shift, (nbytes,), _BYTE)


def _without_guards(arena: Arena, memory: Memory) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Put the slots of a debug arena where they lie without guard bytes.

    Of those that take turns, the one alive at the step told last comes through, else the earliest.
    """
    plan, laid = arena._asked, arena.plan
    backend = memory.backend
    found = backend.copy_out(_native(memory, laid.size))
    image = np.zeros(plan.size, np.uint8)
    step = arena._inspector._step if arena._inspector is not None else None
    for node in sorted(_latest_first(plan), key=lambda node: _alive(plan.life(node), step)):
        size, start, where = plan.interval(node).size, laid.offset(node), plan.offset(node)
        image[where : where + size] = found[start : start + size]
    return image


def _latest_first(plan: MemoryPlan) -> list[Hashable]:
    roots = [node for node in plan.nodes if plan.root(node) is node]
    return sorted(roots, key=lambda node: -plan.life(node)[0])


def _alive(life: tuple[int, int], step: int | None) -> bool:
    return step is None or life[0] <= step <= life[1]


# --- loading -------------------------------------------------------------------------------------


def _contents(file: Snapshot) -> tuple[MemoryPlan, Entry]:
    """Check that a file is an arena."""
    version = file.metadata.get(_FORMAT)
    if version is None or not version.startswith("arena/") or _PLAN not in file.metadata:
        raise file.error(
            "it is no snapshot of an arena, for its metadata has no plan: weights go into handles "
            "with HandleRegion.load"
        )
    if version != _VERSION:
        raise file.error(
            f"it is of format {version[:40]!r} and this rlx-driver reads {_VERSION!r}: load it "
            "with a newer one"
        )
    try:
        plan = decode_plan(file.metadata[_PLAN])
    except SnapshotError as error:
        raise file.error(f"{error}. It was damaged, or meant to do harm: save it anew") from error
    entry = file.entries[0] if len(file.entries) == 1 else None
    if entry is None or (entry.name, entry.code, entry.shape) != (_NAME, "U8", (plan.size,)):
        found = ", ".join(f"{e.name!r} {e.code}{list(e.shape)}" for e in file.entries[:3])
        raise file.error(
            f"its plan needs one tensor {_NAME!r} U8[{plan.size}], and it has {found or 'none'}: "
            "it was damaged or changed; save it anew"
        )
    return plan, entry


def _read(arena: Arena, file: Snapshot, entry: Entry, advance: Callable[[int], None]) -> None:
    memory = arena._open()
    plan = arena._asked
    if not isinstance(memory, Memory):
        with memory.lock:
            assert memory._owner is not None
            lease = memory._owner.lease
            for start, part in read_chunks(file, entry.offset, plan.size, advance):
                lease.array = memory.backend.put(lease.array, start, part)
    elif memory.margin:
        _read_slots(arena, memory, file, entry)
        advance(plan.size)
    else:
        fill(file, entry.offset, memory.backend, _native(memory, plan.size), advance)


def _read_slots(arena: Arena, memory: Memory, file: Snapshot, entry: Entry) -> None:
    """Read each slot of a debug arena to where it lies between its guards."""
    plan, laid, backend = arena._asked, arena.plan, memory.backend
    with WriteScope([memory.whole()], backend.name, None) as native:
        for node in _latest_first(plan):
            start, size = memory.margin + laid.offset(node), plan.interval(node).size
            target = backend.index(native, slice(start, start + size))
            fill(file, entry.offset + plan.offset(node), backend, target, lambda nbytes: None)
