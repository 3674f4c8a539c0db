"""Moving bytes on purpose: ``copy_from``, assignment, transfers between devices, adoption."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver import _hooks, dtypes
from rlx_driver._exchange import exchange
from rlx_driver._fence import fence
from rlx_driver._ledger import ledger
from rlx_driver._locks import acquire, release
from rlx_driver.access import Access, Lease, alive, written
from rlx_driver.backends.base import ArrayFacts, Backend, FunctionalBackend
from rlx_driver.errors import DTypeError, ShapeError, ZeroCopyError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlx_driver.buffer import Buffer
    from rlx_driver.device import Device

__all__ = ["TransferMixin", "commit_all", "span_of"]


class TransferMixin:
    """The transfers of `Buffer`; each is a method call, none is hidden."""

    __slots__ = ()

    def copy_from(self: Any, x: Any, cast: bool = False, *, blocking: bool = True) -> None:
        """Set the bytes to those of an array, from any framework and device.

        A result of a jitted function of yours that took ``self.jax()`` by donation already lies at
        this address: it is taken over, no bytes move, and the epoch grows. The very array that
        `jax` gave, unchanged, changes nothing.

        Parameters
        ----------
        x
            An array, or a Buffer, of this shape.
        cast
            Convert from another dtype, as NumPy's ``astype`` does. (Without it a dtype must agree.)
        blocking
            False: from pinned host memory to a GPU the copy goes on while the call returns, on the
            current stream; `x` is kept alive, and must not be changed before that stream is done.

        Notes
        -----
        Copies: unless taken over. Blocks: on the host for the copy, and for readers of arrays that
        `jax` handed out. Aliases: nothing; `x` may be changed afterwards, but for ``blocking``.

        Raises
        ------
        ShapeError, DTypeError
            When `x` does not fit. Nothing was changed.
        ZeroCopyError
            Inside `no_copies` when bytes would move, or when an alias blocks the fence.
        """
        self._materialise()
        _put([self], [x], cast, "copy_from", blocking)

    def __setitem__(self: Any, key: Any, value: Any) -> None:
        """Assign to a basic slice: a number fills it, an array is copied as by `copy_from`.

        A number is converted as NumPy does. An array without axes fills too, when its dtype agrees.
        """
        target = self if key is Ellipsis else self[key]
        target._materialise()
        if not isinstance(value, (bool, int, float, complex, np.generic)):
            fills = getattr(value, "shape", None) == () and target.shape != ()
            if not fills or dtypes.dtype(value.dtype) != target.dtype:
                target.copy_from(value)
                return
            value = value.item()
        if isinstance(value, np.generic):
            value = value.item()
        access = target._access
        acquire([access])
        try:
            _order_before([access], (), _overwritten(target))
            with target._backend.writing():
                try:
                    target._native[...] = value
                except (OverflowError, TypeError, ValueError, RuntimeError) as error:
                    raise DTypeError(
                        f"{value!r} does not fit {target.dtype.name}: {error}. Nothing was changed"
                    ) from error
            access.after_native()
            access.written()
        finally:
            release([access])

    def to(self: Any, device: Device | str) -> Buffer:
        """Copy to another device; on its own device this is the Buffer itself.

        Raises
        ------
        ClosedHandleError
            After `close`.
        DeviceUnavailableError, OutOfDeviceMemory
            As for `Buffer.zeros`.
        """
        from rlx_driver.device import Device

        self._access.require_open()
        target = Device(device)
        return self if target == self.device else _moved(self, target, f"to({target})")

    def to_host(self: Any) -> Buffer:
        """Copy to a new host Buffer; blocks until the bytes are there."""
        from rlx_driver.device import Device

        return _moved(self, Device("cpu"), "to_host")


def _moved(source: Buffer, device: Device, reason: str) -> Buffer:
    source._materialise()
    fresh = source._like(device)
    _put([fresh], [source], False, reason)
    fresh._access.epoch = 0
    return fresh


def commit_all(
    buffers: Sequence[Buffer], values: Sequence[Any], cast: bool = False, reason: str = "commit"
) -> None:
    """Commit values into buffers; every fit is checked before anything is touched."""
    for buffer in buffers:
        buffer._materialise()
    _put(buffers, values, cast, reason)


def _put(
    buffers: Sequence[Buffer],
    values: Sequence[Any],
    cast: bool,
    reason: str,
    blocking: bool = True,
) -> None:
    """Adopt values that lie in place, and copy the others, with one fence for all."""
    adopted: list[tuple[Buffer, Any, Lease]] = []
    moved: list[_Value] = []
    for buffer, x in zip(buffers, values, strict=True):
        if is_adoptable(buffer, x):
            lease = buffer._leases[registry.for_array(x).name]  # type: ignore[union-attr]
            if not lease.is_own(x):
                adopted.append((buffer, x, lease))
        else:
            value = _Value(buffer, x, cast)
            if value.facts.byte_size:
                moved.append(value)
    for value in moved:
        ledger.will_copy(value.buffer.byte_size, reason)
    changed = [buffer for buffer, _, _ in adopted] + [value.buffer for value in moved]
    writes = list(dict.fromkeys(buffer._access for buffer in changed))
    reads = list(dict.fromkeys(access for value in moved for access in value.reads(writes)))
    acquire(writes, reads)
    try:
        lost = [lease for value in moved for lease in _overwritten(value.buffer)]
        arrays = [value.taken_from(writes, changed) for value in moved]
        _order_before(writes, [lease for _, _, lease in adopted], lost)
        for value, array in zip(moved, arrays, strict=True):
            _move(value.buffer, array, cast, blocking)
            if value.native is None and value.lender is None and not isinstance(array, np.ndarray):
                value.buffer._access.order.keep(array)
        for access in dict.fromkeys(value.buffer._access for value in moved):
            access.after_native()
        if any(not value.buffer.device.is_host for value in moved):  # else they are done
            for access in reads:
                access.after_native(wrote=False)
        written(writes)
        for buffer, x, lease in adopted:
            _adopt(buffer._access, x, lease)
    finally:
        release(writes, reads)


def _order_before(
    accesses: Sequence[Access], adopted: Sequence[Lease], lost: Sequence[Lease]
) -> None:
    """Fence readers and settle what is pending, except for arrays that a user donated."""
    fence(accesses, keep=(*adopted, *lost))
    # Whatever a user donated and lost is replaced by the bytes to come.
    for access in accesses:
        for lease in lost:
            access.handed.pop(lease, None)
        if access.pending in adopted or access.pending in lost:
            access.pending = None
        access.settle()
    for lease in lost:
        lease.array = lease.handed = None


def _overwritten(buffer: Buffer) -> list[Lease]:
    """List leases whose array a user donated, and whose memory a write would replace."""
    if buffer._access.owner is not None:
        return []  # memory that the framework owned went with the array
    start, end = buffer.address, buffer.address + buffer.byte_size
    return [
        lease
        for (_, address, shape, _, dtype), lease in buffer._access.leases.items()
        if lease.array is not None
        and lease.is_dead(lease.array)
        and buffer.is_contiguous
        and start <= address
        and address + math.prod(shape) * dtype.itemsize <= end
    ]


def is_adoptable(buffer: Buffer, x: Any) -> bool:
    """Tell whether an array is the buffer's own handed-out one, or what that was donated to.

    Waits for `x` on the host when it might be: asking for the address of a pending array that was
    not donated could hang.
    """
    backend = registry.for_array(x)
    if not isinstance(backend, FunctionalBackend):
        return False
    lease = buffer._leases.get(backend.name)
    if lease is None or lease.array is None:
        return False
    if lease.is_own(x):
        return not lease.is_dead(x)
    if not lease.is_dead(lease.array) or not backend.trace_state_clean():
        return False
    if tuple(x.shape) != buffer.shape or x.dtype != buffer.dtype or lease.is_dead(x):
        return False
    return not buffer.num_elements or backend.address(x) == buffer.address


def _adopt(access: Access, x: Any, lease: Lease) -> None:
    """Take over the result of a user's donation; the caller has checked it."""
    lease.array, lease.handed = x, None
    access.handed.pop(lease, None)
    if access.pending is not None:  # another part of the same memory
        access.settle()
    access.pending = lease
    access.order.functional_wrote()
    if access.native_out:
        access.settle()


