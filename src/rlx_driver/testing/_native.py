"""The native framework of a fake device: mutable arrays and a current stream, in torch's place."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np

from rlx_driver.backends.base import ArrayFacts, Backend, Obstacle, Order, accounting
from rlx_driver.backends.stream_order import StreamOrder
from rlx_driver.testing._arrays import FunctionalArray
from rlx_driver.testing._streams import StreamsMixin

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from rlx_driver.device import Device, MemoryInfo
    from rlx_driver.testing._machine import Machine

__all__ = ["FakeArray", "FakeBackend", "new_array"]

Values = np.ndarray[Any, Any]


class _Version:
    """Counts writes through any of the arrays of one memory."""

    def __init__(self) -> None:
        self.count = 0


class FakeArray:
    """A mutable array on a fake device; its bytes are out of the host's reach.

    What is done to it is enqueued on the current stream of its device, and is done when that
    stream comes to it. `read` is the one way to see values: it waits.
    """

    __module__ = "fake"  # as if by a package of that name: so the driver tells whose an array is

    def __init__(
        self,
        machine: Machine,
        device: Device,
        address: int,
        values: Values,
        owner: object,
        version: _Version | None = None,
    ) -> None:
        self._machine = machine
        self._values = values  # what work in progress holds, and not the owner
        self._owner = owner
        self._version = version or _Version()
        self.device = device
        self.address = address
        self.shape: tuple[int, ...] = values.shape
        self.strides: tuple[int, ...] = values.strides
        self.dtype: np.dtype[Any] = values.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(self._values.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return int(self._values.nbytes)

    # --- views

    def _part(self, values: Values) -> FakeArray:
        moved = values.__array_interface__["data"][0] - self._values.__array_interface__["data"][0]
        return FakeArray(
            self._machine, self.device, self.address + moved, values, self._owner, self._version
        )

    def __getitem__(self, key: Any) -> FakeArray:
        values = self._values[key]
        if not isinstance(values, np.ndarray):  # an array without axes, and no number
            values = self._values[(*key, ...) if isinstance(key, tuple) else (key, ...)]
        return self._part(values)

    @property
    def T(self) -> FakeArray:  # noqa: N802 - the name that every framework has
        """The same memory with its axes reversed."""
        return self._part(self._values.T)

    def reshape(self, shape: tuple[int, ...]) -> FakeArray:
        """See the elements in another shape, without a copy."""
        values = self._values.reshape(shape)
        if values.size and not np.may_share_memory(values, self._values):
            raise ValueError(f"{self._values.shape} cannot be seen as {shape} without a copy")
        return self._part(values)

    def reinterpret(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> FakeArray:
        """See the bytes as another dtype and shape."""
        return self._part(self._values.reshape(-1).view(dtype).reshape(shape))

    # --- work

    def _enqueue(self, label: str, function: Callable[[], object]) -> None:
        self._machine.enqueue(self.device, label, function)

    def _changed(self, label: str, operation: Callable[..., Any], other: Any) -> FakeArray:
        values, operand = self._values, _operand(other, self)
        self._version.count += 1
        self._enqueue(label, lambda: operation(values, operand, out=values, casting="unsafe"))
        return self

    def _made(self, label: str, operation: Callable[..., Any], *operands: Any) -> FakeArray:
        taken = [_operand(operand, self) for operand in operands]
        shape = np.broadcast_shapes(self.shape, *(operand.shape for operand in taken))
        result = new_array(self._machine, self.device, shape, self.dtype)
        source, target = self._values, result._values
        self._enqueue(label, lambda: np.copyto(target, operation(source, *taken), casting="unsafe"))
        return result

    def fill_(self, value: Any) -> FakeArray:
        """Set every element to a number."""
        return self.copy_(np.array(value, self.dtype), label="fill_")

    def add_(self, other: Any) -> FakeArray:
        """Add a number or an array in place."""
        return self._changed("add_", np.add, other)

    def mul_(self, other: Any) -> FakeArray:
        """Multiply by a number or an array in place."""
        return self._changed("mul_", np.multiply, other)

    def copy_(self, source: Any, *, label: str = "copy_") -> FakeArray:
        """Set the elements to those of an array, of this device, another one, or the host.

        Host memory is read when the stream comes to it, as with pinned memory on CUDA.
        """
        target = self._values
        here = self._machine.scheduler.current(self.device)
        there = here
        if isinstance(source, FakeArray):
            there = self._machine.scheduler.current(source.device)
            source = source._values
        np.broadcast_to(source, self.shape)
        self._version.count += 1
        if there is not here:
            here.wait_mark(there.mark(f"what {label} reads"))
        self._enqueue(label, lambda: np.copyto(target, source, casting="unsafe"))
        if there is not here:
            there.wait_mark(here.mark(label))
        return self

    def clone(self) -> FakeArray:
        """Copy to new memory of the device."""
        return self._made("clone", np.copy)

    def sum(self) -> FakeArray:
        """Add the elements up, to an array without axes."""
        result = new_array(self._machine, self.device, (), self.dtype)
        source, target = self._values, result._values
        self._enqueue("sum", lambda: np.copyto(target, source.sum(), casting="unsafe"))
        return result

    def __add__(self, other: Any) -> FakeArray:
        return self._made("add", np.add, other)

    def __mul__(self, other: Any) -> FakeArray:
        return self._made("mul", np.multiply, other)

    def __setitem__(self, key: Any, value: Any) -> None:
        part = self[key]
        if isinstance(value, FakeArray):
            part.copy_(value)
        else:
            part.fill_(value)

    # --- the host

    def read(self) -> Values:
        """Copy the values to the host: waits for the current stream.

        Raises
        ------
        HangError
            When that is held.
        """
        source, host = self._values, np.empty(self.shape, self.dtype)
        self._enqueue("read", lambda: np.copyto(host, source))
        self._machine.scheduler.current(self.device).synchronize()
        return host

    def item(self) -> Any:
        """Give the value of an array of one element; waits as `read` does."""
        return self.read().item()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise BufferError(
            f"the bytes of {self!r} are on {self.device}, out of the host's reach: read() copies "
            "them to the host"
        )

    __array__ = __dlpack__ = __dlpack_device__ = __iter__ = __bool__ = _refuse

    def __repr__(self) -> str:
        return f"<FakeArray {self.dtype.name}{list(self.shape)} on {self.device}>"


def _operand(other: Any, array: FakeArray) -> Any:
    """Give what an operation takes, checked before it is enqueued."""
    if isinstance(other, FakeArray):
        if other.device != array.device:
            raise ValueError(f"{other!r} and {array!r} are on two devices: copy one first (copy_)")
        return other._values
    return np.array(other, array.dtype)


def new_array(
    machine: Machine,
    device: Device,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    by_driver: bool = False,
) -> FakeArray:
    """Make an array with anything in it, for work on the current stream."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    stream = machine.scheduler.current(device)
    allocation, memory = machine.spaces[device].allocate(nbytes, stream, by_driver=by_driver)
    values = np.ndarray(shape, dtype, buffer=memory) if nbytes else np.empty(shape, dtype)
    return FakeArray(machine, device, allocation.address, values, allocation)


