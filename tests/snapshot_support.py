"""Helpers of the tests of snapshots: plans compared, files written by hand, mappings looked up."""

import json
from pathlib import Path

import numpy as np

import rlx_driver as rlx
from rlx_driver import Interval
from rlx_driver.dtypes import TABLE


def same_plan(one, other):
    """Tell whether two plans say the same of every node."""
    return (
        one.nodes == other.nodes
        and one.alignment == other.alignment
        and one.offsets.tolist() == other.offsets.tolist()
        and one.size == other.size
        and all(
            one.interval(node) == other.interval(node)
            and list(map(type, _parts(one.interval(node).node)))
            == list(map(type, _parts(other.interval(node).node)))
            and one.life(node) == other.life(node)
            and one.root(node) == other.root(node)
            for node in one.nodes
        )
    )


def _parts(node):
    yield node
    if isinstance(node, tuple):
        for each in node:
            yield from _parts(each)


def rich_plan():
    """A plan in which everything occurs that an Interval can say."""
    return rlx.plan_memory(
        [
            Interval("w", 100, 0, 9, kind="constant"),
            Interval("x", 64, 0, 3, dtype="bf16", shape=(4, 8), kind="input"),
            Interval(("y", 1), 128, 2, 5, dtype=rlx.dtype("float8_e5m2"), shape=(128,)),
            Interval(("y", 2), 32, 6, 7, dtype="f32", alias_of=("y", 1), alias_offset=64),
            Interval(3, 4096, 4, 6, dtype=np.dtype(np.int64), shape=(2, 256), alignment=1024),
            Interval("pinned", 8, 1, 2, offset=8192),
            Interval("empty", 0, 2, 2, dtype="f32", shape=(0, 3)),
            Interval("out", 16, 5, 8, shape=(4, 4), kind="output"),
        ],
        alignment=32,
    )


def maps(path):
    """Give the address ranges at which this process has a file mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(f" {path}")]
    return [(int(low, 16), int(high, 16)) for low, high in spans]


def is_mapped(address, path):
    """Tell whether an address lies in a mapping of a file."""
    return any(low <= address < high for low, high in maps(path))


def names(folder):
    """List what is in a folder."""
    return sorted(each.name for each in folder.iterdir())


def raw_file(path, header, data=b"", length=None):
    """Write a safetensors file by hand, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def read_header(path):
    """Give a file's header and where its data begins, by nobody's code but this."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), start


def pattern(nbytes, seed=0):
    """Give bytes of every value, in no order."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def fill_handle(handle, seed=0):
    """Give a handle bytes that are values of its dtype; returns them."""
    dt = handle.dtype
    raw = pattern(handle.byte_size, seed)
    if dt == np.bool_ or TABLE[dt].dlpack is None:  # not every byte is a value
        raw &= 1
    value = raw.view(dt).reshape(handle.shape)
    handle.copy_from(value)
    return raw
