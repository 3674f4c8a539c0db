"""torch: the memory of CUDA, ROCm and Metal devices, and views of host memory."""

from __future__ import annotations

import functools
import operator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, ClassVar

import array_api_compat.torch
import numpy as np
import torch

from rlx_driver.backends._numpy_pointer import pointer
from rlx_driver.backends._torch_grad import probe_no_grad
from rlx_driver.backends._torch_streams import DEVICE_TYPE, GPU_KIND, place_of
from rlx_driver.backends._torch_tensors import (
    CARRIER,
    EVERYDAY,
    TO_NUMPY,
    TO_TORCH,
    capsule_of_tensor,
    is_wrapped,
    numpy_of_tensor,
    tensor_of_jax,
    tensor_of_numpy,
    torch_obstacle,
)
from rlx_driver.backends._torch_typed import TypedServices, require_no_capture
from rlx_driver.backends.base import (
    ALIGNMENT,
    ArrayFacts,
    Obstacle,
    Order,
    accounting,
    require_memory,
    row_major_strides,
)
from rlx_driver.backends.stream_order import StreamOrder
from rlx_driver.device import Device, MemoryInfo
from rlx_driver.dtypes import info
from rlx_driver.errors import OutOfDeviceMemory, UnknownFrameworkError, ZeroCopyError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["TorchBackend"]

_CPU = Device("cpu")
_KIND = {"cpu": "cpu", "cuda": GPU_KIND, "mps": "metal"}

_version = operator.attrgetter("_version")
_private_increment = getattr(torch._C, "_increment_version", None)


def probe_increment(
    candidate: Callable[[list[torch.Tensor]], None] | None = _private_increment,
) -> Callable[[list[torch.Tensor]], None]:
    """Choose between the private function behind ``increment_version`` and the public one."""
    if candidate is not None:
        with torch.inference_mode(False):  # the first use may stand inside
            probe = torch.zeros(1)
            version = probe._version
            with suppress(TypeError, RuntimeError):
                candidate([probe])
        if probe._version == version + 1:
            return candidate
    return torch.autograd.graph.increment_version


