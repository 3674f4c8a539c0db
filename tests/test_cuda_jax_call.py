"""torch functions inside jitted JAX programs on a GPU: on JAX's stream, in place. Needs a GPU."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver.registry import registry

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy

from rlx_driver.integrations import _jax_call  # noqa: E402

pytestmark = pytest.mark.cuda
DEVICE = "cuda:0"


def place():
    return jax.devices("cuda")[0]


@pytest.fixture
def handle():
    h = rlx.BufferHandle("h", (1024, 1024), "f32", device=DEVICE)
    yield h
    h.close()


def test_the_probe_finds_the_way_in_place():
    assert _jax_call.works_in_place("gpu")


def test_torch_runs_on_the_stream_of_jax_and_in_place(handle):
    seen = set()

    def look(t, row):
        stream = torch.cuda.current_stream(t.device).cuda_stream
        seen.add((t.data_ptr(), stream, t.device.index, torch.is_grad_enabled()))
        t += row

    def step(x, row):
        return rlx.jax_call(look, x, row * 2)

    row = jnp.ones(1024, device=place())
    before = torch.cuda.current_stream().cuda_stream
    with rlx.no_copies():
        for _ in range(100):
            handle.update(step, row)
    assert torch.all(handle.torch() == 200)
    expected, why = registry.get("jax").gpu_stream(0)
    assert expected is not None, why
    assert seen == {(handle.address, expected, 0, False)}
    assert torch.cuda.current_stream().cuda_stream == before


def slow(x):
    """Work of some milliseconds that leaves every value at one more than it was."""
    return x + 1 + 0 * jax.lax.fori_loop(0, 50, lambda _, m: jnp.tanh(m @ m), x * 1e-3)


def double_slowly(t):
    product = t * 1e-3
    for _ in range(50):
        product = torch.tanh(product @ product)
    t *= 2
    t += 0 * product


def wrong_of(handle, repeats):
    def step(x):
        return slow(rlx.jax_call(double_slowly, slow(x)))

    wrong = 0
    for _ in range(repeats):
        handle.copy_from(np.ones((1024, 1024), np.float32))
        handle.update(step)
        wrong += not np.all(handle.to_host().numpy() == 5)
    return wrong


def test_order_with_jax_before_and_after(handle):
    assert wrong_of(handle, 100) == 0


def test_without_the_stream_of_jax_the_order_is_lost(handle, monkeypatch):
    """The positive control: the test above sees a wrong order."""
    side = torch.cuda.Stream()

    @contextlib.contextmanager
    def elsewhere(*_):
        with torch.cuda.stream(side):
            yield

    monkeypatch.setattr(_jax_call, "on_stream_of", elsewhere)
    wrong = wrong_of(handle, 20)
    torch.cuda.synchronize()
    assert wrong > 0


def test_a_loop_of_a_hundred(handle):
    def add(t, i):
        t += i

    def step(x):
        return jax.lax.fori_loop(0, 100, lambda i, x: rlx.jax_call(add, x * 1, i) + 1, x)

    address = handle.address
    handle.update(step)
    assert torch.all(handle.torch() == 100 * 99 / 2 + 100)
    assert handle.address == address


@pytest.mark.parametrize("dtype", ["bf16", "f16", "float8_e4m3fn", "i32", "bool"])
def test_dtypes(dtype):
    b = rlx.Buffer.zeros((64,), dtype, device=DEVICE)
    value = jax.device_put(jnp.ones(64, b.dtype), place())
    b.update(lambda x, v: rlx.jax_call(lambda t, v: t.copy_(v), x, v), value)
    with b.to_host().read("numpy") as n:
        assert n.tobytes() == np.ones(64, b.dtype).tobytes()
    b.close()


def test_numpy_goes_round_by_the_host(handle):
    def add(t):
        t += 3

    rlx.ledger.reset()
    handle.update(lambda x: rlx.jax_call(add, x + 1, framework="numpy") * 2)
    assert np.all(handle.to_host().numpy() == 8)
    assert rlx.ledger.reasons["jax_call does not work in place here"].bytes == 2 * handle.byte_size


def test_a_handle_on_the_host_beside_a_gpu():
    h = rlx.BufferHandle("h", (16,), "f32", device="cpu")

    def add(t):
        assert t.device.type == "cpu"
        t += 3

    h.update(lambda x: rlx.jax_call(add, x))
    assert np.all(h.numpy() == 3)
    h.close()
