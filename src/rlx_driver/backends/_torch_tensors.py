"""Tensors: what they are in the driver's terms, and the fast lanes between torch and the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from rlx_driver.backends._numpy_pointer import pointer
from rlx_driver.backends.base import Obstacle
from rlx_driver.dtypes import TABLE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "CARRIER",
    "EVERYDAY",
    "TO_NUMPY",
    "TO_TORCH",
    "capsule_of_tensor",
    "is_wrapped",
    "numpy_of_tensor",
    "tensor_of_jax",
    "tensor_of_numpy",
    "torch_obstacle",
]

# NumPy dtype -> torch dtype, for what torch has; and back.
TO_TORCH: dict[np.dtype[Any], torch.dtype] = {
    row.dtype: getattr(torch, row.torch)
    for row in TABLE.values()
    if row.torch is not None and row.dlpack is not None and hasattr(torch, row.torch)
}
TO_NUMPY = {theirs: ours for ours, theirs in TO_TORCH.items()}
# What NumPy itself exports, and for the rest the unsigned integer of the same width.
EVERYDAY = {row.dtype: TO_TORCH[row.dtype] for row in TABLE.values() if row.numpy_exports}
CARRIER: dict[int, tuple[np.dtype[Any], torch.dtype]] = {
    1: (np.dtype(np.uint8), torch.uint8),
    2: (np.dtype(np.uint16), torch.uint16),
}

_NO_DISPATCH = getattr(torch.Tensor, "__torch_dispatch__", None)

# Private, so probed: without it, a view made inside a transform cannot be told and none is kept.
_is_wrapped = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)


def is_wrapped(tensor: torch.Tensor) -> bool | None:
    """Tell whether a transform wraps a tensor; None when that cannot be told."""
    return None if _is_wrapped is None else bool(_is_wrapped(tensor))


def torch_obstacle(array: torch.Tensor) -> Obstacle | None:
    """Say why torch cannot hand a tensor out as it is, if so."""
    if array.is_nested:
        return Obstacle("protocol", "it is nested", "pad it with .to_padded_tensor() first", False)
    if array.requires_grad:
        return Obstacle(
            "requires_grad",
            "it requires grad, and no other framework continues torch's graph",
            "say .detach() first",
            copyable=False,
        )
    # A subclass that only adds methods keeps torch's disabled dispatch; a wrapper defines its own.
    dispatch = getattr(type(array), "__torch_dispatch__", None)
    plain = dispatch is None or dispatch is _NO_DISPATCH
    wrapped = is_wrapped(array)
    if not plain or wrapped or array.device.type == "meta":
        return Obstacle(
            "trace",
            f"it is a {type(array).__qualname__} without memory of its own (a fake, meta or "
            "traced tensor, or a wrapper subclass)",
            "exchange real tensors outside the mode or transform",
            copyable=False,
        )
    if array.layout is not torch.strided:
        return Obstacle(
            "protocol", f"its layout is {array.layout}", "convert it with .to_dense()", False
        )
    if array.is_conj():
        return Obstacle("conj", "its conjugate bit is set", "copy it, or .resolve_conj() first")
    if array.is_neg():
        return Obstacle("neg", "its negative bit is set", "copy it, or .resolve_neg() first")
    return None


def tensor_of_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor | None:
    """Share a compact, writable NumPy array, verified; None for any other."""
    theirs = EVERYDAY.get(array.dtype)
    if theirs is None or not array.flags.carray or type(array) is not np.ndarray:
        return None
    if torch.is_inference_mode_enabled():  # the general way leaves it, so that this is a normal one
        return None
    tensor = torch.from_numpy(array)
    if (
        type(tensor) is torch.Tensor
        and tensor.data_ptr() == pointer(array)
        and tensor.dtype is theirs
        and tensor.shape == array.shape
        and tensor.is_contiguous()
    ):
        return tensor
    return None


def tensor_of_jax(export: Callable[[Any], Any], array: Any) -> torch.Tensor | None:
    """Share a host array of JAX by its private exporter, verified; None for any other."""
    theirs = TO_TORCH.get(array.dtype)
    if theirs is None or array.is_deleted() or torch.is_inference_mode_enabled():
        return None
    capsule = export(array)
    if capsule is None:
        return None
    tensor = from_dlpack(capsule)
    if (
        tensor.data_ptr() == array.unsafe_buffer_pointer()
        and tensor.dtype is theirs
        and tensor.shape == array.shape
        and tensor.is_contiguous()
    ):
        return tensor
    return None


def capsule_of_tensor(tensor: torch.Tensor) -> tuple[Any, int, np.dtype[Any]] | None:
    """Export a compact host tensor: (capsule, address, dtype); None for any other."""
    dtype = TO_NUMPY.get(tensor.dtype)
    if (
        dtype is None
        or type(tensor) is not torch.Tensor
        or tensor.requires_grad
        or tensor.layout is not torch.strided
        or tensor.is_nested
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or tensor.is_neg()
        or tensor.is_conj()
        or is_wrapped(tensor) is not False
    ):
        return None
    return to_dlpack(tensor), tensor.data_ptr(), dtype


def numpy_of_tensor(tensor: torch.Tensor) -> np.ndarray[Any, Any] | None:
    """Share a compact host tensor, verified; None for any other."""
    dtype = TO_NUMPY.get(tensor.dtype)
    if dtype not in EVERYDAY or type(tensor) is not torch.Tensor or tensor.requires_grad:
        return None
    view = tensor.numpy()  # raises for conj and neg bits and for GPUs: the general way says why
    if (
        pointer(view) == tensor.data_ptr()
        and view.dtype == dtype
        and view.shape == tensor.shape
        and view.flags.carray
        and tensor.is_contiguous()
    ):
        return view
    return None
