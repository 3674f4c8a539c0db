"""Training state of JAX in handles: parameters, optax states and any other pytree of arrays."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from rlx_driver import dtypes
from rlx_driver.backends.base import ArrayFacts, row_major_strides
from rlx_driver.buffer import Buffer
from rlx_driver.errors import DTypeError, StaleViewError, UnboundNameError
from rlx_driver.integrations._bind import Leaf, joined, laid, require_bindable, require_region
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rlx_driver.backends.base import FunctionalBackend
    from rlx_driver.handle import HandleRegion

__all__ = ["bind_pytree"]


def bind_pytree(
    tree: Any,
    region: HandleRegion,
    *,
    prefix: str = "",
    names: Mapping[str, str] | Callable[[str], str] | None = None,
    take_over: bool = True,
) -> Any:
    """Give a tree of handles for a tree of arrays, such as parameters or an optax state.

    Parameters
    ----------
    tree
        Any registered pytree. Leaves are arrays of any framework, Python numbers (which get the
        dtype that JAX gives them), Buffers, which stay as they are, and ``jax.ShapeDtypeStruct``,
        which ``jax.eval_shape`` makes: those take over a handle that is there. None is no leaf.
    region
        Where; arrays of JAX and torch have to be on its device.
    prefix
        Put before each name, with a slash.
    names
        From the path of a leaf, as ``"0/mu/layer.0.weight"`` (keys, indices and attributes, joined
        by slashes), to the name of its handle. A function; or a mapping from beginnings of paths,
        whole parts, the longest first: ``{"0/mu": "adam/exp_avg"}``. Left out, the path itself.
    take_over
        A handle of the name, shape and dtype that the region has already is taken as it is, with
        the values *it* holds: that is how JAX goes on with what torch has trained. False: a name
        that is taken is an error.

    Returns
    -------
    tree
        Handles in the structure of `tree`, for `rlx_driver.views`, `update` and `commit`.

    Notes
    -----
    Copies: once, the values of leaves that get a new handle, as the ledger says. Blocks: until
    they are there. Aliases: nothing of `tree`.

    Raises
    ------
    ShapeError, DTypeError
        A handle to take over has another shape or dtype; a leaf is no array of numbers (a typed
        key, a string), or of a dtype that JAX narrows without x64.
    DuplicateError
        Two leaves get one name, or a name is taken.
    UnboundNameError
        A ``ShapeDtypeStruct`` has no handle; a key of `names` begins no path.
    DeviceUnavailableError
        A leaf lives on another device than the region, or on several.
    StaleViewError
        A leaf is traced, or was donated.
    ClosedHandleError, OutOfDeviceMemory
        Of the region. On any error nothing was bound.
    """
    require_region(region)
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    found = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in paths]
    name_of = names if callable(names) else _renaming(names or {}, [path for path, _ in found])
    leaves = {
        i: _leaf(path, _named(prefix, path, name_of), leaf, region)
        for i, (path, leaf) in enumerate(found)
        if not isinstance(leaf, Buffer)
    }
    with laid(region, list(leaves.values()), take_over=take_over) as handles:
        return jax.tree_util.tree_unflatten(
            treedef,
            [handles[leaves[i].name] if i in leaves else leaf for i, (_, leaf) in enumerate(found)],
        )


def _named(prefix: str, path: str, name_of: Callable[[str], str]) -> str:
    name = name_of(path)
    if not isinstance(name, str):
        raise DTypeError(f"names gave {name!r} for the leaf {path!r}, which is no text")
    return joined(prefix, name)


def _renaming(names: Mapping[str, str], paths: list[str]) -> Callable[[str], str]:
    """Give the function that a mapping from beginnings of paths stands for."""
    longest_first = sorted(names, key=len, reverse=True)

    def begins(path: str, start: str) -> bool:
        return not start or path == start or path.startswith(f"{start}/")

    for start in names:
        if not any(begins(path, start) for path in paths):
            raise UnboundNameError(
                f"names has {start!r}, and no leaf's path begins so: they are "
                f"{', '.join(map(repr, paths)) or 'none'}. Nothing was bound"
            )

    def name(path: str) -> str:
        for start in longest_first:
            if begins(path, start):
                return joined(names[start], path[len(start) :].lstrip("/"))
        return path

    return name


def _leaf(path: str, name: str, value: Any, region: HandleRegion) -> Leaf:
    """Describe the handle for a leaf, which must be fit to live in one."""
    what = f"the leaf {path!r}"
    if isinstance(value, jax.core.Tracer):
        raise StaleViewError(
            f"{what} is traced: bind outside of jit, and pass the views in. Nothing was bound"
        )
    if isinstance(value, jax.ShapeDtypeStruct):
        return Leaf(name, tuple(value.shape), _dtype(what, value, region), must_exist=True)
    if isinstance(value, (bool, int, float, complex)):
        try:
            value = np.asarray(value, jnp.result_type(value))
        except OverflowError as error:
            raise DTypeError(f"{what} is too large: {error}. Nothing was bound") from error
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, jax.Array) and value.is_deleted():
        raise StaleViewError(f"{what} was deleted or donated. Nothing was bound")
    source = registry.for_array(value)
    if source is None:
        raise DTypeError(
            f"{what} is a {type(value).__qualname__}, which no handle can hold: handles are made "
            "for arrays and numbers. Nothing was bound"
        )
    dtype = _dtype(what, value, region)
    facts = source.facts(value)
    if source.name == "numpy":  # values for any device
        facts = dataclasses.replace(facts, device=region.device)
    require_bindable(what, facts, region, in_place=False)
    return Leaf(name, facts.shape, dtype, value)


def _dtype(what: str, value: Any, region: HandleRegion) -> np.dtype[Any]:
    """Give the dtype of the handle for a value, which JAX must be able to see."""
    if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        raise DTypeError(
            f"{what} is a typed key, whose bytes JAX keeps to itself: bind "
            "jax.random.key_data(key), and wrap_key_data in the step. Nothing was bound"
        )
    shape, dtype = tuple(value.shape), dtypes.info(value.dtype).dtype
    strides = row_major_strides(shape, dtype.itemsize)
    target = cast("FunctionalBackend", registry.get("jax"))
    obstacle = target.obstacle(ArrayFacts(0, shape, strides, dtype, region.device))
    if obstacle is not None:
        raise DTypeError(
            f"{what} cannot be seen by JAX in a handle: {obstacle.text}; {obstacle.remedy}. "
            "Nothing was bound"
        )
    return dtype
