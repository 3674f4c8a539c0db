"""Moving bytes on purpose: copy_from, assignment, to and to_host."""

import ml_dtypes
import numpy as np
import pytest

import rlx_driver as rlx

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402

from buffer_support import (  # noqa: E402
    address,
    in_thread,
    is_intact,
    ones,
    reader_in_flight,
    slow_read,
    warm_up,
)
from rlx_driver import dtypes  # noqa: E402

pytestmark = [pytest.mark.jax, pytest.mark.torch]

FRAMEWORKS = ["numpy", "torch", "jax"]
SHARED = [
    row.dtype
    for row in dtypes.TABLE.values()
    if row.jax is not None and row.torch is not None and row.dlpack is not None
    and row.dtype.itemsize <= 4 and hasattr(torch, row.torch)
]  # fmt: skip


def filled(value, shape=(4, 16), dtype=np.float32):
    return rlx.Buffer.from_array(np.full(shape, value, dtype), copy=True)


class Unchanged:
    """Shows that an error left bytes, epoch and views alone."""

    def __init__(self, buffer):
        self.buffer, self.epoch = buffer, buffer.epoch
        self.bytes, self.view = buffer.numpy().tobytes(), buffer.jax()

    def check(self):
        assert self.buffer.epoch == self.epoch
        assert self.buffer.numpy().tobytes() == self.bytes
        assert not self.view.is_deleted()
        assert self.buffer.jax() is self.view


# --- copy_from -------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", SHARED, ids=str)
def test_copy_from_every_framework_and_dtype(framework, dtype):
    source = np.arange(64, dtype=np.uint8).reshape(4, 16) % 2
    source = source.astype(dtype)
    b = rlx.Buffer.zeros((4, 16), dtype)
    n, where = b.numpy(), b.address
    with rlx.ledger.record() as r:
        b.copy_from(rlx.exchange(source, framework, copy=True))
    assert n.tobytes() == source.tobytes()
    assert b.address == where == address(n)
    assert b.epoch == 1
    assert r.counts.reasons["copy_from"].bytes == b.byte_size


@pytest.mark.parametrize("dtype", sorted(dtypes.TABLE))
def test_copy_from_numpy_in_every_dtype(dtype):
    source = np.frombuffer(bytes(range(8)) * 16, np.uint8)
    dt = rlx.dtype(dtype)
    source = (source % 2 if dt.kind == "b" else source)[: 4 * dt.itemsize].view(dt)
    b = rlx.Buffer.zeros(4, dtype)
    b.copy_from(source)
    assert b.numpy().tobytes() == source.tobytes()


def test_the_source_may_be_changed_afterwards():
    b = rlx.Buffer.zeros((512, 512))
    source = np.ones((512, 512), np.float32)
    b.copy_from(source)
    source[...] = 0
    assert (b.numpy() == 1).all()
    t = torch.ones(512, 512)
    b.copy_from(t)
    t.zero_()
    assert (np.asarray(b.jax()) == 1).all()


def test_copy_from_a_pending_jax_array():
    warm_up()
    b = rlx.Buffer.zeros((512, 512))
    b.copy_from(slow_read(jnp.ones((512, 512))) * 3)
    assert (b.numpy() == 3).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda n: n[::2, ::2],
        lambda n: n[::-2, ::-2],
        lambda n: np.asfortranarray(n[:4, :8]),
        lambda n: np.broadcast_to(n[0, :8], (4, 8)),
        lambda n: torch.from_numpy(n)[::2, ::2],
        lambda n: torch.from_numpy(n)[0, :8].expand(4, 8),
        lambda n: torch.from_numpy(n)[:8, :4].T,
        lambda n: jnp.asarray(n)[::2, ::2],
        lambda n: torch.from_numpy(n[:4, :8] * 1j).conj().imag,
    ],
)
def test_copy_from_strided_sources(make):
    source = make(np.arange(128, dtype=np.float32).reshape(8, 16))
    b = rlx.Buffer.zeros((4, 8))
    b.copy_from(source)
    expected = source.resolve_neg().numpy() if isinstance(source, torch.Tensor) else source
    assert np.array_equal(b.numpy(), expected)


