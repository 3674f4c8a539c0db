"""`Buffer`: bytes with a shape, a dtype, a device, and a discipline of access."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from rlx_driver import dtypes
from rlx_driver.access import Access, Lease, acquire, release, uncommitted
from rlx_driver.backends.base import ArrayFacts, Backend, FunctionalBackend
from rlx_driver.device import Device
from rlx_driver.errors import (
    DeviceUnavailableError,
    DTypeError,
    ShapeError,
    StaleViewError,
    ZeroCopyError,
)
from rlx_driver._exchange import exchange, resolve, share_verified, verify
from rlx_driver.interop import InteropMixin
from rlx_driver._ledger import ledger
from rlx_driver.registry import registry
from rlx_driver.scopes import ReadScope, WriteScope
from rlx_driver.transfer import TransferMixin
from rlx_driver._update import update_one

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

__all__ = ["Buffer", "shape_of"]


class Buffer(TransferMixin, InteropMixin):
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
        self._native = native
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

    @classmethod
    def _adopt(cls, native: Any, backend: Backend, label: str | None = None) -> Buffer:
        """Make a base Buffer on an array of its device's native framework."""
        self = object.__new__(Buffer)
        facts = backend.facts(native)
        label = label or f"Buffer {facts.dtype.name}{list(facts.shape)} on {facts.device}"
        self._setup(native, backend, Access(label, backend.order(facts.device)))
        return self

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
        backend = Device(device).backend
        memory = backend.allocate(Device(device), _byte_size(shape, dt))
        return cls._adopt(backend.view(memory, 0, shape, dt), backend)

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
            An array of NumPy, torch or JAX, or any DLPack exporter.
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
        source = registry.for_array(x)
        backend = Device.of(x).backend
        native = exchange(x, backend.name, copy=copy)
        facts = backend.facts(native)
        if facts.obstacle is not None:
            raise ZeroCopyError(f"a Buffer cannot be made of it: {facts.obstacle}")
        if copy is not True:
            immutable = source is not None and source.facts(x).immutable
            if immutable or facts.read_only:
                if copy is False:
                    raise ZeroCopyError(
                        "the array must not be written and a Buffer is memory to write: use "
                        "copy=None or copy=True, or make it writable if it is yours"
                    )
                ledger.will_copy(facts.byte_size, "read-only (to a Buffer)")
                native = backend.duplicate(native)
        return cls._adopt(native, backend)

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
        if raw.nbytes != _byte_size(shape, dt):
            raise ShapeError(
                f"{raw.nbytes:,} bytes were given for {dt.name}{list(shape)}, which takes "
                f"{_byte_size(shape, dt):,}"
            )
        self = cls.zeros(shape, dt, device)
        ledger.will_copy(raw.nbytes, "from_bytes")
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

    # --- views -------------------------------------------------------------------------------

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
        if view is not None and self._access.native_ready and not view.requires_grad:
            return view
        return self._mutable_view(registry.get("torch"))

    def jax(self) -> Any:
        """Give the memory as a JAX array.

        Copies: never. Blocks: only after an update of an overlapping slice. Read-only: JAX arrays
        are. Aliases: this Buffer. The second call is a look-up. The array dies with the next write
        by the driver: using it then raises JAX's own error. It may be donated to a jitted function
        of yours whose result you give back by `commit`.

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
            and self._access.functional_ready
            and lease.clean()
            and not lease.is_dead(array)
        ):
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
        """Give the native array for inspection, without ordering; what `explain` calls."""
        return self._native

    def _mutable_view(self, target: Backend | ModuleType, *, in_scope: bool = False) -> Any:
        access = self._access
        if in_scope:
            return self._view_of(target)
        if access.native_ready:
            view = self._view_of(target)
        else:
            self._materialise()
            access = self._access
            acquire((), [access])
            try:
                with access.lock:
                    view = self._view_of(target)
                    access.settle()
            finally:
                release((), [access])
        if not access.native_out:
            access.native_out = True
            access.refresh()
        return view

    def _view_of(self, target: Backend | ModuleType) -> Any:
        """Give the cached view of a mutable framework, or make it."""
        key = target.name if isinstance(target, Backend) else target
        view = self._views.get(key)
        if view is not None:
            if not isinstance(target, Backend) or target.is_pristine(view):
                return view
            view = target.renewed(view)
        else:
            view = self._made_view(target)
        if not isinstance(target, Backend):
            self._views[key] = view
        elif target.may_cache(view):
            if view is not self._views.get(key) and key not in self._views:
                self._mark(target, view)
            self._views[key] = view
            if key == "numpy":
                self._numpy = view
            elif key == "torch":
                self._torch = view
        return view

    def _made_view(self, target: Backend | ModuleType) -> Any:
        if target is self._backend:
            return self._native
        if isinstance(target, Backend) and target.name == "numpy" and not self._device.is_host:
            raise DeviceUnavailableError(
                f"{self._access.label} lives on {self._device} and NumPy sees host memory only: "
                "call to_host() for a copy on the host"
            )
        facts = self._facts
        if isinstance(target, Backend) and (obstacle := target.obstacle(facts)) is not None:
            raise ZeroCopyError(
                f"{self._access.label} cannot be seen by {target.name} as it is: {obstacle}"
            )
        ledger.count_exchange()
        if self._parent is not None and self._derivation is not None and isinstance(target, Backend):
            # By way of the base's view, so that they share what the framework keeps for a base,
            # such as torch's version counter.
            base = self._parent._view_of(target)
            if target.may_cache(base):
                view = self._derivation(target, base)
                verify(view, facts, target.facts(view))
                return view
        with self._backend.exporting(self._device):
            return share_verified(self._native, facts, target)

    def _mark(self, backend: Backend, view: Any) -> None:
        if self._parent is None and type(backend).mark_written is not Backend.mark_written:
            self._access.marks.append((backend, view))

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
                array = lease.array
                if array is None:
                    array = self._imported(lease)
                elif lease.is_dead(array):
                    raise uncommitted(access)
                elif access.native_out and not target.shows_current_bytes(array):
                    access.retired.append((target, array))
                    array = self._imported(lease)
                if not access.synchronous:
                    access.order.before_functional()
                lease.handed = array
                access.handed[lease] = None
                if target.name == "jax":
                    self._jax = lease
        finally:
            if not in_scope:
                release((), [access])
        return array

    def _lease(self, backend: FunctionalBackend) -> Lease:
        """Give the lease of this very piece of memory, shared by equal slices."""
        lease = self._leases.get(backend.name)
        if lease is None:
            facts = self._facts
            key = (backend.name, facts.address, facts.shape, facts.strides, facts.dtype)
            lease = self._access.leases.get(key)
            if lease is None:
                lease = Lease(backend, facts.address, facts.shape)
                self._access.leases[key] = lease
            self._leases[backend.name] = lease
        return lease

    def _imported(self, lease: Lease) -> Any:
        """Import the memory for a lease, verified."""
        backend, facts = lease.backend, self._facts
        obstacle = backend.obstacle(facts)
        if obstacle is None and not facts.is_row_major:
            obstacle = backend.obstacle(facts) or _not_row_major(facts)
        if obstacle is not None:
            raise ZeroCopyError(
                f"{self._access.label} cannot be seen by {backend.name} as it is: {obstacle}"
            )
        ledger.count_exchange()
        with self._backend.exporting(self._device):
            array = backend.lease(self._native, facts)
        verify(array, facts, backend.facts(array))
        lease.array = array
        return array

    def _materialise(self) -> None:
        """Make sure that there are bytes; a handle overrides this."""
        self._access.require_open()

    # --- slices ------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Buffer:
        """Give a basic slice as a Buffer on the same bytes; never copies.

        Raises
        ------
        DTypeError
            For an index that would copy (arrays, lists, booleans).
        IndexError
            Out of range.
        """
        for part in key if isinstance(key, tuple) else (key,):
            basic = part is None or part is Ellipsis or isinstance(part, slice)
            if isinstance(part, (bool, np.bool_)) or not (basic or isinstance(part, SupportsIndex)):
                raise DTypeError(
                    f"a Buffer takes basic slices (integers, slices, ..., None), which never copy; "
                    f"got {part!r}. Index a view for the rest, for example b.numpy()[{part!r}]"
                )
        if isinstance(key, tuple) and any(getattr(part, "ndim", 0) for part in key):
            raise DTypeError("an array as an index would copy; index a view instead")
        self._materialise()
        return self._derived(lambda backend, view: backend.index(view, key))

    def view(self, dtype: Any, shape: int | tuple[int, ...] | None = None) -> Buffer:
        """See the bytes as another dtype, and shape; a Buffer on the same bytes, never a copy.

        Parameters
        ----------
        dtype
            Any dtype of the table.
        shape
            The new shape; left out, the last axis grows or shrinks with the item size.

        Raises
        ------
        ShapeError
            When the bytes do not fit.
        ZeroCopyError
            When the Buffer is not contiguous.
        """
        dt = dtypes.info(dtype).dtype
        self._materialise()
        if not self.is_contiguous:
            raise ZeroCopyError(
                f"{self._access.label} with strides {self.strides} is not contiguous and cannot be "
                "seen as another dtype; copy it with to_host() or from_array(copy=True)"
            )
        if shape is None:
            if dt.itemsize == self.dtype.itemsize:
                new = self.shape
            else:
                last = self.shape[-1] * self.dtype.itemsize if self.shape else -1
                if last % dt.itemsize:
                    raise ShapeError(
                        f"the last axis of {self.dtype.name}{list(self.shape)} does not divide "
                        f"into {dt.name}; give a shape"
                    )
                new = (*self.shape[:-1], last // dt.itemsize)
        else:
            new = shape_of(shape)
        if _byte_size(new, dt) != self.byte_size:
            raise ShapeError(
                f"{dt.name}{list(new)} takes {_byte_size(new, dt):,} bytes and the Buffer "
                f"has {self.byte_size:,}"
            )
        return self._derived(lambda backend, view: backend.reinterpret(view, dt, new))

    def _derived(self, derivation: Callable[[Backend, Any], Any]) -> Buffer:
        self._access.require_open()
        part = object.__new__(Buffer)
        native = derivation(self._backend, self._native)
        part._setup(native, self._backend, self._access, self, derivation)
        return part

    def __iter__(self) -> Iterator[Buffer]:
        return (self[i] for i in range(len(self)))

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

    def update(
        self,
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
        return update_one(
            self, step, args, kwargs, framework, has_aux, static_argnums, ordered
        )

    def close(self) -> None:
        """Give up the memory; it is freed when the last view of it is gone. Twice is fine.

        Blocks until scopes of other threads are left. Any later access, by a slice too, raises
        `ClosedHandleError`.
        """
        if self._access.state == "closed":
            return
        self._access.close()
        self._forget()

    def _forget(self) -> None:
        self._native = self._numpy = self._torch = self._jax = self._parent = None
        self._views.clear()
        self._leases.clear()


def _not_row_major(facts: ArrayFacts) -> Any:
    from rlx_driver.backends.base import Obstacle

    return Obstacle(
        "strides",
        f"its strides {facts.strides} are not in C order, which updates in place need",
        "share the whole and transpose in the framework",
    )


def shape_of(shape: Any) -> tuple[int, ...]:
    """Check a shape.

    Raises
    ------
    ShapeError
        When a length is negative or no integer.
    """
    lengths = (shape,) if isinstance(shape, SupportsIndex) else shape
    try:
        result = tuple(n.__index__() for n in lengths)
    except (AttributeError, TypeError):
        raise ShapeError(f"a shape is a tuple of integers; got {shape!r}") from None
    if any(n < 0 for n in result):
        raise ShapeError(f"lengths are not negative; got shape {result}")
    return result


def _byte_size(shape: tuple[int, ...], dt: np.dtype[Any]) -> int:
    return math.prod(shape) * dt.itemsize


