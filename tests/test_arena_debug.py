"""Debug arenas: guards, poison, lives, and reports of who wrote where."""

import contextlib
import re
import threading
import tracemalloc

import numpy as np
import pytest

import rlx_driver as rlx
from buffer_support import in_thread, start
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
    return array_at(address, (count,), np.dtype(np.uint8), arena)


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


# --- slots that share no byte have nothing to do with each other ---------------------------------


@pytest.fixture
def pair():
    """Two slots that share no byte and end after step 1, and one that lives on."""
    plan = rlx.plan_memory([floats("a", 16, 0, 1), floats("b", 16, 0, 1), floats("c", 16, 0, 9)])
    with Arena(plan, name="p", debug=True) as made:
        made.advance(0)
        for node in ("a", "b", "c"):
            made[node] = np.ones(16, np.float32)
        yield made


def ends(count=16):
    """A plan of a slot that ends after step 1 and one that lives on."""
    return rlx.plan_memory([floats("x", count, 0, 1), floats("y", count, 0, 3)])


def test_scopes_on_two_slots_can_be_open_at_once(pair):
    with pair.buffer("a").read("numpy") as x, pair.buffer("b").write("numpy") as y:
        y[:] = x + 1
        pair["c"] = 5
    assert (pair.read("b") == 2).all()
    assert (pair.read("c") == 5).all()


def test_a_slot_is_copied_from_inside_a_scope_on_another(pair):
    with pair.buffer("a").write("numpy") as x:
        x[:] = 3
        assert (pair.read("b") == 1).all()
        assert pair.write_input_f32("c", "f32", np.full(16, 4, np.float32)) == 16
        assert (pair.read_output_f32("c", "f32", 16) == 4).all()
    assert (pair.read("a") == 3).all()


def test_a_write_to_one_slot_leaves_jax_arrays_of_another_alone(pair):
    array = pair.buffer("a").jax()
    pair["b"] = 2.0
    pair.check()
    assert not array.is_deleted()
    assert array.sum() == 16
    pair["a"] = 2.0
    assert array.is_deleted()


@pytest.mark.parametrize("backend", [None, "torch"])
def test_autograd_takes_what_it_saved_from_a_slot_that_nobody_wrote(backend):
    torch = pytest.importorskip("torch")
    # The block of "a" has bytes behind it that are poisoned while it lives: those of "long".
    plan = rlx.plan_memory(
        [
            floats("long", 64, 0, 0, offset=0),
            floats("a", 16, 1, 5, offset=0),
            floats("b", 16, 0, 5, offset=1024),
        ]
    )
    with Arena(plan, backend=backend, debug=True) as arena:
        arena.advance(0)
        arena["long"] = np.ones(64, np.float32)
        arena.advance(1)
        arena["a"] = np.ones(16, np.float32)
        weight = torch.full((16,), 3.0, requires_grad=True)
        loss = (weight * arena.buffer("a").torch()).sum()
        arena["b"] = np.ones(16, np.float32)
        raw(arena, "a", 100, 1)[:] = 1
        with pytest.raises(rlx.ArenaCorruptionError, match="'long'"):
            arena.check()  # and puts it right
        loss.backward()
        assert (weight.grad == 1).all()
        loss = (weight * arena.buffer("a").torch()).sum()
        arena["a"] = np.ones(16, np.float32)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# --- what is held while the arena looks -----------------------------------------------------------


@pytest.mark.parametrize("how", ["read", "write"])
def test_a_slot_that_is_held_when_its_life_ends_is_poisoned_when_it_is_free(pair, how):
    with getattr(pair.buffer("a"), how)("numpy") as held:
        pair.advance(2)
        assert (held == 1).all()
        assert np.isnan(array_of(pair, "b")).all()  # which nobody holds
        if how == "write":
            held[:] = 7  # it still has it
        pair.check()
        assert (pair.read("c") == 1).all()
        assert (held == (7 if how == "write" else 1)).all()
    pair.check()
    assert np.isnan(array_of(pair, "a")).all()
    held[3] = 1
    with pytest.raises(rlx.ArenaCorruptionError, match=r"'a' .*whose life ended at step 1"):
        pair.check()


def array_of(arena, node):
    """See a slot whatever step it is."""
    return raw(arena, node, 0, 64).view(np.float32)


def test_a_slot_that_lives_again_before_it_is_free_is_not_poisoned(pair):
    with pair.buffer("a").write("numpy") as held:
        pair.advance(2)
        pair.advance(0)  # a second run
        held[:] = 8
        pair.check()
    pair.check()
    assert (pair.read("a") == 8).all()
    pair.advance(2)
    assert np.isnan(array_of(pair, "a")).all()


def test_guards_are_looked_at_from_inside_a_scope(pair):
    with pair.buffer("a").write("numpy"):
        raw(pair, "a", 64, 1)[:] = 0
        with pytest.raises(rlx.ArenaCorruptionError, match="guard bytes behind 'a'"):
            pair.read("b")
        pair.check()


