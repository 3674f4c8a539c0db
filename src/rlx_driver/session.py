"""Sessions: steps compiled over handles that keep their values, names and addresses."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from rlx_driver import _pytree
from rlx_driver._mutable import require_backend
from rlx_driver._named_step import Signature
from rlx_driver._session_handles import (
    Spec,
    described,
    filled,
    leaves_of,
    lookup,
    named,
    planned_tree,
    same_handles,
)
from rlx_driver._sharing import resolve
from rlx_driver.buffer import Buffer
from rlx_driver.compiled import Compiled, require_static
from rlx_driver.device import Device
from rlx_driver.errors import (
    ClosedHandleError,
    DeviceUnavailableError,
    UnboundNameError,
)
from rlx_driver.handle import HandleRegion
from rlx_driver.scopes import ReadScope
from rlx_driver.transfer import commit_all
from rlx_driver.tree import _checked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

__all__ = ["Session"]


class Session:
    """Names for handles on one device, and steps compiled over them in any framework.

    Compile, bind, run, read: what a step keeps from one run to the next is in handles, which every
    step of the session takes by name, whatever framework it runs in.

    Parameters
    ----------
    device
        Where the handles are.
    backend
        Who owns the memory of handles that the session makes; see `HandleRegion`.
    region
        Where the session makes its handles; left out, a region of its own. The handles of a given
        region are the session's by their names.

    Raises
    ------
    DeviceUnavailableError
        Region and device disagree.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> def count(*, n):
    ...     return {"n": n + 1}, None
    >>> with rlx.Session() as session:
    ...     step = session.compile(count, handles={"n": ((), "i32")}, framework="numpy")
    ...     step.bind_handle("n", 5)
    ...     step.run()
    ...     int(step.read_handle("n"))
    6
    """

    def __init__(
        self,
        device: Device | str | None = None,
        *,
        backend: str | None = None,
        region: HandleRegion | None = None,
    ) -> None:
        if region is None:
            region = HandleRegion("cpu" if device is None else device, backend=backend)
            self._own_region = True
        else:
            if (device is not None and Device(device) != region.device) or backend is not None:
                raise DeviceUnavailableError(
                    f"a session in a region on {region.device} has its device and its backend: "
                    "leave device= and backend= out"
                )
            self._own_region = False
        self._region = region
        self._named: dict[str, Any] = {}
        self._bound: set[str] = set()
        self._lock = threading.RLock()
        self._closed = False

    @property
    def device(self) -> Device:
        """Where the handles are."""
        return self._region.device

    @property
    def region(self) -> HandleRegion:
        """Where the handles are that the session makes."""
        return self._region

    @property
    def handles(self) -> dict[str, Any]:
        """The handles of the session by name; a tree of handles where one was given."""
        shared = {} if self._own_region else {handle.name: handle for handle in self._region}
        return shared | self._named

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called, or its region is closed."""
        return self._closed or self._region.is_closed

    def compile(
        self,
        step: Callable[..., Any],
        handles: Any = None,
        framework: str | ModuleType = "jax",
        *,
        static_argnames: str | Iterable[str] = (),
        ordered: bool = True,
        **options: Any,
    ) -> Compiled:
        """Prepare a step to run over handles.

        Parameters
        ----------
        step
            ``step(*, token, kv) -> ({"kv": new_kv}, outputs)``: called by name with its inputs and
            its handles, as arrays of the framework; returns the new state, and whatever outputs. An
            entry that is left out, or is the very array that came in, was changed in place or not
            at all. For JAX it is pure, and is jitted with the state donated.
        handles
            The state: a list of `BufferHandle`, and of names that the session has already; or a
            dict from names to those, to pairs ``(shape, dtype)``, to initial arrays (copied), or
            to trees of all these. New handles are made in the session's region, in one allocation.
            Left out: those of the session that the step takes.
        framework
            In which framework the step runs.
        static_argnames
            Inputs that are no arrays but part of the program, which is compiled for each of their
            values; they have a hash.
        ordered
            As for `rlx_driver.update`.
        options
            For torch those of ``torch.compile`` (``dynamic``, ``mode``, ``fullgraph``, ``backend``,
            ``options``), or ``eager=True`` to call the step as it is.

        Returns
        -------
        Compiled
            Copies: initial arrays. Nothing is compiled yet: the first `Compiled.run` does it.

        Raises
        ------
        UnboundNameError
            The step does not take a name, or the session has no handle of it.
        DuplicateError
            The session has another handle of that name, or a handle stands there twice.
        ShapeError, DTypeError
            A bad shape, dtype or option; a step that is no function of names.
        DeviceUnavailableError
            A handle lives elsewhere, or the framework does not see the device.
        UnknownFrameworkError, ZeroCopyError
            There is no such framework, or no step can run in it.

        No handle was made.
        """
        self._require_open()
        target = require_backend(resolve(framework))
        if self.device not in target.devices(self.device.kind):
            raise DeviceUnavailableError(f"{target.name} does not see {self.device}")
        signature = Signature(step)
        static = frozenset(
            (static_argnames,) if isinstance(static_argnames, str) else static_argnames
        )
        signature.require_known(static, "static")
        if handles is None:
            asked = dict.fromkeys(n for n in self.handles if n in signature.names)
        else:
            asked = named(handles)
        signature.require_known(asked, "a handle")
        require_static(static, asked)
        call = target.named_step(step, options)
        with self._lock:
            trees = self._taken(asked)
        return Compiled(self, step, call, trees, target, signature, static, ordered)

    def handle(self, name: str) -> Any:
        """Give the handle of a name, or the tree of handles.

        Raises
        ------
        UnboundNameError
            When there is none.
        """
        return lookup(self.handles, name, "the session")

    def bind_handle(self, name: str, initial: Any, *, cast: bool = False) -> None:
        """Set the value of a handle, by copy.

        Parameters
        ----------
        name
            Which.
        initial
            An array of any framework, from any device, of the handle's shape and dtype; a number
            fills the handle. For a tree of handles, a tree of these, or one number for all.
        cast
            Convert from another dtype, as NumPy's ``astype`` does.

        Notes
        -----
        Copies: always. Blocks: on the host for the copy. Aliases: nothing. It may be called
        again, between any two runs.

        Raises
        ------
        UnboundNameError
            No handle has that name.
        ShapeError, DTypeError
            The value does not fit. Nothing was changed.
        ZeroCopyError
            Inside `no_copies`; or an array that no copy helps (requires_grad).
        ClosedHandleError
            The session or the handle is closed.
        """
        self._require_open()
        tree = self.handle(name)
        values = filled(name, tree, initial)
        described(name, tree, values, cast=cast)
        commit_all(leaves_of(tree), leaves_of(values), cast, "bind_handle")
        self._bound.add(name)

    def read_handle(self, name: str) -> Any:
        """Give a copy of a handle's value on the host.

        Returns
        -------
        numpy.ndarray
            Of the handle's shape and dtype, or a tree of them, of one moment. Copies: always.
            Blocks: until it is there. Aliases: nothing.

        Raises
        ------
        UnboundNameError
            No handle has that name, or it has no value yet.
        ClosedHandleError
            The session or the handle is closed.
        """
        tree = self.handle(name)
        self._require_bound((name,))
        flatten, unflatten = _pytree.functions()
        buffers, structure = flatten(tree)
        framework = "numpy" if self.device.is_host else self.device.backend.name
        if len(buffers) == 1:
            return unflatten(structure, [buffers[0].to_host().numpy()])
        with ReadScope(buffers, framework, None):
            return unflatten(structure, [buffer.to_host().numpy() for buffer in buffers])

    def close(self) -> None:
        """Close the session and the handles that it made; handles that were given stay open."""
        self._closed = True
        if self._own_region:
            self._region.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.is_closed else ""
        return f"<Session on {self.device}, handles: {', '.join(self.handles) or 'none'}{state}>"

    # --- how handles get in

    def _require_open(self) -> None:
        if self.is_closed:
            raise ClosedHandleError("the session is closed: make a new one")

    def _require_bound(self, names: Iterable[str]) -> None:
        """Raise when a handle has no value: nobody bound it, wrote it or took a view to write."""
        self._require_open()
        for name in names:
            if name in self._bound:
                continue
            for buffer in leaves_of(self.handle(name)):
                access = buffer._access
                access.require_open()
                if not (access.epoch or access.native_out):
                    raise UnboundNameError(
                        f"the handle {name!r} has no value yet: bind_handle({name!r}, initial) "
                        "before the first run; a number fills it. Nothing was changed"
                    )

    def _taken(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Give the trees of handles asked for, made where they have to be; all or none."""
        found: dict[str, Any] = {}
        fresh: dict[str, Any] = {}
        known = self.handles
        for name, value in asked.items():
            if value is None:
                found[name] = self.handle(name)
                continue
            tree = planned_tree(name, value, self.device)
            if name in known and not any(leaf.is_closed for leaf in leaves_of(known[name])):
                found[name] = same_handles(name, known[name], tree)
            else:
                found[name] = fresh[name] = tree
        given = [leaf for tree in found.values() for leaf in leaves_of(tree)]
        _checked([leaf for leaf in given if isinstance(leaf, Buffer)])
        self._bound.difference_update(fresh)  # of a closed handle of that name
        found.update(self._made(fresh))
        self._named.update({name: found[name] for name in asked})
        return found

    def _made(self, fresh: dict[str, Any]) -> dict[str, Any]:
        flatten, unflatten = _pytree.functions()
        leaves, structure = flatten(fresh)
        specs = [leaf for leaf in leaves if isinstance(leaf, Spec)]
        if not specs:
            return fresh
        handles = self._region.create({spec.name: (spec.shape, spec.dtype) for spec in specs})
        try:
            for spec in specs:
                if spec.initial is not None:
                    handles[spec.name].copy_from(spec.initial)
        except BaseException:
            for handle in handles.values():
                handle.close()
            raise
        for name, tree in fresh.items():
            own = [leaf for leaf in leaves_of(tree) if isinstance(leaf, Spec)]
            if own and all(spec.initial is not None for spec in own):
                self._bound.add(name)
        return unflatten(  # type: ignore[no-any-return]
            structure,
            [handles[leaf.name] if isinstance(leaf, Spec) else leaf for leaf in leaves],
        )
