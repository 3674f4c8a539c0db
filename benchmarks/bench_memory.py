"""What it costs to know who made which memory: at creation, traced, and in a report."""

import gc

import rlx_driver as rlx
from benchmarks.harness import Row, best_of
from rlx_driver._memory import common_pool, register
from rlx_driver.backends.accounting import Allocation, accounting

HANDLES = 1000
CPU = rlx.Device("cpu")


class Owner:
    """Stands for a Buffer and its memory, of which nothing else is measured."""

    __slots__ = ("__weakref__",)


def allocate(owner: Owner) -> Allocation:
    return accounting.add(CPU, 64, owner)


def counted() -> None:
    allocate(Owner())


def registered() -> None:
    owner = Owner()
    _, made = accounting.record(allocate, owner)
    register(owner, "buffer", "Buffer", common_pool("buffers", CPU), None, made)


def make_buffer() -> None:
    rlx.Buffer.zeros((16,))


def make_handle() -> None:
    rlx.BufferHandle("h", (16,))


def guarded() -> None:
    with rlx.no_leaks():
        pass


def run() -> list[Row]:
    with_maker, without = best_of(registered, counted, number=1000, repeat=60)
    buffer, handle = best_of(make_buffer, make_handle, number=500)
    with rlx.trace_memory():
        traced_buffer, traced_handle = best_of(make_buffer, make_handle, number=500)
    kept = [rlx.BufferHandle(f"h{i}", (16,)) for i in range(HANDLES)]
    for each in kept:
        each.numpy()
    report, text = best_of(lambda: str(rlx.memory_report()), rlx.memory_report, number=3)
    block, collect = best_of(guarded, gc.collect, number=3)
    kept.clear()
    added = with_maker - without
    return [
        Row("registering a Buffer", added, "target", 1.5e-6, 1.5e-6, absolute=True),
        Row("registering a Buffer", added, "Buffer.zeros((16,))", buffer),
        Row("Buffer.zeros((16,)), traced", traced_buffer, "not traced", buffer),
        Row("BufferHandle('h', (16,)), traced", traced_handle, "not traced", handle),
        Row(f"str(memory_report()), {HANDLES:,} handles", report, "memory_report()", text),
        Row(f"no_leaks(), {HANDLES:,} handles", block, "gc.collect()", collect),
    ]
