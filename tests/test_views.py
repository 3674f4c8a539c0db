"""Views under modes and transforms, autograd's version counters, and views held across updates."""

import numpy as np
import pytest

import rlx_driver as rlx

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402

from buffer_support import SIDE, address, ever, ones, slow_read, start, warm_up  # noqa: E402

pytestmark = [
    pytest.mark.jax,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::rlx_driver.errors.RecompilationWarning"),
]


def plus_one(x):
    return x + 1


def entered(scope):
    with scope as view:
        return view


def filled(value, shape=64):
    return rlx.Buffer.from_array(np.full(shape, value, np.float32), copy=True)


# --- modes of torch --------------------------------------------------------------------------


def test_a_view_first_made_in_inference_mode_is_an_ordinary_tensor_afterwards():
    b = filled(1)
    with torch.inference_mode():
        inside = b.torch()
        assert address(inside) == b.address
        part = b[:16].torch()
        assert float(part.sum()) == 16
    for view in (b.torch(), b[:16].torch()):
        assert not view.is_inference()
        view += 1
        weight = torch.ones(view.shape, requires_grad=True)
        (view * weight).sum().backward()
        assert torch.equal(weight.grad, view.detach())
    b.update(plus_one)
    assert bool((b.torch()[:16] == 4).all())


def test_positive_control_a_tensor_made_in_inference_mode_refuses_writes():
    with torch.inference_mode():
        view = torch.from_numpy(np.zeros(4, np.float32))[:]
    if view.is_inference():
        with pytest.raises(RuntimeError, match=r"[Ii]nference"):
            view.add_(1)
    else:
        pytest.fail("torch now makes ordinary tensors in inference mode")


def test_updates_and_writes_in_inference_mode():
    b = filled(1)
    b.torch()
    with torch.inference_mode():
        b.update(plus_one)
        b.update(lambda x: x.add_(1), framework="torch")
        with b.write("torch") as t:
            t += 1
        b.copy_from(b.torch() + 1)
    assert bool((b.torch() == 5).all())
    assert not b.torch().is_inference()
    b.torch().add_(1)


def test_a_fake_tensor_is_never_kept():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    b = filled(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for use in (b.torch, b[:16].torch):
            try:
                view = use()
            except rlx.DriverError:
                continue
            assert isinstance(view, FakeTensor) or address(view)
    view = b.torch()
    assert not isinstance(view, FakeTensor)
    assert address(view) == b.address
    assert not isinstance(b[:16].torch(), FakeTensor)
    assert float(b[:16].torch().sum()) == 16
    assert b.torch() is view


def test_a_view_first_made_inside_vmap_or_grad_is_not_kept():
    for transform in (torch.func.vmap, torch.func.grad):
        b = filled(2)
        seen = []

        def function(x, b=b, seen=seen):
            view = b.torch()
            seen.append(view)
            return (x * view.sum()).sum()

        result = transform(function)(torch.ones(3))
        assert result.tolist() == [128, 128, 128]
        view = b.torch()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(view)
        assert address(view) == b.address
        b.update(plus_one)
        assert float(b.torch().sum()) == 192
        assert address(b[:16].torch()) == b.address


def test_a_compiled_function_takes_a_view():
    b = filled(1)
    compiled = torch.compile(lambda x: x.mul_(2), backend="eager")
    compiled(b.torch())
    b.update(plus_one)
    compiled(b.torch())
    assert (b.numpy() == 6).all()


def test_a_default_device_or_dtype_of_torch_changes_nothing():
    b = filled(1)
    with torch.device("meta"):
        assert address(b.torch()) == b.address
    torch.set_default_dtype(torch.float64)
    try:
        c = filled(1)
        assert c.torch().dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# --- traces of JAX ---------------------------------------------------------------------------

TRACES = {
    "jit": lambda f: jax.jit(f)(1.0),
    "grad": lambda f: jax.grad(f)(1.0),
    "vmap": lambda f: jax.vmap(f)(jnp.ones(2)),
    "eval_shape": lambda f: jax.eval_shape(f, 1.0),
    "make_jaxpr": lambda f: jax.make_jaxpr(f)(1.0),
    "scan": lambda f: jax.lax.scan(lambda c, _: (c + f(c), None), 0.0, None, length=2),
}


@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES.keys())
@pytest.mark.parametrize("warm", [False, True])
def test_a_jax_view_inside_a_trace_raises_and_nothing_is_kept(trace, warm):
    b = filled(1)
    if warm:
        b.jax()
    for access in (
        b.jax,
        b[:16].jax,
        lambda: b.array("jax"),
        lambda: rlx.views([b], "jax")[0],
        lambda: b.read("jax").__enter__(),
    ):
        with pytest.raises(rlx.StaleViewError, match=r"inside a trace.*argument"):
            trace(lambda x, access=access: (x * access()).sum())
    view = b.jax()
    assert not isinstance(view, jax.core.Tracer)
    assert address(view) == b.address
    assert address(b[:16].jax()) == b.address
    b.update(plus_one)
    assert float(b.jax().sum()) == 128
    with b.write("numpy", timeout=0) as n:
        n += 1


