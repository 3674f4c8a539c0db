"""One dtype language for NumPy, PyTorch, JAX and DLPack: NumPy dtype objects.

`TABLE` holds one `DTypeInfo` record per dtype. The narrow floats and integers are those of
`ml_dtypes`; the ones that the installed `ml_dtypes` lacks are left out.

Nothing here allocates or copies array memory, and nothing blocks. torch and JAX are imported only
by `torch_dtype` and `jax_dtype`.
"""

from __future__ import annotations

import difflib
import importlib
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from rlx_driver.errors import DTypeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "TABLE",
    "DTypeInfo",
    "dtype",
    "from_dlpack_code",
    "info",
    "jax_dtype",
    "torch_dtype",
]


@dataclass(frozen=True, slots=True)
class DTypeInfo:
    """What one dtype is called, and what can be done with it.

    Attributes
    ----------
    dtype : numpy.dtype
        The dtype itself, in native byte order.
    name : str
        Canonical name, for instance ``"bfloat16"``.
    short : str or None
        RLX's short name, for instance ``"bf16"``.
    dlpack : tuple of int or None
        DLPack (code, bits); None where no form is read the same way by every framework.
    torch : str or None
        Attribute name in ``torch``; None where torch has no counterpart.
    jax : str or None
        Attribute name in ``jax.numpy``; None where JAX has no counterpart.
    numpy_exports : bool
        Whether NumPy itself can export the dtype by DLPack.
    note : str
        What can and what cannot be done with it, in a sentence or two.
    """

    dtype: np.dtype[Any]
    name: str
    short: str | None
    dlpack: tuple[int, int] | None
    torch: str | None
    jax: str | None
    numpy_exports: bool
    note: str


_EVERYWHERE = "Shared by NumPy, torch and JAX."
_WIDE = "Shared by NumPy, torch and JAX; JAX would narrow it while x64 is off, which is refused."
_UNSIGNED = "Shared by NumPy, torch and JAX; torch implements few operations on it."
_UNSIGNED_WIDE = (
    "Shared by NumPy, torch and JAX; torch implements few operations on it, and JAX would narrow "
    "it while x64 is off, which is refused."
)
_RETYPED = (
    "NumPy cannot export or import it by DLPack; the driver exports its bits under the right code, "
    "and torch and JAX share it."
)
_NO_TORCH = (
    "NumPy cannot export or import it by DLPack; the driver exports its bits under the right code. "
    "torch has no such dtype and rejects the code."
)
_E8M0 = _RETYPED + " It has no zero and no sign: a zero byte means 2**-127."
_SUBBYTE = (
    "One element a byte in NumPy and JAX storage; no DLPack form of it is read the same way by "
    "every framework, so it is not exchanged."
)
_INT4 = (
    _SUBBYTE + " torch's own int4 and uint4 arrive elsewhere as 8-bit integers with no error, so "
    "the driver refuses them."
)
_SUBBYTE_INT = (
    _SUBBYTE + " torch's dtype of that name is a placeholder without operations, so the driver "
    "refuses it."
)
_FLOAT4 = (
    _SUBBYTE + " torch packs two elements a byte (float4_e2m1fn_x2), which is another layout, so "
    "the driver refuses it."
)
_FLOAT6 = _SUBBYTE + " torch has no such dtype."

# name, short, DLPack (code, bits), torch, jax, note
_STANDARD: Final = (
    ("bool", "bool", (6, 8), "bool", "bool_", _EVERYWHERE),
    ("int8", "i8", (0, 8), "int8", "int8", _EVERYWHERE),
    ("int16", "i16", (0, 16), "int16", "int16", _EVERYWHERE),
    ("int32", "i32", (0, 32), "int32", "int32", _EVERYWHERE),
    ("int64", "i64", (0, 64), "int64", "int64", _WIDE),
    ("uint8", "u8", (1, 8), "uint8", "uint8", _EVERYWHERE),
    ("uint16", "u16", (1, 16), "uint16", "uint16", _UNSIGNED),
    ("uint32", "u32", (1, 32), "uint32", "uint32", _UNSIGNED),
    ("uint64", "u64", (1, 64), "uint64", "uint64", _UNSIGNED_WIDE),
    ("float16", "f16", (2, 16), "float16", "float16", _EVERYWHERE),
    ("float32", "f32", (2, 32), "float32", "float32", _EVERYWHERE),
    ("float64", "f64", (2, 64), "float64", "float64", _WIDE),
    ("complex64", "c64", (5, 64), "complex64", "complex64", _EVERYWHERE),
    ("complex128", "c128", (5, 128), "complex128", "complex128", _WIDE),
)

