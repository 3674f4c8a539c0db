"""Updates in place: ``b <- step(b, ...)`` for one buffer and for trees of them."""

from __future__ import annotations

import weakref
from threading import get_ident
from typing import TYPE_CHECKING, Any

from rlx_driver import _hooks, _locks
from rlx_driver._fence import fence
from rlx_driver._inputs import Inputs, static_positions
from rlx_driver._landing import inside_trace, land_elsewhere, order_all_after
from rlx_driver._ledger import ledger
from rlx_driver._locks import acquire, release
from rlx_driver._mutable import Structure, require_backend, update_mutable
from rlx_driver._sharing import resolve, share_verified
from rlx_driver.access import Access, Lease, held_by_alias, tell, uncommitted
from rlx_driver.backends.base import FunctionalBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from rlx_driver.buffer import Buffer

__all__ = ["UpdateMixin", "update_many"]


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
        everyday = lease is not None and not kwargs
        if everyday:
            for value in args:
                if type(value) not in lease.plain:
                    everyday = False
                    break
        if not everyday:
            return update_many(
                [self], None, step, args, kwargs, framework, has_aux, static_argnums, ordered
            )
        # What follows is `update_many` for the everyday case, which every decode step pays. It
        # asks by attributes and not by calls; with calls it costs half as much again.
        backend: FunctionalBackend = lease.backend
        if lease.step() is step and lease.has_aux is has_aux and lease.static is static_argnums:
            program = lease.program
        else:
            program = _remembered_program(lease, step, has_aux, static_argnums)
        access = self._access
        try:
            access.vacant.pop()
        except IndexError:
            acquire((access,))
        else:
            access.writer = get_ident()
            access.native_ready = access.functional_ready = False
        try:
            old = lease.array
            pending = access.pending
            settled = access.synchronous or access.order.is_shared()
            if (
                access.handed
                or (pending is not lease and pending is not None)
                or not settled
                or old is None
            ):
                old = _ready_lease(self, access, lease, backend)
            elif (version := access.version) is not None:
                # The result comes after what torch has written: `Access.note_fresh`, spelled out.
                lease.as_of = version() - access.epoch + access.native_writes
            try:
                new, aux = program(old, *args)
            except BaseException as error:
                if lease.is_dead(old):
                    raise access.failed(lease, error) from error
                lease.as_of = None  # there is no result, and the array is as old as it was
                if backend.refuses_donation(error):
                    raise held_by_alias(access) from error
                raise
            if lease.is_dead(old) and lease.donated_address(new) == lease.address:
                lease.array = new
                lease.handed = None
                if access.handed:
                    access.handed.clear()
                access.epoch += 1
                for mark, views in access.marks:
                    mark(views)
                access.pending = lease
                if not settled:
                    access.order.functional_wrote()
            else:
                aux = land_elsewhere([self], [lease], [old], [new], aux)
            if ordered and access.native_out:
                if access.pending is lease and access.synchronous:
                    ledger.count_host_wait()
                    try:
                        lease.wait_one(lease.array)
                    except Exception as error:
                        raise access.failed(lease, error) from error
                    access.pending = None
                elif access.synchronous or not settled:
                    access.settle()
        finally:
            settled = access.fast
            free = access.state == "open"  # a failed program may have lost the memory
            access.native_ready = free and settled and access.pending is None
            access.functional_ready = free and (settled or access.quiet)
            access.writer = 0
            if free:
                access.vacant.append(None)
            if _locks.sleepers:
                _locks.wake((access,))
        return aux


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
    if not isinstance(target, FunctionalBackend):
        target = require_backend(target)
        inputs = Inputs(args, kwargs, static, target.plain_arguments)
        return update_mutable(buffers, structure, target, step, inputs, has_aux)
    inputs = Inputs(args, kwargs, static, target.plain_arguments)
    if not target.trace_state_clean():
        raise inside_trace(buffers)
    name = target.name
    leases = [buffer._leases.get(name) or buffer._lease(target) for buffer in buffers]
    treedef = None if structure is None else structure.treedef
    program = target.compiled_step(step, treedef, has_aux, inputs.static)
    accesses = [buffer._access for buffer in buffers]
    taken = accesses if len(set(accesses)) == len(accesses) else list(dict.fromkeys(accesses))
    reads = inputs.reads(taken)
    acquire(taken, reads)
    try:
        olds = [
            lease.array
            if not access.handed  # nobody reads, nothing else is pending
            and (access.pending is lease or access.pending is None)
            and access.synchronous
            and lease.array is not None
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
            for lease in leases:
                lease.as_of = None
            if target.refuses_donation(error):
                raise held_by_alias(accesses[0]) from error
            raise
        news = [result] if structure is None else result
        if all(map(target.is_dead, olds)) and list(map(target.donated_address, news)) == [
            lease.address for lease in leases
        ]:
            marked: list[Access] = []
            for access, lease, new in zip(accesses, leases, news, strict=True):
                lease.array = new
                lease.handed = None
                access.pending = lease
                access.epoch += 1
                if access.handed:
                    access.handed.clear()
                if access.marks:
                    marked.append(access)
                if not access.synchronous:
                    access.order.functional_wrote()
            if marked:
                tell(marked)
        else:
            aux = land_elsewhere(buffers, leases, olds, news, aux)
        if ordered:
            order_all_after(taken, target)
    finally:
        release(taken, reads)
    return aux


def _nothing() -> None:
    """Stand for a weak reference to nothing."""


def _remembered_program(
    lease: Lease, step: Callable[..., Any], has_aux: bool, static: int | tuple[int, ...]
) -> Callable[..., Any]:
    """Give the program of a step, and keep it at the lease for the next update by the same one."""
    program = lease.backend.compiled_step(step, None, has_aux, static_positions(static))
    try:
        lease.step = weakref.ref(step)
    except TypeError:  # not weakly referable: looked up again each time
        lease.step = _nothing
    lease.has_aux = has_aux
    lease.static = static
    lease.program = program
    return program


def _ready_lease(
    buffer: Buffer,
    access: Access,
    lease: Lease,
    backend: FunctionalBackend,
    keep: Sequence[Lease] = (),
) -> Any:
    """Give the array to donate, with everything else ordered before it."""
    if _hooks.checker is not None:
        _hooks.checker.before_write(access, None if keep else lease)
    if not access.synchronous:
        access.order.before_functional()
        access.note_fresh(lease)  # which the result will be
    if access.handed and (len(access.handed) > 1 or lease not in access.handed or access.retired):
        fence((access,), keep or (lease,))
    if access.pending is not None and access.pending is not lease:
        access.settle_for(lease)
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
