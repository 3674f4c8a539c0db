"""Arenas on a CUDA device: shared, in order, in place. Needs a GPU."""

from __future__ import annotations

import numpy as np
import pytest

import rlx_driver as rlx
from arena_support import small_plan
from rlx_driver import Arena, Interval

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy

pytestmark = pytest.mark.cuda
DEVICE = "cuda:0"
COUNT = 1 << 20


def floats(node, count, first, last, dtype="f32", **more):
    size = count * rlx.dtype(dtype).itemsize
    return Interval(node, size, first, last, dtype=dtype, shape=(count,), **more)


def plus_one(x):
    return x + 1


def spin(matrix):
    """Keep a stream busy for some tens of milliseconds."""
    for _ in range(30):
        matrix = matrix @ matrix * 1e-4
    return matrix


@pytest.fixture(scope="module")
def heavy():
    """A big matrix for each framework, so that later work would overtake earlier work."""
    ours = torch.full((4096, 4096), 0.01, device="cuda")
    theirs = jnp.full((4096, 4096), 0.01, device=jax.devices("cuda")[0])
    spin(ours)
    jax.block_until_ready(jax.jit(spin)(theirs))
    torch.cuda.synchronize()
    return ours, theirs


@pytest.fixture
def arena():
    """An arena of torch's memory."""
    with Arena(small_plan(), DEVICE, name="t") as made:
        yield made


def test_torch_and_jax_share_a_slot_in_place(arena):
    slot = arena.buffer("a")
    view = arena.view("a")
    place = arena.address + arena.byte_offset("a")
    view.fill_(2)
    with rlx.no_copies():
        for _ in range(100):
            slot.update(plus_one)
    assert view.data_ptr() == slot.jax().unsafe_buffer_pointer() == slot.address == place
    assert (view == 102).all()
    assert (arena.view("flat") == 102).all()
    assert (arena.read("b") == 0).all()


def test_values_of_every_framework_go_in_and_out(arena):
    value = np.arange(256, dtype=np.float32)
    device = jax.devices("cuda")[0]
    for x in (
        value,
        torch.from_numpy(value),
        torch.from_numpy(value).cuda(),
        jax.device_put(value, device),
        rlx.Buffer.from_array(value, copy=True),
    ):
        arena["b"] = 0
        arena["b"] = x
        assert (arena.read("b") == value).all()
    arena.write("c", value.astype(np.float64), cast=True)
    assert arena.read("c").astype(np.float32)[:5].tolist() == [0, 1, 2, 3, 4]


def test_floats_go_in_and_out_by_value(arena):
    for dtype in ("bf16", "f16", "f8_e4m3fn", "i8", "f32"):
        values = np.array([0, 1, -2, 1.5, 3], np.float32)
        expected = values.astype(rlx.dtype(dtype)).astype(np.float32)
        assert arena.write_input_f32("b", dtype, values) == 5
        assert (arena.read_output_f32("b", dtype, 5) == expected).all()
    assert arena.write_input_f32("c", "bf16", torch.ones(300, device="cuda")) == 256
    assert not arena.read("w").any()


def test_dtypes_that_torch_lacks_are_read_and_written():
    with Arena(rlx.plan_memory([floats("x", 16, 0, 1, "float8_e4m3")]), DEVICE) as arena:
        value = np.arange(16).astype(rlx.dtype("float8_e4m3"))
        arena["x"] = value
        assert (arena.read("x") == value).all()
        with pytest.raises(rlx.ZeroCopyError, match=r"torch has no.*read\(\) and write\(\)"):
            arena.view("x")