# The same for ml_dtypes; jax.numpy uses its names. Codes: DLDataTypeCode of dlpack.h (DLPack 1.1).
_NARROW: Final = (
    ("bfloat16", "bf16", (4, 16), "bfloat16", _RETYPED),
    ("float8_e3m4", "f8_e3m4", (7, 8), None, _NO_TORCH),
    ("float8_e4m3", "f8_e4m3", (8, 8), None, _NO_TORCH),
    ("float8_e4m3b11fnuz", "f8_e4m3b11fnuz", (9, 8), None, _NO_TORCH),
    ("float8_e4m3fn", "f8_e4m3fn", (10, 8), "float8_e4m3fn", _RETYPED),
    ("float8_e4m3fnuz", "f8_e4m3fnuz", (11, 8), "float8_e4m3fnuz", _RETYPED),
    ("float8_e5m2", "f8_e5m2", (12, 8), "float8_e5m2", _RETYPED),
    ("float8_e5m2fnuz", "f8_e5m2fnuz", (13, 8), "float8_e5m2fnuz", _RETYPED),
    ("float8_e8m0fnu", "f8_e8m0fnu", (14, 8), "float8_e8m0fnu", _E8M0),
    ("float6_e2m3fn", "f6_e2m3fn", None, None, _FLOAT6),
    ("float6_e3m2fn", "f6_e3m2fn", None, None, _FLOAT6),
    ("float4_e2m1fn", "f4_e2m1fn", None, None, _FLOAT4),
    # no short names: RLX's "i4" would be NumPy's four bytes
    ("int4", None, None, None, _INT4),
    ("uint4", None, None, None, _INT4),
    ("int2", None, None, None, _SUBBYTE_INT),
    ("uint2", None, None, None, _SUBBYTE_INT),
    ("int1", None, None, None, _SUBBYTE_INT),
    ("uint1", None, None, None, _SUBBYTE_INT),
)


def _records() -> Iterator[DTypeInfo]:
    for name, short, dlpack, torch, jax, note in _STANDARD:
        yield DTypeInfo(np.dtype(name), name, short, dlpack, torch, jax, True, note)
    for name, short_, dlpack_, torch_, note in _NARROW:
        scalar = getattr(ml_dtypes, name, None)
        if scalar is not None:
            yield DTypeInfo(np.dtype(scalar), name, short_, dlpack_, torch_, name, False, note)


TABLE: Final[Mapping[np.dtype[Any], DTypeInfo]] = MappingProxyType(
    {record.dtype: record for record in _records()}
)
"""Every dtype the driver knows, keyed by its NumPy dtype; read-only."""

_BY_NAME: Final = {
    name: record
    for record in TABLE.values()
    for name in (record.name, record.short)
    if name is not None
}
_BY_CODE: Final = {record.dlpack: record for record in TABLE.values() if record.dlpack is not None}
_BY_TORCH: Final = {record.torch: record for record in TABLE.values() if record.torch is not None}

# NumPy counts bytes ("i8" is int64) where RLX counts bits: without a byte order that is ambiguous
_BYTE_COUNT_CODE = re.compile(r"[a-zA-Z]\d+")


def dtype(x: Any) -> np.dtype[Any]:
    """Return the NumPy dtype that `x` means.

    Parameters
    ----------
    x : object
        A `numpy.dtype`; a NumPy, ml_dtypes or Python scalar type; a canonical or short name; a
        torch dtype; a JAX scalar type such as ``jnp.bfloat16``. Names count bits: ``"i8"`` is
        int8. NumPy's byte-count codes need their byte order (``"<i8"``).

    Returns
    -------
    numpy.dtype
        A dtype of `TABLE`, in native byte order.

    Raises
    ------
    DTypeError
        `x` is no dtype, or one that is not in the table.
    """
    return info(x).dtype


def info(x: Any) -> DTypeInfo:
    """Return the record of the dtype that `x` means.

    Parameters
    ----------
    x : object
        Anything that `dtype` takes.

    Returns
    -------
    DTypeInfo
        The record; frozen, and the same object for every call.

    Raises
    ------
    DTypeError
        `x` is no dtype, or one that is not in the table: structured, object, text, date, longer
        than 64 bits, or in foreign byte order.
    """
    record = TABLE.get(x) if isinstance(x, np.dtype) else _lookup(x)
    if record is None:
        raise _refusal(x)
    return record


