"""Pytrees of JAX in handles: new ones, and those that torch or a file has filled."""

import collections

import numpy as np
import pytest

import rlx_driver as rlx
from support import address, must_run, x64

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from rlx_driver.integrations.jax import bind_pytree  # noqa: E402

pytestmark = pytest.mark.jax

State = collections.namedtuple("State", "count mu nothing")
OWNERS = [None, "jax"]


def params():
    return {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}}


def names_of(region):
    return [handle.name for handle in region]


# --- new handles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", OWNERS)
def test_a_tree_of_arrays_becomes_a_tree_of_handles(owner):
    region = rlx.HandleRegion("cpu", backend=owner)
    tree = params()
    handles = bind_pytree(tree, region)
    assert jax.tree.structure(handles) == jax.tree.structure(tree)
    assert names_of(region) == ["dense/bias", "dense/kernel"]
    assert handles["dense"]["kernel"] is region["dense/kernel"]
    views = rlx.views(handles, "jax")
    for path in ("kernel", "bias"):
        assert np.array_equal(views["dense"][path], tree["dense"][path])
        assert address(views["dense"][path]) == handles["dense"][path].address
        assert address(tree["dense"][path]) != handles["dense"][path].address
    del views
    rlx.update(handles, lambda tree: jax.tree.map(lambda x: x * 2, tree))
    assert handles["dense"]["kernel"].numpy()[1, 2] == 10
    assert tree["dense"]["kernel"][1, 2] == 5


def test_a_donating_jit_of_the_user_trains_in_place():
    region = rlx.HandleRegion()
    state = bind_pytree({"params": params(), "step": 0}, region)

    @jax.jit
    def cost(params, x):
        return jnp.sum(x @ params["dense"]["kernel"] + params["dense"]["bias"])

    def step(state, x):
        grads = jax.grad(cost)(state["params"], x)
        new = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
        return {"params": new, "step": state["step"] + 1}, 1

    x, plain = jnp.ones((1, 2)), {"params": params(), "step": jnp.int32(0)}
    home = [h.address for h in region]
    donating = jax.jit(step, donate_argnums=0)
    with rlx.no_copies():
        for _ in range(3):
            new, _ = donating(rlx.views(state, "jax"), x)
            rlx.commit(state, new)
            rlx.update(state, step, x, has_aux=True)
    for _ in range(6):
        plain, _ = jax.jit(step)(plain, x)
    assert home == [h.address for h in region]
    jax.tree.map(lambda h, p: np.testing.assert_array_equal(h.numpy(), p), state, plain)


def test_leaves_of_every_kind():
    kept = rlx.BufferHandle("elsewhere", 2)
    strided, empty = np.arange(4.0, dtype=np.float32)[::2], np.zeros((0, 2), np.int8)
    tree = State(3, [strided, np.float32(1.5), True, 0.25, 1j, kept, empty], None)
    region = rlx.HandleRegion()
    handles = bind_pytree(tree, region, prefix="s")
    assert isinstance(handles, State)
    assert handles.nothing is None
    assert handles.mu[5] is kept
    assert {h.name: (h.dtype.name, h.shape) for h in region} == {
        "s/count": ("int32", ()),
        "s/mu/0": ("float32", (2,)),
        "s/mu/1": ("float32", ()),
        "s/mu/2": ("bool", ()),
        "s/mu/3": ("float32", ()),
        "s/mu/4": ("complex64", ()),
        "s/mu/6": ("int8", (0, 2)),
    }
    assert handles.count.numpy() == 3
    assert handles.mu[0].numpy().tolist() == [0, 2]
    assert handles.mu[3].numpy() == 0.25
    rlx.update(handles, lambda s: s._replace(count=s.count + 1))
    assert handles.count.numpy() == 4


def test_wide_dtypes_need_x64():
    region = rlx.HandleRegion()
    with pytest.raises(rlx.DTypeError, match=r"the leaf 'w' cannot be seen by JAX.*x64"):
        bind_pytree({"w": np.zeros(3)}, region)
    with x64():
        handles = bind_pytree({"w": np.zeros(3), "n": 2**40}, region)
        rlx.update(handles, lambda t: {"w": t["w"] + 1, "n": t["n"] + 1})
        assert handles["n"].numpy() == 2**40 + 1
        assert handles["w"].dtype == np.float64


