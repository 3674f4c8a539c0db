"""Helpers of the tests of arenas: a plan in which everything occurs, and how to see raw bytes."""

import numpy as np

import rlx_driver as rlx
from rlx_driver import Interval


def small_plan(**options):
    """A constant, two nodes that live together, one that reuses their bytes, and an alias."""
    return rlx.plan_memory(
        [
            Interval("w", 256, 0, 9, dtype="f32", shape=(8, 8), kind="constant"),
            Interval("a", 1024, 0, 2, dtype="f32", shape=(16, 16)),
            Interval("b", 1024, 1, 3, dtype="f32", shape=(256,)),
            Interval("c", 512, 4, 5, dtype="bf16", shape=(256,)),
            Interval("flat", 1024, 1, 2, dtype="f32", shape=(256,), alias_of="a"),
            Interval("raw", 64, 4, 5),
            Interval("none", 0, 2, 2, dtype="f32", shape=(0, 3)),
        ],
        **options,
    )


def everything(arena):
    """Copy all bytes of an arena on the host, by its address, margins left out."""
    from rlx_driver.backends.numpy import array_at

    return array_at(arena.address, (arena.size_bytes,), np.dtype(np.uint8), arena).copy()


def span(arena, node):
    """Give the slice of the arena's bytes that a node has."""
    start = arena.byte_offset(node)
    return slice(start, start + arena.plan.interval(node).size)
