"""Devices: plain values that name a place for bytes, whether or not it is there."""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from rlx_driver.errors import DeviceUnavailableError, DriverError, UnknownFrameworkError
from rlx_driver.registry import registry

if TYPE_CHECKING:
    from types import ModuleType

    from rlx_driver.backends.base import Backend

__all__ = ["Device", "MemoryInfo", "available_devices"]

# kind -> (display name, DLPack device type or None, what would make it usable)
_KINDS: dict[str, tuple[str, int | None, str]] = {
    "cpu": ("CPU", 1, ""),
    "metal": ("Metal", 8, "install rlx-driver[torch] on a Mac with Apple silicon"),
    "mlx": ("MLX", 8, "no MLX backend is built in"),
    "ane": ("Apple Neural Engine", None, "no array framework allocates on it"),
    "cuda": ("CUDA", 2, "install rlx-driver[torch] with a CUDA build of torch, and a driver"),
    "rocm": ("ROCm", 10, "install rlx-driver[torch] with a ROCm build of torch"),
    "tpu": ("TPU", None, "install rlx-driver[jax] with jax[tpu], on a TPU host"),
    "gpu": ("GPU (wgpu)", 15, "no wgpu backend is built in"),
    "vulkan": ("Vulkan", 7, "no Vulkan backend is built in"),
    "opengl": ("OpenGL", None, "no OpenGL backend is built in"),
    "directx": ("DirectX", None, "no DirectX backend is built in"),
    "webgpu": ("WebGPU", 15, "no WebGPU backend is built in"),
    "fpga": ("FPGA", None, "no FPGA backend is built in"),
}
_ALIASES = {"mps": "metal", "host": "cpu", "wgpu": "gpu"}
_BY_DLPACK = {1: "cpu", 2: "cuda", 3: "cpu", 8: "metal", 10: "rocm", 11: "cpu", 13: "cuda"}
_SPELLING = re.compile(r"([a-z]+)(?::(\d+))?")


class MemoryInfo(NamedTuple):
    """Memory of one device, in bytes.

    Attributes
    ----------
    total
        Installed memory.
    free
        What the system says can still be allocated.
    in_use
        Allocated by the driver, for buffers, handles and arenas, and not yet freed.
    """

    total: int
    free: int
    in_use: int


