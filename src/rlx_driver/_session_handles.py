"""What a session takes as handles: handles, names, trees of them, shapes with dtypes, arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver import _pytree, dtypes
from rlx_driver._slices import shape_of
from rlx_driver.buffer import Buffer
from rlx_driver.errors import (
    DeviceUnavailableError,
    DTypeError,
    DuplicateError,
    ShapeError,
    UnboundNameError,
)
from rlx_driver.handle import BufferHandle
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from rlx_driver.device import Device

__all__ = [
    "Spec",
    "described",
    "filled",
    "leaves_of",
    "lookup",
    "named",
    "planned_tree",
    "same_handles",
]

_NUMBERS = (bool, int, float, complex, np.generic)


@dataclass(frozen=True, slots=True)
class Spec:
    """A handle to be made: its name in the region, what it is, and what it begins with."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    initial: Any = None


def named(handles: Any) -> dict[str, Any]:
    """Give what was passed as ``handles=`` by name; None stands for one the session has.

    Raises
    ------
    DTypeError, DuplicateError
        When it is no list of handles and names and no dict, or has a name twice.
    """
    if isinstance(handles, Mapping):
        for name in handles:
            if not isinstance(name, str):
                raise DTypeError(f"handles have strings as their names; got {name!r}")
        return dict(handles)
    if isinstance(handles, (str, Buffer)) or not isinstance(handles, Sequence):
        raise DTypeError(
            "handles= takes a list of handles and names, or a dict from names to handles, trees "
            f"of them, (shape, dtype) or arrays; got {type(handles).__qualname__}"
        )
    found: dict[str, Any] = {}
    for each in handles:
        name = each if isinstance(each, str) else getattr(each, "name", None)
        if not isinstance(each, (str, BufferHandle)) or not isinstance(name, str):
            raise DTypeError(
                "a list of handles has BufferHandles, and names of the session's, in it; found "
                f"{type(each).__qualname__}: give anything else by name, handles={{'kv': ...}}"
            )
        if name in found:
            raise DuplicateError(f"the handle {name!r} was given twice")
        found[name] = None if isinstance(each, str) else each
    return found


def planned_tree(name: str, value: Any, device: Device) -> Any:
    """Give a tree whose leaves are Buffers, or a `Spec` for each handle to be made.

    Raises
    ------
    ShapeError, DTypeError, DeviceUnavailableError
        When a leaf is none of what a session takes, or lives elsewhere.
    """
    if isinstance(value, Buffer):
        if value.device != device:
            raise DeviceUnavailableError(
                f"the handle {name!r} lives on {value.device} and the session on {device}"
            )
        return value
    if _is_spec(value):
        return Spec(name, shape_of(value[0]), dtypes.info(value[1]).dtype)
    source = registry.for_array(value)
    if source is not None:
        facts = source.facts(value)
        if facts.obstacle is not None and not facts.obstacle.copyable:
            raise DTypeError(f"the initial value of {name!r} cannot be copied: {facts.obstacle}")
        return Spec(name, facts.shape, facts.dtype, value)
    if isinstance(value, dict):
        return {key: planned_tree(f"{name}.{key}", each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)) and value:
        parts = [planned_tree(f"{name}.{i}", each, device) for i, each in enumerate(value)]
        if hasattr(value, "_fields"):
            return type(value)(*parts)
        return parts if isinstance(value, list) else tuple(parts)
    raise DTypeError(
        f"the handle {name!r} is to be a handle, a pair (shape, dtype), an array, or a dict, list "
        f"or tuple of these; got {value!r}"
    )


def _is_spec(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or hasattr(value, "_fields"):
        return False
    shape, dtype = value
    is_shape = isinstance(shape, (int, np.integer)) or (
        isinstance(shape, (tuple, list)) and all(isinstance(n, (int, np.integer)) for n in shape)
    )
    # Neither a handle nor an array, which have dtypes but are none.
    return (
        is_shape
        and not isinstance(dtype, (int, tuple, list, dict, Buffer))
        and not (hasattr(dtype, "shape") and not isinstance(dtype, (type, np.dtype)))
    )


def leaves_of(tree: Any) -> list[Any]:
    """Give the leaves of a tree of Buffers, specs or arrays."""
    leaves: list[Any] = _pytree.functions()[0](tree)[0]
    return leaves


def described(name: str, have: Any, asked: Any, *, cast: bool = False) -> None:
    """Compare a tree of arrays, or of specs, with the handles of a name.

    Raises
    ------
    ShapeError, DTypeError
        When structure, shape or dtype differ. Nothing was changed.
    """
    flatten = _pytree.functions()[0]
    handles, structure = flatten(have)
    values, found = flatten(asked)
    if found != structure:
        raise ShapeError(
            f"{name!r} has the structure {structure}; what was given has {found}. Nothing was "
            "changed"
        )
    for handle, value in zip(handles, values, strict=True):
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise DTypeError(
                f"{name!r} needs an array of {handle.dtype.name}{list(handle.shape)}; got "
                f"{type(value).__qualname__}. Nothing was changed"
            )
        if tuple(value.shape) != handle.shape:
            raise ShapeError(
                f"{name!r} has the shape {handle.shape}; what was given has "
                f"{tuple(value.shape)}. Nothing was changed"
            )
        if not cast and dtypes.dtype(value.dtype) != handle.dtype:
            raise DTypeError(
                f"{name!r} has the dtype {handle.dtype.name}; what was given has "
                f"{dtypes.dtype(value.dtype).name}: convert it. Nothing was changed"
            )


def lookup(handles: Mapping[str, Any], name: str, whose: str) -> Any:
    """Give the handle, or the tree of handles, of a name.

    Raises
    ------
    UnboundNameError
        When there is none; the text says which there are.
    """
    if name not in handles:
        known = ", ".join(handles) or "none"
        raise UnboundNameError(f"{whose} has no handle {name!r}; it has: {known}")
    return handles[name]


def filled(name: str, tree: Any, initial: Any) -> Any:
    """Give the values for a tree of handles, with host arrays in the place of numbers."""
    flatten, unflatten = _pytree.functions()
    buffers, structure = flatten(tree)
    if isinstance(initial, _NUMBERS):
        initial = unflatten(structure, [initial] * len(buffers))
    values, found = flatten(initial)
    if found == structure:  # else there is an error to come
        pairs = zip(buffers, values, strict=True)
        values = [
            _filled(name, buffer, value) if isinstance(value, _NUMBERS) else value
            for buffer, value in pairs
        ]
    return unflatten(found, values)


def _filled(name: str, buffer: Buffer, number: Any) -> Any:
    array = np.empty(buffer.shape, buffer.dtype)
    try:
        array[...] = number.item() if isinstance(number, np.generic) else number
    except (OverflowError, TypeError, ValueError) as error:
        raise DTypeError(
            f"{number!r} does not fit {name!r} of {buffer.dtype.name}: {error}. Nothing was changed"
        ) from error
    return array


def same_handles(name: str, have: Any, asked: Any) -> Any:
    """Give the handles that a session has, when they are the ones that are asked for."""
    wanted = leaves_of(asked)
    if [*map(id, leaves_of(have))] == [*map(id, wanted)]:
        return have
    if any(isinstance(leaf, Buffer) or leaf.initial is not None for leaf in wanted):
        raise DuplicateError(
            f"the session has another handle {name!r} already: choose a name, or give "
            f"handles=[{name!r}] and bind it"
        )
    described(name, have, asked)
    return have
