"""Sessions: state by name across runs, steps and frameworks; outputs that are the user's own."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from collections import namedtuple
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import rlx_driver as rlx
from buffer_support import address, in_thread
from rlx_driver.testing import FakeDevice

pytestmark = [pytest.mark.torch, pytest.mark.jax]

# How a step runs, as options of compile. "eager" of torch.compile traces, and compiles nothing.
WAYS = {
    "numpy": {"framework": "numpy"},
    "torch": {"framework": "torch", "eager": True},
    "dynamo": {"framework": "torch", "backend": "eager"},
    "jax": {"framework": "jax"},
}
ways = pytest.mark.parametrize("way", WAYS)
one = np.ones((2, 3), np.float32)


def as_numpy(x):
    return x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def add(*, x, total):
    return {"total": total + x}, total * 2


@pytest.fixture
def session():
    with rlx.Session() as session:
        yield session


@pytest.fixture
def total(session):
    return session.region.create({"total": ((2, 3), "f32")})["total"]


def inside(x, *buffers):
    """Whether an array lies in the memory of a buffer."""
    start = address(x)
    return any(b.address <= start < b.address + b.byte_size for b in buffers)


# --- run, bind, read -----------------------------------------------------------------------------


@ways
def test_a_step_runs_on_its_handles(session, total, way):
    step = session.compile(add, [total], **WAYS[way])
    step.bind_handle("total", one)
    where = total.address
    for expected in (2, 22, 42):
        out = step.run(x=10.0)
        np.testing.assert_array_equal(as_numpy(out), np.full((2, 3), expected, np.float32))
    assert step.handle("total") is total
    assert total.address == where
    now = step.read_handle("total")
    assert type(now) is np.ndarray
    assert now.dtype == np.float32
    np.testing.assert_array_equal(now, 31 * one)
    now[...] = 0
    assert total.numpy()[0, 0] == 31, "what was read is a copy"


@pytest.mark.parametrize("start", WAYS)
@ways
def test_a_session_goes_on_in_another_framework(session, total, start, way):
    first = session.compile(add, [total], **WAYS[start])
    first.bind_handle("total", 0)
    first.run(x=one)
    where = total.address
    with rlx.ledger.record() as record:
        second = session.compile(add, ["total"], **WAYS[way])
        second.run(x=2.0)
        first.run(x=3.0)
    assert "bind_handle" not in record.counts.reasons
    np.testing.assert_array_equal(second.read_handle("total"), 6 * one)
    assert total.address == where


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "buffer"])
@ways
def test_binding_and_inputs_take_arrays_of_any_framework(session, total, framework, way):
    make = {
        "numpy": np.array,
        "torch": torch.tensor,
        "jax": jnp.array,
        "buffer": lambda x: rlx.Buffer.from_array(x, copy=True),
    }[framework]
    step = session.compile(add, [total], **WAYS[way])
    initial = make(one * 3)
    step.bind_handle("total", initial)
    if framework in ("numpy", "torch"):
        initial[...] = 99  # it was copied
    step.run(x=make(one))
    np.testing.assert_array_equal(step.read_handle("total"), 4 * one)


@ways
def test_numpy_inputs_may_be_reused_at_once(session, way):
    big = np.ones((1024, 1024), np.float32)
    handle = rlx.BufferHandle("total", big.shape)
    step = session.compile(add, [handle], **WAYS[way])
    for x in (big, torch.ones(1024, 1024)):
        step.bind_handle("total", 0)
        for _ in range(3):
            x[...] = 1
            step.run(x=x)
            x[...] = 77
        assert (step.read_handle("total") == 3).all()


def test_jax_copies_nothing_and_torch_in_place_neither(session, total):
    def in_place(*, x, total):
        total.add_(x)
        return {}, None

    step = session.compile(add, [total])
    step.bind_handle("total", 0)
    eager = session.compile(in_place, [total], "torch", eager=True)
    compiled = session.compile(in_place, [total], "torch", backend="eager")
    with rlx.no_copies():
        step.run(x=1.0)
        eager.run(x=1.0)
        compiled.run(x=1.0)
    assert (step.read_handle("total") == 3).all()


@ways
def test_state_that_is_left_out_or_comes_back_is_unchanged(session, way):
    a, b, c = session.region.create(dict.fromkeys("abc", ((4,), "f32"))).values()

    def step(*, a, b, c):
        return {"c": c + a, "b": b}, None

    compiled = session.compile(step, [a, b, c], **WAYS[way])
    for name, value in zip("abc", (1, 2, 3), strict=True):
        compiled.bind_handle(name, value)
    compiled.run()
    compiled.run()
    assert [compiled.read_handle(n)[0] for n in "abc"] == [1, 2, 5]


@ways
def test_handles_may_be_swapped(session, way):
    a, b = session.region.create({"a": (4, "f32"), "b": (4, "f32")}).values()
    swap = session.compile(lambda a, b: ({"a": b, "b": a}, None), [a, b], **WAYS[way])
    swap.bind_handle("a", 1)
    swap.bind_handle("b", 2)
    places = a.address, b.address
    swap.run()
    assert (swap.read_handle("a")[0], swap.read_handle("b")[0]) == (2, 1)
    assert (a.address, b.address) == places


@ways
def test_the_structure_of_the_outputs_is_kept(session, total, way):
    pair = namedtuple("pair", "first second")

    def step(total):
        return {}, {"a": [total.sum(), None], "b": pair(total + 1, (total + 2,))}

    compiled = session.compile(step, [total], **WAYS[way])
    compiled.bind_handle("total", 1)
    out = compiled.run()
    assert list(out) == ["a", "b"]
    assert out["a"][1] is None
    assert type(out["b"]) is pair
    assert float(out["a"][0]) == 6
    assert as_numpy(out["b"].second[0])[0, 0] == 3


@ways
def test_several_steps_share_handles_by_name(session, way):
    def fill(*, a, b, value):
        return {"a": a + value, "b": b - value}, None

    def read(b):
        return {}, b.sum()

    writer = session.compile(fill, {"a": (3, "f32"), "b": (3, "f32")}, **WAYS[way])
    for name in "ab":
        writer.bind_handle(name, 0)
    reader = session.compile(read, **WAYS[way])
    assert reader.handle("b") is writer.handle("b")
    assert list(reader.handles) == ["b"], "only what the step takes"
    writer.run(value=2.0)
    assert float(reader.run()) == -6


@ways
def test_a_step_without_handles_and_one_with_any_names(session, way):
    pure = session.compile(lambda x: ({}, x + 1), [], **WAYS[way])
    assert float(as_numpy(pure.run(x=np.float32(2)))) == 3

    def general(**names):
        names = dict(names)
        total = names.pop("total")
        return {"total": total + sum(names.values())}, None

    anything = session.compile(general, {"total": (2, "f32")}, **WAYS[way])
    anything.bind_handle("total", 0)
    anything.run(a=1.0, b=2.0)
    anything.run(b=2.0, a=1.0)
    assert (anything.read_handle("total") == 6).all()


@ways
def test_a_handle_the_step_does_not_use_and_defaults(session, way):
    def step(*, a, b, scale=3.0):
        return {"a": a + scale}, None

    compiled = session.compile(step, {"a": ((), "f32"), "b": ((2,), "i32")}, **WAYS[way])
    compiled.bind_handle("a", 0)
    compiled.bind_handle("b", 7)
    compiled.run()
    compiled.run(scale=1.0)
    assert compiled.read_handle("a") == 4
    assert compiled.read_handle("b").tolist() == [7, 7]


# --- trees ---------------------------------------------------------------------------------------


@ways
def test_trees_of_handles(session, way):
    def step(*, x, cache):
        layers = [{"k": layer["k"] + x, "v": layer["v"] * 2} for layer in cache["layers"]]
        return {"cache": {"layers": layers, "n": cache["n"] + 1}}, cache["n"]

    layer = {"k": ((3,), "f32"), "v": np.ones(2, np.float32)}
    handles = {"cache": {"layers": [layer, layer], "n": ((), "i32")}}
    compiled = session.compile(step, handles, **WAYS[way])
    tree = compiled.handle("cache")
    assert tree["layers"][1]["k"] is session.region["cache.layers.1.k"]
    assert {leaf.name for leaf in session.region} == {
        f"cache.{n}" for n in ("layers.0.k", "layers.0.v", "layers.1.k", "layers.1.v", "n")
    }
    with pytest.raises(rlx.UnboundNameError):
        compiled.run(x=1.0)
    start = {"k": np.zeros(3, np.float32), "v": torch.ones(2)}
    compiled.bind_handle("cache", {"layers": [start, start], "n": 0})
    assert int(compiled.run(x=1.0)) == 0
    assert int(compiled.run(x=1.0)) == 1
    now = compiled.read_handle("cache")
    assert now["layers"][0]["k"].tolist() == [2, 2, 2]
    assert now["layers"][1]["v"].tolist() == [4, 4]
    assert int(now["n"]) == 2

    before = compiled.read_handle("cache")
    wrong = {"layers": [start, start]}, {"layers": [start], "n": 0}, [1, 2]
    for value in wrong:
        with pytest.raises(rlx.ShapeError, match="structure"):
            compiled.bind_handle("cache", value)
    short = {"k": np.zeros(3, np.float32), "v": np.ones(3, np.float32)}
    with pytest.raises(rlx.ShapeError, match="Nothing was changed"):
        compiled.bind_handle("cache", {"layers": [start, short], "n": np.array(9, np.int32)})
    jax.tree.map(np.testing.assert_array_equal, compiled.read_handle("cache"), before)


@ways
def test_the_tree_a_step_returns_is_checked(session, way):
    wanted = {"pair": [((2,), "f32"), ((2,), "f32")]}
    for news in ([1], (1, 2), {"a": 1}):
        step = session.compile(
            lambda pair, news=news: ({"pair": jax.tree.map(lambda _: pair[0] + 1, news)}, None),
            wanted,
            **WAYS[way],
        )
        step.bind_handle("pair", 5)
        with pytest.raises(rlx.ShapeError, match="structure"):
            step.run()
        assert [x.tolist() for x in step.read_handle("pair")] == [[5, 5], [5, 5]]


# --- an input in the place of a handle -----------------------------------------------------------


@ways
def test_an_input_stands_in_for_a_handle(session, total, way):
    step = session.compile(add, [total], **WAYS[way])
    step.bind_handle("total", 1)
    epoch = total.epoch
    with rlx.no_copies():
        out = step.run(
            x=1.0, total=torch.full((2, 3), 7.0) if "torch" in str(WAYS[way]) else one * 7
        )
    assert (as_numpy(out) == 14).all()
    assert total.epoch == epoch
    assert (step.read_handle("total") == 1).all(), "what the step returned for it was dropped"
    step.run(x=1.0, total=total)  # the handle itself is what it is anyway
    assert (step.read_handle("total") == 2).all()
    other = rlx.Buffer.from_array(one * 5, copy=True)
    assert (as_numpy(step.run(x=1.0, total=other)) == 10).all()
    assert (other.numpy() == 5).all()


@ways
def test_what_stands_in_has_to_fit(session, total, way):
    step = session.compile(add, [total], **WAYS[way])
    step.bind_handle("total", 1)
    with pytest.raises(rlx.ShapeError, match=r"\(2, 3\).*\(3,\)"):
        step.run(x=1.0, total=one[0])
    with pytest.raises(rlx.DTypeError, match="float64"):
        step.run(x=1.0, total=one.astype(np.float64))
    with pytest.raises(rlx.DTypeError, match="needs an array"):
        step.run(x=1.0, total=3.0)
    with pytest.raises(rlx.ShapeError, match="structure"):
        step.run(x=1.0, total=[one, one])
    assert (step.read_handle("total") == 1).all()


def test_one_that_stands_in_needs_no_value_in_the_handle(session, total):
    step = session.compile(add, [total], "numpy")
    assert (step.run(x=1.0, total=one) == 2).all()
    with pytest.raises(rlx.UnboundNameError):
        step.run(x=1.0)


# --- what has a value ----------------------------------------------------------------------------


@ways
def test_a_handle_without_a_value_is_refused(session, total, way):
    step = session.compile(add, [total], **WAYS[way])
    for attempt in (lambda: step.run(x=1.0), lambda: step.read_handle("total")):
        with pytest.raises(rlx.UnboundNameError, match="bind_handle"):
            attempt()
    assert total.epoch == 0
    step.bind_handle("total", 0)
    step.run(x=1.0)


@pytest.mark.parametrize(
    "fill",
    [
        lambda h: h.copy_from(one),
        lambda h: h.update(lambda x: x + 1),
        lambda h: h.numpy().fill(1),
        lambda h: h.torch().fill_(1),
    ],
    ids=["copy_from", "update", "numpy", "torch"],
)
def test_what_was_written_without_the_session_is_a_value(session, total, fill):
    fill(total)
    step = session.compile(add, [total], "numpy")
    assert (step.run(x=1.0) == 2).all()


def test_initial_arrays_and_numbers_are_values(session):
    initial = jnp.arange(3.0)
    step = session.compile(add, {"total": initial}, "numpy")
    step.run(x=1.0)
    assert step.read_handle("total").tolist() == [1, 2, 3]
    assert np.asarray(initial).tolist() == [0, 1, 2]
    step.bind_handle("total", True)
    assert step.read_handle("total").tolist() == [1, 1, 1]
    empty = session.compile(lambda e: ({}, e.size), {"e": ((0, 3), "f32")}, "numpy")
    empty.bind_handle("e", 0)
    assert empty.run() == 0


def test_binding_checks_before_it_writes(session, total):
    step = session.compile(add, [total], "numpy")
    step.bind_handle("total", 1)
    epoch = total.epoch
    for value, error in (
        (one[:1], rlx.ShapeError),
        (one.astype(np.float64), rlx.DTypeError),
        ([1, 2], rlx.ShapeError),
        ("text", rlx.DTypeError),
        (None, rlx.ShapeError),
        (1j, rlx.DTypeError),
        (torch.ones(2, 3, requires_grad=True), rlx.ZeroCopyError),
    ):
        with pytest.raises(error):
            step.bind_handle("total", value)
    assert total.epoch == epoch
    assert (total.numpy() == 1).all()
    step.bind_handle("total", one.astype(np.float64) * 2, cast=True)
    assert (total.numpy() == 2).all()
    with pytest.raises(rlx.UnboundNameError, match=r"no handle 'kv'; it has: total"):
        step.bind_handle("kv", 0)
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError):
        step.bind_handle("total", one)


# --- outputs -------------------------------------------------------------------------------------


@ways
def test_outputs_never_alias_handles(session, total, way):
    neighbour = session.region.create({"n": ((4,), "f32")})["n"]
    neighbour.numpy()[...] = 1

    def step(*, total, n):
        return {"total": total + 1}, (total, total[0], total.reshape(-1), [n], n + 0)

    compiled = session.compile(step, [total, neighbour], **WAYS[way])
    compiled.bind_handle("total", 1)
    out = compiled.run()
    leaves = jax.tree.leaves(out)
    assert not any(inside(leaf, total, neighbour) for leaf in leaves)
    assert all((as_numpy(leaf) == 1).all() for leaf in leaves), "they show the state that came in"
    compiled.bind_handle("total", 50)
    compiled.bind_handle("n", 50)
    assert all((as_numpy(leaf) == 1).all() for leaf in leaves)


@ways
def test_an_output_of_one_handle_is_its_own(session, total, way):
    compiled = session.compile(lambda total: ({}, total), [total], **WAYS[way])
    compiled.bind_handle("total", 4)
    with rlx.ledger.record() as record:
        out = compiled.run()
    counted = record.counts.reasons.get("an output aliased a buffer")
    assert (counted is None) if way == "jax" else (counted.copies, counted.bytes) == (1, 24)
    assert not inside(out, total)
    total.copy_from(one)
    assert (as_numpy(out) == 4).all()


@ways
def test_an_input_buffer_that_comes_back_is_copied(session, total, way):
    lent = rlx.Buffer.from_array(one * 3, copy=True)
    compiled = session.compile(lambda x, total: ({}, {"x": [x]}), [total], **WAYS[way])
    compiled.bind_handle("total", 0)
    out = compiled.run(x=lent)["x"][0]
    assert not inside(out, lent)
    with lent.write("numpy") as n:
        n[...] = 8
    assert (as_numpy(out) == 3).all()
    nested = session.compile(
        jax.jit(lambda x, total: ({}, x)) if way == "jax" else (lambda x, total: ({}, x[:1])),
        [total],
        **WAYS[way],
    )
    assert not inside(nested.run(x=lent), lent)


def test_jax_cannot_forward_what_is_not_the_users_own(session, total):
    lent = rlx.Buffer.from_array(one, copy=True)
    step = session.compile(lambda x, y, total: ({}, [x, y, total]), [total])
    step.bind_handle("total", 0)
    step.run(x=lent, y=jnp.ones(3))
    (plan,) = step._plans.values()
    program = jax.make_jaxpr(plan._program)(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(3))
    assert sum(equation.primitive.name == "copy" for equation in program.eqns) == 2


def test_jax_outputs_that_look_like_the_state_do_not_take_its_memory(session, total):
    step = session.compile(lambda total: ({"total": total * 2}, total + 1), [total])
    step.bind_handle("total", 3)
    with rlx.no_copies():
        out = step.run()
    assert (np.asarray(out) == 4).all()
    assert not inside(out, total)
    assert (total.numpy() == 6).all()


def test_torch_outputs_carry_no_graph_and_inference_mode_is_no_trouble(session, total):
    weight = torch.nn.Parameter(torch.ones(3))
    step = session.compile(
        lambda x, total: ({"total": total + x * weight}, (x * weight).sum()),
        [total],
        "torch",
        eager=True,
    )
    step.bind_handle("total", 0)
    out = step.run(x=torch.ones(2, 3, requires_grad=True))
    assert not out.requires_grad
    with torch.inference_mode():
        step.run(x=torch.ones(2, 3))
    with torch.no_grad():
        step.run(x=1.0)
    step.run(x=1.0)
    assert (total.numpy() == 4).all()
    total.torch().mul_(2)  # the view is a normal tensor
    assert not total.torch().requires_grad


# --- static arguments, recompilation -------------------------------------------------------------


@ways
def test_static_arguments(session, total, way):
    def step(*, total, how, times):
        for _ in range(times):
            total = total + 1 if how == "up" else total - 1
        return {"total": total}, None

    compiled = session.compile(step, [total], static_argnames=("how", "times"), **WAYS[way])
    compiled.bind_handle("total", 0)
    compiled.run(how="up", times=3)
    compiled.run(times=1, how="down")
    compiled.run(times=3, how="up")
    assert (compiled.read_handle("total") == 5).all()
    with pytest.raises(rlx.DTypeError, match="has no hash"):
        compiled.run(how=["up"], times=1)


def test_a_step_is_traced_once_and_again_for_new_shapes(session, total):
    traces = []

    def step(*, x, total):
        traces.append(x.shape)
        return {"total": total + x.sum()}, None

    compiled = session.compile(step, [total])
    compiled.bind_handle("total", 0)
    for n in (3, 3, 5, 3, 5):
        compiled.run(x=np.ones(n, np.float32))
    assert traces == [(3,), (5,)]
    assert (compiled.read_handle("total") == 19).all()
    other = session.compile(step, ["total"])
    other.run(x=np.ones(3, np.float32))
    assert (other.read_handle("total") == 22).all()


def test_many_sessions_of_one_step_are_no_recompilation():
    def step(total):
        return {"total": total + 1}, None

    for _ in range(4):  # warnings are errors
        with rlx.Session() as session:
            compiled = session.compile(step, {"total": (3, "f32")})
            compiled.bind_handle("total", 0)
            compiled.run()
            assert compiled.read_handle("total")[0] == 1


def test_new_shapes_at_every_run_are_warned_of_by_the_steps_name(session, total):
    def my_step(*, x, total):
        return {"total": total + x.sum()}, None

    compiled = session.compile(my_step, [total])
    compiled.bind_handle("total", 0)
    for n in (1, 2):
        compiled.run(x=np.ones(n, np.float32))
    with pytest.warns(rlx.RecompilationWarning, match="my_step"):
        compiled.run(x=np.ones(3, np.float32))


def test_jitted_and_compiled_steps_are_taken(session, total):
    jitted = session.compile(jax.jit(add), [total])
    jitted.bind_handle("total", 0)
    with rlx.no_copies():
        jitted.run(x=1.0)
    session.compile(torch.compile(add, backend="eager"), [total], "torch", eager=True).run(x=1.0)
    session.compile(functools.partial(add, x=1.0), [total], "numpy").run()
    assert (jitted.read_handle("total") == 3).all()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x, total):
        total += x * self.weight
        return {}, total.sum()


@pytest.mark.parametrize("options", [{"eager": True}, {"backend": "eager"}], ids=str)
def test_a_module_is_a_step(session, total, options):
    step = session.compile(Model(), [total], "torch", **options)
    step.bind_handle("total", 0)
    assert float(step.run(x=torch.ones(2, 3))) == 12


# --- torch.compile -------------------------------------------------------------------------------


class Counting:
    """A backend of torch.compile that counts what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counting():
    torch._dynamo.reset()
    return Counting()


