"""NumPy: the memory of the host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import array_api_compat.numpy
import numpy as np

from rlx_driver import dlpack
from rlx_driver._casts import read_cast, write_cast
from rlx_driver.backends._numpy_pointer import pointer
from rlx_driver.backends.base import (
    ALIGNMENT,
    ArrayFacts,
    Backend,
    Obstacle,
    accounting,
    require_memory,
)
from rlx_driver.device import Device, MemoryInfo
from rlx_driver.dtypes import info
from rlx_driver.errors import DTypeError, OutOfDeviceMemory

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["NumpyBackend", "array_at"]

_CPU = Device("cpu")


class NumpyBackend(Backend):
    """Host memory as NumPy arrays; everything is synchronous."""

    name: ClassVar[str] = "numpy"
    packages: ClassVar[tuple[str, ...]] = ("numpy",)
    kinds: ClassVar[tuple[str, ...]] = ("cpu",)

    def devices(self, kind: str) -> list[Device]:
        """List the host, once."""
        return [_CPU] if kind == "cpu" else []

    def namespace(self) -> ModuleType:
        """Give array-api-compat's NumPy."""
        return array_api_compat.numpy

    def owns(self, obj: Any) -> bool:
        """Tell whether an object is an ndarray; NumPy scalars are values, not memory."""
        return isinstance(obj, np.ndarray)

    def device_of(self, array: Any) -> Device:
        """Tell where an array lives: the host."""
        return _CPU

    def facts(self, array: np.ndarray[Any, Any]) -> ArrayFacts:
        """Describe an array."""
        obstacle = None
        dtype = array.dtype
        try:
            info(dtype)
        except DTypeError as error:
            obstacle = Obstacle("dtype", str(error), "convert it with astype first", False)
        if isinstance(array, np.ma.MaskedArray):
            remedy = "share its .data, or .filled() values"
            obstacle = Obstacle(
                "protocol", "it is masked, and no exchange has masks", remedy, False
            )
        return ArrayFacts(
            pointer(array) if array.size else 0,
            array.shape,
            array.strides,
            dtype,
            _CPU,
            read_only=not array.flags.writeable,
            obstacle=obstacle,
        )

    def memory(self, device: Device) -> MemoryInfo:
        """Give the memory of the host; free is what the system can still hand out."""
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        return MemoryInfo(total, _available(total), accounting.in_use(_CPU))

    def allocate(self, device: Device, nbytes: int) -> np.ndarray[Any, Any]:
        """Allocate zero bytes; large ones take memory only as they are touched."""
        require_memory(nbytes, self.memory(device), device)
        try:
            raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
        except MemoryError as error:
            raise OutOfDeviceMemory(
                f"{nbytes:,} bytes were asked for on {device}: {error}"
            ) from error
        accounting.add(_CPU, nbytes, raw)
        start = -pointer(raw) % ALIGNMENT
        return raw[start : start + nbytes]

    def view(
        self, memory: np.ndarray[Any, Any], byte_offset: int, shape: tuple[int, ...], dtype: Any
    ) -> np.ndarray[Any, Any]:
        """Make a typed view at a byte offset."""
        return np.ndarray(shape, dtype, buffer=memory, offset=byte_offset)

    def copy_in(self, destination: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> None:
        """Copy into an array in place; overlapping memory is handled."""
        np.copyto(destination, source, casting="no")

    def copy_out(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Copy an array into new aligned memory."""
        return self.duplicate(array)

    def copy_across(self, destination: np.ndarray[Any, Any], source: Any) -> None:
        """Copy between two arrays."""
        self.copy_in(destination, source)

    def write_f32(
        self, destination: np.ndarray[Any, Any], dtype: np.dtype[Any], source: Any
    ) -> None:
        """Convert values straight into the memory."""
        write_cast(destination, dtype, source.reshape(-1))

    def read_f32(
        self,
        source: np.ndarray[Any, Any],
        dtype: np.dtype[Any],
        out: np.ndarray[Any, Any] | None = None,
    ) -> np.ndarray[Any, Any]:
        """Convert straight out of the memory."""
        if out is None:
            out = np.empty(source.size // dtype.itemsize, np.float32)
        read_cast(source, dtype, out)
        return out

    def is_plain_bytes(self, array: Any) -> bool:
        """Tell quickly that an array is one run of bytes that may be written."""
        return (
            type(array) is np.ndarray
            and array.dtype == np.uint8
            and array.ndim == 1
            and bool(array.flags.carray)
        )

    def obstacle(self, facts: ArrayFacts) -> Obstacle | None:
        """NumPy takes any strides, alignment and dtype of the table, on the host."""
        if not facts.device.is_host:
            return Obstacle(
                "device",
                f"it lives on {facts.device} and NumPy sees host memory only",
                "copy it to the host on purpose (copy=None or True, or Buffer.to_host)",
            )
        return None

    def share(self, array: Any, facts: ArrayFacts) -> np.ndarray[Any, Any]:
        """Import host memory of any framework, every dtype of the table included."""
        return dlpack.as_numpy(array, writable=not (facts.read_only or facts.immutable))

    def duplicate(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Copy an array into new aligned, C-ordered memory."""
        raw = np.empty(array.nbytes + ALIGNMENT, np.uint8)
        start = -pointer(raw) % ALIGNMENT
        fresh = np.ndarray(array.shape, array.dtype, buffer=raw, offset=start)
        np.copyto(fresh, array, casting="no")
        return fresh

    def memory_owner(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Give the first array over the memory; NumPy's views refer to that one."""
        while isinstance(array.base, np.ndarray):
            array = array.base
        return array

    def exporter(self, array: np.ndarray[Any, Any]) -> dlpack.HostExporter:
        """Wrap an array so that narrow floats go out as what they are."""
        return dlpack.HostExporter(array)

    def index(self, view: np.ndarray[Any, Any], key: Any) -> np.ndarray[Any, Any]:
        """Take a basic slice, as an array without axes where NumPy would give a scalar."""
        found = view[key]
        if isinstance(found, np.ndarray):
            return found
        return view[(*key, ...) if isinstance(key, tuple) else (key, ...)]

    def as_array(self, result: Any) -> Any:
        """Make an array of a NumPy scalar, which arithmetic on arrays without axes gives."""
        return np.asarray(result) if isinstance(result, np.generic) else result

    def reinterpret(
        self, view: np.ndarray[Any, Any], dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> np.ndarray[Any, Any]:
        """See the bytes as another dtype and shape."""
        return view.reshape(-1).view(dtype).reshape(shape)

    def overlaps(self, first: Any, second: Any) -> bool:
        """Tell whether two arrays may share memory."""
        return np.may_share_memory(first, second)


class _At:
    """Memory at an address, for ``np.asarray``; keeps its owner alive."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


def array_at(
    address: int, shape: tuple[int, ...], dtype: np.dtype[Any], owner: object
) -> np.ndarray[Any, Any]:
    """Make a writable array over host memory at an address; it keeps `owner` alive."""
    nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    raw = np.asarray(_At(address, nbytes, owner))
    return raw.view(dtype).reshape(shape) if nbytes else np.empty(shape, dtype)


def _available(total: int) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux: the page count below is all there is
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return total
