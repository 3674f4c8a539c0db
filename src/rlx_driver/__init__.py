"""The driver layer under NumPy, PyTorch and JAX programs.

It owns which device, which bytes, and in which order; the frameworks keep graphs, autograd and
compilation. torch and JAX are imported the first time something asks for them, never before.
"""

from rlx_driver._checking import check_as_asked as _check_as_asked
from rlx_driver._checking import checking
from rlx_driver._exchange import Explanation, exchange, explain
from rlx_driver._ledger import ledger, no_copies
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
    OutOfDeviceMemory,
    PlanError,
    RaceError,
    RaceWarning,
    RecompilationWarning,
    ShapeError,
    SnapshotError,
    StaleViewError,
    StreamError,
    UnboundNameError,
    UnknownFrameworkError,
    UpdateFailedError,
    ZeroCopyError,
)
from rlx_driver.events import DeviceEvent, Event, HostEvent
from rlx_driver.graph import CommandGraph
from rlx_driver.handle import BufferHandle, HandleRegion, open_handles
from rlx_driver.interval import Interval
from rlx_driver.registry import register_backend
from rlx_driver.stream import CommandStream, JaxStream, SyncStream, TorchStream, command_stream
from rlx_driver.tree import commit, read, update, views, write

__version__ = "0.1.0"

__all__ = [
    # errors
    "AccessTimeoutError",
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
    "DTypeError",
    # devices and dtypes
    "DTypeInfo",
    "Device",
    "DeviceEvent",
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
    "MemoryInfo",
    "OutOfDeviceMemory",
    "PlanError",
    # races
    "Race",
    "RaceError",
    "RaceWarning",
    "RecompilationWarning",
    "ShapeError",
    "SnapshotError",
    "StaleViewError",
    "StreamError",
    "SyncStream",
    "TorchStream",
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
    "ledger",
    "no_copies",
    "open_handles",
    "read",
    "register_backend",
    "update",
    "views",
    "write",
]

_check_as_asked()
