"""Exchange of arrays between frameworks, under one copy contract that is verified.

The frameworks' own importers copy without a word, narrow, drop flags, or abort (see the docs page
"Exchange"), so nothing is taken from them on trust: what can go wrong is found before the import,
and after it address, dtype, shape and strides are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from rlx_driver._ledger import ledger
from rlx_driver._sharing import (
    facts_of,
    name_of,
    obstacle_to,
    resolve,
    share_verified,
    title_of,
    verify,
)
from rlx_driver.backends.base import ArrayFacts, Backend, FunctionalBackend, Obstacle
from rlx_driver.errors import ZeroCopyError
from rlx_driver.registry import registry

__all__ = ["Explanation", "exchange", "explain"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an exchange would do; its ``str()`` is a sentence.

    Attributes
    ----------
    target
        Name of the framework asked for.
    shares
        Whether the result would share the array's memory.
    obstacle
        Why not, or None.
    byte_size
        Bytes that a copy would move.
    found
        What the array is.
    order
        For a Buffer, how its accesses by several frameworks are ordered; else empty.
    """

    target: str
    shares: bool
    obstacle: Obstacle | None
    byte_size: int
    found: str
    order: str = ""

    @property
    def reason(self) -> str | None:
        """One word for the obstacle, such as ``"alignment"``; None when memory is shared."""
        return None if self.obstacle is None else self.obstacle.kind

    @property
    def can_copy(self) -> bool:
        """Whether ``copy=None`` would give a copy instead of an error."""
        return self.obstacle is None or self.obstacle.copyable

    def __bool__(self) -> bool:
        return self.shares

    def __str__(self) -> str:
        if self.obstacle is None:
            order = f"; {self.order}" if self.order else ""
            return f"{self.found} to {self.target}: shares its memory{order}"
        effect = (
            f"would be copied ({self.byte_size:,} bytes)"
            if self.obstacle.copyable
            else "is refused, with a copy or without"
        )
        return f"{self.found} to {self.target}: {effect}, because {self.obstacle}"


def exchange(x: Any, framework: str | ModuleType, *, copy: bool | None = None) -> Any:
    """Give an array as an array of another framework.

    Parameters
    ----------
    x
        An array of NumPy, torch or JAX, a `Buffer`, or any object with ``__dlpack__``.
    framework
        ``"numpy"``, ``"torch"``, ``"jax"``, the name of a registered backend, or a module that
        has ``from_dlpack``.
    copy
        False: share memory or raise. None: share where it can, else copy and note the reason in
        the ledger. True: always copy. No value of `copy` ever changes a value.

    Returns
    -------
    array
        Of the framework asked for, of the same shape and dtype, on the same device (NumPy: on the
        host). Copies: as `copy` says. Blocks: JAX arrays on the host are waited for. Read-only:
        from JAX to NumPy; JAX memory seen through torch must not be written either, which torch
        cannot express. Aliases: the memory of `x` when it is shared, which stays alive.

    Raises
    ------
    ZeroCopyError
        ``copy=False`` and memory cannot be shared; a copy inside `no_copies`; or, for every
        `copy`, an exchange that would change values (x64 off), dtype or gradients.
    UnknownFrameworkError
        No such framework, or `x` is no array.
    DeviceUnavailableError
        The framework's package is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> import rlx_driver as rlx
    >>> a = np.arange(3.0)
    >>> t = rlx.exchange(a, "numpy", copy=False)
    >>> t is a
    True
    """
    if copy is not True:
        try:
            lane = registry.lanes.get((type(x), framework))
            shared = None if lane is None else lane(x)
        except Exception:  # whatever is wrong with it, the general way finds out and explains
            shared = None
        if shared is not None:
            ledger.count_exchange()
            return shared
    target = resolve(framework)
    source = registry.for_array(x)
    if source is not None and isinstance(target, Backend):
        if source is target and copy is not True:
            return x
        lane = target.lane_from(source.name) or source.lane_to(target.name)
        if lane is not None:
            registry.lanes[type(x), framework] = lane
    result = _exchange(x, source, target, copy)
    ledger.count_exchange()
    return result