def test_torch_compiles_once_and_mutates_in_place(session, total, counting):
    def step(*, x, total):
        total.add_(x)
        total[0].mul_(2)
        return {}, total[0]

    compiled = session.compile(step, [total], "torch", backend=counting)
    compiled.bind_handle("total", 1)
    with rlx.no_copies():
        for _ in range(5):
            out = compiled.run(x=torch.ones(2, 3))
    assert counting.graphs == 1
    assert not inside(out, total)
    assert compiled.read_handle("total")[:, 0].tolist() == [94, 6]
    assert (out.numpy() == 94).all()


def test_options_reach_torch_compile(session, total, monkeypatch):
    seen = {}

    def compile_(step, **options):
        seen.update(options)
        return step

    monkeypatch.setattr(torch, "compile", compile_)
    options = {"dynamic": True, "mode": "reduce-overhead", "fullgraph": True}
    step = session.compile(add, [total], "torch", **options)
    assert seen == options
    step.bind_handle("total", 1)
    assert (step.run(x=1.0).numpy() == 2).all()
    seen.clear()
    session.compile(add, [total], "torch")
    assert seen == {}


def test_dynamic_compiles_once_for_all_lengths(session, total, counting):
    def step(*, x, total):
        return {"total": total + x.sum()}, None

    compiled = session.compile(step, [total], "torch", backend=counting, dynamic=True)
    compiled.bind_handle("total", 0)
    for n in (4, 5, 7, 9):  # a length of the handle would be taken for the same
        compiled.run(x=torch.ones(n))
    assert counting.graphs == 1
    assert (compiled.read_handle("total") == 25).all()


