"""Events, waiting for another stream, and failures that travel, on the host."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import rlx_driver as rlx

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy

from buffer_support import is_intact, ones, slow_read, warm_up  # noqa: E402


@pytest.fixture(params=["host", "jax"])
def stream(request):
    return rlx.SyncStream() if request.param == "host" else rlx.JaxStream("cpu")


@pytest.fixture(scope="module")
def slow():
    """A launch whose result is pending for a while."""
    warm_up()
    x = jnp.ones((512, 512))
    pending = [not slow_read(x).is_ready() for _ in range(5)]
    assert any(pending), "JAX computes at the call by now, so this would prove nothing"
    return lambda: slow_read(x)


def fails():
    raise KeyError("on purpose")


def test_an_event_is_ready_once_the_work_before_it_is(stream, slow):
    assert stream.record().is_ready(), "no work, nothing to wait for"
    for _ in range(20):  # this thread may be held up for longer than the work takes
        result = stream.launch(slow)
        event = stream.record()
        seen = repr(event)
        if not event.is_ready():
            break
    else:
        raise AssertionError("it was always ready at once")
    assert isinstance(event, rlx.Event)
    assert "pending" in seen
    event.wait()
    assert event.is_ready()
    assert result.is_ready()
    assert "ready" in repr(event)


def test_an_event_does_not_wait_for_later_work(stream, slow):
    for _ in range(10):
        first = stream.launch(slow)
        event = stream.record()
        later = [stream.launch(slow) for _ in range(3)]
        event.wait()
        assert first.is_ready()
        if not later[-1].is_ready():
            return
    raise AssertionError("it always waited for the later work too")


def test_an_event_is_timed_when_its_work_ends_not_when_it_is_asked(stream, slow):
    start = stream.record()
    stream.launch(slow)
    end = stream.record()
    stream.wait()
    end.wait()
    spent = start.elapsed_ms(end)
    # Whatever happens until the question is not counted.
    slow().block_until_ready()
    assert start.elapsed_ms(end) == spent > 0.1
    assert end.elapsed_ms(start) == -spent


def test_a_stream_comes_after_another_one(stream, slow):
    other = rlx.JaxStream("cpu")
    for given in (other, None):
        result = other.launch(slow)
        stream.wait_for(given or other.record())
        seen = stream.launch(lambda x=result: x.is_ready())
        assert seen is True


def test_a_failure_travels_to_who_waits_for_the_stream_or_its_event(stream):
    broken = rlx.command_stream("cpu")
    broken.launch(fails)
    event = broken.record()
    assert "failed" in repr(event)
    assert event.is_ready(), "there is nothing to wait for"
    stream.wait_for(event)
    assert "poisoned" in repr(stream)
    assert stream.launch(lambda: 1) is None
    for waiter in (broken, event, stream):
        with pytest.raises(KeyError, match="on purpose") as caught:
            waiter.wait()
        assert caught.traceback[-1].name == "fails", "the original traceback"
    assert stream.launch(lambda: 1) == 1
    with pytest.raises(KeyError):
        event.wait()  # an event stays what it was


def test_a_computation_that_fails_poisons_the_event_and_the_stream(stream, caplog):
    def late(x):
        def callback(_):
            raise ArithmeticError("in the middle")

        return jax.pure_callback(callback, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    stream.launch(jax.jit(late), jnp.ones(8))
    event = stream.record()
    with pytest.raises(Exception, match="in the middle"):
        event.wait()
    with pytest.raises(Exception, match="in the middle"):
        stream.wait()
    assert stream.launch(lambda: "again") == "again"


def test_a_result_donated_to_later_work_is_no_failure(stream, slow):
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    first = stream.launch(slow)
    event = stream.record()
    second = stream.launch(double, first)
    assert first.is_deleted()
    event.wait()
    stream.wait()
    assert float(second[0, 0]) == 2


@pytest.mark.parametrize(
    "other", [object(), 3, "cpu", None, np.zeros(3)], ids=lambda x: type(x).__name__
)
def test_what_a_stream_cannot_wait_for(stream, other):
    with pytest.raises(rlx.StreamError, match="cannot wait for a") as caught:
        stream.wait_for(other)
    assert type(other).__qualname__ in str(caught.value)
    assert stream.launch(lambda: 1) == 1


def test_two_clocks_do_not_compare(stream):
    class Native:
        def query(self):
            return True

    event = stream.record()
    foreign = rlx.DeviceEvent(rlx.Device("cuda"), Native())
    with pytest.raises(rlx.StreamError, match="one clock"):
        event.elapsed_ms(foreign)
    with pytest.raises(rlx.StreamError, match="one clock"):
        foreign.elapsed_ms(event)


def test_only_cuda_records_graphs(stream):
    with pytest.raises(rlx.CaptureError, match="no graphs"):
        stream.capture()


def test_host_streams_wait_for_jax_work_that_was_launched_on_them(slow):
    stream = rlx.command_stream("cpu")
    waited = False
    for _ in range(20):  # this thread may be held up for longer than the work takes
        result = stream.launch(slow)
        waited = waited or not result.is_ready()
        stream.wait()
        assert result.is_ready()
    assert waited


def test_a_stream_is_entered_by_several_threads_at_once(stream):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with stream:
            inside.set()
            assert leave.wait(30)

    thread = threading.Thread(target=other)
    with stream:
        thread.start()
        assert inside.wait(30)
    leave.set()
    thread.join(30)
    with stream, stream:
        pass


def test_unknown_orders_and_side_streams_on_the_host():
    assert isinstance(rlx.command_stream("cpu", side=True), rlx.SyncStream)
    assert "waits for what it needs" in rlx.command_stream("cpu").explain()
    assert "JAX orders" in rlx.JaxStream("cpu").explain()


def test_a_buffer_says_how_it_is_ordered():
    b = rlx.Buffer.zeros(4)
    explained = rlx.explain(b, "jax")
    assert "the host waits" in explained.order
    assert explained.order in str(explained)
    assert rlx.explain(b.numpy(), "torch").order == ""


def test_copies_that_may_go_on_are_the_same_on_the_host():
    b = ones()
    reader = slow_read(b.jax())
    b.copy_from(np.zeros((512, 512), np.float32), blocking=False)
    assert is_intact(reader)
    assert b.numpy().sum() == 0
