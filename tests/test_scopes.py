"""Read and write scopes: who waits for whom, and what a reader under way sees."""

import threading

import numpy as np
import pytest

import rlx_driver as rlx

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402

from buffer_support import (  # noqa: E402
    address,
    enter_and_leave,
    ever,
    in_thread,
    is_intact,
    ones,
    reader_in_flight,
    run_python,
    slow_read,
    start,
    warm_up,
)

pytestmark = [
    pytest.mark.jax,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::rlx_driver.errors.RecompilationWarning"),
]

MUTABLE = ["numpy", "torch"]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    warm_up()


def plus_one(x):
    return x + 1


def plus_one_each(tree):
    return [x + 1 for x in tree]


def deleted():
    return pytest.raises((RuntimeError, ValueError), match=r"deleted|donated")


# --- what scopes give ------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_a_read_scope_gives_the_memory(framework):
    b = rlx.Buffer.from_array(np.arange(64, dtype=np.float32), copy=True)
    with rlx.no_copies(), b.read(framework) as a:
        assert address(a) == b.address
        assert np.asarray(a).tolist() == list(range(64))
    assert b.epoch == 0
    assert b.array(framework) is a


@pytest.mark.parametrize("framework", MUTABLE)
def test_a_write_scope_gives_the_memory(framework):
    b = rlx.Buffer.zeros(64)
    n, t = b.numpy(), b.torch()
    with rlx.no_copies(), b.write(framework) as a:
        assert address(a) == b.address
        a[...] = 3
    assert b.epoch == 1
    assert (n == 3).all()
    assert bool((t == 3).all())
    assert (np.asarray(b.jax()) == 3).all()


def test_scopes_take_modules_as_well_as_names():
    b = rlx.Buffer.zeros(64)
    with b.write(torch) as t:
        t += 1
    with b.read(np) as n:
        assert (n == 1).all()
    with b.read(jax) as j:
        assert (np.asarray(j) == 1).all()


def test_jax_cannot_write_and_the_error_names_update():
    b = rlx.Buffer.zeros(64)
    j = b.jax()
    with pytest.raises(rlx.ZeroCopyError, match=r"immutable.*update"), b.write("jax"):
        pass
    assert not j.is_deleted()
    assert b.epoch == 0
    with b.write("numpy") as n:
        n += 1


def test_an_unknown_framework():
    b = rlx.Buffer.zeros(64)
    with pytest.raises(rlx.UnknownFrameworkError):
        b.read("tensorflow")
    with pytest.raises(rlx.UnknownFrameworkError):
        b.write("tensorflow")


def test_a_scope_may_be_made_long_before_it_is_entered_and_used_again():
    b = rlx.Buffer.zeros(64)
    scope = b.write("numpy")
    b.update(plus_one)
    for _ in range(2):
        with scope as n:
            n += 1
    assert (b.numpy() == 3).all()
    assert b.epoch == 3


def test_a_scope_is_not_entered_twice_at_a_time():
    b = rlx.Buffer.zeros(64)
    scope = b.read("numpy")
    with scope, pytest.raises(rlx.DriverError, match="once"):
        scope.__enter__()
    b.update(plus_one)


# --- exclusion -------------------------------------------------------------------------------


def test_readers_share_between_threads():
    b = rlx.Buffer.zeros(64)
    inside = threading.Barrier(4)

    def reader(framework):
        with b.read(framework):
            inside.wait(timeout=60)

    futures = [start(reader, f) for f in ("numpy", "torch", "jax", "numpy")]
    for future in futures:
        future.result(timeout=60)


@pytest.mark.parametrize("framework", MUTABLE)
@pytest.mark.parametrize(
    "intrude",
    [
        lambda b: b.read("numpy", timeout=0).__enter__(),
        lambda b: b.read("jax", timeout=0).__enter__(),
        lambda b: b.write("numpy", timeout=0.01).__enter__(),
        lambda b: b[0].write("torch", timeout=0).__enter__(),
        lambda b: rlx.read({"b": b}, "torch", timeout=0).__enter__(),
        lambda b: rlx.write([b[0], b[1]], "torch", timeout=0).__enter__(),
    ],
    ids=["read", "read jax", "write", "write slice", "tree read", "tree write"],
)
def test_a_writer_keeps_other_threads_out_until_a_timeout(framework, intrude):
    b = rlx.Buffer.zeros((4, 16))
    with b.write(framework) as a:
        a += 1
        with pytest.raises(rlx.AccessTimeoutError, match=r"could not be taken.*a writer"):
            in_thread(intrude, b)
    assert b.epoch == 1
    with b.write("numpy", timeout=0) as n:
        assert (n == 1).all()