def test_a_graph_break_is_no_trouble(session, total, counting):
    def step(*, x, total):
        total.add_(x)
        torch._dynamo.graph_break()
        total.mul_(2)
        return {}, None

    compiled = session.compile(step, [total], "torch", backend=counting)
    compiled.bind_handle("total", 0)
    compiled.run(x=1.0)
    compiled.run(x=1.0)
    assert counting.graphs >= 2
    assert (compiled.read_handle("total") == 6).all()


def test_handles_are_said_to_stay_where_they_are(session, total, monkeypatch):
    from rlx_driver.backends import _torch_compile

    marked = []
    monkeypatch.setattr(torch._dynamo, "mark_static_address", marked.append)
    step = session.compile(
        lambda x, total, pair: ({}, None),
        {"total": total, "pair": [((2,), "f32"), ((2,), "f32")]},
        "torch",
        backend="eager",
    )
    for name in ("total", "pair"):
        step.bind_handle(name, 0)
    marked.clear()  # the probe's
    step.run(x=1.0)
    step.run(x=1.0)
    places = [total.address, *(h.address for h in step.handle("pair"))]
    assert sorted(t.data_ptr() for t in marked) == sorted(places)

    def broken(tensor):
        raise RuntimeError("gone")

    monkeypatch.delattr(torch._dynamo, "mark_static_address")
    _torch_compile.probe_static_address()(torch.ones(1))
    _torch_compile.probe_static_address(broken)(torch.ones(1))
    again = session.compile(
        lambda x, total: ({"total": total + x}, None), [total], "torch", backend="eager"
    )
    again.run(x=2.0)
    assert (again.read_handle("total") == 2).all()


