"""The race checker: what it finds, what it must not find, and that it leaves nothing behind."""

import functools
import gc
import os
import threading
import warnings

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver import _hooks
from rlx_driver._watch import Watch
from rlx_driver.backends.base import accounting
from rlx_driver.registry import registry
from support import must_run, python

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402

from buffer_support import in_thread, reader_in_flight, start, warm_up  # noqa: E402

pytestmark = [
    pytest.mark.jax,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::rlx_driver.errors.RecompilationWarning"),
]


@pytest.fixture(autouse=True)
def no_checker_is_left():
    yield
    assert _hooks.checker is None


@pytest.fixture
def kv():
    with rlx.BufferHandle("kv", (4, 16), "f32") as handle:
        yield handle


@pytest.fixture(params=["aliases", "references"])
def way(request, monkeypatch):
    """Both ways to know whether a view is held: by an alias, and where there is none by counting."""
    if request.param == "references":
        monkeypatch.setattr(type(registry.get("jax")), "alias", lambda self, array: array)
    return request.param


def plus_one(x):
    return x + 1


donating = jax.jit(plus_one, donate_argnums=0)
summed = jax.jit(jnp.sum)


def filled(value=1.0, shape=(4, 16)):
    return rlx.Buffer.from_array(np.full(shape, value, np.float32), copy=True)


def hand_out_jax(b):
    return b.jax()


def hand_out_mutable(b, framework):
    return b.array(framework)


def scribble(view, value=5.0):
    with torch.no_grad():
        view[0] = value


def line_of(function, offset=1):
    """How a stack names a line of a function."""
    return f"line {function.__code__.co_firstlineno + offset}, in {function.__name__}"


def only(check):
    """The one race that was found."""
    assert len(check.races) == 1, "\n".join(map(str, check.races)) or "no race was found"
    return check.races[0]


WRITERS = ["numpy", "torch"]


# --- bytes that change under a view ----------------------------------------------------------


def through(scope):
    """Enter a scope, leave it, and give what it gave."""
    with scope as given:
        return given


def take_by_scope(b):
    return through(b.read("jax"))


TAKES = {
    "jax": hand_out_jax,
    "array": lambda b: b.array("jax"),
    "module": lambda b: b.array(jnp),
    "views": lambda b: rlx.views({"b": b}, "jax")["b"],
    "exchange": lambda b: rlx.exchange(b, "jax"),
    "scope": take_by_scope,
    "scope of a tree": lambda b: through(rlx.read([b], "jax"))[0],
    "slice": lambda b: b[:2].jax(),
    "reinterpreted": lambda b: b.view("u8").jax(),
}


