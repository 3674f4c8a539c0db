"""One order for torch and JAX on a CUDA device, in each of the three ways. Needs a GPU."""

from __future__ import annotations

import gc
import os
import weakref

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver.registry import registry
from support import must_run

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy

pytestmark = pytest.mark.cuda
DEVICE = "cuda:0"
SIZE = 1 << 20
WAYS = ("shared", "events", "host")


def spin(matrix):
    """Keep a stream busy for some tens of milliseconds."""
    for _ in range(30):
        matrix = matrix @ matrix * 1e-4
    return matrix


spin_jax = jax.jit(spin)


@jax.jit
def late_sum(busy, x):
    late = spin(busy)[0, 0] * 0
    return (jax.lax.optimization_barrier((x, late))[0]).sum() + late


def plus_one(x):
    return x + 1


def plus_five(x):
    return x + 5


def double(x):
    return x * 2


def late_add(x, busy):
    return x + 1 + 0 * spin(busy)[0, 0]


def late_fill(tensor, busy, value):
    tensor.copy_(spin(busy).flatten()[: tensor.numel()].view_as(tensor) * 0 + value)


@pytest.fixture(scope="module")
def heavy():
    """A big matrix for each framework, so that later work would overtake earlier work."""
    ours = torch.full((4096, 4096), 0.01, device="cuda")
    theirs = jnp.full((4096, 4096), 0.01, device=jax.devices("cuda")[0])
    spin(ours)
    jax.block_until_ready(spin_jax(theirs))
    jax.block_until_ready(late_sum(theirs, jnp.ones(SIZE)))
    torch.cuda.synchronize()
    return ours, theirs