def test_one_array_and_an_empty_tree():
    region = rlx.HandleRegion()
    assert bind_pytree(jnp.ones(3), region, prefix="w") is region["w"]
    assert bind_pytree({"a": None, "b": []}, region) == {"a": None, "b": []}
    with pytest.raises(rlx.DTypeError, match="needs a name"):
        bind_pytree(jnp.ones(3), region)
    assert names_of(region) == ["w"]


# --- names ---------------------------------------------------------------------------------------


def test_names_by_a_mapping_of_beginnings():
    tree = {"adam": {"mu": {"w": jnp.ones(2), "wide": jnp.ones(2)}, "mute": jnp.ones(1)}}
    region = rlx.HandleRegion()
    bind_pytree(tree, region, names={"adam": "a", "adam/mu": "adam/exp_avg", "adam/mu/w": "x"})
    assert names_of(region) == ["x", "adam/exp_avg/wide", "a/mute"]
    region = rlx.HandleRegion()
    bind_pytree(tree, region, names={"": "all", "adam/mu": ""})
    assert names_of(region) == ["w", "wide", "all/adam/mute"]


def test_names_by_a_function():
    region = rlx.HandleRegion()
    bind_pytree(params(), region, names=lambda path: path.replace("/", "."), prefix="p")
    assert names_of(region) == ["p/dense.bias", "p/dense.kernel"]


def test_names_that_fit_nothing_or_meet():
    region = rlx.HandleRegion()
    with pytest.raises(rlx.UnboundNameError, match="names has 'dens', and no leaf's path begins"):
        bind_pytree(params(), region, names={"dens": "d"})
    with pytest.raises(rlx.DuplicateError, match="two arrays would live in the handle 'same'"):
        bind_pytree(params(), region, names=lambda path: "same")
    with pytest.raises(rlx.DTypeError, match="names gave 7 for the leaf 'dense/kernel'"):
        bind_pytree(params(), region, names=lambda path: 7 if "k" in path else "ok")
    assert len(region) == 0


# --- handles that are there ----------------------------------------------------------------------


def test_handles_are_taken_over_with_what_they_hold():
    region = rlx.HandleRegion()
    made = region.create({"dense/kernel": ((2, 3), "f32")})["dense/kernel"]
    made.copy_from(np.full((2, 3), 9, np.float32))
    epoch = made.epoch
    handles = bind_pytree(params(), region)
    assert handles["dense"]["kernel"] is made
    assert (made.numpy() == 9).all()
    assert made.epoch == epoch
    assert (handles["dense"]["bias"].numpy() == 1).all()
    with pytest.raises(rlx.DuplicateError, match="'dense/bias' already"):
        bind_pytree(params(), region, take_over=False)


def test_shapes_alone_take_over():
    region = rlx.HandleRegion()
    shapes = jax.eval_shape(params)
    with pytest.raises(rlx.UnboundNameError, match="'dense/bias' has a shape and no value"):
        bind_pytree(shapes, region)
    first = bind_pytree(params(), region)
    again = bind_pytree(shapes, region)
    assert jax.tree.leaves(first) == jax.tree.leaves(again)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "says"),
    [
        ((3, 2), "f32", rlx.ShapeError, r"shape \(2, 3\) and the handle of that name \(3, 2\)"),
        ((2, 3), "bf16", rlx.DTypeError, "float32 and the handle of that name bfloat16"),
    ],
)
def test_handles_that_do_not_fit(shape, dtype, error, says):
    region = rlx.HandleRegion()
    rlx.BufferHandle("dense/kernel", shape, dtype, region=region)
    with pytest.raises(error, match=says):
        bind_pytree(params(), region)
    assert names_of(region) == ["dense/kernel"]


