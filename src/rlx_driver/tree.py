"""Trees of buffers: one access, one fence and one program for all, or nothing."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import TYPE_CHECKING, Any

from rlx_driver import _pytree
from rlx_driver._mutable import Structure
from rlx_driver._sharing import resolve
from rlx_driver._update import update_many
from rlx_driver.backends.base import FunctionalBackend
from rlx_driver.buffer import Buffer
from rlx_driver.errors import DTypeError, DuplicateError, ShapeError
from rlx_driver.scopes import ReadScope, WriteScope
from rlx_driver.transfer import commit_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

_access_of = operator.attrgetter("_access")

__all__ = ["commit", "read", "update", "views", "write"]


def views(tree: Any, framework: str | ModuleType) -> Any:
    """Give the views of a tree of buffers, as a tree of the same structure.

    Parameters
    ----------
    tree
        A pytree of `Buffer` and `BufferHandle`; with JAX loaded, any registered pytree.
    framework
        As for `Buffer.array`.

    Returns
    -------
    tree
        Copies: never. Blocks: as `Buffer.numpy`, `Buffer.torch` and `Buffer.jax` do. Aliases: the
        buffers. The JAX arrays may be donated to a jitted function of yours: give its result back
        by `commit`.

    Raises
    ------
    DuplicateError
        When memory stands in the tree twice.
    DTypeError
        When a leaf is no Buffer.
    ZeroCopyError
        When the framework cannot see one of them.
    """
    buffers, structure, unflatten = _flattened(tree)
    target = resolve(framework)
    if isinstance(target, FunctionalBackend):
        return unflatten(structure, [buffer._functional_view(target) for buffer in buffers])
    return unflatten(structure, [buffer._mutable_view(target) for buffer in buffers])


def read(tree: Any, framework: str | ModuleType, *, timeout: float | None = None) -> ReadScope:
    """Read a tree of buffers together with other readers; see `Buffer.read`.

    Raises
    ------
    DuplicateError, DTypeError, ZeroCopyError
        As for `views`.
    """
    buffers, structure, unflatten = _flattened(tree)
    return ReadScope(buffers, framework, timeout, functools.partial(unflatten, structure))


def write(tree: Any, framework: str | ModuleType, *, timeout: float | None = None) -> WriteScope:
    """Write a tree of buffers alone, with one fence for all; see `Buffer.write`.

    Raises
    ------
    DuplicateError, DTypeError, ZeroCopyError
        As for `views`. When an alias blocks the fence of one, no byte of any has changed; arrays
        that `jax` handed out of the others may be dead.
    """
    buffers, structure, unflatten = _flattened(tree)
    return WriteScope(buffers, framework, timeout, functools.partial(unflatten, structure))


def update(
    tree: Any,
    step: Callable[..., Any],
    *args: Any,
    framework: str | ModuleType = "jax",
    has_aux: bool = False,
    static_argnums: int | tuple[int, ...] = (),
    ordered: bool = True,
    **kwargs: Any,
) -> Any:
    """Change a tree of buffers by one step, in place: ``tree <- step(tree, *args, **kwargs)``.

    Parameters
    ----------
    tree
        A pytree of buffers.
    step, args, framework, has_aux, static_argnums, ordered, kwargs
        As for `Buffer.update`; the step takes and returns the whole tree, first.

    Returns
    -------
    aux
        What `has_aux` says, else None.

    Raises
    ------
    DuplicateError
        When memory stands in the tree twice.
    ShapeError, DTypeError, ZeroCopyError, UpdateFailedError
        As for `Buffer.update`, for all buffers or for none.
    """
    target = resolve(framework)
    if isinstance(target, FunctionalBackend):
        flatten, unflatten = target.flatten, target.unflatten
    else:
        flatten, unflatten = _pytree.functions()
    leaves, treedef = flatten(tree)
    return update_many(
        _checked(leaves),
        Structure(treedef, flatten, unflatten),
        step,
        args,
        kwargs,
        framework,
        has_aux,
        static_argnums,
        ordered,
    )


def commit(tree: Any, values: Any) -> None:
    """Take results of your own program over into their buffers.

    Where a value is what the buffer's JAX array was donated to, it lies at the buffer's address
    already: it is taken over, no bytes move, and the epoch grows. The very view that was given out,
    unchanged, changes nothing. Any other value is copied in.

    Parameters
    ----------
    tree
        A pytree of buffers, or one Buffer.
    values
        Arrays of any framework, in the same structure.

    Raises
    ------
    ShapeError, DTypeError
        When structure, shape or dtype of any value does not fit. Nothing was changed.
    ZeroCopyError
        When bytes would move inside `no_copies`, or an alias blocks a fence.
    """
    buffers, structure, _ = _flattened(tree)
    leaves, found = _pytree.functions()[0](values)
    if found != structure:
        raise ShapeError(
            f"the values have the structure {found} and the buffers {structure}. Nothing was "
            "changed"
        )
    commit_all(buffers, leaves)


def _flattened(tree: Any) -> tuple[Sequence[Buffer], Any, Any]:
    flatten, unflatten = _pytree.functions()
    leaves, structure = flatten(tree)
    return _checked(leaves), structure, unflatten


def _checked(leaves: list[Any]) -> list[Buffer]:
    for kind in set(map(type, leaves)):
        if not issubclass(kind, Buffer):
            raise DTypeError(
                "a tree of buffers has Buffers and BufferHandles as its leaves; found "
                f"{kind.__qualname__}"
            )
    buffers: list[Buffer] = leaves
    if len(set(map(_access_of, buffers))) != len(buffers):
        _require_disjoint(buffers)
    return buffers


def _require_disjoint(buffers: list[Buffer]) -> None:
    """Refuse memory that stands twice; disjoint slices of one base may stand side by side."""
    spans: dict[int, list[tuple[int, int, Buffer]]] = {}
    for buffer in buffers:
        facts = buffer._facts
        reach = sum((n - 1) * abs(s) for n, s in zip(facts.shape, facts.strides, strict=True))
        end = facts.address + (reach + facts.dtype.itemsize if facts.num_elements else 0)
        spans.setdefault(id(buffer._access), []).append((facts.address, end, buffer))
    for group in spans.values():
        group.sort(key=lambda span: span[:2])
        for (_, end, _first), (start, _, second) in itertools.pairwise(group):
            same = _first is second
            if start < end or same:
                raise DuplicateError(
                    f"memory of {second._access.label} stands twice in the tree: give every buffer "
                    "once"
                )