def explain(x: Any, framework: str | ModuleType) -> Explanation:
    """Say whether `exchange` would share memory, and if not why, without doing it.

    Parameters
    ----------
    x, framework
        As for `exchange`.

    Returns
    -------
    Explanation
        True in a condition when memory would be shared; ``str()`` tells why not and what to do.

    Raises
    ------
    UnknownFrameworkError
        No such framework, or `x` is no array.
    """
    target = resolve(framework)
    source = registry.for_array(x)
    describe = getattr(x, "__rlx_facts__", None)
    if describe is not None:
        facts = describe()
        obstacle = _obstacle_of_buffer(x, target)
    else:
        facts = facts_of(x)
        obstacle = None if source is target else obstacle_to(facts, target)
    kind = type(x).__name__ if source is None else f"{source.name} array"
    found = f"{facts.dtype.name} {kind} of shape {facts.shape} on {facts.device}"
    if facts.obstacle is not None:
        found = f"{kind} of shape {facts.shape}"
    access = getattr(x, "_access", None) if describe is not None else None
    order = "" if access is None else f"order: {access.order.explain()}"
    return Explanation(name_of(target), obstacle is None, obstacle, facts.byte_size, found, order)


def _exchange(
    x: Any, source: Backend | None, target: Backend | ModuleType, copy: bool | None
) -> Any:
    if source is None and (tracked := getattr(x, "__rlx_array__", None)) is not None:
        obstacle = _obstacle_of_buffer(x, target)
        if obstacle is not None and (copy is False or not obstacle.copyable):
            raise ZeroCopyError(f"{x!r} cannot be given to {name_of(target)}: {obstacle}")
        if copy is not True and obstacle is None:
            return tracked(target if isinstance(target, ModuleType) else target.name)
        # A copy is made of the native view, which is ordered after everything before.
        source = x.device.backend
        x = tracked(source.name)
        copy = True if copy is True or obstacle is None else None
    facts = facts_of(x)
    if source is None and facts.obstacle is None and facts.device.is_host:
        # Old exporters, and read-only ones, are beyond some importers; NumPy's view is not.
        source = registry.get("numpy")
        host = source.share(x, facts)
        verify(host, facts, source.facts(host), may_copy=copy is not False)
        if source is target and copy is not True:
            return host
        x, facts = host, source.facts(host)
    obstacle = facts.obstacle if source is target else obstacle_to(facts, target)
    if obstacle is not None and (copy is False or not obstacle.copyable):
        raise ZeroCopyError(
            f"{title_of(x, facts)} cannot be given to {name_of(target)}"
            f"{' without a copy' if obstacle.copyable else ''}: {obstacle}"
        )
    if copy is True:
        ledger.will_copy(facts.byte_size, "copy=True was asked for")
    elif obstacle is not None:
        reason = f"{obstacle.kind} (to {name_of(target)})"
        ledger.will_copy(facts.byte_size, reason, str(obstacle))
    else:
        return share_verified(x, facts, target, may_copy=copy is None)
    fresh = _copied(x, source, facts, target)
    fresh_source = registry.for_array(fresh)
    if fresh_source is target or fresh_source is None:
        return fresh
    return share_verified(fresh, fresh_source.facts(fresh), target, may_copy=True)


def _obstacle_of_buffer(buffer: Any, target: Backend | ModuleType) -> Obstacle | None:
    facts: ArrayFacts = buffer.__rlx_facts__()
    if isinstance(target, FunctionalBackend):
        # Memory that the framework owns is no lease of anybody's.
        return None if target is buffer.device.backend else target.lease_obstacle(facts)
    return None if target is buffer.device.backend else obstacle_to(facts, target)


def _copied(x: Any, source: Backend | None, facts: ArrayFacts, target: Backend | ModuleType) -> Any:
    """Copy an array once, to memory that the target can share."""
    if source is None:
        native = facts.device.backend
        return native.duplicate(share_verified(x, facts, native))
    if source is not target and (facts.device.is_host or getattr(target, "name", "") == "numpy"):
        return source.copy_out(x)
    return source.duplicate(x)