def test_positive_control_jax_bakes_a_captured_array_in():
    memory = rlx.Buffer.zeros(4)
    captured = jnp.array(memory.jax())
    function = jax.jit(lambda x: x + captured)
    function(1.0)
    captured = captured + 5
    assert float(function(1.0)[0]) == 1


def test_a_numpy_or_torch_view_inside_a_jax_trace_is_the_memory():
    b = filled(3)

    @jax.jit
    def function(x):
        return x + float(b.numpy()[0]) + float(b.torch()[0])

    assert float(function(1.0)) == 7


def test_a_view_passed_as_an_argument_is_current():
    b = filled(1)
    total = jax.jit(lambda x: x.sum())
    assert float(total(b.jax())) == 64
    b.update(plus_one)
    assert float(total(b.jax())) == 128


# --- autograd --------------------------------------------------------------------------------


def test_a_cached_view_that_came_to_require_grad_is_made_anew():
    b = filled(1)
    first = b.torch()
    first.requires_grad_()
    second = b.torch()
    assert second is not first
    assert not second.requires_grad
    assert address(second) == b.address
    assert b.torch() is second
    before = first._version
    b.update(plus_one)
    assert first._version > before
    assert first._version == second._version
    with torch.no_grad():
        second += 1
    assert first._version == second._version
    assert float(first.detach()[0]) == 3


def test_a_view_written_by_a_network_outside_no_grad_is_made_anew():
    b = filled(1, (4, 4))
    net = torch.nn.Linear(4, 4)
    view = b.torch()
    view[0] = net(torch.ones(4))
    assert view.requires_grad
    fresh = b.torch()
    assert not fresh.requires_grad
    assert fresh.grad_fn is None
    assert torch.equal(fresh, view.detach())
    with b.write("torch") as t:
        assert not t.requires_grad
    b.update(plus_one)
    b.update(lambda x: x.add_(1), framework="torch")
    assert not b.torch().requires_grad


def test_a_parameter_made_of_a_view_is_the_memory():
    b = filled(2, (4, 4))
    parameter = torch.nn.Parameter(b.torch())
    assert address(parameter) == b.address
    assert not b.torch().requires_grad
    b.update(plus_one)
    assert bool((parameter == 3).all())
    (parameter * 2).sum().backward()
    with torch.no_grad():
        parameter -= parameter.grad
    assert (b.numpy() == 1).all()


def commit_donated(b):
    rlx.commit(b, jax.jit(lambda x: x + 1, donate_argnums=0)(b.jax()))


def write_numpy(b):
    with b.write("numpy") as n:
        n += 1


def write_torch(b):
    with b.write("torch") as t:
        t += 1


def write_tree(b):
    with rlx.write({"b": b, "other": filled(0)}, "numpy") as tree:
        tree["b"][...] += 1


