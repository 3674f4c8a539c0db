"""The views of a Buffer: its memory as NumPy, torch, JAX and others see it, cached and ordered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlx_driver import _hooks
from rlx_driver._ledger import ledger
from rlx_driver._locks import acquire, release
from rlx_driver._sharing import resolve, share_verified, verify
from rlx_driver.access import Access, Lease, uncommitted
from rlx_driver.backends.base import ArrayFacts, Backend, FunctionalBackend, Obstacle
from rlx_driver.errors import DeviceUnavailableError, StaleViewError, ZeroCopyError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import numpy as np

    from rlx_driver.device import Device

__all__ = ["ViewsMixin"]


class ViewsMixin:
    """The view methods of `Buffer`."""

    __slots__ = ()

    if TYPE_CHECKING:
        _access: Access
        _backend: Backend
        _derivation: Callable[[Backend, Any], Any] | None
        _device: Device
        _facts: ArrayFacts
        _jax: Lease | None
        _leases: dict[str, Lease]
        _native: Any
        _numpy: Any
        _parent: ViewsMixin | None
        _torch: Any
        _views: dict[Any, Any]

        def _materialise(self) -> None: ...

    def numpy(self) -> np.ndarray[Any, Any]:
        """Give the memory as a NumPy array.

        Copies: never. Blocks: until updates in progress are done. Read-only: no. Aliases: this
        Buffer. The second call is a look-up. Existing code may write through the view; while JAX
        work on the Buffer may be under way, write inside `write`.

        Raises
        ------
        DeviceUnavailableError
            Off the host; `to_host` copies.
        ClosedHandleError, StaleViewError
            See `rlx_driver.errors`.
        """
        view = self._numpy
        if view is not None and self._access.native_ready:
            return view  # type: ignore[no-any-return]
        return self._mutable_view(registry.get("numpy"))  # type: ignore[no-any-return]

    def torch(self) -> Any:
        """Give the memory as a torch tensor.

        Copies: never. Blocks: on the host until updates in progress are done; on a GPU torch's
        current stream waits instead. Read-only: no. Aliases: this Buffer. The second call is a
        look-up. The tensor does not require grad; one that came to is made anew.

        Raises
        ------
        ZeroCopyError
            When torch cannot see such memory (a dtype it lacks, negative strides).
        DeviceUnavailableError
            When torch is not installed.
        """
        view = self._torch
        if (
            view is not None
            and not view.requires_grad
            and ((access := self._access).native_ready or access.is_settled())
        ):
            return view
        return self._mutable_view(registry.get("torch"))

    def jax(self) -> Any:
        """Give the memory as a JAX array.

        Copies: never. Blocks: only after an update of an overlapping slice. Read-only: JAX arrays
        are. Aliases: this Buffer. The second call is a look-up. The array dies with the next write
        by the driver: using it then raises JAX's own error. (On a GPU also with the next call of
        `jax` after torch has written through a view: copies of the old array to the host would not
        wait for torch.) It may be donated to a jitted function of yours whose result you give back
        by `commit`.

        Raises
        ------
        ZeroCopyError
            When JAX cannot see such memory (strides, alignment, x64, a dtype it lacks).
        StaleViewError
            Inside a JAX trace, which would keep the array as a constant; or when an array given
            out before was donated and its result never committed.
        """
        lease = self._jax
        if (
            lease is not None
            and (array := lease.handed) is not None
            and lease.clean()
            and not lease.is_dead(array)
        ):
            access = self._access
            if access.functional_ready or (access.is_shared() and self._is_current(lease)):
                return array
        return self.array("jax")

    def array(self, framework: str | ModuleType) -> Any:
        """Give the memory as an array of a framework, by name or module; never a copy.

        ``array("numpy")``, ``("torch")`` and ``("jax")`` are `numpy`, `torch` and `jax`. A module
        with ``from_dlpack`` gets a mutable view that is verified.

        Raises
        ------
        ZeroCopyError
            When the framework cannot see the memory; the text says why.
        UnknownFrameworkError, DeviceUnavailableError
            No such framework, or its package is missing.
        """
        target = resolve(framework)
        if isinstance(target, FunctionalBackend):
            return self._functional_view(target)
        return self._mutable_view(target)

    def __rlx_array__(self, framework: str | ModuleType) -> Any:
        """Give the tracked view; what `exchange` and steps' arguments call."""
        return self.array(framework)

    def __rlx_native__(self) -> Any:
        """Give the native array, without ordering; what transfers call."""
        return self._native

    def __rlx_facts__(self) -> ArrayFacts:
        """Describe the memory; what `explain` calls."""
        self._materialise()
        return self._facts

    def _mutable_view(self, target: Backend | ModuleType, *, in_scope: bool = False) -> Any:
        access = self._access
        if _hooks.checker is not None:
            _hooks.checker.give_mutable(self, target)
        if in_scope:
            return self._view_of(target)
        if self._native is None:
            self._materialise()
        if not access.native_out:
            # Before the view is there: an update by another thread is to find it ordered.
            access.native_out = True
            access.quiet = False
            if not access.synchronous:
                access.functional_ready = False
        if access.native_ready:
            return self._handed_out(target, self._view_of(target))
        acquire((), [access])
        try:
            with access.lock:
                view = self._view_of(target)
                access.settle()
                access.view_out()
        finally:
            release((), [access])
        return self._handed_out(target, view)

    def _view_of(self, target: Backend | ModuleType) -> Any:
        """Give the cached view of a mutable framework, or make it."""
        key = target.name if isinstance(target, Backend) else target
        view = self._views.get(key)
        if view is not None and (not isinstance(target, Backend) or target.is_pristine(view)):
            return view
        with self._access.lock:  # so that threads share one view, and its version counter
            return self._kept_view(key, target)

    def _kept_view(self, key: Any, target: Backend | ModuleType) -> Any:
        view = self._views.get(key)
        if not isinstance(target, Backend):
            if view is None:
                view = self._views[key] = self._made_view(target)
            return view
        if view is None:
            view = self._made_view(target)
            if not target.may_cache(view):
                return view
            self._mark(target, view)
        elif not target.is_pristine(view):
            view = target.renewed(view)
        self._views[key] = view
        return view

    def _handed_out(self, target: Backend | ModuleType, view: Any) -> Any:
        """Keep a view for the fast returns: not one of a scope, which nobody orders later."""
        if isinstance(target, Backend) and self._views.get(target.name) is view:
            if target.name == "numpy":
                self._numpy = view
            elif target.name == "torch":
                self._torch = view
        return view

    def _made_view(self, target: Backend | ModuleType) -> Any:
        if target is self._backend:
            if self._parent is not None:
                self._parent._base_view(target)  # keeps count of writes for its parts too
            return self._native
        if isinstance(target, Backend) and target.name == "numpy" and not self._device.is_host:
            raise DeviceUnavailableError(
                f"{self._access.label} lives on {self._device} and NumPy sees host memory only: "
                "call to_host() for a copy on the host"
            )
        facts = self._facts
        if isinstance(target, Backend) and (obstacle := target.obstacle(facts)) is not None:
            raise ZeroCopyError(_refused(self, target, obstacle))
        ledger.count_exchange()
        if (
            self._parent is not None
            and self._derivation is not None
            and isinstance(target, Backend)
        ):
            # By way of the base's view, so that they share what the framework keeps for a base,
            # such as torch's version counter.
            base = self._parent._base_view(target)
            if base is not None and target.may_cache(base):
                view = self._derivation(target, base)
                verify(view, facts, target.facts(view))
                return view
        with self._backend.exporting(self._device):
            return share_verified(self._native, facts, target, may_be_fake=True)

    def _base_view(self, target: Backend) -> Any | None:
        """Give the view that slices are made from; None where the framework cannot see the base."""
        return None if target.obstacle(self._facts) is not None else self._view_of(target)

    def _mark(self, backend: Backend, view: Any) -> None:
        own = self._parent is None or backend.obstacle(self._parent._facts) is not None
        if own and type(backend).mark_written is not Backend.mark_written:
            self._access.marks.append((backend.mark_written, [view]))
            if self._parent is None and backend is self._backend:
                self._access.watch(backend.version_of(view))

    def _keep_view(self, target: Backend, view: Any) -> None:
        """Take an array of this very memory that came about elsewhere for the view from now on.

        Whoever shares its count of writes is told of the driver's from then on.
        """
        verify(view, self._facts, target.facts(view))
        with self._access.lock:
            self._mark(target, view)
            self._views[target.name] = view
            if target.name == "torch":
                self._torch = None  # the next call takes it, in order

    def _functional_view(self, target: FunctionalBackend, *, in_scope: bool = False) -> Any:
        if not target.trace_state_clean():
            raise StaleViewError(
                f"{self._access.label}.{target.name}() was called inside a trace, which would keep "
                "the array as a constant that later updates do not reach: pass it as an argument"
            )
        self._materialise()
        access = self._access
        if not in_scope:
            acquire((), [access])
        try:
            with access.lock:
                lease = self._lease(target)
                access.settle_for(lease)
                if not access.synchronous:
                    # What goes out may be donated to a program of the user, which writes.
                    access.order.before_functional(writes=not in_scope)
                    if not (access.quiet or access.native_out or in_scope):
                        access.quiet = True
                        access.refresh()
                array = lease.array
                if array is None:
                    array = self._imported(lease)
                elif lease.is_dead(array):
                    raise uncommitted(access)
                elif not (access.synchronous or access.is_fresh(lease)):
                    array = self._renewed(lease)
                elif access.native_out and not target.shows_current_bytes(array):
                    access.retire(target, array)
                    array = self._imported(lease)
                lease.handed = array if _hooks.checker is None else None
                access.handed[lease] = None
                if target.name == "jax":
                    self._jax = lease  # type: ignore[misc]
        finally:
            if not in_scope:
                release((), [access])
        if not in_scope and _hooks.checker is not None:
            return _hooks.checker.hand_out(self, lease, array)
        return array

    def _is_current(self, lease: Lease) -> bool:
        """Tell whether the array last handed out shows the bytes of now, whoever looks at it."""
        return self._access.is_fresh(lease) and lease.backend.shows_current_bytes(lease.handed)

    def _renewed(self, lease: Lease) -> Any:
        """Make a lease's array come after the writes of others; what was handed out dies."""
        backend, old = lease.backend, lease.array
        new = backend.fence([old])[0]
        if not lease.is_dead(old):  # an alias holds it, so that it lives on beside a new import
            self._access.retire(backend, old)
            return self._imported(lease)
        lease.array = new
        self._access.note_fresh(lease)
        return new

    def _lease(self, backend: FunctionalBackend) -> Lease:
        """Give the lease of this very piece of memory, shared by equal slices."""
        lease = self._leases.get(backend.name)
        if lease is None:
            facts = self._facts
            key = (backend.name, facts.address, facts.shape, facts.strides, facts.dtype)
            lease = self._access.leases.get(key)
            if lease is None:
                lease = Lease(backend, facts.address)
                self._access.leases[key] = lease
            self._leases[backend.name] = lease
        return lease

    def _imported(self, lease: Lease) -> Any:
        """Import the memory for a lease, verified."""
        backend, facts = lease.backend, self._facts
        obstacle = backend.lease_obstacle(facts)
        if obstacle is not None:
            raise ZeroCopyError(_refused(self, backend, obstacle))
        if not backend.can_lease(self._device):
            raise ZeroCopyError(
                f"this {backend.name} does not update memory in place that it does not own, so its "
                "readers could not be fenced: make the handle in a HandleRegion(device, "
                f"backend={backend.name!r}). update() works, by way of a copy"
            )
        ledger.count_exchange()
        access = self._access
        if not access.synchronous:
            access.settle(writes=False)  # the import comes after the current stream
        with self._backend.exporting(self._device):
            array = backend.lease(self._native, facts)
        verify(array, facts, backend.facts(array))
        lease.array = array
        access.note_fresh(lease)
        return array


def _refused(buffer: Any, target: Backend, obstacle: Obstacle) -> str:
    # The remedies of an exchange speak of its `copy`, which a view does not have.
    remedy = (
        f"a view never copies, but exchange(b.numpy(), {target.name!r}, copy=True) does"
        if obstacle.copyable
        else obstacle.remedy
    )
    return f"{buffer!r} cannot be seen by {target.name} as it is: {obstacle.text}; {remedy}"
