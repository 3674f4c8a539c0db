"""The float32 values of typed I/O: what is taken for some, and where they may be put."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._exchange import exchange
from rlx_driver.backends.base import Backend, FunctionalBackend
from rlx_driver.buffer import Buffer
from rlx_driver.errors import DTypeError, ShapeError, ZeroCopyError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from rlx_driver.backends.base import ArrayFacts

__all__ = ["Source", "is_everyday_source", "place_of"]

_FLOAT = np.dtype(np.float32)
_REMEDY = "src.astype('float32') (torch: src.float())"


class Source:
    """The values to write: checked, and not yet brought to where they are needed.

    Parameters
    ----------
    src
        What the user gave.

    Attributes
    ----------
    size
        The number of elements.

    Raises
    ------
    DTypeError
        An array of another dtype than float32, or something that makes no numbers.
    ZeroCopyError
        An array whose values cannot be read.
    """

    size: int

    def __init__(self, src: Any) -> None:
        self.plain: np.ndarray[Any, Any] | None = None
        if is_everyday_source(src):
            self.plain, self.size = src.reshape(-1), src.size
            return
        if isinstance(src, Buffer):
            _require_f32(src.dtype, "buffer.view('f32') where its bytes are float32")
            src = src.to_host().numpy()
        backend = registry.for_array(src)
        if backend is None:
            src, backend = _foreign_values(src), registry.get("numpy")
        facts = backend.facts(src)
        if facts.obstacle is not None and not facts.obstacle.copyable:
            if facts.obstacle.kind != "dtype":
                raise ZeroCopyError(f"src cannot be read: {facts.obstacle}. Nothing was changed")
            _require_f32(src.dtype, _REMEDY)
        _require_f32(facts.dtype, _REMEDY)
        self.backend, self.facts = backend, facts
        self.size = facts.num_elements
        self.values = src

    def taken(self, owner: Backend, count: int, dst: Buffer | None = None) -> Any:
        """Give the first values in C order, with one axis: host memory, or an array of `owner`.

        Never an alias of an array that the write scope of `dst` has to fence: it could not.
        """
        if self.plain is not None:
            return self.plain[:count]
        values, backend = self.values, self.backend
        if isinstance(backend, FunctionalBackend):
            shared = dst is not None and _overlap(self.facts, _base_of(dst)._facts)
            near = self.facts.device.is_host or self.facts.device.kind in owner.kinds
            if shared or not near:
                values = backend.copy_out(values)
            else:
                name = "numpy" if self.facts.device.is_host else owner.name
                values = exchange(values, name)
            backend = registry.get("numpy") if isinstance(values, np.ndarray) else owner
        elif not self.facts.is_row_major or self.facts.obstacle is not None:
            values = backend.duplicate(values)
        if not backend.facts(values).is_row_major:
            values = backend.duplicate(values)
        flat = backend.index(backend.reinterpret(values, _FLOAT, (self.size,)), slice(0, count))
        if backend is owner or isinstance(flat, np.ndarray):
            return flat
        return exchange(flat, "numpy") if self.facts.device.is_host else backend.copy_out(flat)


def is_everyday_source(src: Any) -> bool:
    """Tell quickly whether values are plain memory of the host in C order."""
    return type(src) is np.ndarray and src.dtype == _FLOAT and bool(src.flags.c_contiguous)


def place_of(out: Any, count: int) -> np.ndarray[Any, Any]:
    """See the array that a user gave for the result of a read as one axis of float32, checked.

    Raises
    ------
    DTypeError, ShapeError, ZeroCopyError
        As `rlx_driver.read_typed_to_f32` says.
    """
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise DTypeError(
            f"out is a {type(out).__qualname__}: pass a float32 array of NumPy (of a torch tensor "
            "of the host, tensor.numpy(); of a Buffer, a view from its write scope). Nothing was "
            "changed"
        )
    if out.dtype != _FLOAT:
        raise DTypeError(
            f"out is an array of {out.dtype}: pass one of float32. Nothing was changed"
        )
    if not out.flags.writeable:
        raise ZeroCopyError("out is read-only: pass an array that may be written")
    if not out.flags.c_contiguous:
        raise ShapeError(
            f"out is an array of shape {out.shape} and strides {out.strides}: pass one in C order, "
            "without gaps. Nothing was changed"
        )
    if out.size != count:
        raise ShapeError(
            f"out has {out.size:,} elements and {count:,} were asked for: pass an array of that "
            "many. Nothing was changed"
        )
    return np.asarray(out).reshape(-1)


def _foreign_values(src: Any) -> np.ndarray[Any, Any]:
    """Make a float32 array of numbers, or of an array of a framework without a backend."""
    if not isinstance(src, (bool, int, float, list, tuple, range)):
        if hasattr(src, "__dlpack__"):
            src = exchange(src, "numpy")
        elif not hasattr(src, "__array__"):
            try:
                src = np.asarray(memoryview(src))
            except (TypeError, ValueError):
                return _numbers(src)
        array = np.asarray(src)
        _require_f32(array.dtype, _REMEDY)
        return array
    return _numbers(src)


def _numbers(src: Any) -> np.ndarray[Any, Any]:
    """Round Python numbers to float32."""
    what = f"src is a {type(src).__qualname__}"
    try:
        plain = src if isinstance(src, (bool, int, float)) else list(src)
        array = np.asarray(plain)
        if array.dtype.kind == "O" and all(isinstance(x, (int, float)) for x in array.flat):
            array = array.astype(np.float64)  # integers of more than 64 bits
    except (TypeError, ValueError, OverflowError) as error:
        raise DTypeError(
            f"{what} that does not make numbers ({error}): pass a float32 array, a number or a "
            "sequence of numbers. Nothing was changed"
        ) from None
    if array.dtype.kind not in "biuf":
        raise DTypeError(
            f"{what} of {array.dtype}: pass a float32 array, a number or a sequence of numbers. "
            "Nothing was changed"
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _require_f32(dtype: Any, remedy: str) -> None:
    if dtype != _FLOAT:
        raise DTypeError(
            f"src is an array of {dtype}, and values are float32 here: say {remedy}. Nothing was "
            "changed"
        )


def _base_of(buffer: Any) -> Buffer:
    while buffer._parent is not None:
        buffer = buffer._parent
    found: Buffer = buffer
    return found


def _overlap(first: ArrayFacts, second: ArrayFacts) -> bool:
    """Tell whether two arrays in C order may share bytes."""
    return first.device == second.device and (
        first.address < second.address + second.byte_size
        and second.address < first.address + first.byte_size
    )