def test_an_access_timeout_is_a_timeout_error():
    b = rlx.Buffer.zeros(4)
    with b.write("numpy"), pytest.raises(TimeoutError):
        in_thread(enter_and_leave, b.read("numpy", timeout=0))


def test_a_reader_keeps_writers_of_other_threads_out():
    b = rlx.Buffer.zeros(64)
    with b.read("numpy"), b.read("jax") as j:
        with pytest.raises(rlx.AccessTimeoutError, match="1 reader"):
            in_thread(lambda: b.write("numpy", timeout=0).__enter__())
        assert not j.is_deleted()  # nothing was fenced for a write that did not happen
    assert b.epoch == 0
    with b.write("numpy", timeout=0):
        pass


@pytest.mark.parametrize(
    "access",
    [
        lambda b: b.numpy(),
        lambda b: b.torch(),
        lambda b: b.jax(),
        lambda b: b.update(plus_one),
        lambda b: b.update(plus_one, framework="numpy"),
        lambda b: b.copy_from(np.full((4, 16), 9, np.float32)),
        lambda b: b.__setitem__(0, 5.0),
        lambda b: np.asarray(b),
        lambda b: b.host_bytes(),
        lambda b: b.to_host(),
        lambda b: b[1].numpy(),
        lambda b: rlx.views([b], "torch"),
        lambda b: rlx.update([b], lambda tree: [tree[0] + 1]),
        lambda b: b.__dlpack__(),
    ],
)
def test_every_access_of_another_thread_waits_for_the_writer(access):
    b = rlx.Buffer.zeros((4, 16))
    b.numpy(), b.torch(), b.jax()
    began = threading.Event()

    def intruder():
        began.set()
        return access(b)

    with b.write("numpy") as n:
        future = start(intruder)
        assert began.wait(timeout=60)
        for _ in range(20):
            assert not future.done()
            n += 1
    future.result(timeout=60)
    assert b.numpy().max() >= 5


def test_readers_are_re_entrant():
    b = rlx.Buffer.zeros(64)
    with b.read("numpy"), b.read("torch"), b.read("jax"):
        b.numpy(), b.torch(), b.jax()
        with b.read("numpy"):
            pass
        with pytest.raises(rlx.AccessTimeoutError):
            in_thread(lambda: b.write("numpy", timeout=0).__enter__())
    with b.write("numpy", timeout=0):
        pass


def test_a_waiting_writer_keeps_new_readers_out_but_not_those_inside():
    b = rlx.Buffer.zeros(64)
    wrote = threading.Event()

    def writer():
        with b.write("numpy") as n:
            n += 1
        wrote.set()

    with b.read("numpy"):
        future = start(writer)
        while not b._access.waiting:
            in_thread(lambda: None)
        with pytest.raises(rlx.AccessTimeoutError):
            in_thread(lambda: b.read("numpy", timeout=0.01).__enter__())
        with b.read("torch"):  # it would wait for the writer, which waits for this thread
            b.jax()
        assert not wrote.is_set()
    future.result(timeout=60)
    assert (b.numpy() == 1).all()


def test_a_writer_that_gives_up_lets_readers_in_again():
    b = rlx.Buffer.zeros(64)
    with b.read("numpy"):
        with pytest.raises(rlx.AccessTimeoutError):
            in_thread(lambda: b.write("numpy", timeout=0.01).__enter__())
        in_thread(enter_and_leave, b.read("numpy", timeout=0))


