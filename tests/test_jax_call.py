"""Functions of torch and NumPy inside jitted JAX programs: in place, in order, both ways."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver.dtypes import TABLE

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy

from rlx_driver.integrations import _jax_call, _jax_call_arrays  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.jax,
    # One function of a test is traced for each of its parameters.
    pytest.mark.filterwarnings("ignore::rlx_driver.errors.RecompilationWarning"),
]


@pytest.fixture(params=["in place", "by copies"])
def way(request, monkeypatch):
    """Run a test in both ways."""
    if request.param == "by copies":
        monkeypatch.setattr(_jax_call, "works_in_place", lambda platform: False)
    return request.param


def handle(shape=(8,), dtype="f32"):
    return rlx.BufferHandle("h", shape, dtype)


def update_and_wait(h, step):
    h.update(step)
    h.numpy()


def add_one(t):
    t += 1


# --- values, order, place


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_a_call_stands_between_jax_operations(way, framework):
    def step(x, row):
        x = x + 1
        x = rlx.jax_call(scale_and_add, x, jnp.sin(row) + 2, factor=3, framework=framework)
        return x * 10

    def scale_and_add(t, row, *, factor):
        t *= factor
        t += row

    h = handle((4,))
    for _ in range(2):
        h.update(step, jnp.zeros(4))
    assert h.numpy().tolist() == [((0 + 1) * 3 + 2) * 10 * 3 * 10 + 50] * 4
    h.close()


def test_the_probe_finds_the_way_in_place():
    assert _jax_call.works_in_place("cpu")
    assert not _jax_call.works_in_place("tpu")


def test_a_probe_that_sees_another_address_refuses(monkeypatch):
    from jax.experimental import buffer_callback

    real = buffer_callback.buffer_callback
    monkeypatch.setattr(
        buffer_callback, "buffer_callback", lambda fn, shapes, **_: real(fn, shapes)
    )
    assert not _jax_call._probe("cpu")


def test_the_probe_survives_a_jax_without_callbacks(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jax.experimental.buffer_callback", None)
    assert not _jax_call._probe("cpu")


def test_the_function_works_on_the_memory_of_the_handle():
    h = handle((1024,))
    view = h.torch()
    seen = []

    def look(t):
        seen.append(t.data_ptr())
        t += 1

    def step(x):
        return rlx.jax_call(look, x)

    rlx.ledger.reset()
    with rlx.no_copies():
        for _ in range(100):
            h.update(step)
    assert set(seen) == {h.address} == {view.data_ptr()}
    assert len(seen) == 100
    assert view[0] == 100
    assert rlx.ledger.bytes_copied == 0
    h.close()


def test_nothing_is_allocated_for_the_state():
    x = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)

    def step(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: rlx.jax_call(add_one, x), x)

    compiled = jax.jit(step, donate_argnums=0).lower(x).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 4 << 20
    assert memory.temp_size_in_bytes < 4096


def test_a_call_and_then_an_append_make_no_pass_over_the_state():
    def step(x, row, position):
        x = rlx.jax_call(add_one, x)
        return jax.lax.dynamic_update_slice(x, row, (position, 0))

    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    row = jax.ShapeDtypeStruct((1, 1024), jnp.float32)
    position = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(x, row, position).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096
    assert not [line for line in compiled.as_text().splitlines() if " copy(" in line]


def test_the_other_way_copies_and_says_so(monkeypatch):
    monkeypatch.setattr(_jax_call, "works_in_place", lambda platform: False)
    h = handle((256,))
    seen = []

    def look(t):
        seen.append(t.data_ptr())
        t += 1

    address = h.address
    h.update(lambda x: rlx.jax_call(look, x))
    assert h.numpy()[0] == 1
    assert h.address == address
    assert seen != [address]
    assert rlx.ledger.bytes_copied == 2 * 4 * 256
    h.close()


def test_a_hundred_calls_in_a_loop_are_in_order(way):
    def body(i, x):
        x = x * 2 % 1009  # JAX before
        x = rlx.jax_call(mix, x, i)
        return x + jnp.flip(x) % 7  # JAX after

    def mix(t, i):
        t += i
        t %= 997

    def expected(x):
        for i in range(100):
            x = x * 2 % 1009
            x = (x + i) % 997
            x = x + np.flip(x) % 7
        return x

    h = handle((64,), "i32")
    start = np.arange(64, dtype=np.int32)
    h.copy_from(start)
    address = h.address
    h.update(lambda x: jax.lax.fori_loop(0, 100, body, x))
    assert np.array_equal(h.numpy(), expected(start))
    assert h.address == address
    h.close()


def test_a_scan_carries_the_state_in_place():
    h = handle((32,))
    seen = set()

    def put(t, row, i):
        seen.add(t.data_ptr())
        t[int(i)] = row.sum()

    def step(x, rows):
        def body(x, each):
            x = rlx.jax_call(put, x, *each)
            return x, x[0]

        return jax.lax.scan(body, x, (rows, jnp.arange(32)))

    rows = jnp.arange(64.0).reshape(32, 2)
    h.update(step, rows, has_aux=True)
    assert np.array_equal(h.numpy(), np.arange(64.0).reshape(32, 2).sum(1))
    assert seen == {h.address}
    h.close()


def test_a_later_read_of_the_old_value_sees_the_old_value(way):
    def step(x):
        y = rlx.jax_call(add_one, x)
        z = rlx.jax_call(add_one, x)
        return x + 10 * y + 100 * z

    h = handle((3,))
    h.update(step)
    assert h.numpy().tolist() == [110.0] * 3
    h.close()


def test_the_state_may_be_an_argument_too(way):
    def clear_and_add(t, a):
        t.zero_()
        t += a

    h = handle((3,))
    h.copy_from(np.float32([1, 2, 3]))
    h.update(lambda x: rlx.jax_call(clear_and_add, x, x))
    assert h.numpy().tolist() == [1, 2, 3]
    h.close()


@pytest.mark.parametrize("order", [("jax", "call"), ("call", "jax")])
def test_long_programs_before_and_after_are_waited_for(way, order):
    def slow(x):
        return jax.lax.fori_loop(0, 20, lambda _, m: jnp.tanh(m @ m), x)

    def double(t):
        t *= 2

    def step(x):
        for each in order:
            x = slow(x) if each == "jax" else rlx.jax_call(double, x)
        return x

    h = handle((128, 128))
    start = np.full((128, 128), 0.01, np.float32)
    expected = jnp.asarray(start)
    for each in order:
        expected = slow(expected) if each == "jax" else expected * 2
    h.copy_from(start)
    h.update(step)
    np.testing.assert_allclose(h.numpy(), expected, rtol=1e-5)
    h.close()


# --- what may be passed


def shared_dtypes(framework):
    for row in TABLE.values():
        if row.jax is None or row.dlpack is None or row.dtype.itemsize > 4:
            continue
        if framework == "torch" and (row.torch is None or not hasattr(torch, row.torch)):
            continue
        yield pytest.param(framework, row.dtype, id=f"{framework}-{row.dtype.name}")


@pytest.mark.parametrize(("framework", "dtype"), [*shared_dtypes("torch"), *shared_dtypes("numpy")])
@pytest.mark.parametrize("shape", [(2, 3), ()])
def test_every_shared_dtype(way, framework, dtype, shape):
    def swap(t, other):
        if framework == "torch":
            t.copy_(other)
        else:
            t[...] = other

    h = rlx.Buffer.zeros(shape, dtype)
    value = jnp.ones(shape, dtype)
    h.update(lambda x, v: rlx.jax_call(swap, x, v, framework=framework), value)
    with h.read("numpy") as n:
        assert n.tobytes() == np.ones(shape, dtype).tobytes()
    h.close()


def test_a_torch_that_does_not_import_narrow_floats(monkeypatch):
    def refuse(buffer):
        raise BufferError("not here")

    h = rlx.Buffer.zeros((4,), "float8_e4m3fn")
    value = jnp.ones(4, jnp.float8_e4m3fn)
    program = jax.jit(lambda x, v: rlx.jax_call(lambda t, v: t.copy_(v), x, v), donate_argnums=0)
    monkeypatch.setattr(torch, "from_dlpack", refuse)
    result = program(jnp.zeros(4, jnp.float8_e4m3fn), value)
    monkeypatch.undo()
    assert np.asarray(result).astype(np.float32).tolist() == [1.0] * 4
    h.close()


def test_trees_of_state_and_of_arguments(way):
    def move(state, pair, *, by):
        state["a"] += pair["x"] * by
        state["b"][0] -= pair["y"][0]

    def step(state, pair):
        return rlx.jax_call(move, state, pair, by=2)

    tree = {"a": rlx.Buffer.zeros((2,)), "b": [rlx.Buffer.zeros((3,), "i32")]}
    rlx.update(tree, step, {"x": jnp.ones(2), "y": (jnp.int32(5),)})
    assert tree["a"].numpy().tolist() == [2, 2]
    assert tree["b"][0].numpy().tolist() == [-5] * 3


def test_what_is_no_array_is_passed_as_it_is(way):
    given = []
    weights = torch.arange(3.0)

    def look(t, number, text, tensor, *, flag, array):
        given.append((number, text, flag))
        assert tensor is weights
        t += tensor + array

    def step(x):
        return rlx.jax_call(look, x, 3, "sum", weights, flag=True, array=np.float32([1, 1, 1]))

    h = handle((3,))
    h.update(step)
    assert given == [(3, "sum", True)]
    assert h.numpy().tolist() == [1, 2, 3]
    h.close()


def test_numpy_arguments_are_read_only(way):
    refused = []

    def write(t, a):
        try:
            a += 1
        except ValueError as error:
            refused.append(str(error))

    h = handle()
    h.update(lambda x, a: rlx.jax_call(write, x, a, framework=np), jnp.ones(3))
    assert len(refused) == 1
    assert "read-only" in refused[0]
    h.close()


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_a_new_array_is_copied_in_and_counted(framework):
    h = handle((4,))
    h.update(lambda x: rlx.jax_call(lambda t: t + 3, x, framework=framework))
    assert h.numpy().tolist() == [3.0] * 4
    assert rlx.ledger.bytes_copied == 16
    h.update(lambda x: rlx.jax_call(lambda t: t, x, framework=framework))
    assert rlx.ledger.bytes_copied == 16
    h.close()


def test_a_swap_returned_is_a_swap(way):
    a, b = rlx.Buffer.zeros((2,)), rlx.Buffer.zeros((2,))
    a.copy_from(np.float32([1, 2]))
    rlx.update((a, b), lambda s: rlx.jax_call(lambda s: (s[1], s[0]), s))
    assert (a.numpy().tolist(), b.numpy().tolist()) == ([0, 0], [1, 2])


def test_no_gradients_are_recorded(way):
    weights = torch.ones(2, requires_grad=True)
    modes = []

    def add(t):
        modes.append(torch.is_grad_enabled())
        t += weights

    h = handle((2,))
    h.update(lambda x: rlx.jax_call(add, x))
    assert modes == [False]
    assert torch.is_grad_enabled()
    assert h.numpy().tolist() == [1, 1]
    h.close()


# --- outside of a trace


def add_second(pair):
    pair[0].add_(pair[1])


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_buffers_outside_of_a_trace(framework):
    h, other = handle((3,)), rlx.Buffer.from_array(np.float32([1, 2, 3]), copy=True)

    def add(t, a, b, *, c, k):
        t += (a + b + c) * k

    result = rlx.jax_call(add, h, other, jnp.ones(3), c=np.ones(3, "f"), k=2, framework=framework)
    assert result is None
    assert h.numpy().tolist() == [6, 8, 10]
    assert h.epoch == 1
    rlx.jax_call(add_second, (h[:1], other[:1]))
    assert h.numpy()[0] == 7
    h.close()


def test_arrays_outside_of_a_trace_are_copied():
    x = jnp.ones(4)
    assert rlx.jax_call(add_one, x).tolist() == [2.0] * 4
    assert x.tolist() == [1.0] * 4
    with jax.disable_jit():
        h = handle((4,))
        assert jax.jit(lambda x: rlx.jax_call(add_one, x, framework=np) * 3)(x).tolist() == [6] * 4
        h.close()


def test_a_constant_state_inside_a_trace(way):
    base = jnp.ones(4)
    out = jax.jit(lambda: rlx.jax_call(add_one, base) * 3)()
    assert out.tolist() == [6.0] * 4
    assert base.tolist() == [1.0] * 4


# --- threads, life


def test_a_handle_is_out_of_reach_inside():
    h = handle()
    caught = []

    def reach(t):
        for access in (h.torch, h.jax, lambda: h.read("numpy").__enter__()):
            with pytest.raises(rlx.StaleViewError) as error:
                access()
            caught.append(error.value)
        t += 1

    h.update(lambda x: rlx.jax_call(reach, x))
    assert len(caught) == 3
    assert h.numpy()[0] == 1
    h.close()


def test_threads_update_handles_of_their_own(way):
    handles = [handle((16,)) for _ in range(4)]
    errors = []

    def step(x):
        return rlx.jax_call(add_one, x) * 1

    def work(h):
        try:
            for _ in range(50):
                h.update(step)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(h,)) for h in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert [h.numpy()[0] for h in handles] == [50] * 4
    for h in handles:
        h.close()


def test_a_function_lives_as_long_as_its_program(way):
    def build():
        def inside(t):
            t += 1

        def step(x):
            return rlx.jax_call(inside, x)

        return step, weakref.ref(inside)

    h = handle()
    alive = []
    for _ in range(2):
        step, reference = build()
        h.update(step)
        h.update(step)
        alive.append(reference)
        del step
    jax.clear_caches()
    gc.collect()
    assert h.numpy()[0] == 4
    assert [reference() for reference in alive] == [None, None]
    h.close()


def test_a_lambda_inside_a_step_compiles_once():
    traces = []

    def step(x):
        traces.append(1)
        return rlx.jax_call(lambda t: t.add_(1), x)

    h = handle()
    for _ in range(20):
        h.update(step)
    assert len(traces) == 1
    assert h.numpy()[0] == 20
    h.close()


# --- bad input, and what goes wrong


def test_an_error_of_the_function_arrives_and_the_handle_goes_on(way):
    def fail(t):
        t.fill_(7)
        raise KeyError("no such key")

    h = handle((4,))
    address = h.address
    with pytest.raises(rlx.UpdateFailedError, match="no such key"):
        update_and_wait(h, lambda x: rlx.jax_call(fail, x))
    h.copy_from(np.ones(4, np.float32))
    h.update(lambda x: rlx.jax_call(add_one, x))
    assert h.numpy().tolist() == [2.0] * 4
    assert h.address == address
    h.close()


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda t: t[:2].clone(), "shape"),
        (lambda t: t.double(), "float64"),
        (lambda t: np.zeros(4, "f"), "ndarray"),
        (lambda t: (t, t), "structure"),
        (lambda t: 5, "int"),
    ],
)
def test_a_result_that_does_not_fit(way, result, text):
    h = handle((4,))
    with pytest.raises(rlx.UpdateFailedError, match=text):
        update_and_wait(h, lambda x: rlx.jax_call(result, x))
    h.close()


def untouched(h, step, error, match):
    h.copy_from(np.arange(h.num_elements).reshape(h.shape).astype(h.dtype))
    before, address, epoch = h.numpy().tobytes(), h.address, h.epoch
    with pytest.raises(error, match=match):
        h.update(step)
    assert (h.numpy().tobytes(), h.address, h.epoch) == (before, address, epoch)
    h.close()


def test_bad_input_changes_nothing(way):
    call = rlx.jax_call
    untouched(
        handle(), lambda x: call(add_one, x, framework="jax"), rlx.UnknownFrameworkError, "jax"
    )
    untouched(handle(), lambda x: call(add_one, x, framework=3), rlx.UnknownFrameworkError, "3")
    untouched(handle(), lambda x: call(add_one, ()), rlx.ShapeError, "has none")
    untouched(handle(), lambda x: call(add_one, 3.0), rlx.DTypeError, "float")
    other = rlx.Buffer.zeros((3,))
    untouched(handle(), lambda x: call(add_one, other), rlx.StaleViewError, "inside a JAX trace")
    untouched(handle(), lambda x: call(add_one, x, b=other), rlx.StaleViewError, "inside a JAX")
    four = rlx.Buffer.zeros((4,), "float8_e4m3b11fnuz")
    untouched(four, lambda x: call(add_one, x), rlx.DTypeError, "float8_e4m3b11fnuz")
    untouched(handle(), lambda x: call(add_one, x, x.astype("int4")), rlx.DTypeError, "int4")
    key = jax.random.key(0)
    untouched(handle(), lambda x: call(add_one, x, key), rlx.DTypeError, "key_data")


def test_buffers_and_arrays_do_not_mix():
    h = handle()
    with pytest.raises(rlx.DTypeError, match="BufferHandle"):
        rlx.jax_call(add_one, (h, jnp.ones(3)))
    h.close()


@pytest.mark.parametrize("jitted", [True, False])
def test_transforms_are_refused(way, jitted):
    def program(x):
        return rlx.jax_call(add_one, x).sum()

    program = jax.jit(program) if jitted else program
    with pytest.raises(rlx.TransformError, match="custom_vjp"):
        jax.grad(program)(jnp.ones(3))
    with pytest.raises(rlx.TransformError, match="vmap"):
        jax.vmap(program)(jnp.ones((2, 3)))
    with pytest.raises(NotImplementedError):
        jax.vmap(jax.grad(program))(jnp.ones((2, 3)))


def test_gradients_by_custom_vjp_and_around_it(way):
    def double(t):
        t *= 2

    @jax.custom_vjp
    def doubled(x):
        return rlx.jax_call(double, x)

    doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (rlx.jax_call(double, g),))
    x = jnp.arange(3.0)
    assert jax.grad(lambda x: (doubled(x) * x).sum())(x).tolist() == [0, 4, 8]

    def beside(x):
        return (x * rlx.jax_call(double, jax.lax.stop_gradient(x))).sum()

    assert jax.jit(jax.grad(beside))(x).tolist() == [0, 2, 4]


def test_numpy_functions_are_for_the_host_alone():
    class OnAGpu:
        def __dlpack_device__(self):
            return (2, 0)

    with pytest.raises(rlx.DeviceUnavailableError, match="framework='torch'"):
        _jax_call_arrays.array_of(OnAGpu(), _jax_call._target("numpy"), writable=True)
