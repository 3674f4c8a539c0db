"""Steps compiled for `update`: state donated, first in the outputs, checked while tracing."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import jax
import numpy as np

from rlx_driver.backends.base import split_aux
from rlx_driver.errors import DTypeError, RecompilationWarning, ShapeError

__all__ = ["CACHE_LIMIT", "StepCache", "is_jitted"]

CACHE_LIMIT = 256
"""Programs kept; the one unused for longest goes first."""

WARN_AT_TRACE = 3
"""A step traced this often for one state is most likely a new function at every call, or its
arguments change their shapes."""

Program = Callable[..., Any]


def is_jitted(step: Any) -> bool:
    """Tell whether a step is the product of ``jax.jit``, with a cache of its own."""
    return hasattr(step, "lower") and hasattr(step, "eval_shape")


class StepCache:
    """Keeps the compiled program of each step, without keeping the step alive."""

    def __init__(self, limit: int = CACHE_LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._programs: OrderedDict[Any, tuple[Callable[[], Any], Program]] = OrderedDict()
        self._traces: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, step: Any, structure: Any, has_aux: bool, static: tuple[int, ...]) -> Program:
        """Give the program of a step for one structure of its state, compiling it once."""
        # A bound method is a new object at every look-up: its parts are what stays.
        bound = type(step) is MethodType
        identity = (id(step.__self__), id(step.__func__)) if bound else id(step)
        key = (identity, structure, has_aux, static)
        found = self._programs.get(key)
        if found is not None and _is_same(found[0](), step):
            return found[1]
        return self._add(key, step, structure, has_aux, static)

    def _add(
        self, key: Any, step: Any, structure: Any, has_aux: bool, static: tuple[int, ...]
    ) -> Program:
        reference = _reference(step, functools.partial(self._forget, weakref.ref(self), key))
        if is_jitted(step):
            program: Program = _Jitted(reference, structure, has_aux)
        else:
            traced = _traced(reference, structure, has_aux, self._count_trace)
            traced.__name__ = traced.__qualname__ = getattr(step, "__name__", "step")
            program = jax.jit(traced, donate_argnums=0, keep_unused=True, static_argnums=static)
        with self._lock:
            found = self._programs.get(key)
            if found is not None and _is_same(found[0](), step):  # another thread was faster
                return found[1]
            self._programs[key] = reference, program
            self._programs.move_to_end(key)
            while len(self._programs) > self._limit:
                self._programs.popitem(last=False)
        return program

    @staticmethod
    def _forget(cache: weakref.ref[StepCache], key: Any, _: object = None) -> None:
        # Runs inside the collector: no lock, since the interrupted thread may hold it.
        if (self := cache()) is not None:
            self._programs.pop(key, None)

    def _count_trace(self, step: Any, signature: Any) -> None:
        plain = step.func if isinstance(step, functools.partial) else step
        code = getattr(plain, "__code__", None)
        if code is None:
            return
        seen = self._traces.setdefault(code, {})
        count = seen[signature] = seen.get(signature, 0) + 1
        if count == WARN_AT_TRACE:
            warnings.warn(
                f"the step {code.co_qualname} (line {code.co_firstlineno}) was traced {count} "
                "times for one and the same state. Each trace costs tens of milliseconds and "
                "memory: pass the same function object at every update, not a new lambda, "
                "arguments of the same shapes, and numbers that change as arguments",
                RecompilationWarning,
                stacklevel=_user_frame(),
            )


def _is_same(known: Any, step: Any) -> bool:
    # Steps compare by identity, whatever their == says; of a bound method the parts do.
    return known is step or (type(step) is MethodType and bool(known == step))


def _user_frame() -> int:
    """Count the frames up to the first that is neither ours nor JAX's."""
    import sys

    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("rlx_driver", "jax", "jaxlib", "contextlib", "functools"):
            break
        depth, frame = depth + 1, frame.f_back
    return depth


