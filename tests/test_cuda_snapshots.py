"""Snapshots of arenas and handles on a CUDA device, by chunks. Needs a GPU."""

import numpy as np
import pytest

import rlx_driver as rlx
from arena_support import small_plan
from rlx_driver import Arena, HandleRegion, _snapshot_file
from snapshot_support import fill_handle, pattern, rich_plan, same_plan

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
pytest.importorskip("safetensors")

pytestmark = pytest.mark.cuda
DEVICE = "cuda:0"


@pytest.fixture(params=[100, 256, 32 << 20], ids=["odd", "even", "one"])
def chunk(request, monkeypatch):
    """How much goes at a time."""
    monkeypatch.setattr(_snapshot_file, "CHUNK", request.param)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def image(arena):
    """Give all bytes of an arena, on the host."""
    return np.frombuffer(b"".join(arena.read(n, "u8").tobytes() for n in arena.plan.nodes), "u1")


@pytest.mark.parametrize("make", [small_plan, rich_plan])
def test_an_arena_goes_there_and_back(path, chunk, make):
    with Arena(make(), DEVICE) as arena:
        for seed, node in enumerate(arena.plan.nodes):
            arena.write(
                node,
                pattern(arena.plan.interval(node).size, seed)
                .view(arena.read(node).dtype)[: arena.read(node).size]
                .reshape(arena.read(node).shape),
            )
        before = image(arena)
        rlx.ledger.reset()
        arena.save(path)
        assert rlx.ledger.reasons["save"].bytes == arena.size_bytes
    for device in (DEVICE, "cpu"):
        with Arena.load(path, device=device) as loaded:
            assert str(loaded.device) == device
            assert same_plan(loaded.plan, make())
            np.testing.assert_array_equal(image(loaded), before)


def test_a_debug_arena_goes_there_and_back(path):
    with Arena(small_plan(), DEVICE, debug=True) as arena:
        arena["b"] = np.arange(256, dtype=np.float32)
        arena.save(path)
    with Arena.load(path, device=DEVICE, debug=True) as loaded:
        assert loaded.read("b").tolist() == list(range(256))
        loaded.check()


def test_a_loaded_arena_is_seen_by_torch_and_jax_at_once(path):
    plan = rlx.plan_memory([rlx.Interval("x", 4 << 20, 0, 1, dtype="f32", shape=(1 << 20,))])
    with Arena(plan) as arena:
        arena["x"] = np.arange(1 << 20, dtype=np.float32)
        arena.save(path)
    with Arena.load(path, device=DEVICE) as loaded:
        assert float(loaded.buffer("x").jax()[-1]) == (1 << 20) - 1
        loaded.buffer("x").update(lambda x: x + 1)
        assert loaded.view("x")[0].item() == 1
        with torch.cuda.stream(torch.cuda.Stream()):
            loaded.buffer("x").torch().mul_(2)
            loaded.save(path)
    with Arena.load(path) as back:
        np.testing.assert_array_equal(back.read("x"), (np.arange(1 << 20) + 1.0) * 2)


SPEC = {
    "w": ((33, 7), "f32"),
    "bf": ((16, 16), "bf16"),
    "e4": ((100,), "float8_e4m3fn"),
    "e5": ((64, 3), "float8_e5m2"),
    "e8": ((5,), "float8_e8m0fnu"),
    "flags": ((9,), "bool"),
    "i": ((), "i64"),
    "none": ((0, 2), "f32"),
}


def contents(region):
    return {handle.name: handle.to_host().numpy().tobytes() for handle in region}


def test_handles_go_there_and_back(path, chunk):
    with HandleRegion(DEVICE) as region:
        for seed, handle in enumerate(region.create(SPEC).values()):
            fill_handle(handle, seed)
        before = contents(region)
        rlx.ledger.reset()
        region.save(path)
        assert rlx.ledger.reasons["save"].bytes == region.byte_size
        places = {handle.name: handle.address for handle in region}
        for handle in region:
            fill_handle(handle, 77)
        view = region["bf"].torch()
        region.restore(path)
        assert contents(region) == before
        assert {handle.name: handle.address for handle in region} == places
        assert view.cpu().view(torch.uint8).numpy().tobytes() == before["bf"]
    for device in (DEVICE, "cpu"):
        with HandleRegion.load(path, device) as loaded:
            assert contents(loaded) == before
            assert {h.name: (h.shape, h.dtype) for h in loaded} == {
                name: (shape, rlx.dtype(dt)) for name, (shape, dt) in SPEC.items()
            }


def test_saving_comes_after_updates_and_work_of_other_streams(path):
    with HandleRegion(DEVICE) as region:
        handle = region.create({"x": ((4096, 4096), "f32")})["x"]

        def slow(x):
            for _ in range(20):
                x = x @ x * 1e-4
            return x * 0 + 3

        with handle.write("torch") as t:
            t.fill_(0.01)
        handle.update(slow, ordered=False)
        region.save(path)
        with HandleRegion.load(path, mmap=True) as host:
            assert (host["x"].numpy() == 3).all()
        with torch.cuda.stream(torch.cuda.Stream()), handle.write("torch") as t:
            for _ in range(20):
                t.copy_(t @ t * 1e-4)
            t.fill_(5)
        region.save(path)
        with HandleRegion.load(path, mmap=True) as host:
            assert (host["x"].numpy() == 5).all()


def test_a_restore_waits_for_readers_in_flight(path):
    with HandleRegion(DEVICE) as region:
        handle = region.create({"x": ((4096, 4096), "f32")})["x"]
        handle[...] = 7.0
        region.save(path)
        handle[...] = 1.0

        @jax.jit
        def read(x):
            y = x
            for _ in range(20):
                y = y @ x * (1 / 4096)
            return y

        jax.block_until_ready(read(handle.jax()))
        result = read(handle.jax())
        region.restore(path)
        assert (np.asarray(result) == 1).all()
        assert (handle.to_host().numpy() == 7).all()


def test_a_dtype_that_torch_lacks_is_refused_there(path):
    with HandleRegion() as region:
        region.create({"x": ((4,), "int4")})
        region.save(path)
    with rlx.no_leaks(), pytest.raises(rlx.DTypeError, match="'x'"):
        HandleRegion.load(path, DEVICE)
