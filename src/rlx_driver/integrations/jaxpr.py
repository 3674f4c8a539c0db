"""Live ranges of the equations of a jaxpr."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
from jax.extend import core

from rlx_driver.errors import PlanError
from rlx_driver.integrations._lives import Value, known_dtype, peak_bytes, to_intervals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rlx_driver.interval import Interval, Kind

__all__ = ["intervals"]

_INLINED = {
    "pjit": "jaxpr",
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Calls whose body takes the place of their equation, and the parameter that holds it."""

# Their bodies combine scalars, or work on what a chip has inside.
_NO_TEMPORARIES = ("scatter", "reduce", "select_and", "arg", "sort", "pallas_call")

_SAME_BYTES = {"squeeze", "name"}

_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.UnexpectedTracerError,
)


def intervals(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Interval]:
    """Give the intervals of a function's jaxpr, or of a jaxpr; see `rlx_driver.live_ranges`."""
    jaxpr, consts = _opened(_jaxpr(fn, args, kwargs))
    return to_intervals(_Walk(jaxpr, consts).values)


def _jaxpr(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if isinstance(fn, core.ClosedJaxpr | core.Jaxpr):
        if args or kwargs:
            raise PlanError("a jaxpr has its shapes already; leave the arguments out")
        return fn
    if not callable(fn):
        raise PlanError(f"expected a function or a jaxpr, got {type(fn).__name__}")
    asked: Callable[..., Any] = fn
    name = getattr(fn, "__name__", type(fn).__name__)
    try:
        return jax.make_jaxpr(asked)(*args, **kwargs)
    except _UNTRACEABLE as error:
        raise _untraceable(name, error) from error
    except TypeError as error:
        if "concrete values" in str(error):
            raise _untraceable(name, error) from error
        if "valid JAX type" not in str(error) and "as an abstract array" not in str(error):
            raise  # the function's own
        raise PlanError(
            f"{name} was given an argument that JAX cannot trace: {error}\n"
            "Arguments are arrays, jax.ShapeDtypeStruct or pytrees of them; bind the rest with "
            "functools.partial"
        ) from error


def _untraceable(name: str, error: Exception) -> PlanError:
    return PlanError(
        f"{name} cannot be traced by JAX, because what it does depends on values:\n{error}\n"
        "Branch with lax.cond, loop with lax.while_loop, give shapes as Python ints "
        "(size= of nonzero, unique and where), and bind static arguments with functools.partial"
    )


class _Walk:
    """One pass over a jaxpr, with the calls inlined."""

    def __init__(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        scratch: dict[tuple[int, str], int] | None = None,
    ) -> None:
        self.values: list[Value] = []
        self._step = 0
        self._constants: dict[int, Value] = {}
        # by identity, for a body that is called many times; shared with the walks over bodies
        self._scratch = {} if scratch is None else scratch
        scope: dict[Any, Value | None] = {}
        for index, var in enumerate(jaxpr.invars):
            scope[var] = self._add(f"input:{index}", var.aval, kind="input")
        self.inputs = [scope[var] for var in jaxpr.invars]
        self._bind_constants(scope, jaxpr, consts)
        self._body(jaxpr, scope)
        self.outputs = self._outputs(jaxpr, scope)

    def _add(self, name: str, aval: Any, kind: Kind = "intermediate") -> Value | None:
        """Add a value that owns its memory; None for tokens, which need none."""
        shape = getattr(aval, "shape", None)
        if shape is None:
            return None
        if not all(type(length) is int for length in shape):
            raise PlanError(
                f"{name} has the shape {shape}, which depends on a symbol; give arguments whose "
                "shapes are known"
            )
        dtype = known_dtype(aval.dtype)
        size = math.prod(shape) * aval.dtype.itemsize
        held = None if dtype is None else tuple(shape)
        value = Value(name, size, self._step, self._step, dtype, held, kind)
        self.values.append(value)
        return value

    def _bind_constants(
        self, scope: dict[Any, Value | None], jaxpr: Any, consts: Sequence[Any]
    ) -> None:
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            known = None if const is None else self._constants.get(id(const))
            if known is None:
                known = self._add(f"const:{len(self._constants)}", var.aval, kind="constant")
                if known is not None:
                    known.first = 0
                    self._constants[id(const) if const is not None else id(var)] = known
            scope[var] = known

    def _body(self, jaxpr: Any, scope: dict[Any, Value | None]) -> None:
        for equation in jaxpr.eqns:
            operands = [_lookup(scope, atom) for atom in equation.invars]
            inner = equation.params.get(_INLINED.get(equation.primitive.name, ""))
            if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                scope.update(self._inline(equation, inner, operands))
            else:
                self._equation(equation, operands, scope)

    def _inline(
        self, equation: Any, inner: Any, operands: list[Value | None]
    ) -> Iterator[tuple[Any, Value | None]]:
        jaxpr, consts = _opened(inner)
        scope = dict(zip(jaxpr.invars, operands, strict=True))
        self._bind_constants(scope, jaxpr, consts)
        self._body(jaxpr, scope)
        results = [_lookup(scope, atom) for atom in jaxpr.outvars]
        return zip(equation.outvars, results, strict=True)

    def _equation(
        self, equation: Any, operands: list[Value | None], scope: dict[Any, Value | None]
    ) -> None:
        name = f"{equation.primitive.name}:{self._step}"
        for operand in operands:
            if operand is not None:
                operand.use(self._step)
        single = len(equation.outvars) == 1
        for index, var in enumerate(equation.outvars):
            made = self._add(name if single else f"{name}.{index}", var.aval)
            scope[var] = made
            operand = operands[0] if len(operands) == 1 and single else None
            if made is not None and operand is not None and _same_bytes(equation):
                _share(made, operand)
        size = self._temporaries(equation)
        if size:
            self.values.append(Value(f"{name}.scratch", size, self._step, self._step, None, None))
        self._step += 1

    def _outputs(self, jaxpr: Any, scope: dict[Any, Value | None]) -> list[Value]:
        """Make what the program returns outputs; as in XLA, none shares memory with another."""
        outputs: list[Value] = []
        sharing: dict[Value, Value] = {}  # root: the output that lies in it
        for index, atom in enumerate(jaxpr.outvars):
            value = _lookup(scope, atom)
            if value is None:  # a literal
                value = self._add(f"output:{index}", atom.aval)
            if value is None or value.kind == "output":
                continue
            value.use(self._step)
            if value.kind != "intermediate":
                continue
            value.kind = "output"
            outputs.append(value)
            if value in sharing:
                sharing.pop(value).root = None
            if value.root is None:
                continue
            if value.root.kind != "intermediate" or value.root in sharing:
                value.root = None
            else:
                sharing[value.root] = value
        return outputs

    def _temporaries(self, equation: Any) -> int:
        """Give the bytes that the bodies of an equation need beside its operands and results."""
        if equation.primitive.name.startswith(_NO_TEMPORARIES):
            return 0
        bodies = _bodies(equation.params)
        return max((self._body_peak(body, equation) for body in bodies), default=0)

    def _body_peak(self, body: Any, equation: Any) -> int:
        name = equation.primitive.name
        key = (id(body), name)
        if key not in self._scratch:
            jaxpr, consts = _opened(body)
            walk = _Walk(jaxpr, consts, self._scratch)
            outside = {value for value in walk.inputs if value is not None}
            if name == "scan":  # each step cuts its slice out of the scanned operands
                pairs = zip(walk.inputs, equation.invars, jaxpr.invars, strict=True)
                outside.difference_update(
                    [value for value, whole, part in pairs if whole.aval.shape != part.aval.shape]
                )
            if name == "cond":  # a branch writes its results where those of the equation lie
                outside.update(walk.outputs)
            outside.update(value for value in walk.values if value.root in outside)
            self._scratch[key] = peak_bytes([v for v in walk.values if v not in outside])
        return self._scratch[key]


def _lookup(scope: dict[Any, Value | None], atom: Any) -> Value | None:
    return None if isinstance(atom, core.Literal) else scope[atom]


def _opened(body: Any) -> tuple[Any, Sequence[Any]]:
    """Give a jaxpr and its constants; None for those that an open jaxpr does not hold."""
    if isinstance(body, core.ClosedJaxpr):
        return body.jaxpr, body.consts
    return body, [None] * len(body.constvars)


def _bodies(params: dict[str, Any]) -> Iterator[Any]:
    for param in params.values():
        for each in param if isinstance(param, tuple | list) else (param,):
            if isinstance(each, core.ClosedJaxpr | core.Jaxpr):
                yield each


def _share(value: Value, operand: Value) -> None:
    value.root = operand if operand.root is None else operand.root


def _same_bytes(equation: Any) -> bool:
    """Whether XLA makes of an equation with one operand a bitcast, which moves no bytes."""
    name: str = equation.primitive.name
    params = equation.params
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    if name == "reshape":  # with dimensions it transposes too
        return params.get("dimensions") is None
    if name == "broadcast_in_dim":  # of the same size it only adds axes of length 1
        return bool(before.size == after.size)
    if name == "bitcast_convert_type":
        return bool(before.dtype.itemsize == after.dtype.itemsize)
    if name == "convert_element_type":  # a weak type became a strong one
        return bool(before.dtype == after.dtype)
    return name in _SAME_BYTES
