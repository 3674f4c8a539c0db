"""The chunks of typed I/O on CUDA, with an engine on the host that does its work as late as it may.

What is enqueued is run only when somebody waits for an event, so memory that is used again too
early shows wrong values.
"""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

import rlx_driver as rlx
from typed_support import DTYPES, INTEGERS, assert_same, expected, random_values

torch = pytest.importorskip("torch")

from rlx_driver.backends import _cuda_staging as staging  # noqa: E402
from rlx_driver.backends import _cuda_transfers as transfers  # noqa: E402
from rlx_driver.backends import _torch_typed as typed  # noqa: E402
from rlx_driver.backends._torch_casts import device_reader, device_writer  # noqa: E402

HOST = torch.device("cpu")
CHUNK = 4096


class Marker:
    def __init__(self, engine, position):
        self.engine, self.position = engine, position

    def synchronize(self):
        self.engine.log.append("wait")
        self.engine.run_until(self.position)


class LateEngine:
    """A stream that does nothing before it is waited for."""

    def __init__(self, fail_at=None, locked=None):
        self.log = []
        self.work = []
        self.done = 0
        self.calls = itertools.count()
        self.fail_at = fail_at
        self.locked = locked
        self.running = threading.Lock()  # a thread may wait for a lane of another's engine

    def _call(self, name):
        self.log.append(name)
        if next(self.calls) == self.fail_at:
            raise RuntimeError("failed on purpose")

    def pinned(self, nbytes):
        if self.locked is not None:
            if self.locked == 0:
                raise RuntimeError("no memory to lock")
            self.locked -= 1
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    def scratch(self, nbytes):
        return torch.full((nbytes,), 0xBB, dtype=torch.uint8)

    def copy(self, target, source):
        assert target.shape == source.shape
        assert target.dtype == source.dtype
        self._call("copy")
        self.work.append(lambda: target.copy_(source))

    def launch(self, work, *args):
        self._call("launch")
        self.work.append(lambda: work(*args))

    def record(self):
        self.log.append("record")
        return Marker(self, len(self.work))

    def run_until(self, position):
        with self.running:
            while self.done < position:
                self.work[self.done]()
                self.done += 1

    def finish(self):
        self.run_until(len(self.work))


def casts(dtype, side):
    """The device's cast, and the host's, which is what None means."""
    make = device_writer if side == "write" else device_reader
    found = make(dtype, HOST)
    return [None] if found is None else [found, None]


