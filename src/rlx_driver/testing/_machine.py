"""What the two fake frameworks share: devices, their streams and memory, failures on demand."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal

from rlx_driver.backends.base import Obstacle
from rlx_driver.device import Device
from rlx_driver.errors import OutOfDeviceMemory
from rlx_driver.testing._memory import AddressSpace
from rlx_driver.testing._scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlx_driver.backends.base import ArrayFacts
    from rlx_driver.backends.stream_order import Way
    from rlx_driver.testing._stream import FakeStream

__all__ = ["COMPUTE", "COPIES", "FUNCTIONAL", "STAGING", "FakeError", "Failures", "Machine"]

FUNCTIONAL = "fake_functional"
"""The name of the functional framework."""

COMPUTE = "compute"
"""The stream on which the functional framework runs its programs."""
COPIES = "copies"
"""The stream on which it fetches arrays to the host, ordered by their own definition alone."""
STAGING = "staging"
"""The stream on which the driver copies native memory to the host."""


class FakeError(RuntimeError):
    """A failure that `FakeDevice.fail_next` asked for."""


class Failures:
    """Failures on demand, each for the next thing of its kind."""

    kinds = (
        "allocate",  # memory for the driver
        "copy_in",
        "copy_out",
        "copy_across",
        "share",  # an import by either framework
        "lease",
        "work",  # of the native framework, while it runs
        "program",  # of the functional framework, while it runs
        "compile",  # such a program, before it gets anything
        "donate",  # memory is donated, and the result lies elsewhere; nothing is raised
    )

    def __init__(self) -> None:
        self._next: dict[str, deque[Exception]] = {kind: deque() for kind in self.kinds}

    def add(self, kind: str, error: Exception | None) -> None:
        """Let the next thing of a kind fail."""
        if kind not in self._next:
            raise ValueError(f"{kind!r} cannot fail on demand; known are {', '.join(self.kinds)}")
        if error is None:
            made = OutOfDeviceMemory if kind == "allocate" else FakeError
            error = made(f"{kind} failed because the test asked for it")
        self._next[kind].append(error)

    def take(self, kind: str) -> Exception | None:
        """Give the error that the thing happening now is to fail with."""
        asked = self._next[kind]
        return asked.popleft() if asked else None

    def check(self, kind: str) -> None:
        """Raise where the thing happening now is to fail."""
        error = self.take(kind)
        if error is not None:
            raise error


class Machine:
    """Devices of one kind, which both frameworks use.

    Parameters
    ----------
    kind, count
        Of the devices.
    memory_size
        Bytes of each.
    way
        How the work of the frameworks is ordered.
    on_host_wait
        See `Scheduler`.
    """

    def __init__(
        self,
        kind: str,
        count: int,
        memory_size: int,
        way: Way,
        on_host_wait: Literal["raise", "release"],
    ) -> None:
        self.devices = [Device(kind, index) for index in range(count)]
        self.way = way
        self.functional_name = FUNCTIONAL
        self.scheduler = Scheduler(on_host_wait)
        self.failures = Failures()
        self.spaces = {device: AddressSpace(device, memory_size) for device in self.devices}
        for device in self.devices:
            for name in ("default", COMPUTE, COPIES, STAGING):
                self.scheduler.stream(device, name)

    def stream(self, device: Device, name: str) -> FakeStream:
        """Give the stream of a name on a device."""
        return self.scheduler.stream(device, name)

    def enqueue(self, device: Device, label: str, function: Callable[[], object]) -> None:
        """Enqueue work of the native framework on the current stream of a device."""
        error = self.failures.take("work")
        if error is not None:
            function = _raising(error)
        self.scheduler.current(device).enqueue(label, function)

    def obstacle(self, facts: ArrayFacts) -> Obstacle | None:
        """Say why memory is on none of these devices, if so."""
        if facts.device in self.devices:
            return None
        text = f"it lives on {facts.device}, and the fake frameworks see their own devices only"
        return Obstacle("device", text, "copy it with Buffer.to or copy_from", copyable=False)


def _raising(error: Exception) -> Callable[[], object]:
    def work() -> None:
        raise error

    return work
