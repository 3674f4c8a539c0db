"""The driver layer under NumPy, PyTorch and JAX programs.

It owns which device, which bytes, and in which order; the frameworks keep graphs, autograd and
compilation. torch and JAX are imported the first time something asks for them, never before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlx_driver._checking import check_as_asked as _check_as_asked
from rlx_driver._checking import checking
from rlx_driver._exchange import Explanation, exchange, explain
from rlx_driver._ledger import ledger, no_copies
from rlx_driver._memory import no_leaks, trace_memory
from rlx_driver._races import Race
from rlx_driver.buffer import Buffer
from rlx_driver.device import Device, MemoryInfo, available_devices
from rlx_driver.dtypes import DTypeInfo, dtype
from rlx_driver.errors import (
    AccessTimeoutError,
    ArenaCorruptionError,
    CapacityError,
    CaptureError,
    ClosedHandleError,
    DeviceUnavailableError,
    DriverError,
    DTypeError,
    DuplicateError,
    LeakError,
    MissingPackageError,
    OutOfDeviceMemory,
    PlanError,
    RaceError,
    RaceWarning,
    RecompilationWarning,
    ShapeError,
    SnapshotError,
    StaleViewError,
    StreamError,
    TransformError,
    UnboundNameError,
    UnknownFrameworkError,
    UpdateFailedError,
    ZeroCopyError,
)
from rlx_driver.events import DeviceEvent, Event, HostEvent
from rlx_driver.graph import CommandGraph
from rlx_driver.handle import BufferHandle, HandleRegion, open_handles
from rlx_driver.registry import register_backend
from rlx_driver.stream import CommandStream, JaxStream, SyncStream, TorchStream, command_stream
from rlx_driver.tree import commit, read, update, views, write

if TYPE_CHECKING:
    from rlx_driver._jax_call import jax_call
    from rlx_driver._memory_report import memory_report, reset_peak_memory
    from rlx_driver._memory_values import DeviceMemory, MemoryEntry, MemoryReport, RegionMemory
    from rlx_driver.arena import Arena
    from rlx_driver.compiled import Compiled
    from rlx_driver.device_arena import DeviceArena
    from rlx_driver.interval import Interval
    from rlx_driver.live_ranges import intervals_from_fx, intervals_from_jaxpr
    from rlx_driver.memory_plan import MemoryPlan
    from rlx_driver.plan import plan_memory
    from rlx_driver.session import Session
    from rlx_driver.typed_io import read_typed_to_f32, write_typed_from_f32

__version__ = "0.1.0"

__all__ = [
    # errors
    "AccessTimeoutError",
    # arenas
    "Arena",
    "ArenaCorruptionError",
    # memory
    "Buffer",
    "BufferHandle",
    "CapacityError",
    "CaptureError",
    "ClosedHandleError",
    # order
    "CommandGraph",
    "CommandStream",
    # sessions
    "Compiled",
    "DTypeError",
    # devices and dtypes
    "DTypeInfo",
    "Device",
    "DeviceArena",
    "DeviceEvent",
    # memory accounting
    "DeviceMemory",
    "DeviceUnavailableError",
    "DriverError",
    "DuplicateError",
    "Event",
    # exchange
    "Explanation",
    "HandleRegion",
    "HostEvent",
    # memory plans
    "Interval",
    "JaxStream",
    "LeakError",
    "MemoryEntry",
    "MemoryInfo",
    "MemoryPlan",
    "MemoryReport",
    "MissingPackageError",
    "OutOfDeviceMemory",
    "PlanError",
    # races
    "Race",
    "RaceError",
    "RaceWarning",
    "RecompilationWarning",
    "RegionMemory",
    "Session",
    "ShapeError",
    "SnapshotError",
    "StaleViewError",
    "StreamError",
    "SyncStream",
    "TorchStream",
    "TransformError",
    "UnboundNameError",
    "UnknownFrameworkError",
    "UpdateFailedError",
    "ZeroCopyError",
    "available_devices",
    "checking",
    "command_stream",
    # trees of buffers
    "commit",
    "dtype",
    "exchange",
    "explain",
    "intervals_from_fx",
    "intervals_from_jaxpr",
    # torch and NumPy inside JAX programs
    "jax_call",
    "ledger",
    "memory_report",
    "no_copies",
    "no_leaks",
    "open_handles",
    "plan_memory",
    "read",
    # typed I/O
    "read_typed_to_f32",
    "register_backend",
    "reset_peak_memory",
    "trace_memory",
    "update",
    "views",
    "write",
    "write_typed_from_f32",
]

_ON_FIRST_USE = {
    "Arena": "arena",
    "Compiled": "compiled",
    "DeviceArena": "device_arena",
    "DeviceMemory": "_memory_values",
    "Interval": "interval",
    "MemoryEntry": "_memory_values",
    "MemoryPlan": "memory_plan",
    "MemoryReport": "_memory_values",
    "RegionMemory": "_memory_values",
    "Session": "session",
    "intervals_from_fx": "live_ranges",
    "intervals_from_jaxpr": "live_ranges",
    "jax_call": "_jax_call",
    "memory_report": "_memory_report",
    "plan_memory": "plan",
    "read_typed_to_f32": "typed_io",
    "reset_peak_memory": "_memory_report",
    "write_typed_from_f32": "typed_io",
}
"""Names that are imported when somebody asks for them, and their modules."""


def __getattr__(name: str) -> Any:
    module = _ON_FIRST_USE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_check_as_asked()