def _lookup(x: Any) -> DTypeInfo | None:
    if isinstance(x, str):
        named = _BY_NAME.get(x)
        if named is not None:
            return named
        if _BYTE_COUNT_CODE.fullmatch(x):
            raise _unknown(x, f"names count bits here, NumPy's codes count bytes: say '<{x}'")
    elif type(x).__name__ == "dtype" and str(x).startswith("torch."):  # str of an array is slow
        return _BY_TORCH.get(str(x)[6:])
    elif x is None:
        raise _unknown(x, "NumPy would read it as float64")
    elif not isinstance(x, type) and hasattr(x, "shape"):
        raise DTypeError(f"expected a dtype, got an array ({type(x).__name__}): pass its .dtype")
    try:
        resolved = np.dtype(x)
    except Exception as error:  # NumPy raises whatever the object's own attributes raise
        raise _unknown(x, str(error)) from error
    record = TABLE.get(resolved)
    if record is None:
        raise _refusal(resolved)
    return record


def _refusal(x: Any) -> DTypeError:
    """Say why a dtype that exists is not in the table."""
    if not isinstance(x, np.dtype):
        named = _BY_NAME.get(str(x)[6:])
        why = named.note if named else "NumPy has no dtype of the same values and layout"
    elif not x.isnative:
        why = "its byte order is foreign; convert with x.astype(x.dtype.newbyteorder('='))"
    elif x.names is not None or x.subdtype is not None:
        why = "structured and subarray dtypes have no counterpart in torch, JAX or DLPack"
    elif x.kind == "O":
        why = "object arrays hold references, not values"
    elif x.kind in "SUT":
        why = "text has no counterpart in torch, JAX or DLPack"
    elif x.kind in "mM":
        why = "dates have no counterpart in torch, JAX or DLPack; view them as int64"
    else:
        why = "torch, JAX and DLPack have no counterpart"
    return DTypeError(f"dtype {x} is not supported: {why}")


def _unknown(x: object, why: str) -> DTypeError:
    near = difflib.get_close_matches(x.lower(), _BY_NAME, n=1) if isinstance(x, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    known = ", ".join(record.name for record in TABLE.values())
    return DTypeError(f"{x!r} is not a known dtype ({why}).{hint} Known: {known}")


def from_dlpack_code(code: int, bits: int, lanes: int = 1) -> np.dtype[Any]:
    """Return the dtype of a DLPack type.

    Parameters
    ----------
    code, bits, lanes : int
        The fields of ``DLDataType``; bits are those of one lane.

    Returns
    -------
    numpy.dtype
        A dtype of `TABLE`.

    Raises
    ------
    DTypeError
        A vector type (more than one lane), or a type that the table does not hold.
    """
    if lanes != 1:
        raise DTypeError(
            f"DLPack type (code {code}, {bits} bits) has {lanes} lanes, supported is 1"
        )
    record = _BY_CODE.get((code, bits))
    if record is None:
        why = _SUBBYTE if bits < 8 else "no dtype of the table has that code"
        raise DTypeError(f"DLPack type (code {code}, {bits} bits) is not supported: {why}")
    return record.dtype


def torch_dtype(dt: Any) -> Any:
    """Return torch's own dtype object, importing torch.

    Parameters
    ----------
    dt : object
        Anything that `dtype` takes.

    Returns
    -------
    torch.dtype
        For instance ``torch.bfloat16``.

    Raises
    ------
    DTypeError
        torch is not installed, or has no counterpart.
    """
    record = info(dt)
    return _attribute("torch", record.torch, record)


def jax_dtype(dt: Any) -> Any:
    """Return JAX's own scalar type, importing JAX.

    Parameters
    ----------
    dt : object
        Anything that `dtype` takes.

    Returns
    -------
    type
        For instance ``jax.numpy.bfloat16``; 64-bit types too, whether x64 is on or not.

    Raises
    ------
    DTypeError
        JAX is not installed, or has no counterpart.
    """
    record = info(dt)
    return _attribute("jax.numpy", record.jax, record)


def _attribute(module: str, attribute: str | None, record: DTypeInfo) -> Any:
    framework = module.partition(".")[0]
    if attribute is None:
        raise DTypeError(f"{framework} has no counterpart of {record.name}: {record.note}")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise DTypeError(
            f"{framework}'s {attribute} was asked for, and {framework} cannot be imported "
            f"({error}): install rlx-driver[{framework}]"
        ) from error
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        version = getattr(found, "__version__", "of this version")
        raise DTypeError(f"{module} {version} has no {attribute}: update {framework}") from error
