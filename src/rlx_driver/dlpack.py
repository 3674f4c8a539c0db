"""DLPack capsules of host memory: read, retype, make and consume them.

NumPy alone can neither export nor import bfloat16 and float8. `capsule_of`, `HostExporter` and
`as_numpy` do it for every dtype of `dtypes.TABLE` that has a DLPack code, sharing memory. Only
capsules are looked at here; no framework is imported.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from rlx_driver import dtypes
from rlx_driver._dlpack_abi import (
    Deleter,
    DLDeviceType,
    DLPackFlag,
    TensorInfo,
    describe,
    is_capsule,
    managed,
    take,
)
from rlx_driver.errors import DTypeError, ZeroCopyError

__all__ = [
    "HOST_DEVICE_TYPES",
    "DLDeviceType",
    "DLPackFlag",
    "HostExporter",
    "TensorInfo",
    "TensorOwner",
    "as_numpy",
    "capsule_of",
    "consume",
    "inspect",
    "retype",
]

HOST_DEVICE_TYPES: Final = frozenset(
    {DLDeviceType.CPU, DLDeviceType.CUDA_HOST, DLDeviceType.ROCM_HOST}
)
"""Device types whose memory the host reads and writes directly."""


def inspect(capsule: object) -> TensorInfo:
    """Read a capsule of either kind without consuming it.

    Copies and blocks nothing; the capsule can still be consumed by anyone.

    Parameters
    ----------
    capsule : capsule
        Named ``dltensor`` or ``dltensor_versioned``.

    Returns
    -------
    TensorInfo
        What it says, checked for consistency.

    Raises
    ------
    ZeroCopyError
        The capsule was consumed, is of an unknown major version, or is malformed.
    DTypeError
        `capsule` is no DLPack capsule.
    """
    return describe(managed(capsule))


def retype(capsule: object, dtype: Any) -> object:
    """Overwrite the element type of a capsule in place, leaving its memory as it is.

    Copies nothing. The size of an element stays, so shape and strides stay right.

    Parameters
    ----------
    capsule : capsule
        An unused one of either kind.
    dtype : object
        Anything that `rlx_driver.dtypes.dtype` takes.

    Returns
    -------
    capsule
        The same object.

    Raises
    ------
    DTypeError
        The dtype has no DLPack code, its elements are of another size, or `capsule` is none.
    ZeroCopyError
        The capsule was consumed, or is of an unknown major version.
    """
    code, bits = _code(dtypes.info(dtype))
    element = managed(capsule).dl_tensor.dtype
    if (element.bits, element.lanes) != (bits, 1):
        raise DTypeError(
            f"a capsule of {element.bits}-bit elements ({element.lanes} lanes) cannot be retyped "
            f"to {dtypes.dtype(dtype)}, which has {bits} bits"
        )
    element.code = code
    return capsule


def _code(record: dtypes.DTypeInfo) -> tuple[int, int]:
    if record.dlpack is None:
        raise DTypeError(f"{record.name} has no DLPack form to exchange: {record.note}")
    return record.dlpack


class _HostMemory:
    """Host memory kept alive by `owner`, which NumPy wraps with any strides, writable or not."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(
        self,
        owner: object,
        address: int,
        shape: tuple[int, ...],
        byte_strides: tuple[int, ...],
        typestr: str,
        *,
        read_only: bool,
    ) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "data": (address, read_only),
            "shape": shape,
            "strides": byte_strides,
            "typestr": typestr,
        }


def _carrier(record: dtypes.DTypeInfo) -> np.dtype[Any]:
    """Return the dtype of the same size that NumPy itself can exchange."""
    return record.dtype if record.numpy_exports else np.dtype(f"u{record.dtype.itemsize}")


