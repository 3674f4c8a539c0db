"""Sharing memory under verification: who is meant, what is in the way, and was it really shared."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from rlx_driver._ledger import ledger
from rlx_driver.backends.base import ArrayFacts, Backend, Obstacle
from rlx_driver.errors import DriverError, UnknownFrameworkError, ZeroCopyError
from rlx_driver.registry import registry

__all__ = [
    "facts_of",
    "name_of",
    "obstacle_to",
    "resolve",
    "share_verified",
    "title_of",
    "verify",
]

_MODULES = {
    "numpy": "numpy",
    "torch": "torch",
    "jax": "jax",
    "jax.numpy": "jax",
    "array_api_compat.numpy": "numpy",
    "array_api_compat.torch": "torch",
}


def resolve(framework: str | ModuleType) -> Backend | ModuleType:
    """Give the backend, or the module with ``from_dlpack``, that a caller means.

    Raises
    ------
    UnknownFrameworkError
        When it is neither.
    """
    if isinstance(framework, str):
        return registry.get(framework)
    name = getattr(framework, "__name__", "")
    if name in _MODULES:
        return registry.get(_MODULES[name])
    if isinstance(framework, ModuleType) and hasattr(framework, "from_dlpack"):
        return framework
    raise UnknownFrameworkError(
        f"{framework!r} names no framework: give 'numpy', 'torch', 'jax', the name of a "
        "registered backend, or a module that has from_dlpack"
    )


def verify(result: Any, source: ArrayFacts, target: ArrayFacts, *, may_copy: bool = False) -> None:
    """Compare what an importer gave with what it was given.

    Parameters
    ----------
    result
        What it gave, for the text of the error.
    source, target
        What went in and what came out.
    may_copy
        A copy is fine, and is noted in the ledger; a change of dtype or shape never is.

    Raises
    ------
    ZeroCopyError
        When dtype, shape, address or strides differ.
    """
    changed = [
        f"{what} {ours} became {theirs}"
        for what, ours, theirs in (
            ("dtype", source.dtype, target.dtype),
            ("shape", source.shape, target.shape),
            ("device", _place(source), _place(target)),
        )
        if ours != theirs
    ]
    moved = [
        f"{what} {ours} became {theirs}"
        for what, ours, theirs in (
            ("address", hex(source.address), hex(target.address)),
            ("strides", _telling(source), _telling(target)),
        )
        if ours != theirs and source.num_elements
    ]
    if moved and not changed and may_copy:
        ledger.will_copy(source.byte_size, f"the importer of {type(result).__qualname__} copied")
    elif changed or moved:
        raise ZeroCopyError(
            f"the importer behind {type(result).__qualname__} did not share: "
            f"{'; '.join(changed + moved)}"
            + ("" if changed else ". Use copy=None or copy=True to take a copy")
        )


def _place(facts: ArrayFacts) -> str:
    # JAX may show the one host as several devices.
    return "cpu" if facts.device.is_host else str(facts.device)


def _telling(facts: ArrayFacts) -> tuple[int, ...]:
    """Give the strides of the axes whose stride means something."""
    return tuple(s for s, n in zip(facts.strides, facts.shape, strict=True) if n > 1)


def share_verified(
    x: Any,
    facts: ArrayFacts,
    target: Backend | ModuleType,
    *,
    may_copy: bool = False,
    may_be_fake: bool = False,
) -> Any:
    """Import without a copy and compare; every refusal becomes a `ZeroCopyError`."""
    try:
        if isinstance(target, Backend):
            result = target.share(x, facts)
            if not target.is_concrete(result):
                if may_be_fake:
                    return result
                raise ZeroCopyError(
                    f"{name_of(target)} is under a mode or a transform in which an import has no "
                    "memory of its own (a fake or traced value): exchange outside of it"
                )
            found = target.facts(result)
        else:
            exporter = registry.get("numpy").exporter(x) if isinstance(x, np.ndarray) else x
            result = target.from_dlpack(exporter)
            found = facts_of(result)
    except UnknownFrameworkError as error:
        raise ZeroCopyError(f"{name_of(target)}.from_dlpack gave no array: {error}") from error
    except DriverError:
        raise
    except Exception as error:  # frameworks raise many types for one refusal
        raise ZeroCopyError(
            f"{name_of(target)} refused {title_of(x, facts)}: {error}. Use copy=None to take a "
            "copy where one helps"
        ) from error
    verify(result, facts, found, may_copy=may_copy)
    return result


def obstacle_to(facts: ArrayFacts, target: Backend | ModuleType) -> Obstacle | None:
    """Say why a target cannot share such an array, its source's own reason included."""
    theirs = None
    if facts.obstacle is not None and not facts.obstacle.copyable:
        return facts.obstacle
    if isinstance(target, Backend):
        theirs = target.obstacle(facts)
    if theirs is not None and not theirs.copyable:
        return theirs
    if facts.obstacle is not None or isinstance(target, Backend):
        return facts.obstacle or theirs
    if any(stride < 0 for stride in facts.strides):
        return Obstacle(
            "strides",
            "its strides are negative, which importers may abort on",
            "copy it (copy=None)",
        )
    return None


def facts_of(x: Any) -> ArrayFacts:
    """Describe any array."""
    backend = registry.for_array(x)
    if backend is not None:
        return backend.facts(x)
    from rlx_driver._foreign import foreign_facts  # loads ctypes, which an import is not to pay

    return foreign_facts(x)


def name_of(target: Backend | ModuleType) -> str:
    """Give the name of a target for messages."""
    return target.name if isinstance(target, Backend) else target.__name__


def title_of(x: Any, facts: ArrayFacts) -> str:
    """Describe an array for messages."""
    # With an obstacle the facts may stand for what could not be found out.
    kind = facts.dtype.name if facts.obstacle is None else getattr(x, "dtype", "unknown")
    return f"{type(x).__qualname__} of shape {facts.shape} and dtype {kind}"
