"""The report of memory: bytes by device, region and name; where they were made; leaks."""

import ast
import concurrent.futures
import gc
import inspect
import json
import threading
import weakref

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver._memory import Contents, Slot, makers, register
from rlx_driver.backends.accounting import Pool, accounting
from rlx_driver.backends.base import Backend
from rlx_driver.testing import FakeDevice
from support import must_run, needs, python

CPU = rlx.Device("cpu")
OWNERS = [None, pytest.param("jax", marks=needs("jax"))]


@pytest.fixture(autouse=True)
def collected():
    """What other tests left behind is not to go away in the middle of one of these."""
    gc.collect()


@pytest.fixture
def fake():
    # A kind of its own: what other tests have left behind is not counted here.
    with FakeDevice("opengl", memory_size=1 << 16) as device:
        rlx.reset_peak_memory(device.device)
        yield device


def reserved(device="cpu"):
    return rlx.memory_report(device)[device].reserved


def entry(name, device=None):
    (found,) = rlx.memory_report(device).find(name)
    return found


def region_of(name, device="cpu"):
    """The region that has an entry of a name."""
    regions = rlx.memory_report(device)[device].regions
    (found,) = [region for region in regions if name in {entry.name for entry in region.entries}]
    return found


def kinds(device):
    return {region.kind: region for region in rlx.memory_report(device)[device].regions}


def this_line():
    return inspect.currentframe().f_back.f_lineno


def in_threads(function, count):
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [each.result(timeout=60) for each in [pool.submit(function) for _ in range(count)]]


# --- bytes ---------------------------------------------------------------------------------------


def test_a_process_that_made_nothing_reports_nothing():
    code = "import rlx_driver as rlx; print(rlx.memory_report(), rlx.memory_report().as_dict())"
    assert must_run(code) == "the driver has allocated nothing {'devices': []}\n"


def test_a_device_without_memory_is_all_zeros():
    report = rlx.memory_report("fpga:7")
    assert report.devices == ()
    found = report["fpga:7"]
    assert (found.reserved, found.in_use, found.peak, found.allocations) == (0, 0, 0, 0)
    assert (found.device, found.regions, report.entries) == (rlx.Device("fpga:7"), (), ())


def test_a_device_that_is_none_is_refused():
    with pytest.raises(rlx.DeviceUnavailableError, match="banana"):
        rlx.memory_report("banana")
    with pytest.raises(rlx.DeviceUnavailableError, match="banana"):
        rlx.reset_peak_memory("banana")


def test_a_buffer_is_reserved_until_it_is_dropped(fake):
    before = rlx.memory_report("cpu")["cpu"]
    b = rlx.Buffer.zeros((4, 250), "f32")
    now = rlx.memory_report("cpu")["cpu"]
    assert now.reserved == before.reserved + 4000 == CPU.memory().in_use
    assert now.in_use == before.in_use + 4000
    assert now.allocations == before.allocations + 1
    (found,) = [e for e in rlx.memory_report("cpu").find("Buffer") if e.shape == (4, 250)]
    assert found == rlx.MemoryEntry("Buffer", (4, 250), rlx.dtype("f32"), 4000, 4000, "open")
    del b
    after = rlx.memory_report("cpu")["cpu"]
    assert (after.reserved, after.in_use) == (before.reserved, before.in_use)
    assert after.allocations == now.allocations


@pytest.mark.parametrize("owner", OWNERS)
def test_a_handle_takes_memory_at_its_first_use_and_gives_it_back_when_closed(owner):
    before = reserved()
    with rlx.HandleRegion("cpu", backend=owner) as region:
        h = rlx.BufferHandle("of its region", (5, 25), region=region)
        found = entry("of its region")
        assert (found.byte_size, found.reserved, found.state) == (500, 0, "not allocated")
        assert (region_of(h.name).in_use, reserved()) == (0, before)
        h.update(lambda x: x + 1, framework=owner or "numpy")
        found, its = entry("of its region"), region_of(h.name)
        assert (found.byte_size, found.reserved, found.state) == (500, 500, "open")
        assert (its.kind, its.reserved, its.in_use, its.peak) == ("region", 500, 500, 500)
        assert reserved() == before + 500
        assert ("jax" in its.label) == (owner == "jax")
        h.close()
        assert rlx.memory_report().find("of its region") == ()
        assert reserved() == before


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_view_outside_holds_the_memory_and_the_report_says_of_whom(owner, end):
    before = reserved()
    region = rlx.HandleRegion("cpu", backend=owner)
    h = rlx.BufferHandle("gone but held", (7, 10), region=region)
    view = h.numpy()
    if end == "close":
        h.close()
    del h, region
    gc.collect()
    found, its = entry("gone but held"), region_of("gone but held")
    assert found.state == "held by a view"
    assert (found.shape, found.byte_size, found.reserved) == ((7, 10), 280, 280)
    assert (its.reserved, its.in_use) == (280, 0)
    assert reserved() == before + 280
    assert "held by a view" in str(rlx.memory_report())
    del view
    assert rlx.memory_report().find("gone but held") == ()
    assert reserved() == before


