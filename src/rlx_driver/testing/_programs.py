"""Programs of the functional framework, in JAX's place.

A program is a function of NumPy arrays. It is called twice: with zeros at once, to learn the shapes
of its results, and with the values when the compute stream comes to it. What is called with it
comes back at once, as arrays whose value is pending.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._pytree import flatten, unflatten
from rlx_driver.testing._arrays import Definition, FunctionalArray, Memory
from rlx_driver.testing._machine import COMPUTE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rlx_driver.device import Device
    from rlx_driver.testing._machine import Machine

__all__ = ["Runtime"]

Values = np.ndarray[Any, Any]
_LOST = 0xBD  # what memory holds after its program failed


class Runtime:
    """Runs programs, each on the compute stream of its device."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._threads = threading.local()

    @property
    def is_inside(self) -> bool:
        """Whether the calling thread is inside a program."""
        return getattr(self._threads, "inside", False)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        before, self._threads.inside = self.is_inside, True
        try:
            with np.errstate(all="ignore"):
                yield
        finally:
            self._threads.inside = before

    def jit(self, function: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        """Make a program of a function of NumPy arrays.

        Parameters
        ----------
        function
            Takes and returns trees of arrays. Arrays of this framework become NumPy arrays that
            cannot be written; NumPy arrays are passed on, and read when the program runs.
        donate
            Positions of arguments whose arrays are given to results of the same shape and dtype.
        """

        def program(*args: Any, **kwargs: Any) -> Any:
            if self.is_inside:
                return function(*args, **kwargs)
            donated = flatten([args[position] for position in donate])[0]
            return self.call(function, args, kwargs, donated)

        program.__name__ = getattr(function, "__name__", "program")
        return program

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        donated: list[FunctionalArray],
    ) -> Any:
        """Call a function as a program, some of whose arguments are donated."""
        leaves, structure = flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if isinstance(leaf, FunctionalArray)]
        for array in arrays:
            _ = array.memory  # it is alive
        self.machine.failures.check("compile")
        results: list[Any] = []  # the structure of the results, of the last call

        def evaluate(values: list[Values]) -> list[Values]:
            given = iter(values)
            filled = [next(given) if isinstance(x, FunctionalArray) else x for x in leaves]
            positional, named = unflatten(structure, filled)
            with self._inside():
                found, results[:] = _flattened(function(*positional, **named))
            return [np.asarray(value) for value in found]

        shapes = [(x.shape, x.dtype) for x in evaluate([_zeros(array) for array in arrays])]
        made_as = results[0]
        donors: list[FunctionalArray | None] = []
        free = list(donated)
        for shape, dtype in shapes:
            donor = next((x for x in free if (x.shape, x.dtype) == (shape, dtype)), None)
            donors.append(donor)
            free = [x for x in free if x is not donor]
        label = getattr(function, "__name__", "program")
        error = self.machine.failures.take("program")
        in_place = not (donated and self.machine.failures.take("donate"))
        launch = self.launch
        made = launch(label, evaluate, arrays, shapes, donors, error=error, in_place=in_place)
        return unflatten(made_as, made)

    def launch(
        self,
        label: str,
        function: Callable[[list[Values]], list[Values]],
        inputs: Sequence[FunctionalArray],
        shapes: Sequence[tuple[tuple[int, ...], np.dtype[Any]]],
        donors: Sequence[FunctionalArray | None],
        *,
        error: Exception | None = None,
        in_place: bool = True,
        device: Device | None = None,
        by_driver: bool = False,
    ) -> list[FunctionalArray]:
        """Enqueue a program; its results take the memory of those who donate, where that can be.

        A donor that another framework holds survives; every other one is dead afterwards.
        """
        device = self._device_of(inputs, device)
        compute = self.machine.stream(device, COMPUTE)
        definitions = [array.definition for array in inputs]
        memories = [array.memory for array in inputs]
        targets = []
        for (shape, dtype), donor in zip(shapes, donors, strict=True):
            memory = _donated(donor) if donor is not None and in_place else None
            targets.append(memory or self._new_memory(device, shape, dtype, by_driver))
        for array in (*inputs, *(donor for donor in donors if donor is not None)):
            compute.wait_mark(array.definition.mark)
        given = [donor.memory for donor in donors if donor is not None]
        for memory in given:  # whether a result takes it or not
            while memory.readers:
                compute.wait_mark(memory.readers.pop())
        defined = Definition()

        def work() -> None:
            try:
                for failed in (error, *(definition.error for definition in definitions)):
                    if failed is not None:
                        raise failed
                values = function([_read_only(memory.values) for memory in memories])
                for memory, value in zip(targets, [np.array(v) for v in values], strict=True):
                    np.copyto(memory.values, value, casting="no")
            except Exception as failure:
                defined.error = failure
                for memory in targets:
                    memory.values.reshape(-1).view(np.uint8)[...] = _LOST

        compute.enqueue(label, work)
        defined.mark = compute.mark(f"the result of {label!r}")
        for donor in donors:
            if donor is not None and not donor.memory.has_alias:
                donor.delete()
        return [FunctionalArray(self, device, memory, defined) for memory in targets]

    def _new_memory(
        self, device: Device, shape: tuple[int, ...], dtype: np.dtype[Any], by_driver: bool
    ) -> Memory:
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        compute = self.machine.stream(device, COMPUTE)
        allocation, raw = self.machine.spaces[device].allocate(nbytes, compute, by_driver=by_driver)
        values = np.ndarray(shape, dtype, buffer=raw) if nbytes else np.empty(shape, dtype)
        return Memory(allocation.address, values, allocation, can_be_donated=True)

    def _device_of(self, inputs: Sequence[FunctionalArray], device: Device | None) -> Device:
        found = {array.device for array in inputs} or {device or self.machine.devices[0]}
        if len(found) > 1:
            names = ", ".join(sorted(map(str, found)))
            raise ValueError(f"a program runs on one device; its arrays are on {names}")
        return found.pop()


def _donated(donor: FunctionalArray) -> Memory | None:
    memory = donor.memory
    return memory if memory.can_be_donated and not memory.has_alias else None


def _flattened(tree: Any) -> tuple[list[Any], list[Any]]:
    leaves, structure = flatten(tree)
    return leaves, [structure]


def _zeros(array: FunctionalArray) -> Values:
    return _read_only(np.zeros(array.shape, array.dtype))


def _read_only(values: Values) -> Values:
    view = values.view()
    view.flags.writeable = False
    return view