@pytest.mark.parametrize("owner", OWNERS)
def test_optax_goes_on_where_torch_has_stopped(owner):
    optax = pytest.importorskip("optax")
    torch = pytest.importorskip("torch")
    from rlx_driver.integrations.torch import bind_module, bind_optimizer

    torch.manual_seed(0)
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    optimizer, plain = (torch.optim.Adam(m.parameters(), 0.01) for m in (model, twin))
    region = rlx.HandleRegion("cpu", backend=owner)
    bind_module(model, region)
    bind_optimizer(optimizer, region)

    x = torch.linspace(-1, 1, 12).reshape(4, 3)

    def in_torch(each, stepper):
        stepper.zero_grad()
        (each(x) ** 2).sum().backward()
        stepper.step()

    transform = optax.adam(0.01)
    shapes = {
        "weight": jax.ShapeDtypeStruct((2, 3), "f4"),
        "bias": jax.ShapeDtypeStruct((2,), "f4"),
    }
    adam, rest = jax.eval_shape(transform.init, shapes)
    counts = dict.fromkeys(shapes, jax.ShapeDtypeStruct((), "f4"))
    state = bind_pytree(
        (shapes, adam._replace(count=counts)),
        region,
        names={"0": "", "1/count": "adam/step", "1/mu": "adam/exp_avg", "1/nu": "adam/exp_avg_sq"},
    )

    def in_jax(state, x):
        params, adam = state
        grads = jax.grad(lambda p: jnp.sum((x @ p["weight"].T + p["bias"]) ** 2))(params)
        counts, adam = adam.count, adam._replace(count=adam.count["bias"])
        updates, (adam, _) = transform.update(grads, (adam, rest), params)
        params = optax.apply_updates(params, updates)
        return params, adam._replace(count=dict.fromkeys(counts, adam.count))

    with rlx.no_copies():
        for _ in range(2):
            in_torch(model, optimizer)
            for _ in range(3):
                rlx.update(state, in_jax, x.numpy())
    for _ in range(8):
        in_torch(twin, plain)
    assert optimizer.state[model.weight]["step"] == 8
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(
                optimizer.state[mine][key], plain.state[theirs][key], rtol=1e-5, atol=1e-6
            )


def test_jax_trains_on_from_a_file_bit_by_bit(tmp_path):
    pytest.importorskip("safetensors")
    optax = pytest.importorskip("optax")
    transform = optax.adamw(0.01)

    def make(region, seed):
        keys = jax.random.split(jax.random.key(seed))
        params = {"a": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4,))}
        return bind_pytree({"params": params, "opt": transform.init(params)}, region)

    def step(state, x):
        def cost(p):
            return jnp.sum(jnp.tanh(x @ p["a"] + p["b"]) ** 2)

        value, grads = jax.value_and_grad(cost)(state["params"])
        updates, opt = transform.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, value

    def run(state):
        return [float(rlx.update(state, step, jnp.ones((2, 3)), has_aux=True)) for _ in range(3)]

    region = rlx.HandleRegion()
    state = make(region, 0)
    assert "opt/0/mu/a" in region
    run(state)
    region.save(tmp_path / "s.safetensors")
    expected = run(state)
    restored = rlx.HandleRegion()
    again = make(restored, 1)
    restored.restore(tmp_path / "s.safetensors")
    assert run(again) == expected
    loaded = rlx.HandleRegion.load(tmp_path / "s.safetensors")
    assert run(make(loaded, 2)) == expected  # taken over, values and all


# --- what is refused -----------------------------------------------------------------------------


def donated():
    x = jnp.ones(2)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    return x


BAD = {
    "text": (lambda: "adam", rlx.DTypeError, "the leaf 'bad' is a str"),
    "object": (object, rlx.DTypeError, "the leaf 'bad' is a object"),
    "function": (lambda: np.sin, rlx.DTypeError, "is a ufunc"),
    "objects": (lambda: np.array([None]), rlx.DTypeError, "object"),
    "key": (lambda: jax.random.key(0), rlx.DTypeError, "typed key.*key_data"),
    "key shape": (lambda: jax.eval_shape(lambda: jax.random.key(0)), rlx.DTypeError, "typed key"),
    "large": (lambda: 2**80, rlx.DTypeError, "the leaf 'bad'"),
    "donated": (donated, rlx.StaleViewError, "deleted or donated"),
}


