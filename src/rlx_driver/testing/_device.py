"""`FakeDevice`: the fake devices as a test uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from rlx_driver.backends.stream_order import Way
from rlx_driver.device import Device
from rlx_driver.registry import registry
from rlx_driver.testing._functional import FakeFunctionalBackend
from rlx_driver.testing._machine import Machine
from rlx_driver.testing._native import FakeArray, FakeBackend, new_array
from rlx_driver.testing._programs import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from rlx_driver.testing._arrays import FunctionalArray
    from rlx_driver.testing._memory import LiveAllocation
    from rlx_driver.testing._scheduler import LogEntry
    from rlx_driver.testing._stream import FakeStream

__all__ = ["FakeDevice"]


class FakeDevice:
    """Devices that are not there, for tests: streams that wait to be released, failures on demand.

    ``with FakeDevice() as fake:`` registers two frameworks for a device kind that nobody serves,
    and takes them out again at the end. ``"fake"`` is mutable and has a current stream, as torch on
    CUDA; ``"fake_functional"`` is immutable, donates, and runs programs on a stream of its own, as
    JAX does. The driver orders them by the very code that orders torch and JAX on CUDA.

    Parameters
    ----------
    kind
        The device kind; one of `Device.kinds`.
    count
        How many devices.
    memory_size
        Bytes of each.
    order
        How the two frameworks are ordered: ``"shared"`` (the native one may run on the stream of
        the other, as a `command_stream` does), ``"events"``, or ``"host"`` (the functional one
        hides its stream).
    on_host_wait
        What happens when the host waits for work that is held: ``"raise"`` a `HangError`, or
        ``"release"`` what it waits for, and nothing else. It can be set later.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> from rlx_driver.testing import FakeDevice
    >>> with FakeDevice() as fake:
    ...     buffer = rlx.Buffer.zeros(4, "f32", fake.device)
    ...     fake.stream().hold()
    ...     _ = buffer.array("fake").fill_(3)
    ...     fake.stream().release()
    ...     buffer.to_host().numpy().tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    _open: ClassVar[FakeDevice | None] = None

    def __init__(
        self,
        kind: str = "fpga",
        *,
        count: int = 1,
        memory_size: int = 64 << 20,
        order: Literal["shared", "events", "host"] = "shared",
        on_host_wait: Literal["raise", "release"] = "raise",
    ) -> None:
        self._kind = kind
        self._machine = Machine(kind, count, memory_size, Way(order), on_host_wait)
        self._runtime = Runtime(self._machine)

    def __enter__(self) -> Self:
        if FakeDevice._open is not None:
            raise RuntimeError("a FakeDevice is in use already: ask that one for more (count=...)")
        FakeDevice._open = self
        native = FakeBackend(self._machine)
        functional = FakeFunctionalBackend(self._machine, self._runtime)
        registry.register(
            native.name, lambda: native, packages=native.packages, kinds=(self._kind,)
        )
        registry.register(functional.name, lambda: functional, packages=functional.packages)
        self._machine.functional_name = functional.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        FakeDevice._open = None
        registry.unregister(FakeBackend.name)
        registry.unregister(FakeFunctionalBackend.name)
        unseen = [s.error for s in self._machine.scheduler.streams if s.error is not None]
        if unseen and error is None:
            raise unseen[0]

    # --- devices and streams

    @property
    def device(self) -> Device:
        """The first device."""
        return self._machine.devices[0]

    @property
    def devices(self) -> list[Device]:
        """All of them."""
        return list(self._machine.devices)

    def stream(self, name: str = "default", device: Device | str | None = None) -> FakeStream:
        """Give a stream by its name, which makes it on first use.

        Parameters
        ----------
        name
            ``"default"`` is current until a thread enters another one; ``"compute"`` and
            ``"copies"`` are the functional framework's, for programs and for fetches to the host;
            on ``"staging"`` the driver copies to the host. Any other is yours.
        device
            Which device; left out, the first.
        """
        return self._machine.stream(self.device if device is None else Device(device), name)

    def hold(self) -> None:
        """Hold every stream, also those made later: work runs only where the host waits for it."""
        self._machine.scheduler.holds = True
        for stream in self._machine.scheduler.streams:
            stream.hold()

    def release(self) -> None:
        """Release every stream."""
        self._machine.scheduler.holds = False
        for stream in self._machine.scheduler.streams:
            stream.release()

    def run(self) -> None:
        """Run everything that may run; enqueueing and releasing do so by themselves."""
        self._machine.scheduler.run()

    @property
    def on_host_wait(self) -> Literal["raise", "release"]:
        """What a wait of the host for held work does."""
        return self._machine.scheduler.on_host_wait

    @on_host_wait.setter
    def on_host_wait(self, what: Literal["raise", "release"]) -> None:
        self._machine.scheduler.on_host_wait = what

    # --- what happened

    @property
    def log(self) -> list[LogEntry]:
        """What ran, which events were reached and waited for, and when the host had to wait."""
        return self._machine.scheduler.log

    @property
    def work(self) -> list[str]:
        """The work that ran, as ``"stream: label"``."""
        return [str(entry) for entry in self.log if entry.kind == "work"]

    @property
    def events(self) -> list[str]:
        """The events recorded and waited for on streams, by the driver or by a test."""
        return [str(entry) for entry in self.log if entry.kind in ("record", "wait")]

    @property
    def host_waits(self) -> list[str]:
        """The waits of the host for work that had not run."""
        return [str(entry) for entry in self.log if entry.kind == "host wait"]

    # --- memory and failures

    @property
    def memory_size(self) -> int:
        """Bytes of each device."""
        return self._machine.spaces[self.device].size

    @property
    def live_allocations(self) -> list[LiveAllocation]:
        """Memory that something still holds: what a test has leaked, at its end."""
        return [entry for space in self._machine.spaces.values() for entry in space.live]

    def fail_next(self, what: str, error: Exception | None = None) -> None:
        """Let the next thing of a kind fail.

        Parameters
        ----------
        what
            ``"allocate"``, ``"copy_in"``, ``"copy_out"``, ``"copy_across"``, ``"share"`` or
            ``"lease"`` raise at the call. ``"compile"`` raises at the call of a program;
            ``"program"``, and ``"work"`` of the native framework, fail while they run.
            ``"donate"`` raises nothing: the array is dead, and the result lies elsewhere.
        error
            With what; left out, a `FakeError` (`OutOfDeviceMemory` for ``"allocate"``).
        """
        self._machine.failures.add(what, error)

    # --- arrays

    def array(self, values: Any, device: Device | str | None = None) -> FakeArray:
        """Make a native array of values, on the current stream."""
        host = np.array(values)
        place = self.device if device is None else Device(device)
        return new_array(self._machine, place, host.shape, host.dtype).copy_(host)

    def functional(self, values: Any, device: Device | str | None = None) -> FunctionalArray:
        """Make a functional array of values."""
        host = np.array(values)
        place = self.device if device is None else Device(device)
        shapes = [(host.shape, host.dtype)]
        return self._runtime.launch("put", lambda _: [host], [], shapes, [None], device=place)[0]

    def launch(self, function: Callable[..., object], *arrays: FakeArray) -> None:
        """Enqueue work of your own on the current stream, as a kernel that is given pointers.

        Parameters
        ----------
        function
            Gets a NumPy array over the bytes of each array, to read and write; it is called when
            the stream comes to it. The native framework does not know what it writes.
        arrays
            Native arrays of one device, the first device when there are none.
        """
        place = arrays[0].device if arrays else self.device
        values = [array._values for array in arrays]
        label = getattr(function, "__name__", "launch")
        self._machine.enqueue(place, label, lambda: function(*values))

    def jit(
        self, function: Callable[..., Any], donate_argnums: Sequence[int] = ()
    ) -> Callable[..., Any]:
        """Make a program of a function of NumPy arrays, for the functional framework.

        It is called with zeros at once, to learn the shapes of its results, and again with the
        values when the compute stream comes to it; NumPy arguments are read then.

        Parameters
        ----------
        function
            Takes and returns trees of arrays.
        donate_argnums
            Positions of arguments whose memory goes to results of the same shape and dtype.
        """
        return self._runtime.jit(function, donate_argnums)