NOTICED = {
    "write scope": lambda b: through(b.write("torch")),
    "tree scope": lambda b: through(rlx.write([b, filled()], "numpy")),
    "update jax": lambda b: b.update(plus_one),
    "update jax, unordered": lambda b: b.update(plus_one, ordered=False),
    "update numpy": lambda b: b.update(plus_one, framework="numpy"),
    "update of a tree": lambda b: rlx.update([b, filled()], lambda t: [x + 1 for x in t]),
    "update of a slice": lambda b: b[1:2].update(plus_one),
    "copy_from": lambda b: b.copy_from(np.zeros(b.shape, "f4")),
    "setitem": lambda b: b.__setitem__(1, 3.0),
    "commit": lambda b: rlx.commit(b, np.zeros(b.shape, "f4")),
    "jax again": hand_out_jax,
    "close": lambda b: b.close(),
    "the end": lambda b: None,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("take", [pytest.param(f, id=name) for name, f in TAKES.items()])
def test_a_write_under_a_view_is_found_however_the_view_was_taken(take, writer):
    b = filled()
    view = b.array(writer)
    with pytest.raises(rlx.RaceError) as caught, rlx.checking() as check:
        held = take(b)
        scribble(view)
    race = only(check)
    assert race.kind == "changed under a view"
    assert race.frameworks == ("jax", "unknown")  # the mutable view is older than the block
    assert caught.value.races == check.races
    assert not held.is_deleted()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("notice", [pytest.param(f, id=name) for name, f in NOTICED.items()])
def test_a_write_under_a_view_is_found_once_wherever_it_is_noticed(kv, way, notice, writer):
    if way == "references" and notice is hand_out_jax:
        pytest.skip("who holds an array that is being handed out cannot be counted")
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        view = hand_out_mutable(kv, writer)
        held = hand_out_jax(kv)
        scribble(view)
        notice(kv)
        noticed = len(check.races)
    race = only(check)
    assert noticed == (notice is not NOTICED["the end"])
    assert (race.label, race.kind) == ("handle 'kv'", "changed under a view")
    assert race.frameworks == ("jax", writer)
    del held


def test_a_write_under_a_view_is_found_when_the_view_is_let_go(kv):
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        n = kv.numpy()
        held = kv.jax()
        n[0] = 5
        assert check.races == []
        del held
        race = only(check)
        assert line_of(test_a_write_under_a_view_is_found_when_the_view_is_let_go, 6) in str(race)


@pytest.mark.parametrize("writer", WRITERS)
def test_the_text_names_the_handle_both_frameworks_and_every_place(kv, writer):
    def notice():
        with kv.write("numpy"):
            pass

    with pytest.raises(rlx.RaceError) as caught, rlx.checking() as check:
        view = hand_out_mutable(kv, writer)
        held = hand_out_jax(kv)
        scribble(view)
        notice()
    del held
    race = only(check)
    text = str(race)
    assert text in str(caught.value)
    assert "handle 'kv' changed while a view of jax was live" in text
    assert "the jax view was handed out at:\n" in text
    assert f"a {writer} view was handed out at:\n" in text
    assert f'File "{__file__}", {line_of(hand_out_jax)}' in text
    for function in (hand_out_jax, hand_out_mutable, notice):
        assert line_of(function) in text
    assert line_of(hand_out_jax) in str(race.handed_out_at)
    assert line_of(hand_out_mutable) in str(race.changed_by[0])
    assert line_of(notice) in str(race.noticed_at)
    assert "return b.jax()" in text
    assert os.path.join("src", "rlx_driver") not in text, "our own frames are of no use"
    assert "write(...)" in text.splitlines()[0]


def test_every_framework_that_may_have_written_is_named_and_places_are_bounded(kv):
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        hand_out_mutable(kv, "torch")
        for _ in range(50):
            hand_out_mutable(kv, "torch")
        with kv.write("numpy") as n:
            pass
        for code in [f"b{'.numpy()' * (i < 0)}.torch()" for i in range(30)]:
            exec(code, {"b": kv})
        held = kv.jax()
        n[0] = 5  # a view of a scope, written after it
        del held
    race = only(check)
    assert race.frameworks == ("jax", "torch", "numpy")
    assert len(race.changed_by) <= 8


def test_a_view_of_a_write_scope_that_is_written_afterwards(kv, way):
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        with kv.write("torch") as t:
            t.fill_(1)
        held = kv.jax()
        t[0] = 7
    assert only(check).frameworks == ("jax", "torch")
    del held


@pytest.mark.parametrize(
    "write",
    [
        lambda b: np.asarray(b).__setitem__(0, 5),
        lambda b: torch.from_dlpack(b).fill_(5),
        lambda b: b.host_bytes().__setitem__(3, 7),
        lambda b: b[1].numpy().__setitem__(0, 5),
        lambda b: b.view("u8").torch().fill_(5),
        lambda b: torch.nn.Parameter(b.torch(), requires_grad=False).fill_(5),
        lambda b: rlx.exchange(b, "numpy").fill(5),
        lambda b: (ctypes_pointer(b)[0:4], ctypes_pointer(b).__setitem__(0, 9)),
    ],
)
def test_writes_of_every_kind_are_seen(kv, write):
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        held = kv.jax()
        write(kv)
    assert only(check).kind == "changed under a view"
    del held


def ctypes_pointer(b):
    import ctypes

    return (ctypes.c_char * b.byte_size).from_address(b.address)


def test_memory_that_a_buffer_shares_is_watched_too():
    own = rlx.Buffer.zeros(64).numpy()
    b = rlx.Buffer.from_array(own, copy=False)
    with pytest.raises(rlx.RaceError, match="from_array"), rlx.checking() as check:
        held = b.jax()
        own[5] = 1
    assert only(check).frameworks == ("jax", "unknown")
    del held


def test_two_buffers_on_one_memory_do_not_know_each_other():
    first = filled(0)
    second = rlx.Buffer.from_array(first.numpy(), copy=False)
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        held = first.jax()
        second.update(plus_one)
        second.numpy()
    assert "Buffer float32[4, 16]" in only(check).label
    del held


@pytest.mark.parametrize("dtype", ["bool", "u8", "bf16", "f8_e4m3fn", "i64", "c128"])
def test_changes_are_seen_in_every_dtype(dtype):
    b = rlx.Buffer.zeros((3, 5), dtype)
    n = b.numpy()
    x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with x64(True), pytest.raises(rlx.RaceError), rlx.checking() as check:
        held = b.jax()
        n[2, 4] = 1
    only(check)
    del held


def test_a_buffer_without_axes_is_watched():
    b = rlx.Buffer.zeros(())
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        held = b.jax()
        b.numpy()[...] = 1
    only(check)
    del held


def test_memory_that_jax_owns_is_watched():
    with rlx.HandleRegion("cpu", backend="jax") as region:
        kv = region.create({"kv": ((4, 16), "f32")})["kv"]
        assert not kv.jax().committed
        with pytest.raises(rlx.RaceError), rlx.checking() as check:
            held = kv.jax()
            assert not held.committed, "the alias goes to any device as the array itself does"
            kv.numpy()[0] = 1
        assert only(check).label == "handle 'kv'"
        del held
        with rlx.checking():
            for _ in range(3):
                kv.update(plus_one)
                rlx.commit(kv, donating(kv.jax()))
                float(summed(kv.jax()))
                kv.numpy()[0] = 1


def test_a_write_in_another_thread_is_found(kv):
    n = kv.numpy()
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        held = kv.jax()
        in_thread(scribble, n)
        in_thread(kv.update, plus_one)
        assert len(check.races) == 1
    only(check)
    del held


def test_a_view_that_another_thread_holds_is_found(kv):
    n = kv.numpy()
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        held = [in_thread(hand_out_jax, kv)]
        n[0] = 3
        kv.update(plus_one)
    assert line_of(hand_out_jax) in str(only(check).handed_out_at)
    del held


def test_a_view_in_a_read_scope_is_compared_when_the_scope_ends(kv, way):
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        with kv.read("jax") as j:
            kv.numpy()[0] = 2
        assert len(check.races) == 1
        del j


def test_every_array_of_a_tree_is_watched():
    state = {"a": filled(), "b": [filled(), filled()]}
    with pytest.raises(rlx.RaceError, match="2 races found"), rlx.checking() as check:
        held = rlx.views(state, "jax")
        state["a"].numpy()[0] = 5
        state["b"][1].torch()[0] = 5
        rlx.update(state, lambda t: jax.tree.map(plus_one, t))
    assert sorted(race.frameworks[1] for race in check.races) == ["numpy", "torch"]
    del held


def test_a_view_goes_on_being_watched_after_a_race_that_was_reported(kv):
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        n = kv.numpy()
        held = kv.jax()
        n[0] = 5
        assert kv.jax() is held
        n[0] = 6
    assert len(check.races) == 2
    assert "(2 times)" not in str(check.races[0])


def test_a_view_whose_fence_was_refused_goes_on_being_watched(kv):
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        n = kv.numpy()
        held = kv.jax()
        alias = np.asarray(held)
        with pytest.raises(rlx.ZeroCopyError), kv.write("numpy"):
            pass
        assert check.races == []
        n[0] = 5
    only(check)
    del alias


def test_an_update_that_was_refused_while_traced_ends_no_watch(kv):
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        n = kv.numpy()
        held = kv.jax()
        with pytest.raises(rlx.ShapeError):
            kv.update(lambda x: x[0])
        assert check.races == []
        n[0] = 5
        kv.update(plus_one)
    only(check)
    del held


def test_equal_races_are_told_once():
    with pytest.raises(rlx.RaceError) as caught, rlx.checking():
        b = filled(0)
        for i in range(3):
            j = b.jax()
            b.numpy()[0] = i + 1
            del j
    assert str(caught.value).startswith("3 races found\n\n(3 times) bytes of Buffer")
    assert len(caught.value.races) == 3


def test_jax_that_holds_the_view_for_the_program_counts_as_held(kv):
    with pytest.raises(rlx.RaceError), rlx.checking():
        view = kv.jax()
        function = jax.jit(lambda: view + 1)
        function()
        n = kv.numpy()
        n[0] = 4


# --- views used after they went stale --------------------------------------------------------


def write_by_update(b):
    b.update(plus_one)


def write_by_scope(b):
    with b.write("torch") as t:
        t += 1


def write_by_copy(b):
    b.copy_from(np.full(b.shape, 3, np.float32))


class Holder:
    """Something that keeps a view where no frame has it."""


def use_in_a_container(view):
    def inner(tree):
        return jax.tree.map(plus_one, tree)

    inner({"state": [view]})


def use_by_attribute(view):
    holder = Holder()
    holder.view = view
    del view
    summed(holder.view)


USES = {
    "eager": plus_one,
    "method": lambda view: view.sum(),
    "jitted": lambda view: summed(view),
    "donated": lambda view: donating(view),
    "asarray": np.asarray,
    "item": lambda view: float(view[0, 0]),
    "container": use_in_a_container,
    "attribute": use_by_attribute,
}


@pytest.mark.parametrize("write", [write_by_update, write_by_scope, write_by_copy])
@pytest.mark.parametrize("use", [pytest.param(f, id=name) for name, f in USES.items()])
def test_a_stale_view_is_named_with_the_write_that_ended_it(kv, way, use, write):
    other = filled()
    with pytest.raises(rlx.RaceError) as caught, rlx.checking() as check:
        bystander = other.jax()
        stale = hand_out_jax(kv)
        write(kv)
        kv.update(plus_one)  # a later write is not the one that made it stale
        other.update(plus_one)
        use(stale)
    del bystander
    assert isinstance(caught.value.__cause__, (RuntimeError, ValueError))
    assert "deleted" in str(caught.value.__cause__)
    race = only(check) if use is not use_by_attribute else check.races[-1]
    text = str(race)
    assert (race.label, race.kind, race.frameworks) == ("handle 'kv'", "stale view", ("jax",))
    assert "handle 'kv' was used after it went stale" in str(caught.value)
    assert line_of(hand_out_jax) in str(race.handed_out_at)
    assert line_of(write) in str(race.changed_by[0])
    used = line_of(test_a_stale_view_is_named_with_the_write_that_ended_it, 10)
    assert f"{used}\n" in str(race.noticed_at)
    assert "a write by the driver ended it at" in text
    assert "site-packages" not in str(race.noticed_at).rpartition(used)[2]


def test_of_several_stale_views_the_one_that_was_used_is_named():
    one, two = (rlx.BufferHandle(name, (4, 16)) for name in ("one", "two"))
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        views = one.jax(), two.jax()
        rlx.update([one, two], lambda t: [x + 1 for x in t])
        views[1] + 1
    assert only(check).label == "handle 'two'"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("Array has been deleted with shape=float32[5]."), ["two"]),
        (RuntimeError("Array has been deleted with shape=float32[9]."), []),
        (ValueError("INVALID_ARGUMENT: Buffer has been deleted or donated."), ["one", "two"]),
        (RuntimeError("something else"), []),
        (KeyError("Array has been deleted"), []),
        (rlx.UpdateFailedError("Array has been deleted with shape=float32[5]."), []),
    ],
)
def test_where_no_frame_has_the_stale_view_the_text_of_the_error_tells(way, error, named):
    handles = one, two, _ = [rlx.BufferHandle(n, k) for n, k in [("one", 3), ("two", 5), ("x", 5)]]
    holder = Holder()
    with pytest.raises(rlx.RaceError if named else type(error)), rlx.checking() as check:
        holder.held = one.jax(), two.jax()
        handles[2].jax()  # nobody holds this one
        rlx.update(list(handles), lambda t: [x + 1 for x in t])
        raise error
    assert sorted(race.label for race in check.races) == [f"handle {name!r}" for name in named]


