"""Run a function of torch with all that it computes in one arena.

The function is traced to a torch.fx graph of ATen operators, `rlx_driver.intervals_from_fx` says
when each node lives, and `rlx_driver.plan_memory` says where. Then the graph is bound to an arena,
once: views become views of slots, and every other operator a call of the form that writes into
tensors which it is given (``out=``). To run it is to go through the list of these calls::

    program = ArenaProgram(forward, [tokens], weights)
    with rlx.Arena(program.plan, "cpu") as arena:
        program.bind(arena)
        logits = program(tokens)

It is a small executor to learn from: static shapes, one device, no autograd.
"""

from __future__ import annotations

import functools
import operator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

import rlx_driver as rlx

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

aten = torch.ops.aten

# Operators that only fill or copy have no ``out=`` form of their own; this is what they are.
WRITES = {
    aten._to_copy.default: aten.copy_.default,
    aten.clone.default: aten.copy_.default,
    aten.lift_fresh_copy.default: aten.copy_.default,
    aten.scalar_tensor.default: aten.fill_.Scalar,
}
# What an operator need not be told when it is given the tensor to write into.
SAID_BY_OUT = {"dtype", "layout", "device", "pin_memory", "memory_format"}


@functools.cache
def out_form(op: Any) -> tuple[Any, list[str]] | None:
    """Return the overload of an operator that writes into tensors it is given, and their names.

    None if there is none. One that torch has generated does not count: it computes into memory of
    its own and copies that.
    """
    asked = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    for name in op.overloadpacket.overloads():
        form = getattr(op.overloadpacket, name)
        arguments = form._schema.arguments
        outs = [argument.name for argument in arguments if argument.is_out]
        takes = [(each.name, str(each.type)) for each in arguments if not each.is_out]
        same = takes == [each for each in asked if each in takes]
        dropped = {name for name, _ in asked} - {name for name, _ in takes}
        if (
            len(outs) == len(op._schema.returns) > 0
            and same
            and dropped <= SAID_BY_OUT
            and torch.Tag.generated not in form.tags
        ):
            return form, outs
    return None


