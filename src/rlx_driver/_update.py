"""Updates in place: ``b <- step(b, ...)`` for one buffer and for trees of them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlx_driver._exchange import exchange, resolve, share_verified
from rlx_driver._inputs import Inputs
from rlx_driver._ledger import ledger
from rlx_driver.access import (
    Access,
    Lease,
    acquire,
    acquire_one,
    fence,
    release,
    release_one,
    uncommitted,
    written,
)
from rlx_driver.backends.base import Backend, FunctionalBackend, split_aux
from rlx_driver.errors import (
    DTypeError,
    ShapeError,
    StaleViewError,
    UpdateFailedError,
    ZeroCopyError,
)
from rlx_driver.registry import registry
from rlx_driver.scopes import WriteScope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from rlx_driver.buffer import Buffer

_IN_PLACE = (
    "a step that is jitted already needs donate_argnums=0, and nothing else may hold its views"
)

__all__ = ["Structure", "UpdateMixin", "update_many"]


class UpdateMixin:
    """`Buffer.update`."""

    __slots__ = ()

    def update(
        self: Any,
        step: Callable[..., Any],
        *args: Any,
        framework: str | ModuleType = "jax",
        has_aux: bool = False,
        static_argnums: int | tuple[int, ...] = (),
        ordered: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Change the memory by a step, in place: ``b <- step(b, *args, **kwargs)``.

        Parameters
        ----------
        step
            Takes the state first. For JAX it is pure and returns the new state; it is jitted once,
            with the state donated (an already jitted one is taken as it is). For torch and NumPy
            it may change its argument, or return the new state, and runs under no_grad.
        args, kwargs
            Passed on; Buffers in them become views. NumPy arrays may be reused as soon as the call
            returns.
        framework
            In which framework the step runs.
        has_aux
            The step returns ``(state, aux)``.
        static_argnums
            Positions of the step's static arguments, the state being 0 (JAX only).
        ordered
            False: do not order torch and NumPy views that were handed out before; the next call of
            `numpy` or `torch` does.

        Returns
        -------
        aux
            What `has_aux` says, else None. Copies: never, unless the step's result lands elsewhere
            (the ledger says so). Blocks: on the host, when `ordered` and a torch or NumPy view is
            out.

        Raises
        ------
        ShapeError, DTypeError
            The step returns something else than it was given. Nothing was changed.
        ZeroCopyError
            An alias blocks the fence, or a copy was needed inside `no_copies`.
        UpdateFailedError
            The program failed while it ran; the bytes are undefined. It may be raised later, by
            the access that needs the result.
        """
        lease = self._leases.get(framework)
        if (
            lease is None
            or kwargs
            or any(type(a) not in lease.backend.plain_arguments for a in args)
        ):
            return update_many(
                [self], None, step, args, kwargs, framework, has_aux, static_argnums, ordered
            )
        # What follows is `update_many` for the everyday case, which every decode step pays: it
        # asks by attributes and not by calls.
        backend: FunctionalBackend = lease.backend
        if (
            lease.step is not None
            and lease.step() is step
            and lease.options == (has_aux, static_argnums)
        ):
            program = lease.program
        else:
            program = _remembered_program(lease, step, has_aux, static_argnums)
        access = self._access
        acquire_one(access)
        try:
            old = lease.array
            if (
                access.handed
                or (access.pending is not lease and access.pending is not None)
                or not access.synchronous
                or old is None
            ):
                old = _ready_lease(self, access, lease, backend)
            try:
                new, aux = program(old, *args)
            except BaseException as error:
                if lease.is_dead(old):
                    raise access.failed(lease, error) from error
                raise
            if lease.is_dead(old) and backend.donated_address(new) == lease.address:
                _landed(access, lease, new)
            else:
                aux = _land_elsewhere([self], [lease], [old], [new], aux)
            if ordered and access.native_out:
                _order_after(access, backend)
        finally:
            release_one(access)
        return aux


