"""Tensors that exist already, put on the memory of handles; and who keeps them there."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlx_driver.backends._torch_tensors import TO_TORCH
from rlx_driver.errors import ZeroCopyError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rlx_driver.backends.base import Backend
    from rlx_driver.handle import BufferHandle

__all__ = [
    "Bound",
    "attach",
    "backend",
    "bound_of",
    "guard",
    "holds",
    "is_at_home",
    "probe_guard",
    "tensors_of",
]


@dataclass(frozen=True, slots=True)
class Bound:
    """A tensor of a module, by the name of its attribute, and its handle."""

    attribute: str
    tensor: torch.Tensor
    handle: BufferHandle


_bound: weakref.WeakKeyDictionary[torch.nn.Module, list[Bound]] = weakref.WeakKeyDictionary()


def backend() -> Backend:
    """Give the driver's backend for torch."""
    return registry.get("torch")


def attach(tensor: torch.Tensor, handle: BufferHandle) -> None:
    """Put a tensor, the object that it is, on the memory of a handle.

    The tensor keeps its own count of writes, its hooks and its grad. The handle's view is from now
    on a view of this tensor, so that both share the count: autograd refuses what a write by the
    driver made stale, and the driver sees what an optimizer writes.
    """
    handle._materialise()
    target = backend()
    tensor.data = handle._made_view(target)
    handle._keep_view(target, tensor.detach())
    handle.torch()  # in order, and from now on kept so


def is_at_home(tensor: Any, handle: BufferHandle) -> bool:
    """Tell whether a tensor still lies in its handle."""
    if tensor.is_meta or tensor.data_ptr() != handle.address:
        return False
    return tuple(tensor.shape) == handle.shape and tensor.dtype == TO_TORCH[handle.dtype]


def bound_of(module: torch.nn.Module) -> list[Bound]:
    """List the tensors of a module itself, without its children, that live in open handles."""
    return [entry for entry in _bound.get(module, ()) if not entry.handle.is_closed]


def holds(module: torch.nn.Module, entry: Bound) -> bool:
    """Tell whether a module still has a tensor, and the tensor its handle."""
    owned = {**module._parameters, **module._buffers}
    return owned.get(entry.attribute) is entry.tensor and is_at_home(entry.tensor, entry.handle)


def guard(module: torch.nn.Module, entries: list[Bound]) -> None:
    """Remember what a module has in handles, and have its conversions refused."""
    _bound[module] = entries
    if CAN_GUARD and "_apply" not in module.__dict__:
        module.__dict__["_apply"] = _Guard(module)


class _Guard:
    """Stands before `Module._apply`, by which ``to``, ``half``, ``cuda`` and all such convert.

    A conversion that leaves every tensor in its handle passes. Any other is undone and refused.
    Copies and pickles of the module are not bound, and get the method itself in its place.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = weakref.ref(module)  # no circle: modules are freed by count

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        assert module is not None, "it is called through the module"
        convert = type(module)._apply
        entries = bound_of(module)
        if not entries:
            return convert(module, *args, **kwargs)
        before = _Tensors(module)
        result = convert(module, *args, **kwargs)
        moved = [entry for entry in entries if not holds(module, entry)]
        if moved:
            before.restore()
            for entry in moved:
                attach(entry.tensor, entry.handle)
            names = ", ".join(repr(entry.handle.name) for entry in moved)
            raise ZeroCopyError(
                f"converting or moving this {type(module).__name__} would take {names} out of "
                "their handles, whose dtype, device and address are fixed. Nothing of it was "
                "changed: convert first and bind then, or close the handles, which leaves the "
                "module its memory"
            )
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module(), "_apply")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._module(), memo)._apply  # type: ignore[union-attr]


class _Tensors:
    """The tensors of a module itself as they were, to be put back."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._parameters, self._buffers = dict(module._parameters), dict(module._buffers)
        self._saved = [
            (tensor, tensor.data, tensor.grad, None if tensor.grad is None else tensor.grad.data)
            for tensor in (*self._parameters.values(), *self._buffers.values())
            if tensor is not None
        ]

    def restore(self) -> None:
        self._module._parameters.update(self._parameters)
        self._module._buffers.update(self._buffers)
        for tensor, data, grad, grad_data in self._saved:
            tensor.data = data
            if grad is not None:
                grad.data = grad_data
            tensor.grad = grad


def probe_guard(module_type: type[torch.nn.Module] = torch.nn.Linear) -> bool:
    """Tell whether conversions of a module ask the module itself for ``_apply``, which is private.

    Where they do not, `require_bound` is the way to notice one.
    """
    seen: list[Any] = []
    probe: Any = module_type(1, 1)
    convert: Callable[..., Any] | None = getattr(module_type, "_apply", None)
    if convert is None:
        return False
    outer = torch.nn.Sequential(probe)

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return convert(probe, *args, **kwargs)

    probe.__dict__["_apply"] = spy
    probe.half()
    outer.double()
    return len(seen) == 2 and probe.weight.dtype is torch.float64


CAN_GUARD = probe_guard()


def tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, torch.Tensor]]:
    """List the tensors of a module and its children: full name, owner, attribute, tensor."""
    for path, owner in module.named_modules():
        for attribute, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield f"{path}.{attribute}" if path else attribute, owner, attribute, tensor