def test_a_buffer_that_is_closed_or_dropped_under_a_view_is_listed_as_held(fake):
    place = fake.device
    closed, dropped = rlx.Buffer.zeros(3, "u8", place), rlx.Buffer.zeros(5, "u8", place)
    views = closed.array("fake"), dropped.array("fake")
    closed.close()
    del dropped
    found = rlx.memory_report(place)[place]
    assert (found.reserved, found.in_use) == (8, 0)
    (buffers,) = found.regions
    assert {(e.byte_size, e.state) for e in buffers.entries} == {
        (3, "held by a view"), (5, "held by a view"),
    }  # fmt: skip
    assert len(views) == 2
    del views
    assert reserved(place) == 0


def test_the_handles_of_one_allocation_are_listed_with_their_padding(fake):
    place = fake.device
    region = rlx.HandleRegion(place)
    made = region.create({"a": ((3,), "u8"), "b": ((300,), "u8"), "c": ((0,), "f32")})
    (its,) = rlx.memory_report(place)[place].regions
    assert (its.reserved, its.in_use, its.peak) == (256 + 512, 303, 768)
    assert [(e.name, e.byte_size, e.reserved, e.state) for e in its.entries] == [
        ("a", 3, 256, "open"), ("b", 300, 512, "open"), ("c", 0, 0, "open"),
    ]  # fmt: skip
    view = made["b"].array("fake")
    made["b"].close()
    (its,) = rlx.memory_report(place)[place].regions
    assert (its.reserved, its.in_use) == (768, 3)
    assert [e.name for e in its.entries] == ["a", "c"]
    region.close()
    (its,) = rlx.memory_report(place)[place].regions
    (found,) = its.entries
    assert (found.name, found.reserved, found.state) == ("a, b, c", 768, "held by a view")
    assert (found.shape, found.dtype) == (None, None)
    assert "a, b, c" in str(rlx.memory_report(place))
    del view
    made.clear()
    assert reserved(place) == 0


def test_regions_of_one_label_are_told_apart_and_lone_handles_are_together(fake):
    place = fake.device
    first, second = rlx.HandleRegion(place), rlx.HandleRegion(place)
    kept = [
        rlx.BufferHandle("x", 8, "u8", region=first),
        rlx.BufferHandle("x", 16, "u8", region=second),
        rlx.BufferHandle("x", 32, "u8", device=place),
        rlx.BufferHandle("y", 64, "u8", device=place),
    ]
    for handle in kept:
        handle.array("fake")
    found = rlx.memory_report(place)[place].regions
    assert [(r.kind, r.in_use) for r in found] == [("region", 8), ("region", 16), ("handles", 96)]
    assert sorted(e.byte_size for e in rlx.memory_report(place).find("x")) == [8, 16, 32]


def test_an_empty_region_is_listed_until_it_is_closed(fake):
    region = rlx.HandleRegion(fake.device)
    assert [r.kind for r in rlx.memory_report(fake.device)[fake.device].regions] == ["region"]
    region.close()
    assert rlx.memory_report(fake.device)[fake.device].regions == ()


