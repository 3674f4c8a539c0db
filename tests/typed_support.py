"""What a typed write is to give, said in another way than the driver does it."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from rlx_driver.dtypes import TABLE

DTYPES = list(TABLE)
INTEGERS = [d for d in DTYPES if "int" in d.name]
NARROW = [d for d in DTYPES if d.itemsize <= 2 and d.kind != "b" and d not in INTEGERS]


def floats(*values):
    return np.array(values, np.float64).astype(np.float32)


def around(values):
    """Each value, and the float32 next to it on both sides."""
    values = np.asarray(values, np.float32)
    ends = [np.nextafter(values, np.float32(end)) for end in (-np.inf, np.inf)]
    return np.concatenate([values, *ends])


@np.errstate(all="ignore")
def telling_values(dtype):
    """Every value of a narrow dtype, the middles between them, the ends, and their neighbours."""
    tiny, large = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    points = [0.0, 1e-45, tiny, large, np.inf, 2.0**-127, 2.0**-128, 2.0**-126]
    if dtype in INTEGERS:
        limits = ml_dtypes.iinfo(dtype)
        for end in (int(limits.min), int(limits.max)):
            points += [end + k / 2 for k in range(-6, 7)]
        points += [2.0**k for k in range(66)] + [k / 2 for k in range(600)]
    elif dtype.itemsize <= 2 and dtype.kind != "b":
        patterns = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)
        values = patterns.astype(np.float32).astype(np.float64)
        values = np.unique(values[np.isfinite(values)])
        step = values[-1] - values[-2]
        points = [*points, *values, *((values[1:] + values[:-1]) / 2)]
        points += [values[-1] + step * k / 4 for k in range(9)]
    points = around(floats(*points))
    nans = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFF800001], np.uint32)
    return np.concatenate([points, -points, nans.view(np.float32)])


def random_values(count, seed=0):
    """Float32 of any bits, and as many of everyday size."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 1 << 32, count, np.uint32).view(np.float32)
    everyday = generator.standard_normal(count, np.float32)
    everyday *= np.float32(2) ** generator.integers(-12, 12, count)
    return np.concatenate([bits, everyday.astype(np.float32)])


@np.errstate(all="ignore")
def expected(dtype, values):
    """What the values become: by NumPy and ml_dtypes, and by Python's integers."""
    if dtype not in INTEGERS:
        return values.astype(dtype)
    limits = ml_dtypes.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)
    found = []
    for value in values.tolist():
        if value != value:
            found.append(0)
        elif value in (np.inf, -np.inf):
            found.append(high if value > 0 else low)
        else:
            found.append(min(max(int(value), low), high))
    return np.array(found, np.int8 if dtype.kind not in "iu" else dtype).astype(dtype)


@np.errstate(all="ignore")
def assert_same(got, wanted):
    """Bit by bit, but that a NaN may have any payload."""
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    if wanted.dtype.kind in "fc" or wanted.dtype in NARROW:
        nan = wanted != wanted
        assert (got[nan] != got[nan]).all(), "a NaN was lost"
        got, wanted = got[~nan], wanted[~nan]
    size = wanted.dtype.itemsize
    ours = np.ascontiguousarray(got).view(np.uint8).reshape(-1, size)
    theirs = np.ascontiguousarray(wanted).view(np.uint8).reshape(-1, size)
    wrong = (ours != theirs).any(1)
    assert not wrong.any(), (
        f"{wrong.sum()} differ: {got[wrong][:5]!r} instead of {wanted[wrong][:5]!r}"
    )
