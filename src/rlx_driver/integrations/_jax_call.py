"""The JAX side of `rlx_driver.jax_call`: tracing, the way in place, and the way round."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from rlx_driver import dlpack
from rlx_driver._exchange import exchange
from rlx_driver._ledger import ledger
from rlx_driver.backends.base import ArrayFacts, Backend, row_major_strides
from rlx_driver.buffer import Buffer
from rlx_driver.device import Device
from rlx_driver.dtypes import info
from rlx_driver.errors import (
    DTypeError,
    ShapeError,
    StaleViewError,
    TransformError,
    UnknownFrameworkError,
)
from rlx_driver.integrations._jax_call_arrays import array_of, on_stream_of, run
from rlx_driver.registry import registry
from rlx_driver.tree import update

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["call", "works_in_place"]

_CPU = Device("cpu")
_PLATFORMS = ("cpu", "gpu", "cuda", "rocm")


def call(
    fn: Callable[..., Any],
    state: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    framework: Any,
) -> Any:
    """Give what `rlx_driver.jax_call` gives."""
    target = _target(framework)
    leaves, structure = jax.tree_util.tree_flatten(state)
    if not leaves:
        raise ShapeError(
            f"jax_call changes arrays in place, and the state {structure} has none. Nothing was "
            "changed"
        )
    inputs, rest = jax.tree_util.tree_flatten((args, kwargs))
    traced = _is_traced((*leaves, *inputs))
    buffers = [leaf for leaf in leaves if isinstance(leaf, Buffer)]
    if traced:
        for leaf in (*leaves, *inputs):
            if isinstance(leaf, Buffer):
                raise StaleViewError(
                    f"{leaf._access.label} was given to jax_call inside a JAX trace, where a "
                    "Buffer has no value yet: let update pass it to the step, and give "
                    "jax_call the traced array. Nothing was changed"
                )
    elif buffers and len(buffers) == len(leaves):
        _update_buffers(fn, state, inputs, rest, target)
        return None
    for leaf in leaves:
        if not isinstance(leaf, jax.Array):
            raise DTypeError(
                "the state of jax_call is JAX arrays, or Buffers outside of a trace; found "
                f"{type(leaf).__qualname__}. Nothing was changed"
            )
    for leaf in (*leaves, *filter(_is_array, inputs)):
        _require_dtype(leaf.dtype, target)
    called = _Call(fn, target, structure, inputs, rest)
    if traced:
        dynamic = [leaf for leaf in inputs if _is_array(leaf)]
        news = _without_transforms(called.traced(len(leaves)))(*leaves, *dynamic)
    else:
        news = called.at_once(leaves)
    return jax.tree_util.tree_unflatten(structure, news)


class _Call(NamedTuple):
    """A function with what is known of its arguments while tracing."""

    fn: Callable[..., Any]
    target: Backend
    structure: Any
    inputs: list[Any]
    """The leaves of args and kwargs; arrays among them stand for what comes at run time."""
    rest: Any

    def traced(self, count: int) -> Callable[..., list[Any]]:
        """Give the operation on flat arrays, `count` of them the state."""
        # Without arrays: the program keeps this object, and a tracer must not outlive its trace.
        static = self._replace(inputs=[_HOLE if _is_array(x) else x for x in self.inputs])
        in_place = _sees_default_platform(self.target) and works_in_place(_default_platform())
        return functools.partial(_in_place if in_place else _by_copies, static, count)

    def run(self, states: list[Any], arrays: list[Any]) -> None:
        """Call the function on arrays of its framework, in place of those of JAX."""
        rest = iter(arrays)
        leaves = [next(rest) if leaf is _HOLE else leaf for leaf in self.inputs]
        args, kwargs = jax.tree_util.tree_unflatten(self.rest, leaves)
        run(self.fn, self.target, self.structure, states, args, kwargs)

    def at_once(self, leaves: list[Any]) -> list[Any]:
        """Call the function on copies of arrays that have values, and give its results."""
        name = self.target.name
        states = [exchange(leaf, name, copy=True) for leaf in leaves]
        arrays = [exchange(leaf, name) for leaf in self.inputs if _is_array(leaf)]
        holes = [_HOLE if _is_array(leaf) else leaf for leaf in self.inputs]
        self._replace(inputs=holes).run(states, arrays)
        return [exchange(state, "jax") for state in states]


class _Hole:
    """Stands where an array comes at run time."""


_HOLE = _Hole()


# --- the two ways


def _in_place(called: _Call, count: int, *flat: Any) -> list[Any]:
    from jax.experimental.buffer_callback import buffer_callback

    def callback(context: Any, outs: Any, *ins: Any) -> None:
        with on_stream_of(context, outs[0], called.target):
            states = [array_of(out, called.target, writable=True) for out in outs]
            arrays = [array_of(each, called.target, writable=False) for each in ins[count:]]
            called.run(states, arrays)

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in flat[:count]]
    aliases = {i: i for i in range(count)}
    return list(buffer_callback(callback, shapes, input_output_aliases=aliases)(*flat))


def _by_copies(called: _Call, count: int, *flat: Any) -> list[Any]:
    """Call the function on copies on the host, wherever the program runs."""
    target = called.target
    jax_backend, numpy = registry.get("jax"), registry.get("numpy")

    def callback(*values: Any) -> list[np.ndarray[Any, Any]]:
        copies = [
            jax_backend.copy_out(value) if isinstance(value, jax.Array) else np.array(value)
            for value in values
        ]
        moved = 2 * sum(copy.nbytes for copy in copies[:count])
        ledger.count_copy(moved, "jax_call does not work in place here")
        for copy in copies[count:]:
            copy.flags.writeable = target.name != "numpy"  # torch has no read-only tensors
        arrays = [target.share(copy, numpy.facts(copy)) for copy in copies]
        called.run(arrays[:count], arrays[count:])
        return copies[:count]

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in flat[:count]]
    return list(jax.pure_callback(callback, shapes, *flat))


@functools.cache
def works_in_place(platform: str) -> bool:
    """Probe, once a platform, whether a callback can change a donated array where it lies.

    Compiles and runs one tiny program and waits for it.
    """
    if platform not in _PLATFORMS:
        return False
    with ThreadPoolExecutor(1) as outside:  # of the trace that asks
        return outside.submit(_probe, platform).result()


def _probe(platform: str) -> bool:
    seen: list[bool] = []

    def look(context: Any, outs: Any, *ins: Any) -> None:
        first, second = (dlpack.inspect(each.__dlpack__()) for each in (outs[0], ins[0]))
        if first.device_type not in dlpack.HOST_DEVICE_TYPES:
            int(context.stream)
        seen.append((first.data, first.byte_offset) == (second.data, second.byte_offset))

    try:
        from jax.experimental.buffer_callback import buffer_callback

        expected = np.arange(64, dtype=np.float32)
        shape = jax.ShapeDtypeStruct(expected.shape, expected.dtype)
        program = buffer_callback(look, [shape], input_output_aliases={0: 0})
        with jax.disable_jit(False):
            array = jax.device_put(expected, jax.local_devices(backend=platform)[0])
            (new,) = jax.jit(program, donate_argnums=0)(array)
            kept = np.array_equal(np.asarray(new), expected)
    except (ImportError, TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError):
        return False
    return kept and seen == [True]


def _default_platform() -> str:
    """Give where programs run that nobody has placed; a trace does not say where it will run."""
    place = jax.config.jax_default_device
    if place is None:
        return str(jax.default_backend())
    return str(getattr(place, "platform", place)).partition(":")[0]


def _sees_default_platform(target: Backend) -> bool:
    return target.name != "numpy" or _default_platform() == "cpu"


# --- what JAX may not do with it


def _without_transforms(operation: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Refuse derivatives and batches by our own errors, also where a jitted function hides it."""
    batched: Any = jax.custom_batching.custom_vmap(operation)

    def _refuse_batches(*_: Any) -> Any:
        raise TransformError(
            "jax.vmap meets a jax_call, whose function takes arrays as they are: write the "
            "function for the batched array and call it outside of vmap, or loop with "
            "jax.lax.map. Nothing was changed"
        )

    batched.def_vmap(_refuse_batches)
    guarded: Any = jax.custom_jvp(batched)

    def _refuse_derivatives(*_: Any) -> Any:
        raise TransformError(
            "a derivative was asked of a jax_call, whose function JAX cannot see into: put it "
            "inside a function with jax.custom_vjp that gives the gradient, or "
            "jax.lax.stop_gradient around its arguments. Nothing was changed"
        )

    guarded.defjvp(_refuse_derivatives)
    return guarded  # type: ignore[no-any-return]