def reused():
    """A plan in which a slot lies in the bytes of a longer one that has ended."""
    return rlx.plan_memory([floats("x", 16, 0, 1, offset=0), floats("y", 4, 2, 9, offset=0)])


def test_what_is_being_written_is_looked_at_the_next_time():
    with Arena(reused(), debug=True) as arena:
        arena.advance(2)
        with arena.buffer("y").write("numpy"):
            raw(arena, "y", 32, 1)[:] = 1
            arena.check()
        with pytest.raises(rlx.ArenaCorruptionError, match=r"'x' .*whose life ended at step 1"):
            arena.check()
        with arena.buffer("y").read("numpy"):
            raw(arena, "y", 32, 1)[:] = 1
            with pytest.raises(rlx.ArenaCorruptionError, match=r"'x' .*whose life ended at step 1"):
                arena.check()  # it cannot be put right now
            arena.check()
        arena.check()
        assert raw(arena, "y", 32, 1) == 0xFF


@pytest.mark.parametrize("how", ["read", "write"])
def test_a_scope_of_another_thread_is_never_waited_for(pair, how):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with getattr(pair.buffer("a"), how)("numpy") as held:
            entered.set()
            assert leave.wait(60)
            return held.copy()

    def look():
        pair.check()
        pair["b"] = 4
        pair.advance(2)
        return pair.read("c")

    holder = start(hold)
    try:
        assert entered.wait(60)
        assert (in_thread(look) == 1).all()
        assert np.isnan(array_of(pair, "b")).all()
    finally:
        leave.set()
    assert (holder.result(60) == 1).all()
    pair.check()
    assert np.isnan(array_of(pair, "a")).all()


@pytest.mark.parametrize("end", ["close", "reset"])
def test_an_end_looks_at_what_was_held_until_then(end):
    plan = reused()
    arena = Arena(plan, debug=True)
    arena.advance(2)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with arena.buffer("y").write("numpy"):
            entered.set()
            assert leave.wait(60)
            raw(arena, "y", 32, 1)[:] = 1

    holder = start(hold)
    assert entered.wait(60)
    ender = start(getattr(arena, end))
    while not rlx._locks.sleepers and not ender.done():
        pass
    leave.set()
    holder.result(60)
    with pytest.raises(rlx.ArenaCorruptionError, match=r"'x' .*whose life ended at step 1"):
        ender.result(60)
    assert arena.is_closed == (end == "close")
    arena.close()


def test_ends_from_inside_a_scope_are_refused_as_without_debug(pair):
    with pair.buffer("a").read("numpy"):
        for end in (pair.close, pair.reset):
            with pytest.raises(rlx.StaleViewError):
                end()
    assert (pair.read("a") == 1).all()


def test_threads_use_slots_of_their_own_while_another_looks():
    count = 4
    nodes = [floats(i, 64, 0, 9) for i in range(count)]
    plan = rlx.plan_memory([*nodes, floats("even", 64, 0, 0), floats("odd", 64, 1, 1)])
    done = threading.Event()

    def use(arena, node):
        for turn in range(60):
            arena[node] = np.full(64, turn, np.float32)
            with arena.buffer(node).write("numpy") as inside:
                inside += 1
            assert (arena.read(node) == turn + 1).all()

    with Arena(plan, debug=True) as arena:
        users = [start(use, arena, node) for node in range(count)]
        turn = 0
        while not all(user.done() for user in users) or turn < 20:
            arena.advance(turn % 2)
            arena[("even", "odd")[turn % 2]] = turn
            arena.check()
            turn += 1
        done.set()
        for user in users:
            user.result(60)


# --- arrays of JAX that are on their way, donated, or held ----------------------------------------


def test_an_array_that_its_user_has_donated_is_no_matter_of_other_slots(pair):
    jax = pytest.importorskip("jax")
    slot = pair.buffer("a")
    slot.update(lambda x: x + 1, framework="jax")
    result = jax.jit(lambda x: x * 2, donate_argnums=0)(slot.jax())
    assert (pair.read("b") == 1).all()
    pair["c"] = 3
    pair.check()
    pair.advance(1)
    rlx.commit(slot, result)
    assert (pair.read("a") == 4).all()


def test_a_failed_update_is_told_to_who_asks_for_that_slot(pair):
    jax = pytest.importorskip("jax")

    def fail(_):
        raise ValueError("on purpose")

    def step(x):
        return jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    slot = pair.buffer("a")
    with contextlib.suppress(rlx.UpdateFailedError):
        slot.update(step, framework="jax")
        assert (pair.read("b") == 1).all()
        pair.check()
        with pytest.raises(rlx.UpdateFailedError, match="'a'"):
            slot.numpy()
    slot.copy_from(np.ones(16, np.float32))
    assert (pair.read("a") == 1).all()


