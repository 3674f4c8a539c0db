"""Files that are damaged, cut short or meant to do harm: an error says so, and nothing else."""

import json
import os
import resource

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import rlx_driver as rlx
from arena_support import everything, small_plan
from rlx_driver import Arena, HandleRegion, SnapshotError
from snapshot_support import pattern, raw_file, read_header, rich_plan

pytest.importorskip("safetensors")

HUGE = 2**62


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.fixture
def good(path):
    """The header, as JSON, and the data of a file that is right."""
    with Arena(small_plan()) as arena:
        arena.view("raw")[:] = pattern(64)
        arena.save(path)
    header, begin = read_header(path)
    return header, path.read_bytes()[begin:]


def loads(path):
    """Load a file in every way, as an arena and as handles; the errors."""
    errors = []
    for load in (
        lambda: Arena.load(path),
        lambda: Arena.load(path, mmap=False),
        lambda: Arena.load(path, debug=True),
        lambda: HandleRegion.load(path),
        lambda: HandleRegion.load(path, mmap=True),
    ):
        try:
            with load() as made:
                if isinstance(made, Arena):
                    made.plan.validate()
                    everything(made)
                else:
                    [handle.numpy().tobytes() for handle in made]
        except rlx.DriverError as error:
            errors.append(error)
    return errors


def found(path):
    """Do the same, and see that nothing is left of what was made."""
    with rlx.no_leaks():
        return loads(path)


def refused(path, text=""):
    """Check that a file is refused in every way, by name and in words."""
    errors = found(path)
    assert len(errors) == 5
    for error in errors:
        assert isinstance(error, SnapshotError)
        assert path.name in str(error)
        assert text in str(error)


def refused_plan(path, text):
    """Check that a file is refused as an arena, though its tensors are right."""
    errors = found(path)
    assert len(errors) == 3
    for error in errors:
        assert isinstance(error, SnapshotError)
        assert path.name in str(error)
        assert text in str(error), str(error)
        assert len(str(error)) < 2000


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_file_without_a_length(path, count):
    path.write_bytes(bytes(count))
    refused(path, f"{count} bytes")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 3, 1])
def test_a_header_length_that_is_wrong(path, length):
    raw_file(path, b"{}", length=length)
    refused(path)


def test_a_header_that_is_too_long_is_not_read(path):
    with path.open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)  # it takes no room
    refused(path, "header too large")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"no json",
        b"[1, 2]",
        b"null",
        b'{"\xff": 1}',
        b"{}\0\0",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"x": {"dtype": "U8", "shape": [1e400], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "U8", "shape": "4", "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"x": 1}}',
        b'{"__metadata__": [1]}',
    ],
    ids=lambda header: repr(header[:30]),
)
def test_a_header_that_is_none(path, header):
    raw_file(path, header, b"1234")
    refused(path)


def tensor(shape=(4,), offsets=(0, 4), code="U8"):
    return {"dtype": code, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"x": tensor()}, 3),
        ({"x": tensor()}, 5),
        ({}, 1),
        ({"x": tensor(), "y": tensor(offsets=(2, 6))}, 6),
        ({"x": tensor(), "y": tensor(offsets=(0, 4))}, 4),
        ({"x": tensor(offsets=(1, 5))}, 5),
        ({"x": tensor(), "y": tensor(offsets=(5, 9))}, 9),
        ({"x": tensor(offsets=(4, 0))}, 4),
        ({"x": tensor(offsets=(-4, 0))}, 4),
        ({"x": tensor(offsets=(HUGE, HUGE + 4))}, 4),
        ({"x": tensor((HUGE,), (0, HUGE))}, 4),
        ({"x": tensor((HUGE, HUGE), (0, 4))}, 4),
        ({"x": tensor((HUGE, 4), (0, 0))}, 0),  # 2**64 is 0 in 64 bits
        ({"x": tensor((5,))}, 4),
        ({"x": tensor((3,))}, 4),
        ({"x": tensor((-4,))}, 4),
        ({"x": tensor(code="F32")}, 4),
        ({"x": tensor(code="F3")}, 4),
        ({"x": tensor(code="")}, 4),
        ({"x": tensor((3,), (0, 1), "F4")}, 1),
        ({"x": tensor((0, HUGE, HUGE), (0, 0))}, 0),
        ({"x": tensor((0, 2**61, 4), (0, 0), "F32")}, 0),
        ({"x": tensor((1,) * 65, (0, 1))}, 1),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_the_file(path, header, size):
    raw_file(path, header, bytes(size))
    refused(path)