class FakeBackend(StreamsMixin, Backend):
    """The backend of `FakeArray`, in the role that torch has on CUDA."""

    name: ClassVar[str] = "fake"
    packages: ClassVar[tuple[str, ...]] = ("fake",)
    kinds: ClassVar[tuple[str, ...]] = ()  # FakeDevice says which

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._namespace = types.ModuleType("fake", "The arrays of a fake device.")
        self._namespace.from_dlpack = FakeArray._refuse  # type: ignore[attr-defined]

    def devices(self, kind: str) -> list[Device]:
        """List the fake devices."""
        return [device for device in self._machine.devices if device.kind == kind]

    def namespace(self) -> ModuleType:
        """Give a namespace with nothing in it that makes arrays."""
        return self._namespace

    def owns(self, obj: Any) -> bool:
        """Tell whether an object is an array of this framework."""
        return isinstance(obj, FakeArray)

    def facts(self, array: FakeArray) -> ArrayFacts:
        """Describe an array."""
        address = array.address if array.size else 0
        return ArrayFacts(address, array.shape, array.strides, array.dtype, array.device)

    def memory(self, device: Device) -> MemoryInfo:
        """Give the statistics of a device."""
        return self._machine.spaces[device].info()

    def allocate(self, device: Device, nbytes: int) -> FakeArray:
        """Allocate bytes, which work on the current stream sets to zero."""
        self._machine.failures.check("allocate")
        memory = new_array(self._machine, device, (nbytes,), np.uint8, by_driver=True)
        accounting.add(device, nbytes, self.memory_owner(memory))
        return memory.fill_(0)

    def view(
        self, memory: FakeArray, byte_offset: int, shape: tuple[int, ...], dtype: Any
    ) -> FakeArray:
        """Make a typed view at a byte offset."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return memory[byte_offset : byte_offset + nbytes].reinterpret(dtype, shape)

    def copy_in(self, destination: FakeArray, source: Values) -> None:
        """Copy a host array in, on the current stream, and wait for it."""
        self._machine.failures.check("copy_in")
        destination.copy_(source, label="copy_in")
        self._machine.scheduler.current(destination.device).synchronize()

    def copy_out(self, array: FakeArray) -> Values:
        """Copy an array to the host, on the current stream, and wait for it."""
        self._machine.failures.check("copy_out")
        return array.read()

    def copy_across(self, destination: FakeArray, source: FakeArray) -> None:
        """Copy between two arrays, on the current streams of their devices."""
        self._machine.failures.check("copy_across")
        destination.copy_(source)

    def enqueue_copy(self, destination: FakeArray, source: Any) -> None:
        """Copy without waiting: the source, on the host or a device, is kept and read late."""
        is_host = isinstance(source, np.ndarray)
        self._machine.failures.check("copy_in" if is_host else "copy_across")
        destination.copy_(source, label="copy_in" if is_host else "copy_")
        current = self._machine.scheduler.current(destination.device)
        self.keep_alive(current.record_event(), source)

    def obstacle(self, facts: ArrayFacts) -> Obstacle | None:
        """Nothing but memory of these devices can be shared."""
        return self._machine.obstacle(facts)

    def share(self, array: Any, facts: ArrayFacts) -> FakeArray:
        """Import memory of the functional framework: the current stream comes after its value."""
        self._machine.failures.check("share")
        if not isinstance(array, FunctionalArray):
            raise BufferError(f"a {type(array).__qualname__} is on no fake device")
        memory = array.memory
        self._machine.scheduler.current(array.device).wait_mark(array.definition.mark)
        return FakeArray(self._machine, array.device, memory.address, memory.values, memory.alias())

    def duplicate(self, array: FakeArray) -> FakeArray:
        """Copy to new compact memory, on the current stream."""
        return array.clone()

    def memory_owner(self, array: FakeArray) -> object:
        """Give what all arrays of one allocation hold."""
        return array._owner

    def reinterpret(
        self, view: FakeArray, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> FakeArray:
        """See the bytes as another dtype and shape."""
        return view.reinterpret(dtype, shape)

    def mark_written(self, views: list[FakeArray]) -> None:
        """Raise the counts of writes."""
        for view in views:
            view._version.count += 1

    def version_of(self, view: FakeArray) -> Callable[[], int]:
        """Give what counts the writes through any array of the memory."""
        return functools.partial(getattr, view._version, "count")

    def overlaps(self, first: FakeArray, second: FakeArray) -> bool:
        """Tell whether two arrays may share memory."""
        return bool(np.may_share_memory(first._values, second._values))

    def order(self, device: Device, memory: FakeArray) -> Order:
        """Order by streams: this is what the fake is for."""
        return StreamOrder(self.streams(device), memory)