def forget_streams():
    registry.get("torch")._streams.clear()


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Force a way for the test, and enter the stream of the device."""
    monkeypatch.setenv("RLX_STREAM_ORDER", request.param)
    forget_streams()
    with rlx.command_stream(DEVICE) as stream:
        assert stream.sharing.way == request.param
        yield request.param
    monkeypatch.undo()
    forget_streams()


def make(shape=(SIZE,), dtype="f32"):
    return rlx.Buffer.zeros(shape, dtype, DEVICE)


# --- order -----------------------------------------------------------------------------------


def test_the_control_is_wrong_without_the_driver(heavy):
    ours, theirs = heavy

    def write_after_read():
        t = torch.ones(SIZE, device="cuda")
        x = jnp.from_dlpack(t)
        torch.cuda.synchronize()
        got = late_sum(theirs, x)
        t.zero_()
        return float(got) != SIZE

    def read_after_write():
        t = torch.zeros(SIZE, device="cuda")
        x = jnp.from_dlpack(t)
        torch.cuda.synchronize()
        late_fill(t, ours, 1)
        return float(x.sum()) != SIZE

    def fetch_after_write():
        t = torch.zeros(SIZE, device="cuda")
        x = jnp.from_dlpack(t)
        torch.cuda.synchronize()
        late_fill(t, ours, 1)
        theirs_waits()
        return float(np.asarray(x).sum()) != SIZE

    def theirs_waits():
        streams = registry.get("torch").streams(rlx.Device(DEVICE))
        streams.sharing(load=True)
        streams.wait_event(streams.functional(), streams.record(streams.current()))

    for race in (write_after_read, read_after_write, fetch_after_write):
        assert any(race() for _ in range(10)), f"{race.__name__} shows no race"


def test_a_jax_reader_is_safe_from_a_later_torch_write(way, heavy):
    _, theirs = heavy
    b = make()
    for _ in range(5):
        with b.write("torch") as t:
            t.fill_(1)
        got = late_sum(theirs, b.jax())
        with b.write("torch") as t:
            t.zero_()
        assert float(got) == SIZE


@pytest.mark.parametrize("look", ["compute", "fetch", "device_put"])
def test_jax_sees_what_torch_wrote(way, heavy, look):
    ours, _ = heavy
    b = make()
    view = b.torch()
    host = jax.devices("cpu")[0]

    def seen():
        x = b.jax()
        if look == "compute":
            return float(x.sum())
        return float(np.asarray(x if look == "fetch" else jax.device_put(x, host)).sum())

    for value in range(1, 6):
        late_fill(view, ours, value)  # by existing code, through a view
        assert seen() == value * SIZE
        with b.write("torch") as t:
            late_fill(t, ours, value + 0.5)
        assert seen() == (value + 0.5) * SIZE


def test_what_jax_fetches_comes_after_updates_of_slices(way, heavy):
    _, theirs = heavy
    b = make((4, SIZE))
    b.torch()
    for count in range(1, 4):
        b.jax()
        b[1].update(late_add, theirs)
        assert float(np.asarray(b.jax()).sum()) == count * SIZE
        assert float(np.asarray(b[1].jax()).sum()) == count * SIZE


def test_torch_sees_what_jax_wrote_on_any_stream(way, heavy):
    _, theirs = heavy
    b = make()
    held = b.torch()
    for count in range(1, 4):
        b.update(late_add, theirs)
        assert float(held.sum()) == count * SIZE, "a held view, ordered by the update"
    b.update(late_add, theirs, ordered=False)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert float(b.torch().sum()) == 4 * SIZE, "another stream, ordered by the call"


def test_writes_and_reads_of_torch_on_several_streams(way, heavy):
    ours, _ = heavy
    b = make()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for value in range(1, 4):
        with torch.cuda.stream(streams[0]), b.write("torch") as t:
            late_fill(t, ours, value)
        sums = []
        for stream in streams[1:]:
            with torch.cuda.stream(stream), b.read("torch") as t:
                spin(ours)
                sums.append(t.sum())
        with b.write("torch") as t:
            t.zero_()
        assert float(b.jax().sum()) == 0
        torch.cuda.synchronize()
        assert [float(s) for s in sums] == [value * SIZE] * 2


def test_an_update_waits_for_readers_on_a_side_stream(way, heavy):
    ours, _ = heavy
    b, side = make(), torch.cuda.Stream()
    for count in range(3):
        with torch.cuda.stream(side), b.read("torch") as t:
            spin(ours)
            got = t.sum()
        b.update(plus_one)
        side.synchronize()
        assert float(got) == count * SIZE


def test_a_copy_between_buffers_counts_as_a_read_of_its_source(way, heavy):
    ours, _ = heavy
    a, b, side = make(), make(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        spin(ours)
        b.copy_from(a)
    a.update(plus_five)
    assert float(b.torch().sum()) == 0
    assert float(a.to_host().numpy().sum()) == 5 * SIZE


def test_to_host_waits_for_its_own_producers_only(heavy):
    _, theirs = heavy
    with rlx.command_stream(DEVICE) as stream:
        b = make()
        b.update(plus_one)
        jax.block_until_ready(b.jax())
        busy = spin_jax(spin_jax(spin_jax(theirs)))
        assert float(b.to_host().numpy().sum()) == SIZE
        assert not busy.is_ready(), "to_host has waited for unrelated work, or it was too short"
        stream.wait()


def test_host_waits_are_counted_in_one_way_only(way, heavy):
    ours, _ = heavy
    b = make()
    view = b.torch()
    with rlx.ledger.record() as record:
        for value in range(1, 4):
            late_fill(view, ours, value)
            b.update(double)
            got = b.jax().sum()
            assert float(view.sum()) == float(got) == 2 * value * SIZE
    assert (record.counts.host_waits > 0) is (way == "host")


def test_on_the_shared_stream_nothing_is_waited_for(heavy, monkeypatch):
    forget_streams()
    with rlx.command_stream(DEVICE) as stream:
        assert stream.sharing.way == "shared"
        streams = registry.get("torch").streams(rlx.Device(DEVICE))
        b = make()
        row = jnp.ones(SIZE)
        b.torch(), b.jax()
        calls = []
        for name in ("record", "wait_event", "wait_result", "synchronize"):
            monkeypatch.setattr(streams, name, lambda *_, name=name: calls.append(name))
        view = b.torch()
        for _ in range(10):
            b.update(jnp.add, row)
            assert b.torch() is view
            view.add_(1)
        assert calls == []
        monkeypatch.undo()
        assert float(b.jax().sum()) == 20 * SIZE
    forget_streams()


# --- streams ---------------------------------------------------------------------------------


def test_a_stream_says_how_it_is_ordered():
    forget_streams()
    stream = rlx.command_stream(DEVICE)
    assert "shared stream" in repr(stream)
    assert "JAX shows its compute stream" in stream.explain()
    side = rlx.command_stream(DEVICE, side=True)
    assert "device events" in side.explain()
    assert side.native != stream.native
    assert rlx.command_stream(DEVICE).native == stream.native, "one stream for the device"
    for order, words in (("events", "device events"), ("host", "host waits")):
        forced = rlx.command_stream(DEVICE, order=order)
        assert words in repr(forced)
        assert forced.native != stream.native
    with pytest.raises(rlx.StreamError, match="no way to order"):
        rlx.command_stream(DEVICE, order="magic")
    assert stream.__cuda_stream__() == (0, stream.native.cuda_stream)


def test_where_jax_hides_its_stream_the_host_waits(monkeypatch, heavy):
    jax_backend = registry.get("jax")
    forget_streams()
    monkeypatch.setattr(jax_backend, "gpu_stream", lambda index: (None, "hidden for a test"))
    stream = rlx.command_stream(DEVICE)
    assert "host waits" in repr(stream)
    assert "hidden for a test" in stream.explain()
    with pytest.raises(rlx.StreamError, match="hidden for a test"):
        rlx.command_stream(DEVICE, order="shared")
    with stream:
        b = make()
        b.torch().fill_(3)
        assert float(b.jax().sum()) == 3 * SIZE
        b.update(late_add, heavy[1])
        assert float(b.torch().sum()) == 4 * SIZE
    forget_streams()


def test_the_current_stream_is_found_without_the_private_function():
    from rlx_driver.backends._cuda_streams import probe_current_stream

    public = probe_current_stream(None)
    lying = probe_current_stream(lambda index: -5)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for find in (public, lying, probe_current_stream()):
            assert find(0) == side.cuda_stream


def test_jax_may_come_after_the_stream_was_made():
    must_run(
        """
