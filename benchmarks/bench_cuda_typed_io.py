"""Typed I/O between the host and one GPU: against torch's own copy, and against the bus.

The bandwidth of the bus is that of pinned memory to the device and back, in bytes of float32.
"""

import numpy as np
import torch

import rlx_driver as rlx
from benchmarks.harness import Row, best_of
from rlx_driver.backends import _cuda_staging as staging
from rlx_driver.backends import _cuda_transfers as transfers
from rlx_driver.backends._torch_casts import device_reader, device_writer

COUNT = 128 << 20
NAMED = ("bf16", "f16", "f8_e4m3fn")  # the others are for information
NAMES = (*NAMED, "f8_e3m4", "i32")
DEVICE = torch.device("cuda:0")


def timed(*functions, number=1):
    """Time calls until the device is done."""

    def settled(function):
        def call():
            function()
            torch.cuda.synchronize()

        return call

    return best_of(*map(settled, functions), number=number, repeat=5)


def run() -> list[Row]:
    pageable = torch.from_numpy(np.random.default_rng(0).standard_normal(COUNT, np.float32))
    pinned = pageable.pin_memory()
    there = torch.empty(COUNT, device=DEVICE)
    send, fetch = timed(
        lambda: there.copy_(pinned, non_blocking=True),
        lambda: pinned.copy_(there, non_blocking=True),
    )
    rows = []
    for name in NAMES:
        rows += _writes(name, pageable.numpy(), pinned.numpy(), send)
        rows += _reads(name, pinned.numpy(), fetch)
    rows += _small()
    rows += _chunks(pageable.numpy())
    return rows


def _writes(name, pageable, pinned, bus) -> list[Row]:
    dtype = rlx.dtype(name)
    memory = torch.zeros(COUNT * dtype.itemsize, dtype=torch.uint8, device=DEVICE)
    plain = {"bf16": torch.bfloat16, "f16": torch.float16}.get(name)
    source = torch.from_numpy(pageable)
    share = 0.85 if name in NAMED else None

    def copy():
        if plain is not None:
            memory.view(plain).copy_(source)

    ours, ours_pinned, theirs = timed(
        lambda: rlx.write_typed_from_f32(memory, dtype, pageable),
        lambda: rlx.write_typed_from_f32(memory, dtype, pinned),
        copy,
    )
    rows = [
        Row(f"f32 to {name}, pinned source", ours_pinned, "pinned bus", bus, share, faster=True),
        Row(f"f32 to {name}, pageable source", ours, "pinned bus", bus, faster=True),
    ]
    if plain is not None:
        against = "slot.copy_(host)"
        target = 3.0 if name == "bf16" else None
        rows.append(Row(f"f32 to {name}", ours, against, theirs, target, faster=True))

    def through(cast):
        engine = staging.CudaEngine(DEVICE)
        transfers.write_through(engine, staging.pool_of(0), memory, dtype, pageable, cast)

    # by the host fewer bytes go over the bus, after more work
    cast = device_writer(dtype, DEVICE)
    by_device, by_host = timed(lambda: through(cast), lambda: through(None))
    rows.append(Row(f"f32 to {name}, by device", by_device, "by host", by_host, faster=True))
    return rows


def _reads(name, pinned, bus) -> list[Row]:
    dtype = rlx.dtype(name)
    memory = torch.zeros(COUNT * dtype.itemsize, dtype=torch.uint8, device=DEVICE)
    plain = {"bf16": torch.bfloat16, "f16": torch.float16}.get(name)
    out = np.empty(COUNT, np.float32)

    def copy():
        if plain is not None:
            memory.view(plain).float().cpu()

    def through(cast):
        engine = staging.CudaEngine(DEVICE)
        transfers.read_through(engine, staging.pool_of(0), memory, dtype, out, cast)

    cast = device_reader(dtype, DEVICE)
    ours, into, direct, theirs, by_device, by_host = timed(
        lambda: rlx.read_typed_to_f32(memory, dtype, COUNT),
        lambda: rlx.read_typed_to_f32(memory, dtype, COUNT, out),
        lambda: rlx.read_typed_to_f32(memory, dtype, COUNT, pinned),
        copy,
        lambda: through(cast),
        lambda: through(None),
    )
    rows = [
        Row(f"{name} to f32, pinned array", direct, "pinned bus", bus, faster=True),
        Row(f"{name} to f32, pageable array", into, "pinned bus", bus, faster=True),
        Row(f"{name} to f32, new array", ours, "pinned bus", bus, faster=True),
        Row(f"{name} to f32, by device", by_device, "by host", by_host, faster=True),
    ]
    if plain is not None:
        rows.append(Row(f"{name} to f32", ours, "slot.float().cpu()", theirs, faster=True))
    return rows


def _small() -> list[Row]:
    rows = []
    for count in (16, 4096, 16384, 65536, 1 << 20):
        values = np.ones(count, np.float32)
        host = torch.from_numpy(values)
        memory = torch.zeros(count * 2, dtype=torch.uint8, device=DEVICE)
        view = memory.view(torch.bfloat16)
        ours, theirs = timed(
            lambda memory=memory, values=values: rlx.write_typed_from_f32(memory, "bf16", values),
            lambda view=view, host=host: view.copy_(host),
            number=20,
        )
        rows.append(Row(f"f32 to bf16, {count:,}", ours, "slot.copy_(host)", theirs, faster=True))
        out = np.empty(count, np.float32)
        back = torch.from_numpy(out)
        ours, theirs = timed(
            lambda memory=memory, n=count, out=out: rlx.read_typed_to_f32(memory, "bf16", n, out),
            lambda view=view, back=back: back.copy_(view),
            number=20,
        )
        rows.append(Row(f"bf16 to f32, {count:,}", ours, "host.copy_(slot)", theirs, faster=True))
    return rows


def _chunks(values) -> list[Row]:
    """Compare sizes of a chunk with the one that is set, so that a better one shows."""
    dtype = rlx.dtype("bf16")
    memory = torch.zeros(COUNT * 2, dtype=torch.uint8, device=DEVICE)
    cast = device_writer(dtype, DEVICE)

    def through(pool):
        transfers.write_through(staging.CudaEngine(DEVICE), pool, memory, dtype, values, cast)

    rows = []
    own = staging.Pool()
    for size in (1 << 20, 2 << 20, 4 << 20, 16 << 20, 32 << 20):
        pool = staging.Pool(size, staging.LANES)
        theirs, ours = timed(lambda pool=pool: through(pool), lambda: through(own))
        against = f"of {size >> 20} MiB"
        rows.append(Row(f"chunks of {own.chunk >> 20} MiB", ours, against, theirs, faster=True))
        pool.reset()
    return rows
