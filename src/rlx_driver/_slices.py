"""Slices and reinterpretations of a Buffer: Buffers on the same bytes, under one discipline."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from rlx_driver import dtypes
from rlx_driver.errors import DTypeError, ShapeError, ZeroCopyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlx_driver.buffer import Buffer

__all__ = ["SlicesMixin", "byte_size", "shape_of"]


class SlicesMixin:
    """Indexing of `Buffer`, and `view`."""

    __slots__ = ()

    def __getitem__(self: Any, key: Any) -> Buffer:
        """Give a basic slice as a Buffer on the same bytes; never copies.

        Raises
        ------
        DTypeError
            For an index that would copy (arrays, lists, booleans).
        IndexError
            Out of range.
        """
        basic = tuple(_basic(part) for part in key) if isinstance(key, tuple) else _basic(key)
        self._materialise()
        return self._derived(  # type: ignore[no-any-return]
            lambda backend, view: backend.index(view, basic)
        )

    def view(self: Any, dtype: Any, shape: int | tuple[int, ...] | None = None) -> Buffer:
        """See the bytes as another dtype, and shape; a Buffer on the same bytes, never a copy.

        Parameters
        ----------
        dtype
            Any dtype of the table.
        shape
            The new shape; left out, the last axis grows or shrinks with the item size.

        Raises
        ------
        ShapeError
            When the bytes do not fit.
        ZeroCopyError
            When the Buffer is not contiguous.
        """
        dt = dtypes.info(dtype).dtype
        self._materialise()
        if not self.is_contiguous:
            raise ZeroCopyError(
                f"{self._access.label} with strides {self.strides} is not contiguous and cannot be "
                "seen as another dtype; copy it with to_host() or from_array(copy=True)"
            )
        if shape is None:
            if dt.itemsize == self.dtype.itemsize:
                new = self.shape
            else:
                last = self.shape[-1] * self.dtype.itemsize if self.shape else 0
                if not self.shape or last % dt.itemsize:
                    raise ShapeError(
                        f"the last axis of {self.dtype.name}{list(self.shape)} does not divide "
                        f"into {dt.name}; give a shape"
                    )
                new = (*self.shape[:-1], last // dt.itemsize)
        else:
            new = shape_of(shape)
        if byte_size(new, dt) != self.byte_size:
            raise ShapeError(
                f"{dt.name}{list(new)} takes {byte_size(new, dt):,} bytes and the Buffer "
                f"has {self.byte_size:,}"
            )
        return self._derived(  # type: ignore[no-any-return]
            lambda backend, view: backend.reinterpret(view, dt, new)
        )

    def __iter__(self: Any) -> Iterator[Buffer]:
        return (self[i] for i in range(len(self)))


def _basic(part: Any) -> Any:
    """Check one part of an index; integers of any kind become Python's."""
    if part is None or part is Ellipsis or isinstance(part, slice):
        return part
    boolean = isinstance(part, bool) or getattr(part, "dtype", None) == np.bool_
    if isinstance(part, SupportsIndex) and not boolean and not getattr(part, "ndim", 0):
        return part.__index__()
    raise DTypeError(
        f"a Buffer takes basic slices (integers, slices, ..., None), which never copy; got "
        f"{part!r}. Index a view for the rest, for example b.numpy()[{part!r}]"
    )


def shape_of(shape: Any) -> tuple[int, ...]:
    """Check a shape.

    Raises
    ------
    ShapeError
        When a length is negative or no integer.
    """
    # A tuple first: asking for a protocol takes microseconds.
    single = not isinstance(shape, tuple) and isinstance(shape, SupportsIndex)
    lengths = (shape,) if single else shape
    try:
        result = tuple(n.__index__() for n in lengths)
    except (AttributeError, TypeError):
        raise ShapeError(f"a shape is a tuple of integers; got {shape!r}") from None
    if any(n < 0 for n in result):
        raise ShapeError(f"lengths are not negative; got shape {result}")
    return result


def byte_size(shape: tuple[int, ...], dt: np.dtype[Any]) -> int:
    """Give the bytes of a compact array."""
    return math.prod(shape) * dt.itemsize