# --- arguments


def _target(framework: Any) -> Backend:
    name = framework if isinstance(framework, str) else getattr(framework, "__name__", None)
    if name not in ("torch", "numpy"):
        raise UnknownFrameworkError(
            f"jax_call runs functions of 'torch' and 'numpy', not of {framework!r}; a function of "
            "JAX is called as it is"
        )
    return registry.get(name)


def _is_traced(leaves: tuple[Any, ...]) -> bool:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return True
    backend: Any = registry.get("jax")
    return not backend.trace_state_clean()


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _require_dtype(dtype: Any, target: Backend) -> None:
    """Refuse, while tracing, what could only fail once the state is donated."""
    if not isinstance(dtype, np.dtype):
        raise DTypeError(
            f"jax_call was given an array of {dtype}, which only JAX has: pass random keys as "
            "jax.random.key_data(key). Nothing was changed"
        )
    record = info(dtype)
    obstacle = None
    if record.dlpack is not None:
        # Shape, address and place are JAX's, which any framework takes.
        strides = row_major_strides((1,), dtype.itemsize)
        obstacle = target.obstacle(ArrayFacts(256, (1,), strides, dtype, _CPU))
    if record.dlpack is None or obstacle is not None:
        why = record.note if obstacle is None else str(obstacle)
        raise DTypeError(
            f"jax_call was given an array of {dtype.name}, which {target.name} cannot take from "
            f"JAX: {why}. Nothing was changed"
        )


def _update_buffers(
    fn: Callable[..., Any], state: Any, inputs: list[Any], rest: Any, target: Backend
) -> None:
    values = [exchange(leaf, target.name) if _is_array(leaf) else leaf for leaf in inputs]
    packed = jax.tree_util.tree_unflatten(rest, values)

    def step(views: Any, packed: Any) -> Any:
        args, kwargs = packed
        return fn(views, *args, **kwargs)

    if isinstance(state, Buffer):
        state.update(step, packed, framework=target.name)
    else:
        update(state, step, packed, framework=target.name)