class Device:
    """A place for bytes: a kind and an index; hashable, comparable, immutable.

    A `Device` is a value: making one neither loads a framework nor asks whether it is there.

    Parameters
    ----------
    spec
        A kind (``"cuda"``), a kind with an index (``"cuda:1"``), another `Device`, or a device
        object of torch or JAX. ``"mps"`` is ``"metal"``.
    index
        Which device of that kind; 0 when left out.

    Raises
    ------
    DeviceUnavailableError
        For a kind that `Device.kinds` does not list.
    """

    __slots__ = ("_index", "_kind")
    _index: int
    _kind: str

    def __init__(self, spec: str | Device | Any = "cpu", index: int | None = None) -> None:
        kind, own_index = _parse(spec)
        if index is not None and own_index is not None and index != own_index:
            raise DeviceUnavailableError(
                f"{spec!r} names index {own_index} and index={index} was given too; give one"
            )
        chosen = index if index is not None else own_index
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_index", 0 if chosen is None else _index(chosen))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Device is a value; {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Device is a value; {name} cannot be deleted")

    def __reduce__(self) -> tuple[type[Device], tuple[str, int]]:
        return Device, (self._kind, self._index)

    @staticmethod
    def kinds() -> tuple[str, ...]:
        """List every kind that the RLX driver knows, with a backend here or without."""
        return tuple(_KINDS)

    @staticmethod
    def of(array: Any) -> Device:
        """Tell where an array lives: NumPy, torch, JAX, a `Buffer`, or any DLPack exporter.

        Parameters
        ----------
        array
            The array. It is not copied, waited for, or consumed.

        Raises
        ------
        UnknownFrameworkError
            When it is no array, on a DLPack device without a kind of ours, or an exporter that
            names no device.
        """
        own = getattr(array, "device", None)
        if isinstance(own, Device):
            return own
        backend = registry.for_array(array)
        if backend is not None:
            return backend.device_of(array)
        if not hasattr(array, "__dlpack_device__"):
            raise UnknownFrameworkError(
                f"a {type(array).__qualname__} is no array: it has no __dlpack_device__"
            )
        try:
            device_type, index = map(int, array.__dlpack_device__())
            return Device.from_dlpack(device_type, index)
        except DriverError as error:
            raise UnknownFrameworkError(f"{type(array).__qualname__}: {error}") from error
        except Exception as error:  # a foreign exporter raises what it likes
            raise UnknownFrameworkError(
                f"the __dlpack_device__ of a {type(array).__qualname__} gives no pair of device "
                f"type and index: {type(error).__name__}: {error}"
            ) from error

    @staticmethod
    def from_dlpack(device_type: int, index: int) -> Device:
        """Give the device for a pair as ``__dlpack_device__`` returns it.

        Raises
        ------
        UnknownFrameworkError
            For a device type that has no kind here.
        """
        kind = _BY_DLPACK.get(device_type)
        if kind is None:
            raise UnknownFrameworkError(
                f"DLPack device type {device_type} has no device kind; known are "
                f"{', '.join(f'{t} ({k})' for t, k in _BY_DLPACK.items())}"
            )
        # Pinned host memory carries the index of its GPU; for us it is the host.
        return Device(kind, 0 if device_type in (3, 11) else index)

    @property
    def kind(self) -> str:
        """The kind, one of `Device.kinds`."""
        return self._kind

    @property
    def index(self) -> int:
        """Which device of the kind, from 0."""
        return self._index

    @property
    def name(self) -> str:
        """The display name of the kind, such as ``"CUDA"``."""
        return _KINDS[self._kind][0]

    @property
    def is_host(self) -> bool:
        """Whether the host's processor can read its bytes at their address."""
        return self._kind == "cpu"

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """The pair ``(device_type, device_id)`` of DLPack.

        Raises
        ------
        DeviceUnavailableError
            When DLPack has no type for this kind.
        """
        device_type = _KINDS[self._kind][1]
        if device_type is None:
            raise DeviceUnavailableError(f"DLPack has no device type for {self}")
        return device_type, self._index

    @property
    def backend(self) -> Backend:
        """The backend that allocates here.

        Raises
        ------
        DeviceUnavailableError
            When no backend serves the kind, its package is missing, or the device is not there;
            the text says which, and how to add it.
        """
        backend = registry.for_kind(self._kind)
        if backend is None:
            raise DeviceUnavailableError(
                f"{self} has no backend here: {_KINDS[self._kind][2]}. Add one with "
                f"rlx_driver.register_backend(name, factory, kinds=({self._kind!r},))"
            )
        present = backend.devices(self._kind)
        if self not in present:
            seen = ", ".join(map(str, present)) or "none"
            raise DeviceUnavailableError(
                f"{self} is not on this machine; {backend.name} sees of that kind: {seen}. "
                f"{_KINDS[self._kind][2]}".rstrip()
            )
        return backend

    @property
    def xp(self) -> ModuleType:
        """The array namespace of the backend, by array-api-compat where it wraps one.

        Raises
        ------
        DeviceUnavailableError
            As for `backend`.
        """
        return self.backend.namespace()

    def is_available(self) -> bool:
        """Tell whether a backend is there and sees this device; loads the backend."""
        try:
            return self.backend is not None
        except DeviceUnavailableError:
            return False

    def memory(self) -> MemoryInfo:
        """Give total, free and driver-used memory of this device, in bytes.

        Raises
        ------
        DeviceUnavailableError
            As for `backend`.
        """
        return self.backend.memory(self)

    def __str__(self) -> str:
        if self._kind == "cpu" and self._index == 0:
            return "cpu"
        return f"{self._kind}:{self._index}"

    def __repr__(self) -> str:
        return f"Device({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Device):
            return NotImplemented
        return self._kind == other._kind and self._index == other._index

    def __hash__(self) -> int:
        return hash((self._kind, self._index))


def _parse(spec: Any) -> tuple[str, int | None]:
    if isinstance(spec, Device):
        return spec._kind, spec._index
    if not isinstance(spec, str):
        # torch.device has type and index, a JAX device platform and id.
        kind = getattr(spec, "type", None) or getattr(spec, "platform", None)
        index = getattr(spec, "index", None)
        if not isinstance(kind, str):
            raise DeviceUnavailableError(
                f"{spec!r} names no device; give a kind such as 'cpu' or 'cuda:0'"
            )
        if index is None:
            index = getattr(spec, "local_hardware_id", None)
        return _kind("cuda" if kind == "gpu" else kind, spec), index
    match = _SPELLING.fullmatch(spec.strip().lower())
    if match is None:
        raise DeviceUnavailableError(
            f"{spec!r} is not a device; spell it as a kind, or kind:index, such as 'cuda:0'"
        )
    return _kind(match[1], spec), None if match[2] is None else int(match[2])


def _index(index: Any) -> int:
    try:
        found = operator.index(index)
    except TypeError:
        found = -1
    if found < 0:
        raise DeviceUnavailableError(f"a device index is an integer from 0; got {index!r}")
    return found


def _kind(text: str, spec: object) -> str:
    kind = _ALIASES.get(text, text)
    if kind not in _KINDS:
        raise DeviceUnavailableError(
            f"{spec!r} is of no known kind; known are {', '.join(_KINDS)} (mps is metal)"
        )
    return kind


def available_devices() -> list[Device]:
    """List every device that can be used here, the host first.

    Loads the backends that are installed; frameworks that are missing are left out.
    """
    found: list[Device] = []
    for kind in _KINDS:
        try:
            backend = registry.for_kind(kind)
        except DeviceUnavailableError:
            continue
        if backend is not None:
            found += backend.devices(kind)
    return found
