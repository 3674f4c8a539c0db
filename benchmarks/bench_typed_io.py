"""Typed I/O on the host: with torch against torch's own copy, without it against ml_dtypes.

The part without torch runs in a process of its own, which never imports it.
"""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np

import rlx_driver as rlx
from benchmarks.harness import Row, best_of

SIZES = (4 << 20, 64 << 20)
WITH_TORCH = {"bf16": 0.85, "f16": 0.85, "f8_e4m3fn": 0.35, "f8_e5m2": None}
FLOAT8 = sorted(name for name in dir(ml_dtypes) if name.startswith("float8_"))
WITHOUT_TORCH = {"bf16": 1.0, **dict.fromkeys(FLOAT8, 4.0)}


def values(count):
    return np.random.default_rng(0).standard_normal(count, np.float32)


def with_torch() -> list[Row]:
    import torch

    rows = []
    for size in SIZES:
        x = values(size)
        for name, target in WITH_TORCH.items():
            dtype = rlx.dtype(name)
            theirs = rlx.dtypes.torch_dtype(dtype)
            raw = np.zeros(size * dtype.itemsize, np.uint8)
            source, typed = torch.from_numpy(x), torch.from_numpy(raw).view(theirs)
            repeat = 100 if size < 1 << 24 else 7

            def write(raw=raw, dtype=dtype, x=x):
                rlx.write_typed_from_f32(raw, dtype, x)

            def copy(typed=typed, source=source):
                typed.copy_(source)

            ours, own = best_of(write, copy, number=1, repeat=repeat)
            label = f"{size >> 20} Mi"
            rows.append(
                Row(f"f32 to {name}, {label}", ours, "torch copy_", own, target, faster=True)
            )
            out, back = np.zeros(size, np.float32), torch.zeros(size)

            def read(raw=raw, dtype=dtype, size=size, out=out):
                rlx.read_typed_to_f32(raw, dtype, size, out)

            def copy_back(back=back, typed=typed):
                back.copy_(typed)

            ours, own = best_of(read, copy_back, number=1, repeat=repeat)
            rows.append(
                Row(f"{name} to f32, {label}", ours, "torch copy_", own, target, faster=True)
            )

            def read_anew(raw=raw, dtype=dtype, size=size):
                return rlx.read_typed_to_f32(raw, dtype, size)

            def copy_anew(size=size, typed=typed):
                return torch.empty(size).copy_(typed)

            ours, own = best_of(read_anew, copy_anew, number=1, repeat=7)
            against = "torch.empty, copy_"
            rows.append(Row(f"{name} to f32, {label}, new array", ours, against, own, faster=True))
    return rows


def without_torch() -> list[Row]:
    rows = []
    for size in SIZES:
        x = values(size)
        for name, target in WITHOUT_TORCH.items():
            dtype = rlx.dtype(name)
            raw = np.zeros(size * dtype.itemsize, np.uint8)
            with np.errstate(all="ignore"):
                narrow = x.astype(dtype)
            repeat = 20 if size < 1 << 24 else 2

            def write(raw=raw, dtype=dtype, x=x):
                rlx.write_typed_from_f32(raw, dtype, x)

            def cast(dtype=dtype, x=x):
                with np.errstate(all="ignore"):
                    return x.astype(dtype)

            ours, own = best_of(write, cast, number=1, repeat=repeat, warmup=1)
            label = f"{size >> 20} Mi, no torch"
            rows.append(Row(f"f32 to {name}, {label}", ours, "ml_dtypes", own, target, faster=True))

            def read(raw=raw, dtype=dtype, size=size):
                return rlx.read_typed_to_f32(raw, dtype, size)

            def widen(narrow=narrow):
                return narrow.astype(np.float32)

            ours, own = best_of(read, widen, number=1, repeat=repeat, warmup=1)
            rows.append(Row(f"{name} to f32, {label}", ours, "ml_dtypes", own, faster=True))
    assert "torch" not in sys.modules
    return rows


def run() -> list[Row]:
    code = (
        "import json, dataclasses; from benchmarks.bench_typed_io import without_torch;"
        "print(json.dumps([dataclasses.asdict(row) for row in without_torch()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=1200
    )
    return with_torch() + [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]
