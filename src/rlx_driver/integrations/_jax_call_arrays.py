"""Arrays of torch and NumPy over the buffers of a JAX callback, and a call on them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rlx_driver import dlpack
from rlx_driver._ledger import ledger
from rlx_driver.device import Device
from rlx_driver.errors import DeviceUnavailableError, DTypeError, ShapeError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rlx_driver.backends.base import Backend

__all__ = ["array_of", "on_stream_of", "run"]


def array_of(buffer: Any, target: Backend, *, writable: bool) -> Any:
    """Give a buffer of a callback as an array of a framework; never a copy."""
    if target.name == "numpy":
        if buffer.__dlpack_device__()[0] not in dlpack.HOST_DEVICE_TYPES:
            raise DeviceUnavailableError(
                "jax_call was to run a NumPy function on the memory of a GPU, because JAX's "
                "default device is the CPU: use framework='torch', or make the GPU the default "
                "one while tracing"
            )
        return dlpack.as_numpy(buffer, writable=writable)
    import torch

    try:
        return torch.from_dlpack(buffer)
    except (BufferError, RuntimeError, TypeError):
        if buffer.__dlpack_device__()[0] not in dlpack.HOST_DEVICE_TYPES:
            raise
        # A torch that does not import this narrow float: by way of its bytes, in an unversioned
        # capsule, since torch has no read-only tensors and a versioned one flags the inputs.
        array = dlpack.as_numpy(buffer.__dlpack__(), writable=True)
        return target.share(array, registry.get("numpy").facts(array))


@contextlib.contextmanager
def on_stream_of(context: Any, buffer: Any, target: Backend) -> Iterator[None]:
    """Make the program's stream the current one of torch, and its GPU the current device."""
    kind, index = buffer.__dlpack_device__()
    if kind in dlpack.HOST_DEVICE_TYPES or target.name != "torch":
        yield
        return
    import torch

    backend: Any = target
    streams = backend.streams(Device("cuda", index))
    with torch.cuda.device(index), torch.cuda.stream(streams.stream(int(context.stream))):
        yield


def run(
    fn: Callable[..., Any],
    target: Backend,
    structure: Any,
    states: list[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Call a function that changes arrays in place, or gives new ones, which are copied in."""
    with target.writing():
        state = jax.tree_util.tree_unflatten(structure, states)
        result = fn(state, *args, **kwargs)
        if result is not None and result is not state:
            _take_over(result, target, structure, states)


def _take_over(result: Any, target: Backend, structure: Any, states: list[Any]) -> None:
    leaves, found = jax.tree_util.tree_flatten(result)
    if found != structure:
        raise ShapeError(
            f"the function of a jax_call returns None, or its state with the structure it came in: "
            f"{structure}; this one returned {found}"
        )
    news = [target.as_array(leaf) for leaf in leaves]
    changed = [(old, new) for old, new in zip(states, news, strict=True) if new is not old]
    for old, new in changed:
        if not target.owns(new):
            raise DTypeError(
                f"the function of a jax_call returns None or {target.name} arrays; this one "
                f"returned a {type(new).__qualname__}"
            )
        if tuple(new.shape) != tuple(old.shape) or new.dtype != old.dtype:
            kind = ShapeError if tuple(new.shape) != tuple(old.shape) else DTypeError
            raise kind(
                f"the function of a jax_call returned {new.dtype} of shape {tuple(new.shape)} for "
                f"a state of {old.dtype} and shape {tuple(old.shape)}: return None when the state "
                "was changed in place"
            )
    if not changed:
        return
    # A result may be made of another state's memory (a swap): take it out before writing.
    values = [
        target.duplicate(new) if any(target.overlaps(new, old) for old in states) else new
        for _, new in changed
    ]
    moved = sum(int(np.prod(old.shape)) * old.dtype.itemsize for old, _ in changed)
    ledger.will_copy(moved, "the result was not made in place", "change the argument instead")
    for (old, _), value in zip(changed, values, strict=True):
        target.copy_across(old, value)