def test_captured_graphs_have_their_outputs_cloned(session, total):
    mine = torch.ones(3)
    step = session.compile(
        lambda total: ({}, [mine, 5]), [total], "torch", backend="eager", options=None
    )
    step.bind_handle("total", 0)
    assert step.run()[0] is mine
    from rlx_driver.backends._torch_compile import named_step

    call = named_step(lambda total: ({}, [mine, 5]), {"mode": "reduce-overhead"})
    call._compiled = lambda total: ({}, [mine, 5])  # as if it were a graph's
    out = call({"total": total.torch()}, {})[1]
    assert out[0] is not mine
    assert (out[0] == 1).all()
    assert out[1] == 5


@pytest.mark.parametrize(
    ("framework", "options", "says"),
    [
        ("torch", {"speed": 3}, "no option 'speed'"),
        ("torch", {"eager": True, "mode": "default"}, "would mean nothing"),
        ("torch", {"mode": "bogus"}, "torch.compile refuses"),
        ("jax", {"eager": True}, "jax takes no option 'eager'"),
        ("numpy", {"mode": "default"}, "numpy takes no option"),
    ],
)
def test_options_nobody_knows_are_refused(session, framework, options, says):
    with pytest.raises(rlx.DTypeError, match=says):
        session.compile(add, {"total": (3, "f32")}, framework, **options)
    assert not session.handles
    assert len(session.region) == 0


