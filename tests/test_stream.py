"""Command streams: what runs in order, what `wait` waits for, and what a failed launch does."""

from __future__ import annotations

import contextlib
import threading
import traceback
import weakref

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver.registry import registry
from support import gone, needs


class Boom(Exception):
    pass


def explode():
    raise Boom("in the third launch")


def _host():
    return rlx.SyncStream()


def _jax():
    return rlx.JaxStream()


def _cuda():
    return rlx.TorchStream("cuda:0")


@pytest.fixture(
    params=[
        pytest.param(_host, id="sync"),
        pytest.param(_jax, id="jax", marks=needs("jax")),
        pytest.param(_cuda, id="torch", marks=needs("torch", "cuda")),
    ]
)
def stream(request):
    return request.param()


# --- every stream --------------------------------------------------------------------------------


class TestEveryStream:
    def test_is_a_command_stream(self, stream):
        assert isinstance(stream, rlx.CommandStream)
        assert isinstance(stream.device, rlx.Device)
        assert str(stream.device) in repr(stream)

    def test_launch_gives_what_the_function_returns(self, stream):
        assert stream.launch(lambda a, b: a + b, 2, 3) == 5
        assert stream.launch(lambda: None) is None
        stream.wait()

    def test_launches_run_in_order(self, stream):
        seen = []
        for i in range(5):
            stream.launch(seen.append, i)
        stream.submit()
        stream.wait()
        stream.submit_and_wait()
        assert seen == [0, 1, 2, 3, 4]

    def test_a_failed_launch_poisons_until_wait_raises_it(self, stream):
        seen = []
        assert stream.launch(seen.append, "before") is None
        assert stream.launch(explode) is None
        assert "poisoned" in repr(stream)
        assert stream.launch(lambda: seen.append("after") or 5) is None
        assert stream.launch(explode) is None
        stream.submit()
        with pytest.raises(Boom, match="third launch") as caught:
            stream.wait()
        frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert frames[-1] == "explode", "the traceback is that of the launch"
        assert seen == ["before"]

    def test_is_usable_again_after_that(self, stream):
        stream.launch(explode)
        with pytest.raises(Boom):
            stream.submit_and_wait()
        assert "poisoned" not in repr(stream)
        assert stream.launch(lambda: 5) == 5
        stream.wait()
        stream.wait()

    def test_the_first_error_is_the_one_raised(self, stream):
        stream.launch(explode)
        stream.launch(lambda: 1 / 0)
        with pytest.raises(Boom):
            stream.wait()

    def test_an_interruption_is_not_kept_for_later(self, stream):
        def interrupt():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stream.launch(interrupt)
        assert stream.launch(lambda: 5) == 5
        stream.wait()

    def test_is_a_context_that_does_not_swallow(self, stream):
        with stream as entered:
            assert entered is stream
            with stream:
                pass
        with pytest.raises(Boom), stream:
            explode()
        assert stream.launch(lambda: 5) == 5, "an error in the block is the block's own"
        stream.wait()

    def test_takes_any_array_to_track(self, stream):
        stream.track()
        stream.track(np.zeros(3), None, 5, {"a": [np.ones(2)]}, rlx.Buffer.zeros(3))
        stream.wait()

    def test_lets_go_of_a_launch_that_failed(self, stream):
        class Big:
            pass

        big = Big()
        held = weakref.ref(big)

        def fail(big):
            raise Boom

        stream.launch(fail, big)
        del big
        with contextlib.suppress(Boom):
            stream.wait()
        assert gone(held)


def test_anything_with_the_methods_is_a_command_stream():
    class Half:
        device = rlx.Device("cpu")

        def submit(self): ...
        def wait(self): ...

    assert not isinstance(Half(), rlx.CommandStream)
    assert not isinstance(object(), rlx.CommandStream)
    names = "device submit wait submit_and_wait launch track record wait_for __enter__ __exit__"
    whole = type("Whole", (), {name: lambda self: None for name in names.split()})()
    assert isinstance(whole, rlx.CommandStream)


# --- which stream --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", rlx.Device("cpu")])
def test_the_host_has_a_synchronous_stream(device):
    stream = rlx.command_stream(device)
    assert type(stream) is rlx.SyncStream
    assert stream.device == rlx.Device("cpu")
    assert type(rlx.command_stream()) is rlx.SyncStream


