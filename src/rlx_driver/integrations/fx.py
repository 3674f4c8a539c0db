"""Live ranges of torch programs: functions, modules, torch.fx graphs and exported programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx

from rlx_driver.errors import PlanError
from rlx_driver.integrations._fakes import Fakes, leaves
from rlx_driver.integrations._fx_run import run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlx_driver.interval import Interval

__all__ = ["intervals"]

_HELD_CONSTANT = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}

_ADVICE = {
    DataDependentOutputException: (
        "its result is a Python number taken from a tensor (item, int, bool, a branch); keep it a "
        "tensor (torch.where), or pass the number as an argument"
    ),
    DynamicOutputShapeException: (
        "the shape of its result depends on values; use a form of fixed shape (torch.where with a "
        "mask, or indices passed as an argument)"
    ),
    UnsupportedOperatorException: (
        "it has no rule for fake tensors; register one with torch.library.register_fake"
    ),
    UnsupportedFakeTensorException: (
        "torch has no fake tensor of this kind (quantised and some sparse layouts are such); trace "
        "the part around it"
    ),
}


def intervals(program: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Interval]:
    """Give the intervals of a torch program; see `rlx_driver.live_ranges`."""
    with torch.inference_mode(False):
        if isinstance(program, torch.export.ExportedProgram):
            return _of_export(program, args, kwargs)
        if isinstance(program, torch.fx.GraphModule):
            return _of_graph(program, args, kwargs)
        if callable(program):
            return _of_function(program, args, kwargs)
    raise PlanError(
        "expected a function, a torch.nn.Module, a torch.fx.GraphModule or a "
        f"torch.export.ExportedProgram, got {type(program).__name__}"
    )


def _of_function(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Interval]:
    held = [*fn.parameters(), *fn.buffers()] if isinstance(fn, torch.nn.Module) else []
    fakes = Fakes([*leaves([args, kwargs]), *held])
    name = getattr(fn, "__name__", type(fn).__name__)

    def call(args: Any, kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    # Without the detour the placeholders are named after the function's own arguments.
    traced, given = (call, (args, kwargs)) if kwargs else (fn, tuple(args))
    with fakes.active():
        try:
            # Its own, as a function may change what it is given (transpose_, requires_grad_).
            module = make_fx(traced)(*fakes.tree(given, own=True))
        except Exception as error:
            _explain(error, f"{name} cannot be traced by torch.fx")
            raise
    values = leaves(given)
    return run(module, fakes, values, _explain)


def _of_graph(
    module: torch.fx.GraphModule, args: Sequence[Any], kwargs: dict[str, Any]
) -> list[Interval]:
    nodes = _placeholders(module)
    if args or kwargs:
        values = _bound(module, nodes, args, kwargs)
    else:
        values = [_recorded(node) for node in nodes]
    fakes = Fakes([*leaves(values), *module.parameters(), *module.buffers()])
    return run(module, fakes, values, _explain)


def _of_export(program: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Interval]:
    module = program.graph_module
    specs = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
    nodes = _placeholders(module)
    constants = {node.name for node in nodes if specs.get(node.name) in _HELD_CONSTANT}
    values = [_recorded(node) for node in nodes]
    fakes = Fakes(values)
    if args or kwargs:
        given = leaves([args, kwargs])
        asked = [at for at, node in enumerate(nodes) if specs[node.name] is InputKind.USER_INPUT]
        if len(given) != len(asked):
            names = ", ".join(nodes[at].name for at in asked)
            raise PlanError(
                f"the exported program takes {len(asked)} values ({names}), {len(given)} were "
                "given; give what it was exported with, in that order"
            )
        for at, value in zip(asked, given, strict=True):
            values[at] = value
        fakes = Fakes(given)
    return run(module, fakes, values, _explain, constants)


def _placeholders(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _recorded(node: torch.fx.Node) -> Any:
    """Give the value that a trace recorded for a placeholder."""
    if "val" not in node.meta and not node.args:
        raise PlanError(f"placeholder {node.name!r} carries no meta['val']; pass example arguments")
    return node.meta.get("val", node.args[0] if node.args else None)


def _bound(
    module: torch.fx.GraphModule,
    nodes: list[torch.fx.Node],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> list[Any]:
    """Give the value of each placeholder, as a call of the module would bind them."""
    given = list(module.graph.process_inputs(*args))
    left = dict(kwargs)
    values: list[Any] = []
    for node in nodes:
        name = str(node.target)
        if name.startswith("**"):
            values.append(left)
            left = {}
        elif name.startswith("*"):
            values.append(tuple(given))
            given = []
        elif given:
            values.append(given.pop(0))
        elif name in left:
            values.append(left.pop(name))
        elif node.args:  # its default
            values.append(node.args[0])
        else:
            raise PlanError(f"no argument was given for placeholder {node.name!r}; pass it")
    if given or left:
        raise PlanError(
            f"the graph takes {len(nodes)} values ({', '.join(node.name for node in nodes)}); "
            f"{len(given)} more and {sorted(left)} by name were given"
        )
    return values


def _explain(error: Exception, what: str) -> None:
    """Raise a `PlanError` if it is something that fake tensors cannot do."""
    for kind, advice in _ADVICE.items():
        if isinstance(error, kind):
            raise PlanError(f"{what}, because of {error}: {advice}") from error
    if type(error).__name__.startswith("GuardOnDataDependent"):
        raise PlanError(f"{what}: a branch depends on values ({error}); use torch.where") from error
    if isinstance(error, NotImplementedError) and "HigherOrderOperator" in str(error):
        raise PlanError(
            f"{what}: an operator that takes functions (torch.cond, while_loop, scan), which "
            "has no one live range; plan the branches or the body on their own"
        ) from error
    if "fake impl" in str(error):
        advice = _ADVICE[UnsupportedOperatorException]
        raise PlanError(f"{what}, because of {error}: {advice}") from error
    if "tracing tensor" in str(error):
        advice = _ADVICE[DataDependentOutputException]
        raise PlanError(f"{what}, because of {error}: {advice}") from error