@pytest.mark.slow
def test_the_default_compiler_of_torch(session, total):
    torch._dynamo.reset()

    def step(*, x, total):
        total.add_(torch.sin(x))
        return {}, total.exp()

    compiled = session.compile(step, [total], "torch")
    compiled.bind_handle("total", 0)
    for _ in range(3):
        out = compiled.run(x=torch.ones(2, 3))
    np.testing.assert_allclose(total.numpy(), 3 * np.sin(one), rtol=1e-5)
    np.testing.assert_allclose(out.numpy(), np.exp(3 * np.sin(one)), rtol=1e-5)
    assert not inside(out, total)


# --- bad steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (lambda t: t + 1, "returns a pair"),
        (lambda t: ({"total": t},), "returns a pair"),
        (lambda t: [{"total": t}, None], "returns a pair"),
        (lambda t: (t + 1, None), "returns a pair"),
        (lambda t: (None, None), "returns a pair"),
        (lambda t: None, "returns a pair"),
        (lambda t: ({"totl": t}, None), "'totl', which is no handle"),
        (lambda t: ({"total": None}, None), "leave the entry out"),
        (lambda t: ({"total": t[0]}, None), "shape"),
        (lambda t: ({"total": [t, t]}, None), "structure|one array|list"),
    ],
)
@ways
def test_a_step_that_returns_the_wrong_thing_changes_nothing(session, total, way, result, says):
    compiled = session.compile(lambda total: result(total), [total], **WAYS[way])
    compiled.bind_handle("total", 3)
    with pytest.raises((rlx.ShapeError, rlx.DTypeError), match=says):
        compiled.run()
    assert (compiled.read_handle("total") == 3).all()
    good = session.compile(add, [total], **WAYS[way])
    good.run(x=1.0)
    assert (good.read_handle("total") == 4).all()