@dataclass(frozen=True, slots=True)
class Structure:
    """The structure of a tree of buffers, and how to take such trees apart and together."""

    treedef: Any
    flatten: Callable[[Any], tuple[list[Any], Any]]
    unflatten: Callable[[Any, list[Any]], Any]


def update_many(
    buffers: Sequence[Buffer],
    structure: Structure | None,
    step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    framework: str | ModuleType,
    has_aux: bool,
    static: int | tuple[int, ...],
    ordered: bool,
) -> Any:
    """Run `rlx_driver.update` over a flattened tree, or over one buffer without a structure."""
    target = resolve(framework)
    for buffer in buffers:
        if buffer._native is None:
            buffer._materialise()
    inputs = Inputs(args, kwargs, static)
    if not isinstance(target, FunctionalBackend):
        return _update_mutable(buffers, structure, _mutable(target), step, inputs, has_aux)
    if not target.trace_state_clean():
        raise _inside_trace(buffers)
    name = target.name
    leases = [buffer._leases.get(name) or buffer._lease(target) for buffer in buffers]
    treedef = None if structure is None else structure.treedef
    program = target.compiled_step(step, treedef, has_aux, inputs.static)
    accesses = [buffer._access for buffer in buffers]
    taken = list(dict.fromkeys(accesses))
    reads = inputs.reads(taken)
    acquire(taken, reads)
    try:
        olds = [
            lease.array
            if _is_ready(access, lease)
            else _ready_lease(buffer, access, lease, target, leases)
            for buffer, access, lease in zip(buffers, accesses, leases, strict=True)
        ]
        args, kwargs = inputs.for_framework(target)
        try:
            result, aux = program(olds[0] if structure is None else olds, *args, **kwargs)
        except BaseException as error:
            lost = [
                access.failed(lease, error)
                for access, lease, old in zip(accesses, leases, olds, strict=True)
                if lease.is_dead(old)
            ]
            if lost:
                raise lost[0] from error
            raise
        news = [result] if structure is None else result
        if all(map(target.is_dead, olds)) and list(map(target.donated_address, news)) == [
            lease.address for lease in leases
        ]:
            for access, lease, new in zip(accesses, leases, news, strict=True):
                lease.array = new
                lease.handed = None
                access.pending = lease
                if access.handed:
                    access.handed.clear()
            written(taken)
        else:
            aux = _land_elsewhere(buffers, leases, olds, news, aux)
        if ordered:
            _order_all_after(taken, target)
    finally:
        release(taken, reads)
    return aux


def _inside_trace(buffers: Sequence[Buffer]) -> StaleViewError:
    label = buffers[0]._access.label if buffers else "a tree"
    return StaleViewError(
        f"update of {label} was called inside a trace, where nothing can be changed in place: call "
        "it outside, or make the whole function the step. Nothing was changed"
    )


def _remembered_program(
    lease: Lease, step: Callable[..., Any], has_aux: bool, static: int | tuple[int, ...]
) -> Callable[..., Any]:
    """Give the program of a step, and keep it at the lease for the next update by the same one."""
    positions = static if isinstance(static, tuple) else (static,)
    program = lease.backend.compiled_step(step, None, has_aux, positions)
    try:
        lease.step = weakref.ref(step)
    except TypeError:  # a bound method dies at once, other things have no references: look up again
        lease.step = None
    lease.options = (has_aux, static)
    lease.program = program
    return program


def _is_ready(access: Access, lease: Lease) -> bool:
    """Tell whether a lease can be donated as it is: nobody reads, nothing else is pending."""
    return (
        not access.handed
        and (access.pending is lease or access.pending is None)
        and access.synchronous
        and lease.array is not None
    )


