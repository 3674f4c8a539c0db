"""`Compiled`: a step of a session, whose handles are inputs by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver import _pytree
from rlx_driver._exchange import exchange
from rlx_driver._inputs import Inputs
from rlx_driver._mutable import Structure, update_mutable
from rlx_driver._named_step import NamedStep, Signature
from rlx_driver._session_handles import described, leaves_of, lookup
from rlx_driver._update import update_many
from rlx_driver.backends.base import Backend, FunctionalBackend
from rlx_driver.buffer import Buffer
from rlx_driver.errors import DTypeError, ShapeError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rlx_driver.session import Session

__all__ = ["Compiled"]

_PLAIN: frozenset[type] = frozenset({bool, int, float, complex, type(None), str, bytes})


class Compiled:
    """A step in one framework, whose state is in handles; made by `Session.compile`.

    Examples
    --------
    >>> import numpy as np
    >>> import rlx_driver as rlx
    >>> def step(*, x, total):
    ...     return {"total": total + x}, total.max()
    >>> with rlx.Session() as session:
    ...     add = session.compile(step, handles={"total": ((3,), "f64")}, framework="numpy")
    ...     add.bind_handle("total", np.arange(3.0))
    ...     peak = float(add.run(x=10.0))
    ...     peak, add.read_handle("total").tolist()
    (2.0, [10.0, 11.0, 12.0])
    """

    def __init__(
        self,
        session: Session,
        step: Callable[..., Any],
        call: Callable[[dict[str, Any], dict[str, Any]], Any],
        handles: dict[str, Any],
        target: Backend,
        signature: Signature,
        static: frozenset[str],
        ordered: bool,
    ) -> None:
        self._session = session
        self._step = step
        self._handles = handles
        self._target = target
        self._signature = signature
        self._static = static
        self._ordered = ordered
        self._call = call
        # Types of inputs that need no look. Off the host an array may be on the wrong device.
        self._easy: set[type] = set(_PLAIN)
        if session.device.is_host:
            self._easy |= target.plain_arguments
            if target.functional:
                self._easy.add(np.ndarray)  # `update` copies it
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    @property
    def session(self) -> Session:
        """The session whose handles it uses."""
        return self._session

    @property
    def framework(self) -> str:
        """The name of the framework it runs in."""
        return self._target.name

    @property
    def handles(self) -> dict[str, Any]:
        """The handles of the step by name; a tree of handles where one was given."""
        return dict(self._handles)

    def handle(self, name: str) -> Any:
        """Give the handle of a name, or the tree of handles.

        Raises
        ------
        UnboundNameError
            When the step has none of that name.
        """
        return lookup(self._handles, name, self._label)

    def bind_handle(self, name: str, initial: Any, *, cast: bool = False) -> None:
        """Set a handle's value; see `Session.bind_handle`."""
        self.handle(name)
        self._session.bind_handle(name, initial, cast=cast)

    def read_handle(self, name: str) -> Any:
        """Give a copy of a handle's value on the host; see `Session.read_handle`."""
        self.handle(name)
        return self._session.read_handle(name)

    def run(self, /, *positional: Any, **inputs: Any) -> Any:
        """Run the step once: its handles change in place, its outputs are returned.

        Parameters
        ----------
        inputs
            What the step takes, by name, beside its handles: arrays of any framework, Buffers,
            numbers, trees of these. They are given to the step as arrays of its framework, on the
            session's device. An array given under the name of a handle stands in for it in this
            call: the handle is neither read nor changed, and what the step returns for it is
            dropped.

        Returns
        -------
        outputs
            What the step returned beside its state, in its structure; never a view of memory of
            the driver. With JAX they may not be computed yet.

        Notes
        -----
        Copies: what `rlx_driver.update` says; an output that aliases memory of the driver; inputs
        of another framework where they cannot be shared or JAX would read them late. Blocks: as
        `update` does. NumPy inputs may be reused as soon as the call returns.

        Raises
        ------
        UnboundNameError
            A name that the step does not take, one that it needs and was not given, or a handle
            without a value.
        ShapeError, DTypeError
            An input that stands in for a handle does not fit it, or the step returned something
            else than a pair of its state and its outputs; positional inputs. Nothing was changed,
            but for what a torch or NumPy step has changed by itself before.
        ClosedHandleError
            The session, or a handle, is closed.
        UpdateFailedError, ZeroCopyError, StaleViewError
            As for `rlx_driver.update`.
        """
        lent: tuple[str, ...] = ()
        if positional:
            names = ", ".join(f"{n}=..." for n in self._signature.names if n not in self._handles)
            raise DTypeError(f"run takes its inputs by name: run({names})")
        easy = self._easy
        for value in inputs.values():
            if type(value) not in easy:
                inputs, lent = self._brought(inputs)
                break
        plan = self._plans.get((lent, *inputs)) or self._planned(lent, inputs)
        if plan.stands_in:
            for name in plan.stands_in:
                described(name, self._handles[name], inputs[name])
        if not plan.bound or self._session.is_closed:
            self._session._require_bound(plan.handles)
            plan.bound = True
        values = tuple(inputs.values()) if plan.in_order else tuple(map(inputs.get, plan.values))
        return plan.run(values)

    @property
    def _label(self) -> str:
        return f"the compiled step {self._signature.label}"

    def _brought(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Give inputs as the framework takes them, and the names of those that hold Buffers."""
        found: dict[str, Any] = {}
        lent = []
        flatten, unflatten = _pytree.functions()
        for name, value in inputs.items():
            if name in self._static:
                self._require_hashable(name, value)
                found[name] = value
                continue
            leaves, structure = flatten(value)
            own = self._handles.get(name)
            if own is not None and [*map(id, leaves)] == [*map(id, leaves_of(own))]:
                continue  # the handle itself, which is the default
            leaves = [self._brought_leaf(leaf) for leaf in leaves]
            if any(isinstance(leaf, Buffer) for leaf in leaves):
                lent.append(name)
            found[name] = unflatten(structure, leaves)
            kind = type(value)
            if found[name] is value and self._target.owns(value) and self._session.device.is_host:
                self._easy.add(kind)
        return found, tuple(lent)

    def _brought_leaf(self, leaf: Any) -> Any:
        target, device = self._target, self._session.device
        if type(leaf) in self._easy or isinstance(leaf, Buffer):
            return leaf
        functional = isinstance(target, FunctionalBackend)
        if functional and isinstance(leaf, np.ndarray):
            return leaf  # `update` copies it, and the program takes it to its device
        source = registry.for_array(leaf)
        if source is None and not hasattr(leaf, "__dlpack__"):
            return leaf
        if source is target and (device.is_host or target.device_of(leaf) == device):
            return leaf
        if device.is_host:
            # A program of JAX may read it when the caller has long changed it.
            return exchange(leaf, target.name, copy=True if functional else None)
        facts = None if source is None else source.facts(leaf)
        if facts is None:
            return leaf
        buffer = Buffer.zeros(facts.shape, facts.dtype, device)
        buffer.copy_from(leaf)
        return buffer

    def _require_hashable(self, name: str, value: Any) -> None:
        try:
            hash(value)
        except TypeError:
            raise DTypeError(
                f"{name!r} is static, so that {self._label} is compiled for each value of it: a "
                f"{type(value).__qualname__} has no hash. Nothing was changed"
            ) from None

    def _planned(self, lent: tuple[str, ...], inputs: Mapping[str, Any]) -> _Plan:
        """Make the plan for a set of names, in whatever order they come."""
        self._signature.require_known(inputs, "an input")
        self._signature.require_complete(self._handles.keys() | inputs.keys())
        ordered = tuple(sorted(inputs))
        with self._session._lock:  # or threads would compile a program each
            plan = self._plans.get((lent, *ordered))
            if plan is None:
                plan = self._plans[(lent, *ordered)] = _Plan(self, ordered, lent)
        if tuple(inputs) != ordered:
            plan = self._plans[(lent, *inputs)] = plan.reordered()
        return plan

    def __repr__(self) -> str:
        handles = ", ".join(self._handles) or "none"
        return f"<Compiled {self._signature.label} in {self.framework}, handles: {handles}>"


class _Plan:
    """How to run a step for one set of input names."""

    def __init__(self, compiled: Compiled, values: tuple[str, ...], lent: tuple[str, ...]) -> None:
        target = compiled._target
        state = {n: tree for n, tree in compiled._handles.items() if n not in values}
        self.handles = tuple(state)
        self.stands_in = tuple(n for n in compiled._handles if n in values)
        self.values = values
        self.in_order = True
        self.bound = False
        self._ordered = compiled._ordered
        self._target = target
        self._static = tuple(i for i, n in enumerate(values, 1) if n in compiled._static)
        self._single: Buffer | None = None
        only = next(iter(state.values())) if len(state) == 1 else None
        if isinstance(target, FunctionalBackend):
            flatten, unflatten = target.flatten, target.unflatten
        else:
            flatten, unflatten = _pytree.functions()
        self._buffers, treedef = flatten(state)
        self._structure: Structure | None = Structure(treedef, flatten, unflatten)
        if isinstance(only, Buffer):
            self._single, self._structure = only, None
        self._program = NamedStep(
            compiled._step,
            compiled._call,
            target,
            self.handles,
            self._single is not None,
            values,
            lent,
            self.stands_in,
        )

    def reordered(self) -> _Plan:
        """Give the same plan, with the same program, for names that come in another order."""
        other: _Plan = object.__new__(_Plan)
        other.__dict__.update(self.__dict__)
        other.in_order = False
        return other

    def run(self, values: tuple[Any, ...]) -> Any:
        """Run `rlx_driver.update` on the handles, past what it would find out again."""
        target = self._target
        if not target.functional:
            for buffer in self._buffers:
                if buffer._native is None:
                    buffer._materialise()
            inputs = Inputs(values, {}, self._static, target.plain_arguments)
            return update_mutable(
                self._buffers, self._structure, target, self._program, inputs, True
            )
        name = target.name
        if self._single is not None:
            return self._single.update(
                self._program,
                *values,
                framework=name,
                has_aux=True,
                static_argnums=self._static,
                ordered=self._ordered,
            )
        return update_many(
            self._buffers,
            self._structure,
            self._program,
            values,
            {},
            name,
            True,
            self._static,
            self._ordered,
        )


def require_static(static: frozenset[str], handles: Mapping[str, Any]) -> None:
    """Refuse handles that are to be static."""
    for name in static:
        if name in handles:
            raise ShapeError(f"{name!r} is a handle, whose value changes: it cannot be static")