@ways
def test_a_step_that_returns_the_wrong_dtype_changes_nothing(session, total, way):
    def step(total):
        wide = {"numpy": "float16", "jax": jnp.float16}.get(WAYS[way]["framework"], torch.float16)
        return {"total": total.to(wide) if hasattr(total, "to") else total.astype(wide)}, None

    if way == "jax":
        step = lambda total: ({"total": total.astype(jnp.float16)}, None)  # noqa: E731
    compiled = session.compile(step, [total], **WAYS[way])
    compiled.bind_handle("total", 3)
    with pytest.raises(rlx.DTypeError, match="float16"):
        compiled.run()
    assert (compiled.read_handle("total") == 3).all()


@ways
def test_an_exception_in_the_step_is_the_users_own(session, total, way):
    def step(total):
        raise ZeroDivisionError("mine")

    compiled = session.compile(step, [total], **WAYS[way])
    compiled.bind_handle("total", 3)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="mine"):
            compiled.run()
    assert (compiled.read_handle("total") == 3).all()


@ways
def test_a_state_may_be_any_mapping(session, total, way):
    step = session.compile(
        lambda total: (MappingProxyType({"total": total + 1}), None), [total], **WAYS[way]
    )
    step.bind_handle("total", 0)
    step.run()
    assert (total.numpy() == 1).all()


# --- names ---------------------------------------------------------------------------------------


def test_names_have_to_match(session, total):
    with pytest.raises(rlx.UnboundNameError, match="takes no 'totl', which was given as a handle"):
        session.compile(add, {"totl": (3, "f32")})
    with pytest.raises(rlx.UnboundNameError, match="'how', which was given as static"):
        session.compile(add, [total], static_argnames="how")
    with pytest.raises(rlx.ShapeError, match="cannot be static"):
        session.compile(add, [total], static_argnames="total")
    with pytest.raises(rlx.UnboundNameError, match="no handle 'total'; it has: none"):
        session.compile(add, ["total"])
    assert not session.handles
    step = session.compile(add, [total], "numpy")
    step.bind_handle("total", 0)
    with pytest.raises(rlx.UnboundNameError, match=r"needs 'x': give it as run\(x=...\)"):
        step.run()
    with pytest.raises(rlx.UnboundNameError, match=r"takes no 'y'.*it takes: x, total"):
        step.run(x=1.0, y=2.0)
    with pytest.raises(rlx.DTypeError, match=r"by name: run\(x=...\)"):
        step.run(1.0)
    with pytest.raises(rlx.UnboundNameError, match="no handle 'x'; it has: total"):
        step.handle("x")
    with pytest.raises(KeyError):
        session.read_handle("x")
    assert (total.numpy() == 0).all()