COUNTS = [1, CHUNK // 8 - 1, CHUNK // 4, CHUNK // 4 + 1, 5 * CHUNK // 4, 40_003]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", ["bf16", "f8_e4m3fn", "i32", "c128", "int4", "u64"])
def test_a_write_is_right_when_the_device_is_late(dtype, count):
    dtype = rlx.dtype(dtype)
    values = random_values(count)[:count]
    wanted = expected(dtype, values)
    for cast in casts(dtype, "write"):
        for start in (0, 1):
            engine, pool = LateEngine(), staging.Pool(CHUNK)
            raw = torch.full((wanted.nbytes + 9,), 0xEE, dtype=torch.uint8)
            source = values.copy()
            part = raw[start : start + wanted.nbytes]
            transfers.write_through(engine, pool, part, dtype, source, cast)
            source[:] = np.nan  # the caller may change it now
            engine.finish()
            assert_same(np.frombuffer(part.numpy().tobytes(), dtype), wanted)
            rest = [*raw[:start].tolist(), *raw[start + wanted.nbytes :].tolist()]
            assert set(rest) == {0xEE}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", ["bf16", "f8_e4m3fn", "i32", "c128", "int4", "u64"])
def test_a_read_is_right_when_the_device_is_late(dtype, count):
    dtype = rlx.dtype(dtype)
    stored = expected(dtype, random_values(count)[:count])
    with np.errstate(all="ignore"):
        wanted = stored.real.astype(np.float32)
    for cast in casts(dtype, "read"):
        for start in (0, 1):
            engine, pool = LateEngine(), staging.Pool(CHUNK)
            raw = torch.zeros(stored.nbytes + start, dtype=torch.uint8)[start:]
            engine.work.append(
                lambda raw=raw: raw.copy_(torch.from_numpy(stored.view(np.uint8).copy()))
            )  # earlier work of the stream
            out = np.full(count, 7, np.float32)
            transfers.read_through(engine, pool, raw, dtype, out, cast)
            assert_same(out, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_goes_through_chunks(dtype):
    values = random_values(2000)
    wanted = expected(dtype, values)
    for cast in casts(dtype, "write"):
        engine = LateEngine()
        raw = torch.zeros(wanted.nbytes, dtype=torch.uint8)
        transfers.write_through(engine, staging.Pool(CHUNK), raw, dtype, values, cast)
        engine.finish()
        assert_same(raw.numpy().view(dtype), wanted)
    with np.errstate(all="ignore"):
        back = wanted.real.astype(np.float32)
    for cast in casts(dtype, "read"):
        out = np.zeros(values.size, np.float32)
        transfers.read_through(LateEngine(), staging.Pool(CHUNK), raw, dtype, out, cast)
        assert_same(out, back)
    out = np.zeros(values.size, np.float32)
    transfers.read_pinned(LateEngine(), raw, dtype, out, device_reader(dtype, HOST))
    assert_same(out, back)


def test_values_in_pinned_memory_are_not_staged(monkeypatch):
    monkeypatch.setattr(staging, "DIRECT_CHUNK", CHUNK)
    dtype = rlx.dtype("f8_e4m3fn")
    values = random_values(5000)
    wanted = expected(dtype, values)
    engine = LateEngine()
    raw = torch.zeros(wanted.nbytes, dtype=torch.uint8)
    source = values.copy()
    transfers.write_pinned(engine, raw, dtype, source, device_writer(dtype, HOST))
    source[:] = np.nan
    assert_same(raw.numpy().view(dtype), wanted)
    parts = -(-values.size // (CHUNK // 4))
    assert engine.log == ["copy", "launch"] * parts + ["record", "wait"]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", ["bf16", "f8_e4m3fn", "i32", "c128", "int4", "u64"])
def test_values_for_pinned_memory_are_not_staged(monkeypatch, dtype, count):
    monkeypatch.setattr(staging, "DIRECT_CHUNK", CHUNK)
    dtype = rlx.dtype(dtype)
    stored = expected(dtype, random_values(count)[:count])
    for start in (0, 1):
        engine = LateEngine()
        raw = torch.zeros(stored.nbytes + start, dtype=torch.uint8)[start:]
        engine.work.append(
            lambda raw=raw: raw.copy_(torch.from_numpy(stored.view(np.uint8).copy()))
        )  # earlier work of the stream
        out = np.full(count + 2, 7, np.float32)
        transfers.read_pinned(engine, raw, dtype, out[1:-1], device_reader(dtype, HOST))
        with np.errstate(all="ignore"):
            assert_same(out[1:-1], stored.real.astype(np.float32))
        assert (out[0], out[-1]) == (7, 7)
        assert engine.log[-2:] == ["record", "wait"]
        if start == 0 or dtype.itemsize == 1:
            parts = -(-count // (CHUNK // 4))
            assert engine.log == ["launch", "copy"] * parts + ["record", "wait"]


def test_a_failure_leaves_no_work_on_pinned_memory(monkeypatch):
    monkeypatch.setattr(staging, "DIRECT_CHUNK", CHUNK)
    bf16, engine = rlx.dtype("bf16"), LateEngine(fail_at=3)
    raw, out = torch.zeros(8000, dtype=torch.uint8), np.zeros(4000, np.float32)
    with pytest.raises(RuntimeError, match="on purpose"):
        transfers.read_pinned(engine, raw, bf16, out, device_reader(bf16, HOST))
    assert engine.done == len(engine.work) == 3


class Choice:
    """What a transfer of one dtype does, with a number of threads, pinned memory or not."""

    def __init__(self, monkeypatch):
        self.patch = monkeypatch.setattr
        self.patch(staging, "CudaEngine", lambda device: self.engine)
        self.patch(staging, "pools", {None: staging.Pool(1 << 16)})

    def __call__(self, name, threads, pinned=False):
        self.patch(torch, "get_num_threads", lambda: threads)
        self.patch(typed, "_is_pinned", lambda array: pinned)
        dtype, values = rlx.dtype(name), random_values(40_000)
        wanted = expected(dtype, values)
        raw, out = torch.zeros(wanted.nbytes, dtype=torch.uint8), np.zeros_like(values)
        found = []
        for work in (
            lambda: typed._write_cuda(raw, dtype, values),
            lambda: typed._read_cuda(raw, dtype, out),
        ):
            self.engine = LateEngine()
            work()
            self.engine.finish()
            found.append("device" if "launch" in self.engine.log else "host")
        assert_same(raw.numpy().view(dtype), wanted)
        with np.errstate(all="ignore"):
            assert_same(out, wanted.real.astype(np.float32))
        return found


def test_the_host_converts_two_bytes_where_it_has_the_threads(monkeypatch):
    choice = Choice(monkeypatch)
    for name in ("bf16", "f16"):
        assert choice(name, typed.HOST_THREADS) == ["host", "host"]
        assert choice(name, typed.HOST_THREADS - 1) == ["device", "device"]
        assert choice(name, 64, pinned=True) == ["device", "device"]
    for name in ("f8_e4m3fn", "f8_e3m4", "i32", "i16", "f32", "f64"):
        assert choice(name, 64) == ["device", "device"]
    for agreeing in ((None, None), typed.framework_kernels(rlx.dtype("bf16"))):
        monkeypatch.setattr(typed, "framework_kernels", lambda dtype, found=agreeing: found)
        way = "device" if None in agreeing else "host"
        assert choice("bf16", 64) == [way, way]


def test_memory_that_a_read_overlaps_is_read_first(monkeypatch):
    bf16, count = rlx.dtype("bf16"), 40_000
    monkeypatch.setattr(staging, "pools", {None: staging.Pool(1 << 14)})
    for pinned, first in ((False, 0), (True, 0), (False, 20_000), (True, 20_000)):
        engine = LateEngine()
        monkeypatch.setattr(staging, "CudaEngine", lambda device, engine=engine: engine)
        monkeypatch.setattr(staging, "DIRECT_CHUNK", 1 << 14)
        monkeypatch.setattr(typed, "_is_pinned", lambda array, pinned=pinned: pinned)
        memory = np.zeros(2 * count, np.float32)
        raw = torch.from_numpy(memory[count // 2 : count].view(np.uint8))
        stored = expected(bf16, random_values(count)[:count])
        raw.copy_(torch.from_numpy(stored.view(np.uint8)))
        out = memory[first : first + count]
        typed._read_cuda(raw, bf16, out)
        assert_same(out, stored.astype(np.float32))


def test_the_host_fills_ahead_and_waits_only_for_the_lane_it_needs():
    engine, pool = LateEngine(), staging.Pool(CHUNK)
    values = random_values(CHUNK * 2)[: 5 * CHUNK // 4]
    raw = torch.zeros(values.size * 2, dtype=torch.uint8)
    bf16 = rlx.dtype("bf16")
    transfers.write_through(engine, pool, raw, bf16, values, device_writer(bf16, HOST))
    step = ["copy", "launch", "record"]
    assert engine.log == step * staging.LANES + ["wait", *step] * 2
    engine.log.clear()
    out = np.zeros(values.size, np.float32)
    again = staging.Pool(CHUNK)
    transfers.read_through(engine, again, raw, bf16, out, device_reader(bf16, HOST))
    step = ["launch", "copy", "record"]
    assert engine.log == step * staging.LANES + ["wait", *step] * 2 + ["wait"] * staging.LANES


def test_lanes_of_an_earlier_transfer_are_waited_for():
    pool, bf16 = staging.Pool(CHUNK, most=1), rlx.dtype("bf16")
    first, second = random_values(400, 1), random_values(400, 2)
    engine = LateEngine()
    raws = [torch.zeros(1600, dtype=torch.uint8) for _ in range(2)]
    for raw, values in zip(raws, (first, second), strict=True):
        transfers.write_through(engine, pool, raw, bf16, values, device_writer(bf16, HOST))
    engine.finish()
    for raw, values in zip(raws, (first, second), strict=True):
        assert_same(raw.numpy().view(bf16), expected(bf16, values))


@pytest.mark.parametrize("side", ["write", "read"])
@pytest.mark.parametrize("fail_at", [0, 1, 2, 5, 8, 9])
def test_a_failure_leaves_no_work_on_memory_that_is_free_again(side, fail_at):
    bf16 = rlx.dtype("bf16")
    values = random_values(5 * CHUNK // 8)
    raw = torch.zeros(values.size * 2, dtype=torch.uint8)
    pool, engine = staging.Pool(CHUNK, most=2), LateEngine(fail_at=fail_at)
    out = np.zeros(values.size, np.float32)

    def transfer():
        if side == "write":
            cast = device_writer(bf16, HOST)
            transfers.write_through(engine, pool, raw, bf16, values, cast)
        else:
            transfers.read_through(engine, pool, raw, bf16, out, device_reader(bf16, HOST))

    with pytest.raises(RuntimeError, match="on purpose"):
        transfer()
    assert engine.done == len(engine.work), "the device is done with every lane"
    with pool.lanes(engine, 2) as lanes:
        assert len(lanes) == 2
        assert all(lane.busy is None for lane in lanes)
    raw[:] = torch.from_numpy(expected(bf16, values).view(np.uint8).copy())
    if side == "write":
        raw.zero_()
    transfer()
    engine.finish()
    assert_same(raw.numpy().view(bf16), expected(bf16, values))
    if side == "read":
        assert_same(out, expected(bf16, values).astype(np.float32))


def test_where_little_memory_can_be_locked_fewer_lanes_do():
    bf16 = rlx.dtype("bf16")
    values = random_values(3000)
    engine, pool = LateEngine(locked=1), staging.Pool(CHUNK)
    raw = torch.zeros(values.size * 2, dtype=torch.uint8)
    transfers.write_through(engine, pool, raw, bf16, values, device_writer(bf16, HOST))
    engine.finish()
    assert_same(raw.numpy().view(bf16), expected(bf16, values))
    with pytest.raises(transfers.NoPinnedMemory):
        transfers.write_through(
            LateEngine(locked=0), staging.Pool(CHUNK), raw, bf16, values, device_writer(bf16, HOST)
        )


def test_a_pool_is_bounded_and_its_lanes_are_used_again(monkeypatch):
    engine, pool = LateEngine(), staging.Pool(CHUNK, most=4)
    waiting, wait = threading.Event(), pool._changed.wait
    monkeypatch.setattr(pool._changed, "wait", lambda: (waiting.set(), wait()))
    with pool.lanes(engine, 3) as first:
        with pool.lanes(engine, 3) as second:
            assert (len(first), len(second)) == (3, 1)
            got = []
            thread = threading.Thread(target=lambda: got.append(_take_one(pool, engine)))
            thread.start()
            assert waiting.wait(60), "there is no lane left, so it waits"
            assert not got
        thread.join()
        assert got[0] is second[0]
    with pool.lanes(engine, 9) as all_lanes:
        assert {id(lane) for lane in all_lanes} == {id(lane) for lane in (*first, *second)}


def _take_one(pool, engine):
    with pool.lanes(engine, 1) as lanes:
        return lanes[0]


def test_reset_frees_what_is_not_in_use():
    engine, pool = LateEngine(), staging.Pool(CHUNK, most=2)
    with pool.lanes(engine, 1) as kept:
        with pool.lanes(engine, 1) as freed:
            engine.work.append(lambda: None)
            freed[0].busy = engine.record()
        pool.reset()
        assert engine.done == 1, "the device was done with it first"
        with pool.lanes(engine, 2) as fresh:
            assert len(fresh) == 1
            assert fresh[0] is not freed[0]
    with pool.lanes(engine, 2) as lanes:
        assert kept[0] in lanes
    staging.reset()


def test_threads_share_a_pool():
    pool = staging.Pool(CHUNK, most=4)
    bf16 = rlx.dtype("bf16")
    found = {}

    def work(seed):
        values = random_values(4000, seed)
        raw = torch.zeros(values.size * 2, dtype=torch.uint8)
        engine = LateEngine()
        for _ in range(5):
            transfers.write_through(engine, pool, raw, bf16, values, device_writer(bf16, HOST))
        out = np.zeros(values.size, np.float32)
        transfers.read_through(engine, pool, raw, bf16, out, device_reader(bf16, HOST))
        found[seed] = out

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(6):
        wanted = expected(bf16, random_values(4000, seed)).astype(np.float32)
        assert_same(found[seed], wanted)


def test_the_host_converts_what_no_cast_of_the_device_can():
    assert {d for d in DTYPES if device_writer(d, HOST) is None} <= set(INTEGERS)