def test_writers_of_several_threads_take_turns():
    b = rlx.Buffer.zeros(64)

    def many():
        for _ in range(100):
            with b.write("numpy") as n:
                before = n[0].item()
                n += 1
                assert n[0] == before + 1

    for future in [start(many) for _ in range(4)]:
        future.result(timeout=60)
    assert (b.numpy() == 400).all()
    assert b.epoch == 400


def test_trees_taken_in_opposite_orders_do_not_deadlock():
    a, b = rlx.Buffer.zeros(64), rlx.Buffer.zeros(64)

    def many(tree):
        for _ in range(100):
            with rlx.write(tree, "numpy") as (x, y):
                x += 1
                y += 1
            rlx.update(tree, plus_one_each)

    futures = [start(many, tree) for tree in ([a, b], [b, a], [a, b])]
    for future in futures:
        future.result(timeout=120)
    assert (a.numpy() == 600).all()
    assert (b.numpy() == 600).all()


# --- from inside -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "access",
    [
        lambda b: b.numpy(),
        lambda b: b.torch(),
        lambda b: b.jax(),
        lambda b: b[1].numpy(),
        lambda b: b[1].jax(),
        lambda b: b.view("u8").numpy(),
        lambda b: b.array("numpy"),
        lambda b: b.update(plus_one),
        lambda b: b.update(plus_one, framework="torch"),
        lambda b: b.copy_from(np.zeros((4, 16), np.float32)),
        lambda b: b.__setitem__(..., 0),
        lambda b: b.read("numpy").__enter__(),
        lambda b: b.write("numpy").__enter__(),
        lambda b: b[1].write("numpy").__enter__(),
        lambda b: b.to_host(),
        lambda b: b.host_bytes(),
        lambda b: np.asarray(b),
        lambda b: b.__dlpack__(),
        lambda b: b.close(),
        lambda b: rlx.views({"b": b}, "jax"),
        lambda b: rlx.exchange(b, "torch"),
        lambda b: rlx.Buffer.zeros((4, 16)).copy_from(b),
    ],
)
def test_access_from_inside_a_write_scope_raises(access):
    b = rlx.Buffer.zeros((4, 16))
    b.numpy(), b.torch(), b.jax(), b[1].numpy(), b[1].jax()
    with b.write("numpy") as n:
        n += 1
        with pytest.raises(rlx.StaleViewError, match=r"being written.*use the array"):
            access(b)
        n += 1
    assert (b.numpy() == 2).all()
    assert b.epoch == 1


def test_a_write_inside_an_own_read_scope_raises_instead_of_waiting_for_itself():
    b = rlx.Buffer.zeros(64)
    with b.read("jax") as j:
        for write in (
            lambda: b.write("numpy").__enter__(),
            lambda: b.update(plus_one),
            lambda: b.copy_from(np.ones(64, np.float32)),
            b.close,
        ):
            with pytest.raises(rlx.StaleViewError, match="leave the read scope"):
                write()
        assert not j.is_deleted()
    assert b.epoch == 0
    assert (b.numpy() == 0).all()


def test_an_error_in_a_write_scope_counts_as_a_write_and_frees_the_buffer():
    b = rlx.Buffer.zeros(64)
    with pytest.raises(KeyError, match="mine"), b.write("numpy") as n:  # noqa: PT012
        n[:32] = 1
        raise KeyError("mine")
    assert b.epoch == 1
    assert b.numpy().sum() == 32
    assert float(b.jax().sum()) == 32
    in_thread(lambda: b.update(plus_one))
    assert b.numpy().sum() == 96


def test_an_error_in_a_read_scope_frees_the_buffer():
    b = rlx.Buffer.zeros(64)
    with pytest.raises(KeyError, match="mine"), b.read("jax"):
        raise KeyError("mine")
    assert b.epoch == 0
    with b.write("numpy", timeout=0):
        pass


def test_a_scope_that_cannot_be_entered_frees_the_buffer():
    b = rlx.Buffer.zeros(8, "f64")
    with pytest.raises(rlx.ZeroCopyError, match="x64"), b.read("jax"):
        pass
    with b.write("numpy", timeout=0) as n:
        n += 1
    c = rlx.Buffer.zeros(8)[::-1]
    with pytest.raises(rlx.ZeroCopyError, match="negative"), c.write("torch"):
        pass
    with c.write("numpy", timeout=0):
        pass
    assert b.epoch == 1


