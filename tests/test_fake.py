"""The fake device: it keeps the contract of a backend, holds work, and fails when asked to."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

import rlx_driver as rlx
import test_backend_contract as contract
from rlx_driver.registry import registry
from rlx_driver.testing import (
    FakeArray,
    FakeDevice,
    FakeError,
    FakeEvent,
    FunctionalArray,
    HangError,
)
from support import must_run
from test_imports import HIDE

NATIVE, FUNCTIONAL = "fake", "fake_functional"


@pytest.fixture
def fake():
    with FakeDevice() as fake:
        yield fake


@pytest.fixture
def stream(fake):
    return fake.stream("mine")


@pytest.fixture
def buffer(fake):
    return rlx.Buffer.zeros(4, "f32", fake.device)


def labels(fake):
    return [entry.label for entry in fake.log if entry.kind == "work"]


def plus_one(x):
    return x + 1


# --- the contract of a backend, by the tests of the others ---------------------------------------

_OTHERWISE = {
    "test_it_says_who_it_is",  # names that are built in
    "test_share_takes_memory_of_the_others",  # none of it is on this device
}
globals().update({name: test for name, test in vars(contract).items() if name.startswith("test_")})
for _name in _OTHERWISE:
    del globals()[_name]


@pytest.fixture(params=[NATIVE, FUNCTIONAL])
def backend(request, monkeypatch):
    monkeypatch.setattr(contract, "address", lambda x: registry.for_array(x).facts(x).address)
    monkeypatch.setattr(
        contract, "read_bytes", lambda x: registry.for_array(x).copy_out(x).tobytes()
    )
    with FakeDevice("vulkan", memory_size=1 << 30):
        yield registry.get(request.param)


@pytest.fixture
def device(backend):
    return backend.devices("vulkan")[0]


typed = contract.typed


def test_they_say_who_they_are(fake):
    for name, functional in ((NATIVE, False), (FUNCTIONAL, True)):
        backend = registry.get(name)
        assert (backend.name, backend.functional) == (name, functional)
        assert backend.devices("fpga") == [fake.device]
        assert backend.devices("cpu") == []
        assert hasattr(backend.namespace(), "from_dlpack")
    assert fake.device.backend is registry.get(NATIVE)


# --- an address space of its own -----------------------------------------------------------------


def test_host_code_does_not_reach_the_bytes(fake, buffer):
    host = np.zeros(4)
    for array in (buffer.array(NATIVE), buffer.array(FUNCTIONAL)):
        for reach in (np.asarray, np.from_dlpack, memoryview, list, bool):
            with pytest.raises((BufferError, TypeError)):
                reach(array)
        with pytest.raises(BufferError, match=r"read\(\)"):
            np.asarray(array)
    assert abs(buffer.address - host.ctypes.data) > 1 << 40
    for reach in (buffer.numpy, buffer.host_bytes, lambda: np.asarray(buffer)):
        with pytest.raises(rlx.DeviceUnavailableError, match="to_host"):
            reach()


def test_arrays_are_exchanged_on_the_device_and_copied_elsewhere(fake, buffer):
    view = buffer.array(NATIVE)
    view.fill_(3)
    shared = rlx.exchange(view, FUNCTIONAL, copy=False)
    assert isinstance(shared, FunctionalArray)
    assert shared.read().tolist() == [3, 3, 3, 3]
    back = rlx.exchange(shared, NATIVE, copy=False)
    assert isinstance(back, FakeArray)
    assert back.address == view.address == buffer.address
    assert rlx.exchange(view, "numpy").tolist() == [3, 3, 3, 3]
    for array, framework in ((view, "numpy"), (np.zeros(4), NATIVE), (np.zeros(4), FUNCTIONAL)):
        assert not rlx.explain(array, framework)
        with pytest.raises(rlx.ZeroCopyError):
            rlx.exchange(array, framework, copy=False)


def test_a_buffer_says_how_it_is_ordered(fake, buffer):
    assert "shared stream" in str(rlx.explain(buffer, FUNCTIONAL))


def test_every_framework_sees_one_memory(fake, buffer):
    buffer.copy_from(np.arange(4, dtype=np.float32))
    buffer.update(plus_one, framework=FUNCTIONAL)
    buffer.update(lambda view: view * 2, framework=NATIVE)
    buffer[1:3] = 0
    buffer[3:].update(plus_one, framework=FUNCTIONAL)
    assert buffer.array(NATIVE).read().tolist() == [2, 0, 0, 9]
    assert buffer.array(FUNCTIONAL).read().tolist() == [2, 0, 0, 9]
    assert buffer.to_host().numpy().tolist() == [2, 0, 0, 9]
    assert buffer.view("u8").array(NATIVE).shape == (16,)
    assert buffer.array(NATIVE).address == buffer.address == buffer._leases[FUNCTIONAL].address


def test_arithmetic_of_the_native_framework(fake):
    x = fake.array(np.arange(6, dtype=np.float32).reshape(2, 3))
    y = (x + 1) * x
    assert y.read().tolist() == [[0, 2, 6], [12, 20, 30]]
    assert x.T[1].sum().item() == 5
    x[0] = y[1]
    x[1, :2].mul_(10).add_(y[0, 1:])
    assert x.clone().read().tolist() == [[12, 20, 30], [32, 46, 5]]
    assert x.fill_(2).reshape((6,)).read().tolist() == [2] * 6
    with pytest.raises(ValueError):
        x.copy_(fake.array(np.zeros(4)))
    with pytest.raises((AttributeError, ValueError)):
        x.T.reshape((6,))


def test_arithmetic_of_the_functional_framework(fake):
    x = fake.functional(np.arange(4, dtype=np.float32))
    assert ((x + 1) * x).read().tolist() == [0, 2, 6, 12]
    assert x[1:3].sum().item() == 3
    assert x.ndim == 1
    pair = fake.jit(lambda tree: {"sum": tree["a"] + tree["b"], "none": None})({"a": x, "b": 2.0})
    assert pair["sum"].read().tolist() == [2, 3, 4, 5]
    assert pair["none"] is None


# --- streams -------------------------------------------------------------------------------------


def test_work_runs_at_once_where_nothing_is_held(fake):
    x = fake.array(np.zeros(2))
    x.add_(1)
    assert labels(fake) == ["copy_", "add_"]
    assert x.read().tolist() == [1, 1]
    assert fake.host_waits == []


def test_a_held_stream_runs_its_work_in_order_when_it_is_released(fake, stream):
    stream.hold()
    with stream:
        x = fake.array(np.ones(2))
        x.add_(1).mul_(10)
    fake.array(np.zeros(1))
    assert stream.is_held
    assert stream.pending == ("copy_", "add_", "mul_")
    fake.run()
    assert fake.work == ["default: copy_"]
    stream.release()
    assert not stream.is_held
    assert fake.work == ["default: copy_", "mine: copy_", "mine: add_", "mine: mul_"]
    assert x.read().tolist() == [20, 20]


def test_work_is_released_by_the_piece(fake, stream):
    stream.hold()
    with stream:
        x = fake.array(np.ones(2))
        first = stream.record_event()
        x.add_(1)
        second = stream.record_event()
        x.mul_(10)
    assert not first.query()
    stream.release(1)
    assert first.query(), "what follows a piece of work directly is passed with it"
    assert not second.query()
    assert stream.pending == ("add_", "mul_")
    stream.release(5)
    assert stream.pending == ()
    assert stream.is_held
    with stream:
        x.add_(1).add_(1).add_(1).add_(1)
    assert stream.pending == ("add_",), "three were left"
    stream.release()
    assert x.read().tolist() == [24, 24]


def test_an_event_on_a_held_stream_is_not_reached_though_nothing_is_before_it(fake, stream):
    stream.hold()
    event = stream.record_event()
    assert not event.query()
    assert "not reached" in repr(event)
    stream.release()
    assert event.query()


def test_a_stream_waits_for_an_event_and_for_nothing_later(fake, stream):
    other = fake.stream("other")
    x, y = fake.array(np.zeros(1)), fake.array(np.zeros(1))
    event = FakeEvent("halfway")
    stream.wait_event(event)  # was never recorded, so there is nothing to wait for
    other.hold()
    with other:
        x.add_(1)
        event.record(other)
        x.add_(1)
    stream.wait_event(event)
    event.record(other)  # anew, which changes nothing for the wait above
    with stream:
        y.copy_(x)
    assert stream.pending == ("copy_",)
    other.release(1)
    assert y.read().tolist() == [1]
    assert fake.events == ["other: record halfway", "mine: wait halfway"]
    assert not event.query()
    other.release()
    assert event.query()


def test_a_stream_waits_for_all_of_another(fake, stream):
    other = fake.stream("other")
    other.hold()
    with other:
        x = fake.array(np.ones(1))
    stream.wait_stream(other)
    with stream:
        x.add_(1)
    assert not stream.query()
    other.release()
    assert stream.query()
    assert x.read().tolist() == [2]


def test_the_host_does_not_wait_for_ever(fake, stream):
    other = fake.stream("other")
    stream.hold()
    with stream:
        x = fake.array(np.ones(1))
        event = stream.record_event(FakeEvent("the end"))
    other.wait_event(event)
    with other:
        y = x + 1
        with pytest.raises(HangError, match=r"'mine'.* is held") as caught:
            y.read()
    assert "stream 'other' of fpga:0, which waits for stream 'mine'" in str(caught.value)
    assert "copy_" in str(caught.value)
    with pytest.raises(HangError, match="waits for the end on stream 'mine'"):
        event.synchronize()
    assert not issubclass(HangError, Exception), "nobody takes it for a failure of the work"
    assert fake.host_waits == [
        "host waits on other for all of 'other'",
        "host waits on mine for the end",
    ]
    stream.release()
    event.synchronize()
    with other:
        assert y.read().tolist() == [2]
    assert len(fake.host_waits) == 2


def test_work_of_ones_own_runs_on_the_current_stream(fake, stream):
    def swap(first, second):
        first[...], second[...] = second.copy(), first.copy()

    x, y = fake.array(np.zeros(2)), fake.array(np.ones(2))
    stream.hold()
    with stream:
        fake.launch(swap, x, y)
    assert stream.pending == ("swap",)
    assert x.read().tolist() == [0, 0]
    stream.release()
    assert (x.read().tolist(), y.read().tolist()) == ([1, 1], [0, 0])
    fake.on_host_wait = "release"
    with pytest.raises(HangError, match="runs the very work that waits"):
        fake.launch(x.read)


def test_a_host_wait_may_release_just_what_it_waits_for(fake, stream):
    other = fake.stream("other")
    fake.on_host_wait = "release"
    fake.hold()
    with other:
        x = fake.array(np.ones(1))
        x.add_(1)
        event = other.record_event()
        x.add_(5)
    stream.wait_event(event)
    with stream:
        assert (x * 2).read().tolist() == [4]
        fake.array(np.zeros(1))
    assert other.pending == ("add_",)
    assert stream.pending == ("copy_",)
    assert fake.stream("made later").is_held
    fake.release()
    assert not other.pending
    assert not fake.stream("made later still").is_held


def test_each_thread_has_a_current_stream(fake, stream):
    def work():
        fake.array(np.zeros(1))

    with stream:
        work()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with fake.stream("inner"):
            work()
        work()
    assert [entry.stream for entry in fake.log] == ["mine", "default", "inner", "mine"]


def test_events_tell_how_many_pieces_of_work_lie_between_them(fake, stream):
    start, end = FakeEvent(), FakeEvent()
    with pytest.raises(RuntimeError, match="recorded"):
        start.elapsed_time(end)
    start.record(stream)
    with stream:
        fake.array(np.zeros(1)).add_(1).add_(1)
    end.record(stream)
    assert start.elapsed_time(end) == 3


def test_there_may_be_several_devices():
    with FakeDevice(count=2, memory_size=4096) as fake:
        first, second = fake.devices
        assert rlx.available_devices()[-2:] == [first, second]
        fake.stream(device=first).hold()
        a = rlx.Buffer.zeros(4, "f32", first)
        b = rlx.Buffer.zeros(4, "f32", second)
        b.array(NATIVE).fill_(7)
        assert b.to_host().numpy().tolist() == [7] * 4
        a.copy_from(b, blocking=False)
        b.array(NATIVE).fill_(9)
        assert fake.stream(device=second).pending == ("fill_",), "it waits for the copy"
        fake.stream(device=first).release()
        assert a.to_host().numpy().tolist() == [7] * 4
        assert b.to(first).to_host().numpy().tolist() == [9] * 4
        assert first.memory().in_use == second.memory().in_use == 16
        with pytest.raises(ValueError, match="one device"):
            fake.jit(lambda x, y: x)(a.array(FUNCTIONAL), b.array(FUNCTIONAL))
        with pytest.raises(ValueError, match="two devices"):
            a.array(NATIVE).add_(b.array(NATIVE))


# --- the functional framework --------------------------------------------------------------------


def test_results_are_pending_until_their_stream_has_run(fake, buffer):
    compute = fake.stream("compute")
    compute.hold()
    result = fake.jit(plus_one)(buffer.array(FUNCTIONAL))
    assert not result.is_ready()
    assert "pending" in repr(result)
    with pytest.raises(HangError, match="the result of 'plus_one' on stream 'compute'"):
        result.block_until_ready()
    with pytest.raises(HangError, match=r"copies.*which waits for stream 'compute'"):
        result.read()
    compute.release()
    assert result.is_ready()
    assert result.read().tolist() == [1, 1, 1, 1]


def test_donation_stays_in_place_and_the_array_is_dead(fake, buffer):
    backend = registry.get(FUNCTIONAL)
    array = buffer.array(FUNCTIONAL)
    result = fake.jit(plus_one, donate_argnums=[0])(array)
    assert backend.address(result) == buffer.address
    assert array.is_deleted()
    assert "dead" in repr(array)
    for use in (array.read, array.is_ready, array.block_until_ready, array.fetch, array.sum):
        with pytest.raises(RuntimeError, match="donated or deleted"):
            use()
    with pytest.raises(RuntimeError, match="donated or deleted"):
        fake.jit(plus_one)(array)
    with rlx.no_copies():
        rlx.commit(buffer, result)
    assert buffer.array(NATIVE).read().tolist() == [1] * 4
    result.delete()
    assert result.is_deleted()


def test_an_array_that_another_framework_holds_is_not_donated(fake):
    backend = registry.get(FUNCTIONAL)
    array = fake.functional(np.ones(4, np.float32))
    alias = rlx.exchange(array, NATIVE, copy=False)
    result = fake.jit(plus_one, donate_argnums=[0])(array)
    assert not array.is_deleted()
    assert backend.address(result) != backend.address(array)
    (fenced,) = backend.fence([array])
    assert not array.is_deleted()
    assert alias.read().tolist() == [1] * 4
    del alias
    (fenced,) = backend.fence([array])
    assert array.is_deleted()
    assert fenced.read().tolist() == [1] * 4


def test_only_a_lease_is_donated_in_place(fake):
    backend = registry.get(FUNCTIONAL)
    native = fake.array(np.ones(4, np.float32))
    facts = registry.get(NATIVE).facts(native)
    assert backend.can_lease(fake.device)
    for take, in_place in ((backend.lease, True), (backend.share, False)):
        array = take(native, facts)
        result = fake.jit(plus_one, donate_argnums=[0])(array)
        assert array.is_deleted()
        assert (backend.address(result) == native.address) is in_place


def test_a_fence_waits_for_a_fetch(fake, buffer):
    array = buffer.array(FUNCTIONAL)
    fake.stream("copies").hold()
    fetch = array.fetch()
    (fenced,) = registry.get(FUNCTIONAL).fence([array])
    assert not fetch.is_ready()
    assert not fenced.is_ready()
    fake.stream("copies").release()
    assert fenced.is_ready()
    assert fetch.wait().tolist() == [0] * 4


def test_a_fetch_does_not_wait_for_programs_that_came_later(fake, buffer):
    array = buffer.array(FUNCTIONAL)
    fake.stream("compute").hold()
    later = fake.jit(plus_one)(array)
    assert array.fetch().wait().tolist() == [0] * 4
    assert not later.is_ready()


def test_an_array_keeps_its_host_copy(fake):
    array = fake.functional(np.ones(2))
    backend = registry.get(FUNCTIONAL)
    assert backend.shows_current_bytes(array)
    assert array.read() is array.read()
    assert not backend.shows_current_bytes(array)
    with pytest.raises(ValueError, match="read-only"):
        array.read()[0] = 5


def test_a_program_reads_numpy_arrays_when_it_runs_so_the_driver_copies_them(fake, buffer):
    for by_driver, expected in ((True, 1), (False, 9)):
        fake.stream("compute").hold()
        row = np.ones(4, np.float32)
        if by_driver:
            buffer.update(lambda x, y: x * 0 + y, row, framework=FUNCTIONAL)
            result = fake.jit(np.copy)(buffer.array(FUNCTIONAL))
        else:
            result = fake.jit(np.copy)(row)
        row[:] = 9
        fake.stream("compute").release()
        assert result.read().tolist() == [expected] * 4


def test_a_step_is_checked_before_anything_is_donated(fake, buffer):
    buffer.copy_from(np.ones(4, np.float32))
    for step, error in (
        (lambda x: x[:2], rlx.ShapeError),
        (lambda x: (x, x), rlx.ShapeError),
        (lambda x: None, rlx.ShapeError),
        (lambda x: x.astype(np.float64), rlx.DTypeError),
        (lambda x: x.no_such_thing, AttributeError),
    ):
        with pytest.raises(error):
            buffer.update(step, framework=FUNCTIONAL)
    with pytest.raises(rlx.ShapeError, match="has_aux"):
        buffer.update(plus_one, framework=FUNCTIONAL, has_aux=True)
    assert buffer.epoch == 1
    assert buffer.to_host().numpy().tolist() == [1] * 4


def test_a_step_gives_more_and_takes_what_is_static(fake, buffer):
    def step(x, name, *, scale):
        assert name == "twice"
        return x + scale, {"sum": x.sum() + 1, "shape": x.shape}

    aux = buffer.update(
        step, "twice", framework=FUNCTIONAL, has_aux=True, static_argnums=1, scale=2.0
    )
    assert aux["sum"].read() == 1
    assert aux["shape"][0].read() == 4
    assert buffer.to_host().numpy().tolist() == [2] * 4


def test_a_step_on_a_tree_is_one_program(fake):
    tree = {"a": rlx.Buffer.zeros(2, "f32", fake.device), "b": rlx.Buffer.zeros(3, "i32", "fpga")}
    fake.log.clear()
    rlx.update(tree, lambda t: {"a": t["a"] + 1, "b": t["b"] + 2}, framework=FUNCTIONAL)
    assert [entry.stream for entry in fake.log if entry.kind == "work"] == ["compute"]
    assert tree["a"].to_host().numpy().tolist() == [1, 1]
    assert tree["b"].to_host().numpy().tolist() == [2, 2, 2]
    with pytest.raises(rlx.ShapeError, match="structure"):
        rlx.update(tree, lambda t: t["a"], framework=FUNCTIONAL)


def test_inside_a_program_no_view_is_taken(fake, buffer):
    with pytest.raises(rlx.StaleViewError, match="trace"):
        buffer.update(lambda x: x + buffer.array(FUNCTIONAL).size, framework=FUNCTIONAL)
    inner = fake.jit(plus_one)
    buffer.update(lambda x: inner(x) * 2, framework=FUNCTIONAL)
    assert buffer.to_host().numpy().tolist() == [2] * 4


def test_the_functional_framework_may_own_a_region(fake):
    region = rlx.HandleRegion(fake.device, backend=FUNCTIONAL)
    (handle,) = region.create({"w": ((2, 2), "f32")}).values()
    handle.update(plus_one, framework=FUNCTIONAL)
    handle.copy_from(handle.to_host().numpy() * 5)
    handle.update(plus_one, framework=FUNCTIONAL)
    assert handle.array(FUNCTIONAL).read().tolist() == [[6, 6], [6, 6]]
    with pytest.raises(rlx.ZeroCopyError):
        handle.array(NATIVE)
    region.close()


# --- memory and failures -------------------------------------------------------------------------


def test_memory_is_limited_and_says_how_much_there_is():
    with FakeDevice(memory_size=1000) as fake:
        assert fake.memory_size == 1000
        buffer = rlx.Buffer.zeros(600, "u8", fake.device)
        memory = fake.device.memory()
        assert (memory.total, memory.free, memory.in_use) == (1000, 400, 600)
        for size in (401, 1001, 1 << 50):
            with pytest.raises(rlx.OutOfDeviceMemory, match=f"{size:,} bytes.*free"):
                rlx.Buffer.zeros(size, "u8", fake.device)
        with pytest.raises(rlx.OutOfDeviceMemory):
            fake.array(np.zeros(401, np.uint8))
        with pytest.raises(rlx.OutOfDeviceMemory):
            fake.functional(np.zeros(401, np.uint8))
        del buffer
        gc.collect()
        rlx.Buffer.zeros(1000, "u8", fake.device)


def test_what_is_alive_is_listed(fake):
    assert fake.live_allocations == []
    buffer = rlx.Buffer.zeros(8, "u8", fake.device)
    mine = fake.array(np.zeros(3, np.uint8))
    (first, second) = sorted(fake.live_allocations, key=lambda entry: not entry.by_driver)
    assert first == (fake.device, buffer.address, 8, True)
    assert second == (fake.device, mine.address, 3, False)
    part, array = buffer[2:4].array(NATIVE), buffer.array(FUNCTIONAL)
    del mine
    buffer.close()
    del buffer
    gc.collect()
    assert len(fake.live_allocations) == 1, "the views hold it"
    del part
    assert len(fake.live_allocations) == 1
    del array
    gc.collect()
    assert fake.live_allocations == []


def test_new_memory_is_no_memory_of_zeros_until_work_has_made_it_so(fake):
    fake.stream().hold()
    buffer = rlx.Buffer.zeros(4, "u8", fake.device)
    with fake.stream("mine"):
        assert set(buffer._native.clone().read()) == {0xA5}
    fake.stream().release()
    assert set(buffer.array(NATIVE).read()) == {0}


def test_freed_memory_goes_to_later_work_of_its_stream(fake, stream):
    x = fake.array(np.zeros(4))
    address = x.address
    del x
    with stream:
        assert fake.array(np.zeros(4)).address != address
    assert fake.array(np.zeros(400)).address != address
    assert fake.array(np.zeros(4)).address == address


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("allocate", lambda fake, b: rlx.Buffer.zeros(4, "f32", fake.device)),
        ("copy_in", lambda fake, b: b.copy_from(np.ones(4, np.float32))),
        ("copy_out", lambda fake, b: b.to_host()),
        ("copy_across", lambda fake, b: b.copy_from(b._like(fake.device))),
        ("share", lambda fake, b: registry.get(FUNCTIONAL).share(b._native, None)),
        ("lease", lambda fake, b: b._like(fake.device).array(FUNCTIONAL)),
        ("compile", lambda fake, b: b.update(plus_one, framework=FUNCTIONAL)),
    ],
)
def test_calls_fail_once_when_they_are_asked_to(fake, buffer, what, call):
    fake.fail_next(what)
    with pytest.raises(rlx.OutOfDeviceMemory if what == "allocate" else FakeError, match=what):
        call(fake, buffer)
    call(fake, buffer)
    fake.fail_next(what, KeyError("one"))
    fake.fail_next(what, KeyError("two"))
    for text in ("one", "two"):
        with pytest.raises(KeyError, match=text):
            call(fake, buffer)
    call(fake, buffer)


def test_a_refused_import_is_an_error_of_the_exchange(fake, buffer):
    fake.fail_next("share")
    with pytest.raises(rlx.ZeroCopyError, match="share failed"):
        rlx.exchange(buffer.array(NATIVE), FUNCTIONAL)


def test_what_cannot_fail_on_demand_is_said(fake):
    with pytest.raises(ValueError, match="'everything' cannot fail on demand; known are allocate"):
        fake.fail_next("everything")


def test_a_program_fails_while_it_runs(fake, buffer):
    buffer.copy_from(np.ones(4, np.float32))
    fake.stream("compute").hold()
    fake.fail_next("program")
    buffer.update(plus_one, framework=FUNCTIONAL)
    dependent = fake.jit(plus_one)(buffer.array(FUNCTIONAL))
    fake.stream("compute").release()
    for wait in (dependent.block_until_ready, dependent.read):
        with pytest.raises(FakeError, match="program failed"):
            wait()
    fake.on_host_wait = "release"
    with pytest.raises(FakeError, match="program failed"):
        buffer.array(FUNCTIONAL).read()
    buffer.copy_from(np.full(4, 5, np.float32))
    assert buffer.to_host().numpy().tolist() == [5] * 4


def test_a_program_that_fails_is_an_error_of_the_update_where_the_host_waits():
    with FakeDevice(order="host") as fake:
        buffer = rlx.Buffer.zeros(4, "f32", fake.device)
        fake.fail_next("program", ArithmeticError("overflow"))
        buffer.update(plus_one, framework=FUNCTIONAL)
        with pytest.raises(rlx.UpdateFailedError, match="overflow"):
            buffer.array(NATIVE)
        buffer.copy_from(np.ones(4, np.float32))
        assert buffer.array(NATIVE).read().tolist() == [1] * 4


def test_a_step_that_raises_when_it_sees_values_fails_while_it_runs(fake, buffer):
    def step(x):
        if x.any():
            raise ArithmeticError("no ones")
        return x + 1

    buffer.update(step, framework=FUNCTIONAL)
    buffer.update(step, framework=FUNCTIONAL)
    with pytest.raises(ArithmeticError, match="no ones"):
        buffer.array(FUNCTIONAL).block_until_ready()
    assert set(buffer.array(NATIVE).read().view(np.uint8)) == {0xBD}, "the bytes are lost"


def test_native_work_fails_while_it_runs(fake, stream):
    x = fake.array(np.zeros(2))
    stream.hold()
    fake.fail_next("work")
    with stream:
        x.add_(1)
        stream.release()
        with pytest.raises(FakeError, match="work failed"):
            x.read()
        assert x.read().tolist() == [0, 0], "it is raised once"


def test_a_donation_that_goes_elsewhere_is_copied_back(fake, buffer):
    fake.fail_next("donate")
    with rlx.ledger.record() as record:
        buffer.update(plus_one, framework=FUNCTIONAL)
    assert record.counts.copies == 1
    assert buffer.array(NATIVE).read().tolist() == [1] * 4
    with rlx.ledger.record() as record:
        buffer.update(plus_one, framework=FUNCTIONAL)
    assert record.counts.copies == 0
    assert buffer.array(FUNCTIONAL).read().tolist() == [2] * 4


# --- coming and going ----------------------------------------------------------------------------


def test_it_is_there_for_a_block():
    device = rlx.Device("fpga")
    assert not device.is_available()
    with FakeDevice() as fake:
        assert device.is_available()
        assert device in rlx.available_devices()
        buffer = rlx.Buffer.zeros(4, "f32", device)
        view = buffer.array(NATIVE)
        assert fake.device == device
    assert not device.is_available()
    for name in (NATIVE, FUNCTIONAL):
        assert name not in registry.names()
    assert registry.for_array(view) is None
    with FakeDevice() as fake:
        assert fake.live_allocations == []
        assert rlx.Buffer.zeros(4, "f32", device).to_host().numpy().sum() == 0


def test_it_goes_after_an_error_too():
    with pytest.raises(KeyError), FakeDevice():
        raise KeyError
    assert not rlx.Device("fpga").is_available()


def test_there_is_one_at_a_time():
    with FakeDevice(), pytest.raises(RuntimeError, match="count"), FakeDevice("vulkan"):
        pass
    with FakeDevice("vulkan") as fake:
        assert str(fake.device) == "vulkan:0"


def test_an_unknown_kind_or_order_is_refused():
    with pytest.raises(rlx.DeviceUnavailableError):
        FakeDevice("abacus")
    with pytest.raises(ValueError, match="sometimes"):
        FakeDevice(order="sometimes")


def test_an_error_of_work_that_nobody_has_seen_is_raised_at_the_end():
    def test(error):
        with FakeDevice() as fake:
            fake.fail_next("work")
            fake.array(np.zeros(1))
            if error is not None:
                raise error

    with pytest.raises(FakeError, match="work failed"):
        test(None)
    with pytest.raises(KeyError):
        test(KeyError())


def test_it_needs_numpy_alone():
    must_run(
        HIDE
        + """
import sys
import numpy as np
import rlx_driver as rlx
from rlx_driver.testing import FakeDevice
with FakeDevice() as fake:
    b = rlx.Buffer.zeros(4, "f32", fake.device)
    b.update(lambda x: x + 1, framework="fake_functional")
    with rlx.command_stream(fake.device) as stream:
        b.array("fake").add_(1)
    stream.wait()
    assert b.to_host().numpy().tolist() == [2] * 4
assert not {"torch", "jax"} & set(sys.modules)
"""
    )


def test_importing_the_driver_does_not_load_it():
    loaded = must_run("import sys, rlx_driver; print('rlx_driver.testing' in sys.modules)")
    assert loaded.strip() == "False"
