"""Modules, gradients and optimizers of torch in handles."""

import contextlib
import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest

import rlx_driver as rlx
from support import must_run, x64

torch = pytest.importorskip("torch")

from rlx_driver.integrations import _torch_memory  # noqa: E402
from rlx_driver.integrations.torch import (  # noqa: E402
    bind_gradients,
    bind_module,
    bind_optimizer,
    require_bound,
)

pytestmark = pytest.mark.torch

nn = torch.nn
OWNERS = [None, pytest.param("jax", marks=pytest.mark.jax)]


class Tied(nn.Module):
    """A small network with a tied weight, buffers of two dtypes and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False, True, True]), persistent=False)

    def forward(self, tokens):
        return self.head(self.layers(self.norm(self.embed(tokens)) * self.mask) * self.scale)


def make(seed=0):
    torch.manual_seed(seed)
    return Tied()


def tokens(seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 6, 16))


def cost(model, seed=0):
    return nn.functional.cross_entropy(model(tokens(seed)), tokens(seed + 100))


def train(model, optimizer, steps=5, start=0):
    """Train a few steps; give the costs."""
    costs = []
    for step in range(start, start + steps):
        loss = cost(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        costs.append(loss.item())
    return costs


def bits(tree):
    """Every tensor of a state dict, as bytes."""
    flat = {}

    def walk(path, value):
        if isinstance(value, torch.Tensor):
            plain = value.detach().contiguous()
            flat[path] = (plain.dtype, plain.shape, plain.reshape(-1).view(torch.uint8).tolist())
        elif isinstance(value, dict):
            for key, part in value.items():
                walk((*path, key), part)

    walk((), tree)
    return flat


def ones_added(tree):
    return {name: value + 1 for name, value in tree.items()}


def floats(handles):
    return {name: handle for name, handle in handles.items() if handle.dtype == np.float32}


# --- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", OWNERS)
def test_a_module_lives_in_handles_of_its_names(owner):
    model = make()
    before = dict(model.named_parameters())
    values = bits(model.state_dict())
    region = rlx.HandleRegion("cpu", backend=owner)
    with x64() if owner else contextlib.nullcontext():  # JAX owns no int64 without
        handles = bind_module(model, region)

    expected = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    assert sorted(handles) == sorted(expected)
    assert "layers.0.weight" in handles
    assert "norm.num_batches_tracked" in handles
    assert "mask" in handles
    assert {handle.name for handle in region} == set(handles)
    assert all(region[name] is handle for name, handle in handles.items())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.data_ptr() == handles[name].address == handles[name].torch().data_ptr()
        assert rlx.dtype(tensor.dtype) == handles[name].dtype
        assert tuple(tensor.shape) == handles[name].shape
        assert tensor.is_contiguous()
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not model.scale.requires_grad
    assert model.embed.weight.requires_grad
    assert bits(model.state_dict()) == values
    require_bound(model)


def test_a_tied_parameter_has_one_handle():
    model, region = make(), rlx.HandleRegion()
    handles = bind_module(model, region)
    assert "head.weight" not in handles
    assert model.head.weight is model.embed.weight
    assert model.head.weight.data_ptr() == handles["embed.weight"].address


def test_writes_are_seen_on_both_sides():
    model, region = make(), rlx.HandleRegion()
    handles = bind_module(model, region)
    weight = handles["layers.0.weight"]
    with torch.no_grad():
        model.layers[0].weight.fill_(3)
    assert (weight.numpy() == 3).all()
    with weight.write("numpy") as view:
        view[...] = 5
    assert (model.layers[0].weight == 5).all()
    model.train()
    model(tokens())
    assert handles["norm.num_batches_tracked"].numpy() == 1
    weight.copy_from(np.full(weight.shape, 7, np.float32))
    assert (model.layers[0].weight == 7).all()


@pytest.mark.jax
@pytest.mark.parametrize("owner", OWNERS)
def test_an_update_by_jax_reaches_a_held_module_in_order(owner):
    model, region = make(), rlx.HandleRegion("cpu", backend=owner)
    with x64() if owner else contextlib.nullcontext():  # JAX owns no int64 without
        handles = floats(bind_module(model, region))
    twin = make()
    home = {name: handle.address for name, handle in handles.items()}
    with rlx.no_copies():
        for _ in range(3):
            rlx.update(handles, ones_added)
            with torch.no_grad():
                for tensor in (*twin.parameters(), *twin.buffers()):
                    if tensor.dtype is torch.float32:
                        tensor += 1
    model.eval(), twin.eval()
    assert torch.equal(model(tokens()), twin(tokens()))
    assert home == {name: handle.address for name, handle in handles.items()}
    require_bound(model)


@pytest.mark.jax
def test_the_module_waits_for_an_update_on_its_way():
    import jax

    def slow(weights):
        value = weights["weight"]
        for _ in range(30):
            value = value @ weights["weight"] / 256
        return {"weight": value + 1}

    model, region = nn.Linear(256, 256, bias=False), rlx.HandleRegion()
    with torch.no_grad():
        model.weight.fill_(1)
    bound = bind_module(model, region)
    state = bind_optimizer(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), region)
    assert state["momentum_buffer"]["weight"].shape == (256, 256)
    jax.block_until_ready(jax.jit(slow)({"weight": np.ones((256, 256), np.float32)}))
    rlx.update(bound, slow)
    assert (model.weight == 2).all()  # the parameter itself: no call of the driver in between


@pytest.mark.jax
def test_a_backward_pass_over_changed_memory_raises():
    model, region = make(), rlx.HandleRegion()
    handles = bind_module(model, region)
    loss = cost(model)
    rlx.update({"w": handles["layers.2.weight"]}, ones_added)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    cost(model).backward()  # a new pass is fine


def test_what_autograd_saved_of_the_handle_notices_the_optimizer():
    """The other way round: the view and the parameter share one count of writes."""
    model, region = nn.Linear(3, 2), rlx.HandleRegion()
    handles = bind_module(model, region)
    x = torch.ones(2, 3, requires_grad=True)
    loss = (x * handles["weight"].torch()).sum()
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.jax
def test_gradients_after_an_update_are_those_of_the_new_values():
    model, region = nn.Linear(3, 2, bias=False), rlx.HandleRegion()
    handles = bind_module(model, region)
    rlx.update(handles, ones_added)
    twin = nn.Linear(3, 2, bias=False)
    twin.load_state_dict(model.state_dict())
    for each in (model, twin):
        (each(torch.ones(1, 3)) ** 2).sum().backward()
    assert torch.equal(model.weight.grad, twin.weight.grad)


@pytest.mark.jax
@pytest.mark.slow
def test_a_compiled_module_follows_its_handles():
    model, region = make().eval(), rlx.HandleRegion()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(tokens())
    handles = floats(bind_module(model, region))
    assert torch.equal(compiled(tokens()), model(tokens()))
    before = model(tokens())
    rlx.update(handles, ones_added)
    assert torch.equal(compiled(tokens()), model(tokens()))
    assert not torch.equal(model(tokens()), before)


def test_grad_hooks_and_grad_stay():
    model, region = make(), rlx.HandleRegion()
    cost(model).backward()
    grad, seen = model.embed.weight.grad, []
    model.embed.weight.register_post_accumulate_grad_hook(seen.append)
    bind_module(model, region)
    assert model.embed.weight.grad is grad
    cost(model).backward()
    assert seen == [model.embed.weight]
    assert model.embed.weight.grad is grad


def test_load_state_dict_fills_the_handles():
    model, region = make(), rlx.HandleRegion()
    handles = bind_module(model, region)
    home = {name: handle.address for name, handle in handles.items()}
    other = make(seed=1)
    model.load_state_dict(other.state_dict())
    require_bound(model)
    assert home == {name: handle.address for name, handle in handles.items()}
    for name, tensor in other.state_dict().items():
        if name in handles:
            assert np.array_equal(handles[name].numpy(), tensor.numpy())
    saved = model.state_dict()
    again = make(seed=2)
    again.load_state_dict(saved)
    assert bits(again.state_dict()) == bits(saved)


def test_a_state_dict_that_is_assigned_is_noticed():
    model, region = make(), rlx.HandleRegion()
    bind_module(model, region)
    model.load_state_dict(make(seed=1).state_dict(), assign=True)
    with pytest.raises(rlx.StaleViewError, match=r"'embed.weight'.*the handles do not see"):
        require_bound(model)


def test_an_assignment_is_noticed():
    model, region = make(), rlx.HandleRegion()
    bind_module(model, region)
    model.layers[0].weight = nn.Parameter(torch.zeros(5, 4))
    model.norm.running_mean.data = torch.zeros(4)
    with pytest.raises(rlx.StaleViewError) as caught:
        require_bound(model)
    assert "'layers.0.weight'" in str(caught.value)
    assert "'norm.running_mean'" in str(caught.value)
    assert "'norm.running_var'" not in str(caught.value)


CONVERSIONS = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "meta": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "share_memory": lambda m: m.share_memory(),
    "channels": lambda m: m.conv.to(memory_format=torch.channels_last),
    "child": lambda m: m.layers[0].half(),
    "overwrite": lambda m: overwriting(m),
}


def overwriting(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_a_conversion_is_refused_and_undone(convert):
    model, region = make(), rlx.HandleRegion()
    model.conv = nn.Conv2d(2, 3, 2)
    cost(model).backward()
    handles = bind_module(model, region)
    values = bits(model.state_dict())
    tensors = [*model.parameters(), *model.buffers()]
    grads = [(t.grad, None if t.grad is None else t.grad.clone()) for t in tensors]
    held = handles["embed.weight"].torch()
    with pytest.raises(rlx.ZeroCopyError, match="out of their handles"):
        convert(model)
    require_bound(model)
    assert bits(model.state_dict()) == values
    assert all(
        a is b for a, b in zip(tensors, (*model.parameters(), *model.buffers()), strict=True)
    )
    for tensor, (grad, was) in zip(tensors, grads, strict=True):
        assert tensor.grad is grad
        assert grad is None or (torch.equal(grad, was) and grad.dtype == was.dtype)
    with handles["embed.weight"].write("numpy") as view:
        view[...] = 9
    assert (model.embed.weight == 9).all()
    assert held is not None


def test_a_conversion_to_what_it_is_already_passes():
    model, region = make(), rlx.HandleRegion()
    bind_module(model, region)
    assert model.float() is model
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    assert model.requires_grad_(False) is model
    require_bound(model)


@pytest.mark.parametrize("close", ["region", "handles"])
def test_after_closing_the_module_keeps_its_memory_and_may_be_converted(close):
    model, region = make(), rlx.HandleRegion()
    handles = bind_module(model, region)
    expected = bits(model.state_dict())
    if close == "region":
        region.close()
    else:
        for handle in handles.values():
            handle.close()
    del handles, region
    gc.collect()
    assert bits(model.state_dict()) == expected
    with pytest.raises(rlx.StaleViewError, match="nothing of this Tied is bound"):
        require_bound(model)
    model.half()
    assert model.embed.weight.dtype is torch.float16
    model.float()
    bind_module(model, rlx.HandleRegion())  # and bound anew


def test_without_the_guard_a_conversion_is_noticed(monkeypatch):
    monkeypatch.setattr(_torch_memory, "CAN_GUARD", False)
    model, region = make(), rlx.HandleRegion()
    bind_module(model, region)
    model.half()
    with pytest.raises(rlx.StaleViewError, match=r"'embed.weight'.*other memory now"):
        require_bound(model)


def test_the_probe_of_the_guard():
    assert _torch_memory.probe_guard()

    class Deaf(nn.Linear):
        """Converts without asking for ``_apply``."""

        def half(self):
            self.weight.data = self.weight.data.half()

    assert not _torch_memory.probe_guard(Deaf)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_memory_of_their_own(how):
    model, region = make(), rlx.HandleRegion()
    handles = bind_module(model, region)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert bits(twin.state_dict()) == bits(model.state_dict())
    assert twin.head.weight is twin.embed.weight
    with torch.no_grad():
        twin.embed.weight.fill_(11)
    assert not (handles["embed.weight"].numpy() == 11).any()
    assert twin.half().embed.weight.dtype is torch.float16
    require_bound(model)
    with pytest.raises(rlx.StaleViewError, match="nothing"):
        require_bound(twin)


def test_a_bound_module_is_freed_by_its_count():
    model, region = make(), rlx.HandleRegion()
    bind_module(model, region)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert region["embed.weight"].numpy().shape == (6, 4)


def test_prefixes_put_two_modules_in_one_region():
    region = rlx.HandleRegion()
    bind_module(nn.Linear(2, 2), region, prefix="actor")
    bind_module(nn.Linear(2, 2), region, prefix="critic")
    assert [h.name for h in region] == [
        "actor/weight", "actor/bias", "critic/weight", "critic/bias",
    ]  # fmt: skip


def test_a_module_takes_over_what_a_region_holds():
    first, second, region = make(), make(seed=1), rlx.HandleRegion()
    bind_module(first, region)
    handles = bind_module(second, region, take_over=True)
    assert second.embed.weight.data_ptr() == handles["embed.weight"].address
    assert bits(second.state_dict()) == bits(first.state_dict())
    with handles["embed.weight"].write("numpy") as view:
        view[...] = 2
    assert (first.embed.weight == 2).all()
    assert (second.embed.weight == 2).all()


def test_layouts_become_compact():
    model = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    model.weight.data = model.weight.data.transpose(0, 0)
    expected = model.weight.detach().clone()
    handles = bind_module(model, rlx.HandleRegion())
    assert model.weight.is_contiguous()
    assert np.array_equal(handles["weight"].numpy(), expected.numpy())


def test_narrow_dtypes_and_empty_tensors():
    model = nn.Module()
    model.narrow = nn.Parameter(torch.arange(6.0).to(torch.bfloat16).reshape(2, 3))
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.complex = nn.Parameter(torch.tensor([1 + 2j]))
    model.nothing = None
    model.register_buffer("none", None)
    handles = bind_module(model, rlx.HandleRegion())
    assert {name: handle.dtype.name for name, handle in handles.items()} == {
        "narrow": "bfloat16", "empty": "float32", "complex": "complex64",
    }  # fmt: skip
    assert handles["narrow"].torch().tolist() == [[0, 1, 2], [3, 4, 5]]
    require_bound(model)


def test_inference_mode_does_not_poison_what_is_bound_in_it():
    model, region = make(), rlx.HandleRegion()
    with torch.inference_mode():
        handles = bind_module(model, region)
        bind_gradients(model, region)
        optimizer = torch.optim.Adam(trainable(model))
        state = bind_optimizer(optimizer, region)
    cost(model).backward()
    optimizer.step()
    with torch.no_grad():
        model.embed.weight.add_(1)
    handles["embed.weight"].torch().add_(1)
    state["exp_avg"]["embed.weight"].torch().add_(1)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("first", ["wrapped", "bound"])
@pytest.mark.parametrize("bucket_view", [False, True])
def test_data_parallel_training_is_as_before(first, bucket_view, tmp_path):
    """In a process of its own: a process group is global."""
    code = f"""
