"""Updates in place: one address, checked before anything is donated, ordered after."""

import functools
import gc
import types
import warnings
import weakref

import ml_dtypes
import numpy as np
import pytest

import rlx_driver as rlx

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402

from buffer_support import (  # noqa: E402
    address,
    ever,
    in_thread,
    is_intact,
    ones,
    reader_in_flight,
    run_python,
    slow_read,
    start,
    warm_up,
    x64,
)
from rlx_driver import dtypes  # noqa: E402
from rlx_driver.backends._jax_steps import StepCache  # noqa: E402

pytestmark = [
    pytest.mark.jax,
    pytest.mark.torch,
    # Steps are shared by many tests here, each with a shape of its own.
    pytest.mark.filterwarnings("ignore::rlx_driver.errors.RecompilationWarning"),
]

JAX_DTYPES = [
    row.dtype
    for row in dtypes.TABLE.values()
    if row.jax is not None and row.dlpack is not None and row.dtype.itemsize <= 4
]


def plus_one(x):
    return x + 1


def add(x, y):
    return x + y


def counting(function):
    """Count how often a step is traced (or run)."""

    def step(*args, **kwargs):
        step.calls += 1
        return function(*args, **kwargs)

    step.calls = 0
    return step


class Snapshot:
    """The bytes, epoch and view of a Buffer, to show that an error left them alone."""

    def __init__(self, buffer):
        self.buffer = buffer
        self.bytes = buffer.numpy().tobytes()
        self.epoch = buffer.epoch
        self.view = buffer.jax()

    def assert_unchanged(self):
        assert self.buffer.epoch == self.epoch
        assert not self.view.is_deleted()
        assert self.buffer.numpy().tobytes() == self.bytes
        assert np.asarray(self.buffer.jax()).tobytes() == self.bytes


# --- in place --------------------------------------------------------------------------------


def test_two_hundred_jax_updates_stay_at_one_address():
    b = rlx.Buffer.zeros((64, 3))
    n, t, where = b.numpy(), b.torch(), b.address
    with rlx.no_copies(), rlx.ledger.record() as r:
        for i in range(200):
            b.update(plus_one)
            assert address(b.jax()) == where
            assert n[0, 0] == i + 1
    assert b.address == where == address(n) == address(t)
    assert (n == 200).all()
    assert bool((t == 200).all())
    assert b.epoch == 200
    assert r.counts.copies == 0


@pytest.mark.parametrize("dtype", JAX_DTYPES, ids=str)
def test_every_dtype_of_jax_is_updated_in_place(dtype):
    expected = np.ones(64, dtype)
    b = rlx.Buffer.from_array(expected, copy=True)
    where = b.address
    with rlx.no_copies():
        b.update(lambda x: x.at[3].set(jnp.full((), 2).astype(x.dtype)))
        assert address(b.jax()) == where
    expected[3] = 2
    assert b.numpy().dtype == dtype
    assert b.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (7,), (3, 5, 2)])
def test_odd_shapes(shape):
    b = rlx.Buffer.zeros(shape)
    with rlx.no_copies():
        for _ in range(3):
            b.update(plus_one)
    assert b.epoch == 3
    assert b.numpy().shape == shape
    assert (b.numpy() == 3).all()


def test_aux_kwargs_and_static_arguments():
    b = rlx.Buffer.zeros(4)

    def step(x, y, power, *, scale):
        assert isinstance(power, int)  # not traced
        return x + y**power * scale, {"sum": x.sum(), "y": y}

    aux = b.update(step, jnp.full(4, 3.0), 2, scale=2.0, has_aux=True, static_argnums=(2,))
    assert (b.numpy() == 18).all()
    assert float(aux["sum"]) == 0
    assert (np.asarray(aux["y"]) == 3).all()
    aux = b.update(step, jnp.full(4, 1.0), 3, scale=1.0, has_aux=True, static_argnums=2)
    assert float(aux["sum"]) == 72
    assert b.update(plus_one) is None
    assert (b.numpy() == 20).all()


def test_static_argument_that_is_no_array():
    b = rlx.Buffer.zeros(4)

    def step(x, mode):
        return {"one": x + 1, "two": x + 2}[mode]

    for mode in ("one", "two", "one"):
        b.update(step, mode, static_argnums=(1,))
    assert (b.numpy() == 4).all()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda x: x, 5.0),
        (lambda x: x + 0, 5.0),
        (lambda x: jnp.zeros_like(x), 0.0),
        (lambda x: jnp.full_like(x, 3), 3.0),
        (lambda x: jnp.ones((16, 4)), 1.0),
        (lambda x: jnp.asarray(np.full((16, 4), 2.0, np.float32)), 2.0),
        (lambda x: np.full((16, 4), 2.0, np.float32), 2.0),
    ],
    ids=["same", "plus zero", "zeros_like", "full_like", "constant", "captured", "numpy"],
)
def test_a_step_that_does_not_need_its_input_lands_in_place(step, expected):
    b = rlx.Buffer.from_array(np.full((16, 4), 5.0, np.float32), copy=True)
    n = b.numpy()
    with rlx.no_copies():
        for i in range(3):
            b.update(step)
            assert address(b.jax()) == b.address
            assert (n == expected).all()
            assert b.epoch == i + 1


