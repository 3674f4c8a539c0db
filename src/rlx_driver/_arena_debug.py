"""What a debug arena does more: guard bytes, poison, and finding out who wrote where."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver._arena_look import looking, overwriting, owners_of
from rlx_driver._races import here
from rlx_driver.errors import ArenaCorruptionError, CaptureError, StaleViewError
from rlx_driver.plan import MemoryPlan, plan_memory

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator

    from rlx_driver._arena_look import Run
    from rlx_driver._arena_memory import Memory
    from rlx_driver.access import Access

__all__ = ["MARGIN", "Inspector", "guarded"]

GUARD = 64
"""Bytes behind a slot that nobody may write."""
MARGIN = 256
"""Bytes before the first slot and behind the last that nobody may write."""

_LIVE, _DEAD, _GUARD = 0, 1, 2
_POISON, _CANARY = 0xFF, 0xA5
_SHOWN = 8

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def guarded(plan: MemoryPlan) -> MemoryPlan:
    """Lay a plan anew with guard bytes behind each slot that is not pinned."""
    intervals = [plan.interval(node) for node in plan.nodes]
    padded = [
        replace(interval, size=interval.size + GUARD) if _has_guard(interval) else interval
        for interval in intervals
    ]
    laid = plan_memory(padded, alignment=plan.alignment)
    return MemoryPlan.from_offsets(
        intervals,
        {interval.node: laid.offset(interval.node) for interval in intervals},
        alignment=plan.alignment,
    )


def _has_guard(interval: Any) -> bool:
    return interval.alias_of is None and interval.offset is None and interval.size > 0


class Inspector:
    """Knows of every byte of an arena who may write it, and looks whether somebody else did.

    It never waits for a scope: what is held meanwhile it looks at, or poisons, the next time.
    """

    def __init__(self, plan: MemoryPlan, memory: Memory, label: str) -> None:
        self._plan = plan
        self._memory = memory
        self._label = label
        self._lock = threading.RLock()  # held while trying for accesses, never while waiting
        self._step: int | None = None
        self._late: list[Run] = []  # not poisoned yet, so not watched either
        self._seen: dict[Hashable, str] = {}
        self._roots = [
            node
            for node in plan.nodes
            if plan.interval(node).alias_of is None and plan.interval(node).size
        ]
        self._map = self._owners(None)
        self._fill([(0, self._map.size)], frozenset())

    # --- what the program says

    def visit(self, node: Hashable) -> None:
        """Note an access to a node, and who makes it."""
        if node not in self._plan:
            return
        if self._step is not None:
            first, last = self._plan.life(node)
            if not first <= self._step <= last:
                raise StaleViewError(
                    f"{node!r} of {self._label} lives from step {first} to step {last}, and the "
                    f"program is at step {self._step}"
                )
        self._seen[self._plan.root(node)] = _caller()

    def advance(self, step: int) -> None:
        """Poison what is dead at a step, and watch it."""
        access = self._memory.whole()._access
        access.require_open()  # first: in a forked child nobody unlocks
        if access.is_recording():
            raise CaptureError(
                f"{self._label} is a debug arena and was to poison slots inside a capture, where "
                "the host copies nothing: capture the program in an arena without debug=True. "
                "Nothing was changed"
            )
        with self._lock:
            self.check()
            before, last = self._map, self._step
            self._map, self._step = self._owners(step), step
            changed = (self._map != _LIVE) & (self._map != before)
            for start, end in self._late:
                changed[start:end] |= self._map[start:end] != _LIVE
            if last is not None:  # before that, everything was anybody's and may hold an input
                for root in self._roots:
                    if self._lives(root, step) and not self._lives(root, last):
                        start = self._memory.margin + self._plan.offset(root)
                        changed[start : start + self._plan.interval(root).size] = True
            self._late = []
            self._fill(list(_runs(changed)), frozenset())

    def check(self, held: Collection[Access] = ()) -> None:
        """Raise when a byte has changed that nobody was to write; put it right again.

        Parameters
        ----------
        held
            Accesses that the caller has for writing.
        """
        self._memory.whole()._access.require_open()  # first, as in `advance`
        held = frozenset(held)
        with self._lock:
            self._catch_up(held)
            runs = self._changed(held)
            if not runs:
                return
            lines = [f"  {self._told(start, end)}" for start, end in runs[:_SHOWN]]
            if len(runs) > _SHOWN:
                lines.append(f"  and {len(runs) - _SHOWN} more places")
            when = "" if self._step is None else f" (step {self._step})"
            self._fill(runs, held)
        raise ArenaCorruptionError(
            f"{self._label} was written where nobody was to write{when}:\n" + "\n".join(lines)
        )

    # --- inside

    def _changed(self, held: Collection[Access]) -> list[Run]:
        """Look; give the stretches of bytes that somebody wrote and nobody was to write."""
        whole = self._memory.whole()
        with looking(self._memory, held) as busy:
            if busy is None:
                return []
            found = self._memory.backend.copy_out(whole._native)
        wrong = (self._map != _LIVE) & (found != self._quiet())
        for start, end in (*busy, *self._late):
            wrong[start:end] = False
        return list(_runs(wrong)) if wrong.any() else []

    def _catch_up(self, held: Collection[Access]) -> None:
        """Poison what was held at its time and is free by now, unless it lives again."""
        if not self._late or self._memory.whole()._access.is_recording():
            return
        dead = np.zeros(self._map.size, bool)
        for start, end in self._late:
            dead[start:end] = self._map[start:end] != _LIVE
        self._late = []
        self._fill(list(_runs(dead)), held)

    def _quiet(self) -> Bytes:
        """Give the bytes of an arena that nobody has written since it was filled."""
        return np.where(self._map == _GUARD, np.uint8(_CANARY), np.uint8(_POISON))

    def _owners(self, step: int | None) -> Bytes:
        """Say of each byte, margins included, whose it is at a step; None: at any step."""
        plan, margin = self._plan, self._memory.margin
        whose = np.full(plan.size + 2 * margin, _DEAD, np.uint8)
        whose[:margin] = whose[plan.size + margin :] = _GUARD
        alive = [root for root in self._roots if step is None or self._lives(root, step)]
        for root in alive:
            if _has_guard(plan.interval(root)):
                end = margin + plan.offset(root) + plan.interval(root).size
                whose[end : end + GUARD] = _GUARD
        for root in alive:
            start = margin + plan.offset(root)
            whose[start : start + plan.interval(root).size] = _LIVE
        return whose

    def _lives(self, root: Hashable, step: int) -> bool:
        first, last = self._plan.life(root)
        return first <= step <= last

    def _fill(self, runs: list[Run], held: Collection[Access]) -> None:
        """Make bytes what they are while nobody writes them; those that are held come late.

        It goes behind the back of the live slots, whose JAX arrays stay alive and whose tensors
        stay as good for autograd.
        """
        if not runs:
            return
        memory, values = self._memory, self._quiet()
        backend, native = memory.backend, memory.whole()._native
        rest = owners_of(memory, runs)
        try:
            for access, parts in list(rest.items()):
                with overwriting(memory, access, parts, held) as is_free:
                    if is_free:
                        for start, end in parts:
                            target = backend.index(native, slice(start, end))
                            backend.copy_in(target, values[start:end])
                        del rest[access]
        finally:
            self._late += [run for parts in rest.values() for run in parts]

    def _told(self, start: int, end: int) -> str:
        """Say whose bytes were written, and who may have done it."""
        margin = self._memory.margin
        low, high = start - margin, end - margin
        where = f"bytes {low:,} to {high:,}: "
        if self._map[start] == _GUARD:
            before = max(
                (root for root in self._roots if self._end(root) <= low),
                key=self._end,
                default=None,
            )
            after = min(
                (root for root in self._roots if self._plan.offset(root) >= high),
                key=self._plan.offset,
                default=None,
            )
            text = "guard bytes"
            if before is not None:
                text += f" behind {self._name(before)}"
            if after is not None:
                text += f"{', and' if before is not None else ''} before {self._name(after)}"
            return where + text
        dead = [
            root
            for root in self._roots
            if self._plan.offset(root) < high
            and low < self._end(root)
            and (self._step is None or self._plan.life(root)[1] < self._step)
        ]
        if not dead:
            return where + "memory of no node that has begun to live"
        last = max(dead, key=lambda root: self._plan.life(root)[1])
        return where + (f"{self._name(last)}, whose life ended at step {self._plan.life(last)[1]}")

    def _end(self, root: Hashable) -> int:
        return self._plan.offset(root) + self._plan.interval(root).size

    def _name(self, root: Hashable) -> str:
        seen = self._seen.get(root)
        return f"{root!r} (last handed out at {seen})" if seen else f"{root!r} (never handed out)"


def _caller() -> str:
    """Give the line of the program that called the driver."""
    stack = here("").stack
    return f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "an unknown place"


def _runs(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> Iterator[tuple[int, int]]:
    """Give the stretches where a mask is set, ends excluded."""
    outside = np.zeros(1, np.int8)  # of one byte too, for the mask is as long as the arena
    edges = np.flatnonzero(np.diff(np.concatenate((outside, mask.view(np.int8), outside))))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
