"""Buffers and handles on a CUDA device: in place, shared, in order. Needs a GPU."""

from __future__ import annotations

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver.dtypes import TABLE

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = jax.numpy

pytestmark = pytest.mark.cuda
DEVICE = "cuda:0"


def append(kv, row, position):
    return jax.lax.dynamic_update_slice(kv, row[None], (position, 0))


def double(x):
    return x * 2


def spin(matrix):
    """Keep a stream busy for some tens of milliseconds."""
    for _ in range(30):
        matrix = matrix @ matrix * 1e-4
    return matrix


@pytest.fixture(scope="module")
def heavy():
    """A big matrix for each framework, so that later work would overtake earlier work."""
    ours = torch.full((4096, 4096), 0.01, device="cuda")
    theirs = jnp.full((4096, 4096), 0.01, device=jax.devices("cuda")[0])
    spin(ours)
    jax.block_until_ready(jax.jit(spin)(theirs))
    torch.cuda.synchronize()
    return ours, theirs


def test_jax_updates_a_torch_handle_in_place_for_a_thousand_steps():
    kv = rlx.BufferHandle("kv", (1024, 64), "bf16", device=DEVICE)
    address = kv.address
    held = kv.torch()
    row = jnp.ones(64, jnp.bfloat16)
    with rlx.no_copies():
        for position in range(1000):
            kv.update(append, row * (position % 7), position)
            assert kv.jax().unsafe_buffer_pointer() == address
    assert held.data_ptr() == kv.address == address
    expected = torch.arange(1000, device="cuda").remainder(7).to(torch.bfloat16)
    assert torch.equal(held[:1000, 0], expected)
    assert kv.epoch == 1000
    kv.close()


@pytest.mark.parametrize(
    "dtype", [d for d, row in TABLE.items() if row.torch and row.jax and row.dlpack], ids=str
)
def test_every_common_dtype_is_shared(dtype):
    if (dtype.itemsize >= 8 and dtype.kind != "c") or dtype == np.complex128:
        pytest.skip("needs x64")
    b = rlx.Buffer.zeros((256,), dtype, DEVICE)
    t, j = b.torch(), b.jax()
    assert t.data_ptr() == j.unsafe_buffer_pointer() == b.address
    with b.write("torch") as view:
        view.view(torch.uint8).fill_(1)
    host = np.asarray(b.jax()).view(np.uint8)
    if dtype != np.bool_:
        assert (host == 1).all()
    again = rlx.exchange(b.torch(), "jax", copy=False)
    assert again.unsafe_buffer_pointer() == b.address
    assert rlx.exchange(again, "torch", copy=False).data_ptr() == b.address


def test_read_by_jax_is_safe_from_a_later_torch_write(heavy):
    _, theirs = heavy
    reader = jax.jit(lambda busy, x: x.sum() + 0 * spin(busy)[0, 0])

    def late_sum(x):
        return reader(theirs, x)

    def control():
        t = torch.ones(1 << 20, device="cuda")
        x = jnp.from_dlpack(t)
        torch.cuda.synchronize()
        got = late_sum(x)
        t.zero_()
        return float(got)

    late_sum(jnp.ones(1 << 20)).block_until_ready()
    wrong = sum(control() != 1 << 20 for _ in range(10))
    assert wrong > 0, "the control shows no race, so the test would prove nothing"

    b = rlx.Buffer.zeros((1 << 20,), "f32", DEVICE)
    for _ in range(10):
        with b.write("torch") as t:
            t.fill_(1)
        got = late_sum(b.jax())
        with b.write("torch") as t:
            t.zero_()
        assert float(got) == 1 << 20


def test_torch_write_is_seen_by_a_jax_array_taken_later(heavy):
    ours, _ = heavy

    def late_fill(t, value):
        busy = spin(ours)
        t.copy_(busy.flatten()[: t.numel()] * 0 + value)

    def control():
        t = torch.zeros(1 << 20, device="cuda")
        x = jnp.from_dlpack(t)
        torch.cuda.synchronize()
        late_fill(t, 1)
        return float(x.sum())

    control()
    wrong = sum(control() != 1 << 20 for _ in range(10))
    assert wrong > 0, "the control shows no race, so the test would prove nothing"

    b = rlx.Buffer.zeros((1 << 20,), "f32", DEVICE)
    view = b.torch()
    b.jax()
    for value in range(1, 11):
        late_fill(view, value)  # by existing code, through a view
        assert float(b.jax().sum()) == value * (1 << 20)
        with b.write("torch") as t:
            late_fill(t, value + 0.5)
        assert float(b.jax().sum()) == (value + 0.5) * (1 << 20)


def test_jax_update_is_seen_by_torch_on_any_stream(heavy):
    _, theirs = heavy
    b = rlx.Buffer.zeros((1 << 20,), "f32", DEVICE)
    held = b.torch()

    def step(x, busy):
        return x + 1 + 0 * spin(busy)[0, 0]

    for count in range(1, 6):
        b.update(step, theirs)
        assert float(held.sum()) == count * (1 << 20), "a held view, ordered by the update"
    b.update(step, theirs, ordered=False)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert float(b.torch().sum()) == 6 * (1 << 20), "another stream, ordered by the call"