def test_copy_from_read_only_and_misaligned_memory():
    raw = np.arange(257, dtype=np.uint8)[1:].view(np.uint8)
    source = raw[: 64 * 4].view(np.float32)
    source.flags.writeable = False
    b = rlx.Buffer.zeros(64)
    b.copy_from(source)
    assert b.numpy().tobytes() == source.tobytes()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_cast_converts_by_value(framework):
    source = rlx.exchange(np.array([1.75, -2.5, 300.0, 0.1], np.float32), framework, copy=True)
    for dtype in ("bf16", "f16", "f64", "i32", "float8_e5m2"):
        b = rlx.Buffer.zeros(4, dtype)
        with pytest.raises(rlx.DTypeError, match=r"cast=True"):
            b.copy_from(source)
        assert b.epoch == 0
        b.copy_from(source, cast=True)
        expected = np.array([1.75, -2.5, 300.0, 0.1], np.float32).astype(b.dtype)
        assert b.numpy().tobytes() == expected.tobytes()


def test_cast_from_narrow_floats_and_between_buffers():
    source = filled(1.5, 8, ml_dtypes.bfloat16)
    b = rlx.Buffer.zeros(8)
    b.copy_from(source, cast=True)
    assert (b.numpy() == 1.5).all()
    b.copy_from(torch.full((8,), 2.5, dtype=torch.bfloat16), cast=True)
    assert (b.numpy() == 2.5).all()
    b.copy_from(jnp.full(8, 3.5, jnp.bfloat16), cast=True)
    assert (b.numpy() == 3.5).all()
    source.copy_from(b, cast=True)
    assert (source.numpy() == 3.5).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (np.zeros((4, 15), np.float32), rlx.ShapeError, r"\(4, 15\).*\(4, 16\)"),
        (np.zeros(16, np.float32), rlx.ShapeError, r"\(16,\)"),  # no broadcasting
        (np.zeros((1, 4, 16), np.float32), rlx.ShapeError, "shape"),
        (np.zeros((4, 16), np.int32), rlx.DTypeError, "int32.*float32.*cast"),
        (np.zeros((4, 16), np.float16), rlx.DTypeError, "float16.*cast"),
    ],
)
def test_what_does_not_fit_changes_nothing(framework, value, error, text):
    b = filled(3)
    unchanged = Unchanged(b)
    for cast in (False, True) if error is rlx.ShapeError else (False,):
        with pytest.raises(error, match=text):
            b.copy_from(rlx.exchange(value, framework, copy=True), cast=cast)
        unchanged.check()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (object(), rlx.UnknownFrameworkError),
        ([1, 2], rlx.UnknownFrameworkError),
        (torch.ones(4, 16, requires_grad=True), rlx.ZeroCopyError),
        (np.full((4, 16), None), rlx.ZeroCopyError),
    ],
    ids=["object", "list", "grad", "object dtype"],
)
def test_what_is_no_value_changes_nothing(value, error):
    b = filled(3)
    unchanged = Unchanged(b)
    with pytest.raises(error):
        b.copy_from(value)
    unchanged.check()


def test_no_copies_refuses_a_transfer_before_any_byte_moves():
    b = filled(3)
    unchanged = Unchanged(b)
    with rlx.no_copies():
        for move in (
            lambda: b.copy_from(np.zeros((4, 16), np.float32)),
            lambda: b.__setitem__(0, np.zeros(16, np.float32)),
            b.to_host,
        ):
            with pytest.raises(rlx.ZeroCopyError, match="no_copies"):
                move()
            unchanged.check()