WRITES = {
    "jax update": lambda b: b.update(plus_one),
    "jax update, unordered": lambda b: b.update(plus_one, ordered=False),
    "jax update, copied": lambda b: b.update(jax.jit(plus_one)),
    "torch update": lambda b: b.update(lambda x: x.add_(1), framework="torch"),
    "torch update, returned": lambda b: b.update(plus_one, framework="torch"),
    "numpy update": lambda b: b.update(lambda x: np.add(x, 1, out=x), framework="numpy"),
    "tree update": lambda b: rlx.update([b, filled(0)], lambda t: [x + 1 for x in t]),
    "write numpy": write_numpy,
    "write torch": write_torch,
    "write tree": write_tree,
    "copy_from": lambda b: b.copy_from(np.full(b.shape, 100, np.float32)),
    "setitem": lambda b: b.__setitem__(..., 100.0),
    "setitem slice": lambda b: b.__setitem__(slice(0, 32), np.full((32, *b.shape[1:]), 9.0, "f4")),
    "commit donated": commit_donated,
    "commit foreign": lambda b: rlx.commit(b, torch.full(b.shape, 100.0)),
    "through a slice": lambda b: b[:32].update(plus_one),
    "through a view": lambda b: b.view("u8")[...].__setitem__(..., 7),
    "write through a slice": lambda b: write_numpy(b[:32]),
}