@pytest.mark.parametrize("device", ["cuda:9", "tpu:9", "fpga", "metal:9"])
@pytest.mark.torch
@pytest.mark.jax
def test_a_device_that_is_not_there_has_no_stream(device):
    with pytest.raises(rlx.DeviceUnavailableError, match=device):
        rlx.command_stream(device)


@pytest.mark.parametrize("device", ["cuda", "tpu", "vulkan"])
def test_a_synchronous_stream_is_for_the_host_alone(device):
    with pytest.raises(rlx.DeviceUnavailableError, match=device):
        rlx.SyncStream(device)


@pytest.mark.jax
@pytest.mark.parametrize("device", ["tpu:9", "vulkan", "cuda:9", "cpu:99"])
def test_a_jax_stream_is_for_a_device_of_jax(device):
    with pytest.raises(rlx.DeviceUnavailableError, match=device):
        rlx.JaxStream(device)


@pytest.mark.torch
def test_a_torch_stream_is_for_a_device_of_torch():
    with pytest.raises(rlx.DeviceUnavailableError, match="cpu"):
        rlx.TorchStream("cpu")
    with pytest.raises(rlx.DeviceUnavailableError, match="cuda:9"):
        rlx.TorchStream("cuda:9")


# --- JAX -----------------------------------------------------------------------------------------


@pytest.mark.jax
class TestJaxStream:
    @pytest.fixture
    def stream(self):
        return rlx.JaxStream()

    @pytest.fixture
    def slow(self):
        """Work of some tens of milliseconds, enqueued in no time."""
        import jax
        import jax.numpy as jnp

        step = jax.jit(lambda x: x @ x * 1e-3)
        start = jnp.ones((700, 700))
        step(start).block_until_ready()

        def work():
            x = start
            for _ in range(6):
                x = step(x)
            return x

        return work

    def test_wait_waits_for_what_was_launched(self, stream, slow):
        pending = [not slow().is_ready() for _ in range(3)]
        assert any(pending), "JAX computes at the call by now, so this proves nothing"
        results = [stream.launch(slow) for _ in range(3)]
        before = rlx.ledger.host_waits
        stream.wait()
        assert all(x.is_ready() for x in results)
        assert rlx.ledger.host_waits == before + 1

    def test_wait_waits_for_what_was_tracked_in_trees(self, stream, slow):
        tree = {"a": slow(), "b": [slow(), None, 5]}
        stream.track(tree)
        stream.wait()
        assert tree["a"].is_ready()
        assert tree["b"][0].is_ready()

    def test_wait_without_work_does_not_wait(self, stream):
        import jax.numpy as jnp

        stream.wait()
        x = jnp.ones(3).block_until_ready()
        stream.track(x)
        stream.wait()
        assert rlx.ledger.host_waits == 0

    def test_work_is_not_waited_for_twice(self, stream, slow):
        stream.launch(slow)
        stream.wait()
        waits = rlx.ledger.host_waits
        stream.wait()
        assert rlx.ledger.host_waits == waits

    def test_finished_arrays_are_let_go(self, stream):
        import jax.numpy as jnp

        x = jnp.ones(1000).block_until_ready()
        held = weakref.ref(x)
        stream.track(x)
        del x
        assert gone(held)

    def test_arrays_in_progress_are_let_go_when_they_are_done(self, stream, slow):
        x = stream.launch(slow)
        held = weakref.ref(x)
        x.block_until_ready()
        del x
        stream.track()
        assert gone(held)

    def test_donated_arrays_are_let_go(self, stream, slow):
        import jax

        step = jax.jit(lambda x: x + 1, donate_argnums=0)
        x = stream.launch(slow)
        y = stream.launch(step, x)
        assert x.is_deleted()
        stream.wait()
        assert y.is_ready()

    def test_arrays_deleted_before_the_wait_are_no_matter(self, stream, slow):
        x = stream.launch(slow)
        x.delete()
        stream.wait()

    def test_keys_are_tracked_too(self, stream):
        import jax

        key = stream.launch(jax.random.key, 0)
        stream.track(jax.random.split(key))
        stream.wait()
        assert jax.random.key_data(key).is_ready()

    def test_work_inside_a_trace_is_nobodys_to_wait_for(self, stream):
        import jax

        assert float(jax.jit(lambda x: stream.launch(lambda: x + 1))(1.0)) == 2
        stream.wait()

    def test_new_arrays_are_made_on_its_device(self, stream):
        import jax.numpy as jnp

        x = stream.launch(jnp.zeros, 3)
        assert rlx.Device.of(x) == stream.device
        with stream:
            assert rlx.Device.of(jnp.zeros(3)) == stream.device

    def test_an_error_of_the_computation_is_raised_by_wait(self, stream):
        stream.track(Failing(done=False))
        with pytest.raises(Boom, match="while it was computed"):
            stream.wait()
        stream.wait()

    def test_an_error_of_the_computation_is_not_lost_when_it_comes_early(self, stream):
        x = Failing(done=False)
        stream.track(x)
        x.done = True
        assert stream.launch(lambda: 5) == 5, "it runs before the error is noticed"
        assert stream.launch(lambda: 6) is None
        with pytest.raises(Boom, match="while it was computed"):
            stream.wait()
        assert stream.launch(lambda: 7) == 7

    @pytest.fixture(autouse=True)
    def _failing_arrays(self, monkeypatch, stream):
        """Let the backend take a `Failing` for an array of its own."""
        backend = stream._backend
        owns, wait = backend.owns, backend.wait
        monkeypatch.setattr(backend, "owns", lambda x: isinstance(x, Failing) or owns(x))
        monkeypatch.setattr(
            backend,
            "wait",
            lambda arrays: (
                [x.block_until_ready() for x in arrays]
                if any(isinstance(x, Failing) for x in arrays)
                else wait(arrays)
            ),
        )