def test_an_aux_output_that_looks_like_the_state_does_not_take_its_memory():
    b = rlx.Buffer.zeros(64)

    def step(x):
        return x + 1, x * 2

    with rlx.no_copies():
        for i in range(5):
            aux = b.update(step, has_aux=True)
            assert address(aux) != b.address
            assert (np.asarray(aux) == 2 * i).all()
            assert (b.numpy() == i + 1).all()


@pytest.mark.parametrize("jitted", [False, True])
def test_a_step_that_returns_one_of_its_arguments(jitted):
    b, y = rlx.Buffer.zeros(64), jnp.full(64, 3, jnp.float32)
    n = b.numpy()

    def second(x, y):
        return y

    step = jax.jit(second, donate_argnums=0, keep_unused=True) if jitted else second
    with rlx.no_copies():
        b.update(step, y)
    assert (n == 3).all()
    assert address(b.jax()) == b.address != address(y)
    with b.write("numpy") as w:
        w += 1
    assert (np.asarray(y) == 3).all()
    b.update(plus_one)
    assert (n == 5).all()


def test_a_jitted_step_with_a_weakly_typed_result():
    b = rlx.Buffer.zeros(64)
    step = jax.jit(lambda x: jnp.full(64, 2.0), donate_argnums=0, keep_unused=True)
    assert jax.eval_shape(step, jnp.zeros(64)).weak_type
    with rlx.no_copies():
        for _ in range(2):
            b.update(step)
    assert (b.numpy() == 2).all()


def test_the_state_as_aux_too_gets_memory_of_its_own():
    b = rlx.Buffer.from_array(np.full(64, 2, np.float32), copy=True)
    aux = b.update(lambda x: (x, x), has_aux=True)
    assert address(aux) != b.address
    b.update(plus_one)
    assert (np.asarray(aux) == 2).all()
    assert (b.numpy() == 3).all()


def test_the_old_jax_view_is_dead_and_says_so():
    b = rlx.Buffer.zeros(4)
    old = b.jax()
    b.update(plus_one)
    assert old.is_deleted()
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        np.asarray(old)
    assert (np.asarray(b.jax()) == 1).all()


def test_update_waits_for_a_reader_in_another_thread():
    warm_up()
    b = ones()
    b.numpy()
    result = reader_in_flight(b.jax())
    b.update(lambda x: x * 0)
    assert (b.numpy() == 0).all()
    assert is_intact(result)


def test_updates_from_several_threads_are_all_counted():
    b = rlx.Buffer.zeros(1024)
    b.numpy()

    def many():
        for _ in range(50):
            b.update(plus_one)

    futures = [start(many) for _ in range(3)]
    for future in futures:
        future.result(timeout=60)
    assert (b.numpy() == 150).all()
    assert b.epoch == 150


def test_an_unordered_update_is_settled_by_the_next_view():
    b = ones()
    n = b.numpy()
    b.update(slow_step, ordered=False)
    assert b.numpy() is n
    assert (n == 2).all()
    b.update(slow_step, ordered=False)
    assert bool((b.torch() == 3).all())


def slow_step(x):
    y = slow_read(x / x)
    return x + y


def test_update_on_an_aligned_slice_changes_the_base_there_only():
    b = rlx.Buffer.zeros((4, 16))
    with rlx.no_copies():
        b[1].update(plus_one)
        b[2:4].update(lambda x: x + 2)
    assert b.numpy()[:, 0].tolist() == [0, 1, 2, 2]
    assert b.epoch == 2 == b[0].epoch


def test_update_on_a_misaligned_slice_is_refused_and_nothing_changes():
    b = rlx.Buffer.zeros((4, 3))
    with pytest.raises(rlx.ZeroCopyError, match="align"):
        b[1].update(plus_one)
    assert b.epoch == 0
    assert (b.numpy() == 0).all()
    b[1].update(lambda x: x + 1, framework="numpy")
    assert b.numpy().sum() == 3


# --- programs --------------------------------------------------------------------------------


def test_a_jitted_step_that_donates_is_taken_as_it_is():
    b = rlx.Buffer.zeros(64)
    inner = counting(lambda x, y: x + y)
    step = jax.jit(inner, donate_argnums=0, keep_unused=True)
    with rlx.no_copies():
        for _ in range(5):
            b.update(step, 1.0)
    assert (b.numpy() == 5).all()
    assert address(b.jax()) == b.address
    assert inner.calls <= 2  # its own trace, and the check of its result


