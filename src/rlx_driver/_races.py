"""What the race checker finds, with the places in the program that belong to it."""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

__all__ = ["Place", "Race", "elsewhere", "here", "raised", "text_of", "user_depth"]

_PACKAGE = str(Path(__file__).parent) + os.sep
_DEPTH = 8
"""Frames that are remembered of a stack, the innermost ones."""

_WHAT = {
    "changed under a view": (
        "bytes of {label} changed while a view of {frameworks[0]} was live, and no write of the "
        "driver changed them"
    ),
    "stale view": "a view of {frameworks[0]} of {label} was used after it went stale",
    "not committed": (
        "a view of {frameworks[0]} of {label} was donated by the program, and the result was never "
        "committed"
    ),
}
_REMEDY = {
    "changed under a view": (
        "write inside write(...) or update(...), which wait for readers, or let the view go first"
    ),
    "stale view": "take a new view after every write",
    "not committed": "give the result to rlx_driver.commit(...) or copy_from(...)",
}


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Something that happened in the program, and the stack at which it did.

    Attributes
    ----------
    what
        In words.
    stack
        The frames of the program, the innermost last; those of the driver are left out.
    """

    what: str
    stack: traceback.StackSummary

    def __str__(self) -> str:
        lines = "".join(self.stack.format()).splitlines()
        return "\n".join([f"  {self.what}{':' if lines else ''}", *(f"  {line}" for line in lines)])


@dataclass(frozen=True, slots=True, eq=False)
class Race:
    """An access that went round the driver; its ``str()`` has all stacks.

    Attributes
    ----------
    label
        The handle or buffer.
    kind
        ``"changed under a view"``, ``"stale view"`` or ``"not committed"``.
    frameworks
        That of the view first, then those through which the bytes may have been written.
    handed_out_at
        Where the view was handed out.
    changed_by
        What may have changed the bytes: mutable views handed out, or the write by the driver that
        made the view stale.
    noticed_at
        Where the checker noticed, or where a stale view was used.
    """

    label: str
    kind: str
    frameworks: tuple[str, ...]
    handed_out_at: Place
    changed_by: tuple[Place, ...]
    noticed_at: Place

    def __str__(self) -> str:
        what = _WHAT[self.kind].format(label=self.label, frameworks=self.frameworks)
        places = [self.handed_out_at, *self.changed_by, self.noticed_at]
        return "\n".join([f"{what}; {_REMEDY[self.kind]}", *map(str, places)])


def text_of(races: Sequence[Race]) -> str:
    """Give all in one text, equal ones once."""
    counted = Counter(map(str, races))
    count = "one race" if len(races) == 1 else f"{len(races)} races"
    parts = [text if n == 1 else f"({n} times) {text}" for text, n in counted.items()]
    return "\n\n".join([f"{count} found", *parts])


def here(what: str) -> Place:
    """Remember the stack of the program, without our own frames; source lines are read later."""
    frames = traceback.walk_stack(sys._getframe(1))
    users = (each for each in frames if not _is_ours(each[0]))
    return _place(what, list(itertools.islice(users, _DEPTH))[::-1])


def raised(what: str, error: BaseException, packages: Sequence[str]) -> Place:
    """Remember where the program called what raised an error: up to the frames of a package."""
    frames = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in packages:
            break
        frames.append((frame, line))
    return _place(what, [each for each in frames if not _is_ours(each[0])][-_DEPTH:])


def _place(what: str, frames: Sequence[tuple[FrameType, int]]) -> Place:
    summaries = [
        traceback.FrameSummary(code.co_filename, line, code.co_name, lookup_line=False)
        for frame, line in frames
        for code in [frame.f_code]
    ]
    return Place(what, traceback.StackSummary.from_list(summaries))


def elsewhere(what: str) -> Place:
    """Say something of which no stack is known."""
    return Place(what, traceback.StackSummary())


def user_depth() -> int:
    """Count the frames from the caller to the first that is not ours, for a warning."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame):
        depth, frame = depth + 1, frame.f_back
    return depth


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_PACKAGE)
