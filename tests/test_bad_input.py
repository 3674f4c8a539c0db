"""Bad input that was once taken: each of these was silent, or an error of somebody else's."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import rlx_driver as rlx


@pytest.mark.jax
@pytest.mark.parametrize("dtype", ["i64", "u64", "f64", "c128", "int4", "float4_e2m1fn"])
def test_a_region_that_jax_owns_refuses_what_jax_would_change(dtype):
    pytest.importorskip("jax")
    with rlx.HandleRegion("cpu", backend="jax") as region:
        with pytest.raises(rlx.ZeroCopyError):
            region.create({"a": ((4,), "f32"), "x": ((1024,), dtype)})
        assert len(region) == 0
        with pytest.raises(rlx.ZeroCopyError):
            rlx.BufferHandle("x", (4,), dtype, region=region).numpy()


def test_a_numpy_step_on_an_array_without_axes():
    z = rlx.Buffer.zeros((), "f32")
    z.update(lambda x: x + 1, framework="numpy")
    rlx.update({"s": z}, lambda s: {"s": s["s"] + 1}, framework="numpy")
    assert z.numpy() == 2
    with pytest.raises(rlx.DTypeError, match="float64"):
        z.update(lambda x: np.float64(x), framework="numpy")
    assert z.numpy() == 2


@pytest.mark.torch
def test_memory_whose_elements_overlap_is_no_buffer():
    torch = pytest.importorskip("torch")
    for x in (torch.zeros(1).expand(4), torch.zeros(4).as_strided((3, 2), (1, 1))):
        with pytest.raises(rlx.ZeroCopyError, match="share memory"):
            rlx.Buffer.from_array(x, copy=False)
        b = rlx.Buffer.from_array(x)
        assert any("share memory" in reason for reason in rlx.ledger.reasons)
        value = np.arange(x.numel(), dtype=np.float32).reshape(tuple(x.shape))
        b.copy_from(value)
        np.testing.assert_array_equal(b.numpy(), value)
    assert rlx.Buffer.from_array(torch.zeros(4, 4)[:, ::2], copy=False).shape == (4, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1 << 40])
def test_a_number_that_does_not_fit_changes_nothing(value):
    b = rlx.Buffer.zeros(3, "i32")
    with pytest.raises(rlx.DTypeError, match="does not fit"):
        b[...] = value
    assert b.epoch == 0
    assert (b.numpy() == 0).all()


def test_arrays_without_axes_fill():
    b = rlx.Buffer.zeros(3)
    b[...] = np.array(2, np.float32)
    assert (b.numpy() == 2).all()
    with pytest.raises(rlx.DriverError):
        b[...] = np.array(2, np.float64)


@pytest.mark.torch
def test_errors_do_not_invent_a_dtype():
    torch = pytest.importorskip("torch")
    with pytest.raises(rlx.ZeroCopyError, match="float32"):
        rlx.exchange(torch.ones(3, requires_grad=True), "numpy")


@pytest.mark.jax
def test_static_arguments():
    pytest.importorskip("jax")
    b = rlx.Buffer.from_array(np.ones(3, np.float32), copy=True)
    b.update(lambda x, n: x * n, 2, static_argnums=[1])
    assert (b.numpy() == 2).all()
    with pytest.raises(rlx.ShapeError, match="the state"):
        b.update(lambda x, n: x, 2, static_argnums=0)


@pytest.mark.parametrize("entry", ["f32", (4,), None, ((4,), "f32", 1)])
def test_a_region_wants_pairs(entry):
    with rlx.HandleRegion() as region:
        with pytest.raises(rlx.ShapeError, match="pair"):
            region.create({"q": entry})
        assert len(region) == 0


def test_regions_do_not_pickle():
    with pytest.raises(rlx.DTypeError, match="does not pickle"):
        pickle.dumps(rlx.HandleRegion())


def test_a_closed_buffer_has_no_address():
    b = rlx.Buffer.zeros(3)
    b.close()
    with pytest.raises(rlx.ClosedHandleError):
        _ = b.address