def test_a_jitted_step_that_does_not_donate_is_copied_and_the_ledger_says_so():
    b = rlx.Buffer.zeros(64)
    n = b.numpy()
    step = jax.jit(plus_one)
    with rlx.ledger.record() as r:
        b.update(step)
        b.update(step)
    assert (n == 2).all()
    assert b.epoch == 2
    assert address(b.jax()) == b.address
    assert r.counts.copies == 2
    assert r.counts.bytes_copied == 2 * b.byte_size
    assert any("in place" in reason for reason in r.counts.reasons)


def test_no_copies_refuses_a_result_that_lies_elsewhere_and_nothing_changes():
    b = rlx.Buffer.zeros(64)
    before = Snapshot(b)
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError, match="no_copies"):
        b.update(jax.jit(plus_one))
    before.assert_unchanged()
    b.update(plus_one)
    assert (b.numpy() == 1).all()


def test_a_copied_result_waits_for_readers_in_other_threads():
    warm_up()
    b = ones()
    result = reader_in_flight(b.jax())
    b.update(jax.jit(jnp.zeros_like))
    assert (b.numpy() == 0).all()
    assert is_intact(result)


def test_a_copied_result_is_refused_while_an_alias_holds_the_old_array():
    b = rlx.Buffer.zeros(64)
    alias = np.asarray(b.jax())
    with pytest.raises(rlx.ZeroCopyError, match="alias"):
        b.update(jax.jit(plus_one))
    assert (b.numpy() == 0).all()
    assert b.epoch == 0
    del alias
    b.update(jax.jit(plus_one))
    assert (b.numpy() == 1).all()


def test_a_donating_update_is_right_while_an_alias_holds_the_old_array():
    b = rlx.Buffer.zeros(64)
    alias = np.asarray(b.jax())
    with pytest.raises(rlx.ZeroCopyError, match="alias"):
        b.update(plus_one)
    assert (alias == 0).all()
    assert b.epoch == 0
    del alias
    with rlx.no_copies():
        b.update(plus_one)
    assert (b.numpy() == 1).all()


def test_a_jitted_step_with_static_arguments():
    b = rlx.Buffer.zeros(8)
    step = jax.jit(
        lambda x, n, *, how: x + n if how == "add" else x * n,
        donate_argnums=0,
        static_argnames=("how",),
    )
    b.update(step, 3.0, how="add")
    b.update(step, 2.0, how="mul")
    assert (b.numpy() == 6).all()


def test_the_step_is_traced_once():
    b = rlx.Buffer.zeros(64)
    step = counting(add)
    for i in range(20):
        b.update(step, float(i))
    assert step.calls == 1
    assert b.numpy()[0] == sum(range(20))


def test_the_program_is_shared_by_buffers_of_one_shape():
    step = counting(plus_one)
    for b in [rlx.Buffer.zeros(64), rlx.Buffer.zeros(64), rlx.BufferHandle("h", 64)]:
        b.update(step)
    assert step.calls == 1


def test_weakly_typed_results_do_not_trace_again():
    b = rlx.Buffer.zeros(())
    step = counting(lambda x: jnp.asarray(1.0) * 2)
    for _ in range(4):
        b.update(step)
    assert step.calls == 1
    assert not b.jax().aval.weak_type


def test_the_cache_does_not_keep_a_step_alive():
    b = rlx.Buffer.zeros(64)
    big = np.zeros(1000)

    def step(x):
        return x + big.size

    def tree_step(tree):
        return [x + big.size for x in tree]

    held, held_too = weakref.ref(step), weakref.ref(tree_step)
    for _ in range(3):
        b.update(step)
        rlx.update([b], tree_step)
    del step, tree_step
    gc.collect()
    assert held() is None
    assert held_too() is None
    b.update(plus_one)
    assert (b.numpy() == 6001).all()


def test_a_new_step_at_the_address_of_a_dead_one_is_a_new_step():
    b = rlx.Buffer.zeros(4)
    for value in range(12):

        def step(x, value=value):
            return jnp.full_like(x, value)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rlx.RecompilationWarning)
            b.update(step)
        del step
        gc.collect()
        assert (b.numpy() == value).all()


def test_the_cache_is_bounded():
    cache = StepCache(limit=3)
    steps = [lambda x, i=i: x + i for i in range(10)]
    programs = [cache.get(step, None, False, ()) for step in steps]
    assert len(cache) == 3
    assert cache.get(steps[-1], None, False, ()) is programs[-1]
    assert cache.get(steps[0], None, False, ()) is not programs[0]


def test_bound_methods_partials_and_callable_objects():
    class Model:
        traces = 0

        def __init__(self, rate):
            self.rate = rate

        def step(self, x):
            Model.traces += 1
            return x + self.rate

        def __call__(self, x):
            Model.traces += 1
            return x * self.rate

    b = rlx.Buffer.zeros(4)
    one, two = Model(1), Model(2)
    for _ in range(3):
        b.update(one.step)
    assert Model.traces == 1
    b.update(two.step)
    assert (b.numpy() == 5).all()
    b.update(two)
    assert (b.numpy() == 10).all()
    partial = functools.partial(add, y=5)
    b.update(partial)
    b.update(partial)
    assert (b.numpy() == 20).all()
    held = weakref.ref(one)
    del one
    gc.collect()
    assert held() is None


