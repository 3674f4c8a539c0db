"""The file of a snapshot: safetensors, written whole or not at all, and read with bounds checked.

The library writes from host memory in one go. Here the bytes come in chunks, from a GPU too, and
begin at an aligned place, so the header (a length, JSON, spaces) is made here; the library then
opens the file before it takes its place, and it is what reads the header of every file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlx_driver.errors import MissingPackageError, SnapshotError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import ModuleType

__all__ = ["CHUNK", "Entry", "Snapshot", "open_snapshot", "require_library", "write_snapshot"]

CHUNK = 32 << 20
"""Bytes that are read, written or copied at a time."""

_ALIGNMENT = 256
_LONGEST_HEADER = 100_000_000  # the library reads no longer one
_MOST_AXES = 64  # NumPy has no more
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Entry(NamedTuple):
    """A tensor of a file: its name, the format's code of its dtype, and where its bytes lie.

    `offset` is in bytes from the start of the file; of an entry to be written it is not looked at.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0


def require_library() -> ModuleType:
    """Import safetensors.

    Raises
    ------
    MissingPackageError
        It is not installed.
    SnapshotError
        The host is big-endian, and the format is not.
    """
    if sys.byteorder != "little":
        raise SnapshotError("safetensors files are little-endian and this host is not")
    try:
        import safetensors
    except ImportError as error:
        raise MissingPackageError(
            f"snapshots are safetensors files, and safetensors cannot be imported ({error}): pip "
            "install rlx-driver[snapshots]",
            name="safetensors",
        ) from error
    library: ModuleType = safetensors
    return library


# --- writing -------------------------------------------------------------------------------------


def write_snapshot(
    path: str | os.PathLike[str],
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    parts: Iterable[memoryview],
    advance: Callable[[int], None],
    *,
    alignment: int = _ALIGNMENT,
) -> None:
    """Write a file next to its place, and put it there when all of it is on the disk.

    Parameters
    ----------
    path
        The file; of a symbolic link the file it leads to.
    entries
        The tensors, in the order in which their bytes come.
    metadata
        What else is to be in the header.
    parts
        All bytes, in pieces of any size.
    advance
        Told of the bytes of each piece that was written.
    alignment
        The first byte lies at a multiple of this in the file.

    Raises
    ------
    SnapshotError
        The header is impossible, or there is something else than a file. Nothing was changed.
    OSError
        The file cannot be written. What was there before still is.
    """
    library = require_library()
    header = _header(entries, metadata, max(alignment, _ALIGNMENT))
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise SnapshotError(
            f"{os.fspath(path)!r} is there and is no regular file: give the name of a file. "
            "Nothing was written"
        )
    draft = target.parent / f".rlx-{os.urandom(8).hex()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(draft, flags, 0o666)  # the umask says the rest
    try:
        try:
            _write(descriptor, memoryview(header))
            for part in parts:
                _write(descriptor, part)
                advance(part.nbytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _read_header(library, draft)
        os.replace(draft, target)  # noqa: PTH105 - names what it is
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    _flush_folder(target.parent)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str], alignment: int) -> bytes:
    listed: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        if entry.name in listed:
            raise SnapshotError(
                f"no tensor of a safetensors file can be called {entry.name!r}: choose another "
                "name. Nothing was written"
            )
        spot = [end, end := end + entry.nbytes]
        listed[entry.name] = {"dtype": entry.code, "shape": entry.shape, "data_offsets": spot}
    try:
        text = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise SnapshotError(
            f"a name is no Unicode text ({error}): choose another. Nothing was written"
        ) from error
    length = len(text) + -(8 + len(text)) % alignment
    if length > _LONGEST_HEADER:
        raise SnapshotError(
            f"names and metadata take {length:,} bytes and safetensors allows "
            f"{_LONGEST_HEADER:,}: save fewer nodes or handles in one file, or give them shorter "
            "names. Nothing was written"
        )
    return length.to_bytes(8, "little") + text.ljust(length)


def _write(descriptor: int, part: memoryview) -> None:
    while part.nbytes:
        part = part[os.write(descriptor, part) :]


