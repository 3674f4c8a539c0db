"""Whatever is written to a slot of whatever plan, no byte of a neighbour changes."""

import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlx_driver as rlx
from arena_support import everything, span
from rlx_driver import Arena, Interval

DTYPES = ["f32", "bf16", "f16", "f8_e4m3fn", "i8", "u8", "f64", "bool"]


@st.composite
def plans(draw):
    """Draw a plan of a few nodes: any lives, kinds, alignments, aliases and empty slots."""
    intervals = []
    for node in range(draw(st.integers(1, 8))):
        first = draw(st.integers(0, 6))
        size = draw(st.integers(0, 300))
        roots = [i for i in intervals if i.alias_of is None and i.size >= 8]
        if roots and draw(st.integers(0, 4)) == 0:
            root = draw(st.sampled_from(roots))
            offset = draw(st.integers(0, root.size // 8)) * 8
            part = draw(st.integers(0, root.size - offset))
            more = {"alias_of": root.node, "alias_offset": offset}
            intervals.append(Interval(node, part, first, first, **more))
            continue
        kind = draw(st.sampled_from(["intermediate"] * 3 + ["input", "constant"]))
        alignment = draw(st.sampled_from([None, None, 8, 512]))
        last = first + draw(st.integers(0, 4))
        intervals.append(Interval(node, size, first, last, kind=kind, alignment=alignment))
    return rlx.plan_memory(intervals, alignment=draw(st.sampled_from([8, 64, 256])))


def expected(values, dtype):
    """Give the bytes of values converted by the reference."""
    raw = np.zeros(values.size * rlx.dtype(dtype).itemsize, np.uint8)
    rlx.write_typed_from_f32(raw, dtype, values)
    return raw


@pytest.mark.parametrize("backend", [None, "jax"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans(), data=st.data())
def test_a_write_changes_the_bytes_it_should_and_no_other(backend, plan, data):
    if backend == "jax":
        pytest.importorskip("jax")
    with Arena(plan, backend=backend) as arena:
        model = np.zeros(arena.size_bytes, np.uint8)
        for turn in range(data.draw(st.integers(1, 8))):
            node = data.draw(st.sampled_from(plan.nodes))
            dtype = data.draw(st.sampled_from(DTYPES))
            itemsize = rlx.dtype(dtype).itemsize
            size, place = plan.interval(node).size, span(arena, node)
            count = data.draw(st.integers(0, 2 * size // itemsize + 2))
            values = np.arange(count, dtype=np.float32) % 5 + turn
            room = size // itemsize
            how = data.draw(st.sampled_from(["f32", "write", "view", "typed", "number", "reset"]))
            if how == "f32":
                assert arena.write_input_f32(node, dtype, values) == min(count, room)
                raw = expected(values[:room], dtype)
                model[place][: raw.size] = raw
            elif how == "write":
                raw = expected(values, dtype)
                fits = contextlib.nullcontext() if count <= room else pytest.raises(rlx.ShapeError)
                with fits:
                    arena.write(node, raw.view(rlx.dtype(dtype)))
                    model[place][: raw.size] = raw
            elif how == "view":
                arena.view(node)[:] = turn
                model[place] = turn
            elif how == "typed":
                fits = contextlib.nullcontext() if count <= room else pytest.raises(rlx.ShapeError)
                with fits:
                    arena.view(node, dtype, (count,)).view(np.uint8)[:] = turn
                    model[place][: count * itemsize] = turn
            elif how == "number":
                arena[node] = turn
                model[place] = turn
            else:
                arena.reset()
                model[:] = 0
            assert (everything(arena) == model).all()
            assert (arena.read(node) == model[place]).all()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans(), data=st.data())
def test_a_debug_arena_finds_no_fault_with_accesses_by_the_driver(plan, data):
    with Arena(plan, debug=True) as arena:
        arena.plan.validate()
        last = max(plan.lasts, default=0)
        for step in range(last + 1):
            arena.advance(step)
            for node in plan.nodes:
                first, end = plan.life(node)
                if first <= step <= end and data.draw(st.booleans()):
                    arena.write_input_f32(node, "bf16", np.ones(500, np.float32))
                    arena.view(node)[:] = step
        arena.check()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans(), data=st.data())
def test_scopes_stand_in_the_way_of_their_own_block_only(plan, data):
    """In a debug arena too, whatever it looks at and poisons meanwhile."""
    with Arena(plan, debug=True) as arena:
        steps = range(max(plan.lasts, default=0) + 1)
        with contextlib.ExitStack() as scopes:
            held = {}  # discipline: how it is held
            for step in steps:
                arena.advance(step)
                alive = [n for n in plan.nodes if plan.life(n)[0] <= step <= plan.life(n)[1]]
                for node in data.draw(
                    st.lists(st.sampled_from(alive), max_size=4) if alive else st.just([])
                ):
                    slot = arena.buffer(node)
                    how = held.get(slot._access)
                    act = data.draw(
                        st.sampled_from(["hold to read", "hold to write", "read", "write"])
                    )
                    reads = act in ("hold to read", "read")
                    fits = how is None or (how == "read" and reads)
                    with contextlib.nullcontext() if fits else pytest.raises(rlx.StaleViewError):
                        if act == "read":
                            arena.read(node)
                        elif act == "write":
                            arena[node] = step
                        elif reads:
                            scopes.enter_context(slot.read("numpy"))
                        else:
                            scopes.enter_context(slot.write("numpy"))[:] = step
                    if fits and act.startswith("hold"):
                        held[slot._access] = "read" if reads else "write"
                arena.check()
        arena.check()
        assert not arena._inspector._late


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans(), data=st.data())
def test_a_debug_arena_finds_every_write_behind_a_slot(plan, data):
    slots = [n for n in plan.nodes if plan.interval(n).size and plan.root(n) == n]
    if not slots:
        return
    from rlx_driver.backends.numpy import array_at

    with Arena(plan, debug=True) as arena:
        node = data.draw(st.sampled_from(slots))
        arena.advance(plan.life(node)[0])
        arena.view(node)[:] = 1
        end = arena.address + arena.byte_offset(node) + plan.interval(node).size
        array_at(end, (1,), np.dtype(np.uint8), arena.view(node))[:] = 0
        with pytest.raises(rlx.ArenaCorruptionError, match=rf"behind {node!r} \(last handed out"):
            arena.check()