def test_write_on_one_torch_stream_is_seen_on_another(heavy):
    ours, _ = heavy
    b = rlx.Buffer.zeros((1 << 20,), "f32", DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), b.write("torch") as t:
        t.copy_(spin(ours).flatten()[: t.numel()] * 0 + 5)
    assert float(b.torch().sum()) == 5 * (1 << 20)


def test_stale_jax_array_raises_after_a_write():
    b = rlx.Buffer.zeros((64,), "f32", DEVICE)
    old = b.jax()
    with b.write("torch") as t:
        t.fill_(3)
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        float(old.sum())
    assert float(b.jax().sum()) == 192


def test_host_values_that_jax_keeps_are_not_shown_again():
    b = rlx.Buffer.zeros((64,), "f32", DEVICE)
    assert np.asarray(b.jax()).sum() == 0  # JAX keeps this host copy in the array
    view = b.torch()
    view.fill_(2)
    assert np.asarray(b.jax()).sum() == 128


def test_steps_in_torch_and_transfers():
    b = rlx.Buffer.zeros((8, 8), "f32", DEVICE)
    b.copy_from(np.arange(64, dtype=np.float32).reshape(8, 8))
    b.update(lambda t: t * 2, framework="torch")
    b[2:4].update(lambda x: x - 1)
    expected = np.arange(64, dtype=np.float32).reshape(8, 8) * 2
    expected[2:4] -= 1
    np.testing.assert_array_equal(b.to_host().numpy(), expected)
    b[0] = 7
    assert float(b.jax()[0].sum()) == 56
    with pytest.raises(rlx.DeviceUnavailableError, match="to_host"):
        b.numpy()
    with pytest.raises(rlx.DeviceUnavailableError, match="to_host"):
        b.host_bytes()
    host = rlx.Buffer.from_array(np.ones((8, 8), np.float32), copy=True)
    assert float(host.to(DEVICE).torch().sum()) == 64


def test_drop_in_donation_is_committed_without_a_copy():
    region = rlx.HandleRegion(DEVICE)
    handles = region.create({"w": ((256, 256), "f32"), "m": ((256, 256), "bf16")})
    addresses = {name: h.address for name, h in handles.items()}
    train = jax.jit(lambda s, x: ({k: v + x for k, v in s.items()}, x * 2), donate_argnums=0)
    with rlx.no_copies():
        for _ in range(5):
            state, _loss = train(rlx.views(handles, "jax"), 1)
            rlx.commit(handles, state)
    assert {name: h.address for name, h in handles.items()} == addresses
    assert handles["w"].torch().unique().tolist() == [5.0]
    region.close()


def test_other_libraries_take_a_buffer_as_it_is():
    b = rlx.Buffer.zeros((16, 4), "f32", DEVICE)
    t = torch.from_dlpack(b)
    assert t.data_ptr() == b.address
    assert jnp.from_dlpack(b).unsafe_buffer_pointer() == b.address
    assert torch.as_tensor(b, device="cuda").data_ptr() == b.address
    assert b.__cuda_array_interface__["shape"] == (16, 4)
    cupy = pytest.importorskip("cupy")
    for theirs in (cupy.from_dlpack(b), cupy.asarray(b)):
        assert theirs.data.ptr == b.address
    theirs[...] = 4
    cupy.cuda.Device().synchronize()
    assert float(b.jax().sum()) == 256


def test_allocation_larger_than_the_card():
    before = rlx.Device(DEVICE).memory().in_use
    with pytest.raises(rlx.OutOfDeviceMemory, match="cuda:0"):
        rlx.Buffer.zeros((1 << 42,), "u8", DEVICE)
    free = rlx.Device(DEVICE).memory().free
    with pytest.raises(rlx.OutOfDeviceMemory, match="free"):
        rlx.Buffer.zeros((free + (1 << 30),), "u8", DEVICE)
    assert rlx.Device(DEVICE).memory().in_use == before


def test_memory_is_freed_after_the_last_view():
    device = rlx.Device(DEVICE)
    before = device.memory().in_use
    b = rlx.Buffer.zeros((1 << 20,), "f32", DEVICE)
    assert device.memory().in_use == before + (4 << 20)
    view = b.jax()
    b.close()
    assert float(view.sum()) == 0
    assert device.memory().in_use == before + (4 << 20)
    del view, b
    jax.block_until_ready(jnp.zeros(()))
    assert device.memory().in_use == before


def test_streams():
    stream = rlx.command_stream(DEVICE)
    assert isinstance(stream, rlx.CommandStream)
    x = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with stream:
        assert torch.cuda.current_stream() == stream.native
        y = x * 2
    stream.wait()
    assert float(y.sum()) == 2 << 20
    stream.launch(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream.wait()


def test_a_device_that_is_not_there():
    with pytest.raises(rlx.DeviceUnavailableError, match="cuda:77"):
        rlx.Buffer.zeros((4,), "f32", "cuda:77")
