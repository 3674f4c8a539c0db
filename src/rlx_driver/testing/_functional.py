"""The backend of the functional framework, in the role that JAX has on CUDA."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rlx_driver import _pytree
from rlx_driver.backends.base import (
    ArrayFacts,
    FunctionalBackend,
    Obstacle,
    row_major_strides,
    split_aux,
)
from rlx_driver.errors import DTypeError, ShapeError
from rlx_driver.testing._arrays import Definition, FunctionalArray, Memory
from rlx_driver.testing._machine import FUNCTIONAL
from rlx_driver.testing._native import FakeArray

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from rlx_driver.device import Device, MemoryInfo
    from rlx_driver.testing._machine import Machine
    from rlx_driver.testing._programs import Runtime

__all__ = ["FakeFunctionalBackend"]

Values = np.ndarray[Any, Any]


class FakeFunctionalBackend(FunctionalBackend):
    """The backend of `FunctionalArray`: programs, donation in place, and leases."""

    name: ClassVar[str] = FUNCTIONAL
    packages: ClassVar[tuple[str, ...]] = (FUNCTIONAL,)
    kinds: ClassVar[tuple[str, ...]] = ()

    def __init__(self, machine: Machine, runtime: Runtime) -> None:
        self._machine = machine
        self._runtime = runtime
        self._namespace = types.ModuleType(FUNCTIONAL, "The functional arrays of a fake device.")
        self._namespace.from_dlpack = FunctionalArray._refuse  # type: ignore[attr-defined]
        self.plain_arguments = frozenset({bool, int, float, complex, type(None), FunctionalArray})
        self.is_dead = FunctionalArray.is_deleted
        self.wait_one = FunctionalArray.block_until_ready
        self.donated_address = self.address
        self.trace_state_clean = lambda: not runtime.is_inside

    # --- what there is

    def devices(self, kind: str) -> list[Device]:
        """List the fake devices."""
        return [device for device in self._machine.devices if device.kind == kind]

    def namespace(self) -> ModuleType:
        """Give a namespace with nothing in it that makes arrays."""
        return self._namespace

    def owns(self, obj: Any) -> bool:
        """Tell whether an object is an array of this framework."""
        return isinstance(obj, FunctionalArray)

    def facts(self, array: FunctionalArray) -> ArrayFacts:
        """Describe an array; never waits."""
        obstacle = None
        if array.is_deleted():
            remedy = "use the result it was donated to"
            obstacle = Obstacle("trace", "it was deleted or donated", remedy, copyable=False)
        strides = row_major_strides(array.shape, array.dtype.itemsize)
        address = self.address(array) if array.size and obstacle is None else 0
        return ArrayFacts(
            address,
            array.shape,
            strides,
            array.dtype,
            array.device,
            immutable=True,
            obstacle=obstacle,
        )

    def memory(self, device: Device) -> MemoryInfo:
        """Give the statistics of a device."""
        return self._machine.spaces[device].info()

    # --- bytes

    def allocate(self, device: Device, nbytes: int) -> FunctionalArray:
        """Allocate zero bytes."""
        return self.owned(device, (nbytes,), np.dtype(np.uint8))

    def owned(
        self, device: Device, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> FunctionalArray:
        """Allocate an array of zero bytes, which a program sets."""
        self._machine.failures.check("allocate")

        def zeros(_: list[Values]) -> list[Values]:
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            return [np.zeros(nbytes, np.uint8).view(dtype).reshape(shape)]

        shapes = [(shape, dtype)]
        launch = self._runtime.launch
        return launch("zeros", zeros, [], shapes, [None], device=device, by_driver=True)[0]

    def view(
        self, memory: FunctionalArray, byte_offset: int, shape: tuple[int, ...], dtype: Any
    ) -> FunctionalArray:
        """Read a typed array out of bytes; there are no views, so this copies."""
        dtype = np.dtype(dtype)
        end = byte_offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

        def read(values: list[Values]) -> list[Values]:
            return [values[0][byte_offset:end].view(dtype).reshape(shape)]

        return self._runtime.launch("view", read, [memory], [(shape, dtype)], [None])[0]

    def copy_in(self, destination: FunctionalArray, source: Values) -> FunctionalArray:  # type: ignore[override]
        """Put a host array in the memory of an array; gives the one that now holds it."""
        self._machine.failures.check("copy_in")
        value = np.array(source)
        return self._replaced("copy_in", destination, [], lambda _: [value])

    def copy_out(self, array: FunctionalArray) -> Values:
        """Copy an array to the host; waits for its value alone."""
        self._machine.failures.check("copy_out")
        return array.fetch().wait()

    def copy_across(  # type: ignore[override]
        self, destination: FunctionalArray, source: FunctionalArray
    ) -> FunctionalArray:
        """Put an array in the memory of another; gives the one that now holds it."""
        self._machine.failures.check("copy_across")
        if source.device != destination.device:
            return self.copy_in(destination, source.fetch().wait())
        return self._replaced("copy_across", destination, [source], list)

    def _replaced(
        self,
        label: str,
        destination: FunctionalArray,
        sources: list[FunctionalArray],
        function: Callable[[list[Values]], list[Values]],
    ) -> FunctionalArray:
        shapes = [(destination.shape, destination.dtype)]
        place = destination.device
        launch = self._runtime.launch
        return launch(label, function, sources, shapes, [destination], device=place)[0]

    def duplicate(self, array: FunctionalArray) -> FunctionalArray:
        """Copy an array to new memory."""
        shapes = [(array.shape, array.dtype)]
        return self._runtime.launch("duplicate", list, [array], shapes, [None])[0]

    # --- exchange

    def obstacle(self, facts: ArrayFacts) -> Obstacle | None:
        """Nothing but memory of these devices can be shared, and only in C order."""
        obstacle = self._machine.obstacle(facts)
        if obstacle is None and not facts.is_row_major:
            text = f"its strides {facts.strides} are not in C order"
            return Obstacle("strides", text, "copy it (copy=None)")
        return obstacle

    def share(self, array: Any, facts: ArrayFacts) -> FunctionalArray:
        """Import native memory; donating it gives a result elsewhere."""
        self._machine.failures.check("share")
        return self._imported(array, can_be_donated=False)

    def lease(self, native: Any, facts: ArrayFacts) -> FunctionalArray:
        """Import native memory to be updated in place by donation."""
        self._machine.failures.check("lease")
        return self._imported(native, can_be_donated=True)

    def can_lease(self, device: Device) -> bool:
        """Tell that donation stays in place."""
        return True

    def _imported(self, native: Any, can_be_donated: bool) -> FunctionalArray:
        if not isinstance(native, FakeArray):
            raise BufferError(f"a {type(native).__qualname__} is on no fake device")
        definition = Definition()
        # The import asks the exporter's current stream, as that of DLPack does.
        current = self._machine.scheduler.current(native.device)
        definition.mark = current.mark("an import by the functional framework")
        memory = Memory(native.address, native._values, native, can_be_donated)
        return FunctionalArray(self._runtime, native.device, memory, definition)

    # --- order

    def address(self, array: FunctionalArray) -> int:
        """Give the address; never waits."""
        return array.memory.address

    def wait(self, arrays: Any) -> None:
        """Wait for an array, or each of a list."""
        for array in arrays if isinstance(arrays, list) else [arrays]:
            array.block_until_ready()

    def is_ready(self, array: FunctionalArray) -> bool:
        """Tell whether a value is there."""
        return array.is_ready()

    def fence(self, arrays: list[FunctionalArray]) -> list[FunctionalArray]:
        """Donate arrays to the identity, one by one."""
        return [
            self._runtime.launch("fence", list, [array], [(array.shape, array.dtype)], [array])[0]
            for array in arrays
        ]

    def shows_current_bytes(self, array: FunctionalArray) -> bool:
        """Tell whether an array has not kept the host copy of an earlier `read`."""
        return array._host_copy is None

    # --- updates

    def flatten(self, tree: Any) -> tuple[list[Any], Any]:
        """Take a tree apart."""
        return _pytree.flatten(tree)

    def unflatten(self, structure: Any, leaves: list[Any]) -> Any:
        """Put a tree together again."""
        return _pytree.unflatten(structure, leaves)

    def argument(self, value: Any) -> Any:
        """Copy a NumPy array: a program reads it when it runs."""
        return np.array(value) if isinstance(value, np.ndarray) else value

    def stream(self, device: Device, *, side: bool = False, order: str | None = None) -> Any:
        """Give a command stream, which is the native framework's."""
        return device.backend.stream(device, side=side, order=order)

    def compiled_step(
        self, step: Callable[..., Any], structure: Any, has_aux: bool, static: tuple[int, ...]
    ) -> Callable[..., Any]:
        """Give the donating, checking program of a step on NumPy arrays."""

        def checked(state: list[Values], *args: Any, **kwargs: Any) -> Any:
            tree = state[0] if structure is None else _pytree.unflatten(structure, state)
            new, aux = split_aux(step(tree, *args, **kwargs), has_aux)
            leaves, found = _pytree.flatten(new)
            if found != (("leaf",) if structure is None else structure):
                raise ShapeError(
                    f"a step returns its state with the structure it came in; this one returned "
                    f"{found}. To return more, pass has_aux=True. Nothing was changed"
                )
            return [_checked(*pair) for pair in zip(state, leaves, strict=True)], aux

        checked.__name__ = getattr(step, "__name__", "step")

        def program(state: Any, *args: Any, **kwargs: Any) -> Any:
            leaves = [state] if structure is None else list(state)
            new, aux = self._runtime.call(checked, (leaves, *args), kwargs, leaves)
            return new[0] if structure is None else new, aux

        return program


def _checked(old: Values, value: Any) -> Values:
    new: Values = np.asarray(value)
    if new.shape != old.shape:
        raise ShapeError(
            f"the step returned shape {new.shape} for a buffer of shape {old.shape}. Nothing was "
            "changed"
        )
    if new.dtype != old.dtype:
        raise DTypeError(
            f"the step returned {new.dtype} for a buffer of {old.dtype}: convert the result with "
            f".astype({str(old.dtype)!r}). Nothing was changed"
        )
    return new
