"""Steps that take and return their state by name, in the form that `update` runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from rlx_driver import _pytree
from rlx_driver._ledger import ledger
from rlx_driver.backends.base import Backend, FunctionalBackend
from rlx_driver.errors import DTypeError, ShapeError, UnboundNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

__all__ = ["NamedStep", "Signature"]


class Signature:
    """The names that a step takes.

    Parameters
    ----------
    step
        A callable; one that does not tell its signature takes any name.

    Raises
    ------
    DTypeError
        When it is no callable, or takes something by position alone.
    """

    def __init__(self, step: Any) -> None:
        if not callable(step):
            raise DTypeError(f"a step is a function; got {type(step).__qualname__}")
        self.label = getattr(step, "__name__", type(step).__name__)
        try:
            parameters = list(inspect.signature(step).parameters.values())
        except (TypeError, ValueError):
            self.names: tuple[str, ...] = ()
            self._needed: tuple[str, ...] = ()
            self.takes_any = True
            return
        for each in parameters:
            if each.kind is each.POSITIONAL_ONLY and each.default is each.empty:
                raise DTypeError(
                    f"the step {self.label} takes {each.name!r} by position alone, and a session "
                    f"gives everything by name: def {self.label}(*, ...)"
                )
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = tuple(p.name for p in by_name)
        self._needed = tuple(p.name for p in by_name if p.default is p.empty)
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def require_known(self, names: Iterable[str], what: str) -> None:
        """Raise `UnboundNameError` when the step does not take a name."""
        unknown = [name for name in names if name not in self.names]
        if unknown and not self.takes_any:
            raise UnboundNameError(
                f"the step {self.label} takes no {unknown[0]!r}, which was given as {what}; it "
                f"takes: {', '.join(self.names) or 'nothing'}"
            )

    def require_complete(self, names: Collection[str]) -> None:
        """Raise `UnboundNameError` when something that the step needs was not given."""
        missing = [name for name in self._needed if name not in names]
        if missing:
            raise UnboundNameError(
                f"the step {self.label} needs {', '.join(map(repr, missing))}: give it as "
                f"run({missing[0]}=...), or compile the step with a handle of that name"
            )


class _Origin:
    """What the count of traces asks of a step's code; one for each step that was compiled."""

    def __init__(self, step: Any) -> None:
        code = getattr(inspect.unwrap(step), "__code__", None)
        self.co_qualname: str = getattr(code, "co_qualname", getattr(step, "__name__", "step"))
        self.co_firstlineno: int = getattr(code, "co_firstlineno", 0)


class NamedStep:
    """A step as ``program(state, *values) -> (state, outputs)``.

    Parameters
    ----------
    step
        What the user wrote.
    call
        Calls it with a dict of its state and one of its inputs.
    target
        The framework it runs in.
    state
        Names of the handles, in order. Of one handle `program` takes the array, else a dict.
    values
        Names of the inputs, in order.
    lent
        Those of them that may be memory of buffers, and not the user's own.
    dropped
        Names of handles that inputs stand in for.
    """

    def __init__(
        self,
        step: Any,
        call: Callable[[dict[str, Any], dict[str, Any]], Any],
        target: Backend,
        state: tuple[str, ...],
        single: bool,
        values: tuple[str, ...],
        lent: Collection[str],
        dropped: Collection[str],
    ) -> None:
        self.__name__: str = getattr(step, "__name__", "step")
        self.__code__ = _Origin(step)
        self._call = call
        self._target = target
        self._functional = isinstance(target, FunctionalBackend)
        self._state = state
        self._single = state[0] if single else None
        self._values = values
        self._lent = lent
        self._dropped = dropped

    def __call__(self, state: Any, *values: Any) -> tuple[Any, Any]:
        """Run the step on arrays of its framework."""
        given = state if self._single is None else {self._single: state}
        inputs = dict(zip(self._values, values))  # noqa: B905 - the plan made both
        # The step gets a dict of its own: it may change the one it takes as **kwargs.
        result = self._call(given, inputs)
        if type(result) is not tuple or len(result) != 2:
            self._refuse_form(result)
        new, outputs = result
        if type(new) is not dict and not isinstance(new, Mapping):
            self._refuse_form(result)
        for name in new:
            if name not in given and name not in self._dropped:
                raise ShapeError(
                    f"the step {self.__name__} returned a new state {name!r}, which is no handle "
                    f"of it; its handles are: {', '.join(self._state) or 'none'}"
                )
        if outputs is not None:
            outputs = self._owned(outputs, given, inputs)
        if self._single is not None:
            return self._entry(self._single, new, state), outputs
        return {name: self._entry(name, new, given[name]) for name in given}, outputs

    def _entry(self, name: str, new: Mapping[str, Any], old: Any) -> Any:
        value = new.get(name, old)
        if value is None and old is not None:
            raise ShapeError(
                f"the step {self.__name__} returned None for {name!r}: leave the entry out for a "
                "state that was changed in place, or not at all"
            )
        return value

    def _refuse_form(self, result: Any) -> NoReturn:
        found = type(result).__qualname__
        if isinstance(result, tuple):
            found += f" of {', '.join(type(each).__qualname__ for each in result)}"
        names = ", ".join(f"{name!r}: new_{name}" for name in self._state)
        raise ShapeError(
            f"a step returns a pair: a dict of its new state, and its outputs, as in ({{{names}}}, "
            f"outputs). The step {self.__name__} returned {found}"
        )

    def _owned(self, outputs: Any, given: Any, inputs: dict[str, Any]) -> Any:
        """Copy what aliases memory of the driver, so that outputs are the user's own."""
        flatten, unflatten = _pytree.functions()
        lent = [inputs[name] for name in self._lent]
        memory = (
            [given[self._single], *lent]
            if self._single is not None and not lent
            else flatten((given, lent))[0]
        )
        if self._target.owns(outputs):
            return self._apart(outputs, memory)
        leaves, structure = flatten(outputs)
        mine = [self._apart(leaf, memory) for leaf in leaves]
        if all(new is old for new, old in zip(mine, leaves, strict=True)):
            return outputs
        return unflatten(structure, mine)

    def _apart(self, leaf: Any, memory: list[Any]) -> Any:
        target = self._target
        if not target.owns(leaf):
            return leaf
        for each in memory:
            # A functional framework may forward an input that is returned as it is, and no other.
            if leaf is each or (
                not self._functional and target.owns(each) and target.overlaps(leaf, each)
            ):
                if not self._functional:  # there it is part of the program
                    ledger.count_copy(target.facts(leaf).byte_size, "an output aliased a buffer")
                return target.duplicate(leaf)
        return leaf