def _ready_lease(
    buffer: Buffer,
    access: Access,
    lease: Lease,
    backend: FunctionalBackend,
    keep: Sequence[Lease] = (),
) -> Any:
    """Give the array to donate, with everything else ordered before it."""
    if access.handed and (len(access.handed) > 1 or lease not in access.handed or access.retired):
        fence((access,), keep or (lease,))
    if access.pending is not None and access.pending is not lease:
        access.settle_for(lease)
    if not access.synchronous:
        access.order.before_functional()
    array = lease.array
    if array is None:
        if not backend.can_lease(buffer.device):
            # The way round where donation does not stay in place: an import that nobody else
            # sees, whose result is copied back.
            return share_verified(buffer._native, buffer._facts, backend)
        return buffer._imported(lease)
    if lease.is_dead(array):
        raise uncommitted(access)
    return array


def _landed(access: Access, lease: Lease, new: Any) -> None:
    """Note that a donated result lies where it should."""
    lease.array = new
    lease.handed = None
    if access.handed:
        access.handed.clear()
    access.epoch += 1
    for backend, views in access.marks:
        backend.mark_written(views)
    access.pending = lease


def _order_after(access: Access, backend: FunctionalBackend) -> None:
    """Make the views that are out right before the update returns."""
    lease = access.pending
    if lease is None:
        return
    if not access.synchronous:
        access.settle()
        return
    ledger.count_host_wait()
    try:
        backend.wait_one(lease.array)
    except Exception as error:
        raise access.failed(lease, error) from error
    access.pending = None


def _order_all_after(accesses: Sequence[Access], backend: FunctionalBackend) -> None:
    """Make the views that are out right before an update of a tree returns."""
    out = [access for access in accesses if access.native_out and access.pending is not None]
    if not out or not out[0].synchronous:
        for access in out:
            _order_after(access, backend)
        return
    ledger.count_host_wait()
    try:
        backend.wait([access.pending.array for access in out if access.pending is not None])
    except Exception as error:
        lost = [access.failed(access.pending, error) for access in accesses if access.pending]
        raise lost[0] from error
    for access in out:
        access.pending = None


def _land_elsewhere(
    buffers: Sequence[Buffer],
    leases: Sequence[Lease],
    olds: Sequence[Any],
    news: Sequence[Any],
    aux: Any,
) -> Any:
    """Copy results into place that did not land there, after the old readers are fenced.

    Raises
    ------
    ZeroCopyError
        Inside `no_copies`, or when an alias blocks the fence; the bytes are then as before for
        every buffer whose array was not donated.
    """
    backend = leases[0].backend
    if not backend.trace_state_clean():
        raise _inside_trace(buffers)
    entries = list(zip(buffers, leases, olds, news, strict=True))
    # An array that was not donated is waited for before anything asks for an address: see
    # FunctionalBackend.address.
    refused = [entry for entry in entries if not backend.is_dead(entry[2])]
    for buffer, _, _, new in refused:
        try:
            backend.wait(new)
        except Exception as error:
            raise UpdateFailedError(
                f"the program that updates {buffer._access.label} failed while it ran: {error}. It "
                "had not been given the memory; nothing was changed"
            ) from error
    stray = [
        entry
        for entry in entries
        if entry[0].byte_size and not _in_place(entry[1], entry[2], entry[3])
    ]
    moved = sum(buffer.byte_size for buffer, *_ in stray)
    lost = [lease.address for _, lease, old, _ in stray if _was_donated(lease, old)]
    if not stray:
        pass  # arrays without elements lie nowhere
    elif not lost:
        ledger.will_copy(moved, "the result was not made in place", _IN_PLACE)
        kept = [lease for _, lease, old, _ in entries if backend.is_dead(old)]
        fence(dict.fromkeys(buffer._access for buffer, *_ in stray), kept)
    else:
        # Donated, so there is no way back; another output may have taken the memory.
        ledger.count_copy(moved, "the result was not made in place")
        aux = _moved_off(backend, aux, set(lost))
    for buffer, lease, old, new in stray:
        backend.wait(new)
        with buffer._backend.writing():
            value = exchange(new, buffer._backend.name, copy=None)
            buffer._backend.copy_across(buffer._native, value)
        if backend.is_dead(old):
            lease.array = lease.handed = None
            buffer._access.handed.pop(lease, None)
        buffer._access.order.after_native()
        buffer._access.written()
    done = {id(lease) for _, lease, _, _ in stray}
    for buffer, lease, _, new in entries:
        if id(lease) not in done:
            _landed(buffer._access, lease, new)
    return aux


