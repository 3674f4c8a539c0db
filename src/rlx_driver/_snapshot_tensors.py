"""Tensors of a file and handles of a region: which is written as what, and read as what."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlx_driver import dtypes
from rlx_driver._slices import byte_size
from rlx_driver._snapshot_file import Entry
from rlx_driver.errors import DriverError, SnapshotError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlx_driver._snapshot_file import Snapshot
    from rlx_driver.handle import BufferHandle

__all__ = ["Target", "describe", "read_targets"]

_FORMAT = "rlx_driver.format"
_DTYPES = "rlx_driver.dtypes"
_VERSION = "region/1"
_ALIGNMENT = 256

_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_NAMES = {code: name for name, code in _CODES.items()}
_PACKED = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""Elements of less than a byte; they go into handles as the bytes they are packed in."""


# --- writing -------------------------------------------------------------------------------------


def describe(
    handles: Sequence[BufferHandle],
) -> tuple[list[BufferHandle], list[Entry], dict[str, str]]:
    """Put handles in the order of a file; give them, their tensors, and the metadata.

    What divides into large powers of two comes first, so that it is aligned in the file.
    """
    ordered = sorted(handles, key=lambda handle: -_evenness(handle.byte_size))
    metadata = {_FORMAT: _VERSION}
    lacking = {
        handle.name: [handle.dtype.name, list(handle.shape)]
        for handle in ordered
        if handle.dtype.name not in _CODES
    }
    if lacking:
        metadata[_DTYPES] = json.dumps(lacking, separators=(",", ":"))
    return ordered, [_entry(handle) for handle in ordered], metadata


def _evenness(nbytes: int) -> int:
    return min(nbytes & -nbytes or _ALIGNMENT, _ALIGNMENT)


def _entry(handle: BufferHandle) -> Entry:
    if not isinstance(handle.name, str):
        raise SnapshotError(
            f"handle {handle.name!r} has a name that is no text: a file needs names. Nothing was "
            "written"
        )
    code = _CODES.get(handle.dtype.name)
    if code is None:
        return Entry(handle.name, "U8", (handle.byte_size,), handle.byte_size)
    return Entry(handle.name, code, handle.shape, handle.byte_size)


# --- reading -------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A tensor of a file, and what its handle is."""

    entry: Entry
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def read_targets(file: Snapshot) -> list[Target]:
    """Say of each tensor of a file what its handle is.

    Raises
    ------
    SnapshotError
        The metadata contradicts the tensors.
    """
    lacking = _lacking(file)
    return [_target(file, entry, lacking.get(entry.name)) for entry in file.entries]


def _lacking(file: Snapshot) -> dict[str, Any]:
    """Give what the metadata says of dtypes that the format lacks."""
    text = file.metadata.get(_DTYPES)
    if text is None:
        return {}
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise file.error(f"its {_DTYPES} is no JSON: it was damaged; save it anew") from error
    if not isinstance(said, dict):
        raise file.error(f"its {_DTYPES} is no JSON object: it was damaged; save it anew")
    return said


def _target(file: Snapshot, entry: Entry, said: Any) -> Target:
    if said is None:
        if entry.code in _PACKED:
            return Target(entry, np.dtype(np.uint8), (entry.nbytes,))
        return Target(entry, dtypes.dtype(_NAMES[entry.code]), entry.shape)
    try:
        name, lengths = said
        dt = dtypes.dtype(str(name))
        shape = tuple(lengths)
        fits = (
            (entry.code, entry.shape) == ("U8", (entry.nbytes,))
            and len(shape) <= 64
            and all(type(n) is int and n >= 0 for n in shape)
            and byte_size(shape, dt) == entry.nbytes
            and math.prod(n for n in shape if n) < 2**59  # what NumPy can index
        )
    except (TypeError, ValueError, DriverError):
        fits = False
    if not fits:
        raise file.error(
            f"its {_DTYPES} says that tensor {entry.name!r}, {entry.code}{list(entry.shape)}, is "
            f"{str(said)[:100]}: it was damaged; save it anew"
        )
    return Target(entry, dt, shape)