# --- the fence -------------------------------------------------------------------------------


def test_positive_control_nothing_orders_a_jax_reader_before_a_raw_write():
    def wrong():
        b = ones()
        result = reader_in_flight(b.jax())
        b.numpy()[...] = 0
        return not is_intact(result)

    assert ever(wrong)


def test_positive_control_waiting_for_or_deleting_the_array_is_no_fence():
    def wrong():
        b = ones()
        j = b.jax()
        result = reader_in_flight(j)
        j.block_until_ready()
        j.delete()
        b.numpy()[...] = 0
        return not is_intact(result)

    assert ever(wrong)


@pytest.mark.parametrize("framework", MUTABLE)
def test_a_write_scope_waits_for_readers_of_other_threads(framework):
    for _ in range(5):
        b = ones()
        result = reader_in_flight(b.jax())
        with b.write(framework) as a:
            a[...] = 0
        assert is_intact(result)


def write_scope(b):
    with b.write("torch") as t:
        t.zero_()


def tree_scope(b):
    with rlx.write([b, rlx.Buffer.zeros(64)], "numpy") as (n, _):
        n[...] = 0


def in_place(x):
    x *= 0


WRITES = {
    "write": write_scope,
    "tree write": tree_scope,
    "copy_from": lambda b: b.copy_from(np.zeros((512, 512), np.float32)),
    "setitem": lambda b: b.__setitem__(..., 0),
    "setitem slice": lambda b: b.__setitem__(slice(0, 512), 0.0),
    "commit": lambda b: rlx.commit([b], [np.zeros((512, 512), np.float32)]),
    "numpy update": lambda b: b.update(in_place, framework="numpy"),
    "torch update": lambda b: b.update(in_place, framework="torch"),
    "jax update": lambda b: b.update(jnp.zeros_like),
    "jax update of parts": lambda b: rlx.update([b[:256], b[256:]], zero_parts),
    "slice write": lambda b: [write_scope(b[:256]), write_scope(b[256:])],
}


def zero_parts(parts):
    return [jnp.zeros_like(part) for part in parts]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_every_way_of_writing_is_fenced(write):
    for _ in range(3):
        b = ones()
        j = b.jax()
        result = reader_in_flight(j)
        write(b)
        assert (b.numpy() == 0).all()
        assert is_intact(result)
        assert j.is_deleted()
        with deleted():
            np.asarray(j)
        assert (np.asarray(b.jax()) == 0).all()


def test_several_readers_of_several_threads_are_fenced():
    b = ones()
    results = [reader_in_flight(b.jax()) for _ in range(3)]
    with b.write("numpy") as n:
        n[...] = 0
    assert all(map(is_intact, results))


def test_the_fence_costs_no_copy():
    b = ones()
    with rlx.no_copies():
        for i in range(5):
            j = b.jax()
            with b.write("numpy") as n:
                n += 1
            assert j.is_deleted()
            assert address(b.jax()) == b.address
            assert float(b.jax()[0, 0]) == i + 2


def test_the_fence_works_under_disable_jit():
    for _ in range(3):
        b = ones()
        j = b.jax()
        result = reader_in_flight(j)
        with jax.disable_jit(), b.write("numpy") as n:
            n[...] = 0
        assert j.is_deleted()
        assert is_intact(result)


def test_positive_control_disable_jit_turns_donation_off():
    fence = jax.jit(lambda x: x, donate_argnums=0)
    x = jnp.ones(64)
    with jax.disable_jit():
        fence(x)
    assert not x.is_deleted()


def test_the_array_of_a_read_scope_lives_until_the_next_write():
    b = rlx.Buffer.zeros(64)
    with b.read("jax") as j:
        pass
    assert float(j.sum()) == 0
    with b.write("numpy") as n:
        n += 1
    with deleted():
        j.sum()


def test_a_write_without_jax_arrays_out_waits_for_nothing():
    b = rlx.Buffer.zeros(64)
    with rlx.ledger.record() as r, b.write("torch") as t:
        t += 1
    assert r.counts.host_waits == 0


