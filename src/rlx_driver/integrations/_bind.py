"""Handles for state that exists already: all of it checked, made and filled, or nothing."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlx_driver.errors import (
    ClosedHandleError,
    DeviceUnavailableError,
    DTypeError,
    DuplicateError,
    ShapeError,
    UnboundNameError,
    ZeroCopyError,
)
from rlx_driver.handle import BufferHandle, HandleRegion
from rlx_driver.transfer import span_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np

    from rlx_driver.backends.base import ArrayFacts

__all__ = ["Leaf", "joined", "laid", "require_apart", "require_bindable", "require_region"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array that is to live in a handle.

    Attributes
    ----------
    name, shape, dtype
        Of the handle.
    value
        What to fill a new handle with; None leaves zeros.
    must_exist
        There is no value, so the region has to have the handle already.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    value: Any = None
    must_exist: bool = False


def joined(*parts: str) -> str:
    """Join the parts of a name, those that are not empty, by slashes."""
    return "/".join(part for part in parts if part)


def require_region(region: Any) -> None:
    """Refuse what is no open region."""
    if not isinstance(region, HandleRegion):
        raise DTypeError(
            f"state is bound into a HandleRegion; got {type(region).__qualname__}. Nothing was "
            "bound"
        )
    if region.is_closed:
        raise ClosedHandleError(f"{region!r} is closed: make a new region. Nothing was bound")


def require_bindable(
    what: str, facts: ArrayFacts, region: HandleRegion, *, in_place: bool = True
) -> None:
    """Refuse an array that a handle of the region cannot hold, or `in_place`, not stand in for."""
    if facts.obstacle is not None and not facts.obstacle.copyable:
        kind = DTypeError if facts.obstacle.kind == "dtype" else ZeroCopyError
        raise kind(
            f"{what} cannot live in a handle: {facts.obstacle.text}; {facts.obstacle.remedy}. "
            "Nothing was bound"
        )
    if facts.device != region.device:
        raise DeviceUnavailableError(
            f"{what} is on {facts.device} and the region on {region.device}: move it there first, "
            f"or make a HandleRegion({str(facts.device)!r}). Nothing was bound"
        )
    if in_place and facts.overlaps_itself:
        raise ZeroCopyError(
            f"{what} of shape {facts.shape} and strides {facts.strides} has elements that share "
            "memory, as expand() gives: make it compact with .contiguous(). Nothing was bound"
        )


def require_apart(named: Iterable[tuple[str, ArrayFacts]]) -> None:
    """Refuse different arrays on the same bytes: in handles of their own they would part."""
    spans = sorted((*span_of(facts), name) for name, facts in named if facts.num_elements)
    for i, (_, end, first) in enumerate(spans[:-1]):
        start, _, second = spans[i + 1]
        if start < end:
            raise DuplicateError(
                f"{first} and {second} are different tensors on the same memory, and would part in "
                "handles of their own: tie them by using one Parameter in both places, or clone "
                "one. Nothing was bound"
            )


@contextmanager
def laid(
    region: HandleRegion, leaves: Sequence[Leaf], *, take_over: bool
) -> Iterator[dict[str, BufferHandle]]:
    """Give a filled handle for each leaf; an error, also in the block, takes the new ones back.

    Raises
    ------
    DuplicateError
        Two leaves have one name, or a name is taken and `take_over` is off.
    ShapeError, DTypeError
        A handle that is there has another shape or dtype.
    UnboundNameError
        A leaf without a value has no handle.
    """
    with region._lock:
        seen: set[str] = set()
        for leaf in leaves:
            if not isinstance(leaf.name, str) or not leaf.name:
                raise DTypeError(
                    f"a handle needs a name, and one would be {leaf.name!r}: give a prefix. "
                    "Nothing was bound"
                )
            if leaf.name in seen:
                raise DuplicateError(
                    f"two arrays would live in the handle {leaf.name!r}: give them names of their "
                    "own. Nothing was bound"
                )
            seen.add(leaf.name)
            _require_fitting(region, leaf, take_over)
        there = {leaf.name: region[leaf.name] for leaf in leaves if leaf.name in region}
        new = [leaf for leaf in leaves if leaf.name not in there]
        made = region.create({leaf.name: (leaf.shape, leaf.dtype) for leaf in new}) if new else {}
    try:
        for leaf in new:
            if leaf.value is not None:
                made[leaf.name].copy_from(leaf.value)
        yield {leaf.name: there.get(leaf.name) or made[leaf.name] for leaf in leaves}
    except BaseException:
        for handle in made.values():
            handle.close()
        raise


def _require_fitting(region: HandleRegion, leaf: Leaf, take_over: bool) -> None:
    if leaf.name not in region:
        if leaf.must_exist:
            known = ", ".join(handle.name for handle in region) or "none"
            raise UnboundNameError(
                f"{leaf.name!r} has a shape and no value, and {region!r} has no handle of the "
                f"name to take over; it has: {known}. Nothing was bound"
            )
        return
    if not take_over:
        raise DuplicateError(
            f"{region!r} has a handle {leaf.name!r} already: give a prefix, close it, or say "
            "take_over=True to go on with what it holds. Nothing was bound"
        )
    handle = region[leaf.name]
    if handle.shape != leaf.shape:
        raise ShapeError(
            f"{leaf.name!r} has shape {leaf.shape} and the handle of that name {handle.shape}. "
            "Nothing was bound"
        )
    if handle.dtype != leaf.dtype:
        raise DTypeError(
            f"{leaf.name!r} is {leaf.dtype.name} and the handle of that name {handle.dtype.name}. "
            "Nothing was bound"
        )
