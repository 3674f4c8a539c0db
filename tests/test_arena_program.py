"""The executor of the examples: functions of torch run in one arena as they run in torch."""

from __future__ import annotations

import operator
from pathlib import Path

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver.backends.numpy import array_at

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
aten = torch.ops.aten


@pytest.fixture
def arena_program(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))
    import arena_program

    return arena_program


def same(found, expected):
    """Assert that trees of tensors are equal in every bit, dtype and shape."""
    if not isinstance(expected, torch.Tensor):
        assert len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            same(found[key], expected[key])
        return
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def views(x):
    """Strides of every kind, and an operator that keeps them."""
    turned = (x + 1).permute(1, 0)
    kept = turned * 2
    part = kept[1:, ::2].unsqueeze(0).expand(3, -1, -1)
    return part.reshape(-1) - kept.t().reshape(-1)[:1], kept.exp()


def in_place(x):
    total = x * 2
    total.add_(1)
    total[1:3].mul_(-1)
    x.mul_(total)
    torch.sub(x, 1, out=total)
    return total, x.clone()


def several(x):
    values, indices = (x * 3).topk(2)
    low, high = x.chunk(2, dim=1)
    smallest, _ = low.min(dim=0)
    return {"values": values, "indices": indices, "rest": (high.sum(0), smallest)}


def normed(x):
    scale = torch.ones(x.shape[-1])
    return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, scale * 0.5) + 1


def dtypes(x):
    half = x.to(torch.bfloat16)
    whole = (x * 10).to(torch.int32)
    return half @ half.t(), whole.sum(), whole.bitwise_and(3) > 1, half.double().mean(dtype=x.dtype)


def made(x):
    """Tensors out of nothing, and numbers that torch keeps as tensors."""
    index = torch.arange(x.shape[1])
    mask = torch.where(index[None, :] > 2, x, -torch.inf)
    return mask.softmax(-1) + torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.full((2, 2), 7), index


def without_out(x):
    """Operators that torch has no ``out=`` kernel of."""
    return torch.roll(x, 1) + torch.flip(x, [0]), torch.nn.functional.embedding(x[0].long(), x)


def nothing_in_it(x):
    empty = x[:0] * 2
    return torch.cat([empty, x]), empty.sum(), (empty + 1).reshape(-1)


def returns_views(x):
    made = x * 2
    return made.t(), made[1], x[0], x


def unused(x):
    x.exp()
    x.topk(2)
    return x.sqrt()


ALL = [views, in_place, several, normed, dtypes, made, without_out, nothing_in_it, returns_views]
ALL += [unused]


