"""The contract of a backend.

A backend speaks for one framework: it allocates bytes, makes typed views of them, says what an
array is, shares foreign memory, copies, and orders work. The core never asks which framework it
has; a third party adds one by subclassing `Backend` (see `rlx_driver.register_backend`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rlx_driver.backends.accounting import accounting, require_memory
from rlx_driver.backends.facts import ArrayFacts, Obstacle, row_major_strides
from rlx_driver.backends.order import Order, Recording
from rlx_driver.backends.typed import TypedIO
from rlx_driver.errors import DTypeError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from rlx_driver.device import Device, MemoryInfo

    Lane = Callable[[Any], Any]

__all__ = [
    "ALIGNMENT",
    "ArrayFacts",
    "Backend",
    "FunctionalBackend",
    "Obstacle",
    "Order",
    "Recording",
    "accounting",
    "require_memory",
    "row_major_strides",
    "split_aux",
]

ALIGNMENT = 256
"""Bytes to which every allocation is aligned: enough for JAX (64) and for CUDA (256)."""


class Backend(TypedIO, ABC):
    """One framework's side of the driver.

    The arrays it passes in and out are the framework's own. Unless a method says otherwise it
    neither copies nor blocks, and what it returns aliases what it was given.
    """

    name: ClassVar[str]
    """The framework's name, as users spell it."""
    packages: ClassVar[tuple[str, ...]]
    """Top-level packages that define its array types."""
    kinds: ClassVar[tuple[str, ...]]
    """Device kinds on which it allocates for the driver."""
    functional: ClassVar[bool] = False
    has_views: ClassVar[bool] = True
    """Whether parts of its memory can be seen without a copy."""
    plain_arguments: frozenset[type] = frozenset()
    """Types of arguments that a step may take as they are; an optimisation."""
    """Whether its arrays are immutable: it is a `FunctionalBackend`."""

    # --- what there is -----------------------------------------------------------------------

    @abstractmethod
    def devices(self, kind: str) -> list[Device]:
        """List the devices of a kind that the framework sees."""

    @abstractmethod
    def namespace(self) -> ModuleType:
        """Give the Array API namespace."""

    @abstractmethod
    def owns(self, obj: Any) -> bool:
        """Tell whether an object is an array of this framework."""

    @abstractmethod
    def facts(self, array: Any) -> ArrayFacts:
        """Describe an array; waits for nothing but what its address needs."""

    def device_of(self, array: Any) -> Device:
        """Tell where an array lives."""
        return self.facts(array).device

    @abstractmethod
    def memory(self, device: Device) -> MemoryInfo:
        """Give the memory statistics of a device, in bytes."""

    # --- bytes -------------------------------------------------------------------------------

    @abstractmethod
    def allocate(self, device: Device, nbytes: int) -> Any:
        """Allocate zero bytes as a one-dimensional uint8 array, aligned to `ALIGNMENT`.

        Raises
        ------
        OutOfDeviceMemory
            When the device has not that much.
        """

    @abstractmethod
    def view(self, memory: Any, byte_offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """Make a typed, C-contiguous view at a byte offset of allocated bytes."""

    @abstractmethod
    def copy_in(self, destination: Any, source: np.ndarray[Any, Any]) -> None:
        """Copy a host array into an array of this framework, in place; shapes and dtypes equal."""

    @abstractmethod
    def copy_out(self, array: Any) -> np.ndarray[Any, Any]:
        """Copy an array to new host memory; blocks until the bytes are there."""

    @abstractmethod
    def copy_across(self, destination: Any, source: Any) -> None:
        """Copy between two arrays of this framework, on any of its devices, in place."""

    def enqueue_copy(self, destination: Any, source: Any) -> None:
        """Copy as `copy_in` or `copy_across` do, without waiting where the framework can.

        `source`, a host array or one of the framework, stays alive until the copy is done.
        """
        if isinstance(source, np.ndarray) and not self.owns(source):
            self.copy_in(destination, source)
        else:
            self.copy_across(destination, source)

    # --- exchange ----------------------------------------------------------------------------

    @abstractmethod
    def obstacle(self, facts: ArrayFacts) -> Obstacle | None:
        """Say why this framework cannot share such an array of another one, if so."""

    @abstractmethod
    def share(self, array: Any, facts: ArrayFacts) -> Any:
        """Import an array of another framework without a copy.

        Called only where `obstacle` found nothing. The core compares the result with `facts`.
        """

    @abstractmethod
    def duplicate(self, array: Any) -> Any:
        """Copy an array of this framework into new, aligned, compact memory on its device.

        Conjugate and negative bits are resolved, gradients detached.
        """

    def memory_owner(self, array: Any) -> Any | None:
        """Give what every array over the memory of one keeps alive, so that it can be counted.

        It is asked of arrays that the driver has copied into. None: the driver cannot count them.
        """
        return None

    def lane_from(self, source: str) -> Lane | None:
        """Give the fast way in for everyday arrays of another framework, if there is one.

        A lane takes such an array and returns it, shared and verified, or None when the array is
        not of the everyday kind: the core then takes the general way, which explains itself.
        """
        return None

    def lane_to(self, target: str) -> Lane | None:
        """Give the fast way out to another framework, asked where that has no `lane_from`."""
        return None

    # --- views of driver memory --------------------------------------------------------------

    def is_concrete(self, view: Any) -> bool:
        """Tell whether a view just made has memory: not one made under a mode or a transform."""
        return True

    def may_cache(self, view: Any) -> bool:
        """Tell whether a view just made may be kept for later calls, outside of any mode."""
        return self.is_concrete(view)

    def is_pristine(self, view: Any) -> bool:
        """Tell whether a cached view is still as it was made."""
        return True

    def renewed(self, view: Any) -> Any:
        """Make a cached view anew that is no longer pristine."""
        return view

    def index(self, view: Any, key: Any) -> Any:
        """Take a basic slice of a view, as a view even where it has no axes."""
        return view[key]

    def reinterpret(self, view: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        """See the bytes of a C-contiguous view as another dtype and shape."""
        raise DTypeError(f"{self.name} cannot see memory as another dtype")

    def exporter(self, array: Any) -> Any:
        """Give an object whose ``__dlpack__`` exports an array as what it is."""
        return array

    def export(self, array: Any, **options: Any) -> Any:
        """Export an array by DLPack; `options` are those of ``__dlpack__``."""
        with self.exporting(self.device_of(array)):
            return self.exporter(array).__dlpack__(**options)

    def exporting(self, device: Device) -> AbstractContextManager[Any]:
        """Enter what exporting an array of a device needs around it."""
        return nullcontext()

    def argument(self, value: Any) -> Any:
        """Make one argument of a step safe, a leaf of a tree: JAX reads NumPy arrays late."""
        return value

    def as_array(self, result: Any) -> Any:
        """Make an array of what a step returned, where the framework gives scalars for 0-d."""
        return result

    def named_step(
        self, step: Callable[..., Any], options: dict[str, Any]
    ) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
        """Give what calls a session's step with a dict of its state and one of its inputs.

        Raises
        ------
        DTypeError
            For options that this framework has no use for.
        """
        if options:
            raise DTypeError(
                f"{self.name} takes no option {next(iter(options))!r} for a step; leave it out"
            )
        return lambda state, inputs: step(**state, **inputs)

    def writing(self) -> AbstractContextManager[Any]:
        """Enter what a step of this framework needs around it, such as no_grad."""
        return nullcontext()

    def mark_written(self, views: list[Any]) -> None:
        """Tell the framework that the memory of views changed behind its back."""

    def overlaps(self, first: Any, second: Any) -> bool:
        """Tell whether two arrays of this framework may share memory."""
        return True

    def order(self, device: Device, memory: Any) -> Order:
        """Give the ordering of native work on an array that a Buffer is made of."""
        return Order()

    def version_of(self, view: Any) -> Callable[[], int]:
        """Give what counts the writes through a view, as far as the framework knows of them."""
        return int

    def stream(self, device: Device, *, side: bool = False, order: str | None = None) -> Any:
        """Give a `CommandStream` for a device; see `rlx_driver.command_stream`."""
        from rlx_driver.stream import SyncStream

        return SyncStream()


class FunctionalBackend(Backend):
    """A backend whose arrays are immutable and whose updates donate their input.

    A *lease* is such an array over memory that the framework does not own and may nevertheless
    be donated: the result of the donated program then lies at the same address.
    """

    def lease_obstacle(self, facts: ArrayFacts) -> Obstacle | None:
        """Say why memory cannot be leased, if so: what is updated in place is in C order."""
        obstacle = self.obstacle(facts)
        if obstacle is None and not facts.is_row_major:
            return Obstacle(
                "strides",
                f"its strides {facts.strides} are not in C order, which updates in place need",
                "share the whole and transpose in the framework, or copy it (copy=None)",
            )
        return obstacle

    @abstractmethod
    def lease(self, native: Any, facts: ArrayFacts) -> Any:
        """Import native memory as an array that may be donated in place."""

    @abstractmethod
    def can_lease(self, device: Device) -> bool:
        """Tell whether donation of leased memory stays in place here (a probe, run once)."""

    functional: ClassVar[bool] = True

    is_dead: Callable[[Any], bool]
    """Tells whether an array was deleted or donated. An attribute, for it is on the hot path."""

    donated_address: Callable[[Any], int]
    """Gives the address of a result whose input was really donated; never waits."""

    wait_one: Callable[[Any], Any]
    """Blocks until one array is computed; raises the error of its computation."""

    trace_state_clean: Callable[[], bool]
    """Tells whether the calling thread is outside every trace; inside, a view is baked in."""

    @abstractmethod
    def owned(self, device: Device, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Allocate an array of zero bytes that the framework owns."""

    def put(self, memory: Any, byte_offset: int, value: np.ndarray[Any, Any]) -> Any:
        """Put host bytes in a byte array, by donation; gives the array that now holds them.

        Unless a framework does better, this goes by a copy of the whole.
        """
        host = self.copy_out(memory)
        host[byte_offset : byte_offset + value.size] = value
        return self.copy_in(memory, host)

    @abstractmethod
    def address(self, array: Any) -> int:
        """Give the address of an array, safely: waits first where asking could hang."""

    @abstractmethod
    def wait(self, arrays: Any) -> None:
        """Block until an array, or each of a list, is computed; raises the computation's error."""

    @abstractmethod
    def is_ready(self, array: Any) -> bool:
        """Tell whether an array's value is there."""

    @abstractmethod
    def fence(self, arrays: list[Any]) -> list[Any]:
        """Donate arrays to the identity.

        The results, over the same memory, are ready only after every earlier reader of the
        arrays; the arrays are dead. An array that something else still holds survives, and its
        result lies elsewhere: the caller checks with `is_dead`.
        """

    def alias(self, array: Any) -> Any:
        """Give another array object over the very same buffer, which lives and dies with it.

        The array itself where the framework has no such thing.
        """
        return array

    def is_about(self, error: BaseException, array: Any) -> bool:
        """Tell whether an error may be the framework's own for using this donated array."""
        return False

    def refuses_donation(self, error: BaseException) -> bool:
        """Tell whether a program was refused because something else holds what it would donate."""
        return False

    def shows_current_bytes(self, array: Any) -> bool:
        """Tell whether an array has kept no host copy of bytes that others may have changed."""
        return True

    @abstractmethod
    def flatten(self, tree: Any) -> tuple[list[Any], Any]:
        """Take a tree apart: its leaves and its structure."""

    @abstractmethod
    def unflatten(self, structure: Any, leaves: list[Any]) -> Any:
        """Put a tree together again."""

    @abstractmethod
    def compiled_step(
        self, step: Callable[..., Any], structure: Any, has_aux: bool, static: tuple[int, ...]
    ) -> Callable[..., Any]:
        """Give the donating, checking program for a step.

        It takes the state first: one array when `structure` is None, else a flat list; and
        returns ``(state, aux)`` of that same form.
        """


def split_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    """Take what a step returned apart: ``(state, aux)``, or the state alone and None.

    Raises
    ------
    ShapeError
        When `has_aux` is set and the result is not a pair.
    """
    if not has_aux:
        return result, None
    if not isinstance(result, tuple) or len(result) != 2:
        raise ShapeError(
            f"with has_aux=True a step returns (state, aux); this one returned a "
            f"{type(result).__qualname__}"
        )
    return result