def test_a_view_that_the_program_donated_and_used_again(kv):
    with pytest.raises(rlx.RaceError) as caught, rlx.checking() as check:
        view = kv.jax()
        rlx.commit(kv, donating(view))
        view + 1
    assert "the program itself donated or deleted it" in str(only(check))
    assert caught.value.__cause__ is not None


def test_an_array_of_the_user_that_was_deleted_is_no_race(kv):
    mine = jnp.ones((4, 16))
    with pytest.raises(RuntimeError, match="deleted") as caught, rlx.checking() as check:
        stale = kv.jax()
        kv.update(plus_one)
        mine.delete()
        mine + 1
    assert not isinstance(caught.value, rlx.RaceError)
    assert check.races == []
    del stale


def test_a_stale_view_whose_error_the_program_handles_is_no_race(kv):
    with rlx.checking() as check:
        stale = kv.jax()
        kv.update(plus_one)
        with pytest.raises(RuntimeError, match="deleted"):
            stale + 1
    assert check.races == []


def test_an_error_of_another_kind_is_left_alone_and_gets_a_note(kv):
    with pytest.raises(ZeroDivisionError) as caught, rlx.checking():
        n = kv.numpy()
        held = kv.jax()
        n[0] = 5
        1 / 0  # noqa: B018
    assert "handle 'kv'" in caught.value.__notes__[0]
    with pytest.raises(ZeroDivisionError) as caught, rlx.checking():
        1 / 0  # noqa: B018
    assert not hasattr(caught.value, "__notes__")
    del held


# --- donations that are never committed ------------------------------------------------------

SILENT = {
    "numpy": lambda b: b.numpy(),
    "torch": lambda b: b.torch(),
    "module": lambda b: b.array(torch),
    "slice": lambda b: b[1].numpy(),
    "views": lambda b: rlx.views([b], "torch"),
    "read scope": lambda b: through(b.read("numpy")),
    "asarray": np.asarray,
    "dlpack": torch.from_dlpack,
    "to_host": lambda b: b.to_host(),
    "copy into another": lambda b: filled().copy_from(b),
    "from_array": lambda b: rlx.Buffer.from_array(b, copy=True),
    "argument": lambda b: filled().update(lambda x, y: x + y, b, framework="numpy"),
    "close": lambda b: b.close(),
}


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("use", [pytest.param(f, id=name) for name, f in SILENT.items()])
def test_a_donation_that_was_never_committed_is_found_where_nothing_else_notices(kv, use, drop):
    kv.numpy(), kv.torch()
    with pytest.raises(rlx.RaceError, match="never committed"), rlx.checking() as check:
        view = hand_out_jax(kv)
        new = donating(view)
        if drop:
            del view
        use(kv)
        race = only(check)
        assert (race.label, race.kind, race.frameworks) == (
            "handle 'kv'",
            "not committed",
            ("jax",),
        )
        assert line_of(hand_out_jax) in str(race.handed_out_at)
        assert "commit" in str(race)
        use(kv)
    only(check)
    del new


def test_a_donation_that_was_never_committed_is_found_at_the_end(kv, way):
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        new = donating(hand_out_jax(kv))
    assert only(check).kind == "not committed"
    del new


def test_a_donation_of_a_part_is_found_where_that_part_is_seen():
    b = filled()
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        new = donating(b[:2].jax())
        assert b[2:].numpy().sum() == 32
        b[3].torch()
        assert check.races == []
        b[1].numpy()
        assert len(check.races) == 1
    only(check)
    del new


# --- what is legal ---------------------------------------------------------------------------


def read_then_write():
    b = filled()
    n, t = b.numpy(), b.torch()
    for i in range(5):
        assert float(summed(b.jax())) == b.numpy().sum()
        n[0] = i
        t[1] = i