def test_memory_of_others_is_listed_and_not_counted():
    before = rlx.memory_report("cpu")["cpu"]
    array = np.zeros((3, 37), np.float32)
    b = rlx.Buffer.from_array(array, copy=False)
    (found,) = [e for e in rlx.memory_report("cpu").find("Buffer") if e.shape == (3, 37)]
    assert (found.byte_size, found.reserved, found.state) == (444, 0, "shared")
    now = rlx.memory_report("cpu")["cpu"]
    assert (now.reserved, now.in_use) == (before.reserved, before.in_use)
    b.close()
    assert not [e for e in rlx.memory_report("cpu").find("Buffer") if e.shape == (3, 37)]


SOURCES = {
    "numpy": (lambda: np.ones((3, 41), np.float32), True),
    "numpy slice": (lambda: np.ones((3, 82), np.float32)[:, ::2], True),
    "numpy read-only": (lambda: np.broadcast_to(np.float32(1), (3, 41)), None),
    "buffer": (lambda: rlx.Buffer.zeros((3, 41)), True),
    "torch": (lambda: pytest.importorskip("torch").ones(3, 41), True),
    "jax": (lambda: pytest.importorskip("jax.numpy").ones((3, 41)), None),
    "jax, asked": (lambda: pytest.importorskip("jax.numpy").ones((3, 41)), True),
}


@pytest.mark.parametrize(("source", "copy"), SOURCES.values(), ids=SOURCES.keys())
def test_a_copy_belongs_to_the_driver_and_is_counted_until_its_last_view_is_gone(source, copy):
    x = source()
    before = reserved()
    b = rlx.Buffer.from_array(x, copy=copy)
    (found,) = [
        e
        for e in rlx.memory_report("cpu").find("Buffer")
        if e.shape == (3, 41) and e.reserved and e.byte_size == e.reserved and not e.created
    ][-1:]
    assert found.state == "open"
    assert reserved() == before + 492
    view = b[1].numpy()
    b.close()
    del b
    assert reserved() == before + 492
    del view
    assert reserved() == before


def test_from_bytes_and_copies_to_the_host_are_counted(fake):
    before = reserved()
    b = rlx.Buffer.from_bytes(bytes(96), (24,), "f32", fake.device)
    assert (reserved(fake.device), reserved()) == (96, before)
    host = b.to_host()
    assert reserved() == before + 96
    del b, host
    assert (reserved(fake.device), reserved()) == (0, before)


def test_copies_on_a_device_are_counted_and_shared_memory_is_not(fake):
    array = fake.array(np.zeros(6, np.uint8))
    shared = rlx.Buffer.from_array(array, copy=False)
    copied = rlx.Buffer.from_array(array, copy=True)
    found = kinds(fake.device)["buffers"]
    assert [(e.reserved, e.state) for e in found.entries] == [(0, "shared"), (6, "open")]
    assert (found.reserved, found.in_use) == (6, 6)
    part = copied[2:4].array("fake")
    del copied
    assert kinds(fake.device)["buffers"].in_use == 0
    assert reserved(fake.device) == 6
    del part
    assert reserved(fake.device) == 0
    assert shared.shape == (6,)


def test_slices_and_views_are_no_memory_of_their_own(fake):
    b = rlx.Buffer.zeros((4, 4), "f32", fake.device)
    parts = [b[1:3], b.view("u8"), b[0], *b]
    (found,) = kinds(fake.device)["buffers"].entries
    assert found.byte_size == 64
    del b
    gc.collect()
    (found,) = kinds(fake.device)["buffers"].entries
    assert found.state == "open", "the slices keep their base"
    parts.clear()
    assert reserved(fake.device) == 0


def test_only_the_device_that_was_asked_for_is_reported():
    with FakeDevice(count=2) as fake:
        first, second = fake.devices
        kept = [rlx.Buffer.zeros(8, "u8", first), rlx.Buffer.zeros(16, "u8", second)]
        assert [d.device for d in rlx.memory_report(second).devices] == [second]
        assert rlx.memory_report(str(second))[second].reserved == 16
        assert rlx.memory_report(second)[first].reserved == 0
        everywhere = [d.device for d in rlx.memory_report().devices]
        assert everywhere.index(CPU) == 0
        assert {first, second} < set(everywhere)
        assert len(kept) == 2


