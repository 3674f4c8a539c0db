"""The race checker: what it finds, what it must not find, and that it leaves nothing behind."""

import gc
import os
import re
import threading
import warnings

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver import _hooks
from rlx_driver._watch import Watch
from rlx_driver.backends.base import accounting
from rlx_driver.registry import registry
from rlx_driver.testing import FakeDevice
from support import must_run, python

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402

from buffer_support import in_thread, start  # noqa: E402
from legal_programs import LEGAL, WRITERS, Holder, donating, filled, plus_one, summed  # noqa: E402

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
    """Both ways to know whether a view is held: by an alias, or where there is none by counting."""
    if request.param == "references":
        monkeypatch.setattr(type(registry.get("jax")), "alias", lambda self, array: array)
    return request.param


class Finding:
    """A block of checking that has to end with a `RaceError`."""

    def __init__(self, match=""):
        self._match = match
        self._block = rlx.checking()
        self.races = self._block.races
        self.error = None

    def __enter__(self):
        self._block.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        try:
            self._block.__exit__(kind, error, trace)
        except rlx.RaceError as raised:
            assert re.search(self._match, str(raised))
            self.error = raised
        if isinstance(error, rlx.RaceError):
            self.error = error  # of a block inside
        if self.error is None and error is None:
            pytest.fail("no race was found")
        return self.error is not None


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
    with Finding() as check:
        held = take(b)
        scribble(view)
    race = only(check)
    assert race.kind == "changed under a view"
    assert race.frameworks == ("jax", "unknown")  # the mutable view is older than the block
    assert check.error.races == check.races
    assert not held.is_deleted()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("notice", [pytest.param(f, id=name) for name, f in NOTICED.items()])
def test_a_write_under_a_view_is_found_once_wherever_it_is_noticed(kv, way, notice, writer):
    if way == "references" and notice is hand_out_jax:
        pytest.skip("who holds an array that is being handed out cannot be counted")
    with Finding() as check:
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
    with Finding() as check:
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

    with Finding() as check:
        view = hand_out_mutable(kv, writer)
        held = hand_out_jax(kv)
        scribble(view)
        notice()
    del held
    race = only(check)
    text = str(race)
    assert text in str(check.error)
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
    assert "rlx_driver" not in text, "our own frames are of no use"
    assert "write(...)" in text.splitlines()[0]


def test_every_framework_that_may_have_written_is_named_and_places_are_bounded(kv):
    with Finding() as check:
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
    with Finding() as check:
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
    with Finding() as check:
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
    with Finding("from_array") as check:
        held = b.jax()
        own[5] = 1
    assert only(check).frameworks == ("jax", "unknown")
    del held


def test_two_buffers_on_one_memory_do_not_know_each_other():
    first = filled(0)
    second = rlx.Buffer.from_array(first.numpy(), copy=False)
    with Finding() as check:
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
    with x64(True), Finding() as check:
        held = b.jax()
        n[2, 4] = 1
    only(check)
    del held


def test_a_buffer_without_axes_is_watched():
    b = rlx.Buffer.zeros(())
    with Finding() as check:
        held = b.jax()
        b.numpy()[...] = 1
    only(check)
    del held


def test_memory_that_jax_owns_is_watched():
    with rlx.HandleRegion("cpu", backend="jax") as region:
        kv = region.create({"kv": ((4, 16), "f32")})["kv"]
        with Finding() as check:
            held = kv.jax()
            assert held.committed, "the alias stays on its device as the array itself does"
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
    with Finding() as check:
        held = kv.jax()
        in_thread(scribble, n)
        in_thread(kv.update, plus_one)
        assert len(check.races) == 1
    only(check)
    del held


def test_a_view_that_another_thread_holds_is_found(kv):
    n = kv.numpy()
    with Finding() as check:
        held = [in_thread(hand_out_jax, kv)]
        n[0] = 3
        kv.update(plus_one)
    assert line_of(hand_out_jax) in str(only(check).handed_out_at)
    del held