def test_steps_that_cannot_be_called_by_name(session):
    def positional(x, /, total):
        return {}, None

    with pytest.raises(rlx.DTypeError, match="'x' by position alone"):
        session.compile(positional, {"total": (3, "f32")})
    with pytest.raises(rlx.DTypeError, match="a step is a function; got int"):
        session.compile(3, {"total": (3, "f32")})


@pytest.mark.parametrize(
    ("handles", "error"),
    [
        ("total", rlx.DTypeError),
        ([3], rlx.DTypeError),
        ([np.ones(3)], rlx.DTypeError),
        ({3: (3, "f32")}, rlx.DTypeError),
        ({"total": 3}, rlx.DTypeError),
        ({"total": []}, rlx.DTypeError),
        ({"total": (3, "f31")}, rlx.DTypeError),
        ({"total": (-3, "f32")}, rlx.ShapeError),
        ({"x": (3, "f32"), "total": ((1 << 60,), "f32")}, rlx.OutOfDeviceMemory),
        ({"x": np.ones(3), "total": torch.ones(3, requires_grad=True)}, rlx.DTypeError),
        ({"total": np.array(["a"])}, rlx.DTypeError),
    ],
    ids=str,
)
def test_bad_handles_make_no_handles(session, handles, error):
    with pytest.raises(error):
        session.compile(add, handles)
    assert not session.handles
    assert len(session.region) == 0


def test_initial_arrays_that_cannot_be_copied_make_no_handles(session):
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError):
        session.compile(add, {"total": one})
    assert not session.handles
    assert len(session.region) == 0
    step = session.compile(add, {"total": ((2, 3), "f32")}, "numpy")
    with pytest.raises(rlx.UnboundNameError):
        step.run(x=1.0)


def test_one_name_is_one_handle_in_a_session(session, total):
    step = session.compile(add, [total])
    assert session.compile(add, [total]).handle("total") is total
    assert session.compile(add, {"total": ((2, 3), "f32")}).handle("total") is total
    assert session.handle("total") is total
    with pytest.raises(rlx.DuplicateError, match="another handle 'total'"):
        session.compile(add, [rlx.BufferHandle("total", (2, 3))])
    with pytest.raises(rlx.DuplicateError, match="bind it"):
        session.compile(add, {"total": one})
    with pytest.raises(rlx.ShapeError):
        session.compile(add, {"total": ((2, 4), "f32")})
    with pytest.raises(rlx.DTypeError):
        session.compile(add, {"total": ((2, 3), "f16")})
    with pytest.raises(rlx.DuplicateError, match="twice"):
        session.compile(add, [total, total])
    with pytest.raises(rlx.DuplicateError, match="twice"):
        session.compile(lambda a, b: None, {"a": total, "b": total})
    assert session.handles == step.handles == {"total": total}


# --- lives ---------------------------------------------------------------------------------------


def test_closing_a_session_closes_what_it_made(total):
    own = rlx.Session()
    step = own.compile(lambda a, total: ({}, None), {"a": (3, "f32"), "total": total}, "numpy")
    for name in ("a", "total"):
        step.bind_handle(name, 0)
    step.run()
    made = step.handle("a")
    own.close()
    own.close()
    assert own.is_closed
    assert made.is_closed
    assert not total.is_closed
    for attempt in (
        step.run,
        lambda: step.bind_handle("total", 1),
        lambda: own.compile(add, [total]),
        lambda: step.read_handle("total"),
    ):
        with pytest.raises(rlx.ClosedHandleError, match="session is closed"):
            attempt()


@ways
def test_a_closed_handle_is_said_to_be_closed(session, total, way):
    step = session.compile(add, [total], **WAYS[way])
    step.bind_handle("total", 0)
    step.run(x=1.0)
    total.close()
    for attempt in (lambda: step.run(x=1.0), lambda: step.bind_handle("total", 0)):
        with pytest.raises(rlx.ClosedHandleError, match="total"):
            attempt()


def test_a_closed_handle_leaves_its_name_free(session, total):
    step = session.compile(add, [total], "numpy")
    step.bind_handle("total", 0)
    total.close()
    again = session.compile(add, {"total": ((4,), "i32")}, "numpy")
    with pytest.raises(rlx.UnboundNameError, match="no value yet"):
        again.run(x=1)
    again.bind_handle("total", 5)
    again.run(x=1)
    assert again.read_handle("total").tolist() == [6] * 4


