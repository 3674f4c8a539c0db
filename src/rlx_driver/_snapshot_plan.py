"""A plan as text, and back: columns of JSON, every value checked."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

from rlx_driver import dtypes
from rlx_driver._arena_memory import widest_alignment
from rlx_driver.errors import DriverError, SnapshotError
from rlx_driver.interval import Interval
from rlx_driver.plan import MemoryPlan

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["decode_plan", "encode_plan"]

_WIDEST = 1 << 30
"""Alignments above are refused: memory is allocated for them, and a file can say anything."""


def encode_plan(plan: MemoryPlan) -> str:
    """Write a plan as JSON, in ASCII.

    Raises
    ------
    SnapshotError
        A node is something that JSON cannot say faithfully. It names the node.
    """
    if (widest := widest_alignment(plan)) > _WIDEST:
        raise SnapshotError(
            f"the plan aligns to {widest:,} bytes, and a snapshot to {_WIDEST:,} at most. Nothing "
            "was written"
        )
    intervals = [plan.interval(node) for node in plan.nodes]
    columns = {
        "alignment": plan.alignment,
        "nodes": [_say(node) for node in plan.nodes],
        "sizes": plan.sizes.tolist(),
        "firsts": plan.firsts.tolist(),
        "lasts": plan.lasts.tolist(),
        "offsets": plan.offsets.tolist(),
        "dtypes": [_say_dtype(each.dtype) for each in intervals],
        "shapes": [_numbers(each.shape) for each in intervals],
        "aliases": [_say(each.alias_of) for each in intervals],
        "alias_offsets": [int(each.alias_offset) for each in intervals],
        "pins": [_number(each.offset) for each in intervals],
        "alignments": [_number(each.alignment) for each in intervals],
        "kinds": [each.kind for each in intervals],
    }
    return json.dumps(columns, separators=(",", ":"), allow_nan=False)


def decode_plan(text: str) -> MemoryPlan:
    """Read a plan from JSON that anybody may have written.

    Raises
    ------
    SnapshotError
        It says no plan, or one that makes no sense. Nothing was allocated.
    """
    try:
        said = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _bad(f"it is no JSON ({type(error).__name__}: {str(error)[:100]})") from error
    columns = _columns(said)
    nodes = [_hear(node) for node in columns["nodes"]]
    aliases = [_hear(node) for node in columns["aliases"]]
    intervals = [
        Interval(
            node,
            _whole(size),
            _whole(first),
            _whole(last),
            dtype=_hear_dtype(dtype),
            shape=_shape(shape),
            alias_of=alias,
            alias_offset=_whole(alias_offset),
            offset=_whole_or_none(pin),
            alignment=_whole_or_none(alignment),
            kind=_kind(kind),
        )
        for node, alias, (size, first, last, dtype, shape, alias_offset, pin, alignment, kind) in (
            zip(
                nodes,
                aliases,
                zip(*(columns[name] for name in _PLAIN), strict=True),
                strict=True,
            )
        )
    ]
    try:
        # A row twice is found by from_offsets, which sees the intervals first.
        offsets = dict(zip(nodes, map(_whole, columns["offsets"]), strict=True))
        plan = MemoryPlan.from_offsets(intervals, offsets, alignment=_whole(said["alignment"]))
        if (widest := widest_alignment(plan)) > _WIDEST:
            raise _bad(f"it aligns to {widest:,} bytes")
    except SnapshotError:
        raise
    except DriverError as error:
        raise _bad(str(error)) from error
    return plan


_PLAIN = (
    "sizes",
    "firsts",
    "lasts",
    "dtypes",
    "shapes",
    "alias_offsets",
    "pins",
    "alignments",
    "kinds",
)
_COLUMNS = (*_PLAIN, "nodes", "aliases", "offsets")


def _bad(why: str) -> SnapshotError:
    return SnapshotError(f"the plan in it is unusable: {why[:500]}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _columns(said: Any) -> dict[str, list[Any]]:
    if not isinstance(said, dict) or "alignment" not in said:
        raise _bad("it has no columns")
    for name in _COLUMNS:
        if not isinstance(said.get(name), list):
            raise _bad(f"it has no column {name!r}")
    for name in _COLUMNS:
        if len(said[name]) != len(said["nodes"]):
            raise _bad(f"column {name!r} is not as long as the one of the nodes")
    return said


# --- nodes: JSON says some as they are, the others as {"float": ...} and lists -------------------


_DEEPEST = 50
"""Levels of tuples in a node; an error may have to print it."""


def _say(node: Any, level: int = 0) -> Any:
    kind = type(node)
    if node is None or kind is bool or kind is str:
        return node
    if kind is int and -_LONGEST < node < _LONGEST:
        return node
    if kind is float:
        return node if math.isfinite(node) else {"float": str(node)}
    if kind is tuple:
        if level == _DEEPEST:
            raise SnapshotError(
                f"a node has tuples in tuples, more than {_DEEPEST} levels of them, which is more "
                "than a snapshot takes. Nothing was written"
            )
        return [_say(each, level + 1) for each in node]
    shown = "of over 1,000 digits" if kind is int else repr(node)[:100]
    raise SnapshotError(
        f"node {shown} ({kind.__qualname__}) cannot be saved: nodes of a snapshot are str, int, "
        "float, bool, None and tuples of these. Nothing was written"
    )


_LONGEST = 10**1000  # Python reads longer numbers only on demand


def _hear(said: Any, level: int = 0) -> Hashable:
    if isinstance(said, list):
        if level == _DEEPEST:
            raise _bad(f"a node has more than {_DEEPEST} levels of tuples")
        return tuple([_hear(each, level + 1) for each in said])
    if isinstance(said, dict):
        if list(said) != ["float"] or said["float"] not in ("nan", "inf", "-inf"):
            raise _bad(f"{str(said)[:100]} is no node")
        return float(said["float"])
    return said  # type: ignore[no-any-return]


# --- the rest ------------------------------------------------------------------------------------


def _say_dtype(dtype: Any) -> Any:
    """Give a name as it was given, and a dtype by its name in a list."""
    if dtype is None or type(dtype) is str:
        return dtype
    return [dtypes.info(dtype).name]


def _hear_dtype(said: Any) -> Any:
    if said is None:
        return None
    inner = said[0] if isinstance(said, list) and len(said) == 1 else said
    if not isinstance(inner, str):
        raise _bad(f"{str(said)[:100]} is no dtype")
    try:
        known = dtypes.dtype(inner)
    except DriverError as error:
        raise _bad(str(error)) from error
    return known if isinstance(said, list) else said


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


def _numbers(values: Any) -> list[int] | None:
    return None if values is None else [int(value) for value in values]


def _whole(said: Any) -> int:
    if type(said) is not int:
        raise _bad(f"{str(said)[:100]!r} stands where a whole number belongs")
    return said


def _whole_or_none(said: Any) -> int | None:
    return None if said is None else _whole(said)


def _shape(said: Any) -> tuple[int, ...] | None:
    if said is None:
        return None
    if not isinstance(said, list):
        raise _bad(f"{str(said)[:100]!r} is no shape")
    shape = tuple([_whole(each) for each in said])
    if len(shape) > 64 or math.prod(n for n in shape if n) >= 2**59:  # what NumPy can index
        raise _bad(f"a shape has {len(shape)} axes, or more elements than an array can have")
    return shape


def _kind(said: Any) -> Any:
    if not isinstance(said, str):
        raise _bad(f"{str(said)[:100]!r} is no kind of node")
    return said
