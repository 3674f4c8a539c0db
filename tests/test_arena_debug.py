"""Debug arenas: guards, poison, lives, and reports of who wrote where."""

import re
import tracemalloc

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver import Arena, Interval
from rlx_driver.backends.numpy import array_at
from rlx_driver.testing import FakeDevice

HERE = re.escape(__file__)


def floats(node, count, first, last, **more):
    return Interval(node, 4 * count, first, last, dtype="f32", shape=(count,), **more)


@pytest.fixture
def arena():
    """A node that lives over two steps, one that lives on, one that reuses the bytes."""
    plan = rlx.plan_memory(
        [
            floats("w", 8, 0, 0, kind="constant"),
            floats("early", 16, 0, 1),
            floats("middle", 16, 1, 2),
            floats("late", 16, 2, 3),
            floats("alias", 8, 1, 1, alias_of="early"),
        ]
    )
    with Arena(plan, name="t", debug=True) as made:
        yield made


def raw(arena, node, start, count):
    """Reach bytes from the start of a node's slot, as a kernel with a wrong index does."""
    address = arena.address + arena.byte_offset(node) + start
    return array_at(address, (count,), np.dtype(np.uint8), arena.view("w"))


def test_guards_keep_slots_apart_and_the_plan_is_valid(arena):
    arena.plan.validate()
    for one in ("w", "early", "middle"):
        for other in ("w", "early", "middle"):
            if one != other:
                low, high = sorted((arena.byte_offset(one), arena.byte_offset(other)))
                first = one if arena.byte_offset(one) == low else other
                assert high - low >= arena.plan.interval(first).size + 64
    assert arena.plan.interval("early").size == 64


def test_what_nobody_wrote_is_not_a_number(arena):
    assert np.isnan(arena.view("early")).all()
    arena["early"] = np.ones(16, np.float32)
    assert (arena.read("early") == 1).all()
    assert arena.write_input_f32("middle", "f32", np.ones(3, np.float32)) == 3
    assert np.isnan(arena.read("middle")[3:]).all()


def test_writes_inside_of_slots_raise_nothing(arena):
    for step, nodes in enumerate([("early",), ("middle", "alias"), ("late",), ()]):
        arena.advance(step)
        for node in nodes:
            arena.view(node)[:] = step
    arena.check()


@pytest.mark.parametrize("where", [64, 127])
def test_a_write_behind_a_slot_is_reported_once_with_its_neighbours(arena, where):
    arena["early"] = np.ones(16, np.float32)  # which the report is to name
    low = arena.byte_offset("early") + where
    raw(arena, "early", where, 1)[:] = 0
    with pytest.raises(rlx.ArenaCorruptionError) as caught:
        arena.check()
    text = str(caught.value)
    assert f"bytes {low:,} to {low + 1:,}: guard bytes behind 'early'" in text
    assert re.search(rf"'early' \(last handed out at {HERE}:\d+\)", text)
    assert "arena 't'" in text
    arena.check()
    assert (arena.read("early") == 1).all()


def test_writes_before_the_first_slot_and_behind_the_last_are_reported(arena):
    first = min(arena.plan.nodes, key=arena.byte_offset)
    raw(arena, first, -4, 4)[:] = 1
    with pytest.raises(rlx.ArenaCorruptionError, match=rf"before '{first}'"):
        arena.check()
    raw(arena, "w", arena.size_bytes - arena.byte_offset("w"), 1)[:] = 1
    with pytest.raises(rlx.ArenaCorruptionError, match="behind"):
        arena.check()
    arena.check()


@pytest.mark.parametrize(
    "access",
    [
        lambda a: a.read("w"),
        lambda a: a.write("w", np.ones(8, np.float32)),
        lambda a: a.write_input_f32("w", "f32", [1.0]),
        lambda a: a.read_output_f32("w", "f32", 1),
        lambda a: a.__setitem__("w", 1.0),
        lambda a: a.advance(1),
        lambda a: a.reset(),
        lambda a: a.close(),
    ],
)
def test_every_access_by_the_driver_looks(arena, access):
    raw(arena, "early", 64, 4)[:] = 0
    with pytest.raises(rlx.ArenaCorruptionError, match="behind 'early'"):
        access(arena)


def test_closing_reports_and_closes(arena):
    raw(arena, "early", 64, 4)[:] = 0
    with pytest.raises(rlx.ArenaCorruptionError):
        arena.close()
    assert arena.is_closed


def test_a_slot_is_poisoned_when_its_life_ends(arena):
    arena.advance(0)
    early = arena.view("early")
    early[:] = 1
    arena["w"] = np.full(8, 2, np.float32)
    arena.advance(1)
    assert (early == 1).all()
    arena.view("middle")[:] = 3
    arena.advance(2)
    assert np.isnan(early).all()
    assert (arena.read("middle") == 3).all()
    assert (arena.read("w") == 2).all()


def test_a_late_write_to_a_dead_slot_is_reported_with_its_name():
    plan = rlx.plan_memory([floats("x", 16, 0, 1), floats("y", 16, 0, 5)])
    with Arena(plan, debug=True) as arena:
        arena.advance(0)
        x = arena.view("x")  # which the report is to name
        arena.advance(2)
        x[3] = 1
        told = rf"(?s)step 2.*'x' \(last handed out at {HERE}:\d+\), whose life ended at step 1"
        with pytest.raises(rlx.ArenaCorruptionError, match=told):
            arena.read("y")
        arena.check()