@pytest.mark.parametrize(("build", "error", "says"), BAD.values(), ids=BAD.keys())
def test_leaves_that_no_handle_can_hold(build, error, says):
    region = rlx.HandleRegion()
    with pytest.raises(error, match=says):
        bind_pytree({"a": jnp.ones(3), "bad": build(), "z": jnp.ones(3)}, region)
    assert len(region) == 0


@pytest.mark.torch
def test_leaves_of_torch():
    torch = pytest.importorskip("torch")
    region = rlx.HandleRegion()
    with pytest.raises(rlx.ZeroCopyError, match=r"say .detach\(\) first"):
        bind_pytree({"w": torch.ones(2, requires_grad=True)}, region)
    handles = bind_pytree({"w": torch.arange(2.0)}, region)
    assert handles["w"].numpy().tolist() == [0, 1]


def test_inside_jit_nothing_is_bound():
    region = rlx.HandleRegion()
    with pytest.raises(rlx.StaleViewError, match="'w' is traced: bind outside of jit"):
        jax.jit(lambda x: bind_pytree({"w": x}, region))(jnp.ones(2))
    assert len(region) == 0


def test_regions_that_cannot_take_it():
    region = rlx.HandleRegion()
    region.close()
    with pytest.raises(rlx.ClosedHandleError):
        bind_pytree(params(), region)
    with pytest.raises(rlx.DTypeError, match="a HandleRegion; got dict"):
        bind_pytree(params(), {})
    region = rlx.HandleRegion()
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError):
        bind_pytree(params(), region)
    assert len(region) == 0


def test_arrays_of_another_device_are_refused():
    says = must_run(
        """
import jax, jax.numpy as jnp
import rlx_driver as rlx
from rlx_driver.integrations.jax import bind_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
region = rlx.HandleRegion()
there = jax.device_put(jnp.ones(4), jax.devices()[1])
spread = jax.device_put(
    jnp.ones(4), NamedSharding(Mesh(jax.devices(), ("x",)), PartitionSpec("x"))
)
for leaf in (there, spread):
    try:
        bind_pytree({"a": jnp.ones(2), "w": leaf}, region)
    except rlx.DriverError as error:
        print(type(error).__name__, error)
    assert len(region) == 0
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    lines = says.strip().splitlines()
    assert len(lines) == 2, says
    assert all("the leaf 'w'" in line and "Nothing was bound" in line for line in lines), says


def test_jax_is_bound_without_torch():
    out = must_run(
        """
import sys
import jax.numpy as jnp
import rlx_driver as rlx
from rlx_driver.integrations.jax import bind_pytree
handles = bind_pytree({"w": jnp.ones(2), "n": 1}, rlx.HandleRegion())
rlx.update(handles, lambda t: {"w": t["w"] + 1, "n": t["n"] + 1})
assert handles["n"].numpy() == 2
print("torch" in sys.modules)
"""
    )
    assert out.strip() == "False"


# --- a GPU ---------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_a_gpu_a_tree_is_updated_in_place():
    region = rlx.HandleRegion("cuda:0")
    gpu = jax.devices("cuda")[0]
    tree = {"w": jax.device_put(jnp.ones((4, 4)), gpu), "n": np.int32(3), "s": 0.5}
    state = bind_pytree(tree, region)
    home = [h.address for h in region]

    def step(t):
        return jax.tree.map(lambda x: x + 1, t)

    with rlx.no_copies():
        for _ in range(3):
            rlx.update(state, step)
    assert home == [h.address for h in region]
    assert state["w"].to_host().numpy().tolist() == [[4.0] * 4] * 4
    assert state["n"].to_host().numpy() == 6
    there = jax.device_put(jnp.ones(2), jax.devices("cpu")[0])
    with pytest.raises(rlx.DeviceUnavailableError, match="is on cpu and the region on cuda:0"):
        bind_pytree({"x": there}, region)
