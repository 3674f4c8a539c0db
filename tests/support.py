"""What the tests share: arrays at chosen addresses, and what any framework's array says."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver import dlpack
from rlx_driver.registry import registry

SOURCE = Path(rlx.__file__).parents[1]
COPIES = (False, None, True)


@functools.cache
def installed(name):
    return importlib.util.find_spec(name) is not None


@functools.cache
def cuda_works():
    if not Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi") is None:
        return False  # said without importing torch
    if not installed("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def frameworks(*names):
    """Parameters for frameworks by name, which skip where one is not installed."""
    return [_param(name) for name in names or ("numpy", "torch", "jax")]


def pairs(*names):
    """Parameters for every ordered pair of two different frameworks."""
    names = names or ("numpy", "torch", "jax")
    return [_param(a, b) for a in names for b in names if a != b]


def needs(*names):
    """Marks for what a test needs."""
    return [getattr(pytest.mark, name) for name in sorted(set(names) & {"torch", "jax", "cuda"})]


def _param(*names):
    return pytest.param(*names, marks=needs(*names), id="-".join(names))


def x64(on=True):
    """JAX's 64-bit types, for a block."""
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import enable_x64

    return enable_x64(on)


def offset(shape, dtype, start):
    """Zeros at an address that is `start` bytes past a multiple of 256."""
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + 512, np.uint8)
    first = -raw.ctypes.data % 256 + start
    return raw[first : first + nbytes].view(dtype).reshape(shape)


def aligned(shape, dtype="float32"):
    """Zeros at an address that JAX shares."""
    return offset(shape, dtype, 0)


def pattern(count, seed=0):
    """Bytes that differ from each other and, by seed, from those of another call."""
    return ((np.arange(count) * 7 + seed) % 101 + 1).astype(np.uint8)


def make(framework, dtype="float32", shape=(4, 6), seed=0):
    """An array of a framework, compact and aligned, with telling bytes."""
    dtype = np.dtype(dtype)
    array = aligned(shape, dtype)
    write_bytes(array, _fitting(pattern(array.nbytes, seed), dtype))
    if framework == "numpy":
        return array
    if framework == "torch":
        import torch

        tensor = torch.empty(shape, dtype=getattr(torch, rlx.dtypes.info(dtype).torch))
        write_bytes(tensor, array.tobytes())
        return tensor
    import jax.numpy as jnp

    return jnp.array(array, copy=True).block_until_ready()


def _fitting(data, dtype):
    return data % 2 if dtype == np.bool_ else data


def other_bytes(x, seed=50):
    """Bytes to write to an array, unlike those that `make` wrote."""
    dtype = rlx.dtype(x.dtype)
    return _fitting(pattern(math.prod(x.shape) * dtype.itemsize, seed), dtype).tobytes()


def address(x):
    """The address of element zero, by the framework's own word."""
    if isinstance(x, np.ndarray):
        return x.__array_interface__["data"][0]
    if hasattr(x, "data_ptr"):
        return x.data_ptr()
    if hasattr(x, "unsafe_buffer_pointer"):
        return x.block_until_ready().unsafe_buffer_pointer()
    if isinstance(x, rlx.Buffer):
        return x.address
    return np.from_dlpack(x).__array_interface__["data"][0]


def read_bytes(x):
    """The values of an array in C order, as bytes."""
    if isinstance(x, np.ndarray):
        return x.tobytes()
    if hasattr(x, "data_ptr"):
        import torch

        plain = torch.empty(x.shape, dtype=x.dtype).copy_(x.detach())
        return plain.view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(x, rlx.Buffer):
        return x.numpy().tobytes()
    # np.asarray of a JAX array may stay in it (see test_looking_at_an_array_does_not_hold_it).
    return dlpack.as_numpy(x).tobytes()


def write_bytes(x, data):
    """Write through a mutable, contiguous array, in place."""
    data = np.frombuffer(bytes(data), np.uint8)
    if isinstance(x, np.ndarray):
        flat = x.reshape(-1).view(np.uint8)
        assert not x.size or np.shares_memory(flat, x)
        flat[:] = data
        return
    import torch

    assert x.is_contiguous()
    x.view(-1).view(torch.uint8).copy_(torch.from_numpy(data.copy()))


def each_way(x, framework, copy):
    """Exchange twice: the first call goes the general way, a later one may take a fast lane."""
    registry.lanes.clear()
    return [rlx.exchange(x, framework, copy=copy) for _ in range(3)]


def refusal(x, framework, copy, error=rlx.ZeroCopyError):
    """The text with which an exchange is refused, with a fast lane in place and without."""
    texts = set()
    for warm in (False, True):
        registry.lanes.clear()
        if warm:
            with contextlib.suppress(Exception):
                rlx.exchange(x, framework)
        before = rlx.ledger.snapshot()
        with pytest.raises(error) as caught:
            rlx.exchange(x, framework, copy=copy)
        assert rlx.ledger.snapshot() == before, "a refused exchange must not be counted"
        texts.add(str(caught.value))
    assert len(texts) == 1
    return texts.pop()


def gone(reference):
    """Whether an object was let go; a collection, which takes its time, only if it must be."""
    if reference() is not None:
        gc.collect()
    return reference() is None


class Exporter:
    """A foreign array: nothing but DLPack, through an array of NumPy or torch."""

    def __init__(self, array):
        self.array = array
        self.calls = 0

    def __dlpack__(self, **options):
        self.calls += 1
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def python(code, *, flags=(), **env):
    """Run code in a fresh interpreter that sees the package under test; give the result."""
    path = [str(SOURCE), str(Path(__file__).parent)]
    if "PYTHONPATH" in os.environ:
        path.append(os.environ["PYTHONPATH"])
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **env},
    )


def must_run(code, **options):
    """Run code in a fresh interpreter, which has to succeed; give what it printed."""
    result = python(code, **options)
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout
