"""One pass over a torch.fx graph on fake tensors: which node uses which storage, and when."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from rlx_driver.errors import PlanError
from rlx_driver.integrations._fakes import leaves
from rlx_driver.integrations._lives import Value, known_dtype, to_intervals

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from rlx_driver.integrations._fakes import Fakes
    from rlx_driver.interval import Interval, Kind

__all__ = ["run"]


def run(
    module: torch.fx.GraphModule,
    fakes: Fakes,
    values: Sequence[Any],
    explain: Callable[[Exception, str], None],
    constants: Collection[str] = (),
) -> list[Interval]:
    """Give the intervals of a graph.

    Parameters
    ----------
    module
        The graph; nothing in it is changed.
    fakes
        What to run it in.
    values
        One for each placeholder, real or fake.
    explain
        Called with an error of a node and where it occurred; may raise a better one.
    constants
        Names of the placeholders that are constants.
    """
    pass_ = _Pass(module, fakes, iter(values), constants)
    with fakes.active(), torch.no_grad():
        for node in module.graph.nodes:
            try:
                pass_.visit(node)
            except PlanError:
                raise
            except Exception as error:
                explain(error, f"node {node.name!r} ({node.target}) cannot be planned")
                raise
    return to_intervals(pass_.finish())


class _Pass:
    def __init__(
        self,
        module: torch.fx.GraphModule,
        fakes: Fakes,
        given: Iterator[Any],
        constants: Collection[str],
    ) -> None:
        # It keeps every result, so that ids and storages stay what they are.
        self._interpreter = torch.fx.Interpreter(module, garbage_collect_values=False)
        self._fakes = fakes
        self._given = given
        self._constants = constants
        self._step = 0
        self._values: dict[torch.fx.Node, list[Value]] = {}
        self._storages: dict[Any, list[Value]] = {}
        self._storage_of: dict[Value, Any] = {}
        self._untaken: dict[int, Value] = {}  # results of nodes with several, by tensor

    def visit(self, node: torch.fx.Node) -> None:
        """Run one node and note what it makes and uses."""
        if node.op == "output":
            for value in self._used(node):
                value.use(self._step)
                if value.kind == "intermediate":
                    value.kind = "output"
            return
        kind: Kind = "intermediate"
        if node.op == "placeholder":
            result = self._fakes.tree(next(self._given), own=True)
            kind = "constant" if node.name in self._constants else "input"
        elif node.op == "get_attr":
            result = self._fakes.tree(self._interpreter.run_node(node), own=True)
            kind = "constant"
        else:
            result = self._interpreter.run_node(node)
        self._interpreter.env[node] = result
        tensors = [each for each in leaves(result) if isinstance(each, torch.Tensor)]
        if node.target is operator.getitem and all(id(t) in self._untaken for t in tensors):
            self._values[node] = [self._take(node, tensor) for tensor in tensors]
        else:
            for value in self._used(node):
                value.use(self._step)
            self._values[node] = self._make(node, result, tensors, kind)
        self._check_storages(node)
        self._step += 1

    def _used(self, node: torch.fx.Node) -> Iterator[Value]:
        for each in node.all_input_nodes:
            yield from self._values[each]

    def _take(self, node: torch.fx.Node, tensor: torch.Tensor) -> Value:
        """Name a result after the getitem that takes it out of the tuple."""
        if isinstance(self._interpreter.env[node], torch.Tensor):
            value = self._untaken.pop(id(tensor))
            value.name = node.name
        else:
            value = self._untaken[id(tensor)]
        value.use(self._step)
        return value

    def _make(
        self, node: torch.fx.Node, result: Any, tensors: list[torch.Tensor], kind: Kind
    ) -> list[Value]:
        if isinstance(result, torch.Tensor):
            return [self._value(node.name, result, kind)]
        made = []
        for index, tensor in enumerate(tensors):
            value = self._value(f"{node.name}[{index}]", tensor, kind)
            self._untaken[id(tensor)] = value
            made.append(value)
        return made

    def _value(self, name: str, tensor: torch.Tensor, kind: Kind) -> Value:
        _check_shape(f"node {name!r}", tensor)
        storage = _storage(tensor)
        itemsize = tensor.dtype.itemsize
        dense = tensor.layout is torch.strided
        dtype = None
        # A lazy conjugate or negative holds other bytes than its values.
        if dense and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            dtype = known_dtype(tensor.dtype)
        value = Value(
            name,
            _span(tensor) * itemsize if dense else self._sparse_bytes(name, tensor),
            self._step,
            self._step,
            dtype,
            None if dtype is None else tuple(tensor.shape),
            kind,
            tensor.storage_offset() * itemsize if dense else 0,
        )
        self._storages.setdefault(storage, []).append(value)
        self._storage_of[value] = storage
        return value

    def _sparse_bytes(self, name: str, tensor: torch.Tensor) -> int:
        size = self._fakes.sparse_bytes(tensor)
        if size is None:
            raise PlanError(
                f"node {name!r} is sparse ({tensor.layout}), and how many bytes it has depends on "
                "values; pass a real tensor if it is an argument, or make it dense"
            )
        return size

    def _check_storages(self, node: torch.fx.Node) -> None:
        for each in node.all_input_nodes:
            tensor = self._interpreter.env[each]
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                continue
            (value,) = self._values[each]
            if _storage(tensor) != self._storage_of[value]:
                raise PlanError(
                    f"node {node.name!r} ({node.target}) gives {each.name!r} another storage; that "
                    "cannot be planned: copy into the tensor instead (copy_)"
                )

    def finish(self) -> list[Value]:
        """Point what shares a storage at one root, and give all values in graph order."""
        added: dict[Value, Value] = {}
        for members in self._storages.values():
            first = members[0]
            used = [member for member in members if member.size] or [first]
            low = min(member.start for member in used)
            high = max(member.start + member.size for member in used)
            root = first
            if low < first.start or high > first.start + first.size:
                kind = first.kind if first.kind in ("input", "constant") else "intermediate"
                name = f"{first.name}.storage"
                root = Value(name, high - low, first.first, first.last, None, None, kind, low)
                added[first] = root
            for member in members:
                if member is not root:
                    member.root = root
                    # What is empty may start anywhere.
                    member.start = max(low, min(member.start, high - member.size))
        values = []
        for value in self._storage_of:  # in the order in which they were made
            if value in added:
                values.append(added[value])
            values.append(value)
        return values


def _check_shape(what: str, tensor: torch.Tensor) -> None:
    if not all(type(length) is int for length in (*tensor.shape, *_strides(tensor))):
        raise PlanError(
            f"{what} has the shape {tuple(tensor.shape)}, which depends on a symbol; pass example "
            "arguments whose shapes are known"
        )


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else ()


def _storage(tensor: torch.Tensor) -> Any:
    """Give the storage, or a key of its own for a tensor that has none (sparse layouts)."""
    if tensor.layout is not torch.strided:
        return object()
    return tensor.untyped_storage()


def _span(tensor: torch.Tensor) -> int:
    """Give the elements from the first to the last, those between them that are not its own too."""
    if not tensor.numel():
        return 0
    span = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        span += (int(length) - 1) * int(stride)
    return span
