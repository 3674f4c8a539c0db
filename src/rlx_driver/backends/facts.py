"""What an array is, in the driver's terms, and what keeps it from being shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from rlx_driver.device import Device

__all__ = ["ArrayFacts", "Obstacle", "row_major_strides"]


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A reason why memory cannot be shared, and what to do about it.

    Attributes
    ----------
    kind
        One word: alignment, strides, dtype, x64, read-only, requires_grad, conj, neg, device,
        trace, protocol.
    text
        What was found.
    remedy
        What the caller can do.
    copyable
        Whether a copy gets round it. A change of value never does.
    """

    kind: str
    text: str
    remedy: str
    copyable: bool = True

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class ArrayFacts:
    """What an array is, in the driver's terms.

    Attributes
    ----------
    address
        Of element zero, in bytes; 0 when the array is empty.
    shape
        Lengths of the axes.
    strides
        Bytes from one element to the next along each axis.
    dtype
        The NumPy (or ml_dtypes) dtype.
    device
        Where it lives.
    read_only
        Whether it is flagged as not to be written.
    immutable
        Whether its framework has no writes at all, as JAX. Sharing it is safe as long as nobody
        writes through the other side.
    obstacle
        Why its framework cannot hand it out as it is, if so.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    device: Device
    read_only: bool = False
    immutable: bool = False
    obstacle: Obstacle | None = None

    @property
    def num_elements(self) -> int:
        """The number of elements."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def byte_size(self) -> int:
        """Bytes of the elements, gaps between them left out."""
        return self.num_elements * self.dtype.itemsize

    @property
    def overlaps_itself(self) -> bool:
        """Whether two elements may share a byte, as in a broadcast array."""
        if 0 in self.shape:
            return False
        reach = self.dtype.itemsize
        for stride, n in sorted(
            (abs(s), n) for s, n in zip(self.strides, self.shape, strict=True) if n > 1
        ):
            if stride < reach:
                return True
            reach += stride * (n - 1)
        return False

    @property
    def is_row_major(self) -> bool:
        """Whether the elements lie in C order without a gap."""
        return is_row_major(self.shape, self.strides, self.dtype.itemsize)


def row_major_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Give the byte strides of a C-contiguous array."""
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def is_row_major(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Tell whether an array is C-contiguous; axes of length one and empty arrays always fit."""
    if 0 in shape:
        return True
    step = itemsize
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True