def test_a_session_in_a_region_has_its_handles():
    with rlx.HandleRegion() as region:
        region.create({"total": ((2, 3), "f32")})
        session = rlx.Session(region=region)
        step = session.compile(add, framework="numpy")
        step.bind_handle("total", one)
        session.close()
        assert not region.is_closed
        assert (region["total"].numpy() == 1).all()
        with pytest.raises(rlx.DeviceUnavailableError):
            rlx.Session("cuda:0", region=region)
    with pytest.raises(rlx.ClosedHandleError):
        rlx.Session(region=region).compile(add)


def test_nothing_keeps_the_memory_of_a_dropped_session():
    session = rlx.Session()
    step = session.compile(add, {"total": (3, "f32")}, "torch", backend="eager")
    step.bind_handle("total", 0)
    step.run(x=1.0)
    jitted = session.compile(add, ["total"])
    jitted.run(x=1.0)
    gone = weakref.ref(step.handle("total"))
    session.close()
    del session, step, jitted
    gc.collect()
    assert gone() is None


def test_a_handle_on_another_device_is_refused(session):
    with FakeDevice() as fake:
        handle = rlx.BufferHandle("total", 3, device=fake.device)
        with pytest.raises(rlx.DeviceUnavailableError, match="lives on fpga"):
            session.compile(add, [handle], "numpy")
        away = rlx.Session(fake.device)
        with pytest.raises(rlx.DeviceUnavailableError, match="numpy does not see"):
            away.compile(add, [handle], "numpy")
    with pytest.raises(rlx.UnknownFrameworkError):
        session.compile(add, {"total": (3, "f32")}, "theano")


# --- other memory, other devices -----------------------------------------------------------------


@ways
def test_memory_that_jax_owns(way):
    with rlx.Session(backend="jax") as session:
        step = session.compile(add, {"total": ((2, 3), "f32")}, **WAYS[way])
        step.bind_handle("total", 1)
        where = step.handle("total").address
        for _ in range(3):
            step.run(x=one)
        assert (step.read_handle("total") == 4).all()
        assert step.handle("total").address == where


@pytest.mark.parametrize("framework", ["fake", "fake_functional"])
def test_a_fake_device(framework):
    with FakeDevice(on_host_wait="release") as fake, rlx.Session(fake.device) as session:

        def step(*, x, total):
            if framework == "fake":
                fake.launch(lambda t, y: np.add(t, y, out=t), total, x)
                return {}, None
            return {"total": total + x}, total * 2

        compiled = session.compile(step, {"total": ((2, 3), "f32")}, framework)
        compiled.bind_handle("total", one)
        compiled.run(x=one * 2)
        compiled.run(x=fake.array(one))
        assert (compiled.read_handle("total") == 4).all()


# --- threads, traces -----------------------------------------------------------------------------


@pytest.fixture
def impatient():
    """Switch between threads all the time, so that they meet in the middle of a first run."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@ways
def test_threads_lose_no_run(session, way, impatient):
    step = session.compile(lambda n: ({"n": n + 1}, n), {"n": ((), "i32")}, **WAYS[way])
    step.bind_handle("n", 0)
    seen = []

    def work():
        for _ in range(25):
            seen.append(int(step.run()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(100))
    assert step.read_handle("n") == 100


def test_threads_that_compile_at_once_get_one_program():
    from rlx_driver.backends._jax_steps import StepCache

    cache = StepCache()
    key = id(add), None, True, ()
    assert cache._add(key, add, *key[1:]) is cache._add(key, add, *key[1:])
    assert len(cache) == 1


def test_a_run_inside_its_own_step_or_a_trace_is_refused(session, total):
    step = session.compile(lambda total: (inner(), None), [total], "numpy")

    def inner():
        step.run()
        return {}

    step.bind_handle("total", 0)
    with pytest.raises(rlx.StaleViewError):
        step.run()
    traced = session.compile(add, [total])
    with pytest.raises(rlx.StaleViewError, match="trace"):
        jax.jit(lambda x: traced.run(x=x))(1.0)
    assert (total.numpy() == 0).all()


def test_jax_outputs_are_right_from_another_thread(session, total):
    step = session.compile(add, [total])
    step.bind_handle("total", 1)
    out = in_thread(step.run, x=1.0)
    assert (np.asarray(out) == 2).all()


@ways
def test_order_with_views_that_are_held(session, way):
    handle = rlx.BufferHandle("total", (256, 256))
    step = session.compile(add, [handle], **WAYS[way])
    step.bind_handle("total", 0)
    held = handle.torch()
    for value in range(1, 4):
        step.run(x=1.0)
        assert (held == value).all()


@pytest.mark.parametrize(
    "private",
    [None, lambda on: None, torch.manual_seed],
    ids=["missing", "idle", "another"],
)
def test_no_graph_is_recorded_whatever_torch_offers(private):
    from rlx_driver.backends._torch_grad import probe_no_grad

    for no_grad in (probe_no_grad(private), probe_no_grad()):
        for outside in (True, False):
            with torch.set_grad_enabled(outside):
                with pytest.raises(AssertionError), no_grad():
                    assert torch.is_grad_enabled()
                with no_grad(), no_grad():
                    assert not torch.is_grad_enabled()
                assert torch.is_grad_enabled() is outside