import rlx_driver as rlx, torch, sys
stream = rlx.command_stream("cuda:0")
own = stream.native
assert "jax" not in sys.modules and "JAX is not in use" in repr(stream), repr(stream)
b = rlx.Buffer.zeros((1 << 20,), "f32", "cuda:0")
with stream:
    m = torch.full((4096, 4096), 0.01, device="cuda")
    for _ in range(60):
        m = m @ m * 1e-4
    b.torch().copy_(m.flatten()[: 1 << 20] * 0 + 1)
    import jax
    b.update(lambda x: x + 1)
    assert float(b.torch().sum()) == 2 << 20
assert "shared stream" in repr(stream), repr(stream)
assert stream.native != own
with stream:
    b.update(lambda x: x + 1)
    assert torch.cuda.current_stream() == stream.native
    assert float(b.torch().sum()) == 3 << 20
""",
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
    )


def test_compiled_torch_code_and_jax_are_in_one_order(way, heavy):
    _, theirs = heavy
    b = make()
    compiled = torch.compile(lambda t: t.mul_(2), backend="aot_eager")
    expected = 0.0
    for _ in range(3):
        b.update(late_add, theirs)
        compiled(b.torch())
        expected = (expected + 1) * 2
    assert float(b.jax().sum()) == expected * SIZE


def test_events_are_timed_by_the_device(heavy):
    ours, _ = heavy
    stream = rlx.command_stream(DEVICE)
    start = stream.record()
    stream.launch(spin, ours)
    end = stream.record()
    assert isinstance(end, rlx.Event)
    assert not end.is_ready()
    assert start.elapsed_ms(end) > 1
    assert end.is_ready()
    assert end.elapsed_ms(start) < -1
    with pytest.raises(rlx.StreamError, match="one clock"):
        start.elapsed_ms(rlx.command_stream("cpu").record())


@pytest.mark.parametrize("source", ["stream", "event", "torch stream", "torch event", "jax"])
def test_a_stream_waits_for_another_on_the_device(heavy, source):
    ours, theirs = heavy
    first, second = (rlx.command_stream(DEVICE, side=True) for _ in range(2))
    torch.cuda.synchronize()
    t = torch.zeros(SIZE, device="cuda")
    torch.cuda.synchronize()
    if source == "jax":
        first = rlx.JaxStream(DEVICE)
        x = first.launch(late_sum, theirs, jnp.ones(SIZE))
        second.wait_for(first)
        assert not second.record().is_ready(), "it waits on the device, not on the host"
        second.wait()
        assert float(x) == SIZE
        return
    first.launch(late_fill, t, ours, 1)
    second.wait_for(
        {
            "stream": lambda: first,
            "event": first.record,
            "torch stream": lambda: first.native,
            "torch event": lambda: first.native.record_event(),
        }[source]()
    )
    got = second.launch(lambda: t.sum())
    second.wait()
    assert float(got) == SIZE


def test_jax_waits_for_a_stream_of_torch(heavy):
    ours, _ = heavy
    side, theirs = rlx.command_stream(DEVICE, side=True), rlx.JaxStream(DEVICE)
    t = torch.zeros(SIZE, device="cuda")
    x = jnp.from_dlpack(t)
    torch.cuda.synchronize()
    side.launch(late_fill, t, ours, 1)
    theirs.wait_for(side)
    assert float(theirs.launch(lambda: x.sum())) == SIZE


def test_what_a_stream_cannot_wait_for():
    stream = rlx.command_stream(DEVICE)
    for other in (object(), 5, "cuda:0"):
        with pytest.raises(rlx.StreamError, match="cannot wait for"):
            stream.wait_for(other)
    if torch.cuda.device_count() > 1:
        with pytest.raises(rlx.StreamError, match="cuda:1"):
            rlx.TorchStream(DEVICE, torch.cuda.Stream(1))


def test_a_failure_poisons_the_stream_and_who_waits_for_it():
    first, second = (rlx.command_stream(DEVICE, side=True) for _ in range(2))

    def fails():
        raise KeyError("on purpose")

    first.launch(fails)
    event = first.record()
    second.wait_for(first)
    assert second.launch(lambda: 1) is None
    for waiter in (first, event, second):
        with pytest.raises(KeyError, match="on purpose") as caught:
            waiter.wait()
        assert caught.traceback[-1].name == "fails"
    assert second.launch(lambda: 1) == 1


def test_objects_in_use_stay_alive_until_the_work_is_done(heavy):
    ours, _ = heavy
    stream = rlx.command_stream(DEVICE, side=True)
    torch.cuda.synchronize()
    t = torch.ones(SIZE, device="cuda")
    torch.cuda.synchronize()
    gone = weakref.ref(t)
    got = stream.launch(lambda x: spin(ours).sum() * 0 + x.sum(), t)
    del t
    gc.collect()
    assert gone() is not None
    stream.wait()
    assert float(got) == SIZE
    assert gone() is None


def test_a_dropped_handle_is_not_reused_under_a_pending_reader(way, heavy):
    _, theirs = heavy
    for _ in range(5):
        b = make()
        b.torch().fill_(1)
        got = late_sum(theirs, b.jax())
        b.close()
        del b
        with torch.cuda.stream(torch.cuda.default_stream()):
            thief = [torch.zeros(SIZE, device="cuda") for _ in range(4)]
        assert float(got) == SIZE
        del thief


def test_staging_on_a_side_stream(heavy):
    ours, _ = heavy
    pinned = torch.full((SIZE,), 7.0, pin_memory=True)
    with rlx.command_stream(DEVICE):
        b, other = make(), make()
        other.torch()
        side = rlx.command_stream(DEVICE, side=True)
        spin(ours)
        with side:
            b.copy_from(pinned, blocking=False)
        done = side.record()
        done.wait()
        assert float(b.jax().sum()) == 7 * SIZE


# --- graphs ----------------------------------------------------------------------------------


def test_a_graph_replays_between_updates_of_jax(way, heavy):
    _, theirs = heavy
    stream = rlx.command_stream(DEVICE)
    kv, out = make(), make()
    with stream.capture() as graph:
        kv.torch().mul_(2)
        with kv.read("torch") as t, out.write("torch") as o:
            o.copy_(t + 1)
    assert float(kv.torch().sum()) == 0
    assert (kv.epoch, out.epoch) == (0, 0), "nothing has run"
    expected = 0.0
    for _ in range(4):
        kv.update(late_add, theirs)
        reader = late_sum(theirs, out.jax())
        graph.replay()
        assert float(reader) == (expected + 1 if expected else 0) * SIZE
        expected = (expected + 1) * 2
        assert float(out.jax().sum()) == (expected + 1) * SIZE
        assert float(np.asarray(kv.jax()).sum()) == expected * SIZE


def test_views_taken_before_a_capture_are_named():
    stream = rlx.command_stream(DEVICE)
    with stream:
        kv = make()
        view = kv.torch()
        old = kv.jax()
        with stream.capture(writes=[kv]) as graph:
            view.add_(1)
        before = kv.epoch
        for _ in range(3):
            graph.replay()
        assert old.is_deleted()
        assert kv.epoch == before + 3
        assert float(kv.jax().sum()) == 3 * SIZE
    kv.close()
    with pytest.raises(rlx.ClosedHandleError):
        graph.replay()


@pytest.mark.parametrize(
    "bad",
    [
        lambda kv: kv.update(jnp.add, 1),
        lambda kv: kv.jax(),
        lambda kv: kv.to_host(),
        lambda kv: kv.copy_from(np.ones(SIZE, np.float32)),
        lambda kv: kv.torch().sum().item(),
        lambda kv: torch.cuda.synchronize(),
        lambda kv: rlx.command_stream(DEVICE).capture().__enter__(),
    ],
    ids=["update", "jax", "to_host", "copy_from host", "item", "synchronize", "nested"],
)
def test_work_that_cannot_be_captured(bad):
    stream = rlx.command_stream(DEVICE)
    with stream:
        kv = make()
        kv.torch().fill_(2)
        kv.jax()
        epoch = kv.epoch
        current = torch.cuda.current_stream()
        with pytest.raises(rlx.CaptureError), stream.capture() as graph:  # noqa: PT012
            kv.torch().add_(1)
            bad(kv)
        assert torch.cuda.current_stream() == current
        assert kv.epoch == epoch
        with pytest.raises(rlx.CaptureError, match="never finished"):
            graph.replay()
        # Everything works afterwards, another capture and the generator of torch included.
        assert float(kv.jax().sum()) == 2 * SIZE
        kv.update(jnp.add, 1)
        with stream.capture() as graph:
            kv.torch().mul_(2)
        graph.replay()
        torch.rand(2, device="cuda")
        assert float(kv.torch().sum()) == 6 * SIZE


def test_an_error_inside_a_capture_is_the_users_own():
    stream = rlx.command_stream(DEVICE)
    kv = make()
    with pytest.raises(ZeroDivisionError), stream.capture() as graph:  # noqa: PT012
        kv.torch().add_(1)
        _ = 1 / 0
    with pytest.raises(rlx.CaptureError, match="never finished"):
        graph.replay()
    assert float(kv.torch().sum()) == 0
    with pytest.raises(rlx.CaptureError, match="no graphs"):
        rlx.command_stream("cpu").capture()
    with (
        pytest.raises(rlx.CaptureError, match="not on cuda:0"),
        stream.capture(writes=[rlx.Buffer.zeros(4)]),
    ):
        pass


# --- several devices -------------------------------------------------------------------------


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_each_device_has_its_own_shared_stream(heavy):
    forget_streams()
    streams = [rlx.command_stream(f"cuda:{i}") for i in range(2)]
    assert all(stream.sharing.way == "shared" for stream in streams)
    assert streams[0].native.cuda_stream != streams[1].native.cuda_stream
    buffers = [rlx.Buffer.zeros((SIZE,), "f32", f"cuda:{i}") for i in range(2)]
    with streams[0], streams[1]:
        for count in range(1, 5):
            for i, b in enumerate(buffers):
                b.update(jnp.add, jax.device_put(jnp.float32(1), jax.devices("cuda")[i]))
                b.torch().add_(1)
            assert [float(b.jax().sum()) for b in buffers] == [2 * count * SIZE] * 2
    streams[0].wait_for(streams[1])
    event = streams[1].record()
    streams[0].wait_for(event)
    event.wait()
    buffers[0].copy_from(buffers[1])
    assert float(np.asarray(buffers[0].jax()).sum()) == 8 * SIZE
    assert torch.cuda.current_device() == 0
    assert os.environ.get("RLX_STREAM_ORDER") is None
    forget_streams()


# --- arrays that something else holds ---------------------------------------------------------


def test_an_alias_of_a_jax_array_blocks_writes_and_updates_with_our_error():
    with rlx.command_stream(DEVICE):
        b = make()
        b.torch().fill_(3)
        alias = torch.from_dlpack(b.jax())
        for attempt in (
            lambda: b.write("torch").__enter__(),
            lambda: b.update(plus_one),
            lambda: rlx.update([b], lambda tree: [tree[0] + 1]),
            lambda: b.copy_from(np.zeros(SIZE, np.float32)),
        ):
            with pytest.raises(rlx.ZeroCopyError, match="alias"):
                attempt()
        assert float(alias.sum()) == 3 * SIZE, "nothing was changed"
        del alias
        b.update(plus_one)
        assert float(b.torch().sum()) == 4 * SIZE


def test_a_copy_from_an_array_of_another_buffer_reads_that_buffer(way, heavy):
    ours, _ = heavy
    a, b, side = make(), make(), torch.cuda.Stream()
    a.torch().fill_(2)
    for count in range(3):
        array = a.jax()
        with torch.cuda.stream(side):
            spin(ours)
            b.copy_from(array)  # late
        a.update(plus_one)  # comes after the copy, and nothing holds the array any more
        assert float(b.torch().sum()) == (2 + count) * SIZE


def test_a_write_to_one_handle_of_a_region_is_none_to_the_others():
    region = rlx.HandleRegion(DEVICE)
    a, b = region.create({"a": ((64,), "f32"), "b": ((64,), "f32")}).values()
    t, held = a.torch(), a.jax()
    version = t._version
    with b.write("torch") as other:
        other.fill_(1)
    b.update(plus_one)
    assert t._version == version, "autograd would refuse what it saved of the other handle"
    assert a.jax() is held
    assert not held.is_deleted()
    region.close()
