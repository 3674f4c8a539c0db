"""Snapshots: what was saved comes back, whole or not at all, and mapped without a copy."""

import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

import rlx_driver as rlx
from arena_support import everything, small_plan
from rlx_driver import Arena, Interval, SnapshotError, _snapshot_arena, _snapshot_file
from rlx_driver.testing import FakeDevice
from snapshot_support import (
    is_mapped,
    maps,
    names,
    pattern,
    raw_file,
    read_header,
    rich_plan,
    same_plan,
)
from support import must_run

safetensors = pytest.importorskip("safetensors")
jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

from buffer_support import SIDE, address, in_thread, start  # noqa: E402

pytestmark = [pytest.mark.jax, pytest.mark.torch]

WAYS = {
    "mapped": {},
    "read": {"mmap": False},
    "jax-owned": {"backend": "jax"},
}


@pytest.fixture
def tpu(monkeypatch):
    """A device kind that JAX serves and nothing else sees."""
    from rlx_driver.backends import jax as backend

    monkeypatch.setitem(backend._PLATFORM, "tpu", "cpu")
    return rlx.Device("tpu")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so small that everything crosses their borders."""
    monkeypatch.setattr(_snapshot_file, "CHUNK", 100)


@pytest.fixture
def arena():
    with Arena(small_plan(), name="t") as made:
        scribble(made)
        yield made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def scribble(arena, seed=0):
    """Fill a host arena with bytes of every value."""
    from rlx_driver.backends.numpy import array_at

    raw = array_at(arena.address, (arena.size_bytes,), np.dtype(np.uint8), arena)
    raw[...] = pattern(raw.size, seed)
    return raw.copy()


def plus_one(x):
    return x + 1


def one_node(nbytes, **more):
    return rlx.plan_memory([Interval("x", nbytes, 0, 1, **more)])


# --- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("owner", [None, "jax"])
def test_every_byte_and_the_plan_come_back(path, way, owner, small_chunks):
    with Arena(small_plan(), backend=owner) as arena:
        before = scribble(arena)
        arena.save(path)
    with Arena.load(path, name="again", **WAYS[way]) as loaded:
        np.testing.assert_array_equal(everything(loaded), before)
        assert same_plan(loaded.plan, small_plan())
        assert (loaded.generation, loaded.device) == (0, rlx.Device("cpu"))
        assert "'again'" in repr(loaded)
        assert loaded.address % 256 == 0 or way == "jax-owned"


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_with_everything_comes_back(path, way):
    plan = rich_plan()
    with Arena(plan) as arena:
        before = scribble(arena)
        arena.save(path)
    with Arena.load(path, **WAYS[way]) as loaded:
        assert same_plan(loaded.plan, plan)
        assert loaded.address % 1024 == 0
        np.testing.assert_array_equal(everything(loaded), before)
        assert loaded.view("x").shape == (4, 8)


def test_nodes_come_back_as_what_they_are(path):
    nodes = [
        "text",
        "",
        "\ud800 \N{SNOWMAN} \0",
        0,
        -(10**40),
        2.5,
        1e300,
        -0.5,
        float("inf"),
        float("-inf"),
        None,
        (),
        ("a", (1, (None, True)), 2.0),
        (1.0,),
        False,
    ]
    nodes.remove(0)  # equal to False
    with Arena(rlx.plan_memory([(node, 64, 0, 1) for node in nodes])) as arena:
        arena.save(path)
        with Arena.load(path) as loaded:
            assert same_plan(loaded.plan, arena.plan)
            for node in nodes:
                assert loaded.byte_offset(node) == arena.byte_offset(node)


@pytest.mark.parametrize("node", [True, 1, 1.0, (1,), (True,)])
def test_numbers_that_are_equal_keep_their_type(path, node):
    with Arena(rlx.plan_memory([(node, 64, 0, 1)])) as arena:
        arena.save(path)
    with Arena.load(path) as loaded:
        assert repr(loaded.plan.nodes) == repr((node,))


def test_a_node_that_is_not_a_number_comes_back(path):
    with Arena(rlx.plan_memory([(float("nan"), 64, 0, 1)])) as arena:
        arena.save(path)
    with Arena.load(path) as loaded:
        assert str(loaded.plan.nodes) == "(nan,)"


class Text(str):
    """Is not what it says."""


def deep(levels):
    node = ()
    for _ in range(levels):
        node = (node,)
    return node


@pytest.mark.parametrize(
    "node",
    [frozenset({1}), b"x", np.int64(3), Text("x"), ("a", object()), 10**5000, 1j],
    ids=["set", "bytes", "numpy", "subclass", "inside", "long", "complex"],
)
def test_other_nodes_are_refused_before_anything_is_written(path, node):
    plan = rlx.plan_memory([("fine", 64, 0, 1), (node, 64, 2, 3)])
    with Arena(plan) as arena, pytest.raises(SnapshotError, match="Nothing was written"):
        arena.save(path)
    assert names(path.parent) == []


def test_a_node_nested_too_deeply_is_refused(path):
    plan = rlx.plan_memory([("fine", 64, 0, 1), (deep(50), 64, 2, 3)])
    with Arena(plan) as arena, pytest.raises(SnapshotError, match="levels"):
        arena.save(path)
    assert names(path.parent) == []
    with Arena(rlx.plan_memory([(deep(49), 64, 0, 1)])) as arena:
        arena.save(path)
    with Arena.load(path) as loaded:
        assert loaded.has_buffer(deep(49))


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_arena_comes_back(path, way):
    with Arena(rlx.plan_memory([])) as arena:
        arena.save(path)
    with Arena.load(path, **WAYS[way]) as loaded:
        assert (loaded.size_bytes, len(loaded)) == (0, 0)
        loaded.reset()


def test_the_file_is_one_tensor_for_every_other_tool(arena, path):
    from safetensors.numpy import load_file
    from safetensors.torch import load_file as load_tensors

    arena.save(path)
    (tensor,) = load_file(path).values()
    np.testing.assert_array_equal(tensor, everything(arena))
    assert load_tensors(path)["arena"].tolist() == tensor.tolist()
    header, begin = read_header(path)
    assert begin % 256 == 0
    assert header["__metadata__"]["rlx_driver.format"] == "arena/1"


def test_the_data_begin_where_the_slots_ask_for(path):
    with Arena(one_node(100, alignment=2048)) as arena:
        arena.save(path)
    assert read_header(path)[1] % 2048 == 0


def test_slots_aligned_beyond_a_page_come_back_by_a_copy(path):
    with Arena(one_node(100, alignment=1 << 16)) as arena:
        before = scribble(arena)
        arena.save(path)
    with Arena.load(path) as loaded:
        assert loaded.address % (1 << 16) == 0
        np.testing.assert_array_equal(everything(loaded), before)
    plan = one_node(0, alignment=1 << 31)
    with Arena(plan) as arena, pytest.raises(SnapshotError, match="aligns to"):
        arena.save(path)


def test_a_file_resaved_by_another_tool_is_read(arena, path):
    header, begin = read_header_of(arena, path)
    data = path.read_bytes()[begin:]
    raw_file(path, {"__metadata__": header["__metadata__"], "arena": header["arena"]}, data)
    assert read_header(path)[1] % 64
    with Arena.load(path) as loaded:
        np.testing.assert_array_equal(everything(loaded), everything(arena))
        assert loaded.address % 256 == 0
    assert rlx.ledger.reasons["load"].bytes == arena.size_bytes


def read_header_of(arena, path):
    arena.save(path)
    return read_header(path)


# --- mapped --------------------------------------------------------------------------------------


def test_a_mapped_arena_is_the_file_and_no_copy_of_it(arena, path):
    arena.save(path)
    with rlx.no_copies(), Arena.load(path) as loaded:
        assert is_mapped(loaded.address, path)
        assert is_mapped(loaded.address + loaded.size_bytes - 1, path)
        assert (loaded.address - maps(path)[0][0]) == read_header(path)[1]
    assert rlx.ledger.copies == 0
    with Arena.load(path, mmap=False) as loaded:
        assert not is_mapped(loaded.address, path)
    assert rlx.ledger.reasons["load"].bytes == arena.size_bytes
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError, match="load"):
        Arena.load(path, mmap=False)


def test_what_is_written_to_a_mapped_arena_does_not_reach_the_file(arena, path):
    arena.save(path)
    kept = path.read_bytes()
    with Arena.load(path) as one, Arena.load(path) as other:
        before = everything(other)
        one["b"] = np.full(256, 7, np.float32)
        one.buffer("w").update(jax.numpy.ones_like)
        one.buffer("a").torch().fill_(3)
        assert (one.read("a") == 3).all()
        assert (one.read("w") == 1).all()
        np.testing.assert_array_equal(everything(other), before)
    assert path.read_bytes() == kept


def test_every_framework_shares_the_mapping(path):
    with Arena(one_node(4096, dtype="f32", shape=(1024,))) as arena:
        arena["x"] = np.arange(1024, dtype=np.float32)
        arena.save(path)
    with Arena.load(path) as loaded:
        slot = loaded.buffer("x")
        with rlx.no_copies():
            views = slot.numpy(), slot.torch(), slot.jax()
            assert {address(view) for view in views} == {loaded.address}
            assert is_mapped(address(views[2]), path)
            for _ in range(3):
                slot.update(plus_one)
            assert slot.address == loaded.address
        assert slot.torch().tolist() == list(range(3, 1027))


def test_a_mapping_outlives_the_name_and_the_arena(arena, path):
    before = everything(arena)
    arena.save(path)
    loaded = Arena.load(path)
    arena["b"] = np.zeros(256, np.float32)
    arena.save(path)  # another file takes the name
    np.testing.assert_array_equal(everything(loaded), before)
    path.unlink()
    np.testing.assert_array_equal(everything(loaded), before)
    view = loaded.view("raw")
    offset = loaded.byte_offset("raw")
    loaded.close()
    np.testing.assert_array_equal(view, before[offset : offset + 64])
    with pytest.raises(rlx.ClosedHandleError):
        loaded.view("raw")


def test_the_mapping_goes_with_the_last_view(arena, path):
    arena.save(path)
    loaded = Arena.load(path)
    view = loaded.view("raw")
    loaded.close()
    assert maps(path)
    del view, loaded
    assert not maps(path)


def test_loading_a_big_arena_takes_no_memory(tmp_path):
    must_run(
        f"""