class Failing:
    """A JAX array whose computation fails on its device, at a moment that a test can choose."""

    __module__ = "jax"  # so that it is taken for one of the framework

    def __init__(self, done):
        self.done = done

    def is_deleted(self):
        return False

    def is_ready(self):
        return self.done

    def block_until_ready(self):
        raise Boom("while it was computed")


@pytest.mark.jax
def test_streams_of_two_threads_do_not_disturb_each_other():
    import jax.numpy as jnp

    results, errors = [], []

    def work(value):
        try:
            stream = rlx.JaxStream()
            for _ in range(20):
                x = stream.launch(jnp.full, 8, value)
            if value % 2:
                stream.launch(explode)
                with pytest.raises(Boom):
                    stream.wait()
            stream.wait()
            results.append(float(x[0]) == value)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert results == [True] * 4


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.cuda
class TestTorchStream:
    @pytest.fixture
    def stream(self):
        return rlx.TorchStream("cuda:0")

    def test_it_wraps_a_stream_of_its_own_or_a_given_one(self, stream):
        import torch

        assert isinstance(stream.native, torch.cuda.Stream)
        assert stream.native != torch.cuda.default_stream()
        given = torch.cuda.Stream()
        assert rlx.TorchStream("cuda", given).native is given
        assert type(rlx.command_stream("cuda")) is rlx.TorchStream

    def test_launch_and_the_context_make_it_the_current_one(self, stream):
        import torch

        before = torch.cuda.current_stream()
        assert stream.launch(torch.cuda.current_stream) == stream.native
        with stream:
            assert torch.cuda.current_stream() == stream.native
            with rlx.TorchStream("cuda") as inner:
                assert torch.cuda.current_stream() == inner.native
            assert torch.cuda.current_stream() == stream.native
        assert torch.cuda.current_stream() == before

    def test_wait_waits_for_its_own_work(self, stream):
        import torch

        x = torch.ones(4096, 4096, device="cuda")
        torch.cuda.synchronize()

        def work():
            y = x
            for _ in range(20):
                y = y @ x * 1e-4
            return y

        stream.launch(work)
        stream.wait()  # of what the first call costs beside the work
        stream.launch(work)
        assert not stream.native.query(), "the work was done at once, so this proves nothing"
        before = rlx.ledger.host_waits
        stream.wait()
        assert stream.native.query()
        assert rlx.ledger.host_waits == before + 1


def test_the_backend_of_the_host_gives_the_stream_of_the_host():
    for name in registry.loaded:
        if name != "jax":
            assert type(registry.get(name).stream(rlx.Device("cpu"))) is rlx.SyncStream
