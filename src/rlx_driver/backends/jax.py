"""JAX: the memory of TPUs, and leases that JAX updates in place on memory of others."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rlx_driver import dlpack
from rlx_driver.backends import _jax_dlpack
from rlx_driver.backends._jax_arrays import (
    HOST_ALIGNMENT,
    SHARED,
    WIDE,
    is_dense,
    jax_obstacle,
    probe_alias,
    probe_trace_state,
    same_buffer,
    strides_of,
)
from rlx_driver.backends._jax_lanes import Lanes
from rlx_driver.backends._jax_steps import StepCache
from rlx_driver.backends._jax_stream import StreamServices
from rlx_driver.backends.base import (
    ArrayFacts,
    FunctionalBackend,
    Obstacle,
    accounting,
    require_memory,
)
from rlx_driver.device import Device, MemoryInfo
from rlx_driver.dtypes import info
from rlx_driver.errors import OutOfDeviceMemory, UnknownFrameworkError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["JaxBackend"]

_CPU = Device("cpu")
_KIND = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "rocm": "rocm", "tpu": "tpu"}
_PLATFORM = {"cpu": "cpu", "cuda": "cuda", "rocm": "rocm", "tpu": "tpu"}

_fence = jax.jit(lambda arrays: arrays, donate_argnums=0, keep_unused=True)


def _replaced(old: Any, new: Any) -> Any:
    # The barrier keeps XLA from handing `new` through: its value is to land in `old`'s memory.
    return jax.lax.optimization_barrier((new, old))[0]


_replace = jax.jit(_replaced, donate_argnums=0, keep_unused=True)


@functools.cache
def _zeros_on(place: Any) -> Callable[..., Any]:
    """Give the program that makes zero bytes on a device of JAX.

    Its results are committed: where another device is JAX's default one, a program takes arrays
    that are not to that one, by a copy.
    """
    return jax.jit(
        _zeros, static_argnums=(0, 1), out_shardings=jax.sharding.SingleDeviceSharding(place)
    )


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    if dtype == np.bool_ or dtype.kind == "c":
        return jnp.zeros(shape, dtype)
    bits = np.dtype(f"u{dtype.itemsize}") if dtype.itemsize <= 8 else dtype
    # By way of integers: the zero bytes of float8_e8m0fnu are 2**-127, not zero.
    return jax.lax.bitcast_convert_type(jnp.zeros(shape, bits), dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _put(memory: Any, value: Any, start: Any) -> Any:
    return jax.lax.dynamic_update_slice(memory, value, (start,))


class JaxBackend(Lanes, StreamServices, FunctionalBackend):
    """JAX arrays: immutable, asynchronous, updated by donation."""

    name: ClassVar[str] = "jax"
    packages: ClassVar[tuple[str, ...]] = ("jax", "jaxlib")
    kinds: ClassVar[tuple[str, ...]] = ("tpu",)

    def __init__(self) -> None:
        # The first use may stand inside a trace, where new arrays are tracers and the probe for
        # traces sees one; a thread of its own is outside of every trace.
        with ThreadPoolExecutor(1) as outside:
            outside.submit(self._start).result()

    def _start(self) -> None:
        self._private = _jax_dlpack.probe()
        self._steps = StepCache()
        self._leases: dict[str, bool] = {}
        self._aliases: dict[str, bool] = {}
        self._lock = threading.Lock()
        self._cpu = jax.devices("cpu")[0]
        self._host_only = jax.default_backend() == "cpu"
        array_type = type(jnp.zeros((), np.float32))
        self.plain_arguments = frozenset({bool, int, float, complex, type(None), array_type})
        self.is_dead = array_type.is_deleted
        self.wait_one = array_type.block_until_ready
        self.donated_address = array_type.unsafe_buffer_pointer
        self.trace_state_clean = probe_trace_state()

    # --- what there is

    def devices(self, kind: str) -> list[Device]:
        """List JAX's local devices of a kind."""
        try:
            found = jax.local_devices(backend=_PLATFORM[kind])
        except (KeyError, RuntimeError):
            return []
        return [Device(kind, i) for i in range(len(found))]

    def jax_device(self, device: Device) -> Any:
        """Give JAX's object for a device."""
        return jax.local_devices(backend=_PLATFORM[device.kind])[device.index]

    def namespace(self) -> ModuleType:
        """Give jax.numpy, which is an Array API namespace by itself."""
        return jnp

    def owns(self, obj: Any) -> bool:
        """Tell whether an object is a JAX array or a tracer of one."""
        return isinstance(obj, jax.Array)

    def device_of(self, array: Any) -> Device:
        """Tell where an array lives; for a sharded one, its first device."""
        if isinstance(array, jax.core.Tracer):
            raise UnknownFrameworkError(
                "a traced JAX array lives nowhere yet: ask outside the traced function"
            )
        place = min(array.devices(), key=lambda d: d.id)
        kind = _KIND.get(place.platform)
        if kind is None:
            raise UnknownFrameworkError(
                f"JAX platform {place.platform} has no device kind of the driver"
            )
        return Device(kind, place.local_hardware_id or 0)

    def facts(self, array: Any) -> ArrayFacts:
        """Describe an array; waits until it is computed, where its address needs that."""
        obstacle = jax_obstacle(array)
        shape = tuple(array.shape)
        if obstacle is not None:
            return ArrayFacts(0, shape, (), np.dtype(bool), _CPU, obstacle=obstacle)
        dtype = np.dtype(array.dtype)
        if dtype not in SHARED:
            text = f"its dtype is {dtype.name}, for which JAX has no DLPack form"
            remedy = "convert it with .astype first; " + info(dtype).note
            obstacle = Obstacle("dtype", text, remedy, copyable=False)
        return ArrayFacts(
            self.address(array) if array.size else 0,
            shape,
            strides_of(array, dtype.itemsize),
            dtype,
            self.device_of(array),
            immutable=True,
            obstacle=obstacle,
        )

    def memory(self, device: Device) -> MemoryInfo:
        """Give the memory of a device as JAX's allocator counts it."""
        if device.is_host:
            return _CPU.memory()
        stats = self.jax_device(device).memory_stats() or {}
        total = int(stats.get("bytes_limit", 0))
        return MemoryInfo(
            total, total - int(stats.get("bytes_in_use", 0)), accounting.in_use(device)
        )

    # --- bytes

    def allocate(self, device: Device, nbytes: int) -> Any:
        """Allocate zero bytes that JAX owns; JAX chooses the alignment (64 on the host)."""
        memory = self.owned(device, (nbytes,), np.dtype(np.uint8))
        accounting.add(device, nbytes, memory)
        return memory

    def owned(self, device: Device, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Allocate an array of zero bytes that JAX owns.

        Raises
        ------
        OutOfDeviceMemory
            When the device has not that much.
        """
        nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        room = self.memory(device)
        if room.total:
            require_memory(nbytes, room, device)
        try:
            array = jax.block_until_ready(_zeros_on(self.jax_device(device))(shape, dtype))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise OutOfDeviceMemory(
                f"{nbytes:,} bytes were asked for on {device}, of which JAX says: {error}"
            ) from error
        return array

    def view(self, memory: Any, byte_offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """Read a typed array out of bytes; JAX has no views, so this copies."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize
        count = size * int(np.prod(shape, dtype=np.int64))
        raw = memory[byte_offset : byte_offset + count]
        if dtype == np.bool_:
            return raw.reshape(shape).astype(bool)
        if dtype.kind == "c":  # JAX does not see bytes as complex numbers, but as their halves
            parts = self.view(memory, byte_offset, (*shape, 2), np.dtype(f"f{size // 2}"))
            return jax.lax.complex(parts[..., 0], parts[..., 1])
        if size > 1:
            raw = raw.reshape(*shape, size)
        return jax.lax.bitcast_convert_type(raw, dtype).reshape(shape)

    def copy_in(self, destination: Any, source: np.ndarray[Any, Any]) -> Any:
        """Put a host array in the memory of an array; returns the one that now holds it."""
        place = next(iter(destination.devices()))
        # A private copy: JAX reads NumPy memory later than the call that passes it.
        return self.copy_across(destination, jax.device_put(np.array(source), place))

    def copy_out(self, array: Any) -> np.ndarray[Any, Any]:
        """Copy an array to new host memory; blocks until it is computed."""
        # By DLPack where it can be: np.asarray of a narrow float holds its array for ever in 0.11.
        on_host = self.device_of(array).is_host and np.dtype(array.dtype) in SHARED
        return registry.get("numpy").duplicate(
            dlpack.as_numpy(array) if on_host else np.asarray(array)
        )

    def copy_across(self, destination: Any, source: Any) -> Any:
        """Put an array in the memory of another; returns the one that now holds it."""
        place = next(iter(destination.devices()))
        return _replace(destination, jax.device_put(source, place))

    def put(self, memory: Any, byte_offset: int, value: np.ndarray[Any, Any]) -> Any:
        """Put host bytes in a byte array, in its own memory."""
        # Under x64, for an offset may lie beyond 2 GiB. A private copy: see `copy_in`.
        with jax.enable_x64(True), jax.disable_jit(False):
            place = next(iter(memory.devices()))
            part = jax.device_put(np.array(value), place)
            return _put(memory, part, np.int64(byte_offset))

    # --- exchange

    def obstacle(self, facts: ArrayFacts) -> Obstacle | None:
        """JAX needs a dtype it keeps, compact strides and, on the host, aligned memory."""
        if facts.dtype not in SHARED:
            return Obstacle(
                "dtype",
                f"JAX has no DLPack form of {info(facts.dtype).name}",
                "convert it to a dtype that JAX shares, or view its bytes as uint8",
                copyable=False,
            )
        if facts.dtype in WIDE and not jax.config.jax_enable_x64:
            return Obstacle(
                "x64",
                f"JAX would narrow {facts.dtype.name} to 32 bits, which changes values, because "
                "x64 is off",
                "set jax_enable_x64, or convert it to a 32-bit dtype on purpose",
                copyable=False,
            )
        if facts.device.kind not in _KIND.values():
            return Obstacle(
                "device", f"it lives on {facts.device}", "copy it to the host first", False
            )
        if not is_dense(facts):
            return Obstacle(
                "strides",
                f"its strides {facts.strides} leave gaps or repeat, and JAX arrays are compact",
                "copy it (copy=None), or share the whole and slice in JAX",
            )
        if facts.device.is_host and facts.address % HOST_ALIGNMENT:
            return Obstacle(
                "alignment",
                f"its address {facts.address:#x} is not aligned to the {HOST_ALIGNMENT} bytes "
                "that JAX needs on the host",
                "allocate it aligned (rlx_driver.Buffer.empty(...).numpy()), or copy it "
                "(copy=None)",
            )
        return None

    def share(self, array: Any, facts: ArrayFacts) -> Any:
        """Import memory of any framework as an immutable array; donating it copies."""
        return self._import(array, facts, None)

    def _import(self, array: Any, facts: ArrayFacts, copy: bool | None) -> Any:
        if facts.device.is_host and not isinstance(array, np.ndarray):
            # Pinned memory too is the host's for us, where JAX would take it for its GPU's.
            array = dlpack.as_numpy(array, writable=not facts.read_only)
        if isinstance(array, np.ndarray):
            # Read-only memory is shared too: JAX writes to it only by way of a lease.
            never_written = facts.read_only and copy is not True
            if self._private is not None:
                capsule = dlpack.capsule_of(array, never_written=never_written)
                return self._private.import_capsule(capsule, self._cpu, copy)
            exporter = dlpack.HostExporter(array, never_written=never_written)
            return jnp.from_dlpack(exporter, copy=copy)
        return jnp.from_dlpack(array)

    def duplicate(self, array: Any) -> Any:
        """Copy an array into new memory of its device."""
        return jnp.array(array, copy=True)

    def is_concrete(self, view: Any) -> bool:
        """Tell whether an array is a real one."""
        return not isinstance(view, jax.core.Tracer)

    # --- leases

    def lease(self, native: Any, facts: ArrayFacts) -> Any:
        """Import native memory so that donating the array writes in place.

        On the host this is JAX's ``copy=True`` import, which aliases an aligned source; on CUDA
        the plain import. The core checks the address of every result.
        """
        if facts.device.is_host:
            return self._import(native, facts, True)
        return jnp.from_dlpack(native)

    def can_lease(self, device: Device) -> bool:
        """Probe, once a kind, whether a donated lease is updated in place."""
        known = self._leases.get(device.kind)
        if known is None:
            known = self._leases[device.kind] = self._probe_lease(device)
        return known

    def _probe_lease(self, device: Device) -> bool:
        if device.kind not in ("cpu", "cuda") or self.devices(device.kind) == []:
            return False
        native_backend = device.backend
        memory = native_backend.allocate(device, 256)
        native = native_backend.view(memory, 0, (64,), np.dtype(np.float32))
        facts = native_backend.facts(native)
        try:
            leased = self.lease(native, facts)
            step = jax.jit(lambda x: x + 1, donate_argnums=0, keep_unused=True)
            with jax.ensure_compile_time_eval(), jax.disable_jit(False):
                result = jax.block_until_ready(step(leased))
        except (TypeError, ValueError, RuntimeError, BufferError):
            return False
        return bool(leased.is_deleted() and self.address(result) == facts.address)

    def address(self, array: Any) -> int:
        """Give the address of an array.

        Asking a pending host array that was not donated for its pointer can hang for ever: JAX
        waits with the interpreter's lock held. So wait for it first, without.
        """
        if next(iter(array.devices())).platform == "cpu":
            array.block_until_ready()
        return int(array.unsafe_buffer_pointer())

    def wait(self, arrays: Any) -> None:
        """Block until an array, or each of a list, is computed."""
        if isinstance(arrays, list):
            jax.block_until_ready(arrays)
        else:
            arrays.block_until_ready()

    def is_ready(self, array: Any) -> bool:
        """Tell whether an array is computed."""
        return bool(array.is_ready())

    def fence(self, arrays: list[Any]) -> list[Any]:
        """Donate arrays to the identity: the results are ready after every earlier reader."""
        if jax.config.jax_disable_jit:  # would make the fence a silent no-op
            with jax.disable_jit(False):
                return list(_fence(arrays))
        if len(arrays) > 8:
            try:
                return list(_fence(arrays))
            except (ValueError, RuntimeError) as error:
                if not self.refuses_donation(error):
                    raise
        # One by one: few programs to compile, however the arrays are combined.
        return [self._fenced(array) for array in arrays]

    def _fenced(self, array: Any) -> Any:
        try:
            return _fence([array])[0]
        except (ValueError, RuntimeError) as error:
            if not self.refuses_donation(error):
                raise
            return array  # alive as ever, as on the host where nothing is raised

    def refuses_donation(self, error: BaseException) -> bool:
        """Tell whether a program was refused because something else holds what it would donate."""
        return "external reference" in str(error)

    def alias(self, array: Any) -> Any:
        """Give another array over the same buffer, where a probe has shown that it dies with it."""
        place = next(iter(array.devices()))
        known = self._aliases.get(place.platform)
        if known is None:
            known = self._aliases[place.platform] = probe_alias(place, self.fence)
        return same_buffer(array) if known else array

    def is_about(self, error: BaseException, array: Any) -> bool:
        """Tell by its text; some errors name shape and dtype, and some nothing."""
        text = str(error)
        if not isinstance(error, (RuntimeError, ValueError)) or "has been deleted" not in text:
            return False
        lengths = ",".join(map(str, array.shape))
        return "shape=" not in text or f"shape={np.dtype(array.dtype).name}[{lengths}]" in text

    def shows_current_bytes(self, array: Any) -> bool:
        """Tell whether an array has not kept the host copy that a fetch from a GPU leaves in it.

        The attribute is private; without it every array is taken for one that has.
        """
        return getattr(array, "_npy_value", array) is None

    # --- updates

    def flatten(self, tree: Any) -> tuple[list[Any], Any]:
        """Take a pytree apart; None is no leaf."""
        return jax.tree_util.tree_flatten(tree)

    def unflatten(self, structure: Any, leaves: list[Any]) -> Any:
        """Put a pytree together again."""
        return jax.tree_util.tree_unflatten(structure, leaves)

    def compiled_step(
        self, step: Callable[..., Any], structure: Any, has_aux: bool, static: tuple[int, ...]
    ) -> Callable[..., Any]:
        """Give the donating, checking program of a step."""
        return self._steps.get(step, structure, has_aux, static)

    def argument(self, value: Any) -> Any:
        """Copy a NumPy array: a jitted call reads it after the call has returned."""
        return np.array(value) if isinstance(value, np.ndarray) else value
