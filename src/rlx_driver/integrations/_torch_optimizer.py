"""The state of torch's optimizers: what there is, and what would be made at the first step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlx_driver.backends._torch_tensors import TO_TORCH
from rlx_driver.errors import (
    DTypeError,
    DuplicateError,
    ShapeError,
    StaleViewError,
    UnboundNameError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlx_driver.handle import BufferHandle, HandleRegion

__all__ = ["Entry", "Kept", "entries", "keep", "kept_of"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of an optimizer's state; where it does not exist yet, one of its kind."""

    name: str
    key: str
    parameter: torch.nn.Parameter
    tensor: torch.Tensor
    exists: bool

    @property
    def what(self) -> str:
        """What it is, for an error."""
        return f"{self.key} of {self.name}"


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor of an optimizer's state that lives in a handle."""

    parameter: torch.nn.Parameter
    key: str
    tensor: torch.Tensor
    handle: BufferHandle


_kept: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Kept]] = weakref.WeakKeyDictionary()


def entries(optimizer: torch.optim.Optimizer, region: HandleRegion) -> list[Entry]:
    """List the state of an optimizer; changes nothing.

    Raises
    ------
    UnboundNameError
        A parameter has no name.
    DTypeError
        State that is no tensor, or that cannot be made ahead of the first step.
    """
    if kept_of(optimizer):
        raise DuplicateError(
            f"this {type(optimizer).__name__} is bound already: close its handles to bind it "
            "anew. Nothing was bound"
        )
    by_address = {handle.address: handle.name for handle in region if handle.num_elements}
    found = []
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = _name(by_address, group, parameter, number, index)
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if value is None:
                    continue
                if not isinstance(value, torch.Tensor):
                    raise DTypeError(
                        f"{key!r} of {name} in this {type(optimizer).__name__} is a "
                        f"{type(value).__qualname__}, which no handle can hold: only optimizers "
                        "whose state is tensors can be bound. Nothing was bound"
                    )
                found.append(Entry(name, key, parameter, value, exists=True))
            if parameter.requires_grad:
                found += [
                    Entry(name, key, parameter, like, exists=False)
                    for key, like in _to_come(optimizer, group, parameter, state, name)
                ]
    return found


def _name(
    by_address: dict[int, str],
    group: dict[str, Any],
    parameter: torch.nn.Parameter,
    number: int,
    index: int,
) -> str:
    name = None if parameter.is_meta else by_address.get(parameter.data_ptr())
    if name is None and "param_names" in group:
        name = group["param_names"][index]
    if name is None:
        raise UnboundNameError(
            f"parameter {index} of group {number}, of shape {tuple(parameter.shape)}, has no name: "
            "bind its module into this region first, or make the optimizer with "
            "named_parameters(). Nothing was bound"
        )
    return name


def _to_come(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    parameter: torch.nn.Parameter,
    state: dict[str, Any],
    name: str,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give what the first step would make, as tensors of the kind; all begin as zeros."""
    kind = type(optimizer)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        if state:
            return
        on_device = group["capturable"] or group["fused"]
        scalar = torch.float32
        if torch.get_default_dtype() is torch.float64 and not group["fused"]:
            scalar = torch.float64
        place = parameter.device if on_device else torch.device("cpu")
        yield "step", torch.zeros((), dtype=scalar, device=place)
        yield "exp_avg", parameter
        yield "exp_avg_sq", parameter
        if group["amsgrad"]:
            yield "max_exp_avg_sq", parameter
    elif kind is torch.optim.SGD:
        if not group["momentum"] or state.get("momentum_buffer") is not None:
            return
        if group["dampening"]:
            raise DTypeError(
                f"the momentum of {name} does not exist yet, and with dampening "
                f"{group['dampening']} the first step makes it in another way than all others: "
                "run one step first. Nothing was bound"
            )
        yield "momentum_buffer", parameter
    elif not state:
        raise DTypeError(
            f"{kind.__name__} has no state for {name} yet, and what it will make is not known: "
            "run one step first. Nothing was bound"
        )


def keep(optimizer: torch.optim.Optimizer, kept: list[Kept]) -> None:
    """Remember what lives in handles, and keep it there when a state is loaded."""
    known = optimizer in _kept
    _kept[optimizer] = kept
    if not known:
        optimizer.register_load_state_dict_post_hook(_loaded)


def kept_of(optimizer: torch.optim.Optimizer) -> list[Kept]:
    """List what lives in open handles."""
    return [entry for entry in _kept.get(optimizer, ()) if not entry.handle.is_closed]


def _loaded(optimizer: torch.optim.Optimizer) -> None:
    """Copy a loaded state into the handles, and put their tensors back into the optimizer."""
    kept = kept_of(optimizer)
    values = []
    for entry in kept:
        value = optimizer.state.get(entry.parameter, {}).get(entry.key)
        if value is None and type(optimizer) not in _STARTS_AT_ZERO:
            _refuse(entry, "is not in it", StaleViewError)
        if value is not None and tuple(value.shape) != entry.handle.shape:
            _refuse(entry, f"has shape {tuple(value.shape)} in it", ShapeError)
        if value is not None and value.dtype != TO_TORCH[entry.handle.dtype]:
            _refuse(entry, f"is {value.dtype} in it", DTypeError)
        values.append(value)
    for entry, value in zip(kept, values, strict=True):
        if value is None:
            entry.handle[...] = 0
        elif value.data_ptr() != entry.tensor.data_ptr():
            entry.handle.copy_from(value.detach())
        optimizer.state[entry.parameter][entry.key] = entry.tensor


_STARTS_AT_ZERO = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def _refuse(entry: Kept, found: str, error: type[Exception]) -> None:
    raise error(
        f"the state was loaded into the optimizer, but {entry.handle.name!r} {found}, so that it "
        "does not fit the handles, which were left as they are: load one that fits, or close the "
        "handles and bind anew"
    )
