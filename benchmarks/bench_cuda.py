"""One decode step on a 2 GiB cache that JAX appends to and torch reads, on one GPU.

Every way does the same: JAX writes a row of keys at a position, torch sums that row.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

ROW = 8192
ROWS = (2 << 30) // 2 // ROW
STEPS = 100


def append(kv, row, position):
    return jax.lax.dynamic_update_slice(kv, row, (position, 0))


def positions():
    return [jnp.int32(i) for i in range(STEPS)]


def run() -> list[Row]:
    kv = rlx.BufferHandle("kv", (ROWS, ROW), "bf16", device="cuda:0")
    row = jax.block_until_ready(jnp.ones((1, ROW), jnp.bfloat16))
    steps = positions()
    donated = jax.jit(append, donate_argnums=0)
    functional = jax.jit(append)
    address = kv.address

    def ours():
        for i, position in enumerate(steps):
            kv.update(append, row, position)
            kv.torch()[i].sum()
        torch.cuda.synchronize()

    alone_state = [jnp.zeros((ROWS, ROW), jnp.bfloat16)]

    def jax_alone():
        array = alone_state[0]
        for position in steps:
            array = donated(array, row, position)
        array.block_until_ready()
        alone_state[0] = array

    tensor = kv.torch()

    def careful():
        for i, position in enumerate(steps):
            torch.cuda.synchronize()
            array = donated(jnp.from_dlpack(tensor), row, position)
            array.block_until_ready()
            tensor[i].sum()
        torch.cuda.synchronize()

    def copied():
        for i, position in enumerate(steps[:10]):
            torch.cuda.synchronize()
            array = functional(jnp.from_dlpack(tensor), row, position)
            tensor.copy_(torch.from_dlpack(array))
            tensor[i].sum()
        torch.cuda.synchronize()

    def through_host():
        host = tensor.view(torch.uint16).cpu().numpy()
        array = functional(jnp.asarray(host.view(jnp.bfloat16)), row, steps[0])
        back = np.array(array).view(np.uint16)
        tensor.view(torch.uint16).copy_(torch.from_numpy(back))
        torch.cuda.synchronize()

    us, alone, hand = (t / STEPS for t in best_of(ours, jax_alone, careful, number=1, repeat=7))
    (device_copy,) = (t / 10 for t in best_of(copied, number=1, repeat=3))
    start = time.perf_counter()
    through_host()
    host = time.perf_counter() - start

    for i in range(1000):
        kv.update(append, row * (i % 5), jnp.int32(i))
    expected = torch.arange(1000, device="cuda").remainder(5).to(torch.bfloat16)
    assert kv.address == address == kv.jax().unsafe_buffer_pointer() == kv.torch().data_ptr()
    assert torch.equal(kv.torch()[:1000, 0], expected)

    jax_view, jax_import = best_of(kv.jax, lambda: jnp.from_dlpack(tensor), number=300)
    torch_view, torch_import = best_of(kv.torch, lambda: torch.from_dlpack(kv.jax()), number=300)
    kv.jax()

    def fenced():
        kv.jax()
        with kv.write("torch"):
            pass

    (fence,) = best_of(fenced, number=100)
    kv.close()
    name = "decode step, 2 GiB bf16 cache"
    return [
        Row(name, us, "JAX alone, nothing shared", alone),
        Row(name, us, "re-import and host sync on both sides", hand, 1, faster=True),
        Row(name, us, "functional update and device copy", device_copy, 1, faster=True),
        Row(name, us, "through the host", host, 1, faster=True),
        Row("kv.jax() ordered after torch", jax_view, "jnp.from_dlpack", jax_import),
        Row("kv.torch() ordered after JAX", torch_view, "torch.from_dlpack", torch_import),
        Row("view by JAX, then a fenced write scope", fence, "jnp.from_dlpack", jax_import),
    ]
