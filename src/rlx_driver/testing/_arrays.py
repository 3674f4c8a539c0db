"""The arrays of the functional framework, in the place of JAX's: immutable, and often pending."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver.testing._machine import COPIES

if TYPE_CHECKING:
    from rlx_driver.device import Device
    from rlx_driver.testing._programs import Runtime
    from rlx_driver.testing._stream import Mark

__all__ = ["Definition", "FunctionalArray", "Memory"]

Values = np.ndarray[Any, Any]


class Memory:
    """The memory of functional arrays, passed on by donation.

    Parameters
    ----------
    address, values
        Where, and the bytes as their type.
    owner
        What keeps them from being freed.
    can_be_donated
        Whether a result may take the place of the value.
    """

    def __init__(self, address: int, values: Values, owner: object, can_be_donated: bool) -> None:
        self.address = address
        self.values = values
        self.owner = owner
        self.can_be_donated = can_be_donated
        self.readers: list[Mark] = []  # fetches, which the compute stream knows nothing of
        self._aliases: weakref.WeakSet[Alias] = weakref.WeakSet()

    @property
    def has_alias(self) -> bool:
        """Whether another framework holds the memory, so that it cannot be donated."""
        return bool(self._aliases)

    def alias(self) -> Alias:
        """Give what another framework is to hold as long as it uses the memory."""
        alias = Alias(self)
        self._aliases.add(alias)
        return alias


class Alias:
    """A reference to functional memory from outside of its framework."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory


class Definition:
    """When the value of an array is there, and the error of its program."""

    def __init__(self) -> None:
        self.mark: Mark
        self.error: Exception | None = None


class FunctionalArray:
    """An immutable array on a fake device, whose value may be pending."""

    __module__ = "fake_functional"  # as if by a package of that name

    def __init__(
        self, runtime: Runtime, device: Device, memory: Memory, definition: Definition
    ) -> None:
        self._runtime = runtime
        self._held: Memory | None = memory
        self._definition = definition
        self._host_copy: Values | None = None
        self.device = device
        self.shape: tuple[int, ...] = memory.values.shape
        self.dtype: np.dtype[Any] = memory.values.dtype
        self.size = int(memory.values.size)
        self.nbytes = int(memory.values.nbytes)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def memory(self) -> Memory:
        """Where the value is, or will be.

        Raises
        ------
        RuntimeError
            When the array was donated or deleted.
        """
        if self._held is None:
            raise RuntimeError(f"this array was donated or deleted: {self!r}")
        return self._held

    @property
    def definition(self) -> Definition:
        """When the value is there; raises as `memory`."""
        _ = self.memory
        return self._definition

    def delete(self) -> None:
        """Give the value up."""
        self._held = None

    def is_deleted(self) -> bool:
        """Tell whether the array was donated or deleted."""
        return self._held is None

    def is_ready(self) -> bool:
        """Tell whether the value is there, or its program has failed."""
        return self.definition.mark.is_passed

    def block_until_ready(self) -> FunctionalArray:
        """Wait for the value; raises the error of its program.

        Raises
        ------
        HangError
            When the program is held.
        """
        mark = self.definition.mark
        mark.stream.scheduler.finish(mark)
        if self._definition.error is not None:
            raise self._definition.error
        return self

    def fetch(self) -> Fetch:
        """Begin to copy the value to the host, on a stream that waits for the value alone."""
        return Fetch(self)

    def read(self) -> Values:
        """Copy the value to the host and wait; as with JAX on a GPU the array keeps that copy."""
        if self._host_copy is None or self._held is None:
            self._host_copy = self.fetch().wait()
            self._host_copy.flags.writeable = False
        return self._host_copy

    def item(self) -> Any:
        """Give the value of an array of one element."""
        return self.read().item()

    def __add__(self, other: Any) -> Any:
        return self._runtime.jit(np.add)(self, other)

    def __mul__(self, other: Any) -> Any:
        return self._runtime.jit(np.multiply)(self, other)

    def __getitem__(self, key: Any) -> Any:
        return self._runtime.jit(lambda values: values[key])(self)

    def sum(self) -> Any:
        """Add the elements up."""
        return self._runtime.jit(lambda values: values.sum(dtype=values.dtype))(self)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise BufferError(
            f"{self!r} is on {self.device}, out of the host's reach: read() copies it to the host"
        )

    __array__ = __dlpack__ = __dlpack_device__ = __iter__ = __bool__ = _refuse

    def __repr__(self) -> str:
        state = ", dead" if self.is_deleted() else "" if self.is_ready() else ", pending"
        return f"<FunctionalArray {self.dtype.name}{list(self.shape)} on {self.device}{state}>"


class Fetch:
    """A copy to the host on its way."""

    def __init__(self, array: FunctionalArray) -> None:
        memory, definition = array.memory, array.definition
        self._definition = definition
        self._host = host = np.empty(array.shape, array.dtype)
        copies = array._runtime.machine.stream(array.device, COPIES)
        copies.wait_mark(definition.mark)
        copies.enqueue("fetch", lambda: np.copyto(host, memory.values))
        self._mark = copies.mark("a fetch to the host")
        memory.readers.append(self._mark)

    def is_ready(self) -> bool:
        """Tell whether it is there."""
        return self._mark.is_passed

    def wait(self) -> Values:
        """Wait for the values; raises the error of their program."""
        self._mark.stream.scheduler.finish(self._mark)
        if self._definition.error is not None:
            raise self._definition.error
        return self._host