SAVED = {
    "view": lambda b: b.torch(),
    "slice of the buffer": lambda b: b[:16].torch(),
    "slice of the view": lambda b: b.torch()[:16],
    "parameter": lambda b: torch.nn.Parameter(b.torch()),
    "detached": lambda b: b.torch().detach(),
    "reinterpreted": lambda b: b.view("f32", (8, 8)).torch(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED.keys())
def test_autograd_refuses_a_tensor_saved_before_a_write(write, saved):
    b = filled(2)
    view = saved(b)
    weight = torch.ones(view.shape, requires_grad=True)
    loss = (view * weight).sum()
    write(b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    view = saved(b)
    (view * weight).sum().backward()  # what is saved after the write is right
    assert torch.equal(weight.grad, view.detach())


def test_a_view_first_taken_from_a_slice_counts_with_the_base():
    b = filled(2)
    part = b[:16].torch()
    weight = torch.ones(16, requires_grad=True)
    loss = (part * weight).sum()
    b.update(plus_one)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_positive_control_without_the_version_counter_the_gradient_is_wrong():
    b = filled(2)
    weight = torch.ones(64, requires_grad=True)
    loss = (b.torch() * weight).sum()
    b.numpy()[...] = 100  # behind the driver's back
    loss.backward()
    assert float(weight.grad[0]) == 100  # the function that ran had the gradient 2


def test_reads_do_not_count_as_writes():
    b = filled(2)
    view = b.torch()
    weight = torch.ones(64, requires_grad=True)
    loss = (view * weight).sum()
    with b.read("torch"), b.read("jax"):
        b.numpy(), b.jax()
    b.to_host()
    np.asarray(b)
    filled(0).copy_from(b)
    rlx.commit(b, b.jax())
    loss.backward()
    assert float(weight.grad[0]) == 2


def test_threads_racing_for_the_first_view_share_its_version_counter():
    import threading

    for _ in range(100):
        b = filled(2)
        together = threading.Barrier(3)

        def take(b=b, together=together):
            together.wait(timeout=60)
            return b.torch()

        found = [future.result(timeout=60) for future in [start(take) for _ in range(3)]]
        before = [view._version for view in found]
        b.update(plus_one)
        assert all(view._version > v for view, v in zip(found, before, strict=True))


# --- views held across updates ---------------------------------------------------------------


def slowly_plus_one(x):
    return x + slow_read(x / x)


def test_numpy_and_torch_views_held_across_updates_are_right():
    warm_up()
    b = ones()
    n, t = b.numpy(), b.torch()
    for i in range(5):
        b.update(slowly_plus_one)
        assert float(t[-1, -1]) == i + 2
        assert (n == i + 2).all()


def test_a_held_view_of_a_slice_is_right():
    b = ones()
    part = b[256:].torch()
    b.update(slowly_plus_one)
    assert bool((part == 2).all())
    b[256:].update(lambda x: x * slow_read(jnp.ones((SIDE, SIDE)))[256:] * 2)
    assert bool((part == 4).all())


def test_a_network_whose_weight_is_the_buffer_is_right_after_every_update():
    b = ones()
    layer = torch.nn.Linear(SIDE, SIDE, bias=False)
    layer.weight = torch.nn.Parameter(b.torch())
    x = torch.ones(SIDE)
    for i in range(5):
        b.update(slowly_plus_one)
        assert float(layer(x).detach()[-1]) == SIDE * (i + 2)


def test_positive_control_an_unordered_update_shows_old_bytes_until_the_next_view():
    def wrong():
        b = ones()
        layer = torch.nn.Linear(SIDE, SIDE, bias=False)
        layer.weight = torch.nn.Parameter(b.torch())
        x = torch.ones(SIDE)
        b.update(slowly_plus_one, ordered=False)
        early = float(layer(x).detach().max())
        b.torch()
        assert float(layer(x).detach().min()) == SIDE * 2  # the next view settles
        return early != SIDE * 2

    assert ever(wrong)


def test_an_ordered_update_waits_only_when_a_view_is_out():
    b = ones()
    with rlx.ledger.record() as r:
        b.update(slowly_plus_one)
        b.jax()
    assert r.counts.host_waits == 0
    b.torch()
    with rlx.ledger.record() as r:
        b.update(slowly_plus_one)
    assert r.counts.host_waits == 1


@pytest.mark.parametrize("take", [np.asarray, torch.from_dlpack, lambda b: b.array("numpy")])
def test_arrays_taken_by_protocols_count_as_views_that_are_out(take):
    b = ones()
    array = take(b)
    b.update(slowly_plus_one)
    assert float(array[-1, -1]) == 2


def test_an_unordered_update_is_settled_by_every_accessor():
    accessors = [
        lambda b: b.numpy(),
        lambda b: b.torch(),
        lambda b: np.asarray(b.jax()),
        lambda b: np.asarray(b),
        lambda b: np.from_dlpack(b),
        lambda b: torch.from_dlpack(b),
        lambda b: np.asarray(jnp.from_dlpack(b)),
        lambda b: np.frombuffer(b.host_bytes(), np.float32),
        lambda b: b.as_f32(),
        lambda b: b.to_host().numpy(),
        lambda b: b[256:].numpy(),
        lambda b: b.view("f32", (SIDE * SIDE,)).torch(),
        lambda b: rlx.views([b], "numpy")[0],
        lambda b: entered(b.read("torch")),
        lambda b: entered(b.write("numpy")),
        lambda b: rlx.exchange(b, "numpy"),
        lambda b: rlx.exchange(b, "torch", copy=True),
        lambda b: np.array(b[-1, -1]),
        lambda b: rlx.Buffer.from_array(b, copy=True).numpy(),
    ]
    for accessor in accessors:
        b = ones()
        b.update(slowly_plus_one, ordered=False)
        found = accessor(b)
        assert bool((found == 2).all())


def test_the_private_way_to_raise_a_version_counter_is_probed():
    from rlx_driver.backends.torch import probe_increment

    def broken(tensors):
        raise TypeError("gone")

    public = torch.autograd.graph.increment_version
    assert probe_increment(None) is public
    assert probe_increment(broken) is public
    assert probe_increment(lambda tensors: None) is public
    for increment in (probe_increment(), public):
        t = torch.zeros(2)
        before = t._version
        increment([t])
        assert t._version == before + 1


def slow_double(x):
    return slow_read(x) * 2


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_view_first_made_by_a_scope_is_ordered_once_it_is_handed_out(framework):
    def is_right(ordered):
        b = ones()
        with b.write(framework) as view:
            view[...] = 1
        held = getattr(b, framework)()
        b.update(slow_double, ordered=ordered)
        early = float(held[-1, -1])
        assert float(b.array(framework)[-1, -1]) == 2
        return early == 2

    warm_up()
    is_right(True)
    assert ever(lambda: not is_right(False)), "the control shows no race"
    assert all(is_right(True) for _ in range(10))