class TorchBackend(TypedServices):
    """torch tensors; work on a GPU is ordered by torch's current stream."""

    name: ClassVar[str] = "torch"
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    kinds: ClassVar[tuple[str, ...]] = ("cuda", "rocm", "metal")
    plain_arguments = frozenset({bool, int, float, complex, type(None), torch.Tensor})

    def devices(self, kind: str) -> list[Device]:
        """List the GPUs that torch can use, and the host."""
        if kind == "cpu":
            return [_CPU]
        if kind == GPU_KIND:
            return [Device(kind, i) for i in range(torch.cuda.device_count())]
        if kind == "metal" and torch.backends.mps.is_available():
            return [Device("metal")]
        return []

    def namespace(self) -> ModuleType:
        """Give array-api-compat's torch."""
        return array_api_compat.torch

    def owns(self, obj: Any) -> bool:
        """Tell whether an object is a tensor."""
        return isinstance(obj, torch.Tensor)

    def device_of(self, array: Any) -> Device:
        """Tell where a tensor lives."""
        place = array.device
        if place.type == "cpu":
            return _CPU
        kind = _KIND.get(place.type)
        if kind is None:
            raise UnknownFrameworkError(f"torch device {place} has no device kind of the driver")
        return Device(kind, place.index or 0)

    def facts(self, array: torch.Tensor) -> ArrayFacts:
        """Describe a tensor; a tensor without memory of its own gets an obstacle."""
        obstacle = torch_obstacle(array)
        if obstacle is not None and not obstacle.copyable:
            # There may be no memory to ask for, and nobody will.
            shape = () if array.is_nested else tuple(array.shape)
            place = _CPU if array.device.type == "meta" else self.device_of(array)
            return ArrayFacts(0, shape, (0,) * len(shape), np.dtype(bool), place, obstacle=obstacle)
        dtype = TO_NUMPY.get(array.dtype)
        if dtype is None:
            text = f"its dtype is {array.dtype}, which other frameworks do not have or misread"
            obstacle = Obstacle("dtype", text, "convert it with .to(dtype) first", False)
            dtype = np.dtype(bool)
        size = array.element_size()
        return ArrayFacts(
            array.data_ptr(),
            tuple(array.shape),
            tuple(stride * size for stride in array.stride()),
            dtype,
            self.device_of(array),
            obstacle=obstacle,
        )

    def memory(self, device: Device) -> MemoryInfo:
        """Give the memory of a device; free is what the driver of the GPU says."""
        in_use = accounting.in_use(device)
        if device.is_host:
            return registry.get("numpy").memory(device)
        if device.kind == "metal":
            total = int(torch.mps.recommended_max_memory())
            return MemoryInfo(total, total - int(torch.mps.driver_allocated_memory()), in_use)
        free, total = torch.cuda.mem_get_info(device.index)
        return MemoryInfo(total, free, in_use)

    def allocate(self, device: Device, nbytes: int) -> torch.Tensor:
        """Allocate zero bytes by torch's own allocator."""
        room = self.memory(device)
        require_memory(nbytes, room, device)
        try:
            memory = torch.zeros(nbytes + ALIGNMENT, dtype=torch.uint8, device=place_of(device))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise OutOfDeviceMemory(
                f"{nbytes:,} bytes were asked for on {device}, which has {room.free:,} of "
                f"{room.total:,} free.{_preallocation_hint()} torch says: {error}"
            ) from error
        accounting.add(device, nbytes, memory.untyped_storage())
        start = -memory.data_ptr() % ALIGNMENT
        return memory[start : start + nbytes]

    def view(
        self, memory: torch.Tensor, byte_offset: int, shape: tuple[int, ...], dtype: Any
    ) -> torch.Tensor:
        """Make a typed view at a byte offset."""
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        # By way of .data, so that each view has a version counter of its own: a write to one handle
        # of an allocation is none to the others.
        part = memory.data[byte_offset : byte_offset + count]
        typed = part.view(TO_TORCH[np.dtype(dtype)])
        return typed.reshape(shape)

    def copy_in(self, destination: torch.Tensor, source: np.ndarray[Any, Any]) -> None:
        """Copy host memory into a tensor in place, on the current stream; blocks."""
        if destination.is_cuda:
            require_no_capture("a copy from the host")
        self.copy_across(destination, self.share(source, _host_facts(source)))

    def enqueue_copy(self, destination: torch.Tensor, source: Any) -> None:
        """Copy without waiting, where the host memory is pinned."""
        if not destination.is_cuda:
            super().enqueue_copy(destination, source)
            return
        require_no_capture("a copy from the host")
        if isinstance(source, np.ndarray):
            source = self.share(source, _host_facts(source))
        with torch.no_grad():
            destination.copy_(source, non_blocking=True)
        stream = torch.cuda.current_stream(destination.device)
        self.keep_alive(self.record_event(stream, timing=False), source)

    def copy_out(self, array: torch.Tensor) -> np.ndarray[Any, Any]:
        """Copy a tensor to new host memory; blocks until it is there."""
        if array.is_cuda:
            require_no_capture("a copy to the host")
        # reshape: a zero-stride or transposed tensor becomes compact on its device first
        plain = array.detach().resolve_conj().resolve_neg().contiguous()
        return self.numpy_of(plain.to("cpu", copy=True))

    def copy_across(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between tensors in place, on the current stream."""
        with torch.no_grad():
            destination.copy_(source)

    def obstacle(self, facts: ArrayFacts) -> Obstacle | None:
        """Torch needs a dtype it has, strides it can say, and memory it may write."""
        if facts.dtype not in TO_TORCH:
            return Obstacle(
                "dtype",
                f"torch has no {info(facts.dtype).name}",
                "convert it to a dtype that torch has, or view its bytes as uint8",
                copyable=False,
            )
        if facts.device.kind not in DEVICE_TYPE:
            return Obstacle(
                "device", f"it lives on {facts.device}", "copy it to the host first", False
            )
        strides = [s for s, n in zip(facts.strides, facts.shape, strict=True) if n > 1]
        if 0 in facts.shape:
            strides = []  # nothing is ever reached by them
        if any(stride < 0 for stride in strides):
            return Obstacle(
                "strides",
                f"its strides {facts.strides} are negative and torch has none",
                "copy it (copy=None), or flip it in torch after sharing",
            )
        size = facts.dtype.itemsize
        if any(stride % size for stride in strides):
            return Obstacle(
                "strides",
                f"its strides {facts.strides} are no multiples of the item size {size}",
                "copy it (copy=None)",
            )
        if facts.address % size:
            return Obstacle(
                "alignment",
                f"its address {facts.address:#x} is not aligned to its item size {size}",
                "copy it (copy=None)",
            )
        if facts.read_only:
            return Obstacle(
                "read-only",
                "it is read-only and a torch tensor is always writable",
                "copy it (copy=None), or make it writable if it is yours",
            )
        return None

    def share(self, array: Any, facts: ArrayFacts) -> torch.Tensor:
        """Import memory of any framework; a tensor made in inference mode is a normal one."""
        with _normal_mode():
            if isinstance(array, np.ndarray):
                theirs = TO_TORCH[facts.dtype]
                plain = row_major_strides(facts.shape, facts.dtype.itemsize)
                if facts.is_row_major and facts.strides != plain:
                    # Axes of one element may have any stride in NumPy, which torch refuses.
                    array = np.lib.stride_tricks.as_strided(array, facts.shape, plain)
                if facts.dtype in EVERYDAY:
                    return torch.from_numpy(array)
                carrier = CARRIER[facts.dtype.itemsize][0]
                return torch.from_numpy(array.view(carrier)).view(theirs)
            return torch.from_dlpack(array)

    def lane_from(self, source: str) -> Callable[[Any], Any] | None:
        """Give the fast way in for compact, writable NumPy arrays and for host arrays of JAX."""
        if source == "numpy":
            return tensor_of_numpy
        if source == "jax":
            give = getattr(registry.get("jax"), "fast_export", None)
            export = None if give is None else give()
            return None if export is None else functools.partial(tensor_of_jax, export)
        return None

    def lane_to(self, target: str) -> Callable[[Any], Any] | None:
        """Give the fast way out to NumPy for compact host tensors."""
        return numpy_of_tensor if target == "numpy" else None

    def fast_export(self) -> Callable[[Any], Any]:
        """Give the fast exporter of everyday host tensors: (capsule, address, dtype), or None."""
        return capsule_of_tensor

    def numpy_of(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        """Give a host tensor as NumPy sees it, narrow floats included."""
        dtype = TO_NUMPY[tensor.dtype]
        if dtype in EVERYDAY:
            return tensor.numpy()
        return tensor.view(CARRIER[dtype.itemsize][1]).numpy().view(dtype)

    def duplicate(self, array: torch.Tensor) -> torch.Tensor:
        """Copy a tensor into new compact memory on its device, on the current stream."""
        plain = array.detach().resolve_conj().resolve_neg()
        fresh = torch.empty(plain.shape, dtype=plain.dtype, device=plain.device)
        return fresh.copy_(plain)

    def memory_owner(self, array: torch.Tensor) -> Any:
        """Give the storage."""
        return array.untyped_storage()

    def is_concrete(self, view: torch.Tensor) -> bool:
        """Tell whether a view is a plain tensor: no fake one, none of a transform."""
        return type(view) is torch.Tensor and not is_wrapped(view)

    def may_cache(self, view: torch.Tensor) -> bool:
        """Tell whether a view is known to be plain, and was not made for inference alone."""
        return self.is_concrete(view) and is_wrapped(view) is False and not view.is_inference()

    def is_pristine(self, view: torch.Tensor) -> bool:
        """Tell whether a cached view takes no part in autograd."""
        return not view.requires_grad

    def renewed(self, view: torch.Tensor) -> torch.Tensor:
        """Leave autograd: same memory, same version counter."""
        return view.detach()

    def index(self, view: torch.Tensor, key: Any) -> torch.Tensor:
        """Take a basic slice; torch has no negative steps."""
        try:
            return view[key]
        except ValueError as error:
            raise ZeroCopyError(f"torch cannot slice by {key}: {error}") from error

    def reinterpret(
        self, view: torch.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """See the bytes as another dtype and shape."""
        return view.reshape(-1).view(TO_TORCH[dtype]).view(shape)

    def exporting(self, device: Device) -> AbstractContextManager[Any]:
        """Make a GPU the current one: torch exports from no other."""
        if device.kind in ("cuda", "rocm"):
            return torch.cuda.device(device.index)
        return nullcontext()

    def overlaps(self, first: torch.Tensor, second: torch.Tensor) -> bool:
        """Tell whether two tensors share a storage."""
        try:
            ours, theirs = first.untyped_storage(), second.untyped_storage()
        except NotImplementedError:  # sparse
            return False
        return ours.data_ptr() == theirs.data_ptr() and ours.nbytes() > 0

    def named_step(
        self, step: Callable[..., Any], options: dict[str, Any]
    ) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
        """Compile a session's step by ``torch.compile``, or call it as it is with ``eager``."""
        from rlx_driver.backends._torch_compile import named_step

        return named_step(step, options)

    # Records no autograd graph. The function itself, for it is on the hot path.
    writing = staticmethod(probe_no_grad())

    # Raises the version counters, so that autograd refuses what it saved before. The function
    # itself, for it is on the hot path.
    mark_written = staticmethod(probe_increment())  # type: ignore[assignment]

    def version_of(self, view: torch.Tensor) -> Callable[[], int]:
        """Give the count by which autograd notices writes; raw pointers escape it."""
        return functools.partial(_version, view)

    def order(self, device: Device, memory: torch.Tensor) -> Order:
        """Order by torch's streams on CUDA."""
        if device.kind != "cuda":
            return Order()
        return StreamOrder(self.streams(device), memory)

    def stream(self, device: Device, *, side: bool = False, order: str | None = None) -> Any:
        """Give a stream of torch; on the host work is synchronous."""
        from rlx_driver.stream import SyncStream, TorchStream

        return SyncStream() if device.is_host else TorchStream(device, side=side, order=order)


def _normal_mode() -> AbstractContextManager[Any]:
    # Entering inference_mode(False) costs microseconds, so only where it is needed.
    if torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return nullcontext()


def _host_facts(source: np.ndarray[Any, Any]) -> ArrayFacts:
    return ArrayFacts(pointer(source), source.shape, source.strides, source.dtype, _CPU)


def _preallocation_hint() -> str:
    import sys

    if "jax" not in sys.modules:
        return ""
    return (
        " JAX preallocates 75% of a GPU at its first use there: set "
        "XLA_PYTHON_CLIENT_PREALLOCATE=false, or XLA_PYTHON_CLIENT_MEM_FRACTION, before JAX starts."
    )