def copy_into(op: Any, slots: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run an operator that has no ``out=`` form, and copy its results to where they belong."""
    results = op(*args, **kwargs)
    results = [results] if isinstance(results, torch.Tensor) else results
    for slot, result in zip(slots, results, strict=True):
        if isinstance(slot, torch.Tensor):
            slot.copy_(result)


def written_argument(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the argument that an operator in place writes to, which is what it returns."""
    for position, argument in enumerate(op._schema.arguments):
        if argument.is_write:
            return kwargs[argument.name] if argument.kwarg_only else args[position]
    return None


def results_of(node: torch.fx.Node) -> list[tuple[str, Any]]:
    """Return the results of a node as traced, each with its name in the plan if it is a tensor."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [(node.name, value)]
    takers: dict[int, str] = {}
    for user in node.users:
        if user.target is operator.getitem:
            takers.setdefault(user.args[1], user.name)
    results, count = [], 0
    for index, each in enumerate(value or ()):
        results.append((takers.get(index, f"{node.name}[{count}]"), each))
        count += isinstance(each, torch.Tensor)
    return results


class ArenaProgram:
    """A function of torch, planned for one arena.

    Parameters
    ----------
    fn
        Takes tensors, `inputs` first and then `held`; its shapes must not depend on values.
    inputs
        Tensors, for their shapes and dtypes. In the arena each has a slot.
    held
        Tensors that stay where they are, beside the arena: weights.
    decompositions
        What `make_fx` shall replace operators by, such as those without an ``out=`` form.

    Attributes
    ----------
    graph
        The traced `torch.fx.GraphModule`.
    plan
        Where each node lies: a `rlx_driver.MemoryPlan`.
    returned
        Names of the nodes that are the outputs.
    how
        After `bind`, for each node that computes something: ``"view"``, ``"out"`` (it writes into
        its slot), ``"in place"`` or ``"copied"`` (it has no ``out=`` form).
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        held: Sequence[torch.Tensor] = (),
        *,
        decompositions: dict[Any, Callable[..., Any]] | None = None,
    ) -> None:
        trace = make_fx(fn, decomposition_table=decompositions, tracing_mode="fake")
        with torch.no_grad():
            self.graph = trace(*inputs, *held)
        self.device = inputs[0].device
        self.how: dict[str, str] = {}
        self._nodes = list(self.graph.graph.nodes)
        self.returned = [node.name for node in self._nodes[-1].all_input_nodes]
        self._given = [node for node in self._nodes if node.op == "placeholder"]
        self._held = dict(zip(self._given[len(inputs) :], held, strict=True))
        self._lives = {life.node: life for life in rlx.intervals_from_fx(self.graph)}
        self.plan = rlx.plan_memory(self._in_arena())

    def _in_arena(self) -> list[rlx.Interval]:
        """Return the intervals but those of held tensors, of constants and of other devices."""
        outside = {node.name for node in self._nodes if node in self._held or node.op == "get_attr"}
        for node in self._nodes:
            for name, value in results_of(node):
                if isinstance(value, torch.Tensor) and value.device != self.device:
                    outside.add(name)  # a number that torch keeps on the host, as a tensor
        roots = {self._root(name) for name in outside if name in self._lives}
        return [life for life in self._lives.values() if self._root(life.node) not in roots]

    def _root(self, name: str) -> str:
        return self._lives[name].alias_of or name

    # --- binding -----------------------------------------------------------------------------

    def bind(self, arena: rlx.Arena) -> None:
        """Make the calls for an arena of this plan; do so again after a `reset` of the arena.

        Raises
        ------
        ValueError
            An operator changes the shape of its argument in place (``t_``); use the form without
            the underscore.
        RuntimeError
            A view is not where the plan has it.
        """
        self.arena = arena
        self._watched = arena.is_debug
        self.how = {}
        self.tensors: dict[str, torch.Tensor] = {}  # of each node in the arena
        self._calls: list[tuple[int, Callable[[], Any]]] = []
        values: dict[torch.fx.Node, Any] = {}
        with torch.no_grad():
            for step, node in enumerate(self._nodes):
                values[node] = self._bind(step, node, values)
        self._inputs = [values[node] for node in self._given if node not in self._held]
        self.outputs = values[self._nodes[-1]]
        roots = {arena.plan.root(node) for node in arena.plan if self._lives[node].whole_run}
        self._ends = [arena.buffer(root) for root in roots if arena.plan.interval(root).size]
        if lost := self.misplaced():
            raise RuntimeError(f"these nodes do not lie where the plan has them: {lost}")

    def _bind(self, step: int, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Any:
        """Return the value of a node, a tensor or several, and note the call that fills it."""
        if node.op == "placeholder":
            return self._held[node] if node in self._held else self._slot(*results_of(node)[0])
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.graph)
        args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        if node.op == "output":
            return args[0]
        if node.target is operator.getitem:
            return args[0][args[1]]
        value, call = self._bind_operator(node, tuple(args), dict(kwargs))
        if call is not None:
            self._calls.append((step, call))
        tensors = [value] if isinstance(value, torch.Tensor) else value or ()
        for (name, _), tensor in zip(results_of(node), tensors, strict=True):
            if name in self.plan:
                self.tensors[name] = tensor
        return value

    def _bind_operator(
        self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Callable[[], Any] | None]:
        """Return the value of an operator's node and what has to be called for it at each run."""
        op, results = node.target, results_of(node)
        if torch.Tag.inplace_view in op.tags:
            raise ValueError(f"{node.name} ({op}) changes a shape in place: use a view instead")
        whole = functools.partial(op, *args, **kwargs)
        if all(name not in self._lives or self._root(name) != name for name, _ in results):
            if op._schema.is_mutable or not results:
                self.how[node.name] = "in place"
                return (written_argument(op, args, kwargs) if results else None), whole
            self.how[node.name] = "view"
            return whole(), None  # of memory that stays where it is: once is enough
        slots = [self._slot(name, value) for name, value in results]
        several = not isinstance(node.meta["val"], torch.Tensor)
        self.how[node.name] = "out"
        if op in WRITES:
            call = functools.partial(WRITES[op], slots[0], args[0])
        elif not op._schema.is_mutable and (form := out_form(op)):
            into = dict(zip(form[1], slots, strict=True))
            takes = {argument.name for argument in form[0]._schema.arguments}
            rest = {name: value for name, value in kwargs.items() if name in takes}
            call = functools.partial(form[0], *args, **rest, **into)
        else:
            self.how[node.name] = "copied"
            call = functools.partial(copy_into, op, slots, args, kwargs)
        return (slots if several else slots[0]), call

    def _slot(self, name: str, value: Any) -> Any:
        """Return the tensor of a node in its slot, with the strides that torch gave it."""
        if not isinstance(value, torch.Tensor):
            return value  # None, or a number that is always the same
        if name not in self.plan:
            like = {"dtype": value.dtype, "device": value.device}
            return torch.empty_strided(value.shape, value.stride(), **like)
        length = self.plan.interval(name).size // value.dtype.itemsize
        line = self.arena.buffer(name, value.dtype, (length,)).torch()
        tensor = self.tensors[name] = line.as_strided(value.shape, value.stride())
        return tensor

    def misplaced(self) -> list[str]:
        """Return the nodes whose tensor is not at the address that the plan says; asks torch."""
        start = self.arena.address
        return [
            name
            for name, tensor in self.tensors.items()
            if tensor.numel() and tensor.data_ptr() != start + self.arena.byte_offset(name)
        ]

    # --- running -----------------------------------------------------------------------------

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Copy the inputs into their slots, run, and return the outputs where they lie.

        Copies: the inputs. Blocks: for readers of JAX arrays of inputs and outputs. Aliases: the
        outputs are the arena's memory, which the next run writes anew.
        """
        for slot, value in zip(self._inputs, inputs, strict=True):
            if slot.shape != value.shape or slot.dtype != value.dtype:
                raise ValueError(
                    f"an input is {value.dtype}{list(value.shape)}, and the program was made for "
                    f"{slot.dtype}{list(slot.shape)}"
                )
        with torch.no_grad(), self._alone():
            for slot, value in zip(self._inputs, inputs, strict=True):
                slot.copy_(value)
            for step, call in self._calls:
                if self._watched:
                    self.arena.advance(step)  # poisons what has died, and looks at it
                call()
        self.arena.advance(len(self._nodes) - 1)
        return self.outputs

    def _alone(self) -> AbstractContextManager[Any]:
        """Keep other users of inputs and outputs out; whoever reads them is waited for."""
        if not self._ends or self._watched:
            return nullcontext()
        return rlx.write(self._ends, "torch")

    def count(self) -> dict[str, int]:
        """Return how many nodes there are of each kind in `how`."""
        kinds = list(self.how.values())
        return {kind: kinds.count(kind) for kind in ("view", "out", "in place", "copied")}

    def copied(self) -> list[str]:
        """Return the operators whose results have to be copied into their slots."""
        nodes = (node for node in self._nodes if self.how.get(node.name) == "copied")
        return sorted({str(node.target) for node in nodes})
