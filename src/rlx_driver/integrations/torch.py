"""Training state of torch in handles: modules, gradients and optimizers that exist already.

Nothing of a program changes but where its tensors lie. Every tensor stays the object that it is,
so that an optimizer, a hook or a compiled step made before goes on working::

    region = rlx.HandleRegion("cpu")
    params = bind_module(model, region)
    state = bind_optimizer(optimizer, region)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlx_driver.errors import (
    DeviceUnavailableError,
    DTypeError,
    DuplicateError,
    StaleViewError,
    ZeroCopyError,
)
from rlx_driver.integrations import _torch_optimizer
from rlx_driver.integrations._bind import (
    Leaf,
    joined,
    laid,
    require_apart,
    require_bindable,
    require_region,
)
from rlx_driver.integrations._torch_memory import (
    Bound,
    attach,
    backend,
    bound_of,
    guard,
    holds,
    is_at_home,
    tensors_of,
)

if TYPE_CHECKING:
    from rlx_driver.handle import BufferHandle, HandleRegion

__all__ = ["bind_gradients", "bind_module", "bind_optimizer", "require_bound"]


def bind_module(
    module: torch.nn.Module, region: HandleRegion, *, prefix: str = "", take_over: bool = False
) -> dict[str, BufferHandle]:
    """Put the parameters and buffers of a module into handles; the module goes on as it is.

    Parameters
    ----------
    module
        Any module. Its tensors keep their identity, dtype, ``requires_grad``, ``grad`` and hooks.
    region
        Where; on the module's device.
    prefix
        Put before each name, with a slash: for several modules in one region.
    take_over
        Handles of these names, shapes and dtypes that the region has already are taken as they
        are, and the module gets *their* values. Without it a name that is taken is an error.

    Returns
    -------
    dict
        A handle for each tensor, by its name in `named_parameters` and `named_buffers` (the first,
        where several names share a tensor; it has one handle). The region has them under the same
        names, after the prefix.

    Notes
    -----
    Copies: once, the values into the handles (in C order), as the ledger says; until it returns
    both are in memory. Blocks: for that.
    Aliases: afterwards each tensor is a view of its handle, in order with what goes through it. A
    write by the driver raises the version counter of the tensor, so that autograd refuses what it
    made stale. ``load_state_dict`` copies in place; ``load_state_dict(assign=True)`` and plain
    assignments put other tensors in their place, which `require_bound` notices. ``to``, ``half``,
    ``cuda``, ``share_memory`` and such raise `ZeroCopyError` where they would move a tensor, and
    change nothing. Copies and pickles of the module have memory of their own. After the handles
    are closed the module keeps its memory, and may be converted.

    Raises
    ------
    DeviceUnavailableError
        A tensor lives on another device than the region.
    ZeroCopyError, DTypeError
        A tensor has no memory of its own (meta, fake, sparse, nested, a wrapper), elements that
        share memory, or a dtype that handles lack (quantised, complex32).
    DuplicateError
        A name is taken, the module is bound already, or two tensors overlap.
    ShapeError
        A handle to take over has another shape.
    ClosedHandleError, OutOfDeviceMemory
        Of the region. On any error nothing was bound.
    """
    if not isinstance(module, torch.nn.Module):
        raise DTypeError(f"expected a torch.nn.Module, got {type(module).__qualname__}")
    require_region(region)
    with torch.inference_mode(False), torch.no_grad():
        found = list(tensors_of(module))
        first: dict[int, str] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, owner, _, tensor in found:
            if bound_of(owner):
                raise DuplicateError(
                    f"the {type(owner).__name__} that has {name!r} is bound already: close its "
                    "handles to bind it anew. Nothing was bound"
                )
            if id(tensor) not in first:
                first[id(tensor)] = name
                tensors[name] = tensor
        leaves = [
            _leaf(name, joined(prefix, name), tensor, region) for name, tensor in tensors.items()
        ]
        require_apart((name, backend().facts(t.detach())) for name, t in tensors.items())
        with laid(region, leaves, take_over=take_over) as handles:
            _put(tensors, {name: handles[joined(prefix, name)] for name in tensors})
        bound = {name: handles[joined(prefix, name)] for name in tensors}
    owners: dict[torch.nn.Module, list[Bound]] = {}
    for _, owner, attribute, tensor in found:
        handle = bound[first[id(tensor)]]
        owners.setdefault(owner, []).append(Bound(attribute, tensor, handle))
    for owner, entries in owners.items():
        guard(owner, entries)
    return bound


def bind_gradients(
    module: torch.nn.Module, region: HandleRegion, *, prefix: str = "grad", take_over: bool = False
) -> dict[str, BufferHandle]:
    """Give the parameters of a module gradients that live in handles, and accumulate there.

    Parameters
    ----------
    module
        Its parameters that require grad take part.
    region
        Where; on the module's device.
    prefix
        Put before each name, with a slash.
    take_over
        As for `bind_module`; ``grad`` gets the values that the handles have.

    Returns
    -------
    dict
        A handle for each parameter by its name, with the values of its ``grad``, or zeros.

    Notes
    -----
    ``backward`` adds to a ``grad`` that is there, in place. So say
    ``zero_grad(set_to_none=False)``, or ``rlx.write`` and zero: what sets ``grad`` to None takes it
    out of its handle, and the next backward makes another. Copies: once, gradients that are there.

    Raises
    ------
    DeviceUnavailableError, ZeroCopyError, DTypeError, DuplicateError, ShapeError
        As for `bind_module`. On any error nothing was bound.
    """
    if not isinstance(module, torch.nn.Module):
        raise DTypeError(f"expected a torch.nn.Module, got {type(module).__qualname__}")
    require_region(region)
    with torch.inference_mode(False), torch.no_grad():
        params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        leaves = []
        for name, parameter in params.items():
            leaf = _leaf(name, joined(prefix, name), parameter, region)
            grad = parameter.grad
            if grad is not None:
                _leaf(f"the gradient of {name}", leaf.name, grad, region)
            value = None if grad is None else grad.detach()
            leaves.append(Leaf(leaf.name, leaf.shape, leaf.dtype, value))
        with laid(region, leaves, take_over=take_over) as handles:
            for name, parameter in params.items():
                grad = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                attach(grad, handles[joined(prefix, name)])
                parameter.grad = grad
    return {name: handles[joined(prefix, name)] for name in params}


def bind_optimizer(
    optimizer: torch.optim.Optimizer,
    region: HandleRegion,
    *,
    prefix: str | None = None,
    take_over: bool = False,
) -> dict[str, dict[str, BufferHandle]]:
    """Put the state of an optimizer into handles; the optimizer goes on as it is.

    Parameters
    ----------
    optimizer
        SGD, Adam or AdamW, each also ``foreach``, ``fused`` or ``capturable``: state that they
        would make at their first step is made now. Any other optimizer whose state is tensors,
        after its first step.
    region
        Where; on the device of the state.
    prefix
        Put before each name, with a slash; left out, the optimizer's class in lower case.
    take_over
        As for `bind_module`; the optimizer goes on from what the handles have.

    Returns
    -------
    dict
        ``{key: {parameter: handle}}``, such as ``state["exp_avg"]["layer.0.weight"]``, which the
        region has as ``"adam/exp_avg/layer.0.weight"``. A parameter is named as its handle in this
        region is, or else as the optimizer was told (it takes ``named_parameters()``).

    Notes
    -----
    Copies: once, state that is there. Blocks: for that. Aliases: the tensors in ``optimizer.state``
    are views of the handles from now on. ``optimizer.load_state_dict`` copies into them. Copies
    and pickles of the optimizer are not bound.

    Raises
    ------
    UnboundNameError
        A parameter has no name.
    DTypeError, ZeroCopyError
        State that is no dense tensor, or that is made at a first step and was not yet.
    DeviceUnavailableError
        State lives on another device than the region. (On a GPU the ``step`` of Adam does, unless
        it is ``fused`` or ``capturable``.)
    DuplicateError, ShapeError, ClosedHandleError, OutOfDeviceMemory
        As for `bind_module`. On any error nothing was bound.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DTypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__qualname__}")
    require_region(region)
    kind = type(optimizer).__name__.lower() if prefix is None else prefix
    with torch.inference_mode(False), torch.no_grad():
        entries = _torch_optimizer.entries(optimizer, region)
        leaves = []
        for entry in entries:
            if entry.key == "step" and entry.tensor.device.type == "cpu" != region.device.kind:
                raise DeviceUnavailableError(
                    f"{entry.what} is on the host and the region on {region.device}: make the "
                    "optimizer with fused=True or capturable=True, which keep it on the GPU. "
                    "Nothing was bound"
                )
            leaf = _leaf(entry.what, joined(kind, entry.key, entry.name), entry.tensor, region)
            value = entry.tensor.detach() if entry.exists else None
            leaves.append(Leaf(leaf.name, leaf.shape, leaf.dtype, value))
        require_apart((e.what, backend().facts(e.tensor)) for e in entries if e.exists)
        with laid(region, leaves, take_over=take_over) as handles:
            homes = {leaf.name: handles[leaf.name] for leaf in leaves}
            tensors = {
                leaf.name: entry.tensor
                if entry.exists
                else torch.empty(0, dtype=entry.tensor.dtype, device=entry.tensor.device)
                for leaf, entry in zip(leaves, entries, strict=True)
            }
            _put(tensors, homes)
        bound: dict[str, dict[str, BufferHandle]] = {}
        kept = []
        for leaf, entry in zip(leaves, entries, strict=True):
            tensor, handle = tensors[leaf.name], homes[leaf.name]
            optimizer.state[entry.parameter][entry.key] = tensor
            bound.setdefault(entry.key, {})[entry.name] = handle
            kept.append(_torch_optimizer.Kept(entry.parameter, entry.key, tensor, handle))
        _torch_optimizer.keep(optimizer, kept)
    return bound


