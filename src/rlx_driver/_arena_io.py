"""What goes into an arena and comes out of it by a copy, as it is or by value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from rlx_driver import dtypes
from rlx_driver._arena_values import as_value, on_host
from rlx_driver._slices import byte_size, shape_of
from rlx_driver.errors import DTypeError, ShapeError, UnboundNameError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from rlx_driver._arena_debug import Inspector
    from rlx_driver._arena_memory import Memory
    from rlx_driver._arena_owned import OwnedBytes
    from rlx_driver.buffer import Buffer
    from rlx_driver.plan import MemoryPlan

__all__ = ["InOutMixin"]

_Result = TypeVar("_Result", bound=np.ndarray[Any, Any])


class InOutMixin:
    """The copies of `Arena`; each is a method call, none is hidden."""

    if TYPE_CHECKING:
        _inspector: Inspector | None
        _label: str
        _plan: MemoryPlan

        def _open(self) -> Memory | OwnedBytes: ...

        def _look(self) -> None: ...

        def buffer(
            self, node: Hashable, dtype: Any = None, shape: int | tuple[int, ...] | None = None
        ) -> Buffer: ...

    def write(self, node: Hashable, x: Any, *, cast: bool = False) -> None:
        """Copy an array of any framework and device into a node's slot.

        Parameters
        ----------
        node
            Of the plan.
        x
            An array or a Buffer of the slot's shape and dtype. A slot of which the plan says no
            dtype takes any array that is not longer than it, from its start.
        cast
            Convert from another dtype, as NumPy's ``astype`` does.

        Notes
        -----
        Copies: always. Blocks: for the copy, and for readers of JAX arrays of the slot.

        Raises
        ------
        ShapeError, DTypeError
            `x` does not fit. Nothing was changed.
        UnboundNameError, ClosedHandleError, StaleViewError
            As for `buffer`.
        """
        memory = self._open()
        if self._inspector is not None:
            self._inspector.visit(node)
        value, dt, shape = as_value(x)
        if self._is_typed(node):
            wanted, lengths = self._spec(node, None, None)
            if shape != lengths:
                raise ShapeError(
                    f"an array of shape {shape} does not fit {node!r} of {self._label}, of shape "
                    f"{lengths}. Nothing was changed"
                )
            if dt != wanted and not cast:
                raise DTypeError(
                    f"an array of {dt.name} does not fit {node!r} of {self._label}, of "
                    f"{wanted.name}: say cast=True to convert it. Nothing was changed"
                )
        else:
            wanted, lengths = self._spec(node, dt, shape)
        offset = self._plan.offset(node)
        if memory.sees(offset, wanted, lengths):
            # Bytes take arrays of many lengths, and a Buffer is not to be kept for each.
            typed = self._is_typed(node)
            slot = self.buffer(node) if typed else memory.slot(offset, wanted, lengths)
            slot.copy_from(value, cast)
        else:
            memory.put(offset, on_host(value).astype(wanted, copy=False))
        self._look()

    def __setitem__(self, node: Hashable, x: Any) -> None:
        number = (bool, int, float, complex)
        if isinstance(x, np.generic) and self._is_typed(node):
            x = x.item()
        if not isinstance(x, number):
            self.write(node, x)
            return
        memory = self._open()
        dt, lengths = self._spec(node, None, None)
        if memory.sees(self._plan.offset(node), dt, lengths):
            self.buffer(node)[...] = x
            self._look()
            return
        values = np.empty(lengths, dt)
        try:
            values[...] = x
        except (OverflowError, TypeError, ValueError) as error:
            raise DTypeError(
                f"{x!r} does not fit {node!r} of {self._label}, of {dt.name}: {error}. Nothing was "
                "changed"
            ) from error
        self.write(node, values)

    def read(
        self, node: Hashable, dtype: Any = None, shape: int | tuple[int, ...] | None = None
    ) -> np.ndarray[Any, Any]:
        """Copy a node's slot to a new NumPy array; parameters and errors are those of `buffer`.

        Copies: always. Blocks: until the bytes are there. Aliases: nothing.
        """
        memory = self._open()
        if self._inspector is not None:
            self._inspector.visit(node)
        dt, lengths = self._spec(node, dtype, shape)
        result = memory.read(self._plan.offset(node), dt, lengths)
        self._look()
        return result

    # --- by value ----------------------------------------------------------------------------

    def write_input_f32(self, node: Hashable, dtype: Any, data: Any) -> int:
        """Convert float32 values into a node's slot; what is too long is cut off, as RLX does.

        Parameters
        ----------
        node
            Of the plan.
        dtype
            What the elements of the slot become; any dtype.
        data
            float32 values, as `rlx_driver.write_typed_from_f32` takes them: an array of any
            framework, device and shape in C order, or Python numbers.

        Returns
        -------
        int
            How many elements were written: at most as many as the slot holds.

        Raises
        ------
        DTypeError
            `data` is of another dtype, or there is no such `dtype`. Nothing was changed.
        ZeroCopyError
            `data` cannot be read (requires_grad, traced), or inside `no_copies`.
        UnboundNameError, ClosedHandleError, StaleViewError
            As for `buffer`.

        Notes
        -----
        Copies: always. Blocks: until `data` may be changed.

        See Also
        --------
        rlx_driver.write_typed_from_f32 : which values become which.
        """
        memory = self._open()
        if self._inspector is not None:
            self._inspector.visit(node)
        dt = dtypes.info(dtype).dtype
        size = self._size(node)
        count = memory.write_f32(self._plan.offset(node), size, dt, data)
        self._look()
        return count

    @overload
    def read_output_f32(
        self, node: Hashable, dtype: Any, n_elements: int, out: None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]: ...

    @overload
    def read_output_f32(
        self, node: Hashable, dtype: Any, n_elements: int, out: _Result
    ) -> _Result: ...

    def read_output_f32(self, node: Hashable, dtype: Any, n_elements: int, out: Any = None) -> Any:
        """Convert the first elements of a node's slot to a float32 array on the host.

        Parameters
        ----------
        node
            Of the plan.
        dtype
            What the elements of the slot are; any dtype.
        n_elements
            How many to read.
        out
            A float32 array of NumPy to fill, as `rlx_driver.read_typed_to_f32` takes it; None
            makes a new one.

        Returns
        -------
        numpy.ndarray
            `out` itself, or the new array, of shape ``(n_elements,)``.

        Raises
        ------
        ShapeError
            The slot does not hold that many; `out` has gaps, or another number of elements.
        DTypeError, UnboundNameError, ClosedHandleError, StaleViewError
            As for `buffer`; `out` is not of float32.
        ZeroCopyError
            `out` is read-only, or inside `no_copies`.

        Notes
        -----
        Copies: always. Blocks: until the values are there. In case of an error `out` was not
        changed.
        """
        memory = self._open()
        if self._inspector is not None:
            self._inspector.visit(node)
        dt = dtypes.info(dtype).dtype
        (count,) = shape_of((n_elements,))
        size = self._size(node)
        if count > (room := size // dt.itemsize):
            raise ShapeError(
                f"{count:,} elements of {dt.name} were asked of {node!r} of {self._label}, which "
                f"holds {room:,}"
            )
        result = memory.read_f32(self._plan.offset(node), size, dt, count, out)
        self._look()
        return result

    # --- inside ------------------------------------------------------------------------------

    def _size(self, node: Hashable) -> int:
        if node not in self._plan:
            raise UnboundNameError(
                f"{node!r} has no slot in {self._label}; has_buffer tells, and the plan says which "
                "nodes have one"
            )
        return self._plan.interval(node).size

    def _is_typed(self, node: Hashable) -> bool:
        self._size(node)
        interval = self._plan.interval(node)
        return interval.dtype is not None

    def _spec(
        self, node: Hashable, dtype: Any, shape: Any
    ) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Give how a slot is seen, and check that it fits."""
        size = self._size(node)
        interval = self._plan.interval(node)
        known = interval.dtype if dtype is None else dtype
        dt = np.dtype(np.uint8) if known is None else dtypes.info(known).dtype
        if shape is not None:
            lengths = shape_of(shape)
        elif interval.shape is not None and _agrees(interval.dtype, dt):
            lengths = shape_of(interval.shape)
        else:
            lengths = (size // dt.itemsize,)
        if byte_size(lengths, dt) > size:
            raise ShapeError(
                f"{dt.name}{list(lengths)} takes {byte_size(lengths, dt):,} bytes and the slot of "
                f"{node!r} in {self._label} has {size:,}. Nothing was changed"
            )
        return dt, lengths


def _agrees(said: Any, dt: np.dtype[Any]) -> bool:
    """Tell whether the shape that a plan says is one of this dtype."""
    return said is None or dtypes.info(said).dtype == dt