def test_a_failed_allocation_leaves_no_trace(fake):
    before = rlx.memory_report(fake.device)[fake.device]
    with pytest.raises(rlx.OutOfDeviceMemory):
        rlx.Buffer.zeros(1 << 20, "u8", fake.device)
    h = rlx.BufferHandle("too large", 1 << 20, "u8", device=fake.device)
    with pytest.raises(rlx.OutOfDeviceMemory):
        h.array("fake")
    assert entry("too large").state == "not allocated"
    region = rlx.HandleRegion(fake.device)
    first = rlx.BufferHandle("twice", 1, region=region)
    with pytest.raises(rlx.DuplicateError):
        rlx.BufferHandle("twice", 2, region=region)
    assert entry("twice").shape == first.shape == (1,)
    h.close()
    region.close()
    gc.collect()
    assert rlx.memory_report(fake.device)[fake.device] == before
    owner = rlx.Buffer.zeros(8, "u8", fake.device)
    (found,) = rlx.memory_report(fake.device).entries
    assert (found.name, found.reserved) == ("Buffer", 8), "what came after is not mistaken"
    del owner


# --- backends ------------------------------------------------------------------------------------


def test_what_a_backend_adds_outside_of_any_maker_is_listed_as_other():
    class Owner:
        pass

    place = rlx.Device("fpga:5")
    first, second = Owner(), Owner()
    accounting.add(place, 100, first)
    accounting.add(place, 20, second)
    found = rlx.memory_report(place)[place]
    assert (found.reserved, found.in_use, found.allocations) == (120, 0, 2)
    (other,) = found.regions
    assert (other.kind, other.reserved, other.peak) == ("other", 120, None)
    assert other.entries == (rlx.MemoryEntry("2 allocations", None, None, 120, 120, "open"),)
    assert "2 allocations" in str(rlx.memory_report(place))
    del first
    assert "one allocation" in str(rlx.memory_report(place))
    del second
    assert accounting.in_use(place) == 0


class Silent(Backend):
    """A backend that tells the driver nothing of what it allocates; all else is NumPy's."""

    name = "silent"
    packages = ()
    kinds = ("vulkan",)

    def __init__(self, allocations):
        self.host = rlx.Device("cpu").backend
        self.allocations = allocations

    def devices(self, kind):
        return [CPU]

    def allocate(self, device, nbytes):
        raws = [np.zeros(nbytes, np.uint8) for _ in range(self.allocations + 1)]
        for raw in raws[1:]:
            accounting.add(CPU, nbytes, raw)
        self.kept = raws[1:]
        return raws[0]

    def _of_host(name):
        def call(self, *args, **options):
            return getattr(self.host, name)(*args, **options)

        return call

    for _name in (
        "namespace", "owns", "facts", "memory", "view", "copy_in", "copy_out", "copy_across",
        "obstacle", "share", "duplicate", "order",
    ):  # fmt: skip
        locals()[_name] = _of_host(_name)


@pytest.mark.parametrize("allocations", [0, 1, 3])
def test_all_that_a_backend_adds_while_it_allocates_is_the_makers(allocations, monkeypatch):
    backend = Silent(allocations)
    monkeypatch.setattr(rlx.Device, "backend", property(lambda _: backend))
    before = reserved()
    b = rlx.Buffer.zeros((3, 43), "u8")
    (found,) = [e for e in rlx.memory_report("cpu").find("Buffer") if e.shape == (3, 43)]
    assert (found.byte_size, found.reserved, found.state) == (129, 129 * allocations, "open")
    assert reserved() == before + 129 * allocations
    del b
    held = [e for e in rlx.memory_report("cpu").entries if e.shape == (3, 43)]
    assert [e.state for e in held] == ["held by a view"] * allocations
    backend.kept.clear()
    assert reserved() == before


def test_the_record_of_one_thread_is_not_that_of_another():
    together = threading.Barrier(4, timeout=60)

    class Owner:
        pass

    def one():
        def make():
            together.wait()
            owner = Owner()
            mine = accounting.add(CPU, 1, owner)
            together.wait()
            return owner, mine

        (owner, mine), made = accounting.record(make)
        assert mine() is owner
        return made == [mine]

    assert in_threads(one, 4) == [True] * 4


def test_records_nest_and_end_with_an_error():
    class Owner:
        pass

    kept = [Owner() for _ in range(4)]

    def inner():
        return accounting.add(CPU, 2, kept[1])

    def outer():
        first = accounting.add(CPU, 1, kept[0])
        second, made = accounting.record(inner)
        assert made == [second]
        with pytest.raises(ZeroDivisionError):
            accounting.record(lambda: 1 / 0)
        return [first, accounting.add(CPU, 3, kept[2])]

    result, made = accounting.record(outer)
    assert made == result
    accounting.add(CPU, 4, kept[3])
    assert len(made) == 2