def test_a_dead_slot_that_an_alias_holds_is_poisoned_when_that_is_gone(pair):
    pytest.importorskip("jax")
    array = pair.buffer("a").jax()
    alias = np.asarray(array)
    pair.advance(2)
    assert (alias == 1).all()
    assert (pair.read("c") == 1).all()
    del alias, array
    pair.check()
    assert np.isnan(array_of(pair, "a")).all()


# --- devices with streams -------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shared", "events", "host"])
@pytest.mark.parametrize("framework", ["fake", "fake_functional"])
def test_a_look_comes_after_the_work_on_a_device(order, framework):
    fakes = FakeDevice(order=order, on_host_wait="release")
    with fakes as fake, Arena(ends(), fake.device, debug=True) as arena:
        arena.advance(0)
        slot = arena.buffer("x")
        arena["y"] = 1
        arena.advance(2)
        side, compute = fake.stream("side"), fake.stream("compute")
        side.hold()
        compute.hold()
        if framework == "fake":
            with side, slot.write("fake") as inside:
                inside.fill_(1)
        else:
            slot.update(np.ones_like, framework="fake_functional")
        with pytest.raises(rlx.ArenaCorruptionError, match=r"'x' .*ended at step 1"):
            arena.check()
        arena.check()
        assert (arena.read("y") == 1).all()


@pytest.mark.parametrize("order", ["shared", "events", "host"])
@pytest.mark.parametrize("framework", ["fake", "fake_functional"])
def test_poison_comes_between_the_work_before_and_after(order, framework):
    fakes = FakeDevice(order=order, on_host_wait="release")
    with fakes as fake, Arena(ends(), fake.device, debug=True) as arena:
        arena.advance(0)
        slot = arena.buffer("x")
        slot.array("fake_functional")
        side, compute = fake.stream("side"), fake.stream("compute")
        for _ in range(2):
            arena.advance(0)
            side.hold()
            compute.hold()
            if framework == "fake":
                with side, slot.write("fake") as inside:
                    inside.fill_(1)
            else:
                slot.update(np.ones_like, framework="fake_functional")
            arena.advance(2)
            arena.check()
            side.release()
            compute.release()
            arena.check()
        arena.advance(0)
        with side:
            assert np.isnan(arena.read("x")).all()


@pytest.mark.parametrize("order", ["shared", "events", "host"])
def test_late_poison_comes_after_what_held_it_up(order):
    fakes = FakeDevice(order=order, on_host_wait="release")
    with fakes as fake, Arena(ends(), fake.device, debug=True) as arena:
        arena.advance(0)
        side = fake.stream("side")
        with side, arena.buffer("x").write("fake") as inside:
            side.hold()
            arena.advance(2)
            side.hold()
            inside.fill_(1)
        arena.check()
        side.release()
        arena.check()


def test_work_on_a_device_is_not_waited_for_by_a_write_to_another_slot():
    with FakeDevice() as fake, Arena(ends(), fake.device, debug=True) as arena:
        array = arena.buffer("x").array("fake_functional")
        arena["y"] = 1
        arena.check()
        assert not array.is_deleted()


# --- files ----------------------------------------------------------------------------------------


def test_a_debug_arena_is_saved_from_inside_a_read_scope_and_after_an_update(pair, tmp_path):
    pytest.importorskip("jax")
    path = tmp_path / "arena.safetensors"
    pair.buffer("b").update(lambda x: x + 4, framework="jax")
    with pair.buffer("a").read("numpy"):
        pair.save(path)
    with pair.buffer("a").write("numpy"), pytest.raises(rlx.StaleViewError):
        pair.save(path)
    for options in ({}, {"debug": True}):
        with Arena.load(path, **options) as loaded:
            assert (loaded.read("a") == 1).all()
            assert (loaded.read("b") == 5).all()
            array = loaded.buffer("a").jax()
            loaded["b"] = 1
            loaded.check()
            assert not array.is_deleted()


def test_a_debug_arena_is_read_while_it_is_saved(pair, tmp_path):
    seen = []

    slot = pair.buffer("c")

    def look():
        pair.check()
        pair.advance(2)
        with slot.read("numpy") as inside:
            return inside.copy()

    def tell(done, total):
        seen.append(in_thread(look))

    pair.save(tmp_path / "arena.safetensors", progress=tell)
    assert len(seen) > 1
    assert all((values == 1).all() for values in seen)
    pair.check()
    assert np.isnan(array_of(pair, "a")).all()
    with Arena.load(tmp_path / "arena.safetensors") as loaded:
        assert (loaded.read("a") == 1).all()


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("step", ["x", 1.0, True, None, np.float32(1), np.True_, np.ones(1)])
def test_a_step_is_an_integer(step, debug):
    with Arena(ends(), debug=debug) as arena:
        arena.advance(np.int64(1))
        with pytest.raises(rlx.PlanError, match=f"(?s)step .*{type(step).__name__}.*integer"):
            arena.advance(step)
        arena.view("x")  # at step 1
        arena.advance(np.uint8(2))
        if debug:
            with pytest.raises(rlx.StaleViewError, match="at step 2"):
                arena.view("x")