def inputs(count=3):
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(4, 6, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("debug", [False, True], ids=["plain", "debug"])
@pytest.mark.parametrize("fn", ALL, ids=lambda fn: fn.__name__)
def test_a_function_gives_in_an_arena_what_it_gives_in_torch(arena_program, fn, debug):
    xs = inputs()
    program = arena_program.ArenaProgram(fn, xs[:1])
    with rlx.Arena(program.plan, debug=debug) as arena:
        for _ in range(2):  # the second time after a reset
            program.bind(arena)
            for x in xs:
                kept = x.clone()
                found = program(x)
                assert torch.equal(x, kept), "it works on a copy of its inputs"
                same(found, fn(kept))
            assert program.misplaced() == []
            arena.check()
            arena.reset()


@pytest.mark.parametrize(
    ("fn", "kinds", "copied"),
    [
        (views, {"view", "out"}, []),
        (in_place, {"view", "out", "in place"}, []),
        (several, {"view", "out"}, []),
        (made, {"view", "out"}, []),
        (normed, {"out", "copied"}, ["native_layer_norm"]),
        (without_out, {"view", "out", "copied"}, ["embedding", "flip", "roll"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_node_is_run_in_the_way_that_it_has(arena_program, fn, kinds, copied):
    program = arena_program.ArenaProgram(fn, inputs(1))
    with rlx.Arena(program.plan) as arena:
        program.bind(arena)
        assert {kind for kind, count in program.count().items() if count} == kinds
        assert program.copied() == [f"aten.{name}.default" for name in copied]
        assert sum(program.count().values()) == sum(
            node.op == "call_function" and node.target is not operator.getitem
            for node in program.graph.graph.nodes
        )
        for name, tensor in program.tensors.items():
            start = arena.address + arena.byte_offset(name)
            assert tensor.data_ptr() == start, name
            assert start + tensor.nbytes <= arena.address + arena.size_bytes or not tensor.nbytes


@pytest.mark.parametrize(
    ("op", "form", "outs"),
    [
        (aten.add.Tensor, aten.add.out, ["out"]),
        (aten.mean.dim, aten.mean.out, ["out"]),
        (aten.sum.dim_IntList, aten.sum.IntList_out, ["out"]),
        (aten.arange.start_step, aten.arange.start_out, ["out"]),
        (aten.topk.default, aten.topk.values, ["values", "indices"]),
        (aten.lt.Scalar, aten.lt.Scalar_out, ["out"]),
        (aten.div.Tensor_mode, aten.div.out_mode, ["out"]),  # not div.out, which has no mode
        (aten.clone.default, None, None),  # torch generated one, which computes elsewhere
        (aten.native_layer_norm.default, None, None),
        (aten.roll.default, None, None),
    ],
    ids=str,
)
def test_the_form_that_writes_into_a_tensor_is_found(arena_program, op, form, outs):
    found = arena_program.out_form(op)
    assert found == (None if form is None else (form, outs))


def test_a_decomposition_replaces_what_has_no_out_form(arena_program):
    def layer_norm(x, shape, weight, bias, epsilon):
        mean = x.mean(-1, keepdim=True)
        scale = (x.var(-1, keepdim=True, correction=0) + epsilon).rsqrt()
        return (x - mean) * scale * weight + bias, mean, scale

    xs = inputs(1)
    table = {aten.native_layer_norm.default: layer_norm}
    program = arena_program.ArenaProgram(normed, xs, decompositions=table)
    with rlx.Arena(program.plan) as arena:
        program.bind(arena)
        assert program.copied() == []
        torch.testing.assert_close(program(*xs), normed(*xs))


def test_held_tensors_stay_where_they_are(arena_program):
    def layer(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias).relu() + weight.t()[:1]

    (x,) = inputs(1)
    weight, bias = torch.rand(5, 6), torch.rand(5)
    program = arena_program.ArenaProgram(layer, [x], [weight, bias])
    lives = {life.node: life.alias_of or life.node for life in rlx.intervals_from_fx(program.graph)}
    _, *held = (node.name for node in program.graph.graph.nodes if node.op == "placeholder")
    assert len(held) == 2
    assert {node for node, root in lives.items() if root not in held} == set(program.plan)
    with rlx.Arena(program.plan) as arena:
        program.bind(arena)
        same(program(x), layer(x, weight, bias))
        weight.mul_(2)  # seen at once: it is the same memory
        same(program(x), layer(x, weight, bias))


def test_whoever_reads_the_output_in_jax_is_waited_for(arena_program):
    pytest.importorskip("jax")

    program = arena_program.ArenaProgram(lambda x: x * 2, inputs(1))
    ones, twos = torch.ones(4, 6), torch.full((4, 6), 2.0)
    with rlx.Arena(program.plan) as arena:
        program.bind(arena)
        program(ones)
        view = arena.buffer(program.returned[0]).jax()
        total = view.sum()
        program(twos)
        assert float(total) == 48
        assert view.is_deleted(), "it does not change under whoever holds it"
        assert float(arena.buffer(program.returned[0]).jax().sum()) == 96


def test_numpy_reads_the_output_where_it_lies(arena_program):
    program = arena_program.ArenaProgram(lambda x: x * 2, inputs(1))
    with rlx.Arena(program.plan) as arena, rlx.no_copies():
        program.bind(arena)
        out = program(torch.ones(4, 6))
        array = arena.view(program.returned[0])
        assert isinstance(array, np.ndarray)
        assert array.ctypes.data == out.data_ptr()
        assert (array == 2).all()


def test_a_debug_arena_notices_an_operator_that_leaves_its_slot(arena_program):
    program = arena_program.ArenaProgram(lambda x: (x.exp() + 1).sum(), inputs(1))
    with rlx.Arena(program.plan, debug=True) as arena:
        program.bind(arena)
        program(*inputs(1))
        step, call = program._calls[0]
        tensor = program.tensors["exp"]

        def too_far():
            call()
            end = tensor.data_ptr() + tensor.nbytes
            array_at(end, (4,), np.dtype(np.uint8), arena)[:] = 3

        program._calls[0] = (step, too_far)
        with pytest.raises(rlx.ArenaCorruptionError, match="exp"):
            program(*inputs(1))


def test_a_tensor_that_is_not_in_its_slot_is_noticed(arena_program, monkeypatch):
    program = arena_program.ArenaProgram(lambda x: x.exp().view(-1) + 1, inputs(1))
    with rlx.Arena(program.plan) as arena:
        program.bind(arena)
        assert set(program.tensors) == set(program.plan)
        assert program.misplaced() == []
        program.tensors["view"] = program.tensors["view"].clone()
        assert program.misplaced() == ["view"]
        monkeypatch.setattr(program, "_slot", lambda name, value: torch.zeros(value.shape))
        with pytest.raises(RuntimeError, match=r"do not lie where the plan has them: \['exp'"):
            program.bind(arena)


def test_what_it_cannot_do_is_said(arena_program):
    program = arena_program.ArenaProgram(lambda x: x.clone().t_() + 1, inputs(1))
    with (
        rlx.Arena(program.plan) as arena,
        pytest.raises(ValueError, match="changes a shape in place"),
    ):
        program.bind(arena)
    program = arena_program.ArenaProgram(torch.sin, inputs(1))
    other = rlx.plan_memory([("x", 8, 0, 1)])
    with rlx.Arena(other) as arena, pytest.raises(rlx.UnboundNameError):
        program.bind(arena)
    with rlx.Arena(program.plan) as arena:
        program.bind(arena)
        with pytest.raises(ValueError, match=r"made for torch\.float32\[4, 6\]"):
            program(torch.ones(6))
        with pytest.raises(ValueError, match=r"an input is torch\.float64"):
            program(torch.ones(4, 6, dtype=torch.float64))