def capsule_of(
    array: np.ndarray[Any, Any],
    *,
    stream: object = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
    device_id: int = 0,
    never_written: bool = False,
) -> object:
    """Export NumPy memory as a DLPack capsule, bfloat16 and float8 included.

    This is the ``__dlpack__`` of the Python array API standard (2024.12). Copies only when
    ``copy=True``; otherwise the capsule shares the array's memory and keeps it alive. Never blocks.

    Parameters
    ----------
    array : numpy.ndarray
        Of a dtype that has a DLPack code; any strides but negative ones.
    stream : None
        Host memory has no stream.
    max_version : tuple of int, optional
        From (1, 0) on the capsule is versioned and carries the read-only and copied flags.
    dl_device : tuple of int, optional
        The device the importer wants: host memory stays on the host.
    copy : bool, optional
        True copies (flagged in a versioned capsule); None and False share.
    device_id : int, default 0
        The CPU device that the capsule names, for shards on several CPU devices.
    never_written : bool, default False
        The importer promises not to write, by donation neither: a read-only array may then leave in
        an unversioned capsule, which has no flag to say so.

    Returns
    -------
    capsule
        Single use; freed with its hold on the memory when dropped unused.

    Raises
    ------
    ZeroCopyError
        A stream, another device, negative strides, strides that are no multiple of the item size,
        a mask, or a read-only array for an unversioned capsule.
    DTypeError
        The dtype is not in the table, or has no DLPack code, or `array` is no array.
    """
    if stream is not None:
        raise ZeroCopyError(f"stream={stream!r} was asked of host memory, which takes only None")
    if dl_device is not None and (
        dl_device[0] != DLDeviceType.CPU or dl_device[1] not in (0, device_id)
    ):
        raise ZeroCopyError(
            f"device {dl_device} was asked for, the memory is on the host "
            f"({DLDeviceType.CPU.value}, {device_id}): move it first"
        )
    if not isinstance(array, np.ndarray):
        raise DTypeError(f"expected a numpy.ndarray, got {type(array).__name__}")
    record = dtypes.info(array.dtype)
    code, _ = _code(record)
    if isinstance(array, np.ma.MaskedArray):
        raise ZeroCopyError("the array is masked, DLPack has no masks: export .data or .filled()")
    carrier = _carrier(record)
    versioned = max_version is not None and max_version[0] >= 1
    if copy:
        array = array.copy(order="K")  # absolute strides: a copy has no negative ones
    elif not array.flags.writeable and not versioned:
        if not never_written:
            raise ZeroCopyError(
                "the array is read-only, which an unversioned capsule cannot say: ask for "
                "max_version=(1, 0), or copy it"
            )
        address = array.__array_interface__["data"][0]
        shape, strides = array.shape, array.strides
        alias = _HostMemory(array, address, shape, strides, carrier.str, read_only=False)
        array = np.asarray(alias)
    if array.size and any(s < 0 and n > 1 for n, s in zip(array.shape, array.strides, strict=True)):
        raise ZeroCopyError(
            f"the array has negative strides {array.strides}, which importers reject or die of: "
            "copy it"
        )
    try:
        capsule: object = np.ndarray.__dlpack__(
            array.view(carrier), max_version=(1, 0) if versioned else None
        )
    except BufferError as error:
        raise ZeroCopyError(f"NumPy cannot export the array: {error}") from error
    found = managed(capsule)
    found.dl_tensor.dtype.code = code
    found.dl_tensor.device.device_id = device_id
    if copy and versioned:
        found.flags |= DLPackFlag.IS_COPIED.value
    for axis, stride in enumerate(array.strides):
        if stride < 0:  # of no effect along a single element, but importers look at it
            found.dl_tensor.strides[axis] *= -1
    return capsule