import rlx_driver as rlx
MIB = 1 << 20

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

path = {str(tmp_path / "big.safetensors")!r}
with rlx.Arena(rlx.plan_memory([("x", 256 * MIB, 0, 1)])) as arena:
    arena.view("x")[:: 64 * MIB] = 5
    arena.save(path)
rlx.Arena.load(path).close()  # what is imported on the way is not meant
before = resident()
with rlx.Arena.load(path) as arena:
    assert arena.view("x")[64 * MIB] == 5
    assert resident() - before < 8 * MIB, resident() - before
    arena.view("x")[: 64 * MIB] = 1
    assert resident() - before > 60 * MIB, "the measure shows what is touched"
"""
    )


def test_reset_and_replan_work_on_a_mapped_arena(arena, path):
    arena.save(path)
    kept = path.read_bytes()
    with Arena.load(path) as loaded:
        place = loaded.address
        stale = loaded.buffer("a")
        loaded.reset()
        assert loaded.address == place
        assert not everything(loaded).any()
        with pytest.raises(rlx.StaleViewError):
            stale.numpy()
        loaded.replan(one_node(512, dtype="f32"))
        assert loaded.address == place
        loaded["x"] = np.ones(128, np.float32)
        loaded.replan(one_node(1 << 20))
        assert not is_mapped(loaded.address, path)
        assert not loaded.view("x").any()
        loaded.save(path)
        with Arena.load(path) as again:
            assert again.size_bytes == 1 << 20
    assert path.read_bytes() != kept


def test_a_mapped_arena_is_not_counted_as_allocated(arena, path):
    arena.save(path)
    before = rlx.memory_report("cpu")["cpu"].reserved
    with Arena.load(path) as loaded:
        assert rlx.memory_report("cpu")["cpu"].reserved == before
        assert loaded.size_bytes


# --- whole or not at all -------------------------------------------------------------------------


def fails_at(monkeypatch, name):
    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, broken)


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "progress"])
def test_a_failure_leaves_the_old_file_and_no_other(arena, path, monkeypatch, step):
    arena.save(path)
    kept = path.read_bytes()
    arena["b"] = np.zeros(256, np.float32)
    options = {}
    if step == "progress":

        def broken(done, total):
            if done:
                raise OSError(4, "interrupted")

        options = {"progress": broken}
    else:
        fails_at(monkeypatch, step)
    with pytest.raises(OSError):
        arena.save(path, **options)
    monkeypatch.undo()
    assert path.read_bytes() == kept
    assert names(path.parent) == [path.name]
    arena["b"] = np.ones(256, np.float32)  # nothing is held
    arena.save(path)
    assert path.read_bytes() != kept


def test_the_bytes_are_on_the_disk_before_they_take_the_name(arena, path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace

    def spied_sync(descriptor):
        calls.append(("sync", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def spied_replace(source, target):
        calls.append(("replace", Path(source).stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spied_sync)
    monkeypatch.setattr(os, "replace", spied_replace)
    arena.save(path)
    inode = path.stat().st_ino
    folder = path.parent.stat().st_ino
    assert calls == [("sync", inode), ("replace", inode), ("sync", folder)]


def test_a_short_write_is_continued(arena, path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, part: write(fd, part[:37]))
    arena.save(path)
    with Arena.load(path) as loaded:
        np.testing.assert_array_equal(everything(loaded), everything(arena))


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_file_has_the_mode_of_a_new_one(arena, path, mask):
    old = os.umask(mask)
    try:
        arena.save(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_symbolic_link_stays_and_its_file_is_replaced(arena, tmp_path):
    folder = tmp_path / "far"
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to(folder / "real.safetensors")
    arena.save(link)
    assert link.is_symlink()
    assert names(folder) == ["real.safetensors"]
    with Arena.load(link) as loaded:
        assert same_plan(loaded.plan, arena.plan)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_refused(arena, tmp_path, kind):
    target = tmp_path / "there"
    target.mkdir() if kind == "folder" else os.mkfifo(target)
    with pytest.raises(SnapshotError, match="no regular file"):
        arena.save(target)
    with pytest.raises(SnapshotError, match="no regular file"):
        Arena.load(target)
    assert names(tmp_path) == ["there"]


def test_a_missing_file_or_folder_says_so(arena, tmp_path):
    with pytest.raises(FileNotFoundError):
        Arena.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        arena.save(tmp_path / "none" / "a")


def test_names_of_any_length_and_kind_work(arena, tmp_path):
    for name in ("x" * 255, " \N{SNOWMAN}", os.fsdecode(b"\xff\xfe")):
        arena.save(tmp_path / name)
        with Arena.load(str(tmp_path / name)) as loaded:
            assert same_plan(loaded.plan, arena.plan)


def test_a_file_replaced_while_it_is_opened_is_opened_anew(arena, path, monkeypatch):
    arena.save(path)
    opened = safetensors.safe_open
    with Arena(one_node(128)) as other:

        def slow(*args, **kwargs):
            monkeypatch.undo()
            other.save(path)
            return opened(*args, **kwargs)

        monkeypatch.setattr(safetensors, "safe_open", slow)
        with Arena.load(path) as loaded:
            assert same_plan(loaded.plan, other.plan)


# --- order ---------------------------------------------------------------------------------------


def test_saving_waits_for_an_update_under_way(path):
    with Arena(one_node(4 * SIDE * SIDE, dtype="f32", shape=(SIDE, SIDE))) as arena:
        arena.view("x")[...] = 1

        def slow(x):
            for _ in range(20):
                x = (x @ x) * (1 / SIDE)
            return x + 1

        arena.buffer("x").update(slow, ordered=False)
        arena.save(path)
    with Arena.load(path) as loaded:
        assert (loaded.view("x") == 2).all()


def test_a_slot_first_used_while_saving_waits_is_waited_for_too(path, monkeypatch):
    plan = rlx.plan_memory(
        [Interval(node, 4 * SIDE * SIDE, 0, 1, dtype="f32", shape=(SIDE, SIDE)) for node in "xy"]
    )
    with Arena(plan) as arena:

        def slow(x):
            for _ in range(20):
                x = (x @ x) * (1 / SIDE)
            return x + 1

        arena.buffer("x")
        calls = []

        def late(writes, reads):
            acquire(writes, reads)
            if not calls:
                arena.buffer("y").update(slow, ordered=False)
            calls.append(len(reads))

        acquire = _snapshot_arena.acquire
        monkeypatch.setattr(_snapshot_arena, "acquire", late)
        arena.save(path)
        assert calls == [1, 2]
    with Arena.load(path) as loaded:
        assert (loaded.read("y") == 1).all()


def writer(arena):
    arena["b"] = np.zeros(256, np.float32)


def first_use(arena):
    arena.write("raw", np.zeros(64, np.uint8))


@pytest.mark.parametrize("change", [writer, first_use, Arena.reset])
def test_nobody_writes_through_the_driver_meanwhile(arena, path, small_chunks, change):
    arena.view("b")
    before = everything(arena)
    begun = []

    def during(done, total):
        if done and not begun:
            begun.append(start(change, arena))
            with pytest.raises(TimeoutError):
                begun[0].result(timeout=0.2)

    arena.save(path, progress=during)
    begun[0].result(timeout=60)
    with Arena.load(path) as loaded:
        np.testing.assert_array_equal(everything(loaded), before)


def test_saving_waits_for_a_writer_and_reads_what_he_wrote(arena, path):
    entered, leave = threading.Event(), threading.Event()

    def write():
        with arena.buffer("b").write("numpy") as view:
            entered.set()
            leave.wait(60)
            view[...] = 3
            arena.view("raw")[...] = 4  # a first use while the saver waits
        return True

    writing = start(write)
    assert entered.wait(60)
    saving = start(arena.save, path)
    with pytest.raises(TimeoutError):
        saving.result(timeout=0.1)
    leave.set()
    assert writing.result(timeout=60)
    saving.result(timeout=60)
    with Arena.load(path) as loaded:
        assert (loaded.read("b") == 3).all()
        assert (loaded.read("raw") == 4).all()


def test_readers_go_on_meanwhile(arena, path, small_chunks):
    seen = []

    def during(done, total):
        seen.append(in_thread(lambda: float(arena.buffer("w").numpy()[0, 0]) is not None))

    arena.buffer("w")
    arena.save(path, progress=during)
    assert all(seen)
    assert len(seen) == 1 + -(-arena.size_bytes // 100)


def test_resets_and_saves_of_two_threads_end(arena, path):
    def resets():
        for _ in range(50):
            arena.reset()
            arena["b"] = np.ones(256, np.float32)

    running = start(resets)
    for _ in range(10):
        arena.save(path)
    running.result(timeout=60)


def test_inside_a_write_scope_of_its_own_saving_is_an_error(arena, path):
    with arena.buffer("b").write("numpy"), pytest.raises(rlx.StaleViewError):
        arena.save(path)
    assert names(path.parent) == []
    with arena.buffer("b").read("numpy"):
        arena.save(path)


def test_a_closed_arena_is_not_saved(path):
    arena = Arena(small_plan())
    arena.close()
    with pytest.raises(rlx.ClosedHandleError):
        arena.save(path)
    assert names(path.parent) == []


# --- other memory --------------------------------------------------------------------------------


def test_memory_off_the_host_goes_by_chunks(path, small_chunks):
    with FakeDevice() as fake, Arena(small_plan(), fake.device) as arena:
        values = {node: pattern(arena.plan.interval(node).size, 7) for node in ("w", "b", "raw")}
        for node, raw in values.items():
            view = arena.read(node)
            arena.write(node, raw.view(view.dtype).reshape(view.shape))
        rlx.ledger.reset()
        arena.save(path)
        assert rlx.ledger.reasons["save"].bytes == arena.size_bytes
        reads = [entry for entry in fake.log if "read" in str(entry)]
        assert len(reads) >= arena.size_bytes // 100
        with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError):
            arena.save(path)
        for device in (fake.device, "cpu"):
            with Arena.load(path, device=device) as loaded:
                assert same_plan(loaded.plan, small_plan())
                for node, raw in values.items():
                    assert loaded.read(node).tobytes() == raw.tobytes()
        assert rlx.ledger.reasons["load"].bytes == arena.size_bytes


def test_off_the_host_saving_comes_after_work_of_other_streams(path):
    with FakeDevice(on_host_wait="release") as fake:
        plan = one_node(64, dtype="f32")
        with Arena(plan, fake.device) as arena:
            side = fake.stream("side")
            side.hold()
            with side, arena.buffer("x").write("fake") as inside:
                inside.fill_(3)
            arena.save(path)
        with Arena.load(path) as loaded:
            assert (loaded.read("x") == 3).all()
        with Arena.load(path, device=fake.device) as loaded:
            assert (np.asarray(loaded.buffer("x").array("fake_functional").read()) == 3).all()


def test_memory_without_views_comes_back_by_chunks(tpu, path, small_chunks):
    with Arena(small_plan(), tpu) as arena:
        values = {node: pattern(arena.plan.interval(node).size, 7) for node in ("w", "b", "raw")}
        for node, raw in values.items():
            arena.write(node, raw.view(arena.read(node).dtype).reshape(arena.read(node).shape))
        rlx.ledger.reset()
        arena.save(path)
        assert rlx.ledger.reasons["save"].bytes == arena.size_bytes
    for device in (tpu, "cpu"):
        with Arena.load(path, device=device) as loaded:
            assert same_plan(loaded.plan, small_plan())
            for node, raw in values.items():
                assert loaded.read(node).tobytes() == raw.tobytes()
            loaded.reset()
    assert rlx.ledger.reasons["load"].bytes == loaded.size_bytes


def test_a_debug_arena_is_saved_without_its_guards(path):
    with Arena(small_plan(), debug=True) as arena:
        arena["w"] = np.full((8, 8), 2, np.float32)
        arena["a"] = np.full((16, 16), 3, np.float32)
        arena["b"] = np.full(256, 4, np.float32)
        arena.save(path)
        assert arena.size_bytes != small_plan().size
    for options in ({}, {"debug": True}):
        with Arena.load(path, **options) as loaded:
            assert (loaded.read("w") == 2).all()
            assert (loaded.read("a") == 3).all()
            assert (loaded.read("b") == 4).all()
            if not options:
                assert same_plan(loaded.plan, small_plan())
            loaded.check()


def test_a_debug_arena_saves_what_is_alive(path):
    # Between the two that are pinned there is room for y, but not for y and a guard.
    plan = rlx.plan_memory(
        [
            Interval("x", 64, 0, 1, offset=0),
            ("y", 64, 2, 3),
            Interval("z", 64, 0, 3, offset=64),
        ]
    )
    assert plan.offset("x") == plan.offset("y")
    with Arena(plan, debug=True) as arena:
        assert arena.byte_offset("x") != arena.byte_offset("y")
        arena["x"] = np.full(64, 1, np.uint8)
        arena["y"] = np.full(64, 2, np.uint8)
        arena.save(path)  # nobody said a step: the earliest
        with Arena.load(path) as loaded:
            assert (loaded.read("x") == 1).all()
        with Arena.load(path, debug=True) as loaded:
            assert (loaded.read("x") == 1).all()
        for step, node, value in ((0, "x", 3), (2, "y", 4)):
            arena.advance(step)
            arena[node] = np.full(64, value, np.uint8)
            arena.save(path)
            with Arena.load(path) as loaded:
                assert (loaded.read(node) == value).all()


def test_a_debug_arena_is_looked_at_before_it_is_saved(path):
    with Arena(small_plan(), debug=True) as arena:
        view = arena.view("w")
        beyond = np.lib.stride_tricks.as_strided(view, (70,), (4,))
        beyond[66] = 1
        with pytest.raises(rlx.ArenaCorruptionError):
            arena.save(path)
    assert names(path.parent) == []


def test_a_debug_arena_planned_anew_saves_its_new_plan(path):
    with Arena(small_plan(), debug=True) as arena:
        arena.replan(one_node(100))
        arena["x"] = np.full(100, 9, np.uint8)
        arena.save(path)
    with Arena.load(path) as loaded:
        assert same_plan(loaded.plan, one_node(100))
        assert (loaded.read("x") == 9).all()


# --- progress, and what is missing ---------------------------------------------------------------


def test_progress_is_told_from_nothing_to_all(arena, path, small_chunks):
    for work in (
        lambda tell: arena.save(path, progress=tell),
        lambda tell: Arena.load(path, mmap=False, progress=tell).close(),
        lambda tell: Arena.load(path, progress=tell).close(),
        lambda tell: Arena.load(path, debug=True, progress=tell).close(),
    ):
        told = []
        work(lambda *both, told=told: told.append(both))
        done = [one for one, _ in told]
        assert done[0] == 0
        assert done[-1] == arena.size_bytes
        assert done == sorted(done)
        assert {total for _, total in told} == {arena.size_bytes}


def test_progress_draws_a_bar_when_asked(arena, path, capsys):
    arena.save(path, progress=True)
    assert "saving" in capsys.readouterr().out
    Arena.load(path, progress=True).close()
    assert "loading" in capsys.readouterr().out
    arena.save(path)
    arena.save(path, progress=False)
    assert capsys.readouterr().out == ""


def test_progress_of_another_kind_is_refused(arena, path):
    with pytest.raises(SnapshotError, match="progress is 3"):
        arena.save(path, progress=3)
    assert names(path.parent) == []


def test_a_failure_while_it_is_read_leaves_nothing(arena, path):
    arena.save(path)

    def broken(done, total):
        if done:
            raise KeyboardInterrupt

    with rlx.no_leaks(), pytest.raises(KeyboardInterrupt):
        Arena.load(path, mmap=False, progress=broken)


def test_without_the_libraries_their_names_and_the_remedy_are_given(tmp_path):
    must_run(
        f"""
import sys
import rlx_driver as rlx
assert not {{"safetensors", "rich"}} & set(sys.modules)

hidden = ()

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
arena, region = rlx.Arena(rlx.plan_memory([("x", 64, 0, 1)])), rlx.HandleRegion()
path = {str(tmp_path / "a")!r}
calls = [
    lambda **more: arena.save(path, **more), lambda **more: rlx.Arena.load(path, **more),
    lambda **more: region.save(path, **more), lambda **more: rlx.HandleRegion.load(path, **more),
    lambda **more: region.restore(path, **more),
]

def refused(call, name, **more):
    try:
        call(**more)
    except rlx.MissingPackageError as error:
        assert error.name == name and "rlx-driver[snapshots]" in str(error), error
    else:
        raise AssertionError("it did not raise")

hidden = ("safetensors",)
for call in calls:
    refused(call, "safetensors")
hidden = ("rich",)
refused(calls[0], "rich", progress=True)
refused(calls[2], "rich", progress=True)
arena.save(path)
rlx.Arena.load(path).close()
assert not {{"torch", "jax", "rich"}} & set(sys.modules)
"""
    )
