"""The binary interface of DLPack 1.x: its C structs, constants and capsule calls.

A struct is read into a `TensorInfo`. The layouts and codes are those of ``dlpack.h``, the capsule
names and the single-use rule those of DLPack's "Python Specification". Unversioned and versioned
tensors are laid out differently.
"""

from __future__ import annotations

import ctypes
import datetime
import enum
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rlx_driver import dtypes
from rlx_driver.errors import DTypeError, ZeroCopyError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "MAJOR_VERSION",
    "MAX_NDIM",
    "DLDeviceType",
    "DLManagedTensor",
    "DLManagedTensorVersioned",
    "DLPackFlag",
    "DLTensor",
    "Deleter",
    "TensorInfo",
    "describe",
    "is_capsule",
    "managed",
    "take",
]

MAJOR_VERSION: Final = 1
"""The one major version of the versioned struct whose layout is known."""

MAX_NDIM: Final = 64
"""Dimensions that NumPy and torch can take."""


class DLDeviceType(enum.IntEnum):
    """DLPack's device types (``DLDeviceType`` of ``dlpack.h``)."""

    CPU = 1
    CUDA = 2
    CUDA_HOST = 3
    OPENCL = 4
    VULKAN = 7
    METAL = 8
    VPI = 9
    ROCM = 10
    ROCM_HOST = 11
    EXT_DEV = 12
    CUDA_MANAGED = 13
    ONEAPI = 14
    WEBGPU = 15
    HEXAGON = 16
    MAIA = 17
    TRN = 18


class DLPackFlag(enum.IntFlag):
    """Flags of a versioned DLPack tensor (since DLPack 1.0; the padding flag since 1.1)."""

    READ_ONLY = 1
    IS_COPIED = 2
    IS_SUBBYTE_TYPE_PADDED = 4


# plain integers: arithmetic with an enum member takes microseconds
_READ_ONLY, _IS_COPIED, _IS_PADDED = (flag.value for flag in DLPackFlag)


class _DLPackVersion(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint32), ("minor", ctypes.c_uint32))