def require_bound(bound: torch.nn.Module | torch.optim.Optimizer) -> None:
    """Check that what was bound still lives in its handles.

    Parameters
    ----------
    bound
        A module that `bind_module` took (or one that contains it), or an optimizer that
        `bind_optimizer` took.

    Raises
    ------
    StaleViewError
        A tensor was put in the place of one that lives in a handle (an assignment,
        ``load_state_dict(assign=True)``), one was moved out of it, or nothing is bound. The text
        names the handles.
    """
    if isinstance(bound, torch.optim.Optimizer):
        kept = _torch_optimizer.kept_of(bound)
        count = len(kept)
        moved = [
            entry.handle.name
            for entry in kept
            if bound.state.get(entry.parameter, {}).get(entry.key) is not entry.tensor
            or not is_at_home(entry.tensor, entry.handle)
        ]
    else:
        pairs = [(owner, entry) for owner in bound.modules() for entry in bound_of(owner)]
        count = len(pairs)
        moved = [entry.handle.name for owner, entry in pairs if not holds(owner, entry)]
    if not count:
        raise StaleViewError(f"nothing of this {type(bound).__name__} is bound to an open handle")
    if moved:
        raise StaleViewError(
            f"{', '.join(map(repr, dict.fromkeys(moved)))}: the {type(bound).__name__} has other "
            "memory now, and the handles do not see what it does. Copy the values into the handles "
            "and put the tensors back, or close the handles and bind anew"
        )


def _leaf(what: str, name: str, tensor: torch.Tensor, region: HandleRegion) -> Leaf:
    """Describe the handle for a tensor, which must be fit to live in one."""
    if torch.nn.parameter.is_lazy(tensor):
        raise DTypeError(
            f"{what} has no shape before the first forward pass: run one. Nothing was bound"
        )
    if tensor.is_inference():
        raise ZeroCopyError(
            f"{what} was made in inference mode and can never take part in training: make it "
            "outside. Nothing was bound"
        )
    plain = tensor.detach()
    facts = backend().facts(plain)
    require_bindable(what, facts, region)
    return Leaf(name, facts.shape, facts.dtype, plain)


def _put(tensors: dict[str, torch.Tensor], handles: dict[str, BufferHandle]) -> None:
    """Put all tensors on their handles, or leave all where they were."""
    before = [(tensor, tensor.data) for tensor in tensors.values()]
    try:
        for name, tensor in tensors.items():
            attach(tensor, handles[name])
    except BaseException:
        for tensor, data in before:
            tensor.data = data
        raise