def test_a_slot_that_takes_over_bytes_begins_poisoned():
    plan = rlx.plan_memory([floats("x", 16, 0, 1), floats("y", 16, 2, 3)])
    with Arena(plan, debug=True) as arena:
        assert arena.byte_offset("x") == arena.byte_offset("y")
        arena.advance(1)
        arena["x"] = np.ones(16, np.float32)
        arena.advance(2)
        assert np.isnan(arena.read("y")).all()


def test_a_node_is_accessible_during_its_life_only(arena):
    arena["late"] = np.ones(16, np.float32)  # no step was told yet
    arena.advance(0)
    for node, step, inside in [
        ("early", 0, True),
        ("early", 1, True),
        ("early", 2, False),
        ("alias", 0, True),
        ("late", 1, False),
        ("late", 2, True),
        ("w", 3, True),
    ]:
        arena.advance(step)
        if inside:
            arena.view(node)
        else:
            for act in (arena.view, arena.buffer, arena.read):
                with pytest.raises(rlx.StaleViewError, match=rf"'{node}'.*is at step {step}"):
                    act(node)


def test_inputs_written_before_the_first_step_are_kept(arena):
    arena["w"] = np.ones(8, np.float32)
    arena["early"] = np.full(16, 2, np.float32)
    arena.advance(0)
    assert (arena.read("w") == 1).all()
    assert (arena.read("early") == 2).all()


def test_a_second_run_begins_with_an_earlier_step(arena):
    for _ in range(2):
        for step in range(4):
            arena.advance(step)
            for node in ("early", "middle", "late"):
                first, last = arena.plan.life(node)
                if first == step:
                    assert np.isnan(arena.read(node)).all()
                    arena[node] = np.full(16, step, np.float32)
                if first <= step <= last:
                    assert (arena.read(node) == first).all()


def test_a_reset_forgets_the_step(arena):
    arena.advance(3)
    arena.reset()
    assert np.isnan(arena.read("early")).all()
    arena["early"] = np.ones(16, np.float32)
    arena.check()


def test_replan_guards_anew(arena):
    arena.replan(rlx.plan_memory([floats("x", 4, 0, 1), floats("y", 4, 0, 1)]))
    arena["x"] = np.ones(4, np.float32)
    address = arena.address + arena.byte_offset("x") + 16
    array_at(address, (1,), np.dtype(np.uint8), arena.view("x"))[:] = 0
    with pytest.raises(rlx.ArenaCorruptionError, match="behind 'x'"):
        arena.check()


def test_pinned_slots_stay_where_they_are():
    plan = rlx.plan_memory([floats("p", 16, 0, 1, offset=0), floats("q", 16, 0, 1, offset=64)])
    with Arena(plan, debug=True) as arena:
        assert (arena.byte_offset("p"), arena.byte_offset("q")) == (0, 64)
        arena["p"] = np.ones(16, np.float32)
        arena["q"] = np.ones(16, np.float32)
        arena.check()


def test_outside_of_debug_the_extras_do_nothing():
    with Arena(rlx.plan_memory([floats("x", 4, 0, 1)])) as arena:
        arena.advance(9)
        arena.check()
        assert (arena.view("x") == 0).all()


def test_jax_arrays_of_live_slots_survive_the_end_of_other_lives(arena):
    pytest.importorskip("jax")
    arena.advance(0)
    arena["early"] = np.ones(16, np.float32)
    arena["w"] = np.full(8, 4, np.float32)
    arena.advance(1)
    arena["middle"] = np.full(16, 2, np.float32)
    early, middle = arena.buffer("early").jax(), arena.buffer("middle").jax()
    arena.advance(2)
    assert early.is_deleted()
    assert middle.sum() == 32


def test_a_device_is_looked_at_too():
    with FakeDevice() as fake:
        plan = rlx.plan_memory([floats("x", 16, 0, 1), floats("y", 16, 0, 3)])
        with Arena(plan, fake.device, debug=True) as arena:
            arena.advance(0)
            x = arena.view("x")
            arena["x"] = np.ones(16, np.float32)
            arena["y"] = np.ones(16, np.float32)
            arena.advance(2)
            x.fill_(2)
            with pytest.raises(rlx.ArenaCorruptionError, match=r"'x'.*whose life ended at step 1"):
                arena.read("y")
            assert (arena.read("y") == 1).all()


def test_many_places_are_counted():
    plan = rlx.plan_memory([floats(i, 16, 0, 1) for i in range(20)])
    with Arena(plan, debug=True) as arena:
        for i in range(20):
            address = arena.address + arena.byte_offset(i) + 64
            array_at(address, (1,), np.dtype(np.uint8), arena.view(0))[:] = 0
        with pytest.raises(rlx.ArenaCorruptionError, match="and 12 more places"):
            arena.check()


def test_looking_takes_a_few_times_the_memory_of_the_arena():
    size = 8 << 20
    plan = rlx.plan_memory([("x", size // 2, 0, 1), ("y", size // 2, 1, 2)])
    tracemalloc.start()
    try:
        with Arena(plan, debug=True) as arena:
            arena.advance(2)
            arena["y"] = np.ones(size // 2, np.uint8)
        assert tracemalloc.get_traced_memory()[1] < 9 * size
    finally:
        tracemalloc.stop()