def test_a_view_in_a_read_scope_is_compared_when_the_scope_ends(kv, way):
    with Finding() as check:
        with kv.read("jax") as j:
            kv.numpy()[0] = 2
        assert len(check.races) == 1
        del j


def test_every_array_of_a_tree_is_watched():
    state = {"a": filled(), "b": [filled(), filled()]}
    with Finding("2 races found") as check:
        held = rlx.views(state, "jax")
        state["a"].numpy()[0] = 5
        state["b"][1].torch()[0] = 5
        rlx.update(state, lambda t: jax.tree.map(plus_one, t))
    assert sorted(race.frameworks[1] for race in check.races) == ["numpy", "torch"]
    del held


def test_a_view_goes_on_being_watched_after_a_race_that_was_reported(kv):
    with Finding() as check:
        n = kv.numpy()
        held = kv.jax()
        n[0] = 5
        assert kv.jax() is held
        n[0] = 6
    assert len(check.races) == 2
    assert "(2 times)" not in str(check.races[0])


def test_a_view_whose_fence_was_refused_goes_on_being_watched(kv):
    with Finding() as check:
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
    with Finding() as check:
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
    with Finding() as check:
        b = filled(0)
        for i in range(3):
            j = b.jax()
            b.numpy()[0] = i + 1
            del j
    assert str(check.error).startswith("3 races found\n\n(3 times) bytes of Buffer")
    assert len(check.races) == 3


def test_jax_that_holds_the_view_for_the_program_counts_as_held(kv):
    with Finding():
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
    with Finding() as check:
        bystander = other.jax()
        stale = hand_out_jax(kv)
        write(kv)
        kv.update(plus_one)  # a later write is not the one that made it stale
        other.update(plus_one)
        use(stale)
    del bystander
    assert isinstance(check.error.__cause__, (RuntimeError, ValueError))
    assert "deleted" in str(check.error.__cause__)
    race = only(check) if use is not use_by_attribute else check.races[-1]
    text = str(race)
    assert (race.label, race.kind, race.frameworks) == ("handle 'kv'", "stale view", ("jax",))
    assert "handle 'kv' was used after it went stale" in str(check.error)
    assert line_of(hand_out_jax) in str(race.handed_out_at)
    assert line_of(write) in str(race.changed_by[0])
    used = line_of(test_a_stale_view_is_named_with_the_write_that_ended_it, 10)
    assert f"{used}\n" in str(race.noticed_at)
    assert "a write by the driver ended it at" in text
    assert "site-packages" not in str(race.noticed_at).rpartition(used)[2]


def test_of_several_stale_views_the_one_that_was_used_is_named():
    one, two = (rlx.BufferHandle(name, (4, 16)) for name in ("one", "two"))
    with Finding() as check:
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
    with Finding() as check:
        view = kv.jax()
        rlx.commit(kv, donating(view))
        view + 1
    assert "the program itself donated or deleted it" in str(only(check))
    assert check.error.__cause__ is not None


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
    with Finding("never committed") as check:
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
    with Finding() as check:
        new = donating(hand_out_jax(kv))
    assert only(check).kind == "not committed"
    del new


def test_a_donation_of_a_part_is_found_where_that_part_is_seen():
    b = filled()
    with Finding() as check:
        new = donating(b[:2].jax())
        assert b[2:].numpy().sum() == 32
        b[3].torch()
        assert check.races == []
        b[1].numpy()
        assert len(check.races) == 1
    only(check)
    del new


# --- what is legal ---------------------------------------------------------------------------


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
def test_a_write_of_the_driver_that_comes_while_bytes_are_compared_is_no_race(
    kv, monkeypatch, drop
):
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
    with Finding() as check:
        held = kv.jax()
        kv.numpy()[0] = 1
        kv.update(plus_one)
        assert len(check.races) == 1
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
    with Finding() as outer:
        held = kv.jax()
        with Finding() as inner:
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
    assert outer.error.races == outer.races
    del held, mine, later


