"""The dtype table: every name of a dtype leads to the same record, and strangers are refused."""

import difflib
import importlib
import pickle
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx_driver import dtypes
from rlx_driver.errors import DTypeError

RECORDS = list(dtypes.TABLE.values())
IDS = [record.name for record in RECORDS]
SHORT = {
    "bool": "bool",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
    "c64": "complex64",
    "c128": "complex128",
}


def test_the_table_covers_numpy_and_ml_dtypes():
    expected = {*SHORT.values(), "bfloat16"}
    expected |= {
        name
        for name in dir(ml_dtypes)
        if name.rstrip("0123456789") in {"int", "uint"} or name.startswith("float")
    }
    assert {record.name for record in RECORDS} == expected


@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_every_name_leads_to_the_record(record):
    names = [record.dtype, record.dtype.type, record.name]
    names += [record.short] if record.short else []
    for name in names:
        assert dtypes.info(name) is record
        assert dtypes.dtype(name) is record.dtype
    assert record.dtype.name == record.name
    assert record.note.endswith(".")


@pytest.mark.parametrize(("short", "name"), SHORT.items())
def test_rlx_short_names(short, name):
    assert dtypes.dtype(short) == np.dtype(name)
    assert dtypes.info(name).short == short


def test_bfloat16_has_one_meaning():
    expected = np.dtype(ml_dtypes.bfloat16)
    for name in ("bf16", "bfloat16", ml_dtypes.bfloat16, expected, np.zeros(1, expected).dtype):
        assert dtypes.dtype(name) == expected


def test_names_are_unique():
    names = [name for r in RECORDS for name in {r.name, r.short} if name is not None]
    assert len(names) == len(set(names))
    codes = [r.dlpack for r in RECORDS if r.dlpack is not None]
    assert len(codes) == len(set(codes))


def test_python_and_numpy_types_mean_what_numpy_says():
    assert dtypes.dtype(bool) == np.bool_
    assert dtypes.dtype(int) == np.dtype(int)
    assert dtypes.dtype(float) == np.float64
    assert dtypes.dtype(complex) == np.complex128
    assert dtypes.dtype("double") == np.float64
    assert dtypes.dtype("<i8") == np.int64
    assert dtypes.dtype("=f4") is dtypes.dtype("f32")
    assert dtypes.dtype(np.longlong) is dtypes.dtype("int64")


def test_byte_counts_are_not_taken_for_bit_counts():
    assert dtypes.dtype("i8") == np.int8  # NumPy alone would say int64
    for code in ("i4", "f4", "f8", "u2", "c8", "b1", "i1"):
        with pytest.raises(DTypeError, match="count bits"):
            dtypes.dtype(code)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (">f4", "byte order"),
        (np.dtype(">i2"), "byte order"),
        (np.dtype(ml_dtypes.bfloat16).newbyteorder(">"), "byte order"),
        (np.dtype("<f4, <i4"), "structured"),
        ([("a", "<i4")], "structured"),
        (np.dtype(("<f4", (2,))), "structured"),
        (object, "references"),
        (str, "text"),
        ("S3", "known"),
        ("datetime64[s]", "dates"),
        (np.timedelta64, "dates"),
        (np.dtype("V3"), "no counterpart"),
        (np.longdouble, "no counterpart"),
        (None, "float64"),
        (3.0, "known"),
        ("", "known"),
        ({}, "structured"),
        (np.zeros(2), "array"),
        (np.float32(1), "array"),
        (Ellipsis, "known"),
    ],
    ids=repr,
)
def test_others_are_refused_with_the_reason(x, why):
    if x is np.longdouble and np.dtype(x) in dtypes.TABLE:
        pytest.skip("long double is float64 on this platform")
    with pytest.raises(DTypeError, match=why):
        dtypes.dtype(x)
    with pytest.raises(TypeError):
        dtypes.info(x)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("flaot32", "float32"), ("BF16", "bf16"), ("bfloat", "bfloat16"), ("float8_e4m3f", "float8")],
)
def test_a_near_miss_is_named(typo, meant):
    with pytest.raises(DTypeError, match=f"Did you mean '{meant}") as caught:
        dtypes.dtype(typo)
    assert repr(typo) in str(caught.value)
    assert "complex128" in str(caught.value)  # what is known


@given(st.text(max_size=12))
def test_any_text_is_a_known_dtype_or_refused(text):
    try:
        found = dtypes.dtype(text)
    except DTypeError:
        assert text not in IDS
    else:
        assert found in dtypes.TABLE


