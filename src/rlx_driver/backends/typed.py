"""The part of a backend's contract that has to do with typed I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._casts import read_cast, write_cast

if TYPE_CHECKING:
    from rlx_driver._casts_numpy import Kernel

__all__ = ["TypedIO"]


class TypedIO:
    """float32 values into bytes and back; right for every backend, by way of the host."""

    if TYPE_CHECKING:

        def copy_in(self, destination: Any, source: np.ndarray[Any, Any]) -> None:
            """See `Backend`."""

        def copy_out(self, array: Any) -> np.ndarray[Any, Any]:
            """See `Backend`."""

    def write_f32(self, destination: Any, dtype: np.dtype[Any], source: Any) -> None:
        """Convert float32 values to a dtype and write the bytes.

        Parameters
        ----------
        destination
            An array of this framework: one axis of uint8, contiguous, with exactly
            ``source.size * dtype.itemsize`` bytes at any address.
        dtype
            One of `rlx_driver.dtypes.TABLE`.
        source
            A C-contiguous float32 array of the host, or of this framework; it may overlap.

        Notes
        -----
        What becomes of the values is said by `rlx_driver.write_typed_from_f32`. Blocks until
        `source` may be changed.
        """
        values = source if isinstance(source, np.ndarray) else self.copy_out(source)
        raw = np.empty(values.size * dtype.itemsize, np.uint8)
        write_cast(raw, dtype, values.reshape(-1))
        self.copy_in(destination, raw)

    def read_f32(
        self, source: Any, dtype: np.dtype[Any], out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Convert bytes of a dtype to a float32 array of the host.

        Parameters
        ----------
        source
            An array of this framework: one axis of uint8, contiguous, a whole number of elements.
        dtype
            One of `rlx_driver.dtypes.TABLE`.
        out
            Where to: one axis of float32, contiguous, aligned and writable, with exactly as many
            elements; it may overlap. None makes a new array.

        Returns
        -------
        numpy.ndarray
            `out`, or the new array.

        Notes
        -----
        Blocks until the values are there.
        """
        raw = self.copy_out(source)
        if out is None:
            out = np.empty(raw.size // dtype.itemsize, np.float32)
        read_cast(raw, dtype, out)
        return out

    def is_plain_bytes(self, array: Any) -> bool:
        """Tell quickly that an array is one run of bytes that may be written.

        False where that takes longer to find out: the caller then looks at its facts.
        """
        return False

    def host_casts(self, dtype: np.dtype[Any]) -> tuple[Kernel | None, Kernel | None]:
        """Give kernels of this framework (float32 to a dtype, and back) for memory of the host.

        None where it has none, or where what it gives is not what ml_dtypes gives. A kernel that
        cannot be used at the moment returns False, nothing done.
        """
        return None, None
