"""Where the result of a donated program lies, and what follows: adoption, order, or a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlx_driver._exchange import exchange
from rlx_driver._fence import fence
from rlx_driver._ledger import ledger
from rlx_driver.errors import StaleViewError, UpdateFailedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlx_driver.access import Access, Lease
    from rlx_driver.backends.base import FunctionalBackend
    from rlx_driver.buffer import Buffer

__all__ = ["inside_trace", "land_elsewhere", "landed", "order_all_after"]

_IN_PLACE = (
    "a step that is jitted already needs donate_argnums=0, and nothing else may hold its views"
)


def inside_trace(buffers: Sequence[Buffer]) -> StaleViewError:
    """Give the error for an update inside a trace."""
    label = buffers[0]._access.label if buffers else "a tree"
    return StaleViewError(
        f"update of {label} was called inside a trace, where nothing can be changed in place: call "
        "it outside, or make the whole function the step. Nothing was changed"
    )


def landed(access: Access, lease: Lease, new: Any) -> None:
    """Note that a donated result lies where it should; `Buffer.update` spells this out."""
    lease.array = new
    lease.handed = None
    if access.handed:
        access.handed.clear()
    access.epoch += 1
    for mark, views in access.marks:
        mark(views)
    access.pending = lease
    access.order.functional_wrote()


def order_all_after(accesses: Sequence[Access], backend: FunctionalBackend) -> None:
    """Make the views that are out right before an update of a tree returns."""
    out = [access for access in accesses if access.native_out and access.pending is not None]
    if not out or not out[0].synchronous:
        for access in out:
            access.settle()
        return
    ledger.count_host_wait()
    try:
        backend.wait([access.pending.array for access in out if access.pending is not None])
    except Exception as error:
        lost = [access.failed(access.pending, error) for access in accesses if access.pending]
        raise lost[0] from error
    for access in out:
        access.pending = None


def land_elsewhere(
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
        raise inside_trace(buffers)
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
    taken: dict[int, Any] = {}
    if not stray:
        pass  # arrays without elements lie nowhere
    elif not lost:
        ledger.will_copy(moved, "the result was not made in place", _IN_PLACE)
        kept = [lease for _, lease, old, _ in entries if backend.is_dead(old)]
        fence(dict.fromkeys(buffer._access for buffer, *_ in stray), kept)
    else:
        # Donated, so there is no way back; another output may have taken the memory.
        ledger.count_copy(moved, "the result was not made in place")
        aux, taken = _moved_off(backend, aux, set(lost))
        _require_memory(stray, taken)
    for buffer, lease, _, new in stray:
        backend.wait(new)
        with buffer._backend.writing():
            value = exchange(new, buffer._backend.name, copy=None)
            buffer._backend.copy_across(buffer._native, value)
        buffer._access.order.keep(value)
        if lease.array is None or backend.is_dead(lease.array):
            # The program was given it. Where the framework owned that memory, it is kept alive by
            # the output that has it now, which shows the copied bytes.
            lease.array = None if buffer._access.owner is None else taken.get(lease.address)
            lease.handed = None
            buffer._access.handed.pop(lease, None)
        buffer._access.pending = None  # the copy came after it
        buffer._access.after_native()
        buffer._access.written()
    done = {id(lease) for _, lease, _, _ in stray}
    for buffer, lease, _, new in entries:
        if id(lease) not in done:
            landed(buffer._access, lease, new)
    return aux


def _in_place(lease: Lease, old: Any, new: Any) -> bool:
    return _was_donated(lease, old) and lease.backend.donated_address(new) == lease.address


def _was_donated(lease: Lease, old: Any) -> bool:
    # Without a lease the program had a plain import, whose donation copies.
    return lease.array is not None and lease.is_dead(old)


def _require_memory(stray: Sequence[Any], taken: dict[int, Any]) -> None:
    """Raise where memory that the framework owned went with the array, to no output at all."""
    for buffer, lease, old, _ in stray:
        access = buffer._access
        if access.owner is not None and _was_donated(lease, old) and lease.address not in taken:
            access.state = "lost"
            access.require_open()


def _moved_off(
    backend: FunctionalBackend, aux: Any, wanted: set[int]
) -> tuple[Any, dict[int, Any]]:
    """Copy every other output that took the memory of a buffer; give also those, by address."""
    leaves, structure = backend.flatten(aux)
    taken = {
        backend.address(leaf): leaf
        for leaf in leaves
        if backend.owns(leaf) and leaf.size and backend.address(leaf) in wanted
    }
    thieves = {id(leaf) for leaf in taken.values()}
    moved = [backend.duplicate(leaf) if id(leaf) in thieves else leaf for leaf in leaves]
    backend.wait([leaf for leaf in moved if backend.owns(leaf)])
    return backend.unflatten(structure, moved), taken