# --- a fence refused -------------------------------------------------------------------------

ALIASES = {
    "numpy": np.asarray,
    "torch": torch.from_dlpack,
    "memoryview": lambda j: memoryview(np.asarray(j)),
    "dlpack": lambda j: np.from_dlpack(j),
}


def test_positive_control_a_held_alias_silently_refuses_the_donating_fence():
    fence = jax.jit(lambda x: x, donate_argnums=0)
    x = jnp.ones(64)
    alias = np.asarray(x)
    fence(x)
    assert not x.is_deleted()
    assert alias[0] == 1


@pytest.mark.parametrize("make", ALIASES.values(), ids=ALIASES.keys())
@pytest.mark.parametrize("way", list(WRITES), ids=list(WRITES))
def test_an_alias_of_the_jax_array_refuses_the_write_and_nothing_changes(make, way):
    b = ones()
    b.update(plus_one)
    j = b.jax()
    alias = make(j)
    epoch = b.epoch
    with pytest.raises(rlx.ZeroCopyError, match=r"(?s)alias.*Drop that alias.*No byte"):
        WRITES[way](b)
    assert b.epoch == epoch
    assert float(np.asarray(alias).min()) == 2
    assert not j.is_deleted()
    assert b.jax() is j
    assert (b.numpy() == 2).all()
    del alias
    WRITES[way](b)
    assert (b.numpy() == 0).all()
    assert j.is_deleted()


def test_a_reader_behind_a_refused_fence_is_not_disturbed():
    b = ones()
    j = b.jax()
    alias = np.asarray(j)
    result = reader_in_flight(j)
    with pytest.raises(rlx.ZeroCopyError, match="alias"), b.write("numpy") as n:
        n[...] = 0
    assert is_intact(result)
    assert (alias == 1).all()


def test_a_refused_tree_frees_every_buffer():
    a, b = ones(), ones()
    ja, jb = a.jax(), b.jax()
    alias = np.asarray(jb)
    with pytest.raises(rlx.ZeroCopyError, match="alias"), rlx.write([a, b], "numpy"):
        pass
    assert (a.epoch, b.epoch) == (0, 0)
    assert not jb.is_deleted()
    for buffer in (a, b):
        assert (np.asarray(in_thread(buffer.numpy)) == 1).all()
    assert is_intact(a.jax())
    del alias, ja
    with rlx.write([a, b], "numpy", timeout=0) as arrays:
        for n in arrays:
            n += 1
    assert (a.numpy() == 2).all()
    assert (np.asarray(b.jax()) == 2).all()


def test_a_numpy_view_of_the_buffer_itself_does_not_refuse_the_fence():
    b = ones()
    views = b.numpy(), b.torch(), np.asarray(b), torch.from_dlpack(b), b.host_bytes()
    j = b.jax()
    with b.write("numpy") as n:
        n += 1
    assert j.is_deleted()
    assert float(views[1].min()) == 2


# --- slices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", MUTABLE)
def test_a_write_to_the_base_fences_readers_of_a_slice(framework):
    base = rlx.Buffer.from_array(np.ones((2, 512, 512), np.float32), copy=True)
    part = base[1]
    j = part.jax()
    result = reader_in_flight(j)
    with base.write(framework) as a:
        a[...] = 0
    assert is_intact(result)
    assert j.is_deleted()
    assert (np.asarray(part.jax()) == 0).all()


@pytest.mark.parametrize("framework", MUTABLE)
def test_a_write_to_a_slice_fences_readers_of_the_base_and_of_other_slices(framework):
    base = rlx.Buffer.from_array(np.ones((2, 512, 512), np.float32), copy=True)
    other = base.view("f32", (1024, 512))[512:]
    j = other.jax()
    result = reader_in_flight(j)
    with base[1].write(framework) as a:
        a[...] = 0
    assert is_intact(result)
    assert j.is_deleted()
    assert base.epoch == 1 == other.epoch
    assert float(np.asarray(base.jax()).sum()) == 512 * 512


