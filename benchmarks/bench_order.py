"""Order between JAX and torch on one GPU: what each way costs, and what overlaps.

The decode step: JAX appends a row to a 2 GiB bf16 cache in place, torch reads and changes it.
"""

import jax
import jax.numpy as jnp
import torch

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

ROW = 8192
ROWS = (2 << 30) // 2 // ROW
STEPS = 200
DEVICE = "cuda:0"


def append(kv, row, position):
    return jax.lax.dynamic_update_slice(kv, row, (position, 0))


def look_and_change(tensor, position):
    row = tensor[position]
    row.mul_(0.5)
    return row


def run() -> list[Row]:
    return decode_step() + views() + overlap() + graphs()


def decode_step() -> list[Row]:
    row = jax.block_until_ready(jnp.ones((1, ROW), jnp.bfloat16))
    positions = jax.block_until_ready([jnp.int32(i) for i in range(STEPS)])
    donated = jax.jit(append, donate_argnums=0)
    handles = {}

    def ours(order, scoped=False):
        stream = rlx.command_stream(DEVICE, order=order)
        with stream:
            kv = handles.setdefault(
                order, rlx.BufferHandle("kv", (ROWS, ROW), "bf16", device=DEVICE)
            )

        def views():
            with stream:
                for i, position in enumerate(positions):
                    kv.update(append, row, position)
                    look_and_change(kv.torch(), i)
                stream.wait()

        def scopes():
            with stream:
                for i, position in enumerate(positions):
                    kv.update(append, row, position)
                    with kv.write("torch") as tensor:
                        look_and_change(tensor, i)
                stream.wait()

        return scopes if scoped else views

    state = [jnp.zeros((ROWS, ROW), jnp.bfloat16)]

    def jax_alone():
        array = state[0]
        for position in positions:
            array = donated(array, row, position)
        state[0] = array.block_until_ready()

    tensor = torch.zeros((ROWS, ROW), dtype=torch.bfloat16, device=DEVICE)

    def torch_alone():
        for i in range(STEPS):
            look_and_change(tensor, i)
        torch.cuda.synchronize()

    def careful():
        for i, position in enumerate(positions):
            torch.cuda.synchronize()
            array = donated(jnp.from_dlpack(tensor), row, position)
            array.block_until_ready()
            look_and_change(tensor, i)
        torch.cuda.synchronize()

    ways = [ours("shared"), ours("events"), ours("host"), ours("shared", scoped=True)]
    times = best_of(*ways, jax_alone, torch_alone, careful, number=1, repeat=9)
    shared, events, host, scoped, jax_time, torch_time, hand = (t / STEPS for t in times)
    for kv in handles.values():
        kv.close()
    alone = jax_time + torch_time
    name = "decode step on 2 GiB, "
    against, by_hand = "JAX alone + torch alone", "re-import and host sync on both sides"
    return [
        Row(name + "shared stream", shared, against, alone, 1.25),
        Row(name + "shared stream", shared, by_hand, hand, 4, faster=True),
        Row(name + "shared stream, torch in a write scope", scoped, against, alone),
        Row(name + "device events", events, against, alone),
        Row(name + "host waits", host, against, alone),
        Row(name + "re-import and host sync", hand, against, alone),
        Row("of these, JAX alone", jax_time, against, alone),
        Row("of these, torch alone", torch_time, against, alone),
    ]


def views() -> list[Row]:
    with rlx.command_stream(DEVICE) as stream:
        kv = rlx.BufferHandle("kv", (ROWS, ROW), "bf16", device=DEVICE)
        tensor = kv.torch()
        kv.jax()
        torch_view, jax_view, torch_import, jax_import = best_of(
            kv.torch,
            kv.jax,
            lambda: torch.from_dlpack(kv.jax()),
            lambda: jnp.from_dlpack(tensor),
            number=200,
        )

        def written():
            tensor[0].fill_(1)
            kv.jax()

        def written_and_imported():
            tensor[0].fill_(1)
            jnp.from_dlpack(tensor)

        renewed, imported = best_of(written, written_and_imported, number=50)
        stream.wait()
        kv.close()
    shared = ", shared stream current"
    return [
        Row(
            "kv.torch()" + shared, torch_view, "torch.from_dlpack", torch_import, 1e-6, False, True
        ),
        Row("kv.jax()" + shared, jax_view, "jnp.from_dlpack", jax_import, 1e-6, False, True),
        Row("torch write, then kv.jax()", renewed, "torch write, jnp.from_dlpack", imported),
    ]


def overlap() -> list[Row]:
    """Stage batches from pinned memory on a side stream while torch and JAX compute."""
    elements = 64 << 20
    pinned = torch.ones(elements, pin_memory=True)
    matrix = torch.full((8192, 8192), 0.01, device=DEVICE, dtype=torch.bfloat16)
    stream = rlx.command_stream(DEVICE)
    side = rlx.command_stream(DEVICE, side=True)
    with stream:
        batches = [rlx.Buffer.zeros((elements,), "f32", DEVICE) for _ in range(2)]
    total = jax.jit(lambda x: x[::4096].sum())

    def compute(batch):
        with stream:
            if batch is not None:
                total(batch.jax())
            for _ in range(5):
                matrix @ matrix

    def stage(batch):
        with side:
            batch.copy_from(pinned, blocking=False)

    def both():
        for i in range(10):
            stage(batches[(i + 1) % 2])
            compute(batches[i % 2])
        stream.wait()
        side.wait()

    def only_compute():
        for _ in range(10):
            compute(None)
        stream.wait()

    def only_stage():
        for i in range(10):
            stage(batches[i % 2])
        side.wait()

    together, computing, staging = (
        t / 10 for t in best_of(both, only_compute, only_stage, number=1, repeat=7)
    )
    longer = max(computing, staging)
    return [
        Row("staging 256 MiB beside compute", together, "the longer of the two", longer, 1.1),
        Row("of these, staging alone", staging, "compute alone", computing),
    ]


def graphs() -> list[Row]:
    stream = rlx.command_stream(DEVICE)
    with stream:
        kv = rlx.BufferHandle("kv", (1 << 20,), "f32", device=DEVICE)
        for _ in range(3):
            kv.torch().mul_(1.0)
        with stream.capture() as graph:
            for _ in range(20):
                kv.torch().mul_(1.0)

        def eager():
            for _ in range(20):
                kv.torch().mul_(1.0)

        replay, raw, plain = best_of(graph.replay, graph.native.replay, eager, number=50)
        stream.wait()
        kv.close()
    return [
        Row("replay of 20 torch operations, ordered", replay, "CUDAGraph.replay", raw),
        Row("replay of 20 torch operations, ordered", replay, "eager", plain),
    ]