def test_more_axes_than_an_array_has_say_so(path):
    raw_file(path, {"x": tensor((1,) * 65, (0, 1))}, b"1")
    refused(path, "65 axes")


def test_every_truncation_is_noticed(path, good):
    whole = path.read_bytes()
    _, begin = read_header(path)
    for size in [*range(0, begin, 37), begin - 1, begin, begin + 1, len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)
    path.write_bytes(whole)
    assert loads(path) == []


def test_a_sparse_file_of_any_size_is_not_allocated_for(path):
    size = 1 << 42  # 4 TiB, of which nothing is there
    raw_file(path, {"x": tensor((size,), (0, size))})
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        size = 1 << 40  # the file system has smaller files
        raw_file(path, {"x": tensor((size,), (0, size))})
        os.truncate(path, path.stat().st_size + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with rlx.no_leaks(), pytest.raises(rlx.OutOfDeviceMemory):
        HandleRegion.load(path)
    with pytest.raises(SnapshotError, match="metadata has no plan"):
        Arena.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


# --- the plan ------------------------------------------------------------------------------------


def test_a_file_without_a_plan_says_where_it_belongs(path):
    raw_file(path, {"x": tensor()}, b"1234")
    with pytest.raises(SnapshotError, match=r"HandleRegion\.load"):
        Arena.load(path)
    with HandleRegion() as region:
        region.save(path)
    with pytest.raises(SnapshotError, match=r"HandleRegion\.load"):
        Arena.load(path)


def test_a_format_of_later_says_so(path, good):
    header, data = good
    header["__metadata__"]["rlx_driver.format"] = "arena/2"
    raw_file(path, header, data)
    refused_plan(path, "newer")


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"other": tensor((2304,), (0, 2304))},
        {"arena": tensor((576,), (0, 2304), "F32")},
        {"arena": tensor((48, 48), (0, 2304))},
        {"arena": tensor((2300,), (0, 2300)), "more": tensor(offsets=(2300, 2304))},
    ],
    ids=["none", "name", "dtype", "shape", "two"],
)
def test_tensors_that_are_not_the_plan(path, good, tensors):
    header, data = good
    assert len(data) == 2304
    meta = {"__metadata__": header["__metadata__"]}
    raw_file(path, meta | tensors, data if tensors else b"")
    refused_plan(path, "its plan needs one tensor 'arena' U8[2304]")


def test_a_tensor_shorter_than_the_plan(path, good):
    header, data = good
    header["arena"] = tensor((2000,), (0, 2000))
    raw_file(path, header, data[:2000])
    refused_plan(path, "2304")


def changed(**columns):
    def change(plan):
        for name, value in columns.items():
            if isinstance(value, tuple):
                plan[name][value[0]] = value[1]
            else:
                plan[name] = value

    return change


def without(name):
    return lambda plan: plan.pop(name)


