"""Values of float32 into any dtype and back, in host memory.

What a cast gives is what ml_dtypes and NumPy give, but for integers, which saturate (see
`write_cast`). How it is done is chosen for speed: by torch's kernels where torch is loaded and
its answers were found to agree, else by NumPy, block by block, with tables for narrow types.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._casts_numpy import BLOCK, reader, writer
from rlx_driver.errors import DriverError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from rlx_driver._casts_numpy import Kernel

__all__ = ["HOST_KERNELS_FROM", "framework_kernels", "read_cast", "write_cast"]

HOST_KERNELS_FROM = 16384
"""Elements from which a framework's kernels are worth asking for."""


_found: dict[np.dtype[Any], tuple[Kernel | None, Kernel | None]] = {}


def framework_kernels(dtype: np.dtype[Any]) -> tuple[Kernel | None, Kernel | None]:
    """Give torch's kernels (to write, to read) for a dtype, where it is loaded and they agree.

    torch is never imported for this.
    """
    found = _found.get(dtype)
    if found is not None:
        return found
    if "torch" not in sys.modules:
        return None, None
    try:
        found = registry.get("torch").host_casts(dtype)
    except DriverError:  # torch is half imported, or broken: NumPy does as well
        return None, None
    _found[dtype] = found
    return found


def write_cast(
    raw: np.ndarray[Any, Any], dtype: np.dtype[Any], source: np.ndarray[Any, Any]
) -> None:
    """Convert float32 values into bytes; they may overlap.

    Parameters
    ----------
    raw
        One-dimensional contiguous uint8 of exactly ``source.size * dtype.itemsize`` bytes, at any
        address.
    dtype
        One of `rlx_driver.dtypes.TABLE`.
    source
        One-dimensional contiguous float32.
    """
    if np.may_share_memory(raw, source):  # contiguous, so this is exact
        source = source.copy()
    if source.size >= HOST_KERNELS_FROM:
        kernel = framework_kernels(dtype)[0]
        if kernel is not None and _write(kernel, raw, dtype, source):
            return
    with np.errstate(all="ignore"):
        _write(writer(dtype, source.size), raw, dtype, source)


def read_cast(raw: np.ndarray[Any, Any], dtype: np.dtype[Any], out: np.ndarray[Any, Any]) -> None:
    """Convert bytes to float32 values; they may overlap.

    Parameters
    ----------
    raw
        One-dimensional contiguous uint8, at any address.
    dtype
        One of `rlx_driver.dtypes.TABLE`.
    out
        One-dimensional contiguous and aligned float32 of ``raw.size // dtype.itemsize`` elements.
    """
    if np.may_share_memory(raw, out):
        raw = raw.copy()
    if out.size >= HOST_KERNELS_FROM:
        kernel = framework_kernels(dtype)[1]
        if kernel is not None and _read(kernel, raw, dtype, out):
            return
    with np.errstate(all="ignore"):
        _read(reader(dtype, out.size), raw, dtype, out)


def _write(
    kernel: Kernel,
    raw: np.ndarray[Any, Any],
    dtype: np.dtype[Any],
    source: np.ndarray[Any, Any],
) -> bool:
    """Call a kernel, on aligned copies of one block after the other where it has to be.

    Returns False where the kernel cannot be used here.
    """
    if source.flags.aligned and (dtype.itemsize == 1 or raw.view(dtype).flags.aligned):
        return kernel(raw, source) is not False
    size, count = dtype.itemsize, min(source.size, BLOCK)
    values, scratch = np.empty(count, np.float32), np.empty(count, dtype).view(np.uint8)
    for start in range(0, source.size, BLOCK):
        n = min(BLOCK, source.size - start)
        values[:n] = source[start : start + n]
        if kernel(scratch[: n * size], values[:n]) is False:
            return False
        raw[start * size : (start + n) * size] = scratch[: n * size]
    return True


def _read(
    kernel: Kernel, raw: np.ndarray[Any, Any], dtype: np.dtype[Any], out: np.ndarray[Any, Any]
) -> bool:
    if dtype.itemsize == 1 or raw.view(dtype).flags.aligned:
        return kernel(raw, out) is not False
    size = dtype.itemsize
    scratch = np.empty(min(out.size, BLOCK), dtype).view(np.uint8)
    for start in range(0, out.size, BLOCK):
        n = min(BLOCK, out.size - start)
        scratch[: n * size] = raw[start * size : (start + n) * size]
        if kernel(scratch[: n * size], out[start : start + n]) is False:
            return False
    return True
