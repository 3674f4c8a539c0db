"""Saving the handles of a region to a file, and making or filling handles from one."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver import _hooks
from rlx_driver._ledger import ledger
from rlx_driver._locks import acquire, release
from rlx_driver._snapshot_bytes import fill, pieces
from rlx_driver._snapshot_file import open_snapshot, write_snapshot
from rlx_driver._snapshot_progress import reporting
from rlx_driver._snapshot_tensors import Target, describe, read_targets
from rlx_driver.backends.base import ArrayFacts, FunctionalBackend, row_major_strides
from rlx_driver.errors import (
    DTypeError,
    ShapeError,
    UnboundNameError,
)
from rlx_driver.registry import registry
from rlx_driver.scopes import WriteScope

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from rlx_driver._snapshot_file import Snapshot
    from rlx_driver._snapshot_progress import Progress
    from rlx_driver.device import Device
    from rlx_driver.handle import BufferHandle, HandleRegion

__all__ = ["RegionFiles"]

_SHARED = 64
"""Bytes to which mapped handles are aligned: what JAX needs."""


class RegionFiles:
    """The files of `HandleRegion`."""

    def save(self: Any, path: str | os.PathLike[str], *, progress: Progress = None) -> None:
        """Write every open handle, as a tensor under its name, to a safetensors file.

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
        A dtype that the format lacks (complex128, float8_e3m4, the narrow integers and such) is
        written as uint8, one axis, and the metadata says what it is; `load` gives it back. Handles
        that were not used so far are allocated. Copies: no, on the host; from a GPU to the host, a
        chunk at a time. Blocks: until pending updates are done and the file is on the disk.
        Meanwhile writes by the driver wait; who writes through a view of his own is not held up.

        Raises
        ------
        SnapshotError
            A name is no text that can be written, or `path` is no file. Nothing was written.
        OSError
            The file cannot be written.
        MissingPackageError
            safetensors is missing, or rich: ``pip install rlx-driver[snapshots]``.
        ZeroCopyError
            Inside `no_copies`, off the host.
        ClosedHandleError
            A handle was closed while this began.
        """
        handles, entries, metadata = describe(list(self))
        total = sum(entry.nbytes for entry in entries)
        with _reading(handles), reporting(progress, total, "saving") as advance:
            if not self.device.is_host:
                ledger.will_copy(total, "save")
            parts = (part for each in handles for part in pieces(each._backend, each._native))
            write_snapshot(path, entries, metadata, parts, advance)

    @classmethod
    def load(
        cls: Any,
        path: str | os.PathLike[str],
        device: Device | str = "cpu",
        *,
        backend: str | None = None,
        mmap: bool = False,
        progress: Progress = None,
    ) -> HandleRegion:
        """Make a region with a handle for each tensor of a safetensors file, whoever wrote it.

        Parameters
        ----------
        path
            The file.
        device, backend
            As for `HandleRegion`.
        mmap
            Map the file, for this process alone: what is written to a handle does not reach the
            file. It goes for handles on the host in the native memory of the host whose bytes lie
            at a multiple of 64 in the file; the others are read. Their alignment is then 64.
        progress
            As for `save`.

        Returns
        -------
        HandleRegion
            The handles in the order of the file. All that are read lie in one allocation. Tensors
            of elements of less than a byte become handles of uint8, one axis, as packed. Copies:
            what is not mapped; the ledger counts it. Blocks: for reading. Aliases: the mapped
            file, whose name may go or be given to another file. Who shortens a mapped file in
            place ends the process.

        Raises
        ------
        SnapshotError
            It is no safetensors file, or it is damaged. The text says what was found.
        OSError
            It cannot be read.
        ZeroCopyError
            Inside `no_copies`, when bytes have to be read.
        DeviceUnavailableError, OutOfDeviceMemory, MissingPackageError
            As for `HandleRegion` and `save`. Nothing is left of what was made.
        """
        with open_snapshot(path) as file:
            targets = read_targets(file)
            region = cls(device, backend=backend)
            try:
                _make(region, file, targets, mmap, progress)
            except BaseException:
                region.close()
                raise
            return region  # type: ignore[no-any-return]

    def restore(self: Any, path: str | os.PathLike[str], *, progress: Progress = None) -> None:
        """Copy each tensor of a file into the handle of its name, whose address stays.

        Parameters
        ----------
        path
            A safetensors file; every tensor in it has a handle of its name, shape and dtype.
            Handles that it does not name are left alone.
        progress
            As for `save`.

        Notes
        -----
        Copies: always, all under one fence. Blocks: for reading, and for readers of arrays that
        `jax` handed out.

        Raises
        ------
        UnboundNameError, ShapeError, DTypeError
            A tensor has no handle, or another shape or dtype. Nothing was changed.
        SnapshotError, OSError
            As for `load`. Nothing was changed, unless the file became shorter while it was read.
        ZeroCopyError
            Inside `no_copies`, or when an alias blocks the fence. Nothing was changed.
        """
        with open_snapshot(path) as file:
            targets = read_targets(file)
            for target in targets:
                _require_fit(self, file, target)
            handles = [self[target.entry.name] for target in targets]
            total = sum(target.entry.nbytes for target in targets)
            with reporting(progress, total, "restoring") as advance:
                _fill(file, targets, handles, advance, "restore")


# --- saving --------------------------------------------------------------------------------------


@contextmanager
def _reading(handles: Sequence[BufferHandle]) -> Iterator[None]:
    """Keep everybody from writing through the driver, and wait for what is pending."""
    for handle in handles:
        handle._materialise()
    accesses = [handle._access for handle in handles]
    acquire((), accesses)
    try:
        for handle in handles:
            if _hooks.checker is not None:
                _hooks.checker.before_read(handle)
            with handle._access.lock:
                handle._access.settle(writes=False)
        yield
    finally:
        for access in accesses:
            access.after_native(wrote=False)
        release((), accesses)


# --- loading -------------------------------------------------------------------------------------


def _make(
    region: HandleRegion,
    file: Snapshot,
    targets: Sequence[Target],
    mmap: bool,
    progress: Progress,
) -> None:
    backend = region.backend
    native = region.device.is_host and not isinstance(backend, FunctionalBackend)
    mapped: list[Target] = []
    read: list[Target] = []
    for target in targets:
        strides = row_major_strides(target.shape, target.dtype.itemsize)
        facts = ArrayFacts(0, target.shape, strides, target.dtype, region.device)
        if not isinstance(backend, FunctionalBackend) and (obstacle := backend.obstacle(facts)):
            raise DTypeError(
                f"tensor {target.entry.name!r} of {file.path!r} cannot live on {region.device}: "
                f"{obstacle.text}. Load it on the host"
            )
        aligned = target.entry.offset % _SHARED == 0 and target.entry.nbytes
        (mapped if mmap and native and aligned else read).append(target)
    total = sum(target.entry.nbytes for target in targets)
    copied = sum(target.entry.nbytes for target in read)
    with reporting(progress, total, "loading") as advance:
        if copied:
            ledger.require_copies(copied, "load")
        if mapped:
            _map(region, file, mapped)
            advance(total - copied)
        if read:
            spec = {target.entry.name: (target.shape, target.dtype) for target in read}
            handles = list(region.create(spec).values())
            _fill(file, read, handles, advance, "load")
            for handle in handles:
                handle._access.epoch = 0
    made = region._handles
    region._handles = {target.entry.name: made[target.entry.name] for target in targets}


def _map(region: HandleRegion, file: Snapshot, targets: Sequence[Target]) -> None:
    from rlx_driver.handle import BufferHandle

    memory = file.mapped()
    made: dict[str, BufferHandle] = {}
    for target in targets:
        handle = object.__new__(BufferHandle)
        handle._start(target.entry.name, target.shape, target.dtype, region.device)
        handle._region = region
        handle._slot = (memory, target.entry.offset)
        made[handle.name] = handle
    region._add(made)
    for handle in made.values():
        handle._maker.shared = True  # it reserves nothing
        handle._materialise()


def _require_fit(region: HandleRegion, file: Snapshot, target: Target) -> None:
    name = target.entry.name
    if name not in region:
        known = ", ".join(handle.name for handle in region) or "none"
        raise UnboundNameError(
            f"{file.path!r} has a tensor {name!r} and the region has no such handle; it has: "
            f"{known[:300]}. Nothing was changed"
        )
    handle = region[name]
    if handle.shape != target.shape:
        raise ShapeError(
            f"tensor {name!r} of {file.path!r} is of shape {target.shape} and its handle of "
            f"{handle.shape}. Nothing was changed"
        )
    if handle.dtype != target.dtype:
        raise DTypeError(
            f"tensor {name!r} of {file.path!r} is of {target.dtype.name} and its handle of "
            f"{handle.dtype.name}. Nothing was changed"
        )


def _fill(
    file: Snapshot,
    targets: Sequence[Target],
    handles: Sequence[BufferHandle],
    advance: Callable[[int], None],
    reason: str,
) -> None:
    """Read tensors into handles, all of them under one fence."""
    if not handles:
        return
    if not handles[0]._backend.has_views:
        for target, handle in zip(targets, handles, strict=True):
            whole = np.empty(target.shape, target.dtype)
            fill(file, target.entry.offset, registry.get("numpy"), whole, advance)
            handle.copy_from(whole)  # the ledger counts it there
        return
    ledger.will_copy(sum(target.entry.nbytes for target in targets), reason)
    with WriteScope(handles, handles[0]._backend.name, None, list) as arrays:
        for target, handle, array in zip(targets, handles, arrays, strict=True):
            if target.entry.nbytes:
                fill(file, target.entry.offset, handle._backend, array, advance)
