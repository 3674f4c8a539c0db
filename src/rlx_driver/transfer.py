"""Moving bytes on purpose: ``copy_from``, assignment, transfers between devices, adoption."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._exchange import exchange
from rlx_driver._ledger import ledger
from rlx_driver.access import Access, acquire, fence, release
from rlx_driver.backends.base import ArrayFacts, Backend, FunctionalBackend
from rlx_driver.errors import DTypeError, ShapeError, ZeroCopyError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlx_driver.buffer import Buffer
    from rlx_driver.device import Device

__all__ = ["TransferMixin", "commit_all"]


class TransferMixin:
    """The transfers of `Buffer`; each is a method call, none is hidden."""

    __slots__ = ()

    def copy_from(self: Any, x: Any, cast: bool = False) -> None:
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

        Notes
        -----
        Copies: unless taken over. Blocks: on the host for the copy, and for readers of arrays that
        `jax` handed out. Aliases: nothing; `x` may be changed afterwards.

        Raises
        ------
        ShapeError, DTypeError
            When `x` does not fit. Nothing was changed.
        ZeroCopyError
            Inside `no_copies` when bytes would move, or when an alias blocks the fence.
        """
        self._materialise()
        if is_adoptable(self, x):
            _adopt(self, x)
        else:
            _copy(self, x, cast, "copy_from")

    def __setitem__(self: Any, key: Any, value: Any) -> None:
        """Assign to a basic slice: a scalar fills it, an array is copied as by `copy_from`."""
        target = self if key is Ellipsis else self[key]
        target._materialise()
        if not isinstance(value, (bool, int, float, complex, np.generic)):
            target.copy_from(value)
            return
        if isinstance(value, np.generic):
            value = value.item()
        access = target._access
        acquire([access])
        try:
            fence([access])
            access.settle()
            with target._backend.writing():
                try:
                    target._native[...] = value
                except (OverflowError, TypeError, RuntimeError) as error:
                    raise DTypeError(
                        f"{value!r} does not fit {target.dtype.name}: {error}. Nothing was changed"
                    ) from error
            access.order.after_native()
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
    _copy(fresh, source, False, reason)
    fresh._access.epoch = 0
    return fresh


def commit_all(buffers: Sequence[Buffer], values: Sequence[Any]) -> None:
    """Commit values into buffers; every fit is checked before anything is touched."""
    for buffer in buffers:
        buffer._materialise()
    adopted = [is_adoptable(buffer, x) for buffer, x in zip(buffers, values, strict=True)]
    astray = 0
    for buffer, x, fits in zip(buffers, values, adopted, strict=True):
        if not fits:
            native = getattr(x, "__rlx_native__", None)
            source = registry.for_array(native() if native is not None else x)
            astray += _fitting(buffer, x, native, source, False).byte_size
    if astray:
        ledger.require_copies(astray, "a result does not lie in its buffer's memory")
    for buffer, x, fits in zip(buffers, values, adopted, strict=True):
        if fits:
            _adopt(buffer, x)
        else:
            _copy(buffer, x, False, "commit")


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
    if x is lease.array:
        return not lease.is_dead(x)
    if not lease.is_dead(lease.array) or not backend.trace_state_clean():
        return False
    if tuple(x.shape) != buffer.shape or x.dtype != buffer.dtype or lease.is_dead(x):
        return False
    return not buffer.num_elements or backend.address(x) == buffer.address


def _adopt(buffer: Buffer, x: Any) -> None:
    """Take over the result of a user's donation; the caller has checked it."""
    lease = buffer._leases[registry.for_array(x).name]  # type: ignore[union-attr]
    if x is lease.array:
        return
    access = buffer._access
    acquire([access])
    try:
        fence([access], keep=[lease])
        lease.array, lease.handed = x, None
        access.handed.pop(lease, None)
        access.written()
        access.pending = lease
        if access.native_out:
            access.settle()
    finally:
        release([access])


def _copy(buffer: Buffer, x: Any, cast: bool, reason: str) -> None:
    native = getattr(x, "__rlx_native__", None)
    if native is not None:
        x._materialise()
    source = registry.for_array(native() if native is not None else x)
    facts = _fitting(buffer, x, native, source, cast)
    if facts.byte_size == 0:
        return
    ledger.will_copy(buffer.byte_size, reason)
    access = buffer._access
    reads = [x._access] if native is not None and x._access is not access else []
    acquire([access], reads)
    try:
        value = _value(buffer, x, native, source, reads)
        fence([access])
        access.settle()
        _move(buffer, value, cast)
        access.order.after_native()
        # Whatever a user donated and lost is replaced by these bytes.
        for lease in list(access.leases.values()):
            if lease.array is not None and lease.is_dead(lease.array):
                lease.array = lease.handed = None
                access.handed.pop(lease, None)
        access.written()
    finally:
        release([access], reads)


def _fitting(buffer: Buffer, x: Any, native: Any, source: Backend | None, cast: bool) -> ArrayFacts:
    """Check that a value fits, before anything is touched."""
    if native is not None:
        facts: ArrayFacts = x._facts
    elif source is not None:
        facts = source.facts(x)
    else:
        source = registry.get(buffer._backend.name)
        facts = source.facts(exchange(x, source.name, copy=None))
    if facts.obstacle is not None and not facts.obstacle.copyable:
        raise ZeroCopyError(f"the value cannot be copied: {facts.obstacle}")
    if facts.shape != buffer.shape:
        raise ShapeError(
            f"a value of shape {facts.shape} does not fit {buffer._access.label} of shape "
            f"{buffer.shape}. Nothing was changed"
        )
    if facts.dtype != buffer.dtype and not cast:
        raise DTypeError(
            f"a value of {facts.dtype.name} does not fit {buffer._access.label} of "
            f"{buffer.dtype.name}: say cast=True to convert it. Nothing was changed"
        )
    return facts


def _value(buffer: Buffer, x: Any, native: Any, source: Backend | None, reads: list[Access]) -> Any:
    """Give the value as an array of the buffer's native framework, or as a host array."""
    if native is not None:
        if reads:
            x._access.settle()
        array, source = native(), x._backend
        if source is buffer._backend:
            # torch does not say what an overlapping copy gives.
            mine = x._access is buffer._access and buffer._backend.name != "numpy"
            return source.duplicate(array) if mine else array
        return source.copy_out(array) if buffer.device.is_host else array
    own = [lease.array for lease in buffer._access.leases.values()]
    if source is not None and (
        any(x is array for array in own) or not _same_place(buffer, x, source)
    ):
        return source.copy_out(x)
    if buffer.device.is_host or (source is not None and not source.device_of(x).is_host):
        return exchange(x, buffer._backend.name, copy=None)
    return exchange(x, "numpy", copy=None)  # the backend's own way in from the host


def _same_place(buffer: Buffer, x: Any, source: Backend) -> bool:
    place = source.device_of(x)
    return place.is_host if buffer.device.is_host else True


def _move(buffer: Buffer, value: Any, cast: bool) -> None:
    backend = buffer._backend
    if isinstance(value, np.ndarray):
        if cast and value.dtype != buffer.dtype:
            value = value.astype(buffer.dtype)
        backend.copy_in(buffer._native, value)
    else:
        backend.copy_across(buffer._native, value)