def _reference(step: Any, forget: Callable[..., None]) -> Callable[[], Any]:
    try:
        if type(step) is MethodType:
            return weakref.WeakMethod(step, forget)
        return weakref.ref(step, forget)
    except TypeError:  # not weakly referable: the bounded cache is what lets it go
        return lambda: step


def _traced(
    reference: Callable[[], Any], structure: Any, has_aux: bool, count: Callable[[Any, Any], None]
) -> Program:
    def program(state: Any, *args: Any, **kwargs: Any) -> Any:
        step = reference()
        leaves = [state] if structure is None else state
        count(step, (structure, *((leaf.shape, leaf.dtype) for leaf in leaves)))
        tree = state if structure is None else jax.tree_util.tree_unflatten(structure, state)
        result = step(tree, *args, **kwargs)
        new, aux = split_aux(result, has_aux)
        return _checked(state, structure, new), aux

    return program


class _Jitted:
    """A step that the user has jitted: called as it is, checked by its abstract result first."""

    def __init__(self, reference: Callable[[], Any], structure: Any, has_aux: bool) -> None:
        self._reference = reference
        self._structure = structure
        self._has_aux = has_aux
        self._seen: set[Any] = set()

    def __call__(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        step, structure = self._reference(), self._structure
        tree = state if structure is None else jax.tree_util.tree_unflatten(structure, state)
        signature = _signature((state, args, kwargs))
        if signature not in self._seen:
            expected = step.eval_shape(tree, *args, **kwargs)
            _checked(state, structure, split_aux(expected, self._has_aux)[0])
            self._seen.add(signature)
        new, aux = split_aux(step(tree, *args, **kwargs), self._has_aux)
        return new if structure is None else jax.tree_util.tree_leaves(new), aux


def _signature(tree: Any) -> Any:
    leaves, structure = jax.tree_util.tree_flatten(tree)
    return structure, tuple(
        (leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf if _is_static(leaf) else None
        for leaf in leaves
    )


def _is_static(leaf: Any) -> bool:
    return isinstance(leaf, (str, bool))


def _checked(state: Any, structure: Any, new: Any) -> Any:
    """Compare a step's new state with its old one, while nothing has been donated yet."""
    if structure is None:
        leaves, found = jax.tree_util.tree_flatten(new)
        if len(leaves) != 1 or leaves[0] is not new:
            hint = "pass has_aux=True" if isinstance(new, tuple) else "return the array itself"
            raise ShapeError(
                f"a step on one buffer returns its new value, one array; this one returned "
                f"{found}. To return more, {hint}. Nothing was changed"
            )
        return _checked_leaf(state, new, "")
    leaves, found = jax.tree_util.tree_flatten(new)
    if found != structure:
        raise ShapeError(
            f"a step returns its state with the structure it came in: {structure}; this one "
            f"returned {found}. To return more, pass has_aux=True. Nothing was changed"
        )
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(new)[0]]
    return [_checked_leaf(*each) for each in zip(state, leaves, names, strict=True)]


def _checked_leaf(old: Any, new: Any, name: str) -> Any:
    where = f" at {name}" if name else ""
    if not hasattr(new, "dtype"):
        new = np.asarray(new)
    if tuple(new.shape) != tuple(old.shape):
        raise ShapeError(
            f"the step returned shape {tuple(new.shape)}{where} for a buffer of shape "
            f"{tuple(old.shape)}. Nothing was changed"
        )
    if new.dtype != old.dtype:
        raise DTypeError(
            f"the step returned {new.dtype}{where} for a buffer of {old.dtype}: convert the "
            f"result with .astype({str(old.dtype)!r}). Nothing was changed"
        )
    if isinstance(new, jax.Array) and new.weak_type:
        # A weakly typed result would make the next call a new signature, and trace again.
        return jax.lax.convert_element_type(new, old.dtype)
    return new
