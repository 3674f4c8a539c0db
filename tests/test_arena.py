"""Arenas: slots lie where the plan says, are seen by every framework, and end with the arena."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest

import rlx_driver as rlx
from arena_support import everything, small_plan, span
from rlx_driver import Arena, Interval
from rlx_driver.testing import FakeDevice

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

from buffer_support import (  # noqa: E402
    SIDE,
    address,
    ever,
    in_thread,
    is_intact,
    reader_in_flight,
    run_python,
    start,
    warm_up,
)

pytestmark = [pytest.mark.jax, pytest.mark.torch]


@pytest.fixture(params=[None, "torch", "jax"], ids=["numpy", "torch", "jax-owned"])
def arena(request):
    """An arena on the host, whose memory NumPy, torch or JAX owns."""
    with Arena(small_plan(), backend=request.param, name="t") as made:
        yield made


@pytest.fixture
def tpu(monkeypatch):
    """A device kind that JAX serves and nothing else sees."""
    from rlx_driver.backends import jax as backend

    monkeypatch.setitem(backend._PLATFORM, "tpu", "cpu")
    return rlx.Device("tpu")


def plus_one(x):
    return x + 1


def typed(node, count, first, last, dtype="f32", **more):
    size = count * rlx.dtype(dtype).itemsize
    return Interval(node, size, first, last, dtype=dtype, shape=(count,), **more)


# --- what there is -------------------------------------------------------------------------------


def test_an_arena_satisfies_the_protocol_and_says_what_it_is(arena):
    assert isinstance(arena, rlx.DeviceArena)
    assert not isinstance(rlx.Buffer.zeros(3), rlx.DeviceArena)
    assert arena.size_bytes == arena.plan.size
    assert arena.device == rlx.Device("cpu")
    assert (arena.generation, arena.is_closed, len(arena)) == (0, False, 7)
    assert "t'" in repr(arena)
    assert f"{arena.size_bytes:,}" in repr(arena)


def test_offsets_are_those_of_the_plan_and_none_without_a_slot(arena):
    for node in arena.plan.nodes:
        assert arena.byte_offset(node) == arena.plan.offset(node)
        assert arena.has_buffer(node)
        assert node in arena
    assert arena.byte_offset("stranger") is None
    assert not arena.has_buffer("stranger")
    assert "stranger" not in arena


def test_slots_lie_at_their_offsets_and_are_zero_at_first(arena):
    for node in ("w", "a", "b", "c", "flat", "raw"):
        assert arena.buffer(node).address == arena.address + arena.byte_offset(node)
        assert address(arena.view(node)) == arena.address + arena.byte_offset(node)
    assert not everything(arena).any()


def test_a_slot_has_the_dtype_and_shape_that_the_plan_says(arena):
    slot, raw = arena.buffer("a"), arena.buffer("raw")
    assert (slot.dtype, slot.shape, arena.view("a").shape) == (np.float32, (16, 16), (16, 16))
    assert (raw.dtype, raw.shape, arena.view("raw").shape) == (np.uint8, (64,), (64,))
    assert arena.view("none").shape == (0, 3)
    assert arena.view("raw", "f32").shape == (16,)
    assert arena.view("raw", dtype="i16", shape=(2, 3)).shape == (2, 3)
    assert arena.view("a", dtype="f32").shape == (16, 16)
    assert arena.view("a", dtype="bf16").shape == (512,)
    assert arena.view("a", shape=4).shape == (4,)
    assert rlx.dtype(arena["c"].dtype) == rlx.dtype("bf16")


def test_a_plan_may_say_the_shape_alone():
    with Arena(rlx.plan_memory([Interval("x", 24, 0, 1, shape=(2, 3))])) as arena:
        assert arena.view("x").shape == (2, 3)
        assert arena.view("x", "f32").shape == (2, 3)


def test_the_alignment_of_a_node_holds_for_its_address():
    plan = rlx.plan_memory([("x", 100, 0, 1), Interval("y", 100, 0, 1, alignment=8192)])
    for backend in (None, "jax"):
        with Arena(plan, backend=backend) as arena:
            assert arena.view("y").ctypes.data % 8192 == 0
            assert arena.view("x").ctypes.data % 64 == 0


def test_nodes_are_anything_hashable():
    nodes = [0, ("layer", 1), "s", None, 10**5000]
    with Arena(rlx.plan_memory([(node, 64, 0, 1) for node in nodes])) as arena:
        for i, node in enumerate(nodes):
            arena[node] = np.full(64, i, np.uint8)
        assert [int(arena.read(node)[0]) for node in nodes] == [0, 1, 2, 3, 4]


def test_an_empty_plan_makes_an_arena_of_nothing():
    with Arena(rlx.plan_memory([])) as arena:
        assert arena.size_bytes == 0
        arena.reset()


# --- views ---------------------------------------------------------------------------------------


def test_torch_may_own_the_memory_on_the_host():
    with Arena(small_plan(), backend="torch") as arena:
        view = arena.view("a")
        assert isinstance(view, torch.Tensor)
        view.fill_(2)
        assert (arena.buffer("a").numpy() == 2).all()
        with rlx.no_copies():
            arena.buffer("a").update(plus_one)
        assert (view == 3).all()
    region = rlx.HandleRegion(backend="torch")
    handle = region.create({"h": ((4,), "bf16")})["h"]
    place = handle.address
    handle.torch().fill_(2)
    handle.update(plus_one)
    assert handle.numpy().tolist() == [3] * 4
    assert handle.address == place == handle.torch().data_ptr()
    region.close()


def test_views_are_cached_and_share_memory_with_every_framework(arena):
    numpy, tensor = arena.view("a"), arena.buffer("a").torch()
    assert arena.view("a") is numpy
    assert arena["a"] is numpy
    assert arena.buffer("a") is arena.buffer("a")
    assert arena.buffer("a", "f32", (16, 16)) is arena.buffer("a")
    assert arena.buffer("a").torch() is tensor
    numpy[0] = 1
    assert tensor[0].tolist() == [1] * 16
    tensor[1] = 2
    assert float(arena.buffer("a").jax()[1].sum()) == 32
    assert {address(tensor), address(arena.buffer("a").jax())} == {address(numpy)}


def test_an_alias_sees_the_bytes_of_its_root(arena):
    arena.view("a")[2, 3] = 7
    assert arena.view("flat")[2 * 16 + 3] == 7
    arena.buffer("flat").torch().fill_(4)
    assert (arena.read("a") == 4).all()


def test_an_alias_with_an_offset_sees_a_part():
    plan = rlx.plan_memory(
        [typed("x", 8, 0, 1), typed("tail", 4, 1, 3, alias_of="x", alias_offset=16)]
    )
    with Arena(plan) as arena:
        arena["x"] = np.arange(8, dtype=np.float32)
        assert arena.read("tail").tolist() == [4, 5, 6, 7]
        assert arena.byte_offset("tail") == arena.byte_offset("x") + 16


def test_jax_updates_a_slot_in_place_and_leaves_the_others(arena):
    arena["b"] = np.full(256, 5, np.float32)
    slot = arena.buffer("a")
    view, place = arena.view("a"), slot.address
    with rlx.no_copies():
        for _ in range(5):
            slot.update(plus_one, framework="jax")
    assert (view == 5).all()
    assert arena.view("a") is view
    assert slot.address == place
    assert (arena.read("b") == 5).all()


def test_a_view_waits_for_an_update_that_is_under_way():
    plan = rlx.plan_memory([Interval("x", 4 * SIDE * SIDE, 0, 1, dtype="f32", shape=(SIDE, SIDE))])
    with Arena(plan) as arena:
        arena.view("x")[...] = 1

        def slow(x):
            for _ in range(20):
                x = (x @ x) * (1 / SIDE)
            return x + 1

        arena.buffer("x").update(slow, ordered=False)
        assert (arena.view("x") == 2).all()


def square(first, last, node):
    return Interval(node, 4 * SIDE * SIDE, first, last, dtype="f32", shape=(SIDE, SIDE))


def test_a_jax_reader_of_a_slot_is_safe_from_a_write_to_one_that_reuses_its_bytes():
    warm_up()
    plan = rlx.plan_memory([square(0, 1, "early"), square(2, 3, "late")])
    assert plan.offset("early") == plan.offset("late")

    def wrong(write):
        with Arena(plan) as arena:
            arena.view("early")[...] = 1
            result = reader_in_flight(arena.buffer("early").jax())
            write(arena)
            return not is_intact(result)

    def by_hand(arena):
        arena.view("late")[...] = 0

    assert ever(lambda: wrong(by_hand)), "the control shows no race: the test proves nothing"
    zeros = np.zeros((SIDE, SIDE), np.float32)
    for fenced in (
        lambda arena: arena.write("late", zeros),
        lambda arena: arena.write_input_f32("late", "f32", zeros),
        lambda arena: arena.__setitem__("late", 0.0),
        lambda arena: arena.buffer("late").update(lambda x: x * 0, framework="torch"),
        lambda arena: arena.reset(),
    ):
        assert not ever(lambda fenced=fenced: wrong(fenced), 3)


def test_jax_arrays_die_with_a_write_to_their_bytes_and_only_then():
    plan = rlx.plan_memory([typed("a", 64, 0, 1), typed("b", 64, 0, 1), typed("c", 64, 2, 3)])
    reused, apart = sorted("ab", key=lambda node: plan.offset(node) != plan.offset("c"))
    assert plan.offset(reused) == plan.offset("c")
    with Arena(plan) as arena:
        shared, alone = arena.buffer(reused).jax(), arena.buffer(apart).jax()
        arena["c"] = np.ones(64, np.float32)
        assert shared.is_deleted()
        assert not alone.is_deleted()
        assert alone.sum() == 0


def test_autograd_refuses_a_tensor_whose_bytes_were_reused():
    plan = rlx.plan_memory([typed("x", 4, 0, 1), typed("y", 4, 2, 3)])
    with Arena(plan) as arena:
        weight = torch.ones(4, requires_grad=True)
        loss = (weight * arena.buffer("x").torch()).sum()
        arena["y"] = np.ones(4, np.float32)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_several_arenas_stand_beside_handles():
    one, two = Arena(small_plan(), name="one"), Arena(small_plan(), name="two")
    handle = rlx.BufferHandle("h", (64,), "f32")
    handle.numpy()[:] = 3
    one["b"], two["b"] = np.ones(256, np.float32), np.full(256, 2, np.float32)
    ends = sorted((a.address, a.address + a.size_bytes) for a in (one, two))
    assert ends[0][1] <= ends[1][0]
    assert not any(low <= handle.address < high for low, high in ends)
    assert (one.read("b").mean(), two.read("b").mean(), handle.numpy().mean()) == (1, 2, 3)
    one.close()
    assert two.read("b").mean() == 2
    two.close()
    handle.close()


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_write_takes_an_array_of_any_framework(arena, framework):
    value = np.arange(256, dtype=np.float32)
    arena.write("b", rlx.exchange(value, framework))
    assert (arena.read("b") == value).all()
    arena["b"] = rlx.exchange(value * 2, framework)
    assert (arena.view("b") == value * 2).all()


def test_write_takes_buffers_slots_strided_arrays_and_numbers(arena):
    arena["b"] = rlx.Buffer.from_array(np.full(256, 2, np.float32))
    assert (arena.read("b") == 2).all()
    arena["b"] = np.arange(512, dtype=np.float32)[::-2]
    assert arena.read("b")[:2].tolist() == [511, 509]
    arena["flat"] = arena.buffer("b")
    assert arena.read("a")[0, 1] == 509
    arena["b"] = 7
    assert (arena.read("b") == 7).all()
    arena["b"] = arena.buffer("b").numpy()[::-1]
    assert (arena.read("b") == 7).all()


def test_write_into_bytes_takes_any_array_that_is_not_longer(arena):
    arena["raw"] = np.arange(8, dtype=np.int64)
    assert arena.read("raw", "i64").tolist() == list(range(8))
    arena["raw"] = torch.full((2, 2), 9.0)
    assert arena.read("raw", "f32", (2, 2)).tolist() == [[9, 9], [9, 9]]
    assert arena.read("raw", "i64")[2:].tolist() == list(range(2, 8))


def test_write_converts_only_when_told(arena):
    value = np.arange(256, dtype=np.float64)
    with pytest.raises(rlx.DTypeError, match=r"float64 does not fit 'c'.*cast=True"):
        arena.write("c", value)
    assert not everything(arena).any()
    arena.write("c", value, cast=True)
    assert arena.read("c").astype(np.float32)[:3].tolist() == [0, 1, 2]


def test_read_copies(arena):
    arena["b"] = np.ones(256, np.float32)
    found = arena.read("b")
    found[:] = 5
    assert (arena.view("b") == 1).all()
    assert arena.read("b", "i32", (2, 2)).dtype == np.int32
    assert arena.read("none").shape == (0, 3)


def test_the_ledger_counts_every_copy(arena):
    with pytest.raises(rlx.ZeroCopyError), rlx.no_copies():
        arena.read("b")
    with pytest.raises(rlx.ZeroCopyError), rlx.no_copies():
        arena.write("b", np.ones(256, np.float32))
    with pytest.raises(rlx.ZeroCopyError), rlx.no_copies():
        arena.write_input_f32("b", "f32", np.ones(256, np.float32))
    assert not everything(arena).any()
    with rlx.no_copies():
        arena.view("b")[:] = 1


# --- by value ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64", "f8_e4m3fn", "i8", "bool", "i64"])
def test_floats_go_in_and_out_by_value(arena, dtype):
    values = np.array([0, 1, 2, -3, 1.5, 1000], np.float32)
    with np.errstate(invalid="ignore"):
        expected = values.astype(rlx.dtype(dtype)).astype(np.float32)
    if dtype == "i8":
        expected[-1] = 127
    assert arena.write_input_f32("b", dtype, values) == 6
    np.testing.assert_array_equal(arena.read_output_f32("b", dtype, 6), expected)


def test_a_long_input_is_cut_off_at_the_end_of_its_slot_and_no_further(arena):
    everything_else = np.ones(arena.size_bytes, bool)
    everything_else[span(arena, "c")] = False
    assert arena.write_input_f32("c", "bf16", np.ones(10_000, np.float32)) == 256
    raw = everything(arena)
    assert not raw[everything_else].any()
    assert (arena.read("c") == 1).all()
    assert arena.write_input_f32("c", "f64", [2.0] * 65) == 64
    assert arena.write_input_f32("none", "f32", [1.0]) == 0
    assert arena.write_input_f32("c", "bf16", []) == 0


def test_values_come_from_any_framework(arena):
    for value in (torch.ones(3, 2), jax.numpy.ones((2, 3)), [[1.0, 1], [1, 1], [1, 1]]):
        arena["b"] = 0
        assert arena.write_input_f32("b", "bf16", value) == 6
        assert arena.read_output_f32("b", "bf16", 7).tolist() == [1] * 6 + [0]


def test_more_than_the_slot_holds_is_not_read(arena):
    assert arena.read_output_f32("c", "bf16", 256).shape == (256,)
    with pytest.raises(rlx.ShapeError, match=r"257 elements of bfloat16.*'c'.*holds 256"):
        arena.read_output_f32("c", "bf16", 257)
    with pytest.raises(rlx.ShapeError):
        arena.read_output_f32("c", "bf16", -1)
    with pytest.raises(rlx.DTypeError, match="float64"):
        arena.write_input_f32("c", "bf16", np.ones(3))
    with pytest.raises(rlx.DTypeError):
        arena.write_input_f32("c", "no such", [1.0])
    assert not everything(arena).any()


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda a: a.buffer("x"), rlx.UnboundNameError, "'x' has no slot"),
        (lambda a: a.view("x"), rlx.UnboundNameError, "'x' has no slot"),
        (lambda a: a["x"], rlx.UnboundNameError, "'x' has no slot"),
        (lambda a: a.read("x"), rlx.UnboundNameError, "'x' has no slot"),
        (lambda a: a.write("x", np.ones(3)), rlx.UnboundNameError, "'x' has no slot"),
        (lambda a: a.__setitem__("x", 1), rlx.UnboundNameError, "'x' has no slot"),
        (lambda a: a.write_input_f32("x", "f32", [1]), rlx.UnboundNameError, "'x' has no slot"),
        (lambda a: a.read_output_f32("x", "f32", 1), rlx.UnboundNameError, "'x' has no slot"),
        (lambda a: a.view([1]), rlx.UnboundNameError, r"\[1\] has no slot"),
        (lambda a: a.read_output_f32("b", "f32", (1, 2)), rlx.ShapeError, r"\(1, 2\)"),
        (lambda a: a.write("b", np.ones(255, "f4")), rlx.ShapeError, r"\(255,\).*'b'"),
        (lambda a: a.write("b", np.ones(257, "f4")), rlx.ShapeError, r"\(257,\).*'b'"),
        (lambda a: a.write("a", np.ones(256, "f4")), rlx.ShapeError, r"\(16, 16\)"),
        (lambda a: a.write("raw", np.ones(65, "u1")), rlx.ShapeError, r"65 bytes.*'raw'.*has 64"),
        (lambda a: a.view("raw", "f32", (17,)), rlx.ShapeError, "68 bytes"),
        (lambda a: a.view("raw", "f32", (-1,)), rlx.ShapeError, "not negative"),
        (lambda a: a.view("raw", "f33"), rlx.DTypeError, "f33"),
        (lambda a: a.replan([("x", 4, 0, 1)]), rlx.PlanError, "list"),
        (lambda a: pickle.dumps(a), rlx.DTypeError, "does not pickle"),
        (lambda a: copy.deepcopy(a), rlx.DTypeError, "does not pickle"),
        (lambda a: a.buffer("b").close(), rlx.StaleViewError, "close the arena"),
        (lambda a: a.buffer("b")[:4].close(), rlx.StaleViewError, "close the arena"),
    ],
)
def test_bad_input_says_what_is_wrong_and_changes_nothing(arena, act, error, text):
    arena["w"] = np.ones((8, 8), np.float32)
    before = everything(arena)
    with pytest.raises(error, match=text):
        act(arena)
    assert (everything(arena) == before).all()
    assert (arena.read("b") == 0).all()


def test_an_arena_needs_a_plan_and_a_device_that_holds_it():
    with pytest.raises(rlx.PlanError, match="plan_memory"):
        Arena([("x", 4, 0, 1)])
    huge = rlx.plan_memory([("x", 1 << 60, 0, 1)])
    for backend in (None, "jax"):
        with pytest.raises(rlx.OutOfDeviceMemory, match="bytes were asked for on cpu"):
            Arena(huge, backend=backend)
    with pytest.raises(rlx.DeviceUnavailableError):
        Arena(small_plan(), "vulkan")
    with pytest.raises(rlx.DeviceUnavailableError, match="numpy does not see cuda:0"):
        Arena(small_plan(), "cuda:0", backend="numpy")


def test_a_dtype_that_its_framework_lacks_is_read_and_written_but_not_viewed():
    with FakeDevice() as fake:
        plan = rlx.plan_memory([typed("x", 8, 0, 1, "int4"), typed("y", 8, 0, 1)])
        with Arena(plan, fake.device) as arena:
            value = np.arange(-4, 4).astype(rlx.dtype("int4"))
            arena["x"] = value
            assert (arena.read("x") == value).all()
            assert (arena.read("y") == 0).all()


# --- stale views ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "replan", "grow"])
def test_what_was_taken_before_is_stale(arena, how):
    slot, part = arena.buffer("b"), arena.buffer("b")[:4]
    array = slot.jax()
    arena["b"] = np.ones(256, np.float32)
    numpy, place = arena.view("b"), arena.address
    plans = {"replan": small_plan(alignment=128), "grow": rlx.plan_memory([typed("b", 4096, 0, 1)])}
    if how == "reset":
        arena.reset()
    else:
        arena.replan(plans[how])
        assert arena.plan is plans[how]
    assert arena.generation == 1
    for stale in (slot, part):
        for act in (
            lambda b: b.numpy(),
            lambda b: b.torch(),
            lambda b: b.jax(),
            lambda b: b.copy_from(np.ones(b.shape, np.float32)),
            lambda b: b.update(lambda x: x),
            lambda b: b.read("numpy").__enter__(),
            lambda b: b[:2].numpy(),
        ):
            with pytest.raises(rlx.StaleViewError, match="before arena 't' was reset"):
                act(stale)
    assert array.is_deleted()
    fresh = arena.view("b")
    assert not fresh.any()
    assert not everything(arena).any()
    if how == "grow":
        assert fresh.shape == (4096,)
        assert (numpy == 1).all(), "the old memory lives as long as the view"
    else:
        assert arena.address == place
    fresh[:] = 2
    assert (arena.read("b") == 2).all()


def test_a_plan_that_does_not_fit_the_device_changes_nothing(arena):
    arena["b"] = np.ones(256, np.float32)
    slot, plan = arena.buffer("b"), arena.plan
    with pytest.raises(rlx.OutOfDeviceMemory):
        arena.replan(rlx.plan_memory([("x", 1 << 60, 0, 1)]))
    assert (arena.generation, arena.plan) == (0, plan)
    assert (slot.numpy() == 1).all()


def test_an_alias_of_a_jax_array_keeps_the_arena_from_being_reset(arena):
    arena["b"] = np.ones(256, np.float32)
    held = np.asarray(arena.buffer("b").jax())
    with pytest.raises(rlx.ZeroCopyError, match="held by"):
        arena.reset()
    assert arena.generation == 0
    assert (arena.buffer("b").numpy() == 1).all()
    assert (held == 1).all()
    del held
    gc.collect()
    arena.reset()
    assert not arena.read("b").any()


def test_a_reset_waits_for_scopes_of_other_threads(arena):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with arena.buffer("b").write("numpy") as n:
            entered.set()
            assert leave.wait(60)
            n[:] = 3
            return n.copy()

    holder = start(hold)
    assert entered.wait(60)
    resetting = start(arena.reset)
    assert not resetting.done()
    leave.set()
    assert (holder.result(60) == 3).all()
    resetting.result(60)
    assert not everything(arena).any()


def test_a_closed_arena_refuses_everything_and_views_keep_the_memory(arena):
    slot, view = arena.buffer("b"), arena.view("b")
    view[:] = 4
    arena.close()
    arena.close()
    assert arena.is_closed
    assert "closed" in repr(arena)
    for act in (
        lambda: arena.view("b"),
        lambda: arena.buffer("b"),
        lambda: arena.read("b"),
        lambda: arena.write("b", view),
        lambda: arena.write_input_f32("b", "f32", view),
        lambda: arena.read_output_f32("b", "f32", 1),
        lambda: arena.address,
        arena.reset,
        arena.check,
        lambda: arena.advance(1),
        lambda: arena.replan(small_plan()),
    ):
        with pytest.raises(rlx.ClosedHandleError, match="arena 't' is closed"):
            act()
    with pytest.raises(rlx.ClosedHandleError):
        slot.numpy()
    assert (view == 4).all()
    assert arena.byte_offset("b") == arena.plan.offset("b")


def test_memory_is_freed_with_the_last_view():
    device = rlx.Device("cpu")
    before = device.memory().in_use
    arena = Arena(rlx.plan_memory([("x", 1 << 20, 0, 1)]))
    view = arena.view("x")
    assert device.memory().in_use - before >= 1 << 20
    arena.close()
    reference = weakref.ref(arena)
    del arena
    gc.collect()
    assert reference() is None
    assert device.memory().in_use - before >= 1 << 20
    del view
    gc.collect()
    assert device.memory().in_use == before


def test_threads_share_one_slot():
    with Arena(rlx.plan_memory([typed(i, 16, 0, 1) for i in range(50)])) as arena:
        gate = threading.Barrier(8)

        def take():
            gate.wait()
            return [arena.buffer(i) for i in range(50)]

        found = [future.result(60) for future in [start(take) for _ in range(8)]]
        for same in zip(*found, strict=True):
            assert len({id(slot) for slot in same}) == 1


def test_a_forked_child_is_refused():
    out = run_python(
        """
        import os
        import rlx_driver as rlx
        plan = rlx.plan_memory([("x", 64, 0, 1), ("y", 64, 0, 1)])
        arena, untouched = rlx.Arena(plan), rlx.Arena(plan)
        slot = arena.buffer("x")
        acts = slot.numpy, lambda: arena.view("x"), lambda: arena.view("y"), untouched.reset
        pid = os.fork()
        if pid == 0:
            found = []
            for act in acts:
                try:
                    act()
                    found.append("worked")
                except rlx.StaleViewError as error:
                    found.append("spawn" in str(error))
            os._exit(0 if found == [True] * 4 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """
    )
    assert out.strip() == "0"


# --- memory of other kinds -----------------------------------------------------------------------


def test_a_device_with_streams_orders_slots_like_handles():
    with FakeDevice() as fake:
        plan = rlx.plan_memory([typed("x", 4, 0, 1), typed("y", 4, 2, 3), typed("z", 4, 0, 3)])
        with Arena(plan, fake.device) as arena:
            assert plan.offset("x") == plan.offset("y")
            tensor = arena.view("x")
            assert arena.view("x") is tensor
            assert address_of(tensor) == arena.address + arena.byte_offset("x")
            arena["z"] = np.full(4, 9, np.float32)
            side = fake.stream("side")
            side.hold()
            with side, arena.buffer("x").write("fake") as inside:
                inside.fill_(3)
            reader = arena.buffer("y").array("fake_functional")
            side.release()
            assert (np.asarray(fake_value(reader)) == 3).all()
            arena.buffer("y").update(lambda v: v + 1, framework="fake_functional")
            assert arena.read("x").tolist() == [4] * 4
            assert arena.write_input_f32("y", "f32", [1, 2, 3, 4, 5]) == 4
            assert arena.read_output_f32("y", "f32", 4).tolist() == [1, 2, 3, 4]
            assert arena.read("z").tolist() == [9] * 4
            slot = arena.buffer("x")
            arena.reset()
            with pytest.raises(rlx.StaleViewError):
                slot.array("fake")
            assert arena.read("z").tolist() == [0] * 4


def address_of(array):
    return array.address


def fake_value(array):
    return array.read() if hasattr(array, "read") else array


def test_memory_without_views_is_read_and_written_in_place(tpu):
    with Arena(small_plan(), tpu, name="t") as arena:
        place = arena.address
        value = np.arange(256, dtype=np.float32)
        arena["b"] = value
        arena["w"] = jax.numpy.ones((8, 8))
        assert (arena.read("b") == value).all()
        assert arena.write_input_f32("c", "bf16", np.ones(300, np.float32)) == 256
        assert arena.read_output_f32("c", "bf16", 3).tolist() == [1, 1, 1]
        assert (arena.read("w") == 1).all()
        with pytest.raises(rlx.ShapeError):
            arena.write("b", np.ones(3, np.float32))
        for act in (lambda: arena.view("b"), lambda: arena.buffer("b")):
            with pytest.raises(rlx.ZeroCopyError, match=r"read\(\) and write\(\)"):
                act()
        assert arena.address == place
        arena.reset()
        assert not arena.read("b").any()
        assert arena.address == place
        arena.replan(rlx.plan_memory([typed("x", 100_000, 0, 1)]))
        arena["x"] = np.ones(100_000, np.float32)
        assert arena.read("x").sum() == 100_000
        with pytest.raises(rlx.ZeroCopyError, match="debug"):
            Arena(small_plan(), tpu, debug=True)


def test_an_update_of_another_thread_is_seen(arena):
    in_thread(arena.write, "b", np.ones(256, np.float32))
    assert (arena.view("b") == 1).all()


def test_a_race_on_a_slot_is_found_by_the_checker():
    plan = rlx.plan_memory([typed("x", 64, 0, 1), typed("y", 64, 2, 3)])

    def race(arena):
        with rlx.checking():
            held = arena.buffer("x").jax()
            arena.view("y")[:] = 1  # by hand, where a JAX array lies
            arena["y"] = np.ones(64, np.float32)
            arena.reset()
            assert held.is_deleted()

    with Arena(plan) as arena, pytest.raises(rlx.RaceError) as caught:
        race(arena)
    assert [found.kind for found in caught.value.races] == ["changed under a view"]


@pytest.mark.parametrize("backend", [None, "jax"])
def test_the_memory_report_lists_an_arena_and_its_slots(backend):
    with Arena(small_plan(), backend=backend, name="net") as arena:
        pool = next(r for r in rlx.memory_report()["cpu"].regions if r.label == "arena 'net'")
        assert (pool.kind, pool.in_use) == ("arena", arena.size_bytes)
        assert arena.size_bytes <= pool.reserved <= arena.size_bytes + 256
        sizes = {entry.name: entry.byte_size for entry in pool.entries}
        assert sizes == {node: arena.plan.interval(node).size for node in arena.plan.nodes}
        arena.replan(rlx.plan_memory([typed("x", 4096, 0, 1)]))
        pool = next(r for r in rlx.memory_report()["cpu"].regions if r.label == "arena 'net'")
        assert [entry.name for entry in pool.entries] == ["x"]
        assert pool.reserved >= 4 * 4096


def test_an_arena_that_stays_open_is_a_leak():
    kept = []
    with pytest.raises(rlx.LeakError, match="arena 'net' on cpu"), rlx.no_leaks():
        kept.append(Arena(small_plan(), name="net"))
    kept.pop().close()
    with rlx.no_leaks():
        Arena(small_plan()).close()


def test_slots_stand_in_trees_side_by_side_unless_they_overlap():
    plan = rlx.plan_memory(
        [typed("a", 64, 0, 2), typed("b", 64, 1, 3), typed("c", 64, 3, 4), typed("d", 64, 4, 4)]
    )
    with Arena(plan) as arena:
        tree = {"a": arena.buffer("a"), "b": arena.buffer("b")}
        places = {name: slot.address for name, slot in tree.items()}

        def step(state):
            return {"a": state["a"] + 1, "b": state["b"] + state["a"]}

        with rlx.no_copies():
            for _ in range(3):
                rlx.update(tree, step)
        assert arena.read("a").tolist() == [3] * 64
        assert arena.read("b").tolist() == [3] * 64
        assert {name: slot.address for name, slot in tree.items()} == places
        with rlx.write(tree, "torch") as views:
            views["a"].fill_(7)
        state = jax.jit(lambda s: step(s), donate_argnums=0)(rlx.views(tree, "jax"))
        with rlx.no_copies():
            rlx.commit(tree, state)
        assert (arena.read("a")[0], arena.read("b")[0]) == (8, 10)
        assert plan.offset("c") == plan.offset("a")
        with pytest.raises(rlx.DuplicateError):
            rlx.update({"a": arena.buffer("a"), "c": arena.buffer("c")}, lambda s: s)


@pytest.mark.parametrize("count", [6, 20_000])
@pytest.mark.parametrize("dtype", ["bf16", "f8_e4m3fn", "i32", "f32"])
def test_an_output_is_read_into_an_array_that_is_there(dtype, count):
    with Arena(rlx.plan_memory([("x", 4 * count, 0, 1), ("y", 256, 1, 2)])) as arena:
        values = np.arange(count, dtype=np.float32) % 16
        arena.write_input_f32("x", dtype, values)
        out = np.zeros((2, count // 2), np.float32)
        address = out.ctypes.data
        assert arena.read_output_f32("x", dtype, count, out) is out
        assert out.ctypes.data == address
        assert (out.reshape(-1) == values).all()
        assert isinstance(arena, rlx.DeviceArena)


def test_an_array_for_an_output_that_does_not_fit_is_left_alone(tpu):
    out = np.full(6, 7, np.float32)
    frozen = out.copy()
    frozen.flags.writeable = False
    for device in (None, tpu):
        with Arena(small_plan(), *([] if device is None else [device])) as arena:
            for error, count, place in (
                (rlx.ShapeError, 5, out),
                (rlx.ShapeError, 1000, out),
                (rlx.ShapeError, 3, out[::2]),
                (rlx.DTypeError, 3, out.view(np.uint32)[:3]),
                (rlx.DTypeError, 6, bytearray(24)),
                (rlx.ZeroCopyError, 6, frozen),
            ):
                with pytest.raises(error):
                    arena.read_output_f32("c", "bf16", count, place)
            with pytest.raises(rlx.UnboundNameError):
                arena.read_output_f32("nothing", "bf16", 6, out)
            assert (out == 7).all()
            arena.write_input_f32("c", "bf16", [1, 2, 3])
            place = np.zeros(3, np.float32)
            assert arena.read_output_f32("c", "bf16", 3, place) is place
            assert place.tolist() == [1, 2, 3]


@pytest.mark.parametrize("act", ["reset", "close"])
def test_a_scope_that_takes_a_new_slot_is_not_held_up_by_who_waits_for_it(act):
    plan = rlx.plan_memory([typed("x", 64, 0, 1), typed("y", 64, 0, 1), typed("z", 64, 2, 3)])
    arena = Arena(plan)
    entered, go_on = threading.Event(), threading.Event()

    def work():
        with arena.buffer("x").write("numpy") as x:
            entered.set()
            assert go_on.wait(60)
            x[:] = arena.view("y")[0] + 1  # a slot that nobody has used before
        return True

    worker = start(work)
    assert entered.wait(60)
    other = start(getattr(arena, act))
    from rlx_driver._locks import sleepers

    while not sleepers:  # until the other one waits for the scope
        threading.Event().wait(0.001)
    go_on.set()
    assert worker.result(60)
    other.result(60)
    if act == "reset":
        assert not arena.read("x").any()
        arena.close()
    assert arena.is_closed


def test_threads_that_reset_use_and_close_an_arena_end_well():
    plan = rlx.plan_memory([typed(i, 64, i, i + 1) for i in range(20)])
    arena = Arena(plan)
    gate = threading.Barrier(6)

    def use(k):
        gate.wait()
        for turn in range(60):
            try:
                arena.write((k + turn) % 20, np.full(64, k, np.float32))
                found = arena.read((k + turn) % 20)
                assert len(set(found.tolist())) == 1
            except rlx.StaleViewError:
                pass  # reset in the middle

    def reset():
        gate.wait()
        for _ in range(30):
            arena.reset()

    done = [start(use, k) for k in range(4)] + [start(reset) for _ in range(2)]
    for future in done:
        future.result(120)
    assert arena.generation == 60
    closing = [start(arena.close) for _ in range(4)]
    for future in closing:
        future.result(60)
    assert arena.is_closed


# --- several threads, streams, and ends in the middle --------------------------------------------


def test_who_holds_a_slot_may_take_another_one_while_a_reset_waits(arena):
    slot, entered, waits = arena.buffer("b"), threading.Event(), threading.Event()

    def hold():
        with slot.write("numpy") as inside:
            entered.set()
            assert waits.wait(60)
            inside[:] = arena.view("w")[0, 0] + 3  # made for the first time
            return inside.copy()

    holder = start(hold)
    assert entered.wait(60)
    resetting = start(arena.reset)
    while not slot._access.waiting:
        assert not resetting.done()
    waits.set()
    assert (holder.result(60) == 3).all()
    resetting.result(60)
    assert not everything(arena).any()


@pytest.mark.parametrize("scope", ["read", "write"])
@pytest.mark.parametrize("end", ["close", "reset", "grow"])
def test_an_arena_does_not_end_inside_of_a_scope_of_its_own(arena, scope, end):
    ends = {
        "close": arena.close,
        "reset": arena.reset,
        "grow": lambda: arena.replan(rlx.plan_memory([typed("b", 4096, 0, 1)])),
    }
    arena["b"] = 1.0
    slot, plan = arena.buffer("b"), arena.plan
    with getattr(slot, scope)("numpy") as inside:
        with pytest.raises(rlx.StaleViewError, match="scope"):
            ends[end]()
        assert (inside == 1).all()
    assert (arena.is_closed, arena.generation, arena.plan) == (False, 0, plan)
    assert arena.buffer("b") is slot
    ends[end]()
    assert arena.is_closed == (end == "close")
    with pytest.raises((rlx.StaleViewError, rlx.ClosedHandleError)):
        slot.numpy()


@pytest.mark.parametrize("kind", ["numpy", "jax", "tpu"])
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_call_that_comes_too_late_finds_no_memory(request, kind, end):
    place = {"backend": kind} if kind != "tpu" else {"device": request.getfixturevalue("tpu")}
    with Arena(small_plan(), name="t", **place) as arena:
        memory, offset = arena._memory, arena.byte_offset("b")
        getattr(arena, end)()
        value = np.ones(256, np.float32)
        for late in (
            lambda: memory.put(offset, value),
            lambda: memory.read(offset, value.dtype, value.shape),
            lambda: memory.write_f32(offset, 1024, value.dtype, value),
            lambda: memory.read_f32(offset, 1024, value.dtype, 256, None),
        ):
            with pytest.raises(
                rlx.ClosedHandleError if end == "close" else rlx.StaleViewError, match="arena 't'"
            ):
                late()
        if end == "reset":
            assert not arena.read("b").any()


@pytest.mark.parametrize("order", ["shared", "events", "host"])
@pytest.mark.parametrize("begin", ["made", "reset", "grown", "made, then reset"])
@pytest.mark.parametrize("write", ["scope", "update", "copy"])
def test_what_is_written_comes_after_the_zeros_of_another_stream(order, begin, write):
    plan = rlx.plan_memory([typed("x", 4, 0, 1), typed("y", 4, 2, 3)])
    with FakeDevice(order=order, on_host_wait="release") as fake:
        side = fake.stream("side")
        arena = None if "made" in begin else Arena(plan, fake.device)
        side.hold()
        with side:
            if arena is None:
                arena = Arena(plan, fake.device)
            elif begin == "reset":
                arena.reset()
            else:
                arena.replan(rlx.plan_memory([typed("x", 4, 0, 1), typed("z", 4000, 0, 1)]))
        if begin == "made, then reset":
            arena.reset()
        slot = arena.buffer("x")
        if write == "scope":
            with slot.write("fake") as inside:
                inside.fill_(5)
        elif write == "update":
            slot.update(lambda v: v + 5, framework="fake_functional")
        else:
            arena["x"] = np.full(4, 5, np.float32)
        side.release()
        assert arena.read("x").tolist() == [5] * 4
        arena.close()


def test_a_capture_is_no_place_to_reset(monkeypatch):
    from rlx_driver.backends.base import Recording

    with FakeDevice() as fake, Arena(small_plan(), fake.device) as arena:
        slot = arena.buffer("b")
        with monkeypatch.context() as inside:
            inside.setattr(type(slot._access.order), "recording", lambda self: Recording())
            for act in (arena.reset, lambda: arena.replan(small_plan(alignment=128))):
                with pytest.raises(rlx.CaptureError, match="inside a capture"):
                    act()
        assert arena.generation == 0
        slot.array("fake")


def test_slots_of_many_lengths_are_not_all_kept():
    with Arena(rlx.plan_memory([("x", 4096, 0, 1)])) as arena:
        for n in range(1, 1000):
            arena["x"] = np.full(n, n % 100, np.uint8)
            assert (arena.read("x", "u8", (n,)) == n % 100).all()
        assert len(arena._buffers) + len(arena._memory._raw) < 100


def test_numbers_fill_slots_of_every_memory(arena, tpu):
    with Arena(small_plan(), tpu) as other:
        for one in (arena, other):
            one["b"] = 2
            assert (one.read("b") == 2).all()
            one["c"] = np.float32(3)
            assert (one.read("c") == 3).all()
            with pytest.raises(rlx.DTypeError, match="3j does not fit"):
                one["b"] = 3j
            with pytest.raises(rlx.DTypeError, match="300 does not fit"):
                one["raw"] = 300
            assert (one.read("b") == 2).all()


def test_memory_without_views_is_not_touched_inside_a_trace(tpu):
    with Arena(small_plan(), tpu, name="t") as arena:
        value = np.ones(256, np.float32)
        for act in (
            lambda: arena.write("b", value),
            lambda: arena.read("b"),
            lambda: arena.write_input_f32("b", "f32", value),
            lambda: arena.reset(),
        ):

            def traced(x, act=act):
                act()
                return x

            with pytest.raises(rlx.StaleViewError, match="inside a trace"):
                jax.jit(traced)(1.0)
        assert not arena.read("b").any()
        place = arena.address
        with jax.disable_jit():
            arena["b"] = value
        assert (arena.read("b") == 1).all()
        assert arena.address == place


def test_memory_without_views_that_a_failed_write_lost_is_made_anew(tpu, monkeypatch):
    with Arena(small_plan(), tpu, name="t") as arena:

        def failing(self, memory, offset, value):
            memory.delete()
            raise RuntimeError("no more")

        with monkeypatch.context() as broken:
            broken.setattr(type(arena._memory.backend), "put", failing)
            with pytest.raises(RuntimeError, match="no more"):
                arena["b"] = np.ones(256, np.float32)
        for act in (lambda: arena.read("b"), lambda: arena.write("w", np.ones((8, 8), "f4"))):
            with pytest.raises(rlx.UpdateFailedError, match=r"reset\(\) makes it anew"):
                act()
        arena.reset()
        assert not arena.read("b").any()