def _in_place(lease: Lease, old: Any, new: Any) -> bool:
    return _was_donated(lease, old) and lease.backend.donated_address(new) == lease.address


def _was_donated(lease: Lease, old: Any) -> bool:
    # Without a lease the program had a plain import, whose donation copies.
    return lease.array is not None and lease.is_dead(old)


def _moved_off(backend: FunctionalBackend, aux: Any, taken: set[int]) -> Any:
    """Copy every other output that took the memory of a buffer to memory of its own."""
    leaves, structure = backend.flatten(aux)
    moved = [
        backend.duplicate(leaf)
        if backend.owns(leaf) and leaf.size and backend.address(leaf) in taken
        else leaf
        for leaf in leaves
    ]
    backend.wait([leaf for leaf in moved if backend.owns(leaf)])
    return backend.unflatten(structure, moved)


# --- torch and NumPy -----------------------------------------------------------------------------


def _mutable(target: Backend | ModuleType) -> Backend:
    if isinstance(target, Backend):
        return target
    raise ZeroCopyError(
        f"update runs a step in a framework with a backend; {target.__name__} has none: write "
        "through a view inside write(...)"
    )


def _update_mutable(
    buffers: Sequence[Buffer],
    structure: Structure | None,
    target: Backend,
    step: Callable[..., Any],
    inputs: Inputs,
    has_aux: bool,
) -> Any:
    reads = inputs.reads([buffer._access for buffer in buffers])
    with WriteScope(buffers, target.name, None, list, reads) as views, target.writing():
        args, kwargs = inputs.for_framework(target)
        state = views[0] if structure is None else structure.unflatten(structure.treedef, views)
        result = step(state, *args, **kwargs)
        result, aux = split_aux(result, has_aux)
        if result is None:
            return aux  # it changed its argument
        news = [result] if structure is None else _flattened(result, structure)
        changed = [
            (buffer, view, _fitting_result(buffer, view, new, target))
            for buffer, view, new in zip(buffers, views, news, strict=True)
            if new is not view and new is not None
        ]
        # A result may be made of another buffer's memory (a swap): take it out before writing.
        values = [
            target.duplicate(new) if any(target.overlaps(new, view) for view in views) else new
            for _, _, new in changed
        ]
        if changed:
            moved = sum(buffer.byte_size for buffer, _, _ in changed)
            ledger.will_copy(
                moved, "the result was not made in place", "change the argument instead"
            )
        for (_, view, _), value in zip(changed, values, strict=True):
            target.copy_across(view, value)
        return aux


def _flattened(result: Any, structure: Structure) -> list[Any]:
    leaves, found = structure.flatten(result)
    if found != structure.treedef:
        raise ShapeError(
            f"a step returns its state with the structure it came in: {structure.treedef}; this "
            f"one returned {found}. To return more, pass has_aux=True"
        )
    return leaves


def _fitting_result(buffer: Buffer, view: Any, new: Any, target: Backend) -> Any:
    if not target.owns(new):
        source = registry.for_array(new)
        raise DTypeError(
            f"a {target.name} step on {buffer._access.label} returns a {target.name} array; this "
            f"one returned a {type(new).__qualname__}"
            + ("" if source is None else f" of {source.name}")
        )
    if tuple(new.shape) != buffer.shape:
        raise ShapeError(
            f"the step returned shape {tuple(new.shape)} for {buffer._access.label} of shape "
            f"{buffer.shape}. Nothing was copied"
        )
    if new.dtype != view.dtype:
        raise DTypeError(
            f"the step returned {new.dtype} for {buffer._access.label} of {view.dtype}: convert "
            "the result. Nothing was copied"
        )
    return new
