"""Memory that only JAX reaches, as on a TPU; run here on JAX's CPU devices under that name."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import rlx_driver as rlx
from support import must_run

jax = pytest.importorskip("jax")
jnp = jax.numpy


@pytest.fixture
def tpu(monkeypatch):
    """A device kind that JAX serves and nothing else sees."""
    monkeypatch.setitem(_platforms(), "tpu", "cpu")
    return rlx.Device("tpu")


def _platforms():
    from rlx_driver.backends import jax as backend

    return backend._PLATFORM


def plus_one(x):
    return x + 1


def pointer(handle):
    return handle.jax().unsafe_buffer_pointer()


@pytest.fixture(params=["handle", "region", "buffer"])
def memory(request, tpu):
    if request.param == "handle":
        return rlx.BufferHandle("h", (4, 64), "f32", device=tpu)
    if request.param == "region":
        return rlx.HandleRegion(tpu).create({"h": ((4, 64), "f32")})["h"]
    return rlx.Buffer.zeros((4, 64), "f32", tpu)


def test_updates_chain_donation_at_one_address(memory):
    assert memory.device == rlx.Device("tpu")
    before = pointer(memory)
    with rlx.no_copies():
        for _ in range(20):
            memory.update(plus_one)
    assert pointer(memory) == before == memory.address
    assert memory.epoch == 20
    assert (np.asarray(memory.jax()) == 20).all()


def test_values_go_in_and_come_out_by_copies_at_one_address(memory):
    before = pointer(memory)
    value = np.arange(256, dtype=np.float32).reshape(4, 64)
    memory.copy_from(value)
    value += 1  # the driver has copied it
    np.testing.assert_array_equal(memory.to_host().numpy(), value - 1)
    memory.copy_from(jnp.full((4, 64), 7.0))
    assert (memory.to_host().numpy() == 7).all()
    memory[...] = 3
    assert (np.asarray(memory.jax()) == 3).all()
    memory.update(plus_one)
    assert (memory.to_host().numpy() == 4).all()
    assert pointer(memory) == before


def test_arrays_given_out_die_with_a_write(memory):
    old = memory.jax()
    memory.copy_from(np.ones((4, 64), np.float32))
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        old.sum()


def test_other_frameworks_are_told_what_to_do(memory):
    with pytest.raises(rlx.DeviceUnavailableError, match="to_host"):
        memory.numpy()
    with pytest.raises(rlx.DeviceUnavailableError, match="to_host"):
        memory.host_bytes()
    with pytest.raises(rlx.ZeroCopyError, match="slice the array"):
        memory[0]
    torch = pytest.importorskip("torch")
    with pytest.raises(rlx.ZeroCopyError, match="tpu"):
        memory.torch()
    assert not rlx.explain(memory, "torch")
    assert rlx.explain(memory, "jax")
    assert isinstance(rlx.exchange(memory, "jax"), jax.Array)
    del torch


def test_memory_is_counted_and_freed(tpu):
    gc.collect()  # of what other tests left behind
    before = tpu.backend.memory(tpu).in_use
    handle = rlx.BufferHandle("h", (1024,), "f32", device=tpu)
    handle.update(plus_one)
    assert tpu.backend.memory(tpu).in_use == before + 4096
    handle.close()
    del handle
    assert tpu.backend.memory(tpu).in_use == before
    with pytest.raises(rlx.DeviceUnavailableError, match="tpu:9"):
        rlx.Buffer.zeros((4,), "f32", "tpu:9")


def test_memory_of_jax_stays_where_it_is_when_another_device_is_the_default():
    must_run(
        """
import jax
import numpy as np
import rlx_driver as rlx

region = rlx.HandleRegion("cpu", backend="jax")
h = region.create({"h": ((4,), "f32")})["h"]
arena = rlx.Arena(rlx.plan_memory([("x", 64, 0, 1)]), backend="jax")
before = h.address
with jax.default_device(jax.devices("cpu")[1]):
    reader = h.jax()
    with rlx.no_copies():
        with h.write("numpy") as n:
            n += 1
        for _ in range(3):
            h.update(lambda x: x * 2)
    slot = arena.buffer("x", "f32")
    slot.update(lambda x: x + 1)
    assert h.jax().devices() == slot.jax().devices() == {jax.devices("cpu")[0]}
assert reader.is_deleted()
assert h.numpy().tolist() == [8] * 4 and slot.numpy().tolist() == [1] * 16
assert h.address == before
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