class _Value:
    """A value for a buffer; making one checks that it fits, before anything is touched."""

    def __init__(self, buffer: Buffer, x: Any, cast: bool) -> None:
        self.buffer, self.x = buffer, x
        self.native = getattr(x, "__rlx_native__", None)
        if self.native is not None:
            x._materialise()
        self.source = registry.for_array(x if self.native is None else self.native())
        self.lender = self._lender()
        self.facts = self._found()
        if self.facts.obstacle is not None and not self.facts.obstacle.copyable:
            raise ZeroCopyError(f"the value cannot be copied: {self.facts.obstacle}")
        if self.facts.shape != buffer.shape:
            raise ShapeError(
                f"a value of shape {self.facts.shape} does not fit {buffer._access.label} of shape "
                f"{buffer.shape}. Nothing was changed"
            )
        if self.facts.dtype != buffer.dtype and not cast:
            raise DTypeError(
                f"a value of {self.facts.dtype.name} does not fit {buffer._access.label} of "
                f"{buffer.dtype.name}: say cast=True to convert it. Nothing was changed"
            )

    def _found(self) -> ArrayFacts:
        if self.native is not None:
            facts: ArrayFacts = self.x._facts
            return facts
        if self.source is not None:
            return self.source.facts(self.x)
        backend = self.buffer._backend
        return backend.facts(exchange(self.x, backend.name, copy=None))

    def reads(self, writes: Sequence[Access]) -> list[Access]:
        """Give the access to read by, when the value is memory of a Buffer that is not written."""
        lender = self.lender if self.native is None else self.x._access
        return [] if lender is None or lender in writes else [lender]

    def _lender(self) -> Access | None:
        """Find whose memory an array is that `jax` gave, where reading it takes place later."""
        if self.buffer._access.synchronous or not isinstance(self.source, FunctionalBackend):
            return None
        for access in list(alive):
            for lease in access.leases.values():
                if lease.backend is self.source and lease.is_own(self.x):
                    return access
        return None

    def taken_from(self, writes: Sequence[Access], changed: Sequence[Buffer]) -> Any:
        """Give an array of the buffer's native framework, or of the host.

        It is a copy where it lies in memory that is about to change, and where it is an array
        handed out of that memory, which the fence could not end while something refers to it.
        """
        buffer, source = self.buffer, self.source
        if self.native is not None:
            if _hooks.checker is not None:
                _hooks.checker.before_read(self.x)
            array, source = self.native(), self.x._backend
            if source is not buffer._backend and buffer.device.is_host:
                with self.x._access.settle_for_host():
                    return source.copy_out(array)
            self.x._access.settle(writes=False)
            return source.duplicate(array) if self._is_among(changed) else array
        own = [lease for access in writes for lease in access.leases.values()]
        if source is not None:
            if any(lease.is_own(self.x) for lease in own) or not _same_place(
                buffer, self.x, source
            ):
                return source.copy_out(self.x)
            if self._is_among(changed):
                for access in writes:  # a view that somebody holds may be waiting for a result
                    if access.pending is not None and not access.pending.is_dead(
                        access.pending.array
                    ):
                        access.settle()
                return (
                    source.copy_out(self.x)
                    if buffer.device.is_host
                    else (exchange(source.duplicate(self.x), buffer._backend.name, copy=None))
                )
        if source is buffer.device.backend and not buffer.device.is_host:
            return self.x
        if buffer.device.is_host or (source is not None and not source.device_of(self.x).is_host):
            return exchange(self.x, buffer._backend.name, copy=None)
        return exchange(self.x, "numpy", copy=None)  # the backend's own way in from the host

    def _is_among(self, changed: Sequence[Buffer]) -> bool:
        """Tell whether the value's memory may overlap that of a buffer."""
        start, end = span_of(self.facts)
        return any(
            self.facts.device == buffer.device and start < last and first < end
            for buffer in changed
            for first, last in [span_of(buffer._facts)]
        )


def span_of(facts: ArrayFacts) -> tuple[int, int]:
    """Give the first address of an array's memory and the one behind its last."""
    if not facts.num_elements:
        return 0, 0
    reach = [(n - 1) * stride for n, stride in zip(facts.shape, facts.strides, strict=True)]
    start = facts.address + sum(min(r, 0) for r in reach)
    return start, facts.address + sum(max(r, 0) for r in reach) + facts.dtype.itemsize


def _same_place(buffer: Buffer, x: Any, source: Backend) -> bool:
    place = source.device_of(x)
    return place.is_host if buffer.device.is_host else True


def _move(buffer: Buffer, value: Any, cast: bool, blocking: bool) -> None:
    backend = buffer._backend
    if isinstance(value, np.ndarray) and cast and value.dtype != buffer.dtype:
        value = value.astype(buffer.dtype)
    if not blocking:
        backend.enqueue_copy(buffer._native, value)
    elif isinstance(value, np.ndarray):
        backend.copy_in(buffer._native, value)
    else:
        backend.copy_across(buffer._native, value)
