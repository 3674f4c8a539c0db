"""Trees of containers without a framework: dicts, lists, tuples, named tuples and None.

Used until JAX is loaded; then JAX's registry of pytrees, which users extend, takes over.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["flatten", "functions", "unflatten"]


def functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Give the functions that take trees apart and together: JAX's once it is loaded."""
    if "jax" in sys.modules:
        jax: Any = registry.get("jax")
        return jax.flatten, jax.unflatten
    return flatten, unflatten


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Give the leaves, dict keys sorted as JAX does, and a structure that compares by value."""
    leaves: list[Any] = []
    structure = _walk(tree, leaves)
    return leaves, structure


def unflatten(structure: Any, leaves: list[Any]) -> Any:
    """Put a tree together again."""
    return _build(structure, iter(leaves))


def _walk(node: Any, leaves: list[Any]) -> Any:
    if node is None:
        return ("none",)
    kind = type(node)
    if kind is dict:
        keys = sorted(node)
        return ("dict", tuple(keys), tuple(_walk(node[key], leaves) for key in keys))
    if kind is list or isinstance(node, tuple):
        return (kind, tuple(_walk(child, leaves) for child in node))
    leaves.append(node)
    return ("leaf",)


def _build(structure: Any, leaves: Iterator[Any]) -> Any:
    kind = structure[0]
    if kind == "leaf":
        return next(leaves)
    if kind == "none":
        return None
    if kind == "dict":
        _, keys, parts = structure
        return {key: _build(part, leaves) for key, part in zip(keys, parts, strict=True)}
    children = [_build(part, leaves) for part in structure[1]]
    return kind(*children) if hasattr(kind, "_fields") else kind(children)