class _DLDevice(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class DLTensor(ctypes.Structure):
    """Memory with a device, a dtype, a shape and strides in elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensor(ctypes.Structure):
    """The unversioned struct, which a capsule named ``dltensor`` holds."""

    _fields_ = (
        ("dl_tensor", DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class DLManagedTensorVersioned(ctypes.Structure):
    """The versioned struct, which a capsule named ``dltensor_versioned`` holds."""

    _fields_ = (
        ("version", _DLPackVersion),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    )


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a capsule says about its memory: plain numbers, no hold on the memory.

    Attributes
    ----------
    data : int
        Base address (0 if null); on some devices an opaque handle.
    byte_offset : int
        Bytes from `data` to the first element.
    shape : tuple of int
        Extents in elements.
    strides : tuple of int or None
        Strides in elements; None stands for C-contiguous.
    code, bits, lanes : int
        DLPack's element type.
    device_type, device_id : int
        DLPack's device.
    version : tuple of int or None
        (major, minor); None for an unversioned capsule, which has no flags.
    read_only, is_copied, is_subbyte_padded : bool
        The flags.
    """

    data: int
    byte_offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    code: int
    bits: int
    lanes: int
    device_type: int
    device_id: int
    version: tuple[int, int] | None
    read_only: bool
    is_copied: bool
    is_subbyte_padded: bool

    @property
    def address(self) -> int:
        """Address of the first element."""
        return self.data + self.byte_offset

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """NumPy dtype of the elements, None when the table has no such type."""
        try:
            return dtypes.from_dlpack_code(self.code, self.bits, self.lanes)
        except DTypeError:
            return None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take when they lie without gaps."""
        bits = -(-self.bits // 8) * 8 if self.is_subbyte_padded else self.bits
        return -(-self.size * self.lanes * bits // 8)

    @property
    def element_strides(self) -> tuple[int, ...]:
        """Strides in elements, those of C order where the capsule gives none."""
        if self.strides is not None:
            return self.strides
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        expected = 1
        for extent, stride in zip(
            reversed(self.shape), reversed(self.element_strides), strict=True
        ):
            if extent > 1 and stride != expected:
                return self.size == 0
            expected *= extent
        return True

    def __str__(self) -> str:
        dtype = self.dtype
        element = f"(code {self.code}, {self.bits} bits)" if dtype is None else dtype.name
        try:
            device = DLDeviceType(self.device_type).name.lower()
        except ValueError:
            device = f"device type {self.device_type} "
        marks = ["unversioned" if self.version is None else "DLPack {}.{}".format(*self.version)]
        marks += ["strides " + str(self.strides)] if not self.is_contiguous else []
        marks += [f"{self.lanes} lanes"] if self.lanes != 1 else []
        marks += ["read-only"] if self.read_only else []
        marks += ["copied"] if self.is_copied else []
        marks += ["padded"] if self.is_subbyte_padded else []
        extents = ", ".join(map(str, self.shape))
        where = f"{device}:{self.device_id} at {self.address:#x}"
        return f"{element}[{extents}] on {where} ({', '.join(marks)})"


# CFUNCTYPE drops the GIL for the call: a deleter may wait for a thread that needs it
Deleter: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# Prototypes of our own: argtypes set on ctypes.pythonapi would be shared with every other library
_object, _name, _api = ctypes.py_object, ctypes.c_char_p, ctypes.pythonapi
_get_name = ctypes.PYFUNCTYPE(_name, _object)(("PyCapsule_GetName", _api))
_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, _object, _name)(("PyCapsule_SetName", _api))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, _object, _name)(("PyCapsule_GetPointer", _api))
_inc_ref = ctypes.PYFUNCTYPE(None, _object)(("Py_IncRef", _api))

_CapsuleType: Final = type(datetime.datetime_CAPI)  # types.CapsuleType is of Python 3.13

# name -> (struct, name once consumed)
_KINDS: Final[dict[bytes | None, tuple[type[Any], bytes]]] = {
    b"dltensor": (DLManagedTensor, b"used_dltensor"),
    b"dltensor_versioned": (DLManagedTensorVersioned, b"used_dltensor_versioned"),
}
_USED: Final = tuple(used for _, used in _KINDS.values())
for _used in _USED:
    _inc_ref(_used)  # a renamed capsule points at these bytes and may outlive this module

_TAKING = threading.RLock()  # reentrant: a collection inside `take` may run code that takes too


def is_capsule(x: object) -> bool:
    """Tell whether `x` is a capsule, of whatever name."""
    return type(x) is _CapsuleType


def _open(capsule: object) -> tuple[Any, bytes]:
    """Return the struct of an unused capsule and the name that marks the capsule as consumed."""
    if not is_capsule(capsule):
        raise DTypeError(f"expected a DLPack capsule, got {type(capsule).__name__}")
    name: bytes | None = _get_name(capsule)
    kind = _KINDS.get(name)
    if kind is None:
        if name in _USED:
            raise ZeroCopyError(
                f"the capsule was consumed before (it is named {name!r}): a capsule is single use, "
                "call __dlpack__() again for a new one"
            )
        raise DTypeError(f"expected a DLPack capsule, got a capsule named {name!r}")
    struct, used = kind
    found = struct.from_address(_get_pointer(capsule, name))
    # beyond the version the layout of another major version is unknown
    if struct is DLManagedTensorVersioned and found.version.major != MAJOR_VERSION:
        raise ZeroCopyError(
            f"the capsule is of DLPack {found.version.major}.{found.version.minor}, known is "
            f"major version {MAJOR_VERSION}: ask the exporter for max_version=(1, 0)"
        )
    return found, used


def managed(capsule: object) -> Any:
    """Return the struct that an unused capsule holds; it lives no longer than the capsule.

    Returns
    -------
    DLManagedTensor or DLManagedTensorVersioned
        An alias of the capsule's memory, not a copy.

    Raises
    ------
    ZeroCopyError
        The capsule was consumed, or its major version is unknown.
    DTypeError
        `capsule` is no DLPack capsule.
    """
    return _open(capsule)[0]


def describe(found: Any) -> TensorInfo:
    """Read a struct that `managed` returned; `ZeroCopyError` when it contradicts itself."""
    tensor = found.dl_tensor
    ndim, element, device = tensor.ndim, tensor.dtype, tensor.device
    if not 0 <= ndim <= MAX_NDIM:
        raise _malformed(f"it has {ndim} dimensions, possible are 0 to {MAX_NDIM}")
    if ndim and not tensor.shape:
        raise _malformed(f"it has {ndim} dimensions and a null shape")
    shape = tuple(tensor.shape[:ndim]) if ndim else ()
    if ndim and min(shape) < 0:
        raise _malformed(f"its shape {shape} has a negative extent")
    bits, lanes, data = element.bits, element.lanes, tensor.data or 0
    if not bits or not lanes:
        raise _malformed(f"its elements have {bits} bits and {lanes} lanes")
    strides = (tuple(tensor.strides[:ndim]) if ndim else ()) if tensor.strides else None
    span = math.prod([extent or 1 for extent in shape])
    for extent, stride in zip(shape, strides or (), strict=False):
        span += (extent or 1) * abs(stride)
    if span * bits * lanes >= 1 << 63 or data + tensor.byte_offset >= 1 << 64:
        raise _malformed(
            f"shape {shape}, strides {strides} and offset {tensor.byte_offset} exceed the address "
            "space"
        )
    if not data and 0 not in shape:
        raise _malformed(f"its data pointer is null and its shape is {shape}")
    flags, version = 0, None
    if isinstance(found, DLManagedTensorVersioned):
        flags, version = found.flags, (found.version.major, found.version.minor)
    return TensorInfo(
        data=data,
        byte_offset=tensor.byte_offset,
        shape=shape,
        strides=strides,
        code=element.code,
        bits=bits,
        lanes=lanes,
        device_type=device.device_type,
        device_id=device.device_id,
        version=version,
        read_only=bool(flags & _READ_ONLY),
        is_copied=bool(flags & _IS_COPIED),
        is_subbyte_padded=bool(flags & _IS_PADDED),
    )


def _malformed(why: str) -> ZeroCopyError:
    return ZeroCopyError(f"the DLPack capsule is malformed: {why}; this is a bug of its exporter")


def take(capsule: object) -> tuple[int, int | None]:
    """Mark a capsule as consumed; return the addresses of its struct and of its deleter.

    The caller must call the deleter, once. Of several threads that take one capsule, one succeeds.
    Errors are those of `managed` and leave the capsule as it was.
    """
    with _TAKING:
        found, used = _open(capsule)
        _set_name(capsule, used)
        return ctypes.addressof(found), found.deleter