# --- own memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["buffer", "numpy", "torch"])
@pytest.mark.parametrize("shift", [1, -1])
def test_overlapping_copies_are_right(kind, shift):
    b = rlx.Buffer.from_array(np.arange(64, dtype=np.float32), copy=True)
    to, source = (b[1:], b[:-1]) if shift > 0 else (b[:-1], b[1:])
    expected = source.numpy().copy()
    value = source if kind == "buffer" else source.array(kind)
    to.copy_from(value)
    assert np.array_equal(to.numpy(), expected)


def test_copy_from_a_reversed_own_slice():
    b = rlx.Buffer.from_array(np.arange(64, dtype=np.float32), copy=True)
    b.copy_from(b[::-1])
    assert b.numpy().tolist() == list(range(63, -1, -1))
    b.copy_from(b.numpy()[::-1])
    assert b.numpy().tolist() == list(range(64))


def test_copy_from_itself():
    b = filled(3)
    b.copy_from(b)
    b.copy_from(b.numpy())
    b.copy_from(b.torch())
    assert (b.numpy() == 3).all()


def test_copy_from_the_own_jax_view_changes_nothing():
    b = filled(3)
    j = b.jax()
    with rlx.no_copies():
        b.copy_from(j)
    assert b.epoch == 0
    assert b.jax() is j


def test_copy_from_the_jax_view_of_another_slice():
    b = rlx.Buffer.from_array(np.arange(64, dtype=np.float32).reshape(4, 16), copy=True)
    b[0].copy_from(b[3].jax())
    assert b.numpy()[0].tolist() == list(range(48, 64))
    j = b[1].jax()
    b[2].copy_from(j)
    assert j.is_deleted()
    assert np.array_equal(b.numpy()[2], b.numpy()[1])


def test_copy_from_an_array_computed_from_the_own_jax_view():
    warm_up()
    b = ones()
    b.copy_from(slow_read(b.jax()) * 4)
    assert (b.numpy() == 4).all()
    b.copy_from(b.jax()[::-1] + 1)
    assert (b.numpy() == 5).all()


def test_copy_from_a_dead_jax_view():
    b = filled(3)
    j = b.jax()
    b.update(lambda x: x + 1)
    with pytest.raises((rlx.DriverError, RuntimeError, ValueError)):
        b.copy_from(j)
    assert (b.numpy() == 4).all()
    assert b.epoch == 1


def test_buffers_to_buffers_take_both():
    a, b = filled(1), filled(2)
    a.update(lambda x: x * 5, ordered=False)
    b.copy_from(a)
    assert (b.numpy() == 5).all()
    assert (a.epoch, b.epoch) == (1, 1)
    with a.write("numpy"), pytest.raises(rlx.StaleViewError, match="being written"):
        b.copy_from(a)
    with a.read("numpy"):
        b.copy_from(a)
    b[1].copy_from(a[2])
    b.copy_from(rlx.BufferHandle("h", (4, 16)))
    assert (b.numpy() == 0).all()


def test_copying_waits_for_readers_of_the_destination_only():
    warm_up()
    a, b = ones(), ones()
    ra, rb, ja = reader_in_flight(a.jax()), reader_in_flight(b.jax()), a.jax()
    b.copy_from(a)
    b[...] = 0
    assert is_intact(ra)
    assert is_intact(rb)
    assert not ja.is_deleted()


# --- assignment ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (..., 5),
        (..., 2.5),
        (1, 3.0),
        ((1, 2), 9),
        (slice(1, 3), True),
        ((slice(None), 3), np.float64(4)),
        ((..., -1), np.int8(4)),
        ((slice(None, None, 2), slice(None, None, -3)), 7.0),
        (..., ml_dtypes.bfloat16(1.5)),
    ],
)
def test_a_scalar_fills(key, value):
    b, expected = filled(1), np.full((4, 16), 1, np.float32)
    n, j = b.numpy(), b.jax()
    b[key] = value
    expected[key] = value
    assert np.array_equal(n, expected)
    assert b.epoch == 1
    assert j.is_deleted()
    assert np.array_equal(np.asarray(b.jax()), expected)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_array_is_copied_in(framework):
    b = filled(1)
    n = b.numpy()
    b[2] = rlx.exchange(np.arange(16, dtype=np.float32), framework, copy=True)
    b[0:2, 3] = rlx.exchange(np.array([7, 8], np.float32), framework, copy=True)
    b[3, 3] = rlx.exchange(np.array(9, np.float32), framework, copy=True)
    assert n[2].tolist() == list(range(16))
    assert n[:2, 3].tolist() == [7, 8]
    assert n[3, 3] == 9
    assert b.epoch == 3