def test_an_inner_race_that_leaves_both_blocks_is_told_once(kv):
    n = kv.numpy()
    with Finding() as outer:
        with rlx.checking() as inner:
            held = kv.jax()
            n[0] = 1
    assert outer.races == []
    assert outer.error.races == inner.races
    assert len(inner.races) == 1
    assert not hasattr(outer.error, "__notes__")
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
    assert repr(check) == "<checking, 0 found>"
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
        monkeypatch.setattr(backend, "_aliases", {})
        monkeypatch.setattr(module, broken)
        monkeypatch.setattr(arrays, broken)
        assert backend.alias(array) is array


def test_counting_references_knows_a_view_that_was_let_go(kv, monkeypatch):
    monkeypatch.setattr(type(registry.get("jax")), "alias", lambda self, array: array)
    n = kv.numpy()
    with Finding() as check:
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


# --- on a device with streams ----------------------------------------------------------------


@pytest.fixture(params=["shared", "events", "host"])
def fake(request):
    with FakeDevice(order=request.param, on_host_wait="release") as fake:
        yield fake


def test_races_on_a_device_with_streams(fake):
    b = rlx.Buffer.zeros(4, "f32", fake.device)
    n = b.array("fake")
    with Finding() as check:
        for i, notice in enumerate(
            [
                lambda: b.update(plus_one, framework="fake_functional"),
                lambda: b.update(plus_one, framework="fake"),
                lambda: through(b.write("fake")),
                lambda: b.copy_from(np.ones(4, np.float32)),
                b.close,
            ]
        ):
            assert len(check.races) == i
            held = b.array("fake_functional")
            n[0] = 100 * (i + 1)
            notice()
    assert {race.frameworks for race in check.races} == {
        ("fake_functional", "unknown"),
        ("fake_functional", "fake"),
    }
    assert len(check.races) == 5
    del held


def test_a_legal_program_on_a_device_with_streams(fake):
    b, other = (rlx.Buffer.zeros(4, "f32", fake.device) for _ in range(2))
    n = b.array("fake")
    with rlx.checking() as check:
        for i in range(4):
            n[0] = i
            b.array("fake_functional")
            n[0] = i + 1
            b.update(plus_one, framework="fake_functional")
            n[1] = i
            held = b.array("fake_functional")
            with b.write("fake") as w:
                w[2] = i
            n[3] = i
            held = b.array("fake_functional"), b[:2].array("fake_functional")
            b.update(lambda x, y: x + y, other, framework="fake_functional")
            b.copy_from(other)
            b[0] = 3.0
            with fake.stream("side"):
                n = b.array("fake")
                n[0] = 5
                with rlx.read([b, other], "fake_functional"):
                    pass
                rlx.update([b, other], lambda t: [t[1], t[0]], framework="fake_functional")
            b.to_host()
    assert check.races == []
    del held


def test_the_fast_return_on_a_device_with_streams_is_off_in_a_block_alone():
    with FakeDevice(on_host_wait="release") as fake:
        b = rlx.Buffer.zeros(4, "f32", fake.device)
        b.array("fake")
        before = flags(b)
        assert b._access.is_settled()
        with rlx.checking():
            assert not b._access.is_settled()
            b.array("fake"), b.array("fake_functional")
        b.array("fake")
        assert b._access.is_settled()
        assert flags(b) == before


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
    with Finding("handle 'kv'") as check:
        held = hand_out_jax(kv)
        hand_out_mutable(kv, "torch")[0] = 5
        if notice == "update":
            kv.update(plus_one)
        elif notice == "write":
            with kv.write("torch"):
                pass
    (race,) = check.races
    assert race.frameworks == ("jax", "torch")
    assert line_of(hand_out_jax) in str(race)
    with Finding("went stale"):
        stale = kv.jax()
        kv.update(plus_one)
        stale + 1
    assert kv.torch() is kv.torch()
    assert kv.jax() is kv.jax()
    del held
    kv.close()
