"""The arguments of a step: Buffers in them are read-locked and become views, the rest is safe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlx_driver import _pytree
from rlx_driver.backends.base import Backend, FunctionalBackend
from rlx_driver.errors import ShapeError, StaleViewError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlx_driver.access import Access

__all__ = ["Inputs", "static_positions"]


class Inputs:
    """What a step takes beside its state.

    Parameters
    ----------
    args, kwargs
        As the caller gave them; Buffers may stand anywhere in them.
    static
        Positions of static arguments, the state being 0; those are left alone.
    plain
        Types that the framework takes as they are; where there are no others, nothing is to do.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        static: int | tuple[int, ...],
        plain: frozenset[type] = frozenset(),
    ) -> None:
        self.static = static_positions(static)
        self._given = args, kwargs
        self._plain = not kwargs and plain.issuperset(map(type, args))
        self._buffers: list[Any] = []
        if self._plain:
            return
        self._fixed = {i: value for i, value in enumerate(args) if i + 1 in self.static}
        free = tuple(None if i in self._fixed else value for i, value in enumerate(args))
        flatten, self._unflatten = _pytree.functions()
        self._leaves, self._structure = flatten((free, kwargs))
        self._buffers = [leaf for leaf in self._leaves if hasattr(leaf, "__rlx_native__")]

    def reads(self, writes: Sequence[Access]) -> list[Access]:
        """Give the accesses of the Buffers among them, to be taken together with the state's.

        Raises
        ------
        StaleViewError
            When one is memory of the state.
        """
        if not self._buffers:
            return []
        for buffer in self._buffers:
            buffer._materialise()
        reads = list(dict.fromkeys(buffer._access for buffer in self._buffers))
        for access in reads:
            if access in writes:
                raise StaleViewError(
                    f"{access.label} is being written by this update and is an argument of it too: "
                    "the step has it as its first argument. Nothing was changed"
                )
        return reads

    def for_framework(self, target: Backend) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the arguments to call with, inside the accesses that `reads` named."""
        if self._plain:
            return self._given
        plain = target.plain_arguments
        leaves = [
            leaf if type(leaf) in plain else self._safe(leaf, target) for leaf in self._leaves
        ]
        args, kwargs = self._unflatten(self._structure, leaves)
        args = tuple(self._fixed.get(i, value) for i, value in enumerate(args))
        return args, kwargs

    def _safe(self, leaf: Any, target: Backend) -> Any:
        if hasattr(leaf, "__rlx_native__"):
            if isinstance(target, FunctionalBackend):
                return leaf._functional_view(target, in_scope=True)
            leaf._access.settle(writes=False)
            return leaf._mutable_view(target, in_scope=True)
        return target.argument(leaf)


def static_positions(static: int | Sequence[int]) -> tuple[int, ...]:
    """Give the positions of a step's static arguments as a tuple.

    Raises
    ------
    ShapeError
        When the state, at position 0, is among them.
    """
    positions = (static,) if isinstance(static, int) else tuple(static)
    if 0 in positions:
        raise ShapeError(
            "static_argnums names position 0, which is the state: it is donated and cannot be "
            "static; the arguments begin at 1"
        )
    return positions