def test_the_third_trace_of_one_step_warns_once_and_points_at_the_caller():
    b = rlx.Buffer.zeros(4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for i in range(5):
            b.update(lambda x, i=i: x + i)
            if i == 1:
                assert not seen
    ours = [w for w in seen if issubclass(w.category, rlx.RecompilationWarning)]
    assert len(ours) == 1
    text = str(ours[0].message)
    assert "traced 3 times" in text
    assert "<lambda>" in text
    assert "same function object" in text
    assert ours[0].filename == __file__
    assert (b.numpy() == 10).all()


# --- checked before anything is donated ------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "options", "error", "text"),
    [
        (lambda x: x[:2], {}, rlx.ShapeError, r"shape \(2, 4\).*\(16, 4\)"),
        (lambda x: x.sum(), {}, rlx.ShapeError, r"shape \(\)"),
        (lambda x: x.astype(jnp.int32), {}, rlx.DTypeError, "int32.*float32"),
        (lambda x: (x, x), {}, rlx.ShapeError, "has_aux=True"),
        (lambda x: None, {}, rlx.ShapeError, "one array"),
        (lambda x: {"x": x}, {}, rlx.ShapeError, "one array"),
        (lambda x: x, {"has_aux": True}, rlx.ShapeError, r"\(state, aux\)"),
        (lambda x: (x, x, x), {"has_aux": True}, rlx.ShapeError, r"\(state, aux\)"),
        (lambda x: [x, x], {"has_aux": True}, rlx.ShapeError, r"\(state, aux\)"),
        (lambda x: (x.sum(), x), {"has_aux": True}, rlx.ShapeError, r"shape \(\)"),
        (lambda x: 1 / 0, {}, ZeroDivisionError, "division"),
    ],
    ids=[
        "shape",
        "scalar",
        "dtype",
        "pair",
        "none",
        "dict",
        "no pair",
        "triple",
        "list",
        "swapped",
        "raises",
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_a_wrong_step_changes_nothing(step, options, error, text, jitted):
    b = rlx.Buffer.from_array(np.arange(64, dtype=np.float32).reshape(16, 4), copy=True)
    before = Snapshot(b)
    if jitted:
        step = jax.jit(step, donate_argnums=0)
    for _ in range(2):
        with pytest.raises(error, match=text):
            b.update(step, **options)
        before.assert_unchanged()
    b.update(plus_one)
    assert b.numpy()[0, 0] == 1


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize(
    ("step", "options", "error", "text"),
    [
        (lambda x: x[:2] + 1, {}, rlx.ShapeError, r"shape \(2, 4\).*\(16, 4\)"),
        (lambda x: x > 1, {}, rlx.DTypeError, "bool.*float32"),
        (lambda x: jnp.ones((16, 4)), {}, rlx.DTypeError, "jax"),
        (lambda x: [1], {}, rlx.DTypeError, "list"),
        (lambda x: x + 1, {"has_aux": True}, rlx.ShapeError, r"\(state, aux\)"),
    ],
    ids=["shape", "dtype", "foreign", "list", "no pair"],
)
def test_a_wrong_torch_or_numpy_result_copies_nothing(framework, step, options, error, text):
    b = rlx.Buffer.from_array(np.arange(64, dtype=np.float32).reshape(16, 4), copy=True)
    was = b.numpy().tobytes()
    with pytest.raises(error, match=text):
        b.update(step, framework=framework, **options)
    assert b.numpy().tobytes() == was
    b.update(plus_one, framework=framework)
    assert b.numpy()[0, 0] == 1


def test_an_unknown_framework_or_a_module_without_a_backend():
    foreign = types.ModuleType("foreign")
    foreign.from_dlpack = np.from_dlpack
    b = rlx.Buffer.zeros(4)
    with pytest.raises(rlx.UnknownFrameworkError):
        b.update(plus_one, framework="tensorflow")
    with pytest.raises(rlx.ZeroCopyError, match="foreign has none"):
        b.update(plus_one, framework=foreign)
    assert b.epoch == 0


def test_update_inside_a_trace_raises():
    b = rlx.Buffer.zeros(4)

    @jax.jit
    def outer(y):
        b.update(plus_one)
        return y

    with pytest.raises(rlx.StaleViewError, match="trace"):
        outer(1.0)
    assert b.epoch == 0
    b.update(plus_one)
    with pytest.raises(rlx.StaleViewError, match="trace"):
        outer(2)
    assert (b.numpy() == 1).all()


def test_disable_jit_gives_the_right_value_at_the_same_address():
    b = rlx.Buffer.zeros(64)
    n = b.numpy()
    with jax.disable_jit():
        b.update(plus_one)
        assert (n == 1).all()
        aux = b.update(lambda x: (x + 1, x.sum()), has_aux=True)
    assert float(aux) == 64
    assert (n == 2).all()
    assert address(b.jax()) == b.address
    assert b.epoch == 2


# --- arguments -------------------------------------------------------------------------------


def late_use(x, y):
    return slow_read(x) * y


@pytest.mark.parametrize("place", ["positional", "keyword", "tree"])
def test_numpy_arguments_may_be_reused_at_once(place):
    step = {
        "positional": late_use,
        "keyword": lambda x, *, y: late_use(x, y),
        "tree": lambda x, tree: late_use(x, tree["a"][0]),
    }[place]
    for _ in range(5):
        b = ones()
        y = np.ones((512, 512), np.float32)
        if place == "positional":
            b.update(step, y)
        elif place == "keyword":
            b.update(step, y=y)
        else:
            b.update(step, {"a": (y,)})
        y[...] = 0
        assert (b.numpy() == 1).all()


def test_positive_control_jax_reads_numpy_arguments_late():
    step = jax.jit(late_use)
    jax.block_until_ready(step(jnp.ones((512, 512)), np.ones((512, 512), np.float32)))

    def wrong():
        y = np.ones((512, 512), np.float32)
        result = step(jnp.ones((512, 512)), y)
        y[...] = 0
        return not is_intact(result)

    with jax.default_device(jax.devices("cpu")[0]):
        assert ever(wrong)


def test_private_copies_of_arguments_are_allowed_in_no_copies():
    b = rlx.Buffer.zeros(64)
    with rlx.no_copies():
        b.update(add, np.ones(64, np.float32))
    assert (b.numpy() == 1).all()


@pytest.mark.parametrize("framework", ["jax", "torch", "numpy"])
def test_buffers_as_arguments_become_views(framework):
    b, c, d = (rlx.Buffer.from_array(np.full(64, i, np.float32), copy=True) for i in (1, 2, 3))

    def step(x, y, *, z):
        assert not isinstance(y, rlx.Buffer)
        assert not isinstance(z, rlx.Buffer)
        return x + y * z

    with rlx.ledger.record() as r:
        b.update(step, c, z=d, framework=framework)
    assert (b.numpy() == 7).all()
    assert (c.numpy() == 2).all()
    assert c.epoch == 0
    assert r.counts.copies == (0 if framework == "jax" else 1)


def test_a_buffer_in_a_tree_of_arguments():
    b, c = rlx.Buffer.zeros(64), rlx.Buffer.from_array(np.ones(64, np.float32), copy=True)
    b.update(lambda x, tree: x + tree["a"][0] + tree["n"], {"a": [c], "n": 2})
    assert (b.numpy() == 3).all()


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_a_buffer_in_a_tree_of_arguments_of_torch_and_numpy(framework):
    b, c = rlx.Buffer.zeros(64), rlx.Buffer.from_array(np.ones(64, np.float32), copy=True)

    def step(x, tree):
        assert not isinstance(tree["a"][0], rlx.Buffer)
        return x + tree["a"][0]

    b.update(step, {"a": [c]}, framework=framework)
    assert (b.numpy() == 1).all()


def test_an_argument_with_an_update_of_its_own_pending():
    b, c = rlx.Buffer.zeros((512, 512)), ones()
    c.update(slow_step, ordered=False)
    b.update(add, c)
    assert (b.numpy() == 2).all()
    c.update(slow_step, ordered=False)
    b.update(lambda x, y: x.add_(y), c, framework="torch")
    assert (b.numpy() == 5).all()


@pytest.mark.parametrize("framework", ["jax", "torch", "numpy"])
def test_the_same_memory_as_state_and_argument_raises(framework):
    b = rlx.Buffer.zeros((4, 16))
    for argument in (b, b[1], [b]):
        with pytest.raises(rlx.StaleViewError, match="an argument of it too"):
            b.update(lambda x, y: x, argument, framework=framework)
        with pytest.raises(rlx.StaleViewError, match="an argument of it too"):
            b.update(lambda x, y: x, y=argument, framework=framework)
    assert (b.numpy() == 0).all()
    assert b.epoch == 0
    b.update(lambda x: x + 1, framework=framework)
    assert (b.numpy() == 1).all()


def test_two_threads_that_pass_each_others_buffer_do_not_deadlock():
    run_python(
        """
        import faulthandler, sys, threading
        faulthandler.dump_traceback_later(30, exit=True)
        import numpy as np, rlx_driver as rlx
        sys.setswitchinterval(1e-5)
        a, b = rlx.Buffer.zeros((256, 256)), rlx.Buffer.zeros((256, 256))
        step = lambda x, y: x + 0 * y
        tree_step = lambda tree, y: [tree[0] + 0 * y]
        a.update(step, b), b.update(step, a)

        def many(x, y):
            for _ in range(400):
                x.update(step, y)
                rlx.update([x], tree_step, y)
                x.update(np.add, 1, framework="numpy")
                x.update(lambda u, v: u.add_(0 * v), y, framework="torch")

        threads = [threading.Thread(target=many, args=pair) for pair in ((a, b), (b, a))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (a.numpy() == 400).all() and (b.numpy() == 400).all()
        """
    )


def test_the_own_jax_view_as_an_argument_is_refused_and_nothing_changes():
    b = rlx.Buffer.from_array(np.ones(64, np.float32), copy=True)
    j = b.jax()
    with pytest.raises((ValueError, RuntimeError)):
        b.update(add, j)
    b.copy_from(np.full(64, 2, np.float32))
    assert (b.numpy() == 2).all()
    b.update(plus_one)
    assert (b.numpy() == 3).all()


# --- access from inside ----------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_access_from_inside_the_own_step_raises(framework):
    b = rlx.Buffer.zeros((4, 16))
    accesses = [
        b.numpy,
        b.torch,
        b.jax,
        b[0].numpy,
        lambda: b.copy_from(np.zeros((4, 16), np.float32)),
        lambda: b.update(plus_one),
        lambda: b.read("numpy").__enter__(),
        lambda: b.write("numpy").__enter__(),
        lambda: np.asarray(b),
        b.host_bytes,
    ]
    tried = []

    def step(x):
        for access in accesses:
            with pytest.raises(rlx.StaleViewError, match="being written"):
                access()
            tried.append(access)
        x += 1

    b.numpy(), b.torch(), b.jax()
    b.update(step, framework=framework)
    assert len(tried) == len(accesses)
    assert (b.numpy() == 1).all()


def test_access_from_inside_the_own_jax_step_raises_while_tracing():
    b = rlx.Buffer.zeros(64)
    for access in (b.numpy, b.torch, b.jax):
        access()
        with pytest.raises(rlx.StaleViewError, match=r"being written|trace"):
            b.update(lambda x, access=access: x + access())
    assert b.epoch == 0
    b.update(plus_one)
    assert (b.numpy() == 1).all()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_callback_that_reads_the_buffer_raises_and_does_not_hang(ordered):
    out = run_python(
        f"""
        import faulthandler
        faulthandler.dump_traceback_later(45, exit=True)
        import jax, numpy as np, rlx_driver as rlx
        b = rlx.Buffer.zeros(64)
        b.numpy()
        errors = []

        def peek(x):
            for access in (b.numpy, b.torch, b.jax, lambda: np.asarray(b)):
                try:
                    access()
                except rlx.StaleViewError as error:
                    errors.append(str(error))
            return np.asarray(x) + 1

        def step(x):
            return jax.pure_callback(peek, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

        b.update(step, ordered={ordered})
        assert (b.numpy() == 1).all()
        print(len(errors), b.epoch)
        """
    )
    assert out.split() == ["4", "1"]


# --- failing programs ------------------------------------------------------------------------


def boom(x):
    def fail(_):
        raise RuntimeError("boom in the callback")

    return jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.mark.parametrize("how", ["ordered", "unordered", "jitted", "tree"])
def test_a_program_that_fails_while_it_runs(how, capfd):
    b = rlx.Buffer.from_array(np.ones(64, np.float32), copy=True)
    n = b.numpy()
    epoch = b.epoch
    run = {
        "ordered": lambda: b.update(boom),
        "unordered": lambda: (b.update(boom, ordered=False), b.numpy()),
        "jitted": lambda: b.update(jax.jit(boom, donate_argnums=0)),
        "tree": lambda: rlx.update({"b": b}, lambda tree: {"b": boom(tree["b"])}),
    }[how]
    with pytest.raises(rlx.UpdateFailedError, match=r"(?s)failed.*undefined.*copy_from"):
        run()
    assert b.epoch > epoch
    b.copy_from(np.full(64, 7, np.float32))
    assert (n == 7).all()
    assert b.numpy() is n
    with rlx.no_copies():
        b.update(plus_one)
    assert (n == 8).all()
    capfd.readouterr()  # XLA logs the error


def test_an_undonated_program_that_fails_changes_nothing(capfd):
    b = rlx.Buffer.from_array(np.ones(64, np.float32), copy=True)
    with pytest.raises((rlx.UpdateFailedError, jax.errors.JaxRuntimeError), match="boom"):
        b.update(jax.jit(boom))
    assert b.epoch == 0
    assert (b.numpy() == 1).all()
    b.update(plus_one)
    assert (b.numpy() == 2).all()
    capfd.readouterr()


# --- torch and NumPy -------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["torch", "numpy"])
class TestMutableSteps:
    def test_a_step_may_mutate(self, framework):
        b = rlx.Buffer.zeros(64)
        where = b.address

        def step(x):
            x += 1

        with rlx.no_copies():
            assert b.update(step, framework=framework) is None
        assert (b.numpy() == 1).all()
        assert b.address == where
        assert b.epoch == 1

    def test_a_step_may_return_its_argument(self, framework):
        b = rlx.Buffer.zeros(64)

        def step(x):
            x += 1
            return x, "aux"

        with rlx.no_copies():
            assert b.update(step, framework=framework, has_aux=True) == "aux"
        assert (b.numpy() == 1).all()

    def test_a_new_array_is_copied_into_place(self, framework):
        b = rlx.Buffer.zeros(64)
        n = b.numpy()
        with rlx.ledger.record() as r:
            b.update(plus_one, framework=framework)
        assert (n == 1).all()
        assert r.counts.bytes_copied == b.byte_size
        assert b.epoch == 1

    def test_a_new_array_inside_no_copies_raises(self, framework):
        b = rlx.Buffer.zeros(64)
        with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError, match="not made in place"):
            b.update(plus_one, framework=framework)
        assert (b.numpy() == 0).all()

    def test_a_view_of_the_argument_as_the_result(self, framework):
        b = rlx.Buffer.from_array(np.arange(64, dtype=np.float32), copy=True)
        flip = (lambda x: x[::-1]) if framework == "numpy" else (lambda x: x.view(64)[:])
        b.update(flip, framework=framework)
        expected = np.arange(64)[::-1] if framework == "numpy" else np.arange(64)
        assert b.numpy().tolist() == expected.tolist()

    def test_swapped_leaves(self, framework):
        tree = {
            "a": rlx.Buffer.from_array(np.ones(64, np.float32), copy=True),
            "b": rlx.Buffer.from_array(np.full(64, 2, np.float32), copy=True),
        }
        rlx.update(tree, lambda t: {"a": t["b"], "b": t["a"]}, framework=framework)
        assert (tree["a"].numpy() == 2).all()
        assert (tree["b"].numpy() == 1).all()

    def test_it_waits_for_jax_readers_and_kills_their_arrays(self, framework):
        warm_up()
        b = ones()
        j = b.jax()
        result = reader_in_flight(j)

        def step(x):
            x *= 0

        b.update(step, framework=framework)
        assert is_intact(result)
        assert j.is_deleted()
        assert (np.asarray(b.jax()) == 0).all()

    def test_an_error_in_the_step_keeps_what_was_written(self, framework):
        b = rlx.Buffer.zeros(64)

        def step(x):
            x += 1
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            b.update(step, framework=framework)
        assert b.epoch == 1
        assert (b.numpy() == 1).all()
        assert (np.asarray(b.jax()) == 1).all()


def test_swapped_leaves_of_jax():
    tree = {
        "a": rlx.Buffer.from_array(np.ones(64, np.float32), copy=True),
        "b": rlx.Buffer.from_array(np.full(64, 2, np.float32), copy=True),
    }
    where = tree["a"].address, tree["b"].address
    with rlx.no_copies():
        rlx.update(tree, lambda t: {"a": t["b"], "b": t["a"]})
    assert (tree["a"].numpy() == 2).all()
    assert (tree["b"].numpy() == 1).all()
    assert (tree["a"].address, tree["b"].address) == where


def test_a_torch_step_runs_without_grad():
    b = rlx.Buffer.zeros(64)
    weight = torch.ones(64, requires_grad=True)
    modes = []

    def step(x):
        modes.append(torch.is_grad_enabled())
        return x + weight

    b.update(step, framework="torch")
    assert modes == [False]
    assert (b.numpy() == 1).all()
    assert not b.torch().requires_grad
    assert torch.is_grad_enabled()


def test_frameworks_take_turns_on_one_buffer():
    b = rlx.Buffer.zeros(64)
    n, t = b.numpy(), b.torch()
    for i in range(10):
        b.update(plus_one)
        b.update(lambda x: x.add_(1), framework="torch")
        b.update(lambda x: np.add(x, 1, out=x), framework="numpy")
        t += 1
        n += 1
        assert float(b.jax()[0]) == 5 * (i + 1)
    assert (n == 50).all()


# --- memory and life -------------------------------------------------------------------------


def test_pending_undonated_results_and_dropped_imports_do_not_deadlock():
    run_python(
        """
        import faulthandler
        faulthandler.dump_traceback_later(100, exit=True)
        import jax, jax.numpy as jnp, numpy as np, rlx_driver as rlx
        step = jax.jit(lambda x: (x @ x) * (1 / 256) + 0 * x)  # does not donate
        buffers = [rlx.Buffer.zeros((256, 256)) for _ in range(6)]
        for round in range(30):
            for b in buffers:
                b.update(step, ordered=False)
                b.jax()
            for b in buffers[:2]:
                rlx.Buffer.zeros((256, 256)).update(step, ordered=False)
            rlx.update(buffers, jax.jit(lambda tree: [step(x) for x in tree]), ordered=False)
            rlx.exchange(step(jnp.zeros((256, 256))), "numpy")
        assert all((b.numpy() == 0).all() for b in buffers)
        """
    )


def test_update_in_place_needs_no_second_copy():
    out = run_python(
        """
        import resource
        import jax, numpy as np, rlx_driver as rlx

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

        step = lambda x: x * 2 + 1
        small = rlx.Buffer.zeros(64)
        small.update(step), small.torch()
        b = rlx.Buffer.zeros(128 << 20, "f32")
        b.numpy()[...] = 1
        before = peak()
        with rlx.no_copies():
            for _ in range(3):
                b.update(step)
                b.torch().mul_(1)
                b.update(step, ordered=False)
        assert b.numpy()[-1] == 127
        print(before, peak() - before)
        """
    )
    before, grown = map(int, out.split())
    assert before > 512
    assert grown < 128  # MiB, for a buffer of 512


def test_a_dropped_buffer_with_an_update_pending_is_safe_and_freed():
    gc.collect()
    before = rlx.Device("cpu").memory().in_use
    for _ in range(20):
        b = ones()
        b.update(slow_step, ordered=False)
        del b
    j = ones_updated()
    assert is_intact(j - 1)
    del j
    jax.block_until_ready(jnp.zeros(()) + 1)
    deadline = 200
    while rlx.Device("cpu").memory().in_use > before and deadline:
        jax.block_until_ready(slow_read(jnp.ones((512, 512))))
        gc.collect()
        deadline -= 1
    assert rlx.Device("cpu").memory().in_use == before


def ones_updated():
    b = ones()
    b.update(slow_step, ordered=False)
    return b.jax()


@pytest.mark.parametrize("dtype", ["f64", "i64", "u64"])
def test_wide_dtypes_need_x64(dtype):
    b = rlx.Buffer.from_array(np.full(8, 2**40 + 3, rlx.dtype(dtype)), copy=True)
    with pytest.raises(rlx.ZeroCopyError, match="x64"):
        b.jax()
    with pytest.raises(rlx.ZeroCopyError, match="x64"):
        b.update(plus_one)
    assert b.epoch == 0
    b.update(lambda x: np.add(x, x.dtype.type(1), out=x), framework="numpy")
    with x64(True), rlx.no_copies():
        assert b.jax().dtype == b.dtype
        b.update(plus_one)
        assert address(b.jax()) == b.address
    assert (b.numpy() == 2**40 + 5).all()


def test_bfloat16_state_shows_in_all_frameworks():
    b = rlx.Buffer.zeros((4, 64), "bf16")
    t, n = b.torch(), b.numpy()
    assert t.dtype is torch.bfloat16
    assert n.dtype == ml_dtypes.bfloat16
    with rlx.no_copies():
        b.update(lambda x: x.at[1].set(1.5))
    assert (n[1] == 1.5).all()
    assert bool((t[1] == 1.5).all())
    assert float(t.float().sum()) == 96


def test_update_under_a_read_scope_of_the_same_thread_raises():
    b = rlx.Buffer.zeros(64)
    with b.read("numpy"), pytest.raises(rlx.StaleViewError, match="leave the read scope"):
        b.update(plus_one)
    assert b.epoch == 0
    b.update(plus_one)


def test_update_in_another_thread_waits_for_a_read_scope():
    b = rlx.Buffer.zeros(64)
    with b.read("numpy") as n:
        waiting = start(b.update, plus_one)
        in_thread(lambda: None)
        assert n.sum() == 0
        assert not waiting.done()
    waiting.result(timeout=60)
    assert (b.numpy() == 1).all()


@pytest.mark.parametrize("tree", [False, True])
def test_without_donation_in_place_an_update_is_right_by_way_of_a_copy(monkeypatch, tree):
    from rlx_driver.registry import registry

    monkeypatch.setattr(registry.get("jax"), "can_lease", lambda device: False)
    b = rlx.Buffer.zeros(64)
    address, held = b.address, b.numpy()
    for _ in range(3):
        if tree:
            rlx.update([b], plus_one_each)
        else:
            b.update(plus_one)
    assert (held == 3).all()
    assert b.address == address == held.ctypes.data
    assert b.epoch == 3
    assert rlx.ledger.copies == 3
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError, match="in place"):
        b.update(plus_one)
    assert (held == 3).all()
    with pytest.raises(rlx.ZeroCopyError, match="HandleRegion"):
        b.jax()


def plus_one_each(tree):
    return [leaf + 1 for leaf in tree]


@pytest.mark.parametrize("viewed", [False, True], ids=["no view out", "view out"])
def test_a_copied_back_update_after_one_that_nobody_waited_for(viewed):
    b = rlx.Buffer.zeros(64)
    if viewed:
        b.numpy()
    b.update(plus_one, ordered=False)
    b.jax()  # handed out, so that the copy has a reader to fence
    b.update(jax.jit(plus_one))  # does not donate
    assert b.numpy().tolist() == [2.0] * 64
    assert b.jax().sum() == 128
