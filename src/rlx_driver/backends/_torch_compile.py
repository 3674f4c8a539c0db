"""Steps of sessions in torch: compiled by ``torch.compile``, or called as they are."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from rlx_driver import _pytree
from rlx_driver.errors import DTypeError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["named_step", "probe_static_address"]

_OPTIONS = ("dynamic", "mode", "fullgraph", "backend", "options")
_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def probe_static_address(
    candidate: Callable[[torch.Tensor], None] | None = None,
) -> Callable[[torch.Tensor], None]:
    """Give what tells the compiler that a tensor stays where it is, or nothing in its place.

    It spares captured graphs a copy of each input. The function is in a private module; without it
    the same programs run with that copy.
    """
    if candidate is None:
        import torch._dynamo

        candidate = getattr(torch._dynamo, "mark_static_address", None)
    if candidate is not None:
        with suppress(Exception):  # whatever a private function may raise
            candidate(torch.zeros(1))
            return candidate
    return lambda tensor: None


def named_step(
    step: Callable[..., Any], options: dict[str, Any]
) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    """Give what calls a step with a dict of its state and one of its inputs.

    Raises
    ------
    DTypeError
        For options that ``torch.compile`` does not take.
    """
    known = dict(options)
    eager = known.pop("eager", False)
    unknown = [name for name in known if name not in _OPTIONS]
    if unknown:
        raise DTypeError(
            f"torch takes no option {unknown[0]!r} for a step; it takes eager=True, or those of "
            f"torch.compile: {', '.join(_OPTIONS)}"
        )
    if eager:
        if known:
            raise DTypeError(
                f"eager=True calls the step as it is, so that {', '.join(known)} would mean nothing"
            )
        return lambda state, inputs: step(**state, **inputs)
    try:
        compiled = torch.compile(step, **known)
    except Exception as error:
        raise DTypeError(f"torch.compile refuses {known}: {error}") from error
    return _Compiled(compiled, _captures(known))


def _captures(options: dict[str, Any]) -> bool:
    own = options.get("options") or {}
    return options.get("mode") in _GRAPH_MODES or bool(own.get("triton.cudagraphs"))


class _Compiled:
    """A compiled step; its state is said to stay where it is."""

    def __init__(self, compiled: Callable[..., Any], captures: bool) -> None:
        self._compiled = compiled
        self._captures = captures
        self._mark = probe_static_address()
        # By identity: tensors compare by value. Weakly: a closed handle's memory is to be freed.
        self._marked: dict[int, weakref.ref[torch.Tensor]] = {}

    def __call__(self, state: dict[str, Any], inputs: dict[str, Any]) -> Any:
        for value in state.values():
            if isinstance(value, torch.Tensor):
                self._pin(value)
            else:
                for leaf in _pytree.functions()[0](value)[0]:
                    self._pin(leaf)
        if not self._captures:
            return self._compiled(**state, **inputs)
        # What a captured graph returns is its own memory, which its next replay overwrites.
        torch.compiler.cudagraph_mark_step_begin()
        return _cloned(self._compiled(**state, **inputs))

    def _pin(self, tensor: torch.Tensor) -> None:
        known = self._marked.get(id(tensor))
        if known is None or known() is not tensor:
            self._mark(tensor)
            self._marked[id(tensor)] = weakref.ref(tensor)


def _cloned(result: Any) -> Any:
    """Copy the outputs of a step; its state is copied into the handles before the next run."""
    if not isinstance(result, tuple) or len(result) != 2:
        return result  # it is refused by who called
    flatten, unflatten = _pytree.functions()
    leaves, structure = flatten(result[1])
    own = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return result[0], unflatten(structure, own)