def _flush_folder(folder: Path) -> None:
    """Make the new name last; some file systems have no such thing."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- reading -------------------------------------------------------------------------------------


class Snapshot:
    """A safetensors file, open for reading; every entry lies inside of it.

    Attributes
    ----------
    path
        As it was given, for errors.
    entries
        The tensors, in the order of their bytes, without gaps.
    metadata
        What else the header holds.
    """

    def __init__(
        self, path: str, descriptor: int, size: int, entries: list[Entry], metadata: dict[str, str]
    ) -> None:
        self.path = path
        self.entries = entries
        self.metadata = metadata
        self._descriptor = descriptor
        self._size = size

    def mapped(self) -> Bytes:
        """Give the whole file as a writable array; what is written stays in this process.

        Copies: a page, when it is first written. It outlives the Snapshot, and the file's name.

        Raises
        ------
        SnapshotError
            The system cannot map it.
        """
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        both = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            pages = mmap.mmap(self._descriptor, self._size, flags=flags, prot=both)
        except (OSError, ValueError) as error:
            raise self.error(f"it cannot be mapped ({error}): load it with mmap=False") from error
        return np.frombuffer(pages, np.uint8)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read bytes of the file, as many as the target has.

        Raises
        ------
        SnapshotError
            The file has become shorter.
        """
        while target.nbytes:
            count = os.preadv(self._descriptor, [target], offset)
            if not count:
                raise self.error(f"it was cut short at byte {offset:,} while it was read")
            target = target[count:]
            offset += count

    def error(self, text: str) -> SnapshotError:
        """Make an error about this file."""
        return SnapshotError(f"{self.path!r}: {text}")

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def open_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Open a file and check its header.

    Raises
    ------
    SnapshotError
        It is no safetensors file, or it is damaged.
    OSError
        It cannot be opened.
    """
    library = require_library()
    name = os.fspath(path)
    while True:
        # A pipe is to be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            entries, metadata = _read_header(library, Path(path), found)
            if _is_still(path, found):
                return Snapshot(name, descriptor, found.st_size, entries, metadata)
        except SnapshotError:
            if _is_still(path, found):
                os.close(descriptor)
                raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another file took its place meanwhile


def _is_still(path: str | os.PathLike[str], found: os.stat_result) -> bool:
    """Tell whether the file of a name is still the one that was opened."""
    try:
        return os.path.samestat(found, Path(path).stat())
    except OSError:
        return True  # its name is gone, but not the file


def _read_header(
    library: ModuleType, path: Path, found: os.stat_result | None = None
) -> tuple[list[Entry], dict[str, str]]:
    """Let the library parse the header, and lay the tensors out."""
    found = path.stat() if found is None else found
    if not stat.S_ISREG(found.st_mode):
        raise SnapshotError(f"{str(path)!r} is no regular file, so it is no snapshot")
    size = found.st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise SnapshotError(
                f"{str(path)!r} has {size:,} bytes"
                + (f", and says that its header alone has {length:,}" if size >= 8 else "")
                + f": {_REMEDY}"
            )
        with library.safe_open(path, framework="numpy") as opened:
            metadata = dict(opened.metadata() or {})
            told = [(key, opened.get_slice(key)) for key in opened.offset_keys()]
            shapes = [(key, one.get_dtype(), tuple(one.get_shape())) for key, one in told]
    except library.SafetensorError as error:
        raise SnapshotError(f"{str(path)!r}: {error}: {_REMEDY}") from error
    entries = []
    end = 8 + length
    for key, code, shape in shapes:
        nbytes = _byte_size(path, key, code, shape)
        entries.append(Entry(key, code, shape, nbytes, end))
        end += nbytes
    if end != size:
        raise SnapshotError(
            f"{str(path)!r} has {size:,} bytes and its tensors end at byte {end:,}: {_REMEDY}"
        )
    return entries, metadata


_REMEDY = (
    "it is no safetensors file, or it was damaged or cut short: save it, or fetch it, once more"
)


def _byte_size(path: Path, name: str, code: str, shape: tuple[int, ...]) -> int:
    bits = _BITS.get(code)
    if bits is None:
        raise SnapshotError(
            f"{str(path)!r}: tensor {name!r} is of dtype {code}, which this driver does not know: "
            "convert it with what wrote it"
        )
    # NumPy counts the lengths that are not 0, whatever the others are.
    if len(shape) > _MOST_AXES or math.prod(n for n in shape if n) * bits >= 2**66:
        raise SnapshotError(
            f"{str(path)!r}: tensor {name!r} has {len(shape)} axes of lengths up to "
            f"{max(shape)}, more than an array can have: it is damaged, or meant to do harm"
        )
    return math.prod(shape) * bits // 8
