"""DLPack capsules: what they say, whose memory they share, and when it is freed."""

import ctypes
import gc
import math
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx_driver import _dlpack_abi as abi
from rlx_driver import dlpack, dtypes
from rlx_driver.errors import DTypeError, ZeroCopyError

RECORDS = [record for record in dtypes.TABLE.values() if record.dlpack is not None]
IDS = [record.name for record in RECORDS]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
VERSIONS = [None, (1, 0)]

new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))


def aligned(shape, dtype):
    """Zeros at an address that JAX shares."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def address(array):
    return array.__array_interface__["data"][0]


class HandMade:
    """A capsule built field by field, which counts the calls of its deleter."""

    def __init__(self, array=None, *, versioned=True, name=None, shape=(4,), strides=None):
        self.array = np.arange(4, dtype=np.float32) if array is None else array
        self.deleted = 0
        struct = abi.DLManagedTensorVersioned if versioned else abi.DLManagedTensor
        self.managed = struct()
        self.callback = abi.Deleter(self.delete)
        self.managed.deleter = ctypes.cast(self.callback, ctypes.c_void_p).value
        if versioned:
            self.managed.version.major = 1
        self.tensor = self.managed.dl_tensor
        self.tensor.data = address(self.array)
        self.tensor.device.device_type = 1
        self.tensor.ndim = len(shape)
        self.tensor.dtype.code, self.tensor.dtype.bits = dtypes.info(self.array.dtype).dlpack
        self.tensor.dtype.lanes = 1
        self.tensor.shape = (ctypes.c_int64 * 70)(*shape)
        if strides is not None:
            self.tensor.strides = (ctypes.c_int64 * 70)(*strides)
        self.name = name or (b"dltensor_versioned" if versioned else b"dltensor")
        self.capsule = new_capsule(ctypes.addressof(self.managed), self.name, None)

    def delete(self, pointer):
        assert pointer == ctypes.addressof(self.managed)
        self.deleted += 1


# -- the binary interface


def test_struct_layouts_are_those_of_the_c_header():
    assert ctypes.sizeof(abi.DLTensor) == 48
    assert ctypes.sizeof(abi.DLManagedTensor) == 64
    assert ctypes.sizeof(abi.DLManagedTensorVersioned) == 80
    assert abi.DLManagedTensorVersioned.dl_tensor.offset == 32
    assert abi.DLTensor.byte_offset.offset == 40


def test_constants_are_those_of_the_c_header():
    kinds = dlpack.DLDeviceType
    assert (kinds.CPU, kinds.CUDA, kinds.CUDA_HOST, kinds.OPENCL, kinds.VULKAN) == (1, 2, 3, 4, 7)
    assert (kinds.METAL, kinds.ROCM, kinds.ROCM_HOST, kinds.CUDA_MANAGED) == (8, 10, 11, 13)
    assert (kinds.ONEAPI, kinds.WEBGPU) == (14, 15)
    assert [flag.value for flag in dlpack.DLPackFlag] == [1, 2, 4]


# -- inspect


@pytest.mark.parametrize("version", VERSIONS)
def test_inspect_reads_without_consuming(version):
    array = np.zeros((4, 6), np.int16)[1:, ::2]
    capsule = array.__dlpack__(max_version=version)
    info = dlpack.inspect(capsule)
    assert info == dlpack.inspect(capsule)
    assert info.address == info.data + info.byte_offset == address(array)
    assert (info.shape, info.strides, info.element_strides) == ((3, 3), (6, 2), (6, 2))
    assert (info.code, info.bits, info.lanes) == (0, 16, 1)
    assert info.dtype == np.int16
    assert (info.device_type, info.device_id) == (1, 0)
    assert (info.size, info.nbytes, info.is_contiguous) == (9, 18, False)
    assert (info.version is None) == (version is None)
    assert version is None or info.version[0] == 1
    assert (info.read_only, info.is_copied, info.is_subbyte_padded) == (False, False, False)
    assert np.shares_memory(dlpack.as_numpy(capsule), array)  # still of use


def test_inspect_says_what_it_read():
    array = np.zeros((2, 3), BFLOAT16)
    array.flags.writeable = False
    text = str(dlpack.inspect(dlpack.capsule_of(array, max_version=(1, 0))))
    for part in ("bfloat16[2, 3]", "cpu:0", hex(address(array)), "read-only", "DLPack 1."):
        assert part in text
    made = HandMade(versioned=False, shape=(1, 2), strides=(7, 3))
    made.tensor.device.device_type, made.tensor.dtype.code, made.tensor.dtype.lanes = 99, 55, 2
    text = str(dlpack.inspect(made.capsule))
    for part in ("code 55, 32 bits", "99", "unversioned", "strides (7, 3)", "2 lanes"):
        assert part in text


def test_null_strides_mean_c_order():
    made = HandMade(shape=(2, 1, 2))
    info = dlpack.inspect(made.capsule)
    assert info.strides is None
    assert info.element_strides == (2, 2, 1)
    assert info.is_contiguous
    assert dlpack.as_numpy(made.capsule).tolist() == [[[0, 1]], [[2, 3]]]


@pytest.mark.parametrize(
    ("shape", "strides", "contiguous"),
    [
        ((), (), True),
        ((2, 2), (2, 1), True),
        ((2, 2), (1, 2), False),
        ((1, 4), (99, 1), True),
        ((0, 4), (99, 7), True),
        ((4, 0), (99, 7), True),
        ((4,), (0,), False),
    ],
)
def test_contiguity(shape, strides, contiguous):
    made = HandMade(shape=shape, strides=strides)
    assert dlpack.inspect(made.capsule).is_contiguous is contiguous


def test_subbyte_sizes_follow_the_padding_flag():
    made = HandMade(shape=(3,))
    made.tensor.dtype.code, made.tensor.dtype.bits = 17, 4
    info = dlpack.inspect(made.capsule)
    assert (info.nbytes, info.dtype) == (2, None)
    made.managed.flags = 4
    assert dlpack.inspect(made.capsule).nbytes == 3
    with pytest.raises(DTypeError, match="One element a byte"):
        dlpack.as_numpy(made.capsule)
    assert dlpack.inspect(made.capsule).is_subbyte_padded  # refused, not consumed


@pytest.mark.parametrize("thing", [None, 3, b"dltensor", np.zeros(2), object()])
def test_others_than_capsules_are_refused(thing):
    for call in (dlpack.inspect, dlpack.consume, lambda x: dlpack.retype(x, "f32")):
        with pytest.raises(DTypeError, match=type(thing).__name__):
            call(thing)


@pytest.mark.parametrize("name", [b"arrow_array", None, b""])
def test_foreign_capsules_are_refused(name):
    memory = ctypes.create_string_buffer(8)
    capsule = new_capsule(ctypes.addressof(memory), name, None)
    for call in (dlpack.inspect, dlpack.consume, dlpack.as_numpy):
        with pytest.raises(DTypeError, match="a capsule named"):
            call(capsule)


def null_data(made):
    made.tensor.data = None


def null_shape(made):
    made.tensor.shape = None


def field(name, value, of=None):
    def change(made):
        setattr(getattr(made.tensor, of) if of else made.tensor, name, value)

    change.__name__ = f"{name}={value}"
    return change


def extent(*values):
    def change(made):
        made.tensor.ndim = len(values)
        made.tensor.shape = (ctypes.c_int64 * 70)(*values)

    change.__name__ = f"shape={values}"
    return change


def stride(value):
    def change(made):
        made.tensor.strides = (ctypes.c_int64 * 1)(value)

    change.__name__ = f"stride={value}"
    return change


DEFECTS = [
    null_data,
    null_shape,
    field("ndim", -1),
    field("ndim", 65),
    field("ndim", 2**31 - 1),
    field("bits", 0, of="dtype"),
    field("lanes", 0, of="dtype"),
    field("byte_offset", 2**64 - 1),
    extent(-1),
    extent(3, -(2**63)),
    extent(2**40, 2**40),
    extent(2**62, 0),
    stride(2**62),
    stride(-(2**63)),
]


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_malformed_capsules_are_refused(defect, versioned):
    made = HandMade(versioned=versioned)
    defect(made)
    for call in (dlpack.inspect, dlpack.consume, dlpack.as_numpy):
        with pytest.raises(ZeroCopyError, match="malformed"):
            call(made.capsule)
    assert made.deleted == 0  # it stays with whoever holds the capsule


@pytest.mark.parametrize("major", [0, 2, 2**32 - 1])
def test_unknown_major_versions_are_refused(major):
    made = HandMade()
    made.managed.version.major = major
    for call in (dlpack.inspect, dlpack.consume, lambda x: dlpack.retype(x, "f32")):
        with pytest.raises(ZeroCopyError, match="major version"):
            call(made.capsule)


@settings(max_examples=200, deadline=None)
@given(
    ndim=st.integers(-3, 70),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=70),
    strides=st.none() | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=70, max_size=70),
    code=st.integers(0, 255),
    bits=st.integers(0, 255),
    offset=st.integers(0, 2**64 - 1) | st.just(0),
    null=st.booleans(),
    versioned=st.booleans(),
)
def test_any_header_is_read_or_refused(ndim, shape, strides, code, bits, offset, null, versioned):
    made = HandMade(versioned=versioned, shape=shape, strides=strides)
    made.tensor.ndim, made.tensor.byte_offset = ndim, offset
    made.tensor.dtype.code, made.tensor.dtype.bits = code, bits
    if null:
        made.tensor.data = None
    try:
        info = dlpack.inspect(made.capsule)
    except ZeroCopyError:
        return
    assert str(info)
    assert info.nbytes >= 0
    if not info.size:
        try:
            assert dlpack.as_numpy(made.capsule).shape == info.shape
        except DTypeError:
            assert info.dtype is None


# -- retype


@pytest.mark.parametrize("version", VERSIONS)
def test_retype_changes_the_element_type_in_place(version):
    capsule = np.zeros(4, np.uint16).__dlpack__(max_version=version)
    before = dlpack.inspect(capsule)
    assert dlpack.retype(capsule, "bf16") is capsule
    after = dlpack.inspect(capsule)
    assert after.dtype == BFLOAT16
    assert (after.address, after.shape, after.strides) == (
        before.address,
        before.shape,
        before.strides,
    )
    with pytest.raises(DTypeError, match=r"16-bit.*32 bits"):
        dlpack.retype(capsule, np.float32)
    with pytest.raises(DTypeError, match="no DLPack form"):
        dlpack.retype(np.zeros(4, np.uint8).__dlpack__(), "int4")
    assert dlpack.inspect(capsule).dtype == BFLOAT16


def test_retype_refuses_vector_types():
    made = HandMade()
    made.tensor.dtype.lanes = 2
    with pytest.raises(DTypeError, match="2 lanes"):
        dlpack.retype(made.capsule, "f32")


# -- export


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_every_dtype_is_exported_as_what_it_is(record, version):
    array = np.zeros((3, 4), record.dtype)
    capsule = dlpack.capsule_of(array, max_version=version)
    info = dlpack.inspect(capsule)
    assert (info.code, info.bits) == record.dlpack
    assert (info.dtype, info.address, info.shape) == (record.dtype, address(array), (3, 4))
    back = dlpack.as_numpy(capsule, writable=True)
    assert back.dtype == record.dtype
    assert address(back) == address(array)
    array[1, 2] = 1  # both ways, through the same memory
    assert back[1, 2] == 1
    back[2, 3] = 1
    assert array[2, 3] == 1


@pytest.mark.parametrize("record", [r for r in dtypes.TABLE.values() if not r.dlpack])
def test_dtypes_without_a_dlpack_form_are_refused(record):
    with pytest.raises(DTypeError, match="no DLPack form"):
        dlpack.capsule_of(np.zeros(2, record.dtype))


@pytest.mark.parametrize("dtype", [">f4", object, "f4,f4", "M8[s]", "U2"])
def test_dtypes_outside_the_table_are_refused(dtype):
    with pytest.raises(DTypeError):
        dlpack.capsule_of(np.zeros(2, dtype))


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    data=st.data(),
    dtype=st.sampled_from(["float32", BFLOAT16, "int8", "complex128"]),
    version=st.sampled_from(VERSIONS),
)
def test_strides_survive_the_round_trip(shape, data, dtype, version):
    array = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    steps = st.sampled_from([-2, -1, 1, 2])
    array = array[(..., *(slice(None, None, data.draw(steps)) for _ in shape))]
    array = array.transpose(data.draw(st.permutations(range(len(shape)))))
    negative = any(s < 0 and n > 1 for s, n in zip(array.strides, array.shape, strict=True))
    if negative and array.size:
        with pytest.raises(ZeroCopyError, match="negative"):
            dlpack.capsule_of(array, max_version=version)
        copy = dlpack.capsule_of(array, max_version=version, copy=True)
        assert min(dlpack.inspect(copy).element_strides) >= 0
        np.testing.assert_array_equal(dlpack.as_numpy(copy), array)
        return
    capsule = dlpack.capsule_of(array, max_version=version)
    info = dlpack.inspect(capsule)
    assert min(info.element_strides, default=0) >= 0
    assert info.is_contiguous == array.flags.c_contiguous
    back = dlpack.as_numpy(capsule)
    np.testing.assert_array_equal(back, array)
    if array.size:
        assert address(back) == address(array)
        kept = [s for s, n in zip(back.strides, back.shape, strict=True) if n > 1]
        assert kept == [s for s, n in zip(array.strides, array.shape, strict=True) if n > 1]


def test_broadcast_memory_keeps_its_zero_strides():
    array = np.broadcast_to(np.ones(1, BFLOAT16), (1000, 3))
    back = dlpack.as_numpy(dlpack.capsule_of(array, max_version=(1, 0)))
    assert back.strides == (0, 0)
    assert not back.flags.writeable


def test_unaligned_item_strides_are_refused():
    fields = np.zeros(3, np.dtype([("a", BFLOAT16), ("b", np.int8)]))
    with pytest.raises(ZeroCopyError, match="stride"):
        dlpack.capsule_of(fields["a"])


@pytest.mark.parametrize("thing", [np.float32(1), [1.0], 3])
def test_only_arrays_are_exported(thing):
    with pytest.raises(DTypeError, match=type(thing).__name__):
        dlpack.capsule_of(thing)


def test_masked_arrays_are_refused():
    with pytest.raises(ZeroCopyError, match="mask"):
        dlpack.capsule_of(np.ma.array([1.0, 2.0], mask=[0, 1]))


def test_streams_and_other_devices_are_refused():
    array = np.zeros(3)
    for stream in (0, 1, -1):
        with pytest.raises(BufferError, match="stream"):
            dlpack.capsule_of(array, stream=stream)
    for device in ((2, 0), (3, 0), (1, 5)):
        with pytest.raises(ZeroCopyError, match="device"):
            dlpack.capsule_of(array, dl_device=device)
    assert dlpack.inspect(dlpack.capsule_of(array, dl_device=(1, 0))).address == address(array)


@pytest.mark.parametrize(
    ("asked", "versioned"),
    [(None, False), ((0, 8), False), ((1, 0), True), ((1, 3), True), ((2, 0), True)],
)
def test_the_version_asked_for_picks_the_kind(asked, versioned):
    info = dlpack.inspect(dlpack.capsule_of(np.zeros(3, BFLOAT16), max_version=asked))
    assert (info.version is not None) == versioned


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])
def test_read_only_memory(dtype):
    array = np.zeros(3, dtype)
    array.flags.writeable = False
    for asked in (None, (0, 8)):
        with pytest.raises(ZeroCopyError, match="read-only"):
            dlpack.capsule_of(array, max_version=asked)
    capsule = dlpack.capsule_of(array, max_version=(1, 0))
    assert dlpack.inspect(capsule).read_only
    with pytest.raises(ZeroCopyError, match="read-only"):
        dlpack.as_numpy(capsule, writable=True)
    back = dlpack.as_numpy(capsule)  # the refusal did not consume it
    assert not back.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        back.flags.writeable = True
    copied = dlpack.inspect(dlpack.capsule_of(array, max_version=(1, 0), copy=True))
    assert copied.is_copied
    assert not copied.read_only


@pytest.mark.parametrize("version", VERSIONS)
def test_read_only_memory_for_an_importer_that_never_writes(version):
    array = np.zeros((4, 2), BFLOAT16)[::2]
    array.flags.writeable = False
    capsule = dlpack.capsule_of(array, max_version=version, never_written=True)
    info = dlpack.inspect(capsule)
    assert (info.address, info.strides, info.dtype) == (address(array), (4, 1), BFLOAT16)
    assert info.read_only == (version is not None)  # the flag stays where there is one
    assert not array.flags.writeable
    base = weakref.ref(array.base)
    del array
    assert base() is not None  # kept by the capsule
    del capsule
    assert base() is None


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_copy_is_a_copy(dtype, version):
    array = np.ones(3, dtype)
    capsule = dlpack.capsule_of(array, max_version=version, copy=True)
    info = dlpack.inspect(capsule)
    assert info.is_copied == (version is not None)
    assert info.address != address(array)
    array[...] = 5
    assert dlpack.as_numpy(capsule).tolist() == [1, 1, 1]
    shared = dlpack.inspect(dlpack.capsule_of(array, max_version=version, copy=False))
    assert shared.address == address(array)
    assert not shared.is_copied


def test_device_ids_are_written_into_the_capsule():
    exporter = dlpack.HostExporter(np.zeros(3, BFLOAT16), device_id=3)
    assert exporter.__dlpack_device__() == (1, 3)
    for device in (None, (1, 0), (1, 3)):
        assert dlpack.inspect(exporter.__dlpack__(dl_device=device)).device_id == 3
    with pytest.raises(ZeroCopyError):
        exporter.__dlpack__(dl_device=(1, 2))


# -- consume, and lifetimes


@pytest.mark.parametrize("versioned", [True, False])
def test_the_deleter_runs_once_when_the_owner_goes(versioned):
    made = HandMade(versioned=versioned)
    info, owner = dlpack.consume(made.capsule)
    assert info.address == address(made.array)
    gone = weakref.ref(owner)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(owner)
    assert made.deleted == 0
    del owner
    gc.collect()
    assert gone() is None
    assert made.deleted == 1
    for call in (dlpack.inspect, dlpack.consume, dlpack.as_numpy):
        with pytest.raises(ZeroCopyError, match="single use"):
            call(made.capsule)
    del made.capsule
    assert made.deleted == 1


def test_a_null_deleter_is_allowed():
    made = HandMade()
    made.managed.deleter = None
    _, owner = dlpack.consume(made.capsule)
    del owner


def test_of_many_threads_one_consumes(monkeypatch):
    made, owners, refused = HandMade(), [], []
    start, look = threading.Barrier(8), abi._open

    def look_slowly(capsule):
        found = look(capsule)
        time.sleep(0.005)  # the others get their chance between the look and the renaming
        return found

    monkeypatch.setattr(abi, "_open", look_slowly)

    def take():
        start.wait()
        try:
            owners.append(dlpack.consume(made.capsule))
        except ZeroCopyError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refused)) == (1, 7)
    owners.clear()
    assert made.deleted == 1


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])
def test_memory_lives_until_the_last_array_is_gone(dtype):
    made = HandMade(np.arange(4).astype(dtype))
    array = dlpack.as_numpy(made.capsule)
    part, bits = array[1:3], array.view(np.uint8)
    del array
    gc.collect()
    assert made.deleted == 0
    assert part.tolist() == [1, 2]
    del part
    assert made.deleted == 0
    del bits
    assert made.deleted == 1


def test_empty_memory_is_given_back_at_once():
    made = HandMade(shape=(0, 3))
    made.tensor.data = None
    array = dlpack.as_numpy(made.capsule)
    assert (array.shape, array.dtype, made.deleted) == ((0, 3), np.float32, 1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("consume", [True, False])
@pytest.mark.parametrize("copy", [True, False])
def test_capsules_leak_nothing(version, consume, copy):
    array = np.zeros(2048, BFLOAT16)

    def once():
        capsule = dlpack.capsule_of(array, max_version=version, copy=copy)
        dlpack.inspect(capsule)
        if consume:
            dlpack.as_numpy(capsule)

    for _ in range(10):
        once()
    references = sys.getrefcount(array)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(2000):
            once()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert sys.getrefcount(array) == references
    assert grown < 2 * array.nbytes  # 2,000 lost capsules would be 64 bytes each at the least


def test_a_capsule_keeps_the_array_alive():
    array = np.zeros(4, BFLOAT16)
    gone = weakref.ref(array)
    capsule = dlpack.capsule_of(array)
    del array
    back = dlpack.as_numpy(capsule)
    del capsule
    assert back.tolist() == [0, 0, 0, 0]
    assert gone() is not None
    del back
    assert gone() is None
    exporter = dlpack.HostExporter(np.ones(4, BFLOAT16))
    gone = weakref.ref(exporter.array)
    back = dlpack.as_numpy(exporter)
    del exporter
    gc.collect()
    assert gone() is not None
    del back
    assert gone() is None


def test_interpreter_exit_with_everything_alive():
    code = (
        "import ml_dtypes, numpy as np\n"
        "from rlx_driver import dlpack\n"
        "a = np.zeros(4, ml_dtypes.bfloat16)\n"
        "unused = dlpack.capsule_of(a)\n"
        "used = dlpack.capsule_of(a)\n"
        "info, owner = dlpack.consume(used)\n"
        "array = dlpack.as_numpy(a)\n"
        "class Cycle: pass\n"
        "cycle = Cycle(); cycle.itself, cycle.held = cycle, (dlpack.capsule_of(a), used, array)\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- as_numpy


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("writable", [None, True, False])
def test_writability(versioned, writable):
    made = HandMade(versioned=versioned)
    array = dlpack.as_numpy(made.capsule, writable=writable)
    assert array.flags.writeable == (versioned if writable is None else writable)
    if array.flags.writeable:
        array[2] = 7
        assert made.array[2] == 7
    else:
        with pytest.raises(ValueError, match="read-only"):
            array[2] = 7


def test_byte_offsets_are_counted():
    made = HandMade(shape=(2,))
    made.tensor.byte_offset = 8
    assert dlpack.as_numpy(made.capsule).tolist() == [2, 3]


def test_negative_strides_can_be_imported():
    made = HandMade(shape=(3,), strides=(-1,))
    made.tensor.byte_offset = 12
    assert dlpack.as_numpy(made.capsule).tolist() == [3, 2, 1]


@pytest.mark.parametrize("device", list(dlpack.DLDeviceType))
def test_only_host_memory_is_taken(device):
    made = HandMade()
    made.tensor.device.device_type = device
    if device in (1, 3, 11):
        assert dlpack.as_numpy(made.capsule).tolist() == [0, 1, 2, 3]
        return
    with pytest.raises(ZeroCopyError, match="copy it to the host"):
        dlpack.as_numpy(made.capsule)
    dlpack.inspect(made.capsule)  # still unused


class Exporter:
    """Exports a fresh array as told."""

    def __init__(self, device=(1, 0), error=None, old=False):
        self.device, self.error, self.old, self.exports = device, error, old, 0

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        self.exports += 1
        if self.error is not None:
            raise self.error
        if self.old and "max_version" in options:
            raise TypeError("unexpected keyword argument 'max_version'")
        return np.ones(3).__dlpack__(**options)


def test_exporters_are_asked_for_a_versioned_capsule():
    assert dlpack.as_numpy(Exporter()).flags.writeable
    assert not dlpack.as_numpy(Exporter(old=True)).flags.writeable  # it cannot say
    assert dlpack.as_numpy(Exporter(old=True), writable=True).flags.writeable


def test_exporters_off_the_host_are_not_asked():
    exporter = Exporter(device=(2, 0))
    with pytest.raises(ZeroCopyError, match=r"\(2, 0\)"):
        dlpack.as_numpy(exporter)
    assert exporter.exports == 0


@pytest.mark.parametrize("error", [BufferError, ValueError, RuntimeError, AssertionError])
def test_every_refusal_of_an_exporter_is_one_error(error):
    with pytest.raises(ZeroCopyError, match="because") as caught:
        dlpack.as_numpy(Exporter(error=error("because")))
    assert isinstance(caught.value.__cause__, error)
    with pytest.raises(DTypeError, match="__dlpack__"):
        dlpack.as_numpy(object())


def test_numpy_arrays_of_every_dtype_are_taken():
    array = np.zeros(3, ml_dtypes.float8_e4m3)
    assert address(dlpack.as_numpy(array)) == address(array)
    array.flags.writeable = False
    assert not dlpack.as_numpy(array).flags.writeable


# -- torch


@pytest.mark.torch
@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_numpy_and_torch_share_every_dtype_both_ways(record):
    torch = pytest.importorskip("torch")
    array = np.zeros((3, 4), record.dtype)[:, ::2]
    exporter = dlpack.HostExporter(array)
    if record.torch is None:
        with pytest.raises(BufferError):
            torch.from_dlpack(exporter)
        return
    tensor = torch.from_dlpack(exporter)
    assert tensor.dtype is dtypes.torch_dtype(record.dtype)
    assert tensor.data_ptr() == address(array)
    assert tensor.stride() == (4, 2)
    back = dlpack.as_numpy(tensor)
    assert back.dtype == record.dtype
    assert (address(back), back.strides) == (address(array), array.strides)
    assert back.flags.writeable
    tensor[1, 1] = 1
    assert array[1, 1] == back[1, 1] == 1
    back[2, 0] = 1
    assert tensor[2, 0].to(torch.complex128) == 1
    legacy = dlpack.as_numpy(torch.utils.dlpack.to_dlpack(tensor))  # unversioned
    assert (address(legacy), legacy.dtype) == (address(array), record.dtype)
    assert not legacy.flags.writeable


@pytest.mark.torch
def test_torch_keeps_the_memory_alive():
    torch = pytest.importorskip("torch")
    array = np.ones(1000, BFLOAT16)
    gone = weakref.ref(array)
    tensor = torch.from_dlpack(dlpack.HostExporter(array))
    del array
    gc.collect()
    assert gone() is not None
    assert tensor.float().sum() == 1000
    del tensor
    assert gone() is None


@pytest.mark.torch
def test_arrays_keep_a_tensor_alive():
    torch = pytest.importorskip("torch")
    tensor = torch.full((1000,), 3, dtype=torch.bfloat16)
    expected = torch.full((1000,), 3, dtype=torch.bfloat16)
    array = dlpack.as_numpy(tensor)
    del tensor
    gc.collect()
    churn = [torch.zeros(1000, dtype=torch.bfloat16) for _ in range(50)]  # would reuse freed memory
    assert (array == 3).all()
    del churn
    assert expected.sum() == 3000


@pytest.mark.torch
def test_torch_never_sees_negative_strides():
    torch = pytest.importorskip("torch")  # its own import of one aborts the process
    reversed_ = np.arange(4, dtype=np.float32)[::-1]
    with pytest.raises(ZeroCopyError, match="negative"):
        torch.from_dlpack(dlpack.HostExporter(reversed_))
    assert torch.from_dlpack(dlpack.HostExporter(reversed_), copy=True).tolist() == [3, 2, 1, 0]
    for single in (np.ones((1, 3))[::-1], np.ones((0, 3))[:, ::-1], np.ones(1)[::-1]):
        tensor = torch.from_dlpack(dlpack.HostExporter(single))
        assert tensor.tolist() == single.tolist()


@pytest.mark.torch
def test_what_torch_would_lose_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(ZeroCopyError, match="gradient"):
        dlpack.as_numpy(torch.zeros(2, requires_grad=True))
    conj = torch.tensor([1 + 2j, 3 + 4j]).conj()
    with pytest.raises(ZeroCopyError, match="conj"):
        dlpack.as_numpy(conj)
    with pytest.raises(ZeroCopyError, match="neg bit"):
        dlpack.as_numpy(conj.imag)
    assert dlpack.as_numpy(conj.imag.resolve_neg()).tolist() == [-2, -4]
    for name in ("int4", "uint4", "int2", "uint1"):
        if hasattr(torch, name):
            with pytest.raises(DTypeError, match=f"torch.{name} is not supported"):
                dlpack.as_numpy(torch.empty(2, dtype=getattr(torch, name)))
    with pytest.raises(ZeroCopyError):
        dlpack.as_numpy(torch.empty(2, device="meta"))
    assert dlpack.as_numpy(torch.zeros(0, 3)).shape == (0, 3)
    assert dlpack.as_numpy(torch.tensor(4.0)).tolist() == 4


@pytest.mark.torch
def test_torch_still_drops_the_neg_bit():
    torch = pytest.importorskip("torch")  # when this fails, as_numpy need not look for it
    negated = torch.tensor([1 + 2j]).conj().imag
    assert negated.is_neg()
    assert np.from_dlpack(negated).tolist() == [2]


@pytest.mark.cuda
def test_pinned_memory_is_host_memory_and_device_memory_is_not():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    pinned = torch.arange(4, dtype=torch.bfloat16).pin_memory()
    array = dlpack.as_numpy(pinned)
    assert (address(array), array.dtype) == (pinned.data_ptr(), BFLOAT16)
    pinned[1] = 7
    assert array.tolist() == [0, 7, 2, 3]
    with pytest.raises(ZeroCopyError, match="copy it to the host"):
        dlpack.as_numpy(pinned.cuda())
    assert dlpack.inspect(pinned.cuda().__dlpack__()).device_type == dlpack.DLDeviceType.CUDA


# -- JAX


@pytest.mark.jax
@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_numpy_and_jax_share_every_dtype_both_ways(record):
    jax = pytest.importorskip("jax")
    array = aligned((3, 4), record.dtype)
    array[1, 2] = 1
    with wide(jax):
        imported = jax.numpy.from_dlpack(dlpack.HostExporter(array))
    assert imported.dtype == record.dtype
    assert imported.unsafe_buffer_pointer() == address(array)
    back = dlpack.as_numpy(imported)
    assert (back.dtype, address(back)) == (record.dtype, address(array))
    assert not back.flags.writeable
    assert back[1, 2] == 1
    array[2, 3] = 1  # nothing of JAX is pending
    assert back[2, 3] == 1
    gone = weakref.ref(array.base)
    del array, imported
    gc.collect()
    assert back[2, 3] == 1
    assert gone() is not None


def wide(jax):
    """Turn 64-bit types on for a while, in JAX of either age."""
    enable = getattr(jax, "enable_x64", None)
    if enable is None:
        from jax.experimental import enable_x64 as enable
    return enable(True)


@pytest.mark.jax
def test_jax_shares_read_only_memory_when_promised():
    jax = pytest.importorskip("jax")
    array = aligned((16,), BFLOAT16)
    array.flags.writeable = False
    with pytest.raises(ZeroCopyError, match="read-only"):
        jax.numpy.from_dlpack(dlpack.HostExporter(array))
    imported = jax.numpy.from_dlpack(dlpack.HostExporter(array, never_written=True))
    assert imported.unsafe_buffer_pointer() == address(array)


@pytest.mark.jax
def test_as_numpy_waits_for_pending_results():
    jax = pytest.importorskip("jax")

    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 30, lambda _, y: y @ y * 1e-3 + x, x)

    x = jax.device_put(np.ones((300, 300), np.float32), jax.devices("cpu")[0])
    expected = np.array(slow(x))
    for _ in range(5):
        np.testing.assert_array_equal(dlpack.as_numpy(slow(x)).copy(), expected)


@pytest.mark.jax
def test_shards_carry_the_device_they_stand_for():
    pytest.importorskip("jax")
    code = (
        "import jax, ml_dtypes, numpy as np\n"
        "from rlx_driver import dlpack\n"
        "raw = np.zeros(192, np.uint8); start = -raw.ctypes.data % 64\n"
        "a = raw[start:start + 128].view(ml_dtypes.bfloat16)\n"
        "for i, device in enumerate(jax.devices()):\n"
        "    j = jax.numpy.from_dlpack(dlpack.HostExporter(a, device_id=i))\n"
        "    assert j.devices() == {device}, (i, j.devices())\n"
        "    assert j.unsafe_buffer_pointer() == a.ctypes.data\n"
        "    assert dlpack.inspect(j.__dlpack__()).device_id == i\n"
        "    assert dlpack.as_numpy(j).ctypes.data == a.ctypes.data\n"
        "assert i == 2\n"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | flags, check=True, timeout=120)