def test_a_buffer_is_copied_in():
    b, c = filled(1), filled(2, 16)
    b[1] = c
    b[2] = b[1]
    assert b.numpy()[:, 0].tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("dtype", sorted(dtypes.TABLE))
def test_a_scalar_in_every_dtype(dtype):
    b = rlx.Buffer.zeros(4, dtype)
    b[...] = 1
    expected = np.empty(4, b.dtype)
    expected[...] = 1
    assert b.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("u8", 300), ("u8", -1), ("f32", 1j), ("i32", 2**40), ("i8", np.int64(200))],
)
def test_a_scalar_that_does_not_fit_changes_nothing(dtype, value):
    b = filled(3, (4, 16), rlx.dtype(dtype))
    before = b.numpy().tobytes()
    with pytest.raises(rlx.DTypeError, match=r"does not fit.*Nothing was changed"):
        b[...] = value
    assert b.numpy().tobytes() == before
    assert b.epoch == 0


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        (7, 1.0, IndexError),
        ([0, 1], 1.0, rlx.DTypeError),
        (0, np.zeros(15, np.float32), rlx.ShapeError),
        (0, np.zeros(16, np.int32), rlx.DTypeError),
        (0, "text", rlx.UnknownFrameworkError),
        (0, [1.0] * 16, rlx.UnknownFrameworkError),
        (0, None, rlx.UnknownFrameworkError),
    ],
)
def test_an_assignment_that_does_not_fit_changes_nothing(key, value, error):
    b = filled(3)
    unchanged = Unchanged(b)
    with pytest.raises(error):
        b[key] = value
    unchanged.check()


# --- devices ---------------------------------------------------------------------------------


def test_to_the_own_device_is_the_buffer_itself():
    b = filled(3)
    assert b.to("cpu") is b
    assert b.to(rlx.Device("cpu")) is b
    assert b[1].to("cpu").shape == (16,)


def test_to_a_device_that_is_not_there():
    b = filled(3)
    with pytest.raises(rlx.DeviceUnavailableError, match="fpga"):
        b.to("fpga")
    assert b.epoch == 0


def test_to_host_is_a_copy_of_its_own():
    b = filled(3, (4, 16), ml_dtypes.bfloat16)
    b.update(lambda x: x + 1, ordered=False)
    with rlx.ledger.record() as r:
        host = b.to_host()
    assert (host.shape, host.dtype, host.epoch) == (b.shape, b.dtype, 0)
    assert host.address != b.address
    assert host.address % 256 == 0
    assert (host.numpy() == 4).all()
    assert r.counts.reasons["to_host"].bytes == b.byte_size
    host[...] = 9
    assert (b.numpy() == 4).all()
    assert b.epoch == 1


def test_to_host_of_a_strided_slice_is_compact():
    b = rlx.Buffer.from_array(np.arange(64, dtype=np.float32).reshape(4, 16), copy=True)
    for key in (np.s_[:, 3], np.s_[::-1, ::2], np.s_[1:1], np.s_[2, 3]):
        host = b[key].to_host()
        assert host.is_contiguous
        assert np.array_equal(host.numpy(), b.numpy()[key])


def test_transfers_from_another_thread_see_finished_bytes():
    warm_up()
    b = ones()
    b.update(lambda x: x + slow_read(x), ordered=False)
    assert (in_thread(b.to_host).numpy() == 2).all()