def test_a_write_to_reused_bytes_waits_for_the_jax_reader_of_the_slot_before(heavy):
    _, theirs = heavy
    reader = jax.jit(lambda busy, x: x.sum() + 0 * spin(busy)[0, 0])
    plan = rlx.plan_memory([floats("early", COUNT, 0, 1), floats("late", COUNT, 2, 3)])
    assert plan.offset("early") == plan.offset("late")
    zeros = torch.zeros(COUNT, device="cuda")
    reader(theirs, jnp.ones(COUNT)).block_until_ready()

    def control():
        t = torch.ones(COUNT, device="cuda")
        x = jnp.from_dlpack(t)
        torch.cuda.synchronize()
        got = reader(theirs, x)
        t.zero_()
        return float(got)

    assert any(control() != COUNT for _ in range(10)), "the control shows no race"
    with Arena(plan, DEVICE) as arena:
        for write in (
            lambda: arena.write("late", zeros),
            lambda: arena.write_input_f32("late", "f32", np.zeros(COUNT, np.float32)),
            lambda: arena.reset(),
        ):
            for _ in range(5):
                with arena.buffer("early").write("torch") as t:
                    t.fill_(1)
                got = reader(theirs, arena.buffer("early").jax())
                write()
                assert float(got) == COUNT


def test_torch_work_under_way_is_seen_by_what_comes_later(heavy):
    ours, _ = heavy
    plan = rlx.plan_memory([floats("x", COUNT, 0, 1)])
    with Arena(plan, DEVICE) as arena:
        for value in range(5):
            with arena.buffer("x").write("torch") as t:
                busy = spin(ours)
                t.copy_(busy.flatten()[:COUNT] * 0 + value)
            read = arena.read_output_f32 if value % 2 else arena.read
            found = read("x", "f32", COUNT)
            assert (found == value).all()
            assert float(jnp.sum(arena.buffer("x").jax())) == value * COUNT


def test_reset_and_replan_make_slots_stale_and_zero(arena):
    slot, view = arena.buffer("b"), arena.view("b")
    view.fill_(3)
    place = arena.address
    arena.reset()
    with pytest.raises(rlx.StaleViewError):
        slot.torch()
    assert arena.address == place
    assert not arena.read("b").any()
    arena.replan(rlx.plan_memory([floats("b", COUNT, 0, 1)]))
    assert arena.view("b").shape == (COUNT,)
    assert not arena.read("b").any()


def test_a_debug_arena_finds_a_write_behind_a_slot(arena):
    plan = rlx.plan_memory([floats("x", 16, 0, 1), floats("y", 16, 0, 3)])
    with Arena(plan, DEVICE, debug=True) as arena:
        arena.advance(0)
        x = arena.view("x")
        assert x.isnan().all()
        torch.as_strided(x, (20,), (1,))[17] = 0
        with pytest.raises(rlx.ArenaCorruptionError, match="guard bytes behind 'x'"):
            arena.check()
        arena.advance(2)
        assert x.isnan().all()
        x[3] = 1
        with pytest.raises(rlx.ArenaCorruptionError, match=r"'x'.*ended at step 1"):
            arena.read("y")


def test_memory_of_jax_on_a_gpu_is_read_and_written_in_place():
    with Arena(small_plan(), DEVICE, backend="jax") as arena:
        place = arena.address
        value = np.arange(256, dtype=np.float32)
        for turn in range(20):
            arena["b"] = value + turn
            assert arena.write_input_f32("c", "bf16", np.full(300, turn, np.float32)) == 256
        assert (arena.read("b") == value + 19).all()
        assert (arena.read_output_f32("c", "bf16", 256) == 19).all()
        assert not arena.read("w").any()
        assert arena.address == place
        with pytest.raises(rlx.ZeroCopyError, match="views"):
            arena.view("b")


def test_autograd_refuses_a_tensor_whose_bytes_were_reused():
    plan = rlx.plan_memory([floats("x", 4, 0, 1), floats("y", 4, 2, 3)])
    with Arena(plan, DEVICE) as arena:
        weight = torch.ones(4, requires_grad=True, device="cuda")
        loss = (weight * arena.buffer("x").torch()).sum()
        arena["y"] = np.ones(4, np.float32)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_captured_graph_works_on_slots_between_updates_of_jax(arena):
    arena.view("b").add_(0)  # so that torch has set itself up
    stream = rlx.command_stream(DEVICE)
    with stream.capture() as graph:
        arena.buffer("b").torch().mul_(2)
    for _ in range(3):
        arena.buffer("b").update(plus_one)
        graph.replay()
    assert (arena.read("b") == 14).all()