# --- peaks ---------------------------------------------------------------------------------------


def test_the_peak_is_the_most_at_a_time_and_can_begin_anew(fake):
    place = fake.device
    for _ in range(3):
        rlx.Buffer.zeros(1000, "u8", place)
    kept = rlx.Buffer.zeros(10, "u8", place)
    found = rlx.memory_report(place)[place]
    assert (found.reserved, found.peak, found.regions[0].peak) == (10, 1000, 1000)
    elsewhere = rlx.memory_report("cpu")["cpu"].peak
    rlx.reset_peak_memory(place)
    found = rlx.memory_report(place)[place]
    assert (found.peak, found.regions[0].peak) == (10, 10)
    assert rlx.memory_report("cpu")["cpu"].peak == elsewhere
    more = rlx.Buffer.zeros(100, "u8", place)
    del more
    assert rlx.memory_report(place)[place].peak == 110
    rlx.reset_peak_memory()
    assert rlx.memory_report(place)[place].peak == 10
    assert rlx.memory_report("cpu")["cpu"].peak == reserved()
    del kept
    rlx.reset_peak_memory(place)  # of nothing
    assert rlx.memory_report(place)[place].peak == 0
    more = rlx.Buffer.zeros(1, "u8", place)
    assert kinds(place)["buffers"].peak == more.byte_size


def test_a_region_has_a_peak_of_its_own(fake):
    region = rlx.HandleRegion(fake.device)
    with rlx.BufferHandle("a", 100, "u8", region=region) as a:
        a.array("fake")
    b = rlx.BufferHandle("b", 30, "u8", region=region)
    b.array("fake")
    aside = rlx.Buffer.zeros(500, "u8", fake.device)
    assert (region_of("b", fake.device).reserved, region_of("b", fake.device).peak) == (30, 100)
    del aside


def test_the_peak_of_many_threads_is_exact():
    place = rlx.Device("fpga:4")
    together = threading.Barrier(8, timeout=60)

    class Owner:
        pass

    def one():
        kept = [Owner() for _ in range(50)]
        for owner in kept:
            accounting.add(place, 3, owner)
        together.wait()  # all have all
        del owner
        kept.clear()
        together.wait()  # nobody has any
        for _ in range(200):
            accounting.add(place, 1, Owner())
        return len(kept)

    in_threads(one, 8)
    found = rlx.memory_report(place)[place]
    assert (found.reserved, found.peak, found.allocations) == (0, 8 * 50 * 3, 8 * 250)


def test_threads_that_allocate_and_report_at_once_count_right(fake):
    place = fake.device
    before = rlx.memory_report(place)[place].allocations

    def one():
        for _ in range(30):
            kept = [rlx.Buffer.zeros(16, "u8", place) for _ in range(3)]
            found = rlx.memory_report(place)[place]
            assert found.reserved >= 48
            assert found.peak >= found.reserved
            kept.clear()

    in_threads(one, 4)
    gc.collect()
    found = rlx.memory_report(place)[place]
    assert (found.reserved, found.allocations - before) == (0, 4 * 30 * 3)
    assert 48 <= found.peak <= 2 * 4 * 48, "reports hold some for a moment"


def test_garbage_that_uses_the_driver_when_it_is_collected_locks_nothing_up():
    place = rlx.Device("fpga:6")
    reports = []

    class Owner:
        pass

    class Node:
        def __init__(self):
            self.me = self
            self.owner = Owner()
            accounting.add(place, 1, self.owner)

        def __del__(self):
            owner = Owner()
            accounting.add(place, 1, owner)
            reports.append(rlx.memory_report(place)[place].reserved)

    def churn():
        for _ in range(300):
            Node()
            rlx.memory_report(place)
            accounting.settle()

    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        in_threads(churn, 2)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    found = rlx.memory_report(place)[place]
    assert (len(reports), found.reserved, found.allocations) == (600, 0, 1200)