class HostExporter:
    """A NumPy array as a DLPack exporter of every dtype, bfloat16 and float8 included.

    ``torch.from_dlpack(HostExporter(a))`` and ``jnp.from_dlpack(HostExporter(a))`` share the memory
    of `a` (JAX: if it is aligned to 64 bytes) under its own dtype. It keeps `a` alive, copies
    nothing unless the importer asks for it, and never blocks. A read-only array is flagged as such
    in a versioned capsule, but torch ignores that flag and hands out a writable alias.

    Parameters
    ----------
    array : numpy.ndarray
        The memory to export.
    device_id : int, default 0
        The CPU device to name, for shards on several CPU devices.
    never_written : bool, default False
        The importer promises not to write; see `capsule_of`.
    """

    __slots__ = ("array", "device_id", "never_written")

    def __init__(
        self, array: np.ndarray[Any, Any], *, device_id: int = 0, never_written: bool = False
    ) -> None:
        self.array = array
        self.device_id = device_id
        self.never_written = never_written

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """Export the array; parameters, aliasing and errors are those of `capsule_of`."""
        return capsule_of(
            self.array,
            stream=stream,
            max_version=max_version,
            dl_device=dl_device,
            copy=copy,
            device_id=self.device_id,
            never_written=self.never_written,
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return (1, device_id): the CPU."""
        return (DLDeviceType.CPU.value, self.device_id)


class TensorOwner:
    """Ownership of a consumed capsule: calls its deleter, exactly once, when it is collected."""

    __slots__ = ("__weakref__", "_address", "_deleter")

    def __init__(self, address: int, deleter: int | None) -> None:
        self._address = address
        self._deleter = Deleter(deleter) if deleter else None  # null: nothing to free

    def __del__(self) -> None:
        # an attribute, not a global: those may be gone at interpreter exit
        deleter, self._deleter = self._deleter, None
        if deleter is not None:
            deleter(self._address)

    def __reduce__(self) -> Any:
        raise TypeError("memory taken from a DLPack capsule cannot be pickled or copied")


def consume(capsule: object) -> tuple[TensorInfo, TensorOwner]:
    """Take ownership of the memory of a capsule, as an importer does.

    Copies and blocks nothing. The capsule is renamed to ``used_*`` and of no use afterwards.

    Parameters
    ----------
    capsule : capsule
        An unused one of either kind.

    Returns
    -------
    info : TensorInfo
        What the capsule said.
    owner : TensorOwner
        Keeps the memory alive; the exporter's deleter runs when it is collected.

    Raises
    ------
    ZeroCopyError, DTypeError
        As for `inspect`; the capsule is then left as it was.
    """
    info = inspect(capsule)
    return info, TensorOwner(*take(capsule))


def as_numpy(source: Any, *, writable: bool | None = None) -> np.ndarray[Any, Any]:
    """Return host memory of an exporter or a capsule as a NumPy array, of every dtype.

    Never copies: the array aliases the memory, keeps its strides, and keeps it alive until the last
    array made from it is gone. Exporters wait for pending results before they export; the
    driver itself does not block.

    Parameters
    ----------
    source : object
        A DLPack capsule, which is consumed, or an object with ``__dlpack__``.
    writable : bool, optional
        None: as the capsule says, where an unversioned one, having no flag, is read-only. True: the
        caller vouches for an unversioned one. False: read-only.

    Returns
    -------
    numpy.ndarray
        bfloat16 and float8 arrive as such.

    Raises
    ------
    ZeroCopyError
        The memory is not on the host, ``writable=True`` meets the read-only flag, the exporter
        refuses or would lose torch's neg bit, or the capsule is malformed or was consumed. A
        refused capsule is left as it was.
    DTypeError
        The element type is not in the table, or `source` is no exporter.
    """
    capsule = source if is_capsule(source) else _export(source)
    info = inspect(capsule)
    _require_host(info.device_type, info.device_id)
    record = dtypes.info(dtypes.from_dlpack_code(info.code, info.bits, info.lanes))
    if writable and info.read_only:
        raise ZeroCopyError(
            "writable=True was asked for, the capsule is flagged read-only: copy it"
        )
    if writable is None:
        writable = info.version is not None and not info.read_only
    owner = TensorOwner(*take(capsule))
    if not info.size:  # there may be no address to point at
        empty = np.empty(info.shape, record.dtype)
        empty.flags.writeable = writable
        return empty
    strides = tuple(stride * record.dtype.itemsize for stride in info.element_strides)
    carrier = _carrier(record)
    memory = _HostMemory(
        owner, info.address, info.shape, strides, carrier.str, read_only=not writable
    )
    return np.asarray(memory).view(record.dtype)


def _export(exporter: Any) -> object:
    if isinstance(exporter, np.ndarray):
        exporter = HostExporter(exporter)  # NumPy's own exporter lacks the narrow dtypes
    if not (hasattr(exporter, "__dlpack__") and hasattr(exporter, "__dlpack_device__")):
        raise DTypeError(
            f"expected a DLPack capsule or an object with __dlpack__, got {type(exporter).__name__}"
        )
    _refuse_silent_loss(exporter)
    try:
        _require_host(*exporter.__dlpack_device__())
        try:
            return exporter.__dlpack__(max_version=(1, 0))
        except TypeError:  # an exporter from before DLPack 1.0
            return exporter.__dlpack__()
    except (ZeroCopyError, DTypeError):
        raise
    except Exception as error:  # exporters raise everything from BufferError to AssertionError
        raise ZeroCopyError(f"{type(exporter).__name__} cannot be exported: {error}") from error


def _refuse_silent_loss(exporter: Any) -> None:
    """Refuse what torch exports without an error and with other values."""
    if type(dtype := getattr(exporter, "dtype", None)).__name__ == "dtype":
        dtypes.info(dtype)  # torch's integers of fewer than 8 bits leave as 8-bit integers
    is_neg = getattr(exporter, "is_neg", None)
    if is_neg is not None and is_neg():
        raise ZeroCopyError("the tensor has its neg bit set, which an export drops: resolve_neg()")


def _require_host(device_type: int, device_id: int) -> None:
    if device_type not in HOST_DEVICE_TYPES:
        raise ZeroCopyError(
            f"the memory is on DLPack device ({int(device_type)}, {device_id}), which the host "
            "cannot address: copy it to the host first"
        )
