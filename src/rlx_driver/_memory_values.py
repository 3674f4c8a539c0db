"""What `memory_report` gives: plain values, and their text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx_driver.device import Device

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DeviceMemory", "MemoryEntry", "MemoryReport", "RegionMemory"]

_SHOWN = 20
"""Entries of one region that the text has, the largest ones."""


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """One handle, Buffer or slot, or memory that views still hold after the end of those.

    Attributes
    ----------
    name
        The handle's or node's name; ``"Buffer"``; several names where memory is common to them.
    shape, dtype
        As it was made; None for memory that is common to several.
    byte_size
        Bytes of the elements.
    reserved
        Bytes of the driver's allocations behind it, padding between handles included; 0 before the
        first use of a handle and for memory of others.
    state
        ``"open"``; ``"not allocated"``: a handle before its first use; ``"shared"``: a Buffer on
        memory of somebody else; ``"held by a view"``: closed or collected, but a view outside still
        holds its memory; ``"slot"``: a node of an arena, whose bytes others may take turns in;
        ``"lost"``, ``"forked"``: see `StaleViewError` and `UpdateFailedError`.
    created
        ``"file:line in function"`` of the program, or None when it was not traced.
    stack
        The same with its callers, the innermost last.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: np.dtype[Any] | None
    byte_size: int
    reserved: int
    state: str
    created: str | None = None
    stack: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RegionMemory:
    """Memory of one region or arena, or of all Buffers of a device.

    Attributes
    ----------
    label
        Of the region or arena; ``"buffers"``; ``"handles"`` for those without a region; ``"other"``
        for allocations of which nobody said what they are for.
    kind
        ``"region"``, ``"arena"``, ``"buffers"``, ``"handles"`` or ``"other"``.
    reserved
        Bytes allocated and alive.
    in_use
        Those that belong to what is open.
    peak
        The most that was reserved at a time; None for ``"other"``.
    entries
        What is in it.
    created
        Where the region or arena was made, or None.
    """

    label: str
    kind: str
    reserved: int
    in_use: int
    peak: int | None
    entries: tuple[MemoryEntry, ...]
    created: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of the driver on one device.

    Attributes
    ----------
    device
        Which.
    reserved
        Bytes allocated and alive; the same as ``device.memory().in_use``.
    in_use
        Those that belong to Buffers, handles and arenas that are open.
    peak
        The most that was reserved at a time, since the start or `reset_peak_memory`.
    allocations
        How many there were since the start.
    regions
        The same by region.
    """

    device: Device
    reserved: int
    in_use: int
    peak: int
    allocations: int
    regions: tuple[RegionMemory, ...]


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Memory of the driver at one moment; ``str()`` is a table, `as_dict` is for JSON.

    Attributes
    ----------
    devices
        Every device that the driver ever had memory on, the host first.
    """

    devices: tuple[DeviceMemory, ...]

    def __getitem__(self, device: Device | str) -> DeviceMemory:
        """Give the part of one device; all zeros when there is nothing."""
        place = Device(device)
        for found in self.devices:
            if found.device == place:
                return found
        return DeviceMemory(place, 0, 0, 0, 0, ())

    @property
    def entries(self) -> tuple[MemoryEntry, ...]:
        """The entries of all devices and regions."""
        regions = (region for device in self.devices for region in device.regions)
        return tuple(entry for region in regions for entry in region.entries)

    def find(self, name: str) -> tuple[MemoryEntry, ...]:
        """Give the entries of a name."""
        return tuple(entry for entry in self.entries if entry.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Give the same as dicts, lists, strings and integers."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def __str__(self) -> str:
        lines = [line for device in self.devices for line in _text(device)]
        return "\n".join(lines or ["the driver has allocated nothing"])


# --- text ----------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Device):
        return str(value)
    return value.name if isinstance(value, np.dtype) else value


def _text(memory: DeviceMemory) -> Iterator[str]:
    count = memory.allocations
    yield (
        f"{memory.device}: {memory.reserved:,} bytes reserved, {memory.in_use:,} in use, peak "
        f"{memory.peak:,}, {count:,} allocation{'' if count == 1 else 's'}"
    )
    for region in memory.regions:
        peak = "" if region.peak is None else f", peak {region.peak:,}"
        made = "" if region.created is None else f", made at {region.created}"
        yield (
            f"  {region.label}: {region.reserved:,} bytes reserved, {region.in_use:,} in "
            f"use{peak}{made}"
        )
        largest = sorted(region.entries, key=lambda entry: -max(entry.reserved, entry.byte_size))
        rows = [_row(entry) for entry in largest[:_SHOWN]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, what, nbytes, state, created in rows:
            cells = (
                name.ljust(widths[0]),
                what.ljust(widths[1]),
                nbytes.rjust(widths[2]),
                state.ljust(widths[3]),
                created,
            )
            yield "    " + "  ".join(cells).rstrip()
        if len(largest) > _SHOWN:
            rest = sum(entry.byte_size for entry in largest[_SHOWN:])
            yield f"    and {len(largest) - _SHOWN:,} more, {rest:,} bytes"


def _row(entry: MemoryEntry) -> tuple[str, ...]:
    what = "" if entry.dtype is None else f"{entry.dtype.name}{list(entry.shape or ())}"
    return entry.name, what, f"{entry.byte_size:,}", entry.state, entry.created or ""