def test_positive_control_a_raw_write_to_the_base_disturbs_readers_of_a_slice():
    def wrong():
        base = rlx.Buffer.from_array(np.ones((2, 512, 512), np.float32), copy=True)
        result = reader_in_flight(base[1].jax())
        base.numpy()[...] = 0
        return not is_intact(result)

    assert ever(wrong)


def test_a_jax_update_of_the_base_fences_readers_of_a_slice():
    base = rlx.Buffer.from_array(np.ones((2, 512, 512), np.float32), copy=True)
    j = base[1].jax()
    result = reader_in_flight(j)
    base.update(jnp.zeros_like)
    assert is_intact(result)
    assert j.is_deleted()
    assert (np.asarray(base[1].jax()) == 0).all()


def test_a_jax_update_of_a_slice_fences_readers_of_the_base():
    base = rlx.Buffer.from_array(np.ones((2, 512, 512), np.float32), copy=True)
    j = base.jax()
    result = in_thread(lambda: slow_read(j[1]))
    base[1].update(jnp.zeros_like)
    assert is_intact(result)
    assert j.is_deleted()
    assert float(base.jax().sum()) == 512 * 512


def test_a_base_view_sees_a_pending_update_of_a_slice():
    base = rlx.Buffer.from_array(np.ones((2, 512, 512), np.float32), copy=True)
    base[1].update(lambda x: slow_read(x) * 3, ordered=False)
    assert float(base.jax()[1].min()) == 3
    base[1].update(lambda x: slow_read(x / x) * 4, ordered=False)
    assert (base.numpy()[1] == 4).all()
    base[1].update(lambda x: slow_read(x / x) * 5, ordered=False)
    base.update(lambda x: x + 1, ordered=False)
    assert (base[1].numpy() == 6).all()


def test_equal_slices_give_one_jax_array():
    base = rlx.Buffer.zeros((4, 16))
    assert base[1].jax() is base[1].jax()
    assert base[1:2, :].jax() is base[1:2].jax()
    base[1].update(plus_one)
    assert float(base[1].jax().sum()) == 16


def test_without_jax_scopes_work_and_jax_is_not_loaded():
    run_python(
        """
        import sys, threading
        import numpy as np, rlx_driver as rlx
        b = rlx.Buffer.zeros(64)
        with b.write("numpy") as n:
            n += 1
        with b.read("numpy") as n:
            assert (n == 1).all()
        b.update(lambda x: x + 1, framework="numpy")
        b.copy_from(b.numpy() + 1)
        assert (b.numpy() == 3).all()
        assert "jax" not in sys.modules and "torch" not in sys.modules
        """
    )


# --- scopes that nobody leaves --------------------------------------------------------------------


def abandoned(b, mode):
    def program():
        with getattr(b, mode)("numpy") as n:
            if mode == "write":
                n[0] = 7
            yield

    generator = program()
    next(generator)
    return generator


@pytest.mark.parametrize("mode", ["read", "write"])
def test_a_scope_in_a_generator_that_is_dropped_is_left(mode):
    b = rlx.Buffer.zeros(4)
    generator = abandoned(b, mode)
    del generator
    with b.write("numpy", timeout=5) as n:
        assert n[0] == (7 if mode == "write" else 0)


@pytest.mark.parametrize("mode", ["read", "write"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "another thread"])
def test_a_scope_that_is_entered_and_dropped_is_given_back(mode, elsewhere):
    b = rlx.Buffer.zeros(4)
    epoch = b.epoch

    def enter_and_drop():
        scope = getattr(b, mode)("numpy")
        scope.__enter__()
        with pytest.warns(ResourceWarning, match="never left"):
            del scope

    if elsewhere:
        in_thread(enter_and_drop)
    else:
        enter_and_drop()
    with b.write("numpy", timeout=5) as n:
        n[...] = 1
    assert b.epoch == epoch + 1 + (mode == "write")


@pytest.mark.parametrize("mode", ["read", "write"])
def test_a_scope_may_be_left_by_another_thread(mode):
    b = rlx.Buffer.zeros(4)
    scope = getattr(b, mode)("numpy")
    scope.__enter__()
    in_thread(scope.__exit__, None, None, None)
    with b.write("numpy", timeout=5):
        pass
