"""Functions of torch and NumPy as a part of a jitted JAX program, in place on its arrays."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlx_driver.errors import MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["jax_call"]


def jax_call(
    fn: Callable[..., Any],
    state: Any,
    /,
    *args: Any,
    framework: str | ModuleType = "torch",
    **kwargs: Any,
) -> Any:
    """Call a torch or NumPy function from inside a jitted JAX program, in place.

    Experimental: it rests on `jax.experimental.buffer_callback`, and on `jax.pure_callback`, by
    copies, where a probe finds that not to work in place.

    To JAX it is one operation that takes arrays and gives new ones. Where nothing else reads the
    old ones, as in a step of `Buffer.update`, old and new are the same memory; else XLA copies
    them first. On the CPU it also passes once over what another operation of the same program has
    made of the state before it calls `fn`: let the call come first.

    Parameters
    ----------
    fn
        ``fn(state, *args, **kwargs)`` changes its first argument in place and returns None or that
        argument. A new array of the same shape and dtype is copied in, and counted in the ledger.
        It has to give the same result for the same values: XLA may run it twice, and does not run
        it when its result is not used, or when the state has no elements.
    state
        Traced JAX arrays, one or a pytree, of any shape and of every dtype that JAX and `framework`
        share, bfloat16 and float8 included. Outside of a trace also Buffers (`rlx_driver.update`
        with `framework`, at once), or JAX arrays (copied).
    *args, **kwargs
        Passed on. The JAX and NumPy arrays in them (and, where `state` is a Buffer, Buffers)
        become arrays of `framework`, to be read only: NumPy refuses writes, torch cannot. All else
        is static: `fn` gets the very object of the time of tracing.
    framework
        "torch" or "numpy", or that module.

    Returns
    -------
    state
        The new JAX arrays, in the structure of `state`; None where `state` is Buffers. Copies:
        never, but what XLA copies to keep an old value, and in the way round (counted in the
        ledger). Blocks: the host, on the CPU, until the program has run; on a GPU never. Aliases:
        `state`, where it is donated.

    Raises
    ------
    DTypeError
        The framework has not that dtype, or `state` is no array. Nothing was changed.
    ShapeError
        There is no array in `state`. Nothing was changed.
    StaleViewError
        A Buffer was given inside a trace: pass the traced array.
    TransformError
        `jax.grad` or `jax.vmap` meets the call. For gradients put it inside a `jax.custom_vjp`.
    UnknownFrameworkError
        `framework` is neither torch nor NumPy.
    MissingPackageError
        JAX is not installed.
    UpdateFailedError
        By `update`, when `fn` raises; its text ends with the error of `fn`, and the bytes are
        undefined. In a jitted function of your own `jax.errors.JaxRuntimeError` says the same.

    Notes
    -----
    `fn` runs with the interpreter's lock held, on a thread of JAX or on the one that called the
    program, under torch.no_grad. On CUDA the current stream of torch is the one on which JAX runs
    the program: work enqueued there is in order, and `fn` must not synchronise, nor read values on
    the host. In either case it must not call JAX nor wait for another thread, reach for Buffers
    (that raises where it would hang), or keep an array after it has returned.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import rlx_driver as rlx
    >>> total = rlx.BufferHandle("total", (3,), "f32")
    >>> def step(x, row):
    ...     x = rlx.jax_call(lambda t, r, scale: t.add_(r, alpha=scale), x, jnp.sin(row), scale=2)
    ...     return x + 1
    >>> total.update(step, jnp.zeros(3))
    >>> total.numpy()
    array([1., 1., 1.], dtype=float32)
    >>> total.close()
    """
    try:
        importlib.import_module("jax")
    except ImportError as error:
        raise MissingPackageError(
            f"jax_call was asked for, and jax cannot be imported ({error}): install rlx-driver[jax]"
        ) from error
    inside: Any = importlib.import_module("rlx_driver.integrations._jax_call")
    return inside.call(fn, state, args, kwargs, framework)