def test_events_do_not_pile_up_when_nobody_looks():
    class Owner:
        pass

    place = rlx.Device("fpga:3")
    for _ in range(10_000):
        accounting.add(place, 1, Owner())
    assert len(accounting.events) < 5000
    assert accounting.in_use(place) == 0


# --- tracing -------------------------------------------------------------------------------------


def make_one():
    return rlx.BufferHandle("traced", 4), this_line()


def test_tracing_tells_the_file_the_line_and_the_callers():
    with rlx.trace_memory():
        h, line = make_one()
        called = this_line() - 1
    found = entry("traced")
    assert found.created == f"{__file__}:{line} in make_one"
    assert found.stack[-1] == found.created
    assert found.stack[-2] == f"{__file__}:{called} in {inspect.currentframe().f_code.co_name}"
    assert len(found.stack) <= 4
    assert found.created in str(rlx.memory_report())
    assert not [frame for frame in found.stack if "/rlx_driver/" in frame]
    h.close()


MAKERS = {
    "zeros": lambda: rlx.Buffer.zeros((3, 47)),
    "empty": lambda: rlx.Buffer.empty((3, 47)),
    "from_array": lambda: rlx.Buffer.from_array(np.zeros((3, 47), np.float32)),
    "from_bytes": lambda: rlx.Buffer.from_bytes(bytes(564), (3, 47), "f32"),
    "to_host": lambda: rlx.Buffer.zeros((3, 47)).to_host(),
    "handle": lambda: rlx.BufferHandle("h", (3, 47)),
    "create": lambda: rlx.HandleRegion().create({"h": ((3, 47), "f32")}),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_every_way_to_make_memory_is_traced_and_none_is_when_off(make):
    untraced = make()
    with rlx.trace_memory(), rlx.trace_memory():
        pass
    with rlx.trace_memory():
        with rlx.trace_memory():
            pass
        traced = make()
    found = [e for e in rlx.memory_report().entries if e.shape == (3, 47)]
    assert [e.created is None for e in found] == [True, False]
    assert found[1].created.startswith(f"{__file__}:{make.__code__.co_firstlineno} in ")
    del untraced, traced


def test_what_is_held_by_a_view_still_tells_where_it_was_made(fake):
    with rlx.trace_memory():
        b, line = rlx.Buffer.zeros(4, "u8", fake.device), this_line()
    view = b.array("fake")
    del b
    (found,) = rlx.memory_report(fake.device).entries
    assert (found.state, f":{line} in " in found.created) == ("held by a view", True)
    del view


def test_regions_tell_where_they_were_made(fake):
    with rlx.trace_memory():
        region, line = rlx.HandleRegion(fake.device), this_line()
    assert f":{line} in " in kinds(fake.device)["region"].created
    assert f":{line} in " in str(rlx.memory_report(fake.device))
    region.close()


def test_the_environment_traces_the_whole_process():
    code = (
        "import rlx_driver as rlx\n"
        "h = rlx.BufferHandle('h', 4)\n"
        "print([e.created for e in rlx.memory_report().entries])"
    )
    assert ast.literal_eval(must_run(code, RLX_TRACE_MEMORY="1")) == ["<string>:2 in <module>"]
    for off in ("0", ""):
        assert ast.literal_eval(must_run(code, RLX_TRACE_MEMORY=off)) == [None]


def test_tracing_ends_with_an_error_in_the_block():
    with pytest.raises(ZeroDivisionError), rlx.trace_memory():
        1 / 0  # noqa: B018
    h = rlx.BufferHandle("untraced", 4)
    assert entry("untraced").created is None
    h.close()


def test_other_threads_are_traced_too():
    with rlx.trace_memory():
        (h,) = in_threads(lambda: rlx.BufferHandle("elsewhere", 4), 1)
    assert "<lambda>" in entry("elsewhere").created
    h.close()


# --- leaks ---------------------------------------------------------------------------------------


def test_what_was_closed_or_dropped_is_no_leak():
    with rlx.no_leaks():
        rlx.Buffer.zeros(4)
        b = rlx.Buffer.zeros(4)
        b.close()
        with rlx.BufferHandle("h", 4) as h, rlx.HandleRegion() as region:
            h.numpy()[0] = 1
            region.create({"a": (4, "f32"), "b": (4, "f32")})["a"].numpy()
        dropped = rlx.BufferHandle("dropped", 4)
        dropped.numpy()
        del dropped
        left = rlx.HandleRegion()
        left.create({"a": (4, "f32")})  # in a cycle with its handles
        del left
        view = rlx.Buffer.zeros(4).numpy()
    assert view.shape == (4,)


LEAKS = {
    "buffer": (lambda: rlx.Buffer.zeros((2, 3)), "Buffer float32[2, 3] on cpu, 24 bytes"),
    "shared": (
        lambda: rlx.Buffer.from_array(np.zeros(3, np.int8), copy=False),
        "Buffer int8[3] on cpu, 3 bytes",
    ),
    "slice": (lambda: rlx.Buffer.zeros((2, 3))[0], "Buffer float32[2, 3] on cpu, 24 bytes"),
    "handle": (lambda: rlx.BufferHandle("kv", 4), "handle 'kv' float32[4] on cpu, 16 bytes, not"),
    "region": (rlx.HandleRegion, "region on cpu, 0 bytes"),
    "in a region": (
        lambda: rlx.HandleRegion().create({"w": (5, "bf16")}),
        "handle 'w' bfloat16[5] on cpu, 10 bytes\n",
    ),
}


@pytest.mark.parametrize(("make", "text"), LEAKS.values(), ids=LEAKS.keys())
def test_what_is_open_and_held_is_a_leak_and_the_text_says_where_it_was_made(make, text):
    kept = []
    with pytest.raises(rlx.LeakError) as caught, rlx.no_leaks():
        kept.append(make())
    said = str(caught.value)
    assert isinstance(caught.value, AssertionError)
    assert text in said
    assert "Call close()" in said
    assert __file__ in said
    assert "kept.append(make())" in said
    kept.clear()


def test_all_leaks_are_counted_and_the_first_are_listed():
    kept = []
    with pytest.raises(rlx.LeakError) as caught, rlx.no_leaks():
        kept += [rlx.BufferHandle(f"h{i}", 4) for i in range(25)]
    said = str(caught.value)
    assert said.startswith("25 leaks: ")
    assert "'h19'" in said
    assert "'h20'" not in said
    assert said.endswith("\nand 5 more")


def test_what_was_made_before_the_block_is_none_of_its_leaks():
    before = rlx.BufferHandle("before", 4)
    with rlx.no_leaks():
        before.numpy()[0] = 1  # its memory comes inside the block
        before[1:2].numpy()
    before.close()


def test_blocks_nest_and_each_answers_for_what_is_made_inside_of_it():
    kept = []

    def body():
        kept.append(rlx.BufferHandle("outer", 4))
        with pytest.raises(rlx.LeakError, match="'inner'") as first, rlx.no_leaks():
            kept.append(rlx.BufferHandle("inner", 4))
        assert "'outer'" not in str(first.value)
        with rlx.no_leaks():
            pass

    with pytest.raises(rlx.LeakError, match="'outer'") as caught, rlx.no_leaks():
        body()
    assert str(caught.value).startswith("2 leaks")
    with rlx.no_leaks():
        pass
    kept.clear()


def test_an_error_in_the_block_is_left_alone():
    kept = []

    def body():
        kept.append(rlx.Buffer.zeros(4))
        1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError) as caught, rlx.no_leaks():
        body()
    assert not hasattr(caught.value, "__notes__")
    h = rlx.BufferHandle("after", 4)
    assert entry("after").created is None, "tracing has ended"
    h.close()