ROWS = {"w": 0, "a": 1, "b": 2, "c": 3, "flat": 4}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (changed(offsets=(2, 768)), "share memory"),
        (changed(offsets=(1, -64)), "offset"),
        (changed(offsets=(1, 2**70)), "offset"),
        (changed(offsets=(1, 257)), "alignment"),
        (changed(offsets=(0, 1 << 40)), "tensor"),
        (changed(offsets=(4, 0)), "alias"),
        (changed(offsets=(1, None)), "whole number"),
        (changed(offsets=(1, True)), "whole number"),
        (changed(offsets=(1, 256.0)), "whole number"),
        (changed(offsets=(1, "256")), "whole number"),
        (changed(sizes=(1, -1)), "size"),
        (changed(sizes=(1, 2**62)), "2**61"),
        (changed(sizes=(1, 10**4000)), "its size is 1000"),
        (changed(sizes=(1, 1000)), "needs 1024 bytes"),
        (changed(firsts=(1, 7)), "before its first"),
        (changed(lasts=(1, [])), "whole number"),
        (changed(alignment=3), "alignment"),
        (changed(alignment=0), "alignment"),
        (changed(alignment=1 << 40), "alignment"),
        (changed(alignment="64"), "whole number"),
        (changed(alignments=(0, 1 << 35)), "aligns to"),
        (changed(alignments=(1, -2)), "alignment"),
        (changed(pins=(1, 64)), "pinned"),
        (changed(aliases=(4, "nobody")), "nobody"),
        (changed(aliases=(1, "flat")), ""),
        (changed(aliases=(4, {"x": 1})), "no node"),
        (changed(alias_offsets=(4, -8)), ""),
        (changed(alias_offsets=(4, 2**61)), ""),
        (changed(kinds=(0, "other")), "kind"),
        (changed(kinds=(0, 3)), "kind"),
        (changed(dtypes=(1, "f33")), "f33"),
        (changed(dtypes=(1, ["a", "b"])), "no dtype"),
        (changed(dtypes=(1, [5])), "no dtype"),
        (changed(dtypes=(1, {})), "no dtype"),
        (changed(shapes=(1, 4)), "no shape"),
        (changed(shapes=(1, [-4])), "shape"),
        (changed(shapes=(1, [1.5])), "whole number"),
        (changed(shapes=(1, [1] * 65)), "65 axes"),
        (changed(shapes=(6, [0, 2**62])), "more elements"),
        (changed(shapes=(1, [2**40, 2**40])), "more elements"),
        (changed(nodes=(1, "b")), "more than once"),
        (changed(nodes=(1, {"float": "1"})), "no node"),
        (changed(nodes=(1, {"float": "nan", "x": 1})), "no node"),
        (changed(nodes="abcdefg"), "no column 'nodes'"),
        (changed(nodes=[]), "as long"),
        (changed(sizes={}), "no column 'sizes'"),
        (without("offsets"), "no column 'offsets'"),
        (without("nodes"), "no column 'nodes'"),
        (without("sizes"), "no column 'sizes'"),
        (without("alignment"), "no columns"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plan_that_makes_no_sense(path, good, change, text):
    header, data = good
    plan = json.loads(header["__metadata__"]["rlx_driver.plan"])
    assert plan["nodes"][:5] == list(ROWS)
    change(plan)
    header["__metadata__"]["rlx_driver.plan"] = json.dumps(plan)
    raw_file(path, header, data)
    refused_plan(path, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "[]",
        "null",
        "[" * 1_000_000,
        '{"nodes":' * 100_000,
        "9" * 5000,
        '{"alignment": NaN}',
        '{"alignment": 64}',
        '{"alignment": 64, "nodes": [' + "[" * 900 + "]" * 900 + "]}",
    ],
    ids=lambda text: text[:20],
)
def test_a_plan_that_is_no_json(path, good, text):
    header, data = good
    header["__metadata__"]["rlx_driver.plan"] = text
    raw_file(path, header, data)
    refused_plan(path, "unusable")


def test_a_node_nested_deeply(path, good):
    header, data = good
    plan = json.loads(header["__metadata__"]["rlx_driver.plan"])
    node = []
    for _ in range(300):
        node = [node]
    plan["nodes"][5] = node
    header["__metadata__"]["rlx_driver.plan"] = json.dumps(plan)
    raw_file(path, header, data)
    refused_plan(path, "levels")


@pytest.mark.parametrize(
    "said",
    [
        "{",
        "[" * 100_000,
        "[]",
        '{"x": 1}',
        '{"x": []}',
        '{"x": ["f33", [4]]}',
        '{"x": ["int4", [5]]}',
        '{"x": ["int4", [-4, -1]]}',
        '{"x": ["int4", ["4"]]}',
        '{"x": ["int4", [4.0]]}',
        '{"x": ["int4", [true, 4]]}',
        '{"x": ["int4", "4"]}',
        '{"x": [["int4"], [4]]}',
        '{"x": ["complex128", [1]]}',
        '{"x": ["int4", [4], 1]}',
    ],
)
def test_dtypes_of_handles_that_make_no_sense(path, said):
    raw_file(path, {"__metadata__": {"rlx_driver.dtypes": said}, "x": tensor()}, b"\1\2\3\4")
    for mmap in (False, True):
        with rlx.no_leaks(), pytest.raises(SnapshotError, match="damaged"):
            HandleRegion.load(path, mmap=mmap)


