"""`memory_report`: what the driver holds on each device, in which region, under which name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlx_driver._memory import Maker, common_pool, common_pools, is_open, makers
from rlx_driver._memory_values import DeviceMemory, MemoryEntry, MemoryReport, RegionMemory
from rlx_driver.backends.accounting import Allocation, Count, Pool, accounting
from rlx_driver.backends.base import ALIGNMENT
from rlx_driver.device import Device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlx_driver._races import Place

__all__ = ["memory_report", "reset_peak_memory"]

_ORDER = {"region": 0, "handles": 1, "arena": 2, "buffers": 3, "other": 4}


def memory_report(device: Device | str | None = None) -> MemoryReport:
    """Tell which memory the driver holds: bytes by device, region and name, and their peak.

    Parameters
    ----------
    device
        Leave out all others.

    Returns
    -------
    MemoryReport
        Copies: no array memory. Blocks: no. Handles and Buffers that were never closed are in it
        as long as somebody refers to them. Bytes that frameworks allocate by themselves are not,
        and what a backend does not report to the driver counts as not reserved.

    Notes
    -----
    Slices and views are not listed: they are memory of their base. What has been dropped, but not
    yet found by the garbage collector, still counts as open.

    Examples
    --------
    >>> import rlx_driver as rlx
    >>> with rlx.HandleRegion("cpu") as region:
    ...     made = region.create({"w": ((4, 4), "f32"), "m": ((4, 4), "bf16")})
    ...     (entry,) = rlx.memory_report("cpu").find("m")
    >>> entry.byte_size, entry.reserved, entry.state
    (32, 256, 'open')
    """
    place = None if device is None else Device(device)
    counts = accounting.counts()
    parts: dict[Pool, tuple[list[Maker], list[Allocation]]] = {}
    for maker in makers():
        parts.setdefault(maker.pool, ([], []))[0].append(maker)
    for allocation in accounting.live():
        pool = allocation.pool or common_pool("other", allocation.device)
        parts.setdefault(pool, ([], []))[1].append(allocation)
    found: dict[Device, list[RegionMemory]] = {each: [] for each in counts}
    for pool, (its_makers, allocations) in parts.items():
        if place in (None, pool.device):
            part = _region(pool, its_makers, allocations)
            if part is not None:
                found.setdefault(pool.device, []).append(part)
    devices = []
    for each, regions in found.items():
        if place in (None, each):
            count = counts.get(each, Count())
            in_use = sum(region.in_use for region in regions)
            regions.sort(key=lambda region: _ORDER[region.kind])
            devices.append(
                DeviceMemory(
                    each, count.current, in_use, count.peak, count.allocations, tuple(regions)
                )
            )
    devices.sort(key=lambda memory: (not memory.device.is_host, str(memory.device)))
    return MemoryReport(tuple(devices))


def reset_peak_memory(device: Device | str | None = None) -> None:
    """Let the peaks of `memory_report` begin anew, at what is reserved now.

    Parameters
    ----------
    device
        Only those of this device and its regions.
    """
    place = None if device is None else Device(device)
    pools = {*common_pools(), *(maker.pool for maker in makers())}
    pools |= {each.pool for each in accounting.live() if each.pool is not None}
    accounting.reset_peaks(place, [pool for pool in pools if place in (None, pool.device)])


# --- putting it together -------------------------------------------------------------------------


def _region(
    pool: Pool, its_makers: Sequence[Maker], allocations: Sequence[Allocation]
) -> RegionMemory | None:
    """Describe what is in a pool; None when there is nothing to tell."""
    backing: dict[int, int] = {}  # by serial number: weak references compare by what they refer to
    entries: list[MemoryEntry] = []
    nowhere = 0  # allocated, and nobody has claimed it
    for allocation in allocations:
        alive = [maker for maker in allocation.makers if is_open(maker())]
        for maker in alive:
            share = _share(maker, allocation)
            backing[maker.serial] = backing.get(maker.serial, 0) + share
        if allocation.makers and not alive:
            entries.append(_held(allocation))
        nowhere += not allocation.makers
    in_use, created, is_there = 0, None, False
    for maker in its_makers:
        obj = maker()
        if obj is None or not is_open(obj):
            continue
        is_there = True
        if maker.kind == "region":
            created = _innermost(maker.place)
        elif maker.kind == "arena":
            created = _innermost(maker.place)
            its_bytes, slots = maker.contents(obj) if maker.contents else (obj.size_bytes, ())
            in_use += its_bytes
            entries += [MemoryEntry(*slot, slot.byte_size, "slot") for slot in slots]
        else:
            entry = _entry(maker, obj, backing.get(maker.serial, 0))
            entries.append(entry)
            in_use += entry.byte_size if entry.state == "open" else 0
    if not (is_there or allocations):
        return None
    if nowhere:
        rest = sum(each.nbytes for each in allocations if not each.makers)
        text = "one allocation" if nowhere == 1 else f"{nowhere} allocations"
        entries.append(MemoryEntry(text, None, None, rest, rest, "open"))
    reserved = sum(each.nbytes for each in allocations)
    peak = None if pool.kind == "other" else max(pool.counter.peak, reserved)
    return RegionMemory(pool.label, pool.kind, reserved, in_use, peak, tuple(entries), created)


def _share(maker: Maker, allocation: Allocation) -> int:
    """Give what a maker has of an allocation."""
    if len(allocation.makers) == 1 or maker.facts is None:
        return allocation.nbytes
    return -(-maker.facts.byte_size // ALIGNMENT) * ALIGNMENT


def _held(allocation: Allocation) -> MemoryEntry:
    """Describe memory that has outlived what it was made for."""
    first: Maker = allocation.makers[0]
    name = ", ".join(maker.name for maker in allocation.makers)
    facts = first.facts if len(allocation.makers) == 1 else None
    return MemoryEntry(
        name,
        None if facts is None else facts.shape,
        None if facts is None else facts.dtype,
        allocation.nbytes if facts is None else facts.byte_size,
        allocation.nbytes,
        "held by a view",
        _innermost(first.place),
        _stack(first.place),
    )


def _entry(maker: Maker, obj: Any, reserved: int) -> MemoryEntry:
    state = obj._access.state
    if state == "open" and maker.shared:
        state = "shared"
    elif state == "open" and not getattr(obj, "is_allocated", True):
        state = "not allocated"
    return MemoryEntry(
        maker.name,
        obj.shape,
        obj.dtype,
        obj.byte_size,
        reserved,
        state,
        _innermost(maker.place),
        _stack(maker.place),
    )


def _stack(place: Place | None) -> tuple[str, ...]:
    frames = () if place is None else place.stack
    return tuple(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)


def _innermost(place: Place | None) -> str | None:
    return None if place is None else (_stack(place) or ("unknown",))[-1]