def test_it_answers_for_all_threads():
    kept = []
    with pytest.raises(rlx.LeakError, match="'theirs'"), rlx.no_leaks():
        in_threads(lambda: kept.append(rlx.BufferHandle("theirs", 4)), 1)
    kept.clear()


def test_it_can_decorate_a_test_more_than_once():
    kept = []

    @rlx.no_leaks()
    def leaks(count):
        kept.extend(rlx.Buffer.zeros(4) for _ in range(count))

    leaks(0)
    for _ in range(2):
        with pytest.raises(rlx.LeakError, match="one leak"):
            leaks(1)
    kept.clear()


def test_leaks_of_a_device_out_of_reach(fake):
    with pytest.raises(rlx.LeakError) as caught, rlx.no_leaks():
        b = rlx.Buffer.zeros(4, "u8", fake.device)
    assert f"Buffer uint8[4] on {fake.device}, 4 bytes" in str(caught.value)
    b.close()


# --- makers of any kind --------------------------------------------------------------------------


class Room:
    """Stands for an arena."""

    size_bytes = 96
    is_closed = False

    def contents(self):
        slots = [Slot("x", (4, 4), np.dtype("f4"), 64), Slot("y", (8,), np.dtype("f4"), 32)]
        return Contents(96, slots)


def test_an_arena_registers_itself_with_its_slots(fake):
    place = fake.device
    room = Room()
    memory, made = accounting.record(place.backend.allocate, place, 128)
    pool = Pool("arena", "arena 'a'", place)
    maker = register(room, "arena", "arena 'a'", pool, made=made, contents=Room.contents)
    found = kinds(place)["arena"]
    assert (found.label, found.reserved, found.in_use) == ("arena 'a'", 128, 96)
    assert [(e.name, e.byte_size, e.state) for e in found.entries] == [
        ("x", 64, "slot"), ("y", 32, "slot"),
    ]  # fmt: skip
    more, made = accounting.record(place.backend.allocate, place, 32)
    maker.claim(made)
    assert kinds(place)["arena"].reserved == 160
    room.is_closed = True
    del more
    found = kinds(place)["arena"]
    assert (found.reserved, found.in_use, found.peak) == (128, 0, 160)
    assert [(e.name, e.state) for e in found.entries] == [("arena 'a'", "held by a view")]
    del memory
    assert "arena" not in kinds(place)


