"""Run random programs: as they should go, through the driver, and by hand.

`Model` runs a program on plain NumPy arrays, one operation after the other, and so says what every
look has to show. `Driver` is the program as a user of the driver would write it. `ByHand` is the
same program over one memory that NumPy, torch and JAX share by DLPack, without the driver: with
`waiting` it waits for everything after every operation, and has to be right too; without, it is the
positive control, whose wrong results say that the programs do contain hazards.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import rlx_driver as rlx
from random_programs import (
    WHOLE,
    Collect,
    Commit,
    Copy,
    Dead,
    Fill,
    Look,
    Op,
    Program,
    Reader,
    Update,
    Write,
    key_of,
)
from random_steps import (
    STEPS,
    TORCH,
    Place,
    checksum,
    mixed,
    native_step,
    native_step_of_two,
    native_step_with,
    on_host,
    own_step,
    pattern,
    read_late,
    see,
    step_of_two,
    step_with,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class Model:
    """One operation after the other, on plain arrays of whole numbers."""

    def __init__(self, program: Program) -> None:
        self.side = program.side
        self.x = [pattern(self.side, i) for i in range(len(program.dtypes))]

    def _part(self, i: int, part: int) -> Any:
        return self.x[i][key_of(part, self.side)]

    def look(self, op: Look) -> int:
        return checksum(self._part(op.handle, op.part))

    def reader(self, op: Reader) -> int:
        return sum(checksum(self._part(i, op.part)) for i in op.handles)

    def write(self, op: Write) -> None:
        for i in op.handles:
            x = self._part(i, op.part)
            x[...] = mixed(x, op.k)

    def update(self, op: Update) -> int | None:
        olds = [self._part(i, op.part).copy() for i in op.handles]
        if len(olds) == 2:
            others = olds[::-1]
        elif op.argument is None:
            others = [0]
        else:
            array = op.argument == "array"
            others = [pattern(self.side, op.k) if array else self.x[op.argument]]
        for i, old, other in zip(op.handles, olds, others, strict=True):
            self._part(i, op.part)[...] = mixed(old, op.k, other)
        aux = len(olds) == 2 or op.argument is not None
        return sum(map(checksum, olds)) if aux else None

    def copy(self, op: Copy) -> None:
        x = self._part(op.handle, op.part)
        if op.source == "own":
            x[...] = mixed(x, op.k)
        elif op.other is None:
            x[...] = pattern(self.side, op.k)[: x.shape[0], : x.shape[1]]
        else:
            x[...] = self.x[op.other]

    def fill(self, op: Fill) -> None:
        self._part(op.handle, op.part)[...] = op.k

    def commit(self, op: Commit) -> int | None:
        return self.update(Update(handles=op.handles, by="jax", k=op.k))

    def dead(self, op: Dead) -> bool:
        return True


class Driver:
    """The program with the driver."""

    def __init__(self, program: Program, place: Place) -> None:
        self.program, self.place, self.side = program, place, program.side
        backend = "jax" if program.owner == "jax" else None
        self.region = rlx.HandleRegion(place.device, backend=backend)
        shape = (self.side, self.side)
        spec = {f"h{i}": (shape, dtype) for i, dtype in enumerate(program.dtypes)}
        self.handles = list(self.region.create(spec).values())
        self.held: dict[tuple[int, str], Any] = {}
        for i, handle in enumerate(self.handles):
            handle.copy_from(pattern(self.side, i).astype(handle.dtype))
            for by in (*place.natives, "jax") if program.viewed else ():
                self._view(i, by, "fresh")

    def close(self) -> None:
        self.held.clear()
        self.region.close()

    def _buffer(self, i: int, part: int) -> Any:
        handle = self.handles[i]
        return handle if part == WHOLE else handle[key_of(part, self.side)]

    def _view(self, i: int, by: str, how: str, part: int = WHOLE) -> Any:
        if how == "held":
            return self.held[i, by]
        view = getattr(self._buffer(i, part), by)()
        if part == WHOLE:
            self.held[i, by] = view
        return view

    def look(self, op: Look) -> int:
        buffer = self._buffer(op.handle, op.part)
        if op.by == "host":
            return checksum(buffer.to_host().numpy())
        if op.by == "fetch":
            return checksum(np.asarray(buffer.jax()))
        if op.by == "put":
            return checksum(np.asarray(jax.device_put(buffer.jax(), self.place.host)))
        scope = buffer.read(op.by) if op.how == "scope" else None
        with scope or contextlib.nullcontext() as view:
            if scope is None:
                view = self._view(op.handle, op.by, op.how, op.part)
            return int(see(view)) if op.by == "jax" else checksum(on_host(view))

    def reader(self, op: Reader) -> Any:
        if op.how == "scope":
            with rlx.read([self._buffer(i, op.part) for i in op.handles], op.by) as views:
                return read_late(views, op.by, self.place)
        views = [self._view(i, op.by, op.how, op.part) for i in op.handles]
        return read_late(views, op.by, self.place)

    def write(self, op: Write) -> None:
        k = op.k + (self.place.torch_token(op.heavy) if op.by == "torch" else 0)
        if op.how != "scope":
            native_step(self._view(op.handles[0], op.by, op.how, op.part), k)
        elif len(op.handles) == 1:
            with self._buffer(op.handles[0], op.part).write(op.by) as view:
                native_step(view, k)
        else:
            with rlx.write([self.handles[i] for i in op.handles], op.by) as views:
                for view in views:
                    native_step(view, k)

    def update(self, op: Update) -> Any:
        jaxs = op.by == "jax"
        late = self.place.torch_token(op.heavy) if op.by == "torch" else 0
        last = (self.place.token(op.heavy), op.k) if jaxs else (op.k + late,)
        options = {"framework": op.by, "ordered": op.ordered}
        if len(op.handles) == 2:
            state = [self.handles[i] for i in op.handles]
            two = step_of_two if jaxs else native_step_of_two
            return rlx.update(state, two, *last, has_aux=True, **options)
        target = self._buffer(op.handles[0], op.part)
        if op.argument is None:
            one = STEPS[op.jitted] if jaxs else native_step
            return target.update(one, *last, **options)
        with_argument = step_with if jaxs else native_step_with
        if isinstance(op.argument, int):
            argument = self.handles[op.argument]
            return target.update(with_argument, argument, *last, has_aux=True, **options)
        by = "numpy" if jaxs else op.by
        argument = self.place.array(by, self.side, op.k, target.dtype.name)
        aux = target.update(with_argument, argument, *last, has_aux=True, **options)
        argument[...] = -1
        return aux

    def copy(self, op: Copy) -> None:
        target = self._buffer(op.handle, op.part)
        if op.source == "own":
            target.copy_from(STEPS["plain"](target.jax(), self.place.token(True), op.k))
        elif op.other is not None:
            value = self.handles[op.other]
            if op.source != "buffer":
                value = self._view(op.other, op.source.removesuffix(" view"), "fresh")
            target.copy_from(value, cast=True)
        else:
            value = self.place.array(op.source, self.side, op.k, target.dtype.name)
            value = value[: target.shape[0], : target.shape[1]]
            if op.part == WHOLE:
                target.copy_from(value)
            else:
                self.handles[op.handle][key_of(op.part, self.side)] = value
            if op.source != "jax":
                value[...] = -1

    def fill(self, op: Fill) -> None:
        self.handles[op.handle][key_of(op.part, self.side)] = op.k

    def commit(self, op: Commit) -> Any:
        tree = [self.handles[i] for i in op.handles]
        zero = self.place.token(op.heavy)
        new, aux = own_step(rlx.views(tree, "jax"), [], zero, op.k)
        rlx.commit(tree, new)
        return aux

    def dead(self, op: Dead) -> bool:
        try:
            np.asarray(self.held[op.handle, "jax"])
        except (RuntimeError, ValueError):
            return True
        return False


class ByHand:
    """The program without the driver, over memory that the frameworks share."""

    def __init__(self, program: Program, place: Place, *, waiting: bool = False) -> None:
        self.program, self.place, self.side = program, place, program.side
        self.waiting = waiting
        # torch's memory is aligned to 64 bytes, so that JAX shares it.
        patterns = [pattern(self.side, i).astype(d) for i, d in enumerate(program.dtypes)]
        self.tensors = [torch.empty(p.shape, dtype=TORCH[p.dtype.name]) for p in patterns]
        self.tensors = [t.to(place.device) for t in self.tensors]
        for tensor, values in zip(self.tensors, patterns, strict=True):
            tensor.copy_(torch.from_numpy(values))
        self.arrays = [self._imported(tensor) for tensor in self.tensors]
        self.kept: list[Any] = []  # no memory goes away while anything may be running
        place.synchronize()

    def close(self) -> None:
        self.wait()
        self.kept.clear()

    def wait(self, *more: Any) -> None:
        arrays = [x for x in (*self.arrays, *self.kept, *more) if isinstance(x, jax.Array)]
        jax.block_until_ready([x for x in arrays if not x.is_deleted()])
        self.place.synchronize()

    def _imported(self, tensor: torch.Tensor) -> jax.Array:
        # On the host ``copy=True`` shares what is aligned, and may be donated in place.
        return jnp.from_dlpack(tensor) if self.place.cuda else jnp.from_dlpack(tensor, copy=True)

    def _view(self, i: int, by: str, part: int = WHOLE) -> Any:
        tensor = self.tensors[i][key_of(part, self.side)]
        if by == "jax":
            array = self.arrays[i] if part == WHOLE else self._imported(tensor)
            self.kept += [] if part == WHOLE else [array]
            return array
        return tensor if by == "torch" or self.place.cuda else tensor.numpy()

    def look(self, op: Look) -> int:
        if op.by == "host":
            return checksum(on_host(self._view(op.handle, "torch", op.part)))
        if op.by in self.place.natives:
            return checksum(on_host(self._view(op.handle, op.by, op.part)))
        view = self._view(op.handle, "jax", op.part)
        if op.by == "put":
            return checksum(np.asarray(jax.device_put(view, self.place.host)))
        # A fetch from a GPU stays in the array, so it is made of one that is thrown away.
        return int(see(view)) if op.by == "jax" else checksum(np.asarray(view[:]))

    def reader(self, op: Reader) -> Any:
        views = [self._view(i, op.by, op.part) for i in op.handles]
        return read_late(views, op.by, self.place)

    def write(self, op: Write) -> None:
        k = op.k + (self.place.torch_token(op.heavy) if op.by == "torch" else 0)
        for i in op.handles:
            native_step(self._view(i, op.by, op.part), k)

    def update(self, op: Update) -> Any:
        argument = op.argument
        if op.by == "jax":
            state = [self._view(i, "jax", op.part) for i in op.handles]
            others = [] if argument is None else [self._other(argument, "jax", op)]
            new, aux = own_step(state, others, self.place.token(op.heavy), op.k)
            for i, array in zip(op.handles, new, strict=True):
                if op.part == WHOLE:
                    self.arrays[i] = array
                self.kept.append(array)
            if argument == "array":
                self.kept += others
                if self.waiting:
                    self.wait()
                others[0][...] = -1
            return aux
        state = [self._view(i, op.by, op.part) for i in op.handles]
        k = op.k + (self.place.torch_token(op.heavy) if op.by == "torch" else 0)
        if len(state) == 2:
            new, aux = native_step_of_two(state, k)
            for view, value in zip(state, new, strict=True):
                view[...] = value
            return aux
        if argument is None:
            return native_step(state[0], k)
        return native_step_with(state[0], self._other(argument, op.by, op), k)[1]

    def _other(self, argument: int | str, by: str, op: Update) -> Any:
        if isinstance(argument, int):
            return self._view(argument, by)
        by = "numpy" if by == "jax" else by
        return self.place.array(by, self.side, op.k, self.program.dtypes[op.handles[0]])

    def copy(self, op: Copy) -> None:
        target = self._view(op.handle, "torch", op.part)
        if op.source == "own":
            view = self._view(op.handle, "jax")
            value = STEPS["plain"](view, self.place.token(True), op.k)
        elif op.other is not None:
            by = op.source.removesuffix(" view")
            value = self._view(op.other, "torch" if by == "buffer" else by)
        else:
            value = self.place.array(op.source, self.side, op.k, self.program.dtypes[op.handle])[
                : target.shape[0], : target.shape[1]
            ]
        self.kept.append(value)
        if isinstance(value, jax.Array) and self.place.cuda:
            value = torch.from_dlpack(value)
        target.copy_(value if isinstance(value, torch.Tensor) else torch.tensor(np.asarray(value)))

    def fill(self, op: Fill) -> None:
        self._view(op.handle, "torch", op.part)[...] = op.k

    def commit(self, op: Commit) -> Any:
        return self.update(Update(handles=op.handles, by="jax", k=op.k, heavy=op.heavy))

    def dead(self, op: Dead) -> bool:
        return True


def run(program: Program, world: Any, place: Place | None = None) -> list[int | None]:
    """Run a program and give what each operation saw, and at the end what every matrix holds."""
    seen: list[Any] = []
    for op in (*program.ops, *last_of(program)):
        if isinstance(op, Collect):
            if place is not None:
                place.synchronize()  # results of torch may lie on any stream
            seen = [value if value is None else int(value) for value in [*seen, None]]
            continue
        act = getattr(world, type(op).__name__.lower())
        seen.append(act(op) if place is None else place.call(op, act))
        if getattr(world, "waiting", False):
            world.wait(seen[-1])
    return seen


def last_of(program: Program) -> list[Op]:
    """Give what follows every program."""
    return [Collect(), *(Look(handle=i, by="host") for i in range(len(program.dtypes)))]


def differences(
    program: Program, world: Callable[[Program, Place], Driver | ByHand], place: Place
) -> list[str]:
    """Run a program and its model, and say which operations saw what they should not."""
    expected = run(program, Model(program))
    executor = place.call(Op(), lambda _: world(program, place))
    try:
        seen = run(program, executor, place)
    finally:
        executor.close()
    ops = (*program.ops, *last_of(program))
    return [
        f"operation {i}, {ops[i]!r}, saw {seen[i]} and not {expected[i]}"
        for i in range(len(ops))
        if seen[i] != expected[i]
    ]
