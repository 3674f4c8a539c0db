"""Updates by torch, NumPy and other frameworks that write in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlx_driver import _hooks
from rlx_driver._fence import fence
from rlx_driver._ledger import ledger
from rlx_driver._locks import acquire, release
from rlx_driver.access import written
from rlx_driver.backends.base import Backend, split_aux
from rlx_driver.errors import DTypeError, ShapeError, ZeroCopyError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from rlx_driver._inputs import Inputs
    from rlx_driver.buffer import Buffer

__all__ = ["Structure", "require_backend", "update_mutable"]


@dataclass(frozen=True, slots=True)
class Structure:
    """The structure of a tree of buffers, and how to take such trees apart and together."""

    treedef: Any
    flatten: Callable[[Any], tuple[list[Any], Any]]
    unflatten: Callable[[Any, list[Any]], Any]


def require_backend(target: Backend | ModuleType) -> Backend:
    """Refuse a module without a backend, in which no step can run."""
    if isinstance(target, Backend):
        return target
    raise ZeroCopyError(
        f"update runs a step in a framework with a backend; {target.__name__} has none: write "
        "through a view inside write(...)"
    )


def update_mutable(
    buffers: Sequence[Buffer],
    structure: Structure | None,
    target: Backend,
    step: Callable[..., Any],
    inputs: Inputs,
    has_aux: bool,
) -> Any:
    """Run a step that writes in place, or returns values that are copied into place."""
    taken = [buffer._access for buffer in buffers]
    if len(taken) > 1:
        taken = list(dict.fromkeys(taken))
    reads = inputs.reads(taken)
    # A write scope, spelled out: with the objects of one, a small step costs a third more.
    acquire(taken, reads)
    try:
        fence(taken)
        for access in taken:
            if access.pending is not None or not access.synchronous:
                access.settle()
        views = [_cached_view(buffer, target) for buffer in buffers]
        try:
            with target.writing():
                return _run(buffers, views, structure, target, step, inputs, has_aux)
        finally:
            written(taken)
            for access in taken:
                if not access.synchronous:
                    access.after_native()
            for access in reads:
                access.after_native(wrote=False)
    finally:
        release(taken, reads)


def _run(
    buffers: Sequence[Buffer],
    views: list[Any],
    structure: Structure | None,
    target: Backend,
    step: Callable[..., Any],
    inputs: Inputs,
    has_aux: bool,
) -> Any:
    """Call a step on the views, and copy into place what it returned anew."""
    args, kwargs = inputs.for_framework(target)
    state = views[0] if structure is None else structure.unflatten(structure.treedef, views)
    result = step(state, *args, **kwargs)
    result, aux = split_aux(result, has_aux)
    if result is None:
        return aux  # it changed its argument
    if structure is None and result is state:
        return aux
    news = [result] if structure is None else _flattened(result, structure)
    news = [target.as_array(new) for new in news]
    changed = [
        (buffer, view, _fitting_result(buffer, view, new, target))
        for buffer, view, new in zip(buffers, views, news, strict=True)
        if new is not view and new is not None
    ]
    if not changed:
        return aux
    # A result may be made of another buffer's memory (a swap): take it out before writing.
    values = [
        target.duplicate(new) if any(target.overlaps(new, view) for view in views) else new
        for _, _, new in changed
    ]
    moved = sum(buffer.byte_size for buffer, _, _ in changed)
    ledger.will_copy(moved, "the result was not made in place", "change the argument instead")
    for (_, view, _), value in zip(changed, values, strict=True):
        target.copy_across(view, value)
    return aux


def _cached_view(buffer: Buffer, target: Backend) -> Any:
    view = buffer._views.get(target.name)
    if view is None or _hooks.checker is not None or not target.is_pristine(view):
        return buffer._mutable_view(target, in_scope=True)
    return view


def _flattened(result: Any, structure: Structure) -> list[Any]:
    leaves, found = structure.flatten(result)
    if found != structure.treedef:
        raise ShapeError(
            f"a step returns its state with the structure it came in: {structure.treedef}; this "
            f"one returned {found}. To return more, pass has_aux=True"
        )
    return leaves


def _fitting_result(buffer: Buffer, view: Any, new: Any, target: Backend) -> Any:
    if not target.owns(new):
        source = registry.for_array(new)
        raise DTypeError(
            f"a {target.name} step on {buffer._access.label} returns a {target.name} array; this "
            f"one returned a {type(new).__qualname__}"
            + ("" if source is None else f" of {source.name}")
        )
    if tuple(new.shape) != buffer.shape:
        raise ShapeError(
            f"the step returned shape {tuple(new.shape)} for {buffer._access.label} of shape "
            f"{buffer.shape}. Nothing was copied"
        )
    if new.dtype != view.dtype:
        raise DTypeError(
            f"the step returned {new.dtype} for {buffer._access.label} of {view.dtype}: convert "
            "the result. Nothing was copied"
        )
    return new
