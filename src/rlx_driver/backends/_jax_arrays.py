"""JAX arrays in the driver's terms, and whether a trace is on."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx_driver.backends.base import ArrayFacts, Obstacle, row_major_strides
from rlx_driver.dtypes import TABLE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "EVERYDAY",
    "HOST_ALIGNMENT",
    "SHARED",
    "WIDE",
    "is_dense",
    "jax_obstacle",
    "probe_alias",
    "probe_trace_state",
    "same_buffer",
    "slow_trace_state_clean",
    "strides_of",
]

HOST_ALIGNMENT = 64
"""Bytes that host memory has to be aligned to for JAX to share it."""

SHARED = {row.dtype for row in TABLE.values() if row.jax is not None and row.dlpack is not None}
"""Dtypes that go in and out by DLPack."""

EVERYDAY = {dtype for dtype in SHARED if TABLE[dtype].numpy_exports}
"""Of these, the ones that NumPy knows too."""

WIDE = {np.dtype(t) for t in ("int64", "uint64", "float64", "complex128")}
"""Dtypes that JAX narrows unless x64 is on."""


def probe_trace_state() -> Callable[[], bool]:
    """Choose between the private function that tells in 100 ns and the public way."""
    try:
        from jax._src.core import trace_state_clean

        inside: list[bool] = []
        jax.eval_shape(lambda: inside.append(trace_state_clean()))
        if trace_state_clean() and inside == [False]:
            return trace_state_clean
    except (ImportError, TypeError):
        pass
    return slow_trace_state_clean


def slow_trace_state_clean() -> bool:
    """Tell by public means, in microseconds, that no trace is on: a constant is concrete."""
    return not isinstance(jnp.zeros(()), jax.core.Tracer)


def jax_obstacle(array: Any) -> Obstacle | None:
    """Say why JAX cannot hand an array out as it is, if so."""
    if isinstance(array, jax.core.Tracer):
        return Obstacle(
            "trace",
            "it is a traced value inside a JAX transformation and has no memory",
            "exchange outside the traced function, or use jax.pure_callback inside",
            copyable=False,
        )
    if array.is_deleted():
        return Obstacle(
            "trace", "it was deleted or donated", "use the result it was donated to", False
        )
    if len(array.devices()) != 1:
        return Obstacle(
            "device",
            f"it is sharded over {len(array.devices())} devices",
            "exchange its addressable_shards one by one",
            copyable=False,
        )
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return Obstacle(
            "dtype",
            f"its dtype is {array.dtype}, which only JAX has",
            "use jax.random.key_data for keys",
            copyable=False,
        )
    return None


def strides_of(array: Any, itemsize: int) -> tuple[int, ...]:
    """Give byte strides; an imported array may keep a transposed layout."""
    layout = getattr(getattr(array, "format", None), "layout", None)
    order = getattr(layout, "major_to_minor", None)
    if order is None or list(order) == sorted(order):
        return row_major_strides(array.shape, itemsize)
    strides = [0] * array.ndim
    step = itemsize
    for axis in reversed(order):
        strides[axis] = step
        step *= max(array.shape[axis], 1)
    return tuple(strides)


def same_buffer(array: Any) -> Any:
    """Make another array of an array's very buffer, so that a donation of one deletes both.

    `device_put`, ``[:]`` and `addressable_data` will not do: they give the array itself, or one
    that it keeps.
    """
    if not array.committed:
        # The public way would commit it to its device. The constructor is private.
        with contextlib.suppress(TypeError):
            return type(array)(array.aval, array.sharding, [array], committed=False)
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array])


def probe_alias(device: Any, fence: Callable[[list[Any]], list[Any]]) -> bool:
    """Tell whether `same_buffer` does what it says, and its result dies when it is let go."""
    try:
        for owner_is_donated in (True, False):
            for committed in (True, False):
                host = np.zeros(16, np.float32)
                array = jax.device_put(host, device if committed else None)
                let_go: list[Any] = []
                dropped = same_buffer(array)
                reference = weakref.ref(dropped, let_go.append)
                del dropped
                alias = same_buffer(array)
                fence([array if owner_is_donated else alias])
                both = array.is_deleted() and alias.is_deleted()
                if let_go != [reference] or alias is array or not both:
                    return False
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return True


def is_dense(facts: ArrayFacts) -> bool:
    """Tell whether the elements fill their memory without gaps, in any order of the axes."""
    step = facts.dtype.itemsize
    if 0 in facts.shape:
        return True
    for stride, n in sorted(zip(facts.strides, facts.shape, strict=True)):
        if n == 1:
            continue
        if stride != step:
            return False
        step *= n
    return True
