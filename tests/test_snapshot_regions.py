"""Files of handles: under their names, with their dtypes, from anybody and for everybody."""

import os
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver import HandleRegion, SnapshotError, _snapshot_file
from rlx_driver.backends.facts import Obstacle
from rlx_driver.dtypes import TABLE
from rlx_driver.testing import FakeDevice
from snapshot_support import fill_handle, is_mapped, names, pattern, raw_file, read_header

safetensors = pytest.importorskip("safetensors")
jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

from buffer_support import SIDE, start  # noqa: E402

pytestmark = [pytest.mark.jax, pytest.mark.torch]

WEIGHTS = Path(__file__).resolve().parent.parent / "examples" / "data" / "tiny_gpt.safetensors"
# The format has no complex128.
SHARED = [dt for dt, info in TABLE.items() if info.torch and dt != np.complex128]


@pytest.fixture
def tpu(monkeypatch):
    """A device kind that JAX serves and nothing else sees."""
    from rlx_driver.backends import jax as backend

    monkeypatch.setitem(backend._PLATFORM, "tpu", "cpu")
    return rlx.Device("tpu")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so small that everything crosses their borders."""
    monkeypatch.setattr(_snapshot_file, "CHUNK", 100)


@pytest.fixture
def region():
    with HandleRegion() as made:
        made.create(
            {
                "w": ((16, 16), "f32"),
                "odd": ((3, 5), "bf16"),
                "scale": ((), "f32"),
                "f8": ((128,), "float8_e4m3fn"),
                "none": ((0, 4), "i32"),
                "packed": ((7,), "int4"),
            }
        )
        for seed, handle in enumerate(made):
            fill_handle(handle, seed)
        yield made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "r.safetensors"


def contents(region):
    """Give what is in a region, as bytes by name."""
    return {handle.name: handle.to_host().numpy().tobytes() for handle in region}


def specs(region):
    return {handle.name: (handle.dtype, handle.shape) for handle in region}


# --- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_every_handle_comes_back(region, path, small_chunks, mmap):
    region.save(path)
    with HandleRegion.load(path, mmap=mmap) as loaded:
        assert specs(loaded) == specs(region)
        assert contents(loaded) == contents(region)
        assert [handle.epoch for handle in loaded] == [0] * 6
        assert loaded["w"].region is loaded
        loaded["w"].update(jax.numpy.zeros_like)
        assert not loaded["w"].numpy().any()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dt", TABLE, ids=str)
def test_every_dtype_comes_back(path, dt, mmap):
    with HandleRegion() as region:
        handle = region.create({"x": ((4, 16), dt), "y": ((3,), dt)})["x"]
        fill_handle(handle)
        region.save(path)
        with HandleRegion.load(path, mmap=mmap) as loaded:
            assert specs(loaded) == specs(region)
            assert contents(loaded) == contents(region)
            assert loaded["x"].numpy().tobytes() == handle.numpy().tobytes()


@pytest.mark.parametrize("dt", SHARED, ids=str)
def test_torch_reads_the_file_as_what_it_is(path, dt):
    from safetensors.torch import load_file

    with HandleRegion() as region:
        handle = region.create({"x": ((4, 16), dt)})["x"]
        raw = fill_handle(handle)
        region.save(path)
    tensor = load_file(path)["x"]
    assert tensor.dtype == rlx.dtypes.torch_dtype(dt)
    assert tensor.shape == (4, 16)
    assert tensor.view(torch.uint8).numpy().tobytes() == raw.tobytes()


@pytest.mark.parametrize("dt", [np.complex128, ml_dtypes.float8_e3m4, ml_dtypes.int4], ids=str)
def test_a_dtype_that_the_format_lacks_is_bytes_for_other_tools(path, dt):
    from safetensors.numpy import load_file

    with HandleRegion() as region:
        raw = fill_handle(region.create({"x": ((4, 16), dt)})["x"])
        region.save(path)
    array = load_file(path)["x"]
    assert array.dtype == np.uint8
    assert array.tobytes() == raw.tobytes()


@pytest.mark.parametrize("dt", SHARED, ids=str)
def test_files_of_torch_are_read(path, dt):
    from safetensors.torch import save_file

    raw = pattern(64 * dt.itemsize) & (1 if dt == np.bool_ else 255)
    tensor = torch.from_numpy(raw).view(rlx.dtypes.torch_dtype(dt)).reshape(8, 8)
    save_file({"a.b": tensor}, path, metadata={"format": "pt"})
    with HandleRegion.load(path) as region:
        assert specs(region) == {"a.b": (dt, (8, 8))}
        assert region["a.b"].numpy().tobytes() == raw.tobytes()


@pytest.mark.parametrize("mmap", [False, True])
def test_weights_go_straight_into_handles(mmap):
    from safetensors.numpy import load_file

    expected = load_file(WEIGHTS)
    with HandleRegion.load(WEIGHTS, mmap=mmap) as region:
        assert {handle.name for handle in region} == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(region[name].numpy(), array)
            assert region[name].torch().shape == array.shape


def test_elements_of_less_than_a_byte_come_as_bytes(path):
    entry = {"dtype": "F4", "shape": [2, 8], "data_offsets": [0, 8]}
    raw_file(path, {"x": entry}, bytes(range(8)))
    with HandleRegion.load(path) as region:
        assert specs(region) == {"x": (np.uint8, (8,))}
        assert region["x"].numpy().tolist() == list(range(8))


def test_an_empty_region_comes_back(path):
    with HandleRegion() as region:
        region.save(path)
    with HandleRegion.load(path) as loaded:
        assert len(loaded) == 0
        loaded.restore(path)


def test_handles_not_used_so_far_are_zeros_in_the_file(path):
    with HandleRegion() as region:
        rlx.BufferHandle("late", (5,), "f32", region=region)
        region.save(path)
    with HandleRegion.load(path) as loaded:
        assert loaded["late"].numpy().tolist() == [0] * 5


def test_handles_of_several_allocations_are_one_file(region, path):
    extra = rlx.BufferHandle("extra", (70,), "i64", region=region)
    fill_handle(extra, 9)
    region.save(path)
    with HandleRegion.load(path) as loaded:
        assert contents(loaded) == contents(region)


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_name_that_a_file_cannot_have_is_refused(path, name):
    with HandleRegion() as region:
        region.create({"fine": ((2,), "f32"), name: ((2,), "f32")})
        with pytest.raises(SnapshotError, match="Nothing was written"):
            region.save(path)
    assert names(path.parent) == []


# --- mapped --------------------------------------------------------------------------------------


def test_aligned_handles_are_mapped_and_the_others_read(region, path):
    region.save(path)
    kept = path.read_bytes()
    rlx.ledger.reset()
    with HandleRegion.load(path, mmap=True) as loaded:
        mapped = {handle.name for handle in loaded if is_mapped(handle.address, path)}
        assert {"w", "f8"} <= mapped
        _, begin = read_header(path)
        assert begin % 256 == 0
        read = sum(h.byte_size for h in loaded if h.name not in mapped)
        assert rlx.ledger.bytes_copied == read < region.byte_size
        assert all(handle.address % 64 == 0 for handle in loaded)
        assert loaded["none"].numpy().shape == (0, 4)
        entries = rlx.memory_report("cpu").entries
        assert "shared" in {entry.state for entry in entries if entry.name == "w"}
        with rlx.no_copies():
            place = loaded["w"].address
            loaded["w"].update(jax.numpy.ones_like)
            assert loaded["w"].address == place
            assert loaded["w"].jax().unsafe_buffer_pointer() == place
        loaded["f8"].torch().fill_(1)
        path.unlink()
        assert (loaded["w"].torch() == 1).all()
        path.write_bytes(kept)
    with HandleRegion.load(path, mmap=True) as again:
        assert contents(again) == contents(region)


def test_a_file_of_even_handles_is_mapped_whole(path):
    with HandleRegion() as region:
        region.create({f"h{i}": ((64 * (i + 1),), "u8") for i in range(5)})
        region.save(path)
    with rlx.no_copies(), HandleRegion.load(path, mmap=True) as loaded:
        assert all(is_mapped(handle.address, path) for handle in loaded)
    with rlx.no_copies(), rlx.no_leaks(), pytest.raises(rlx.ZeroCopyError, match="load"):
        HandleRegion.load(path)


def test_memory_that_jax_owns_is_read(region, path):
    region["packed"].close()  # JAX cannot own it
    region.save(path)
    with HandleRegion.load(path, backend="jax", mmap=True) as loaded:
        assert contents(loaded) == contents(region)
        assert not any(is_mapped(handle.address, path) for handle in loaded)
        loaded["w"].update(lambda x: x + 1)
        loaded.save(path)
    with HandleRegion.load(path) as again:
        np.testing.assert_array_equal(again["odd"].numpy(), region["odd"].numpy())


# --- restored ------------------------------------------------------------------------------------


def test_restoring_keeps_addresses_and_shows_in_views(region, path, small_chunks):
    before = contents(region)
    region.save(path)
    places = {handle.name: handle.address for handle in region}
    for handle in region:
        fill_handle(handle, 50)
    view, old = region["w"].torch(), region["w"].jax()
    saved = torch.ones(16, 16, requires_grad=True)
    loss = (saved * view).sum()
    region.restore(path)
    assert contents(region) == before
    assert {handle.name: handle.address for handle in region} == places
    assert view.numpy().tobytes() == before["w"]
    assert old.is_deleted()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_handles_that_the_file_does_not_name_are_left_alone(region, path):
    region.save(path)
    extra = rlx.BufferHandle("extra", (3,), "f32", region=region)
    extra.numpy()[:] = 5
    epoch = extra.epoch
    region.restore(path)
    assert (extra.numpy() == 5).all()
    assert extra.epoch == epoch


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ({"a": ((4,), "f32")}, rlx.UnboundNameError, "'b'"),
        ({"a": ((4,), "f32"), "b": ((5,), "f32")}, rlx.ShapeError, "'b'"),
        ({"a": ((4,), "f32"), "b": ((4,), "i32")}, rlx.DTypeError, "'b'"),
    ],
)
def test_what_does_not_fit_changes_nothing(path, spec, error, text):
    with HandleRegion() as region:
        region.create({"a": ((4,), "f32"), "b": ((4,), "f32")})
        region.save(path)
    with HandleRegion() as region:
        made = region.create(spec)
        made["a"].numpy()[:] = 7
        with pytest.raises(error, match=text) as raised:
            region.restore(path)
        assert "Nothing was changed" in str(raised.value)
        assert (made["a"].numpy() == 7).all()
        assert made["a"].epoch == 0


def test_restoring_inside_no_copies_changes_nothing(region, path):
    region.save(path)
    fill_handle(region["w"], 50)
    before = contents(region)
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError, match="restore"):
        region.restore(path)
    assert contents(region) == before


def test_an_alias_that_blocks_the_fence_stops_a_restore(region, path):
    region.save(path)
    fill_handle(region["w"], 50)
    alias = np.asarray(region["w"].jax())
    before = contents(region)
    with pytest.raises(rlx.ZeroCopyError):
        region.restore(path)
    assert contents(region) == before
    del alias
    region.restore(path)
    assert contents(region) != before


# --- order, and all or nothing -------------------------------------------------------------------


def test_saving_waits_for_an_update_under_way(path):
    with HandleRegion() as region:
        handle = region.create({"x": ((SIDE, SIDE), "f32")})["x"]
        handle.numpy()[...] = 1

        def slow(x):
            for _ in range(20):
                x = (x @ x) * (1 / SIDE)
            return x + 1

        handle.update(slow, ordered=False)
        region.save(path)
    with HandleRegion.load(path) as loaded:
        assert (loaded["x"].numpy() == 2).all()


def test_nobody_writes_through_the_driver_meanwhile(region, path, small_chunks):
    before = contents(region)
    begun = []

    def during(done, total):
        if done and not begun:
            begun.append(start(fill_handle, region["w"], 99))
            with pytest.raises(TimeoutError):
                begun[0].result(timeout=0.2)

    region.save(path, progress=during)
    begun[0].result(timeout=60)
    assert contents(region) != before
    with HandleRegion.load(path) as loaded:
        assert contents(loaded) == before


def test_saving_waits_for_a_writer(region, path):
    entered, leave = threading.Event(), threading.Event()

    def write():
        with region["w"].write("numpy") as view:
            entered.set()
            leave.wait(60)
            view[...] = 3

    writing = start(write)
    assert entered.wait(60)
    saving = start(region.save, path)
    with pytest.raises(TimeoutError):
        saving.result(timeout=0.1)
    leave.set()
    writing.result(timeout=60)
    saving.result(timeout=60)
    with HandleRegion.load(path) as loaded:
        assert (loaded["w"].numpy() == 3).all()


@pytest.mark.parametrize("mmap", [False, True])
def test_a_failure_while_it_is_read_leaves_nothing(region, path, mmap):
    region.save(path)

    made = []

    def broken(done, total):
        if done == total:
            made.extend(h for h in rlx.open_handles() if h.region is not region)
            raise KeyboardInterrupt

    known = rlx.memory_report("cpu")["cpu"].reserved
    with rlx.no_leaks(), pytest.raises(KeyboardInterrupt):
        HandleRegion.load(path, mmap=mmap, progress=broken)
    assert len(made) == 6
    assert all(handle.is_closed for handle in made)
    made.clear()
    assert rlx.memory_report("cpu")["cpu"].reserved == known


def test_a_failed_save_leaves_the_old_file(region, path, monkeypatch):
    region.save(path)
    kept = path.read_bytes()
    fill_handle(region["w"], 50)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        region.save(path)
    assert path.read_bytes() == kept
    assert names(path.parent) == [path.name]


def test_a_file_that_is_cut_short_while_it_is_read_says_so(region, path, small_chunks):
    region.save(path)

    def cut(done, total):
        if done:
            os.truncate(path, read_header(path)[1] + 150)

    with rlx.no_leaks(), pytest.raises(SnapshotError, match="cut short"):
        HandleRegion.load(path, progress=cut)


def test_a_dtype_that_the_device_lacks_is_refused(path, monkeypatch):
    with HandleRegion() as region:
        region.create({"x": ((4,), "int4")})
        region.save(path)
    with FakeDevice() as fake, rlx.no_leaks():
        obstacle = Obstacle("dtype", "it has no int4", "convert it", False)
        monkeypatch.setattr(type(fake.device.backend), "obstacle", lambda *_: obstacle)
        with pytest.raises(rlx.DTypeError, match=r"'x'.*has no int4"):
            HandleRegion.load(path, fake.device)


# --- other memory --------------------------------------------------------------------------------


def test_memory_off_the_host_goes_by_chunks(region, path, small_chunks):
    region["packed"].close()
    region.save(path)
    with FakeDevice() as fake, HandleRegion.load(path, fake.device) as there:
        assert contents(there) == contents(region)
        there["w"].update(lambda x: x + 1, framework="fake_functional")
        expected = contents(there)
        rlx.ledger.reset()
        there.save(path)
        assert rlx.ledger.reasons["save"].bytes == there.byte_size
        there["w"][...] = 0.0
        there.restore(path)
        assert contents(there) == expected
    with HandleRegion.load(path) as back:
        assert contents(back) == expected


def test_off_the_host_saving_comes_after_work_of_other_streams(path):
    with FakeDevice(on_host_wait="release") as fake:
        with HandleRegion(fake.device) as region:
            handle = region.create({"x": ((16,), "f32")})["x"]
            side = fake.stream("side")
            side.hold()
            with side, handle.write("fake") as inside:
                inside.fill_(3)
            region.save(path)
        with HandleRegion.load(path) as loaded:
            assert (loaded["x"].numpy() == 3).all()


def test_memory_without_views_is_saved_loaded_and_restored(tpu, path, small_chunks):
    with HandleRegion(tpu) as region:
        region.create({"x": ((4, 16), "bf16"), "y": ((3,), "f32"), "z": ((0,), "f32")})
        fill_handle(region["x"])
        region["y"].update(lambda y: y + 2)
        before = contents(region)
        region.save(path)
        region["x"].update(lambda x: x * 0)
        region.restore(path)
        assert contents(region) == before
    with HandleRegion.load(path, tpu) as loaded:
        assert contents(loaded) == before
    with HandleRegion.load(path) as loaded:
        assert contents(loaded) == before


# --- progress ------------------------------------------------------------------------------------


def test_progress_is_told_from_nothing_to_all(region, path, small_chunks, capsys):
    for work in (
        lambda tell: region.save(path, progress=tell),
        lambda tell: region.restore(path, progress=tell),
        lambda tell: HandleRegion.load(path, progress=tell).close(),
        lambda tell: HandleRegion.load(path, mmap=True, progress=tell).close(),
    ):
        told = []
        work(lambda *both, told=told: told.append(both))
        done = [one for one, _ in told]
        assert done[0] == 0
        assert done[-1] == region.byte_size
        assert done == sorted(done)
        assert {total for _, total in told} == {region.byte_size}
    assert capsys.readouterr().out == ""
    region.restore(path, progress=True)
    assert "restoring" in capsys.readouterr().out
