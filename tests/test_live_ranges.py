"""Live ranges of torch.fx graphs and jaxprs: by hand where small, by execution where large."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest

import rlx_driver as rlx
from live_range_programs import leaves, run_fx, run_jaxpr
from support import installed, must_run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import tiny_gpt

if installed("torch"):
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx
if installed("jax"):
    import jax
    import jax.numpy as jnp
    from jax import lax

SMALL = tiny_gpt.Config(layers=2, heads=2, head_dim=8, hidden=24, max_seq=16, vocab=32)
F32 = np.dtype("f4")


def lives(intervals):
    """Return what is written by hand below: ``{node: (size, first, last, kind, alias)}``."""
    return {
        i.node: (i.size, i.first, i.last, i.kind)
        if i.alias_of is None
        else (i.size, i.first, i.last, i.kind, i.alias_of, i.alias_offset)
        for i in intervals
    }


def fx(*args, **kwargs):
    return lives(rlx.intervals_from_fx(*args, **kwargs))


def jaxpr(*args, **kwargs):
    return lives(rlx.intervals_from_jaxpr(*args, **kwargs))


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


# torch: lives by hand -------------------------------------------------------------------------


@pytest.mark.torch
def test_fx_inputs_and_result_of_an_operator_are_alive_together():
    found = rlx.intervals_from_fx(lambda x: (x * 2).exp().sin(), torch.ones(2, 3))
    assert found == [
        rlx.Interval("x_1", 24, 0, 1, dtype=F32, shape=(2, 3), kind="input"),
        rlx.Interval("mul", 24, 1, 2, dtype=F32, shape=(2, 3)),
        rlx.Interval("exp", 24, 2, 3, dtype=F32, shape=(2, 3)),
        rlx.Interval("sin", 24, 3, 4, dtype=F32, shape=(2, 3), kind="output"),
    ]


@pytest.mark.torch
def test_fx_views_and_writes_in_place_share_their_storage():
    def f(x):
        y = x.exp()
        y.view(8)[2:].add_(1)
        return y.t()[1].sum()

    assert fx(f, torch.ones(2, 4)) == {
        "x_1": (32, 0, 1, "input"),
        "exp": (32, 1, 7, "intermediate"),  # until its last view is
        "view": (32, 2, 3, "intermediate", "exp", 0),
        "slice_1": (24, 3, 4, "intermediate", "exp", 8),
        "add_": (24, 4, 4, "intermediate", "exp", 8),
        "t": (32, 5, 6, "intermediate", "exp", 0),
        # from the first element of column 1 to its last: 5 floats, those between included
        "select": (20, 6, 7, "intermediate", "exp", 4),
        "sum_1": (4, 7, 8, "output"),
    }


@pytest.mark.torch
def test_fx_dtype_and_shape_are_those_of_contiguous_tensors():
    def f(z):
        return z.conj().t().abs(), z.expand(3, 2, 4).real[0], z[:1]

    found = {i.node: (i.dtype, i.shape) for i in rlx.intervals_from_fx(f, torch.ones(2, 4) * 1j)}
    assert found["z_1"] == (np.dtype("c8"), (2, 4))
    assert found["_conj"] == found["t"] == found["expand"] == (None, None)
    assert found["slice_1"] == (np.dtype("c8"), (1, 4))


@pytest.mark.torch
def test_fx_results_of_one_node_belong_to_the_getitems():
    def f(x):
        values, _ = x.max(0)
        first, last = x.split(1, 0)
        return values + first, last

    assert fx(f, torch.ones(2, 4)) == {
        "x_1": (32, 0, 8, "input"),
        "getitem": (16, 1, 7, "intermediate"),
        "getitem_1": (32, 1, 3, "intermediate"),
        "getitem_2": (16, 4, 7, "intermediate", "x_1", 0),
        "getitem_3": (16, 4, 8, "output", "x_1", 16),
        "add": (16, 7, 8, "output"),
    }


@pytest.mark.torch
def test_fx_a_result_that_nobody_takes_needs_memory_all_the_same():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    largest = graph.call_function(torch.ops.aten.max.dim, (x, 0))
    graph.output(graph.call_function(__import__("operator").getitem, (largest, 0)))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert fx(module, torch.ones(2, 4)) == {
        "x": (32, 0, 1, "input"),
        "getitem": (16, 1, 3, "output"),
        "max_dim[1]": (32, 1, 1, "intermediate"),
    }


@pytest.mark.torch
def test_fx_an_input_returned_is_an_input_and_a_tensor_returned_twice_stands_once():
    def f(x, y):
        z = x + 1
        return x, z, z, [z.view(6)]

    assert fx(f, torch.ones(2, 3), torch.ones(5)) == {
        "x_1": (24, 0, 4, "input"),
        "y_1": (20, 1, 1, "input"),
        "add": (24, 2, 4, "output"),
        "view": (24, 3, 4, "output", "add", 0),
    }


@pytest.mark.torch
def test_fx_unused_nodes_live_for_one_step_and_numbers_need_no_memory():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    length = graph.call_method("size", (x, 0))
    graph.call_function(torch.ops.aten.exp.default, (x,))
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (x, length)))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert fx(module, torch.ones(3)) == {
        "x": (12, 0, 3, "input"),
        "exp_default": (12, 2, 2, "intermediate"),
        "mul_tensor": (12, 3, 4, "output"),
    }


@pytest.mark.torch
def test_fx_arguments_that_overlap_lie_in_one_storage():
    whole = torch.ones(100)
    assert fx(lambda x, y: x + y, whole[14:18], whole[12:16]) == {
        "x_1.storage": (24, 0, 2, "input"),
        "x_1": (16, 0, 2, "input", "x_1.storage", 8),
        "y_1": (16, 1, 2, "input", "x_1.storage", 0),
        "add": (16, 2, 3, "output"),
    }
    assert fx(lambda x, y: x + y, whole[4:8], whole[5:6])["y_1"][-2:] == ("x_1", 4)
    assert fx(lambda x: x + 1, whole[4:8])["x_1"] == (16, 0, 1, "input")  # what it covers, no more


@pytest.mark.torch
def test_fx_empty_tensors_have_no_bytes():
    found = fx(lambda x: (x[2:] * 2).view(0, 1, 3), torch.ones(2, 3))
    assert found["slice_1"] == (0, 1, 2, "intermediate", "x_1", 24)
    assert found["mul"][:1] == found["view"][:1] == (0,)
    assert rlx.plan_memory(rlx.intervals_from_fx(lambda x: x[2:] * 2, torch.ones(2, 3))).size == 24


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_fx_dtypes_that_numpy_lacks_have_bytes():
    half = rlx.intervals_from_fx(lambda x: x.clone(), torch.ones(3, dtype=torch.complex32))
    assert [(i.size, i.dtype, i.shape) for i in half] == [(12, None, None)] * 2
    sparse = rlx.intervals_from_fx(lambda s, x: x * 2, torch.eye(3).to_sparse(), torch.ones(2))
    assert (sparse[0].node, sparse[0].size, sparse[0].dtype) == ("s_1", 3 * (2 * 8 + 4), None)
    with pytest.raises(rlx.PlanError, match=r"'clone' is sparse.*depends on values"):
        fx(lambda s: s.clone(), torch.eye(3).to_sparse())
    bf16 = rlx.intervals_from_fx(lambda x: x.bfloat16(), torch.ones(3))
    assert (bf16[1].size, bf16[1].dtype) == (6, rlx.dtype("bf16"))


@pytest.mark.torch
def test_fx_tensors_that_a_function_or_module_holds_are_constants():
    table = torch.ones(4)
    linear = torch.nn.Linear(4, 4, bias=False)
    for program in (linear, lambda x: linear(x)):
        found = fx(program, torch.ones(2, 4))
        assert [v[:1] + v[3:] for v in found.values()][1:3] == [
            (64, "constant"),
            (64, "intermediate", "_param_constant0", 0),
        ]
    window = table[1:3]
    found = fx(lambda x: x[0] + table.neg_()[0] + window, torch.ones(4))
    assert found["_tensor_constant1"][-2:] == ("_tensor_constant0", 4)
    assert torch.equal(table, torch.ones(4))
    found = fx(lambda x: x + table + torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4))
    assert [name for name, life in found.items() if life[3] == "constant"] == [
        "_tensor_constant0",
        "_tensor_constant1",
    ]


# torch: what may be given ---------------------------------------------------------------------


@pytest.mark.torch
def test_fx_takes_pytrees_keywords_and_other_values():
    def f(tree, scale, *, rest):
        return tree["a"][0] * scale + rest[0] if rest[1] == "add" else None

    found = fx(f, {"a": [torch.ones(3)]}, 2.0, rest=(torch.ones(3), "add"))
    assert [life[3] for life in found.values()] == ["input", "input", "intermediate", "output"]
    assert fx(
        lambda x, flag, none: x * 2 if flag and none is None else x, torch.ones(3), True, None
    )


@pytest.mark.torch
def test_fx_own_containers_are_looked_into_where_torch_shows_no_pytrees(monkeypatch):
    from rlx_driver.integrations import _fakes

    def f(tree):
        return {"sum": tree["a"][0] + tree["b"][1], "rest": (tree["b"][0],)}

    tree = {"a": [torch.ones(3)], "b": (torch.ones(4), torch.ones(3))}
    registered = fx(f, tree)
    monkeypatch.setattr(_fakes, "_registered_map", None)
    monkeypatch.setattr(_fakes, "_registered_leaves", None)
    assert fx(f, tree) == registered
    assert len(registered) == 4


@pytest.mark.torch
def test_fx_takes_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    huge = torch.empty(2**40, device="meta")
    assert fx(lambda x: x + 1, huge)["add"] == (2**42, 1, 2, "output")
    with FakeTensorMode():
        model, x = torch.nn.Linear(2**20, 2**20), torch.ones(1, 2**20)
    assert fx(model, x)["_param_constant0"][0] == 2**42
    module = make_fx(lambda x: x.t() + 1, tracing_mode="fake")(torch.ones(2, 3))
    given = fx(module, torch.ones(2, 3))
    assert given == fx(module)
    with FakeTensorMode():
        assert fx(module, torch.ones(2, 3)) == given


@pytest.mark.torch
def test_fx_names_and_steps_are_those_of_the_graph():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True))
    module = torch.fx.symbolic_trace(model)
    expected = {
        "input_1": (32, 0, 1, "input"),
        "_0": (32, 1, 3, "intermediate"),
        "_1": (32, 2, 3, "output", "_0", 0),
    }
    assert fx(module, torch.ones(2, 4)) == fx(module, input=torch.ones(2, 4)) == expected
    graph = [
        node.name
        for node in make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(
            torch.ones(2, 4)
        ).graph.nodes
    ]
    assert list(fx(model, torch.ones(2, 4))) == graph[:-1]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11
def test_fx_exported_programs_even_from_a_file():
    x = torch.ones(2, 4)
    model = torch.nn.Linear(4, 2)
    model.forward = lambda input: torch.addmm(model.bias, input, model.weight.t())
    program = torch.export.export(model, (x,))
    expected = {
        "p_weight": (32, 0, 4, "constant"),
        "p_bias": (8, 1, 4, "constant"),
        "input": (32, 2, 4, "input"),
        "t": (32, 3, 4, "intermediate", "p_weight", 0),
        "addmm": (16, 4, 5, "output"),
    }
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file)):
        for found in (fx(each), fx(each, x)):
            assert found == expected
    with pytest.raises(rlx.PlanError, match=r"takes 1 values .*2 were given"):
        fx(program, x, x)


@pytest.mark.torch
def test_fx_symbolic_shapes_need_example_arguments():
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(torch.nn.ReLU(), (torch.ones(3, 4),), dynamic_shapes=({0: rows},))
    with pytest.raises(rlx.PlanError, match="depends on a symbol; pass example arguments"):
        fx(program)
    assert fx(program, torch.ones(7, 4))["relu"] == (112, 1, 2, "output")


# torch: nothing runs, nothing changes ---------------------------------------------------------


@pytest.mark.torch
def test_fx_leaves_parameters_buffers_gradients_and_the_generator_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.ones(2, 4)
    state = torch.get_rng_state()

    def train(x):
        x.mul_(2)
        model(x).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    kinds = [life[3] for life in fx(train, x).values()]
    assert kinds.count("output") == 4
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [parameter.grad for parameter in model.parameters()] == [None] * 4
    assert torch.equal(x, torch.ones(2, 4))
    assert torch.equal(state, torch.get_rng_state())
    model(x).sum().backward()
    kept = [parameter.grad.clone() for parameter in model.parameters()]
    fx(train, x)
    assert all(map(torch.equal, kept, [parameter.grad for parameter in model.parameters()]))


@pytest.mark.torch
def test_fx_a_function_may_change_the_shape_of_what_it_is_given():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def f(x):
        return x.t_()[0] + 1

    x = torch.ones(2, 3)
    with FakeTensorMode():
        fake = torch.ones(2, 3)
    expected = {
        "x_1": (24, 0, 3, "input"),
        "t_": (24, 1, 2, "intermediate", "x_1", 0),
        "select": (16, 2, 3, "intermediate", "x_1", 0),
        "add": (8, 3, 4, "output"),
    }
    assert fx(f, x) == fx(f, fake) == expected
    assert x.shape == fake.shape == (2, 3)


@pytest.mark.torch
def test_fx_fake_tensors_that_a_function_captures_are_one_constant():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        table = torch.ones(4)
    found = fx(lambda: table[1:] * table[:3])
    aliases = [life[-2:] for life in found.values() if len(life) == 6]
    assert set(aliases) == {("_tensor_constant0", 0), ("_tensor_constant0", 4)}


@pytest.mark.torch
def test_fx_an_operator_without_a_fake_rule_is_never_run():
    ran = []

    @torch.library.custom_op("rlx_live_ranges::secret", mutates_args=())
    def secret(x: torch.Tensor) -> torch.Tensor:
        ran.append(x)
        return x.clone()

    module = torch.fx.symbolic_trace(lambda x: secret(x) + 1)
    with pytest.raises(rlx.PlanError, match="secret"):
        fx(lambda x: secret(x) + 1, torch.ones(3))
    with pytest.raises(rlx.PlanError, match="secret"):
        fx(module, torch.ones(3))
    assert ran == []


@pytest.mark.torch
@pytest.mark.parametrize(
    ("f", "match"),
    [
        (lambda x: x * x.sum().item(), "_local_scalar_dense.*keep it a tensor"),
        (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense.*torch.where"),
        (lambda x: x.nonzero(), "nonzero.*fixed shape"),
        (lambda x: x[x > 0], "nonzero.*fixed shape"),
        (lambda x: torch.unique(x), "unique.*fixed shape"),
        (lambda x: x.clone().set_(x + 1) * 2, "another storage.*copy_"),
        (
            lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
            "takes functions.*branches",
        ),
        (3, "expected a function.*got int"),
    ],
)
def test_fx_says_what_cannot_be_traced(f, match):
    with pytest.raises(rlx.PlanError, match=match):
        fx(f, torch.ones(3))


@pytest.mark.torch
def test_fx_errors_of_the_program_and_of_the_call_say_so():
    with pytest.raises(KeyError, match="mine"):
        fx(lambda x: {}["mine"], torch.ones(3))
    module = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(rlx.PlanError, match=r"'x' carries no meta\['val'\]; pass example"):
        fx(module)
    with pytest.raises(rlx.PlanError, match="takes 1 values"):
        fx(module, torch.ones(3), torch.ones(3))
    with pytest.raises(rlx.PlanError, match="no argument was given for placeholder 'x'"):
        fx(module, y=torch.ones(3))


# torch: soundness by execution ----------------------------------------------------------------


def gpt_loss(params, tokens):
    logits = tiny_gpt.forward(params, tokens[:, :-1], None, 0, config=SMALL)[1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def gpt_loss_and_grads(params, tokens):
    params = {name: value.detach().requires_grad_() for name, value in params.items()}
    loss = gpt_loss(params, tokens)
    return loss, torch.autograd.grad(loss, list(params.values()))


def gpt_arguments():
    params = {name: torch.tensor(v) for name, v in tiny_gpt.init_params(SMALL).items()}
    return params, torch.arange(2 * SMALL.max_seq).reshape(2, -1) % SMALL.vocab


def train_module(x):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(inplace=True),
        torch.nn.Dropout(0.5),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.LayerNorm(72),
    )
    return model, x


def mess(x, y, z):
    a = x.exp()
    b = a.t()[1:]
    c, d = b.split([2, 1])
    c.mul_(2)
    e = torch.cat([c, d.expand(4, -1)]) + y[:, None]
    values, where = e.topk(2, dim=0)
    lower, upper = torch.aminmax(z[::2])
    y.add_(1)
    with torch.no_grad():
        f = torch.nn.functional.dropout(values.transpose(0, 1).reshape(-1), 0.5)
    g = torch.fft.fft(f).conj()
    return a, b, e.unsqueeze(0).permute(2, 0, 1), where, lower + upper, y, g.imag, g.real[1:], z


@pytest.mark.torch
@pytest.mark.parametrize("program", ["gpt", "mess", "module", "overlap"])
def test_fx_results_are_equal_inside_the_plan(program):
    if program == "gpt":
        f, args = gpt_loss_and_grads, gpt_arguments()
    elif program == "mess":
        f, args = mess, (torch.randn(3, 4), torch.randn(6), torch.randn(8))
    elif program == "overlap":
        base = torch.arange(12.0)
        f, args = (lambda x, y: ((x * y).relu_(), x.view(2, 3) - 1)), (base[4:10], base[2:8])
    else:
        torch.manual_seed(0)
        model = train_module(None)[0]
        leaf = torch.randn(2, 3, 8, 8)

        def f(x):
            loss = model(x).square().sum()
            return loss, torch.autograd.grad(loss, list(model.parameters()))

        args = (leaf,)
    trace = make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)
    module = trace(*args)
    flat = leaves(args)
    intervals = rlx.intervals_from_fx(module, *flat)
    assert intervals == rlx.intervals_from_fx(f, *args)  # deterministic, and one result both ways

    state = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(7)
    with torch.no_grad():
        plain = [
            each.clone()
            for each in leaves(torch.fx.Interpreter(module).run(*map(torch.clone, flat)))
        ]
    module.load_state_dict(state)
    torch.manual_seed(7)
    planned = run_fx(module, intervals, flat)
    assert len(plain) == len(planned) > 0
    assert all(torch.equal(*pair) for pair in zip(plain, planned, strict=True))


@pytest.mark.torch
def test_a_gpt_forward_and_backward_is_planned_in_three_lines():
    params, tokens = gpt_arguments()
    intervals = rlx.intervals_from_fx(gpt_loss_and_grads, params, tokens)
    plan = rlx.plan_memory(intervals)
    plan.validate()
    tensors = sum(i.size for i in intervals if i.alias_of is None)
    assert plan.size <= 1.01 * plan.lower_bound < tensors / 2
    assert sum(i.kind == "output" for i in intervals) == 1 + len(params)
    assert sum(i.alias_of is not None for i in intervals) > 100
    assert str(plan.size) in plan.report().replace(",", "")


# JAX: lives by hand ---------------------------------------------------------------------------


@pytest.mark.jax
def test_jaxpr_operands_and_result_of_an_equation_are_alive_together():
    found = rlx.intervals_from_jaxpr(lambda x: jnp.sin(jnp.exp(x * 2)), spec(2, 3))
    assert found == [
        rlx.Interval("input:0", 24, 0, 0, dtype=F32, shape=(2, 3), kind="input"),
        rlx.Interval("mul:0", 24, 0, 1, dtype=F32, shape=(2, 3)),
        rlx.Interval("exp:1", 24, 1, 2, dtype=F32, shape=(2, 3)),
        rlx.Interval("sin:2", 24, 2, 3, dtype=F32, shape=(2, 3), kind="output"),
    ]


@pytest.mark.jax
def test_jaxpr_calls_are_inlined_and_literals_need_no_memory():
    table = np.arange(4, dtype=np.float32)

    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))
    inner = jax.jit(lambda x, n: jax.nn.relu(x) + n + table)
    found = jaxpr(lambda x: jax.checkpoint(lambda y: square(inner(y, 1.0)))(x) + table, spec(4))
    constants = [name for name, life in found.items() if life[3] == "constant"]
    assert constants == ["const:0"]
    del found["const:0"]
    assert found == {
        "input:0": (16, 0, 0, "input"),
        "max:0": (16, 0, 2, "intermediate"),
        "convert_element_type:1": (4, 1, 2, "intermediate"),
        "add:2": (16, 2, 3, "intermediate"),
        "add:3": (16, 3, 4, "intermediate"),
        "mul:4": (16, 4, 5, "intermediate"),
        "add:5": (16, 5, 6, "output"),
    }


@pytest.mark.jax
def test_jaxpr_what_moves_no_bytes_is_an_alias():
    def f(x):
        y = jnp.exp(x)
        a = y.reshape(8)[:, None]
        b = lax.bitcast_convert_type(a, jnp.int32)
        return b.squeeze(1) + 1, lax.reshape(y, (4, 2), (1, 0)), jnp.broadcast_to(y, (3, 2, 4))

    assert jaxpr(f, spec(2, 4)) == {
        "input:0": (32, 0, 0, "input"),
        "exp:0": (32, 0, 7, "intermediate"),
        "reshape:1": (32, 1, 2, "intermediate", "exp:0", 0),
        "broadcast_in_dim:2": (32, 2, 3, "intermediate", "exp:0", 0),
        "bitcast_convert_type:3": (32, 3, 4, "intermediate", "exp:0", 0),
        "squeeze:4": (32, 4, 5, "intermediate", "exp:0", 0),
        "add:5": (32, 5, 8, "output"),
        "reshape:6": (32, 6, 8, "output"),  # it transposes
        "broadcast_in_dim:7": (96, 7, 8, "output"),
    }


@pytest.mark.jax
def test_jaxpr_outputs_share_memory_with_nothing_that_outlives_them():
    def f(x):
        y = x + 1
        return x, x.reshape(4), y.reshape(4), y, y, jnp.exp(y).reshape(4), 2.0

    assert jaxpr(f, spec(2, 2)) == {
        "input:0": (16, 0, 5, "input"),
        "add:0": (16, 0, 5, "output"),
        "reshape:1": (16, 1, 5, "output"),
        "reshape:2": (16, 2, 5, "output"),
        "exp:3": (16, 3, 5, "intermediate"),
        "reshape:4": (16, 4, 5, "output", "exp:3", 0),
        "output:6": (4, 5, 5, "output"),
    }
    assert jaxpr(lambda x: (x, x), spec(3)) == {"input:0": (12, 0, 0, "input")}


@pytest.mark.jax
def test_jaxpr_unused_values_live_for_one_step():
    closed = jax.make_jaxpr(lambda x, y: lax.split(jnp.exp(x), (1, 2))[0])(spec(3), spec(5))
    assert (
        lives(rlx.intervals_from_jaxpr(closed))
        == jaxpr(closed.jaxpr)
        == {
            "input:0": (12, 0, 0, "input"),
            "input:1": (20, 0, 0, "input"),
            "exp:0": (12, 0, 1, "intermediate"),
            "split:1.0": (4, 1, 2, "output"),
            "split:1.1": (8, 1, 1, "intermediate"),
        }
    )


@pytest.mark.jax
def test_jaxpr_bodies_have_a_scratch_at_their_step():
    def body(carry, x):
        y = jnp.tanh(carry) * x  # 16 each; x is a slice of 16
        return y, y.sum()

    found = jaxpr(lambda c, xs: lax.scan(body, c, xs), spec(4), spec(10, 4))
    # tanh, the slice and y, each of 16 bytes
    assert found["scan:0.scratch"] == (48, 0, 0, "intermediate")
    assert found["scan:0.0"] == (16, 0, 1, "output")
    assert found["scan:0.1"] == (40, 0, 1, "output")

    found = jaxpr(lambda x: lax.while_loop(lambda v: v.sum() < 9, lambda v: v * 2, x), spec(4))
    assert found["while:0.scratch"] == (16, 0, 0, "intermediate")

    branches = (lambda x: x * 2, lambda x: jnp.exp(x) + jnp.sin(x))
    found = jaxpr(lambda i, x: lax.switch(i, branches, x), spec(dtype="int32"), spec(4))
    (scratch,) = [name for name in found if name.endswith("scratch")]
    assert found[scratch][0] == 32  # the sum lies in the result

    nested = jaxpr(
        lambda c: lax.fori_loop(
            0, 3, lambda i, c: lax.scan(lambda c, _: (jnp.exp(jnp.sin(c)), None), c, length=2)[0], c
        ),
        spec(1024),
    )
    (scratch,) = [name for name in nested if name.endswith("scratch")]
    assert 3 * 4096 <= nested[scratch][0] <= 3 * 4096 + 64  # the inner carry and its scratch

    def scattered(x):
        return x.at[jnp.array([0, 1])].add(1.0)

    assert not any("scratch" in name for name in jaxpr(scattered, spec(4)))


@pytest.mark.jax
def test_jaxpr_keys_small_integers_and_references():
    found = rlx.intervals_from_jaxpr(lambda k: jax.random.split(k), jax.random.key(0))
    assert [(i.size, i.dtype, i.shape) for i in found] == [(8, None, None), (16, None, None)]
    found = rlx.intervals_from_jaxpr(lambda x: x + x, spec(5, dtype="int4"))
    assert [(i.size, str(i.dtype)) for i in found] == [(5, "int4")] * 2  # one byte each

    def count(x):
        ref = jax.new_ref(x)
        ref[...] += 1
        return ref[...]

    found = jaxpr(count, spec(3))
    reference = next(life for name, life in found.items() if name.startswith(("new_ref", "ref")))
    assert reference[2] == max(life[2] for life in found.values()) - 1


@pytest.mark.jax
def test_jaxpr_large_programs_and_shapes_need_no_memory():
    found = jaxpr(lambda x: jnp.exp(x) @ x, spec(2**20, 2**20))
    assert found["dot_general:1"] == (2**42, 1, 2, "output")

    def long(x):
        for _ in range(3000):
            x = jnp.sin(x * 2)
        return x

    found = rlx.intervals_from_jaxpr(long, spec(3))
    assert len({i.node for i in found}) == len(found) == 6001
    assert found == rlx.intervals_from_jaxpr(long, spec(3))


@pytest.mark.jax
@pytest.mark.parametrize(
    ("f", "match"),
    [
        (lambda x: x if x.sum() > 0 else -x, "depends on values.*lax.cond"),
        (lambda x: jnp.nonzero(x), "depends on values.*size= of nonzero"),
        (lambda x: x[x > 0], "depends on values.*size= of nonzero"),
        (lambda x: np.sin(x), "depends on values"),
        (lambda x: jnp.zeros(x[0].astype(int)), "depends on values.*shapes as Python ints"),
        (3, "expected a function or a jaxpr, got int"),
    ],
)
def test_jaxpr_says_what_cannot_be_traced(f, match):
    with pytest.raises(rlx.PlanError, match=f"(?s){match}"):
        jaxpr(f, spec(3))


@pytest.mark.jax
def test_jaxpr_errors_of_the_program_and_of_the_call_say_so():
    with pytest.raises(KeyError, match="mine"):
        jaxpr(lambda x: {}["mine"], spec(3))
    with pytest.raises(TypeError, match="incompatible shapes"):
        jaxpr(lambda x: x + jnp.ones(4), spec(3))
    with pytest.raises(rlx.PlanError, match=r"(?s)JAX cannot trace.*functools.partial"):
        jaxpr(lambda x, name: x, spec(3), "static")
    with pytest.raises(rlx.PlanError, match="leave the arguments out"):
        jaxpr(jax.make_jaxpr(jnp.sin)(spec(3)), spec(3))
    from jax import export

    (rows,) = export.symbolic_shape("rows")
    with pytest.raises(rlx.PlanError, match="depends on a symbol"):
        jaxpr(jnp.sin, spec(rows))


# JAX: soundness by execution ------------------------------------------------------------------


def jax_gpt_loss(params, tokens):
    logits = tiny_gpt.forward(params, tokens[:, :-1], None, 0, config=SMALL)[1]
    rows = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(rows, tokens[:, 1:, None], axis=-1).mean()


def jax_mess(x, w):
    table = np.arange(4, dtype=np.float32)

    @jax.checkpoint
    def layer(x):
        return jax.nn.gelu(x @ w) + table

    def body(carry, row):
        return jnp.tanh(carry @ w) + row, carry.sum()

    carry, sums = lax.scan(body, layer(x), layer(x).reshape(4, 1, 4))
    chosen = lax.cond(sums[0] > 0, lambda c: c * 2, lambda c: c, carry)
    low, high = jnp.split(chosen.reshape(-1), 2)
    return low[None] + high, chosen.ravel(), (jnp.sort(sums)), x.reshape(-1), jax.nn.relu(low)


@pytest.mark.jax
@pytest.mark.parametrize("program", ["gpt", "mess", "mess-grad"])
def test_jaxpr_results_are_equal_inside_the_plan(program):
    if program == "gpt":
        f = jax.value_and_grad(jax_gpt_loss)
        tokens = np.arange(2 * SMALL.max_seq, dtype=np.int32).reshape(2, -1) % SMALL.vocab
        args = ({n: jnp.asarray(v) for n, v in tiny_gpt.init_params(SMALL).items()}, tokens)
    else:
        generator = np.random.default_rng(0)
        args = tuple(generator.standard_normal((4, 4), np.float32) for _ in range(2))
        f = jax_mess
        if program == "mess-grad":
            f = jax.grad(lambda x, w: sum(each.sum() for each in jax_mess(x, w)), (0, 1))
    closed = jax.make_jaxpr(f)(*args)
    intervals = rlx.intervals_from_jaxpr(f, *args)
    assert intervals == rlx.intervals_from_jaxpr(closed)
    flat = jax.tree.leaves(args)
    plain = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *flat)
    planned = run_jaxpr(closed, intervals, flat)
    assert len(plain) == len(planned) > 0
    for ours, theirs in zip(planned, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
    plan = rlx.plan_memory(intervals)
    assert plan.size <= 1.01 * plan.lower_bound


# Neither --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "framework"), [("fx", "torch"), ("jaxpr", "jax")])
def test_a_missing_framework_is_named(name, framework):
    told = must_run(
        f"""
import sys
sys.modules["{framework}"] = None
import rlx_driver as rlx
try:
    rlx.intervals_from_{name}(lambda x: x, 1)
except rlx.MissingPackageError as error:
    print(error)
"""
    )
    assert f"install rlx-driver[{framework}]" in told