def let_go_then_write():
    b = filled()
    n = b.numpy()
    j = b.jax()
    float(j.sum())
    del j
    n[0] = 5
    j = b.jax()
    j = jnp.asarray(j + 1)
    n[0] = 6


def let_go_in_a_function():
    b = filled()

    def look():
        views = {"a": [b.jax()], "b": b[:2].jax()}
        return float(views["a"][0].sum() + views["b"].sum())

    for i in range(3):
        look()
        b.numpy()[...] = i


def assign_from_its_own_view():
    b = filled()
    n, t = b.numpy(), b.torch()
    n[:] = b.jax() * 2
    n[0] = float(b.jax()[0, 0])
    t.copy_(torch.from_dlpack(b.jax() + 1))
    n[:] = b.jax()
    assert n[0, 0] == 3


def scopes_while_a_view_is_held():
    b = filled()
    n = b.numpy()
    for framework in WRITERS:
        held = b.jax()
        with b.write(framework) as view:
            view[0] = 3
        n[1] = 4  # the JAX view is dead, and its holder would get an error
        view[2] = 5
        assert held.is_deleted()


def every_write_of_the_driver_while_a_view_is_held():
    b, other = filled(), filled(3)
    n, t = b.numpy(), b.torch()
    for write in (
        lambda: b.update(plus_one),
        lambda: b.update(plus_one, ordered=False),
        lambda: b.update(jax.jit(plus_one)),
        lambda: b.update(lambda x: x.add_(1), framework="torch"),
        lambda: b.update(plus_one, framework="numpy"),
        lambda: b.copy_from(np.full(b.shape, 7, np.float32)),
        lambda: b.copy_from(other),
        lambda: b.copy_from(b.jax() + 1),
        lambda: b.copy_from(b.numpy()[::-1]),
        lambda: b.copy_from(torch.ones(4, 16, dtype=torch.float64), cast=True),
        lambda: b.__setitem__(..., 4.0),
        lambda: b.__setitem__(0, 5.0),
        lambda: b.__setitem__(slice(2), np.ones((2, 16), "f4")),
        lambda: b[1].update(plus_one),
        lambda: b.view("u8").__setitem__(0, 3),
        lambda: rlx.commit(b, np.full(b.shape, 2, np.float32)),
        lambda: rlx.commit(b, donating(b.jax())),
        lambda: rlx.commit(b, b.jax()),
        lambda: rlx.update({"b": b, "o": other}, lambda s: {"b": s["o"], "o": s["b"]}),
        lambda: b.update(lambda x, y: x + y, other),
        lambda: b.update(lambda x, y: x + y, other.jax()),
        lambda: b.update(lambda x, y: x + y, other, framework="torch"),
        lambda: other.update(lambda x, y: (y * 2, x), b, has_aux=True),
    ):
        held, part = b.jax(), b[:2].jax()
        write()
        n[0] += 0
        assert b.jax() is not None
        t[0] += 0
    del held, part


def parts():
    b = filled()
    left, right = b[:2], b[2:]
    held = left.jax()
    right.numpy()[...] = 3  # other bytes
    b.numpy()[3] = 4
    assert float(held.sum()) == 32
    right.update(plus_one)
    left.numpy()[0] = 1
    held = left.jax(), right.jax(), b.jax(), b.view("i32").jax()
    b.update(plus_one)
    b.numpy()[...] = 0
    new = donating(left.jax())
    right.numpy()[...] = 1
    rlx.commit(left, new)
    rlx.commit([left, right], [donating(left.jax()), donating(right.jax())])
    with rlx.write([left, right], "numpy") as (a, c):
        a[...] = c
    del held


def trees():
    state = {"w": filled(), "m": [filled(0)]}
    n = rlx.views(state, "numpy")
    held = rlx.views(state, "jax")
    rlx.update(state, lambda s: {"w": s["w"] - s["m"][0], "m": [s["m"][0] + 1]})
    n["w"][0] = 3
    with rlx.read(state, "jax") as s:
        float(s["w"].sum())
    del s
    n["m"][0][...] = 2
    with rlx.write(state, "torch") as s:
        s["w"].zero_()
    rlx.commit(state, {"w": np.zeros((4, 16), "f4"), "m": [torch.ones(4, 16)]})
    rlx.commit(state, rlx.views(state, "jax"))
    n["w"][0] = 3
    del held


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, batch):
    grad = batch.mean() * jnp.ones_like(state["w"])
    return {"w": state["w"] - 0.1 * grad, "m": state["m"] + grad}, grad.sum()


def drop_in_training():
    state = {"w": filled(), "m": filled(0)}
    n = rlx.views(state, "numpy")
    with rlx.no_copies():
        for i in range(4):
            new, loss = train_step(rlx.views(state, "jax"), jnp.ones(4))
            rlx.commit(state, new)
            if i % 2:
                float(loss), n["w"].sum(), state["m"].torch().sum()
    del new
    n["w"][...] = 0
    views = rlx.views(state, "jax")
    for _ in range(3):
        views, loss = train_step(views, jnp.ones(4))
    rlx.commit(state, views)
    del views
    n["w"][...] = 0


def training_with_torch():
    weight, moment = filled(), filled(0)
    parameter = torch.nn.Parameter(weight.torch())
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for _ in range(3):
        moment.update(lambda m, w: 0.9 * m + w, weight)
        loss = (parameter * moment.torch()).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(summed(weight.jax()))
        with torch.no_grad():
            parameter.mul_(0.5)
    weight.update(plus_one)


def decode_loop():
    kv = rlx.BufferHandle("kv", (2, 8, 16), "bf16")
    n, t = kv.numpy(), kv.torch()

    def append(cache, row, position):
        return jax.lax.dynamic_update_slice(cache, row[:, None, :], (0, position, 0))

    attend = jax.jit(lambda cache, q: jnp.einsum("hsd,hd->hs", cache, q))
    with rlx.no_copies():
        for position in range(8):
            kv.update(append, jnp.ones((2, 16), jnp.bfloat16), position)
            scores = attend(kv.jax(), jnp.ones((2, 16), jnp.bfloat16))
            assert scores.shape == (2, 8)
            assert t[:, position].sum() == 32
            float(scores[0, 0])
            n[:, position] *= 2  # evict, scale: plain writes between steps
    kv.close()


def unordered_chain():
    b = filled(0)
    n = b.numpy()
    for _ in range(5):
        b.update(plus_one, ordered=False)
    seen = b.jax()
    assert float(seen[0, 0]) == 5
    b.update(plus_one, ordered=False)
    b[:2].update(plus_one, ordered=False)
    assert b.numpy()[0, 0] == 7
    del seen
    n[0] = 0