import torch
import rlx_driver as rlx
from rlx_driver.integrations.torch import bind_module, bind_optimizer, require_bound
torch.distributed.init_process_group(
    "gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)

def make(bind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    region = rlx.HandleRegion()
    if bind and {first!r} == "bound":
        bind_module(model, region)
    wrapped = torch.nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view={bucket_view})
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    if bind:
        if {first!r} == "wrapped":
            bind_module(model, region)
        bind_optimizer(optimizer, region)
        require_bound(wrapped)
    return wrapped, optimizer, region

mine, plain = make(True), make(False)
x = torch.linspace(-1, 1, 32).reshape(8, 4)
for model, optimizer, _ in (mine, plain):
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()
for a, b in zip(mine[0].parameters(), plain[0].parameters(), strict=True):
    assert torch.equal(a, b) and torch.equal(a.grad, b.grad)
require_bound(mine[0]), require_bound(mine[1])
assert mine[0].module[0].weight.data_ptr() == mine[2]["0.weight"].address
torch.distributed.destroy_process_group()
print("done")
"""
    assert "done" in must_run(code)


# --- what is refused -----------------------------------------------------------------------------


def quantised():
    # The quantised dtypes of torch are on their way out, and say so.
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def with_tensor(tensor, *, parameter=False):
    model = nn.Module()
    model.good = nn.Linear(2, 2)
    if parameter:
        model.bad = nn.Parameter(tensor, requires_grad=False)
    else:
        model.register_buffer("bad", tensor)
    return model


def overlapping():
    base = torch.zeros(8)
    model = nn.Module()
    model.a, model.b = nn.Parameter(base[:5]), nn.Parameter(base[4:])
    return model


def in_inference_mode():
    with torch.inference_mode():
        return torch.ones(2)


BAD = {
    "meta": (lambda: nn.Linear(2, 2, device="meta"), rlx.ZeroCopyError, "without memory"),
    "sparse": (lambda: with_tensor(torch.eye(3).to_sparse()), rlx.ZeroCopyError, "layout"),
    "quantised": (lambda: with_tensor(quantised()), rlx.DTypeError, "qint8"),
    "complex32": (
        lambda: with_tensor(torch.ones(2).to(torch.complex64).to(torch.complex32)),
        rlx.DTypeError, "complex32",
    ),
    "expanded": (
        lambda: with_tensor(torch.ones(1).expand(3), parameter=True),
        rlx.ZeroCopyError, "elements that share memory",
    ),
    "overlap": (overlapping, rlx.DuplicateError, "a and b are different tensors on the same"),
    "lazy": (lambda: nn.LazyLinear(3), rlx.DTypeError, "no shape before the first forward"),
    "inference": (lambda: with_tensor(in_inference_mode()), rlx.ZeroCopyError, "inference mode"),
    "no module": (lambda: {"w": 1}, rlx.DTypeError, "expected a torch.nn.Module, got dict"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(("build", "error", "says"), BAD.values(), ids=BAD.keys())
def test_what_cannot_live_in_a_handle_is_refused_before_anything_is_bound(build, error, says):
    region, model = rlx.HandleRegion(), build()
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    strided = [t for t in tensors if t.layout is torch.strided and not t.is_meta
               and not nn.parameter.is_lazy(t)]  # fmt: skip
    places = [t.data_ptr() for t in strided]
    with pytest.raises(error, match=says):
        bind_module(model, region)
    assert len(region) == 0
    assert places == [t.data_ptr() for t in strided]


def test_names_that_are_taken_and_regions_that_are_closed():
    region, model = rlx.HandleRegion(), nn.Linear(2, 2)
    places = [p.data_ptr() for p in model.parameters()]
    taken = rlx.BufferHandle("bias", 3, region=region)
    with pytest.raises(rlx.DuplicateError, match="a handle 'bias' already: give a prefix"):
        bind_module(model, region)
    with pytest.raises(rlx.ShapeError, match=r"shape \(2,\) and the handle of that name \(3,\)"):
        bind_module(model, region, take_over=True)
    taken.close()
    rlx.BufferHandle("bias", 2, "f64", region=region)
    with pytest.raises(rlx.DTypeError, match="float32 and the handle of that name float64"):
        bind_module(model, region, take_over=True)
    assert [h.name for h in region] == ["bias"]
    region.close()
    with pytest.raises(rlx.ClosedHandleError):
        bind_module(model, region)
    with pytest.raises(rlx.DTypeError, match="a HandleRegion; got str"):
        bind_module(model, "cpu")
    assert places == [p.data_ptr() for p in model.parameters()]
    bind_module(model, rlx.HandleRegion())
    with pytest.raises(rlx.DuplicateError, match="bound already"):
        bind_module(model, rlx.HandleRegion())
    with pytest.raises(rlx.DuplicateError, match="bound already"):
        bind_module(nn.Sequential(nn.Linear(1, 1), model), rlx.HandleRegion())


def test_an_error_in_the_middle_takes_everything_back(monkeypatch):
    region, model = rlx.HandleRegion(), make()
    places = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    values = bits(model.state_dict())
    real, calls = _torch_memory.attach, []

    def failing(tensor, handle):
        calls.append(handle)
        if len(calls) == 4:
            raise MemoryError("in the middle")
        real(tensor, handle)

    monkeypatch.setattr("rlx_driver.integrations.torch.attach", failing)
    with pytest.raises(MemoryError, match="in the middle"):
        bind_module(model, region)
    assert len(region) == 0
    assert all(handle.is_closed for handle in calls)
    assert places == [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    assert bits(model.state_dict()) == values
    model.half()  # not guarded


def test_no_copies_is_kept():
    model, region = make(), rlx.HandleRegion()
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError):
        bind_module(model, region)
    assert len(region) == 0
    with rlx.ledger.record() as record:
        bind_module(model, region)
    assert record.counts.bytes_copied == sum(h.byte_size for h in region)


def test_torch_is_bound_without_jax():
    out = must_run(
        """
import sys, torch
import rlx_driver as rlx
from rlx_driver.integrations.torch import bind_module, bind_optimizer
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.Adam(model.parameters())
region = rlx.HandleRegion()
bind_module(model, region), bind_optimizer(optimizer, region)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
print("jax" in sys.modules)
"""
    )
    assert out.strip() == "False"


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.jax
def test_gradients_accumulate_in_handles():
    model, twin, region = make(), make(), rlx.HandleRegion()
    bind_module(model, region)
    cost(model).backward()
    cost(twin).backward()
    grads = bind_gradients(model, region)
    assert "grad/layers.0.weight" in region
    assert "scale" not in grads
    for step in (1, 2):
        cost(model, step).backward()
        cost(twin, step).backward()
    rlx.update(grads, ones_added)
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            mine = dict(model.named_parameters())[name]
            assert mine.grad.data_ptr() == grads[name].address
            assert torch.equal(mine.grad, parameter.grad + 1)
            assert np.array_equal(grads[name].numpy(), parameter.grad.numpy() + 1)
    model.zero_grad(set_to_none=False)
    assert not grads["embed.weight"].numpy().any()
    assert model.embed.weight.grad.data_ptr() == grads["embed.weight"].address
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def test_gradients_are_bound_all_or_none():
    model, region = make(), rlx.HandleRegion()
    cost(model).backward()
    grads = [p.grad for p in model.parameters()]
    rlx.BufferHandle("grad/layers.2.bias", 1, region=region)
    with pytest.raises(rlx.DuplicateError):
        bind_gradients(model, region)
    assert all(a is p.grad for a, p in zip(grads, model.parameters(), strict=True))
    model.embed.weight.grad = torch.eye(6, 4).to_sparse()
    with pytest.raises(rlx.ZeroCopyError, match=r"gradient of embed.weight.*layout"):
        bind_gradients(model, region, prefix="g")
    assert len(region) == 1


# --- optimizers ----------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "momentum foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "momentum fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True, amsgrad=True),
}
AFTER_A_STEP = {
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
}
ALL = OPTIMIZERS | AFTER_A_STEP


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("warm", [0, 2], ids=["fresh", "after two steps"])
@pytest.mark.parametrize("kind", ALL)
def test_a_bound_optimizer_trains_bit_by_bit_as_an_unbound_one(kind, warm):
    if kind in AFTER_A_STEP and not warm:
        warm = 1
    model, twin, region = make(), make(), rlx.HandleRegion()
    optimizer, plain = ALL[kind](trainable(model)), ALL[kind](trainable(twin))
    if warm:
        assert train(model, optimizer, warm) == train(twin, plain, warm)
    bind_module(model, region)
    state = bind_optimizer(optimizer, region)
    assert train(model, optimizer, start=warm) == train(twin, plain, start=warm)
    assert bits(model.state_dict()) == bits(twin.state_dict())
    assert bits(optimizer.state_dict()["state"]) == bits(plain.state_dict()["state"])
    names = {p: n for n, p in model.named_parameters()}
    found = 0
    for parameter, tensors in optimizer.state.items():
        for key, tensor in tensors.items():
            if tensor is not None:
                handle = state[key][names[parameter]]
                assert tensor.data_ptr() == handle.address
                assert handle.name == f"{type(optimizer).__name__.lower()}/{key}/{names[parameter]}"
                found += 1
    assert found == sum(map(len, state.values()))
    assert (found > 0) == (kind != "sgd")
    if found:
        require_bound(optimizer)


def test_names_of_adam():
    model, region = nn.Linear(2, 2), rlx.HandleRegion()
    optimizer = torch.optim.Adam(model.parameters())
    bind_module(model, region)
    state = bind_optimizer(optimizer, region)
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["exp_avg"]["weight"] is region["adam/exp_avg/weight"]
    assert state["step"]["bias"].shape == ()


@pytest.mark.jax
def test_jax_changes_what_the_optimizer_uses():
    model, twin, region = make(), make(), rlx.HandleRegion()
    optimizer, plain = (torch.optim.Adam(trainable(m)) for m in (model, twin))
    bind_module(model, region)
    state = bind_optimizer(optimizer, region)
    train(model, optimizer, 2)
    train(twin, plain, 2)
    rlx.update(state["exp_avg"], ones_added)
    rlx.update(state["step"], ones_added)
    for tensors in plain.state.values():
        tensors["exp_avg"] += 1
        tensors["step"] += 1
    assert train(model, optimizer, 2, start=2) == train(twin, plain, 2, start=2)


def test_an_optimizer_names_parameters_itself_where_no_module_is_bound():
    model, region = nn.Linear(2, 2), rlx.HandleRegion()
    with pytest.raises(rlx.UnboundNameError, match="parameter 0 of group 0, of shape"):
        bind_optimizer(torch.optim.Adam(model.parameters()), region)
    assert len(region) == 0
    optimizer = torch.optim.Adam(model.named_parameters())
    state = bind_optimizer(optimizer, region, prefix="opt")
    assert state["exp_avg"]["weight"].name == "opt/exp_avg/weight"
    assert model.weight.data_ptr() not in {h.address for h in region}


def test_a_loaded_state_goes_into_the_handles():
    model, twin, region = make(), make(), rlx.HandleRegion()
    optimizer, plain = (torch.optim.AdamW(trainable(m)) for m in (model, twin))
    train(twin, plain, 3)
    bind_module(model, region)
    state = bind_optimizer(optimizer, region)
    home = {h.name: h.address for h in region}
    model.load_state_dict(twin.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    require_bound(optimizer)
    assert home == {h.name: h.address for h in region}
    assert state["step"]["embed.weight"].numpy() == 3
    assert train(model, optimizer, 3, start=3) == train(twin, plain, 3, start=3)
    # Its own state, and that of one that has not begun.
    optimizer.load_state_dict(optimizer.state_dict())
    require_bound(optimizer)
    assert state["step"]["embed.weight"].numpy() == 6
    fresh = make()
    optimizer.load_state_dict(torch.optim.AdamW(trainable(fresh)).state_dict())
    require_bound(optimizer)
    assert state["step"]["embed.weight"].numpy() == 0
    assert not state["exp_avg"]["embed.weight"].numpy().any()


def test_a_loaded_state_that_does_not_fit_leaves_the_handles_alone():
    model, region = nn.Linear(2, 2), rlx.HandleRegion()
    optimizer = torch.optim.Adam(model.parameters())
    bind_module(model, region)
    state = bind_optimizer(optimizer, region)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = {h.name: h.numpy().copy() for h in region}
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(rlx.ShapeError, match=r"'adam/exp_avg/weight' has shape \(3,\) in it"):
        optimizer.load_state_dict(wrong)
    for name, value in before.items():
        assert np.array_equal(region[name].numpy(), value)
    with pytest.raises(rlx.StaleViewError, match="the handles do not see"):
        require_bound(optimizer)
    assert state


def test_copies_of_an_optimizer_are_not_bound():
    model, region = nn.Linear(2, 2), rlx.HandleRegion()
    optimizer = torch.optim.Adam(model.parameters())
    bind_module(model, region)
    bind_optimizer(optimizer, region)
    twin = pickle.loads(pickle.dumps(optimizer))
    with pytest.raises(rlx.StaleViewError, match="nothing of this Adam is bound"):
        require_bound(twin)
    addresses = {h.address for h in region}
    assert not any(
        tensor.data_ptr() in addresses for each in twin.state.values() for tensor in each.values()
    )


class Odd(torch.optim.Optimizer):
    """Has state that no handle can hold."""

    def __init__(self, params):
        super().__init__(params, {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = [1, 2]


REFUSED = {
    "odd": (Odd, rlx.DTypeError, "'history' of weight in this Odd is a list"),
    "unknown": (torch.optim.RMSprop, rlx.DTypeError, "RMSprop has no state for weight yet"),
    "dampening": (AFTER_A_STEP["dampening"], rlx.DTypeError, "dampening 0.5"),
    "none": (lambda p: "adam", rlx.DTypeError, "expected a torch.optim.Optimizer, got str"),
}


@pytest.mark.parametrize(("build", "error", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_optimizers_that_cannot_be_bound(build, error, says):
    model, region = nn.Linear(2, 2), rlx.HandleRegion()
    bind_module(model, region)
    optimizer = build(model.parameters())
    with pytest.raises(error, match=says):
        bind_optimizer(optimizer, region)
    assert [h.name for h in region] == ["weight", "bias"]


def test_a_refused_optimizer_is_as_it_was():
    model, region = nn.Linear(2, 2), rlx.HandleRegion()
    bind_module(model, region)
    optimizer = torch.optim.Adam(model.parameters())
    taken = rlx.BufferHandle("adam/exp_avg_sq/bias", 2, region=region)
    with pytest.raises(rlx.DuplicateError, match="adam/exp_avg_sq/bias"):
        bind_optimizer(optimizer, region)
    assert not optimizer.state
    assert len(region) == 3
    taken.close()
    bind_optimizer(optimizer, region)
    with pytest.raises(rlx.DuplicateError, match="bound already"):
        bind_optimizer(optimizer, region, prefix="again")


def test_double_default_dtype_gives_double_steps():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model, twin = nn.Linear(2, 2), nn.Linear(2, 2)
        optimizer, plain = (torch.optim.Adam(m.parameters()) for m in (model, twin))
        region = rlx.HandleRegion()
        bind_module(model, region)
        bind_optimizer(optimizer, region)
        for each, stepper in ((model, optimizer), (twin, plain)):
            each(torch.ones(1, 2)).sum().backward()
            stepper.step()
        mine, theirs = optimizer.state[model.weight], plain.state[twin.weight]
        assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in theirs.items()}
        assert mine["step"].dtype is torch.float64
    finally:
        torch.set_default_dtype(before)


# --- snapshots -----------------------------------------------------------------------------------


def test_training_goes_on_from_a_file_bit_by_bit(tmp_path):
    pytest.importorskip("safetensors")
    model, region = make(), rlx.HandleRegion()
    optimizer = torch.optim.AdamW(trainable(model), 0.01)
    bind_module(model, region)
    bind_optimizer(optimizer, region)
    train(model, optimizer, 3)
    region.save(tmp_path / "state.safetensors")
    expected = train(model, optimizer, 3, start=3)

    # In place, as a program that is started again does.
    again, region = make(seed=1), rlx.HandleRegion()
    optimizer = torch.optim.AdamW(trainable(again), 0.01)
    bind_module(again, region)
    bind_optimizer(optimizer, region)
    region.restore(tmp_path / "state.safetensors")
    assert train(again, optimizer, 3, start=3) == expected
    assert bits(again.state_dict()) == bits(model.state_dict())

    # On the handles that are loaded.
    third, region = make(seed=2), rlx.HandleRegion.load(tmp_path / "state.safetensors")
    optimizer = torch.optim.AdamW(trainable(third), 0.01)
    bind_module(third, region, take_over=True)
    bind_optimizer(optimizer, region, take_over=True)
    assert train(third, optimizer, 3, start=3) == expected
    assert bits(third.state_dict()) == bits(model.state_dict())


def test_a_bound_optimizer_is_not_kept_alive():
    model, region = nn.Linear(2, 2), rlx.HandleRegion()
    optimizer = torch.optim.Adam(model.parameters())
    bind_module(model, region)
    bind_optimizer(optimizer, region)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


# --- a GPU ---------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.jax
def test_on_a_gpu_jax_and_torch_train_the_same_memory():
    device = "cuda:0"
    model, twin = (make().to(device) for _ in range(2))
    optimizer, plain = (torch.optim.AdamW(trainable(m), 0.01, fused=True) for m in (model, twin))
    region = rlx.HandleRegion(device)
    handles = bind_module(model, region)
    state = bind_optimizer(optimizer, region)
    grads = bind_gradients(model, region)

    def run(each, stepper):
        for step in range(3):
            loss = nn.functional.cross_entropy(
                each(tokens(step).to(device)), tokens(step + 100).to(device)
            )
            stepper.zero_grad(set_to_none=False)
            loss.backward()
            stepper.step()

    run(model, optimizer)
    run(twin, plain)
    with rlx.no_copies():
        rlx.update(floats(handles), ones_added)
        rlx.update(state["exp_avg"], ones_added)
    with torch.no_grad():
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            if name in floats(handles):
                tensor += 1
        for tensors in plain.state.values():
            tensors["exp_avg"] += 1
    run(model, optimizer)
    run(twin, plain)
    for name, parameter in twin.named_parameters():
        assert torch.allclose(dict(model.named_parameters())[name], parameter, atol=1e-5)
        seen = handles[name].jax()
        assert np.array_equal(np.asarray(seen), handles[name].to_host().numpy())
    assert all(p.grad.data_ptr() == grads[n].address for n, p in model.named_parameters()
               if p.requires_grad)  # fmt: skip
    loss = nn.functional.cross_entropy(model(tokens().to(device)), tokens(1).to(device))
    rlx.update({"w": handles["layers.2.weight"]}, ones_added)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.cuda
def test_on_a_gpu_state_of_the_host_is_refused_with_the_remedy():
    model, region = nn.Linear(2, 2, device="cuda:0"), rlx.HandleRegion("cuda:0")
    with pytest.raises(rlx.DeviceUnavailableError, match="is on cuda:0 and the region on cpu"):
        bind_module(model, rlx.HandleRegion())
    bind_module(model, region)
    with pytest.raises(rlx.DeviceUnavailableError, match="fused=True or capturable=True"):
        bind_optimizer(torch.optim.Adam(model.parameters()), region)
    bind_optimizer(torch.optim.Adam(model.parameters(), capturable=True), region)
    with pytest.raises(rlx.ZeroCopyError, match="out of their handles"):
        model.cpu()
    require_bound(model)