def test_an_open_arena_is_a_leak(fake):
    room = Room()
    pool = Pool("arena", "arena 'b'", fake.device)
    text = f"arena 'b' on {fake.device}, 96 bytes"
    with pytest.raises(rlx.LeakError, match=text), rlx.no_leaks():
        register(room, "arena", pool.label, pool)
    assert kinds(fake.device)["arena"].in_use == 96
    del room


def test_nothing_is_kept_alive_by_the_report():
    b = rlx.Buffer.zeros(1000)
    h = rlx.BufferHandle("h", 1000)
    h.numpy()
    gone = [weakref.ref(b), weakref.ref(h), weakref.ref(h.region)]
    count = len(makers())
    report = rlx.memory_report()
    del b, h
    assert [each() for each in gone] == [None] * 3
    assert len(makers()) == count - 2
    assert report.find("h")


# --- its forms -----------------------------------------------------------------------------------


def test_the_report_as_text_and_as_plain_values(fake):
    region = rlx.HandleRegion(fake.device)
    made = region.create({"cache": ((2, 4), "bf16"), "sum": ((), "f64")})
    report = rlx.memory_report(fake.device)
    assert str(report).splitlines() == [
        "opengl:0: 512 bytes reserved, 24 in use, peak 512, "
        f"{report['opengl:0'].allocations:,} allocations",
        "  region on opengl:0: 512 bytes reserved, 24 in use, peak 512",
        "    cache  bfloat16[2, 4]  16  open",
        "    sum    float64[]        8  open",
    ]
    plain = json.loads(json.dumps(report.as_dict()))
    (device,) = plain["devices"]
    assert (device["device"], device["reserved"], device["in_use"]) == ("opengl:0", 512, 24)
    assert device["regions"][0]["entries"][0] == {
        "name": "cache", "shape": [2, 4], "dtype": "bfloat16", "byte_size": 16, "reserved": 256,
        "state": "open", "created": None, "stack": [],
    }  # fmt: skip
    assert len(made) == 2
    region.close()


def test_the_text_has_the_largest_entries_and_the_report_all(fake):
    kept = [rlx.BufferHandle(f"h{n:02}", n + 1, "u8", device=fake.device) for n in range(25)]
    report = rlx.memory_report(fake.device)
    text = str(report)
    assert "h24" in text
    assert "h05" in text
    assert "h04" not in text
    assert text.endswith("and 5 more, 15 bytes")
    assert len(report.entries) == 25
    kept.clear()


def test_nothing_of_it_complains_at_the_end_of_a_process():
    code = """
import rlx_driver as rlx
kept = rlx.Buffer.zeros(4), rlx.BufferHandle("h", 4), rlx.HandleRegion()
view = kept[1].numpy()
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
