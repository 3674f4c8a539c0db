"""Persistent handles: buffers with a name and an address for life, and the regions they live in."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from rlx_driver import dtypes
from rlx_driver._memory import Maker, common_pool, register
from rlx_driver._owned import Owner, make_owned, owning_backend
from rlx_driver._slices import shape_of
from rlx_driver._snapshot_region import RegionFiles
from rlx_driver.access import Access
from rlx_driver.backends.accounting import Allocation, Pool
from rlx_driver.backends.base import ALIGNMENT, Backend, FunctionalBackend, accounting
from rlx_driver.buffer import Buffer
from rlx_driver.device import Device
from rlx_driver.errors import (
    ClosedHandleError,
    DeviceUnavailableError,
    DTypeError,
    DuplicateError,
    ShapeError,
    UnboundNameError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping

__all__ = ["BufferHandle", "HandleRegion", "open_handles"]

_open: weakref.WeakSet[BufferHandle] = weakref.WeakSet()


class BufferHandle(Buffer):
    """A Buffer with a name, whose shape, dtype and **address** never change until `close`.

    Its bytes come from a `HandleRegion`, apart from every arena, on first use: zero bytes, aligned
    to 256. Views, scopes, `update` and all else are those of `Buffer`.

    Parameters
    ----------
    name
        Identifies the handle inside its region or session, not globally.
    shape
        Lengths of the axes.
    dtype
        Anything `rlx_driver.dtype` takes.
    device
        Where; left out, the region's device, or the host.
    region
        The region to live in; left out, an allocation of its own.

    Raises
    ------
    ShapeError, DTypeError
        Bad shape or dtype.
    DuplicateError
        The region has the name already.
    DeviceUnavailableError
        Device and region disagree, or, on first use, the device is not there.
    OutOfDeviceMemory
        On first use: the device has not that much memory.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> kv = rlx.BufferHandle("kv", (2, 4), "f32")
    >>> kv.numpy()[0] = 1.0
    >>> kv.update(lambda x: x + 1, framework="numpy")
    >>> kv.numpy().sum().item()
    12.0
    >>> kv.close()
    """

    __slots__ = ("_maker", "_materialising", "_name", "_region", "_slot")

    _maker: Maker

    def __init__(
        self,
        name: str,
        shape: int | tuple[int, ...],
        dtype: Any = "f32",
        *,
        device: Device | str | None = None,
        region: HandleRegion | None = None,
    ) -> None:
        inherited = Device() if region is None else region.device  # an empty region is falsy
        place = inherited if device is None else Device(device)
        if region is not None and place != region.device:
            raise DeviceUnavailableError(
                f"handle {name!r} was asked for on {place} in a region on {region.device}"
            )
        self._start(name, shape_of(shape), dtypes.info(dtype).dtype, place)
        if region is None:
            region = object.__new__(HandleRegion)
            pool = common_pool("handles", place)
            region._begin(place, f"own region of {name!r}", None, pool)
            # Weakly: nobody else asks this region for the handle, and a cycle would keep it.
            region._handles = weakref.WeakValueDictionary()
        self._region = region
        self._region._add({name: self})

    def _start(self, name: str, shape: tuple[int, ...], dt: np.dtype[Any], device: Device) -> None:
        from rlx_driver.backends.base import ArrayFacts, Order, row_major_strides

        self._name = name
        self._native = None
        self._slot: tuple[Any, int] | None = None
        self._materialising = threading.Lock()
        self._device = device
        strides = row_major_strides(shape, dt.itemsize)
        self._facts = ArrayFacts(0, shape, strides, dt, device)
        self._access = Access(f"handle {name!r}", Order())
        # Nothing is there yet: the first access of any kind goes the slow way and makes it.
        self._access.native_ready = self._access.functional_ready = False
        self._parent = self._derivation = None
        self._views = {}
        self._leases = {}
        self._numpy = self._torch = self._jax = None
        _open.add(self)

    @property
    def name(self) -> str:
        """The name inside its region or session."""
        return self._name

    @property
    def region(self) -> HandleRegion:
        """The region that its bytes come from."""
        return self._region

    @property
    def is_allocated(self) -> bool:
        """Whether the first use has happened."""
        return self._native is not None

    @property
    def address(self) -> int:
        """Address of element zero, fixed until `close`; asking is a use."""
        self._materialise()
        return self._facts.address

    def close(self) -> None:
        """Give the handle up; views outside keep the memory alive. Twice is fine."""
        super().close()
        self._region._remove(self)
        _open.discard(self)

    def __enter__(self) -> BufferHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __rlx_native__(self) -> Any:
        """Give the native array, made on first use."""
        self._materialise()
        return self._native

    def _materialise(self) -> None:
        if self._native is not None:
            return
        self._access.require_open()
        with self._materialising:
            if self._native is None:
                self._region._fill(self)

    def _live(self, native: Any, backend: Backend, owner: Owner | None = None) -> None:
        """Take the memory that the region gives."""
        access = self._access
        access.order = backend.order(self._device, native)
        access.synchronous = access.fast = access.order.synchronous
        access.owner = owner
        self._setup(native, backend, access)
        if owner is not None:
            self._adopt_lease(owner.lease)
        access.refresh()

    def __repr__(self) -> str:
        inner = super().__repr__()
        return f"<{type(self).__name__} {self._name!r} {inner.partition(' ')[2]}"


class HandleRegion(RegionFiles):
    """The memory that handles live in, on one device, apart from every arena.

    Parameters
    ----------
    device
        Where.
    backend
        Who owns the memory: left out, the device's native framework (NumPy on the host, torch on
        CUDA). ``"torch"``: torch, on the host too. ``"jax"``: JAX owns it, as on TPU; `update` then
        chains donation as JAX documents it, and on the host other frameworks see it by its
        address. Alignment is then JAX's (64 on the host).

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> region = rlx.HandleRegion("cpu")
    >>> state = region.create({"w": ((4, 4), "f32"), "m": ((4, 4), "f32")})
    >>> region["w"] is state["w"], len(region)
    (True, 2)
    >>> region.close()
    """

    def __init__(self, device: Device | str = "cpu", *, backend: str | None = None) -> None:
        place = Device(device)
        label = f"region on {place}"
        pool = Pool("region", label if backend is None else f"{label} of {backend}", place)
        self._begin(place, label, backend, pool)
        register(self, "region", pool.label, pool)

    def _begin(self, device: Device, label: str, backend: str | None, pool: Pool) -> None:
        self._device = device
        self._backend_name = backend
        self._label = label
        self._lock = threading.RLock()
        self._handles: MutableMapping[str, BufferHandle] = {}
        self._pool = pool  # where its memory is counted
        self._closed = False

    @property
    def device(self) -> Device:
        """Where the region is."""
        return self._device

    @property
    def backend(self) -> Backend:
        """The backend whose framework owns the memory."""
        return owning_backend(self._device, self._backend_name)

    @property
    def byte_size(self) -> int:
        """Bytes of the open handles that have been allocated, without padding."""
        with self._lock:
            return sum(h.byte_size for h in self._handles.values() if h.is_allocated)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def create(self, spec: Mapping[str, tuple[Any, Any]]) -> dict[str, BufferHandle]:
        """Lay several handles in one allocation, all or none.

        Parameters
        ----------
        spec
            For each name its ``(shape, dtype)``.

        Returns
        -------
        dict
            The handles by name, allocated at once, each aligned to 256 (JAX-owned regions allocate
            one array each: JAX arrays have no parts).

        Raises
        ------
        DuplicateError
            A name is taken.
        ShapeError, DTypeError, OutOfDeviceMemory, DeviceUnavailableError
            As for `BufferHandle`. No handle was made.
        """
        for name, entry in spec.items():
            if not isinstance(entry, (tuple, list)) or len(entry) != 2:
                raise ShapeError(f"{name!r} needs a pair (shape, dtype); got {entry!r}")
        checked = {
            name: (shape_of(shape), dtypes.info(dtype).dtype)
            for name, (shape, dtype) in spec.items()
        }
        with self._lock:
            self._require_free(checked)
            backend = self.backend
            offsets, end = {}, 0
            for name, (shape, dt) in checked.items():
                offsets[name] = end
                size = dt.itemsize * int(np.prod(shape, dtype=np.int64))
                end += -(-size // ALIGNMENT) * ALIGNMENT
            functional = isinstance(backend, FunctionalBackend)
            memory = None
            allocations: list[Allocation] = []
            if not functional:
                memory, allocations = accounting.record(backend.allocate, self._device, end)
            made: dict[str, BufferHandle] = {}
            for name, (shape, dt) in checked.items():
                handle = object.__new__(BufferHandle)
                handle._start(name, shape, dt, self._device)
                handle._region = self
                handle._slot = None if memory is None else (memory, offsets[name])
                made[name] = handle
            self._add(made)
            for allocation in allocations:
                allocation.claim([handle._maker for handle in made.values()], self._pool)
            try:
                for handle in made.values():
                    handle._materialise()
            except BaseException:
                for handle in made.values():
                    handle.close()
                raise
        return made

    def __getitem__(self, name: str) -> BufferHandle:
        with self._lock:
            if name not in self._handles:
                known = ", ".join(self._handles) or "none"
                raise UnboundNameError(f"{self._label} has no handle {name!r}; it has: {known}")
            return self._handles[name]

    def __contains__(self, name: object) -> bool:
        return name in self._handles

    def __iter__(self) -> Iterator[BufferHandle]:
        return iter(list(self._handles.values()))

    def __len__(self) -> int:
        return len(self._handles)

    def close(self) -> None:
        """Close every handle, and the region; views outside keep their memory alive."""
        with self._lock:
            self._closed = True
            handles = list(self._handles.values())
        for handle in handles:
            handle.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to pickle: a region is memory."""
        raise DTypeError("a HandleRegion is memory at an address and does not pickle or copy")

    def __enter__(self) -> HandleRegion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<HandleRegion on {self._device}: {len(self)} open handles{state}>"

    def _require_free(self, names: Mapping[str, Any]) -> None:
        if self._closed:
            raise ClosedHandleError(f"{self._label} is closed: make a new region")
        taken = [name for name in names if name in self._handles]
        if taken:
            raise DuplicateError(
                f"{self._label} has a handle {taken[0]!r} already: close it, or choose a name"
            )

    def _add(self, handles: Mapping[str, BufferHandle]) -> None:
        with self._lock:
            self._require_free(handles)
            for name, handle in handles.items():
                handle._maker = register(handle, "handle", name, self._pool, handle._facts)
            self._handles.update(handles)

    def _remove(self, handle: BufferHandle) -> None:
        with self._lock:
            if self._handles.get(handle.name) is handle:
                del self._handles[handle.name]

    def _fill(self, handle: BufferHandle) -> None:
        """Give a handle its bytes."""
        backend = self.backend
        shape, dt = handle.shape, handle.dtype
        if isinstance(backend, FunctionalBackend):
            owned, made = accounting.record(make_owned, backend, self._device, shape, dt)
            handle._maker.claim(made)
            handle._live(*owned)
            return
        if handle._slot is None:
            size = dt.itemsize * int(np.prod(shape, dtype=np.int64))
            memory, made = accounting.record(backend.allocate, self._device, size)
            handle._maker.claim(made)
            offset = 0
        else:
            memory, offset = handle._slot
            handle._slot = None
        handle._live(backend.view(memory, offset, shape, dt), backend)


def open_handles() -> list[BufferHandle]:
    """List the handles of this process that are not closed."""
    return sorted(_open, key=lambda handle: handle.name)
