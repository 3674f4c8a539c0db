"""Fake tensors in place of real ones: a program of torch that has shapes and storages, no bytes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._python_dispatch import TorchDispatchMode

from rlx_driver.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Fakes", "leaves"]

try:
    from torch.utils._pytree import tree_leaves as _registered_leaves
    from torch.utils._pytree import tree_map as _registered_map
except ImportError:  # then containers of Python's own are all that is looked into
    _registered_leaves = _registered_map = None

_LITERALS = {"aten::lift", "aten::lift_fresh", "aten::lift_fresh_copy"}


def leaves(tree: Any) -> list[Any]:
    """Give the leaves of a pytree."""
    if _registered_leaves is not None:
        return list(_registered_leaves(tree))
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, list | tuple):
        return [leaf for child in tree for leaf in leaves(child)]
    return [tree]


def _map(one: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map(one, child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        children = [_map(one, child) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return one(tree)


class Fakes(TorchDispatchMode):  # type: ignore[misc]
    """A fake tensor mode, in front of which every real tensor becomes a fake one.

    FakeTensorMode alone runs an operator for real where all its tensors are real: a layer's
    ``count.add_(1)`` would count the trace. Real tensors seen have their gradients set back at the
    end, as a traced ``backward()`` leaves fake ones.

    Parameters
    ----------
    tensors
        What is going to be used. If one of them is fake, its mode is taken.
    """

    def __init__(self, tensors: list[Any]) -> None:
        super().__init__()
        modes = [each.fake_mode for each in tensors if isinstance(each, FakeTensor)]
        # Without fallbacks: those allocate and run an operator that has no rule for fake tensors.
        self.mode = (
            modes[0]
            if modes
            else FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
        )
        self._grads: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._foreign: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Measured here, where the real ones are still asked and not their fakes.
        self._sparse: dict[int, tuple[torch.Tensor, int]] = {
            id(each): (each, _sparse_bytes(each))
            for each in tensors
            if isinstance(each, torch.Tensor)
            and not isinstance(each, FakeTensor)
            and each.layout is not torch.strided
        }

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make both modes current."""
        try:
            with self.mode, self:
                yield
        finally:
            for tensor, grad in self._grads.values():
                tensor.grad = grad
            self._grads.clear()

    def tree(self, tree: Any, own: bool = False) -> Any:
        """Give a pytree with its tensors as fake ones, none of them the caller's if `own`."""
        one = self._own if own else self.one
        return _map(one, tree) if _registered_map is None else _registered_map(one, tree)

    def one(self, value: Any) -> Any:
        """Give a tensor as a fake one of this mode, the same one each time; others as they are."""
        if not isinstance(value, torch.Tensor):
            return value
        if isinstance(value, FakeTensor):
            return value if value.fake_mode is self.mode else self._rebuilt(value)
        if value.is_leaf and id(value) not in self._grads:
            self._grads[id(value)] = (value, value.grad)
        with disable_proxy_modes_tracing():  # making it is no part of the program
            fake = self.mode.from_tensor(value, static_shapes=True)
        if id(value) in self._sparse:
            self._sparse[id(fake)] = (fake, self._sparse[id(value)][1])
        return fake

    def _own(self, value: Any) -> Any:
        fake = self.one(value)
        if not isinstance(fake, torch.Tensor):
            return fake
        own = fake.detach().requires_grad_(fake.requires_grad)
        if id(fake) in self._sparse:
            self._sparse[id(own)] = (own, self._sparse[id(fake)][1])
        return own

    def _rebuilt(self, foreign: FakeTensor) -> Any:
        """Give a fake tensor like one of another mode."""
        if id(foreign) in self._foreign:
            return self._foreign[id(foreign)][1]
        if not all(type(n) is int for n in (*foreign.shape, *foreign.stride())):
            raise PlanError(
                f"a tensor has the shape {tuple(foreign.shape)}, which depends on a symbol; pass "
                "example arguments whose shapes are known"
            )
        with disable_proxy_modes_tracing(), self.mode:
            fake = torch.empty_strided(
                foreign.shape, foreign.stride(), dtype=foreign.dtype, device=foreign.device
            )
        self._foreign[id(foreign)] = (foreign, fake)
        return fake

    def sparse_bytes(self, fake: torch.Tensor) -> int | None:
        """Give the bytes of the real sparse tensor that a fake one stands for; fake ones forget."""
        known = self._sparse.get(id(fake))
        return None if known is None else known[1]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator on fake tensors; a literal is left to torch, which knows its value."""
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None or schema.name not in _LITERALS:
            args = self._arguments(args)
            kwargs = {key: self._arguments(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.one(value)
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(self._arguments(each) for each in value)
        return value


def _sparse_bytes(tensor: torch.Tensor) -> int:
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return sum(int(part.nbytes) for part in parts)