def test_a_restore_from_a_damaged_file_changes_nothing(path):
    with HandleRegion() as region:
        handle = region.create({"x": ((64,), "u8")})["x"]
        handle.numpy()[:] = 5
        region.save(path)
        path.write_bytes(path.read_bytes()[:-1])
        handle.numpy()[:] = 7
        with pytest.raises(SnapshotError):
            region.restore(path)
        assert (handle.numpy() == 7).all()


# --- anything ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files that are right: of an arena and of a region."""
    folder = tmp_path_factory.mktemp("good")
    with Arena(rich_plan()) as arena:
        arena.save(folder / "arena")
    with HandleRegion() as region:
        region.create({"w": ((8, 16), "f32"), "odd": ((3,), "int4"), "s": ((), "bf16")})
        region.save(folder / "region")
    return folder / "arena", folder / "region"


EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 2**20), st.integers(0, 7)),
        st.tuples(
            st.just("set"), st.integers(0, 2**20), st.sampled_from(b'0123456789-"[]{},:.eE ')
        ),
        st.tuples(st.just("cut"), st.integers(0, 2**20), st.integers(1, 40)),
        st.tuples(st.just("end"), st.integers(0, 2**20), st.just(0)),
        st.tuples(st.just("put"), st.integers(0, 2**20), st.binary(min_size=1, max_size=12)),
    ),
    min_size=1,
    max_size=4,
)


def edited(raw, edits):
    raw = bytearray(raw)
    for kind, place, what in edits:
        if not raw:
            break
        place %= len(raw)
        if kind == "flip":
            raw[place] ^= 1 << what
        elif kind == "set":
            raw[place] = what
        elif kind == "cut":
            del raw[place : place + what]
        elif kind == "end":
            del raw[place:]
        else:
            raw[place:place] = what
    return bytes(raw)


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(which=st.integers(0, 1), edits=EDITS, mend=st.booleans())
@example(which=0, edits=[("flip", 9, 7)], mend=True)
def test_a_file_with_any_damage_loads_or_is_refused(path, files, which, edits, mend):
    raw = files[which].read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length].rstrip(b" "), raw[8 + length :]
    if mend:  # damage in the header alone, whose length is then put right
        header = edited(header, edits)
        raw = len(header).to_bytes(8, "little") + header + data
    else:
        raw = edited(len(header).to_bytes(8, "little") + header + data, edits)
    path.write_bytes(raw)
    for error in loads(path):
        assert isinstance(error, rlx.DriverError)


NUMBERS = st.one_of(
    st.integers(-2, 20), st.integers(-(2**70), 2**70), st.sampled_from([0, 64, 256, 2**61, 2**31])
)
VALUES = st.one_of(
    NUMBERS, st.none(), st.booleans(), st.floats(allow_nan=False), st.text(max_size=3)
)


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_plan_with_any_values_loads_or_is_refused(path, good, data):
    header, raw = good
    plan = json.loads(header["__metadata__"]["rlx_driver.plan"])
    for _ in range(data.draw(st.integers(1, 3))):
        column = data.draw(st.sampled_from(sorted(set(plan) - {"alignment"})))
        row = data.draw(st.integers(0, len(plan["nodes"]) - 1))
        plan[column][row] = data.draw(
            st.one_of(
                VALUES,
                st.lists(VALUES, max_size=3),
                st.sampled_from(plan[column]),
                st.dictionaries(st.just("float"), VALUES, max_size=1),
            )
        )
    header["__metadata__"]["rlx_driver.plan"] = json.dumps(plan)
    raw_file(path, header, raw)
    for error in loads(path):
        assert isinstance(error, rlx.DriverError)


def test_the_bytes_of_a_file_that_is_only_odd_are_right(path, good):
    header, data = good
    raw_file(path, json.dumps(header, indent=3).encode() + b"  \n", data)
    assert loads(path) == []
    with Arena.load(path) as loaded:
        assert everything(loaded).tobytes() == data
        np.testing.assert_array_equal(loaded.read("raw"), pattern(64))
