"""A device that is not there, to test programs that use the driver: see `FakeDevice`.

It needs NumPy alone.
"""

from rlx_driver.testing._arrays import FunctionalArray
from rlx_driver.testing._device import FakeDevice
from rlx_driver.testing._machine import FakeError
from rlx_driver.testing._memory import LiveAllocation
from rlx_driver.testing._native import FakeArray
from rlx_driver.testing._scheduler import HangError, LogEntry
from rlx_driver.testing._stream import FakeEvent, FakeStream

__all__ = [
    "FakeArray",
    "FakeDevice",
    "FakeEvent",
    "FakeError",
    "FakeStream",
    "FunctionalArray",
    "HangError",
    "LiveAllocation",
    "LogEntry",
]