def exceptions_in_blocks():
    b, c = filled(), filled()
    n = b.numpy()
    held = b.jax()
    with pytest.raises(ZeroDivisionError), b.write("numpy") as w:
        w[0] = 3
        1 / 0  # noqa: B018
    n[0] = 4
    with pytest.raises(ZeroDivisionError), b.read("jax"):
        1 / 0  # noqa: B018
    n[0] = 5

    def broken(x, y):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        c.update(broken, b)
    with pytest.raises(ZeroDivisionError):
        b.update(broken, c, framework="numpy")
    n[0] = 6
    with pytest.raises(rlx.ShapeError):
        b.update(lambda x: x[0])
    with pytest.raises(rlx.ShapeError):
        rlx.commit(b, np.zeros(3, "f4"))
    n[0] = 7
    del held


def failing_program():
    b = filled()

    def callback(_):
        raise ArithmeticError

    def failing(x):
        return jax.pure_callback(callback, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    held = b.jax()
    with pytest.raises(rlx.UpdateFailedError):
        b.update(failing)
        b.jax()
        b.numpy()
    b[...] = 0.0
    b.numpy()[0] = 1
    assert float(b.jax().sum()) == 16
    del held


def refused_fence():
    b = filled()
    n = b.numpy()
    held = b.jax()
    alias = np.asarray(held)
    with pytest.raises(rlx.ZeroCopyError), b.write("numpy"):
        pass
    del alias
    with b.write("numpy") as w:
        w[0] = 9
    n[0] = 8


def lost_donation_that_is_overwritten():
    b = filled()
    donating(b.jax()).block_until_ready()
    with pytest.raises(rlx.StaleViewError):
        b.jax()
    b.copy_from(np.zeros(b.shape, "f4"))
    donating(b.jax())
    b[...] = 3.0
    assert b.numpy().sum() == 192
    donating(b.jax())
    rlx.commit(b, torch.zeros(4, 16))


def garbage():
    b = filled()
    n = b.numpy()
    for i in range(4):
        cycle = Holder()
        cycle.me, cycle.view = cycle, b.jax()
        if i == 3:
            cycle.more = [b[:2].jax(), b.jax()]
        del cycle  # let go; the collector has not come by yet
        n[0] = i + 2
        if i == 1:
            gc.collect()
        elif i == 2:
            b.jax()
        else:
            b.update(plus_one)
    cycle = Holder()
    cycle.me, cycle.view = cycle, b.jax()
    del cycle
    n[0] = 9


def garbage_without_collector():
    gc.disable()
    try:
        garbage()
    finally:
        gc.enable()


def closing():
    with rlx.BufferHandle("kv", 64) as kv:
        n, held = kv.numpy(), kv.jax()
    n[0] = 3  # the handle is gone, the memory is ours
    b = filled()
    n, part = b.numpy(), b[1].jax()
    b.close()
    n[...] = 3
    region = rlx.HandleRegion("cpu")
    a = region.create({"a": (64, "f32")})["a"]
    view = a.jax(), a.numpy()
    region.close()
    view[1][0] = 5
    del held, part


def many_readers_in_threads():
    b = filled()
    n = b.numpy()
    turn = threading.Lock()

    def work(i):
        for k in range(6):
            if k % 3 == i % 3:
                b.update(plus_one, ordered=bool(k % 2))
            elif k % 3 == 1:
                with b.read("jax") as j:
                    float(summed(j))
                del j
            else:
                with b.write("numpy") as w:
                    w += 1
            with turn, b.write("torch"):
                pass
            try:
                float(summed(b.jax()))
            except (RuntimeError, ValueError) as error:  # another thread wrote meanwhile
                assert "deleted" in str(error)
                del error

    for future in [start(work, i) for i in range(4)]:
        future.result(timeout=120)
    n[0] = 0


def reader_under_way():
    warm_up()
    b = rlx.Buffer.from_array(np.ones((512, 512), np.float32), copy=True)
    out = reader_in_flight(b.jax())
    with b.write("numpy") as n:
        n[...] = 7
    assert bool((np.asarray(out) == 1).all())
    n[0] = 3


def callbacks():
    a, b = filled(1), filled(2)

    def look(x):
        return x + b.numpy()[0, 0] + float(b.jax()[0, 0])

    def step(x):
        return jax.pure_callback(look, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    a.update(step)
    assert a.numpy()[0, 0] == 5
    b.numpy()[0] = 4


def modes_of_torch():
    b = filled()
    with torch.no_grad():
        b.torch().add_(1)
    with torch.inference_mode():
        float(b.jax().sum())
        b.torch().add_(1)
    weight = torch.nn.Parameter(b.torch())
    weight.data.zero_()
    assert float(b.jax().sum()) == 0


def odd_sizes():
    empty, scalar = rlx.Buffer.zeros((0, 4)), rlx.Buffer.zeros(())
    for b in (empty, scalar):
        held = b.jax()
        b.update(plus_one)
        b.numpy()[...] = 3
        del held
        rlx.commit(b, donating(b.jax()))
        b.numpy()[...] = 4
    held = empty.jax()
    empty.numpy()[...] = 3
    del held


def new_memory_at_an_old_address():
    for _ in range(20):
        b = filled()
        held = b.jax()
        b.update(plus_one)
        del b
        b = filled(3)
        b.numpy()[0] = 7
    del held


def handles_made_and_used_inside():
    kv = rlx.BufferHandle("late", (4, 16))
    assert not kv.is_allocated
    kv.numpy()[0] = 1
    float(kv.jax().sum())
    kv.torch()[0] = 2
    kv.update(plus_one)
    kv.close()


def steps_that_swap_and_keep():
    a, b = filled(1), filled(2)
    pair = [a, b]
    for _ in range(3):
        held = rlx.views(pair, "jax")
        rlx.update(pair, lambda t: [t[1], t[0]])
        rlx.update(pair, lambda t: [t[1], t[0]], framework="numpy")
        assert held[0].is_deleted()
    new = jax.jit(lambda t: [t[1], t[0]], donate_argnums=0)(rlx.views(pair, "jax"))
    rlx.commit(pair, new)
    rlx.commit(pair, rlx.views(pair[::-1], "jax"))
    a.numpy()[0] = 8


def arrays_that_jax_passes_on():
    b = filled()
    n = b.numpy()
    same = jax.jit(lambda x: x)(b.jax())
    b.update(plus_one)
    del same
    n[0] = 3
    x, y = jax.device_put((b.jax(), b.jax()))
    del x, y
    n[0] = 4
    jax.block_until_ready(b.jax())
    n[0] = 5
    repr(b.jax()), hash(b), b.jax().tolist()
    n[0] = 6
    jax.vmap(jnp.sum)(b.jax()), jax.grad(lambda x: (x * b.torch().sum().item()).sum())(b.jax())
    n[0] = 7


LEGAL = [
    read_then_write,
    let_go_then_write,
    let_go_in_a_function,
    assign_from_its_own_view,
    scopes_while_a_view_is_held,
    every_write_of_the_driver_while_a_view_is_held,
    parts,
    trees,
    drop_in_training,
    training_with_torch,
    decode_loop,
    unordered_chain,
    exceptions_in_blocks,
    failing_program,
    refused_fence,
    lost_donation_that_is_overwritten,
    garbage,
    garbage_without_collector,
    closing,
    many_readers_in_threads,
    reader_under_way,
    callbacks,
    modes_of_torch,
    odd_sizes,
    new_memory_at_an_old_address,
    handles_made_and_used_inside,
    steps_that_swap_and_keep,
    arrays_that_jax_passes_on,
]


@pytest.mark.filterwarnings("error::rlx_driver.RaceWarning")
@pytest.mark.parametrize("program", LEGAL, ids=lambda f: f.__name__)
def test_a_legal_program_has_no_races(program, way, caplog):
    with rlx.checking() as check:
        program()
    assert check.races == []
    with rlx.checking(on_race="warn"):
        program()


@pytest.mark.parametrize("program", LEGAL, ids=lambda f: f.__name__)
def test_a_legal_program_is_legal_without_the_checker(program, caplog):
    program()


def test_an_error_that_is_kept_keeps_no_view_that_only_the_driver_gave_to_a_step():
    b, c = filled(), filled()

    def broken(x, y):
        raise ZeroDivisionError

    with rlx.checking() as check:
        with pytest.raises(ZeroDivisionError) as caught:
            c.update(broken, b)
        b.numpy()[0] = 6  # the frames of the error have b's array still
        b.update(plus_one)
    assert check.races == []
    assert caught.traceback


@pytest.mark.parametrize("drop", [True, False])
def test_a_write_of_the_driver_that_comes_while_bytes_are_compared_is_no_race(kv, monkeypatch, drop):
    real = Watch.checksum

    def racing(watch):
        began.append(watch)
        if len(began) == 2:
            in_thread(kv.update, plus_one)
            kv.numpy()
        return real(watch)

    began = []
    monkeypatch.setattr(Watch, "checksum", racing)
    with rlx.checking() as check:
        held = kv.jax()
        if drop:
            del held
    assert len(began) >= 2
    assert check.races == []


def test_a_program_that_writes_before_its_donation_shows_is_no_race(kv, monkeypatch):
    real = Watch.checksum
    n = kv.numpy()

    def racing(watch):
        if began:  # as another thread's update does
            kv._access.writer = -1
            n[0] = 7
        began.append(watch)
        return real(watch)

    began = []
    monkeypatch.setattr(Watch, "checksum", racing)
    with rlx.checking() as check:
        held = kv.jax()
        del held
        kv._access.writer = 0
    assert len(began) == 2
    assert check.races == []


def test_a_write_through_a_view_from_before_the_block_is_legal_where_no_view_is_live(kv):
    n, t = kv.numpy(), kv.torch()
    float(kv.jax().sum())
    with rlx.checking() as check:
        n[0] = 3
        t[0] = 4
        float(kv.jax().sum())
        n[0] = 5
    assert check.races == []


def test_a_view_from_before_the_block_is_not_watched_but_stays_good(kv):
    old, n = kv.jax(), kv.numpy()
    with rlx.checking() as check:
        n[0] = 3
        assert kv.jax() is not old
        rlx.commit(kv, old)
        with kv.write("numpy"):
            pass
        assert old.is_deleted()
    assert check.races == []


def test_a_view_from_the_block_stays_good_after_it(kv):
    with rlx.checking():
        view = kv.jax()
    with rlx.no_copies():
        epoch = kv.epoch
        rlx.commit(kv, view)  # the very view that was handed out changes nothing
        assert kv.epoch == epoch
        rlx.commit(kv, donating(view))
    assert kv.numpy()[0, 0] == 1
    assert view.is_deleted()


def test_the_view_that_is_handed_out_can_do_what_the_array_can(kv, way):
    kv.numpy()[...] = 3
    plain = kv.jax()
    with rlx.checking(), rlx.no_copies():
        view = kv.jax()
        assert kv.jax() is view is kv.array("jax")
        assert view is rlx.views([kv], "jax")[0]
        assert (view.shape, view.dtype, view.sharding) == (plain.shape, plain.dtype, plain.sharding)
        assert (view.weak_type, view.committed) == (plain.weak_type, plain.committed)
        assert view.unsafe_buffer_pointer() == kv.address
        counted = []
        function = jax.jit(lambda x: counted.append(1) or x + 1)
        function(plain), function(view)
        assert len(counted) == 1, "it is traced as the same thing"
        epoch = kv.epoch
        rlx.commit(kv, view)
        assert (kv.epoch, kv.jax()) == (epoch, view) or kv.jax() is view
        new = donating(view)
        assert view.is_deleted()
        assert plain.is_deleted()
        assert new.unsafe_buffer_pointer() == kv.address
        rlx.commit(kv, new)
        assert kv.epoch == epoch + 1
        again = kv.jax()
        with kv.write("numpy"):
            pass
        assert again.is_deleted()
        again = kv.jax()
        kv.update(plus_one)
        assert again.is_deleted()
        assert kv.numpy()[0, 0] == 5


def test_the_checker_keeps_no_memory(way):
    def in_use():
        if way == "references":  # then it is looked up, at any access
            rlx.Buffer.zeros(1).numpy()
        gc.collect()
        return accounting.in_use(rlx.Device("cpu"))

    before = in_use()
    with rlx.checking():
        b = rlx.Buffer.zeros((4, 16))
        held = b.jax()
        b.update(plus_one)
        del b
        assert in_use() == before, "a dead view holds nothing"
        b = rlx.Buffer.zeros((4, 16))
        new = donating(b.jax())
        rlx.commit(b, new)
        del b, new
        assert in_use() == before
        b = rlx.Buffer.zeros((4, 16))
        for _ in range(5):
            b.jax(), b[1].jax(), b.numpy(), b.torch()
        new = donating(b.jax())
        del b, new
        assert in_use() == before
        b = rlx.Buffer.zeros((4, 16))
        view = b.jax()
        del b
        assert in_use() > before
        del view
        assert in_use() == before
    del held


def test_watches_are_forgotten(kv):
    with rlx.checking():
        for _ in range(20):
            kv.jax(), kv[1].jax()
            kv.update(plus_one)
            rlx.commit(kv, donating(kv.jax()))
            kv.numpy()
        assert len(_hooks.checker._watches) <= 3


# --- blocks ----------------------------------------------------------------------------------


def test_the_rest_of_a_block_goes_on_after_a_race(kv):
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        held = kv.jax()
        kv.numpy()[0] = 1
        kv.update(plus_one)
        assert "1 races" in repr(check)
        kv.numpy()[0] = 7
        assert float(kv.jax()[0, 0]) == 7
    del held


def test_races_can_be_warnings(kv):
    with rlx.checking(on_race="warn") as check:
        held = kv.jax()
        kv.numpy()[0] = 1
        with pytest.warns(rlx.RaceWarning, match="handle 'kv' changed") as caught:
            kv.update(plus_one)
        assert caught[0].filename == __file__
        with pytest.warns(rlx.RaceWarning, match="never committed"):
            donating(kv.jax())
            kv.numpy()
    assert len(check.races) == 2
    del held


def test_what_is_noticed_last_is_a_warning_at_the_end(kv):
    n = kv.numpy()
    with pytest.warns(rlx.RaceWarning, match="handle 'kv'") as caught:
        with rlx.checking(on_race="warn"):
            held = kv.jax()
            n[0] = 3
    assert caught[0].filename == __file__
    del held


def test_a_stale_view_is_a_warning_beside_jax_own_error(kv):
    with (
        pytest.warns(rlx.RaceWarning, match="went stale"),
        pytest.raises(RuntimeError, match="Array has been deleted") as caught,
        rlx.checking(on_race="warn"),
    ):
        stale = kv.jax()
        kv.update(plus_one)
        stale + 1
    assert not isinstance(caught.value, rlx.RaceError)


def test_what_is_found_where_a_reference_dies_is_said_at_the_next_access(kv):
    n = kv.numpy()
    with rlx.checking(on_race="warn") as check:
        held = kv.jax()
        n[0] = 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del held  # where a warning that is an error could not be raised
        assert len(check.races) == 1
        with pytest.warns(rlx.RaceWarning):
            kv.numpy()


def test_a_warning_that_is_an_error_leaves_everything_usable(kv):
    n = kv.numpy()
    for access in (
        lambda: kv.update(plus_one),
        lambda: through(kv.write("torch")),
        lambda: kv.copy_from(np.zeros((4, 16), "f4")),
        lambda: rlx.commit(kv, np.zeros((4, 16), "f4")),
        kv.jax,
        kv.close,
    ):
        with warnings.catch_warnings(), rlx.checking(on_race="warn"):
            warnings.simplefilter("error", rlx.RaceWarning)
            held = kv.jax()
            n[0] += 1
            with pytest.raises(rlx.RaceWarning):
                access()
            if not kv.is_closed:
                kv.update(plus_one)
            del held
    assert kv.is_closed


def test_an_inner_block_answers_for_its_own_views_and_passes_the_rest_on(kv):
    other = rlx.BufferHandle("other", 64)
    n = kv.numpy()
    with pytest.raises(rlx.RaceError) as caught, rlx.checking() as outer:
        held = kv.jax()
        with pytest.raises(rlx.RaceError), rlx.checking() as inner:
            mine = other.jax()
            other.numpy()[0] = 1
            n[0] = 1
            kv.update(plus_one)
        assert [race.label for race in inner.races] == ["handle 'other'"]
        assert _hooks.checker is not None
        with rlx.checking() as inner:
            later = other.jax()
        assert inner.races == []
        other.numpy()[0] = 2
    assert [race.label for race in outer.races] == ["handle 'kv'", "handle 'other'"]
    assert caught.value.races == outer.races
    del held, mine, later


def test_an_inner_race_that_leaves_both_blocks_is_told_once(kv):
    n = kv.numpy()
    with pytest.raises(rlx.RaceError) as caught, rlx.checking() as outer:
        with rlx.checking() as inner:
            held = kv.jax()
            n[0] = 1
    assert outer.races == []
    assert caught.value.races == inner.races
    assert len(inner.races) == 1
    assert not hasattr(caught.value, "__notes__")
    del held


def test_blocks_of_two_threads_may_end_in_any_order(kv):
    n = kv.numpy()
    first, second = rlx.checking(), rlx.checking()
    first.__enter__()
    held = kv.jax()
    in_thread(second.__enter__)
    more = kv[:1].jax()
    n[0] = 4
    with pytest.raises(rlx.RaceError):
        first.__exit__(None, None, None)
    with pytest.raises(rlx.RaceError):
        in_thread(second.__exit__, None, None, None)
    assert [len(first.races), len(second.races)] == [1, 1]
    del held, more


def test_a_block_is_entered_once_and_takes_two_words():
    with rlx.checking() as check:
        pass
    with pytest.raises(RuntimeError, match="another one"), check:
        pass
    with pytest.raises(ValueError, match="'raise' or 'warn'"):
        rlx.checking(on_race="ignore")


def test_a_forked_child_is_not_checked(kv):
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    must_run("""
import os, warnings
import numpy as np
import rlx_driver as rlx
warnings.simplefilter("ignore")
with rlx.checking() as check:
    b = rlx.Buffer.zeros(64)
    n, held = b.numpy(), b.jax()
    child = os.fork()
    if child == 0:
        from rlx_driver import _hooks
        n[0] = 3
        del held
        ok = _hooks.checker is None and not check.races
        check.__exit__(None, None, None)
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not check.races
""")


# --- the whole process -----------------------------------------------------------------------

PROCESS = """
import warnings
import numpy as np
import rlx_driver as rlx

kv = rlx.BufferHandle("kv", (4, 16))
n = kv.numpy()

def legal():
    float(kv.jax().sum())
    n[0] = 1
    kv.update(lambda x: x + 1)

def race():
    held = kv.jax()
    n[0] += 1
    kv.update(lambda x: x + 1)

legal()
"""


def test_the_environment_switches_checking_on_with_warnings():
    done = python(
        PROCESS + "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n    race()\n"
        "print([w.category.__name__ for w in seen if 'kv' in str(w.message)])\n",
        RLX_CHECKING="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['RaceWarning']\n"
    assert done.stderr == ""


def test_what_remains_is_printed_at_the_exit():
    done = python(PROCESS + "held = kv.jax()\nn[1] = 8\n", RLX_CHECKING="1")
    assert done.returncode == 0
    assert "rlx_driver: bytes of handle 'kv' changed while a view of jax was live" in done.stderr
    assert done.stderr.count("rlx_driver:") == 1
    done = python(
        PROCESS + "import jax\nx = jax.jit(lambda x: x + 1, donate_argnums=0)(kv.jax())\n",
        RLX_CHECKING="1",
    )
    assert "never committed" in done.stderr


@pytest.mark.parametrize("value", ["", "0", None])
def test_without_the_environment_nothing_is_checked(value):
    done = python(
        PROCESS + "race()\nfrom rlx_driver import _hooks\nassert _hooks.checker is None\n",
        **({} if value is None else {"RLX_CHECKING": value}),
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_block_inside_a_checked_process_raises_by_itself():
    must_run(
        PROCESS
        + """
warnings.simplefilter("error")
try:
    with rlx.checking():
        race()
except rlx.RaceError as error:
    assert len(error.races) == 1
else:
    raise AssertionError
legal()
""",
        RLX_CHECKING="1",
    )


def test_a_checked_process_without_jax_loads_no_framework():
    must_run(
        """
import sys
import numpy as np
import rlx_driver as rlx
b = rlx.Buffer.zeros(64)
b.numpy()[0] = 1
with b.write("numpy") as n:
    n += 1
b.close()
assert not {"jax", "torch"} & set(sys.modules)
""",
        RLX_CHECKING="1",
    )


# --- off, it costs nothing -------------------------------------------------------------------


def flags(b):
    access = b._access
    return access.fast, access.native_ready, access.functional_ready


def everything(b):
    return b.numpy(), b.torch(), b.jax()


def test_after_a_block_everything_is_as_fast_as_before(kv, way, monkeypatch):
    fresh = rlx.Buffer.zeros(64)
    lazy = rlx.BufferHandle("lazy", 64)
    buffers = [kv, fresh, kv[:2]]
    for b in buffers:
        everything(b)
    collectors = list(gc.callbacks)
    before = [flags(b) for b in buffers]
    assert before == [(True, True, True)] * 3
    with rlx.checking():
        inside = rlx.Buffer.zeros(64)
        for b in [*buffers, inside, lazy]:
            everything(b)
            b.update(plus_one)
            held = everything(b)
            assert flags(b)[:2] == (False, False)
            assert b._jax.handed is None
    del held
    assert gc.callbacks == collectors
    assert _hooks.checker is None
    for b in [*buffers, inside, lazy]:
        assert flags(b) == (True, True, True)
        views = everything(b)

        def slow(self, *_, **__):
            raise AssertionError("the slow way was taken")

        with monkeypatch.context() as patched:
            for name in ("_mutable_view", "_functional_view"):
                patched.setattr(rlx.Buffer, name, slow)
            assert all(a is b for a, b in zip(everything(b), views, strict=True))
            assert b.jax() is b.jax()
            del views
        b.update(plus_one)
        with monkeypatch.context() as patched:
            patched.setattr("rlx_driver._update._ready_lease", slow)
            b.update(plus_one)


def test_a_block_that_ends_inside_scopes_leaves_them_alone(kv):
    everything(kv)
    check = rlx.checking()
    check.__enter__()
    with kv.write("numpy") as n:
        n[0] = 1
        check.__exit__(None, None, None)
        assert flags(kv) == (True, False, False)
        with pytest.raises(rlx.StaleViewError):
            kv.numpy()
    assert flags(kv) == (True, True, True)
    check = rlx.checking()
    with kv.read("numpy"):
        check.__enter__()
        check.__exit__(None, None, None)
    assert flags(kv) == (True, True, True)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with kv.write("torch"):
            entered.set()
            leave.wait(60)

    future = start(hold)
    entered.wait(60)
    with rlx.checking():
        pass
    assert not kv._access.native_ready
    leave.set()
    future.result(60)
    assert flags(kv) == (True, True, True)


def test_nothing_of_the_checker_is_asked_while_nobody_checks(kv, monkeypatch):
    from rlx_driver import _checker

    everything(kv)
    with rlx.checking():
        held = kv.jax()

    def asked(*_, **__):
        raise AssertionError("the checker was asked")

    for cls in (_checker.Checker, Watch):
        for name, member in vars(cls).items():
            if callable(member) and name != "_let_go":
                monkeypatch.setattr(cls, name, asked)
    everything(kv)
    write_by_update(kv)
    write_by_scope(kv)
    write_by_copy(kv)
    take_by_scope(kv)
    rlx.commit(kv, donating(kv.jax()))
    del held
    kv.close()


# --- how views are watched -------------------------------------------------------------------


def test_positive_control_an_alias_of_jax_shares_the_buffer_and_dies_with_it():
    """What the checker is built on: it counts references where this is not so."""
    backend = registry.get("jax")
    b = filled()
    array = b.jax()
    alias = backend.alias(array)
    assert alias is not array
    assert backend.alias(array) is not alias, "it is not kept by the array"
    assert alias.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    fenced = backend.fence([array])
    assert array.is_deleted()
    assert alias.is_deleted()
    array = fenced[0]
    alias = backend.alias(array)
    donating(alias)
    assert array.is_deleted()


def test_an_alias_that_does_not_share_is_not_used(monkeypatch):
    backend = registry.get("jax")
    b = filled()
    array = b.jax()
    module = "rlx_driver.backends.jax.same_buffer"
    arrays = "rlx_driver.backends._jax_arrays.same_buffer"
    for broken in (
        lambda x: jnp.array(x, copy=True),
        lambda x: x,
        lambda x: x.addressable_data(0),
        lambda x: x.no_such_thing,
    ):
        monkeypatch.setattr(backend, "_aliases", None)
        monkeypatch.setattr(module, broken)
        monkeypatch.setattr(arrays, broken)
        assert backend.alias(array) is array


def test_counting_references_knows_a_view_that_was_let_go(kv, monkeypatch):
    monkeypatch.setattr(type(registry.get("jax")), "alias", lambda self, array: array)
    n = kv.numpy()
    with pytest.raises(rlx.RaceError), rlx.checking() as check:
        kv.jax()
        n[0] = 1
        kv.update(plus_one)
        kv.jax()
        n[0] = 2
        with kv.write("numpy"):
            pass
        kv.jax()
        n[0] = 3
        kv.copy_from(np.zeros((4, 16), "f4"))
        assert check.races == []
        held = [kv.jax()]
        n[0] = 4
        kv.update(plus_one)
        assert len(check.races) == 1
    del held


# --- on a GPU --------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("notice", ["update", "write", "end"])
def test_a_write_by_torch_under_a_view_on_a_gpu(notice):
    kv = rlx.BufferHandle("kv", (4, 16), "f32", device="cuda:0")
    t = kv.torch()
    with rlx.checking() as check:
        float(kv.jax().sum())
        t[0] = 1
        kv.update(plus_one)
        rlx.commit(kv, donating(kv.jax()))
        t[0] = 2
        float(kv.jax().sum())
    assert check.races == []
    with pytest.raises(rlx.RaceError, match="handle 'kv'") as caught, rlx.checking():
        held = hand_out_jax(kv)
        hand_out_mutable(kv, "torch")[0] = 5
        if notice == "update":
            kv.update(plus_one)
        elif notice == "write":
            with kv.write("torch"):
                pass
    (race,) = caught.value.races
    assert race.frameworks == ("jax", "torch")
    assert line_of(hand_out_jax) in str(race)
    with pytest.raises(rlx.RaceError, match="went stale"), rlx.checking():
        stale = kv.jax()
        kv.update(plus_one)
        stale + 1
    assert kv.torch() is kv.torch()
    assert kv.jax() is kv.jax()
    del held
    kv.close()
