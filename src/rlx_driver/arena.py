"""`Arena`: one allocation in which every node of a program has its slot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._arena_blocks import name_of
from rlx_driver._arena_debug import MARGIN, Inspector, guarded
from rlx_driver._arena_io import InOutMixin
from rlx_driver._arena_life import LifeMixin, require_plan
from rlx_driver._arena_memory import Memory, make_memory
from rlx_driver._arena_values import native_accessor
from rlx_driver._memory import Contents, Pool, Slot, register
from rlx_driver._snapshot_arena import ArenaFiles
from rlx_driver.backends.base import accounting
from rlx_driver.device import Device
from rlx_driver.errors import ClosedHandleError, DTypeError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from typing import NoReturn

    from rlx_driver._arena_owned import OwnedBytes
    from rlx_driver.backends.accounting import Allocation
    from rlx_driver.buffer import Buffer
    from rlx_driver.memory_plan import MemoryPlan

__all__ = ["Arena"]


class Arena(LifeMixin, InOutMixin, ArenaFiles):
    """One allocation on a device, laid out by a plan; every node has its slot in it.

    A slot is a `Buffer` (`buffer`): NumPy, torch and JAX see it and change it in place, like a
    handle. `view` is the same as an array of the device's own framework. `read` and `write` copy.

    Parameters
    ----------
    plan
        From `plan_memory`.
    device
        Where.
    backend
        Who owns the memory: left out, the device's native framework (NumPy on the host, torch on
        CUDA). ``"torch"``: torch, on the host too. ``"jax"``: one byte array of JAX, as on TPU.
    name
        Shown in errors and in `memory_report`.
    debug
        Lay guard bytes around the slots, poison slots when their life ends (see `advance`), and
        look at both at every copy by the arena. Costs twice the memory, seven times it on the host
        while it looks, and time.

    Raises
    ------
    PlanError
        When `plan` is none.
    DeviceUnavailableError, OutOfDeviceMemory
        The device is not there, or has not that much memory.

    Notes
    -----
    The bytes are zero at first. Slots that share no byte have a discipline of access each; slots
    that reuse each other's bytes share one, so that a write to one is ordered after the readers of
    the others, and JAX arrays of any of them die with it.

    Examples
    --------
    >>> import numpy as np
    >>> import rlx_driver as rlx
    >>> plan = rlx.plan_memory([
    ...     rlx.Interval("x", 16, 0, 1, dtype="f32", shape=(4,)),
    ...     rlx.Interval("y", 8, 1, 2, dtype="bf16", shape=(4,)),
    ... ])
    >>> with rlx.Arena(plan) as arena:
    ...     arena["x"] = np.arange(4, dtype=np.float32)
    ...     _ = arena.write_input_f32("y", "bf16", arena.view("x"))
    ...     arena.read("y").astype(np.float32)
    array([0., 1., 2., 3.], dtype=float32)
    """

    def __init__(
        self,
        plan: MemoryPlan,
        device: Device | str = "cpu",
        *,
        backend: str | None = None,
        name: str | None = None,
        debug: bool = False,
    ) -> None:
        require_plan(plan)
        self._lay(plan, Device(device), name, debug)
        margin = MARGIN if debug else 0
        self._memory: Memory | OwnedBytes | None
        self._memory, made = accounting.record(
            make_memory, self._plan, self._device, backend, self._label, margin=margin
        )
        self._register(made)
        self._inspect()

    def _register(self, made: Sequence[Allocation]) -> None:
        pool = Pool("arena", self._label, self._device)
        self._maker = register(
            self, "arena", self._label, pool, None, made, contents=Arena._contents
        )

    def _contents(self) -> Contents:
        """Say what is in the arena, for `memory_report`."""
        plan = self._plan
        specs = ((node, self._spec(node, None, None)) for node in plan.nodes)
        return Contents(
            plan.size,
            [Slot(str(node), shape, dt, plan.interval(node).size) for node, (dt, shape) in specs],
        )

    @classmethod
    def _over(cls, plan: MemoryPlan, native: Any, name: str | None) -> Arena:
        """Make an arena over memory of the host that is there, aligned as the plan asks."""
        self = object.__new__(cls)
        self._lay(plan, Device(), name, False)
        place = self._device
        self._memory = Memory(native, place.backend, place, None, self._label, plan, 0)
        self._register(())  # the memory is not the driver's
        self._inspect()
        return self

    def _lay(self, plan: MemoryPlan, device: Device, name: str | None, debug: bool) -> None:
        self._device = device
        self._label = f"arena {name!r}" if name else f"arena of {len(plan)} nodes on {device}"
        self._debug = debug
        self._generation = 0
        self._asked = plan  # without guards
        self._plan = guarded(plan) if debug else plan
        self._buffers: dict[Any, Buffer] = {}
        self._views: dict[Any, Callable[[], Any]] = {}

    def _inspect(self) -> None:
        self._inspector = None
        if self._debug and isinstance(self._memory, Memory):
            self._inspector = Inspector(self._plan, self._memory, self._label)

    # --- what there is -----------------------------------------------------------------------

    @property
    def plan(self) -> MemoryPlan:
        """The plan in effect; of a debug arena, with room for the guards."""
        return self._plan

    @property
    def device(self) -> Device:
        """Where the memory is."""
        return self._device

    @property
    def size_bytes(self) -> int:
        """Bytes of the arena, as planned."""
        return self._plan.size

    @property
    def address(self) -> int:
        """Address of offset 0; it changes only when `replan` needs more memory than there is."""
        return self._open().address

    @property
    def generation(self) -> int:
        """How often the arena was reset or planned anew."""
        return self._generation

    @property
    def is_debug(self) -> bool:
        """Whether the arena watches its guards and dead slots."""
        return self._debug

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._memory is None

    def byte_offset(self, node: Hashable) -> int | None:
        """Give where a node's slot begins, in bytes from the start; None without a slot."""
        return self._plan.offset(node) if node in self._plan else None

    def has_buffer(self, node: Hashable) -> bool:
        """Tell whether a node has a slot."""
        return node in self._plan

    def __contains__(self, node: object) -> bool:
        return node in self._plan

    def __len__(self) -> int:
        return len(self._plan)

    def __repr__(self) -> str:
        state = ", closed" if self.is_closed else ""
        return (
            f"<{self._label[0].upper()}{self._label[1:]}: {len(self._plan)} nodes, "
            f"{self.size_bytes:,} bytes, generation {self._generation}{state}>"
        )

    # --- slots -------------------------------------------------------------------------------

    def buffer(
        self, node: Hashable, dtype: Any = None, shape: int | tuple[int, ...] | None = None
    ) -> Buffer:
        """Give a node's slot as a Buffer.

        Parameters
        ----------
        node
            Of the plan.
        dtype, shape
            How to see the slot, from its start; left out, as the plan says: else as bytes, and as
            many elements as fit.

        Returns
        -------
        Buffer
            Copies: never. Blocks: no. Read-only: no. Aliases: the arena, and with it every node
            that reuses the bytes. The same object each time. After `reset` or `replan` it raises
            `StaleViewError`; it cannot be closed by itself.

        Raises
        ------
        UnboundNameError
            The node has no slot.
        ShapeError
            It does not fit in the slot.
        DTypeError
            No such dtype.
        ZeroCopyError
            Where the owner of the memory has no views (TPU): use `read` and `write`.
        ClosedHandleError, StaleViewError
            After `close`; in a debug arena, outside of the node's life.
        """
        self._open()
        if self._inspector is not None:
            self._inspector.visit(node)
        try:
            buffer = self._buffers.get((node, dtype, shape))
        except TypeError:  # a shape as a list
            buffer = None
        return self._slot(node, dtype, shape) if buffer is None else buffer

    def _slot(self, node: Hashable, dtype: Any, shape: Any) -> Buffer:
        while True:
            memory = self._open()
            with memory.lock:
                if memory is not self._memory:
                    continue  # another thread has reset the arena meanwhile
                dt, lengths = self._spec(node, dtype, shape)
                buffer = self._buffers.get((node, dt, lengths))
                if buffer is None:
                    buffer = memory.slot(self._plan.offset(node), dt, lengths)
                    self._buffers[node, dt, lengths] = buffer
                if dtype is None and shape is None:
                    self._buffers[node, None, None] = buffer
                return buffer

    def view(
        self, node: Hashable, dtype: Any = None, shape: int | tuple[int, ...] | None = None
    ) -> Any:
        """Give a node's slot as an array of the device's framework: NumPy, or torch on a GPU.

        Parameters and errors are those of `buffer`; other frameworks see the slot by
        ``arena.buffer(node).jax()``. Copies: never. Blocks: as `Buffer.numpy` and `Buffer.torch`
        do. Read-only: no. Aliases: the arena. The second call is a look-up. Existing code may
        write through it, as through the view of a handle. It does not notice a `reset`: ask anew.
        """
        if dtype is None and shape is None:
            try:
                give = self._views.get(node)
            except TypeError:  # no node can be what has no hash: `buffer` says so
                give = None
            if give is not None:
                return give()
        memory = self._open()
        buffer = self.buffer(node, dtype, shape)
        give = native_accessor(buffer)
        if dtype is None and shape is None and self._inspector is None:
            with memory.lock:
                if buffer is self._buffers.get((node, None, None)):  # no reset since
                    self._views[node] = give
        return give()

    def __getitem__(self, node: Hashable) -> Any:
        return self.view(node)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to pickle: an arena is memory."""
        raise DTypeError("an Arena is memory at an address and does not pickle or copy; save() it")

    # --- debug -------------------------------------------------------------------------------

    def advance(self, step: int) -> None:
        """Tell a debug arena which step of the program comes next; otherwise this does nothing.

        Slots whose life is over are filled with 0xff (not a number, in every float) and watched:
        whoever writes there is reported. From then on a node is accessible during its life only. A
        step before the last one begins a new run. Never waits for a scope: what one holds, of this
        thread or another, is filled at the first look after it has ended.

        Raises
        ------
        PlanError
            `step` is no integer. Nothing was changed.
        ArenaCorruptionError
            As for `check`.
        CaptureError
            In a debug arena, while a CUDA graph is captured. Nothing was changed.
        """
        self._open()
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            raise PlanError(
                f"{self._label} was to advance to step {name_of(step)}, a "
                f"{type(step).__qualname__}: give an integer, as in the intervals of its plan. "
                "Nothing was changed"
            )
        if self._inspector is not None:
            self._inspector.advance(int(step))

    def check(self) -> None:
        """Look, in a debug arena, whether anybody wrote where nobody was to write.

        Every copy by the arena does so too, and `advance`, `reset`, `replan` and `close`. Copies
        the arena to the host; blocks for updates in progress, and never for a scope: what is being
        written at that moment, and all while a CUDA graph is captured, is looked at the next time.

        Raises
        ------
        ArenaCorruptionError
            Guard bytes or a dead slot have changed: the text says where, whose slots lie beside
            it, and where they were last handed out. It is reported once.
        """
        self._open()
        self._look()

    def _look(self) -> None:
        if self._inspector is not None:
            self._inspector.check()

    # --- inside ------------------------------------------------------------------------------

    def _open(self) -> Memory | OwnedBytes:
        if self._memory is None:
            raise ClosedHandleError(f"{self._label} is closed: make a new one")
        return self._memory
