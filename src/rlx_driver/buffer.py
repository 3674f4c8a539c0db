"""`Buffer`: bytes with a shape, a dtype, a device, and a discipline of access."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver import _hooks, dtypes
from rlx_driver._exchange import exchange
from rlx_driver._ledger import ledger
from rlx_driver._locks import acquire, release
from rlx_driver._memory import register_array, register_buffer
from rlx_driver._owned import make_owned
from rlx_driver._slices import SlicesMixin, byte_size, shape_of
from rlx_driver._update import UpdateMixin
from rlx_driver._views import ViewsMixin
from rlx_driver.access import Access, Lease
from rlx_driver.backends.base import FunctionalBackend, accounting
from rlx_driver.device import Device
from rlx_driver.errors import ShapeError, StaleViewError, ZeroCopyError
from rlx_driver.interop import InteropMixin
from rlx_driver.registry import registry
from rlx_driver.scopes import ReadScope, WriteScope
from rlx_driver.transfer import TransferMixin

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from rlx_driver.backends.base import ArrayFacts, Backend

__all__ = ["Buffer"]


class Buffer(ViewsMixin, UpdateMixin, SlicesMixin, TransferMixin, InteropMixin):
    """Memory that NumPy, torch and JAX see and change in place, in an order that is right.

    Make one with `zeros`, `empty`, `from_array` or `from_bytes`. The views `numpy`, `torch` and
    `jax` are its memory, never a copy; `update` runs a step in place; the scopes `read` and
    `write` are shared and exclusive. A slice (``b[2:4]``) and a reinterpretation (`view`) are
    Buffers on the same bytes that share the discipline of their base.

    Notes
    -----
    Memory is freed after the Buffer and the last view of it are gone. A Buffer does not pickle,
    and cannot be used in a forked child.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> b = rlx.Buffer.zeros((2, 3), "f32")
    >>> b.numpy()[0, 1] = 5.0
    >>> b.update(lambda x: x * 2, framework="numpy")
    >>> float(b.numpy()[0, 1]), b.epoch
    (10.0, 1)
    """

    __slots__ = (
        "__weakref__",
        "_access",
        "_backend",
        "_derivation",
        "_device",
        "_facts",
        "_jax",
        "_leases",
        "_native",
        "_numpy",
        "_parent",
        "_torch",
        "_views",
    )

    _native: Any
    _facts: ArrayFacts
    _backend: Backend
    _access: Access

    def __init__(self) -> None:
        raise TypeError(
            "make a Buffer with Buffer.zeros, .empty, .from_array or .from_bytes, or a BufferHandle"
        )

    def _setup(
        self,
        native: Any,
        backend: Backend,
        access: Access,
        parent: Buffer | None = None,
        derivation: Callable[[Backend, Any], Any] | None = None,
    ) -> None:
        facts = backend.facts(native)
        if _hooks.checker is not None:
            _hooks.checker.join(access)
        self._backend = backend
        self._facts = facts
        self._device = facts.device
        self._access = access
        self._parent = parent
        self._derivation = derivation
        self._views: dict[Any, Any] = {}
        self._leases: dict[str, Lease] = {}
        self._numpy: Any = None
        self._torch: Any = None
        self._jax: Lease | None = None
        self._native = native  # last: another thread takes it for a sign that all is there

    @classmethod
    def _adopt(cls, native: Any, backend: Backend, label: str | None = None) -> Buffer:
        """Make a base Buffer on an array of its device's native framework."""
        self = object.__new__(Buffer)
        facts = backend.facts(native)
        label = label or f"Buffer {facts.dtype.name}{list(facts.shape)} on {facts.device}"
        self._setup(native, backend, Access(label, backend.order(facts.device, native)))
        return self

    def _adopt_lease(self, lease: Lease) -> None:
        """Take the lease of memory that a functional framework owns for the one of this Buffer."""
        name, facts = lease.backend.name, self._facts
        key = (name, facts.address, facts.shape, facts.strides, facts.dtype)
        self._access.leases[key] = self._leases[name] = lease

    def _derived(self, derivation: Callable[[Backend, Any], Any]) -> Buffer:
        """Make a Buffer on part of these bytes, by what the native framework does to a view."""
        self._access.require_open()
        part = object.__new__(Buffer)
        native = derivation(self._backend, self._native)
        part._setup(native, self._backend, self._access, self, derivation)
        return part

    def _like(self, device: Device) -> Buffer:
        """Allocate a Buffer of this shape and dtype on a device."""
        return Buffer.zeros(self.shape, self.dtype, device)

    # --- making one --------------------------------------------------------------------------

    @classmethod
    def zeros(
        cls, shape: int | tuple[int, ...], dtype: Any = "f32", device: Device | str = "cpu"
    ) -> Buffer:
        """Allocate a Buffer of zero bytes, aligned to 256.

        Parameters
        ----------
        shape
            Lengths of the axes, or one length.
        dtype
            Anything `rlx_driver.dtype` takes. Zero *bytes* are the value zero in every dtype but
            float8_e8m0fnu, where they are 2**-127.
        device
            Where.

        Raises
        ------
        ShapeError
            A length is negative or no integer.
        DTypeError
            No such dtype.
        DeviceUnavailableError
            The device is not there.
        OutOfDeviceMemory
            It has not that much memory.
        """
        shape, dt = shape_of(shape), dtypes.info(dtype).dtype
        place = Device(device)
        backend = place.backend
        if isinstance(backend, FunctionalBackend):
            owned, made = accounting.record(make_owned, backend, place, shape, dt)
            native, native_backend, owner = owned
            self = cls._adopt(native, native_backend)
            self._access.owner = owner
            self._adopt_lease(owner.lease)
        else:
            memory, made = accounting.record(backend.allocate, place, byte_size(shape, dt))
            self = cls._adopt(backend.view(memory, 0, shape, dt), backend)
        return register_buffer(self, made)

    @classmethod
    def empty(
        cls, shape: int | tuple[int, ...], dtype: Any = "f32", device: Device | str = "cpu"
    ) -> Buffer:
        """Allocate a Buffer whose values are not promised; see `zeros`.

        The bytes are zero today: the host maps zero pages for nothing, and no reader of a Buffer
        is to see what another program left behind.
        """
        return cls.zeros(shape, dtype, device)

    @classmethod
    def from_array(cls, x: Any, copy: bool | None = None) -> Buffer:
        """Make a Buffer of an array, on the array's device.

        Parameters
        ----------
        x
            An array of NumPy, torch or JAX, or any DLPack exporter; a Buffer gives a Buffer under
            the same discipline.
        copy
            False: the Buffer is the array's memory, or `ZeroCopyError`. None: the same where it
            can; memory that must not be written (read-only arrays, JAX arrays) is copied, and the
            ledger says so. True: copy.

        Returns
        -------
        Buffer
            Aliases `x` unless copied. Memory that it shares keeps its own alignment, so `jax` may
            refuse; make it with ``copy=True`` for memory that every framework can see.

        Raises
        ------
        ZeroCopyError
            As above, and for arrays that no copy helps (requires_grad, traced values).
        """
        if isinstance(x, Buffer) and copy is not True:
            return x[...]  # one memory has one discipline
        source = registry.for_array(x)
        backend = Device.of(x).backend
        native = exchange(x, backend.name, copy=copy)
        facts = backend.facts(native)
        if facts.obstacle is not None:
            raise ZeroCopyError(f"a Buffer cannot be made of it: {facts.obstacle}")
        if copy is not True:
            reason = ""
            if facts.read_only or (source is not None and source.facts(x).immutable):
                reason = "read-only"
            elif facts.overlaps_itself:
                reason = "elements that share memory"
            if reason:
                if copy is False:
                    raise ZeroCopyError(
                        f"a Buffer is memory to write, and the array cannot be written as one "
                        f"({reason}): use copy=None or copy=True"
                    )
                ledger.will_copy(facts.byte_size, f"{reason} (to a Buffer)")
                native = backend.duplicate(native)
        return register_array(cls._adopt(native, backend), x, copy)

    @classmethod
    def from_bytes(
        cls,
        data: bytes | bytearray | memoryview,
        shape: int | tuple[int, ...],
        dtype: Any,
        device: Device | str = "cpu",
    ) -> Buffer:
        """Make a Buffer of raw bytes in native order; always copies.

        Raises
        ------
        ShapeError
            When the bytes are more or fewer than shape and dtype need.
        """
        shape, dt = shape_of(shape), dtypes.info(dtype).dtype
        raw = np.frombuffer(data, np.uint8)
        if raw.nbytes != byte_size(shape, dt):
            raise ShapeError(
                f"{raw.nbytes:,} bytes were given for {dt.name}{list(shape)}, which takes "
                f"{byte_size(shape, dt):,}"
            )
        ledger.will_copy(raw.nbytes, "from_bytes")
        self = cls.zeros(shape, dt, device)
        if raw.nbytes:
            self._backend.copy_in(self._native, raw.view(dt).reshape(shape))
        return self

    # --- facts -------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return self._facts.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self._facts.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy (or ml_dtypes) dtype."""
        return self._facts.dtype

    @property
    def device(self) -> Device:
        """Where the bytes live."""
        return self._device

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one element to the next along each axis."""
        return self._facts.strides

    @property
    def byte_size(self) -> int:
        """Bytes of the elements."""
        return self._facts.byte_size

    @property
    def num_elements(self) -> int:
        """The number of elements."""
        return self._facts.num_elements

    @property
    def address(self) -> int:
        """Address of element zero; it never changes. 0 when there are no elements."""
        self._access.require_open()
        return self._facts.address

    @property
    def epoch(self) -> int:
        """How many writes the driver has made or allowed; slices count with their base."""
        return self._access.epoch

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        return self._facts.is_row_major

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called, here or on the base."""
        return self._access.state == "closed"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a Buffer without axes has no length")
        return self.shape[0]

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        state = "" if self._access.state == "open" else f", {self._access.state}"
        return (
            f"<{type(self).__name__} {self.dtype.name}{list(self.shape)} on {self.device}, "
            f"epoch {self.epoch}{state}>"
        )

    def _materialise(self) -> None:
        """Make sure that there are bytes; a handle overrides this."""
        self._access.require_open()

    # --- scopes and updates ------------------------------------------------------------------

    def read(self, framework: str | ModuleType, *, timeout: float | None = None) -> ReadScope:
        """Read the memory together with other readers: ``with b.read("jax") as a: ...``.

        No write by the driver, from any thread, happens inside the scope. Copies: never. Blocks:
        until a writer in another thread is done, at most `timeout` seconds.

        Raises
        ------
        AccessTimeoutError
            When a writer held it for too long.
        """
        return ReadScope([self], framework, timeout)

    def write(self, framework: str | ModuleType, *, timeout: float | None = None) -> WriteScope:
        """Write the memory alone: ``with b.write("torch") as t: ...``.

        First waits, on the device where it can, until every reader of an array that `jax` handed
        out is done; those arrays are dead afterwards. Copies: never. Raises the epoch when it
        ends, also by an error: what was written stays.

        Raises
        ------
        ZeroCopyError
            When a NumPy or torch alias made from such a JAX array still holds it, or the framework
            cannot write (JAX: use `update`). Nothing was changed.
        AccessTimeoutError
            When others held it for too long.
        """
        return WriteScope([self], framework, timeout)

    def close(self) -> None:
        """Give up the memory; it is freed when the last view of it is gone. Twice is fine.

        Blocks until scopes of other threads are left. Any later access, by a slice too, raises
        `ClosedHandleError`.

        Raises
        ------
        StaleViewError
            For a slot of an arena, which has no memory of its own to give up.
        """
        if self._access.state == "closed":
            return
        if self._access.keeper is not None:
            raise StaleViewError(
                f"{self._access.label} is not for a slot to give up: close the arena. Nothing was "
                "closed"
            )
        taken = [self._access]
        acquire(taken)
        checker = _hooks.checker
        if checker is not None:
            checker.before_close(self._access)
        self._access.close()
        release(taken)
        self._forget()
        if checker is not None:
            checker.announce()  # may raise, as warnings do where they are errors

    def _forget(self) -> None:
        self._native = self._numpy = self._torch = self._jax = self._parent = None
        self._views.clear()
        self._leases.clear()