@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_dlpack_codes_round_trip(record):
    if record.dlpack is None:
        assert record.dtype.itemsize == 1
        assert not record.numpy_exports
        assert "One element a byte" in record.note
    else:
        assert record.dlpack[1] == 8 * record.dtype.itemsize
        assert dtypes.from_dlpack_code(*record.dlpack) is record.dtype


@pytest.mark.parametrize(
    "code", [(0, 4, 1), (17, 4, 1), (3, 64, 1), (2, 32, 4), (2, 128, 1), (99, 8, 1)]
)
def test_foreign_dlpack_codes_are_refused(code):
    with pytest.raises(DTypeError, match=str(code[0])):
        dtypes.from_dlpack_code(*code)


@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_numpy_exports_what_the_table_says(record):
    array = np.zeros(3, record.dtype)
    if record.numpy_exports:
        assert np.from_dlpack(array).dtype == record.dtype
    else:
        with pytest.raises(BufferError):
            array.__dlpack__()


def test_the_table_cannot_be_changed():
    record = dtypes.info("f32")
    with pytest.raises(AttributeError):
        record.name = "other"
    with pytest.raises(TypeError):
        dtypes.TABLE[np.dtype(object)] = record
    assert pickle.loads(pickle.dumps(record)) == record


@pytest.mark.torch
@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_torch_dtypes_round_trip(record):
    torch = pytest.importorskip("torch")
    if record.torch is None:
        with pytest.raises(DTypeError, match="torch has no counterpart"):
            dtypes.torch_dtype(record.dtype)
        named = getattr(torch, record.name, None)  # torch.int4 and the like are refused
        if named is not None:
            with pytest.raises(DTypeError, match="refuses"):
                dtypes.dtype(named)
        return
    found = dtypes.torch_dtype(record.name)
    assert found is getattr(torch, record.torch)
    assert found.itemsize == record.dtype.itemsize
    assert dtypes.dtype(found) is record.dtype


@pytest.mark.torch
def test_torch_dtypes_without_counterpart():
    torch = pytest.importorskip("torch")
    assert dtypes.dtype(torch.half) == np.float16
    for name in ("complex32", "quint8", "float4_e2m1fn_x2", "int7"):
        if hasattr(torch, name):
            with pytest.raises(DTypeError, match=name):
                dtypes.dtype(getattr(torch, name))
    with pytest.raises(DTypeError, match="array"):
        dtypes.dtype(torch.zeros(2))


@pytest.mark.jax
@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_jax_dtypes_round_trip(record):
    jnp = pytest.importorskip("jax.numpy")
    if not hasattr(jnp, record.jax):
        with pytest.raises(DTypeError, match="has no"):
            dtypes.jax_dtype(record.name)
        return
    found = dtypes.jax_dtype(record.name)
    assert found is getattr(jnp, record.jax)
    assert dtypes.dtype(found) is record.dtype


@pytest.mark.jax
def test_jax_keys_are_no_dtype():
    jax = pytest.importorskip("jax")
    with pytest.raises(DTypeError, match="known"):
        dtypes.dtype(jax.random.key(0).dtype)


def test_a_missing_framework_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DTypeError, match=r"rlx-driver\[torch\]"):
        dtypes.torch_dtype("bf16")
    with pytest.raises(DTypeError, match=r"rlx-driver\[jax\]"):
        dtypes.jax_dtype("bf16")


def test_an_old_framework_is_named(monkeypatch):
    old = types.ModuleType("torch")
    old.__version__ = "1.0"
    monkeypatch.setitem(sys.modules, "torch", old)
    with pytest.raises(DTypeError, match=r"1\.0 has no bfloat16"):
        dtypes.torch_dtype("bf16")


def test_importing_the_table_imports_no_framework():
    code = (
        "import sys, importlib, rlx_driver.dtypes, rlx_driver.dlpack\n"
        "rlx_driver.dtypes.dtype('bf16')\n"
        "assert not {'torch', 'jax', 'jaxlib'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_lookups_do_not_search_for_near_names(monkeypatch):
    monkeypatch.setattr(difflib, "get_close_matches", None)  # only an error may pay for that
    assert dtypes.dtype(np.dtype("float32")) == np.float32
    assert dtypes.dtype("bf16") == ml_dtypes.bfloat16
