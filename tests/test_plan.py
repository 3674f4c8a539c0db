"""Plans: what they say, that they are valid and good, and what they refuse."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import rlx_driver as rlx
from plan_support import clashes, tiling, trace, training
from rlx_driver import _plan_search
from rlx_driver._plan_intervals import read_intervals
from rlx_driver._plan_slots import make_slots
from rlx_driver._plan_sweep import PeakSweep
from support import must_run

REAL = ["fx_bert_12L_train", "fx_gpt2_12L_infer", "fx_resnet50_infer", "jaxpr_tf12_train"]
HARD = [f"minimalloc_{letter}" for letter in "ABCDEF"]
I = rlx.Interval  # noqa: E741


# what a plan says


def test_a_plan_answers_for_its_nodes():
    plan = rlx.plan_memory([("a", 100, 0, 3), ("b", 64, 2, 5), ("c", 100, 4, 6)])
    assert len(plan) == 3
    assert list(plan) == ["a", "b", "c"] == list(plan.nodes)
    assert "a" in plan
    assert "x" not in plan
    assert [] not in plan
    assert plan.offset("a") == plan.offset("c") != plan.offset("b")
    assert plan.size == plan.lower_bound == 164
    assert plan.ratio == 1.0
    assert plan.optimal
    assert plan.alignment == 64
    assert plan.capacity is None
    assert plan.life("b") == (2, 5)
    assert plan.root("b") == "b"
    assert plan.interval("b") == I("b", 64, 2, 5)
    assert plan.alive_at(2) == ["a", "b"]
    assert plan.alive_at(7) == []
    assert plan.peak_step in (2, 3, 4)
    assert repr(plan) == "MemoryPlan(3 nodes, 164 bytes, optimal)"
    plan.validate()


def test_columns_follow_the_nodes_and_cannot_be_written():
    plan = rlx.plan_memory([I("w", 10, 3, 3, kind="constant"), I("x", 20, 0, 7)])
    assert plan.sizes.tolist() == [10, 20]
    assert plan.firsts.tolist() == [3, 0]
    assert plan.lasts.tolist() == [3, 7]
    assert plan.offsets.tolist() == [plan.offset("w"), plan.offset("x")]
    for column in (plan.offsets, plan.sizes, plan.firsts, plan.lasts):
        assert column.dtype == np.int64
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


def test_a_plan_cannot_be_changed_or_made_by_hand():
    plan = rlx.plan_memory([("a", 1, 0, 0)])
    with pytest.raises(AttributeError, match="cannot be changed"):
        plan.size = 3
    with pytest.raises(AttributeError, match="cannot be changed"):
        del plan._size
    with pytest.raises(TypeError, match="plan_memory"):
        rlx.MemoryPlan()


def test_nothing_to_plan():
    plan = rlx.plan_memory([])
    assert (plan.size, plan.lower_bound, plan.ratio, plan.optimal) == (0, 0, 1.0, True)
    assert plan.peak_step is None
    assert plan.alive_at(0) == []
    assert "0 bytes" in plan.report()
    assert plan.offsets.shape == (0,)


def test_a_stranger_has_no_offset():
    plan = rlx.plan_memory([("a", 1, 0, 0)])
    for ask in (plan.offset, plan.life, plan.root, plan.interval):
        with pytest.raises(rlx.UnboundNameError, match="'x'"):
            ask("x")
        with pytest.raises(rlx.UnboundNameError):
            ask(["unhashable"])


def test_nodes_of_size_zero_lie_at_zero_and_meet_nobody():
    plan = rlx.plan_memory([("a", 64, 0, 9), ("none", 0, 0, 9), ("b", 64, 0, 9)])
    assert plan.offset("none") == 0
    assert plan.size == 128
    assert "none" in plan.alive_at(4)
    assert rlx.plan_memory([("none", 0, 0, 1)]).size == 0


def test_tuples_intervals_and_numpy_integers_mix():
    plan = rlx.plan_memory(iter([("a", np.int32(64), np.int64(0), 1), I("b", np.uint8(64), 1, 2)]))
    assert plan.size == 128
    assert plan.interval("a") == I("a", 64, 0, 1)


def test_the_last_step_is_inclusive():
    assert rlx.plan_memory([("a", 64, 0, 1), ("b", 64, 1, 2)]).size == 128
    assert rlx.plan_memory([("a", 64, 0, 1), ("b", 64, 2, 3)]).size == 64
    assert rlx.plan_memory([I.half_open("a", 64, 0, 1), I.half_open("b", 64, 1, 2)]).size == 64


def test_steps_may_be_negative_and_far_apart():
    plan = rlx.plan_memory([("a", 64, -(2**60), 2**60), ("b", 64, 2**60, 2**60)])
    assert plan.size == 128
    assert plan.life("a") == (-(2**60), 2**60)


@pytest.mark.parametrize("kind", ["input", "output", "constant"])
def test_inputs_outputs_and_constants_live_for_the_whole_run(kind):
    plan = rlx.plan_memory([I("w", 64, 5, 5, kind=kind), ("a", 64, 0, 1), ("b", 64, 2, 9)])
    assert plan.life("w") == (0, 9)
    assert plan.size == 128
    assert plan.offset("w") not in (plan.offset("a"), plan.offset("b"))


# aliases, pins, alignments


def test_aliases_share_the_slot_of_their_root_and_extend_its_life():
    plan = rlx.plan_memory(
        [
            I("x", 256, 2, 4),
            I("row", 64, 5, 8, alias_of="x", alias_offset=128),
            I("part", 16, 9, 11, alias_of="row", alias_offset=8),
            I("y", 256, 10, 12),
            I("z", 256, 12, 13),
        ]
    )
    assert plan.root("part") == plan.root("row") == "x"
    assert plan.offset("row") == plan.offset("x") + 128
    assert plan.offset("part") == plan.offset("x") + 136
    assert plan.life("x") == plan.life("part") == (2, 11)
    assert plan.size == 512
    assert plan.alive_at(11) == ["x", "y"]
    assert plan.sizes.tolist() == [256, 64, 16, 256, 256]


def test_an_alias_that_is_an_output_keeps_its_root_for_the_whole_run():
    plan = rlx.plan_memory(
        [("x", 64, 0, 1), ("y", 64, 2, 9), I("out", 64, 1, 1, alias_of="x", kind="output")]
    )
    assert plan.life("x") == (0, 9)
    assert plan.size == 128


def test_an_alias_may_be_longer_alive_before_its_root():
    plan = rlx.plan_memory([I("x", 64, 5, 6), I("early", 64, 1, 2, alias_of="x"), ("y", 64, 0, 1)])
    assert plan.life("x") == (1, 6)
    assert plan.size == 128


def test_alignment_of_the_plan_and_of_nodes():
    plan = rlx.plan_memory(
        [("a", 1, 0, 0), I("b", 1, 0, 0, alignment=256), I("c", 1, 0, 0, alignment=1)],
        alignment=16,
    )
    assert plan.offset("a") % 16 == 0
    assert plan.offset("b") % 256 == 0
    assert plan.size == plan.lower_bound or not plan.optimal
    assert rlx.plan_memory([(n, 1, 0, 0) for n in range(3)], alignment=1).size == 3
    assert rlx.plan_memory([(n, 1, 0, 0) for n in range(3)], alignment=4096).size == 8193


def test_the_alignment_of_an_alias_binds_its_root():
    plan = rlx.plan_memory(
        [("a", 8, 0, 0), I("x", 256, 0, 0), I("v", 8, 0, 0, alias_of="x", alignment=128)],
        alignment=8,
    )
    assert plan.offset("x") % 128 == 0


def test_pins_hold():
    plan = rlx.plan_memory(
        [I("p", 64, 0, 9, offset=128), ("a", 64, 0, 4), ("b", 128, 0, 4), ("c", 192, 5, 9)]
    )
    assert plan.offset("p") == 128
    assert clashes(plan) == []
    assert plan.lower_bound >= 192 + 64
    assert rlx.plan_memory([I("p", 64, 0, 0, offset=6400)]).size == 6464


def test_pins_may_share_bytes_at_different_steps():
    plan = rlx.plan_memory([I("p", 64, 0, 1, offset=0), I("q", 64, 2, 3, offset=0)])
    assert plan.size == 64


def test_a_pinned_alias_pins_its_root():
    plan = rlx.plan_memory(
        [
            ("a", 64, 0, 0),
            I("x", 256, 0, 0),
            I("v", 64, 0, 0, alias_of="x", alias_offset=64, offset=320),
        ]
    )
    assert plan.offset("x") == 256
    assert plan.offset("v") == 320


def test_many_slots_around_pins():
    work = [I(*each) for each in training(40)]
    pinned = [I(f"w{n}", 4096, 0, 0, kind="constant", offset=n * 65536) for n in range(5)]
    plan = rlx.plan_memory(work + pinned)
    assert [plan.offset(f"w{n}") for n in range(5)] == [n * 65536 for n in range(5)]
    assert clashes(plan) == []
    assert plan.ratio < 1.1


# how good


@pytest.mark.parametrize("name", REAL)
def test_real_traces_reach_the_lower_bound(name):
    plan = rlx.plan_memory(trace(name))
    assert plan.optimal
    assert plan.size == plan.lower_bound


@pytest.mark.parametrize("name", HARD)
def test_hard_instances_come_near_it(name):
    plan = rlx.plan_memory(trace(name))
    assert plan.ratio < 1.25
    assert plan.lower_bound == {"C": 1_039_360, "D": 986_112}.get(name[-1], 1_048_576)


@pytest.mark.parametrize("layers", [3, 30, 300])
def test_training_reaches_it(layers):
    plan = rlx.plan_memory(training(layers))
    assert plan.ratio < 1.001


@pytest.mark.parametrize("seed", range(4))
def test_tilings_come_near_it(seed):
    plan = rlx.plan_memory(tiling(60, 1000, 64_000, seed), time_limit=0.3)
    assert plan.lower_bound == 64_000 - 64_000 % 64
    assert plan.ratio < 1.15


def test_a_hundred_thousand_nodes():
    work = [I(*each) for each in training(7700)]
    assert len(work) > 100_000
    plan = rlx.plan_memory(work)
    assert plan.ratio < 1.01


def test_sizes_that_are_no_multiple_of_the_alignment_can_be_optimal():
    """The topmost slot needs no rounding, and the bound knows that."""
    plan = rlx.plan_memory([("a", 65, 0, 1), ("b", 100, 0, 1), ("c", 64, 0, 0)])
    assert plan.lower_bound == 128 + 65 + 64
    assert plan.optimal


def test_the_last_part_of_a_grain_is_left_alone():
    """The bound ends inside the last 64 bytes, so no slot of whole grains may end there."""
    work = [("p", 192, 0, 0), ("q", 64, 0, 5), ("r", 64, 0, 0), ("b", 1, 0, 0), ("d", 128, 1, 2)]
    slots = make_slots(read_intervals(work, 64))
    laid = PeakSweep(slots).plan(np.arange(4), 2**40)
    assert int((laid + slots.size).max()) == slots.bound == 321


def test_the_same_plan_every_time():
    for name in ("minimalloc_A", "fx_gpt2_12L_infer"):
        one, other = (rlx.plan_memory(trace(name)) for _ in range(2))
        assert one.offsets.tolist() == other.offsets.tolist()


def test_a_seed_changes_the_search():
    sizes = {rlx.plan_memory(trace("minimalloc_A"), seed=seed).size for seed in range(4)}
    assert len(sizes) > 1


def test_time_makes_it_no_worse():
    work = trace("minimalloc_B")
    assert rlx.plan_memory(work, time_limit=0.4).size <= rlx.plan_memory(work).size
    first = rlx.plan_memory(work, time_limit=0)
    assert clashes(first) == []


def test_time_is_used(monkeypatch):
    """With no work but the first sweep to be done without a limit, a limit finds more."""
    monkeypatch.setattr(_plan_search, "_work", lambda count: 0)
    first = rlx.plan_memory(trace("minimalloc_A"))
    assert rlx.plan_memory(trace("minimalloc_A"), time_limit=0.5).size < first.size


def test_time_goes_on_where_nothing_but_shuffling_is_left():
    work = [I(*each) for each in trace("minimalloc_A")]
    pinned = [*work, I("p", 64, 0, 0, kind="constant", offset=64)]
    plan = rlx.plan_memory(pinned, time_limit=0.3)
    assert plan.size <= rlx.plan_memory(pinned).size
    assert plan.offset("p") == 64


# capacity


def test_the_search_stops_when_it_fits():
    plan = rlx.plan_memory(trace("minimalloc_A"), capacity=2 << 20)
    assert plan.size <= plan.capacity == 2 << 20
    assert "sweep" in plan.report()


def test_a_capacity_below_the_peak_says_who_needs_it():
    work = [(f"n{n}", 100 * (n + 1), 3, 5) for n in range(12)]
    with pytest.raises(rlx.CapacityError) as caught:
        rlx.plan_memory([*work, ("later", 64, 6, 7)], capacity=4096)
    text = str(caught.value)
    bound = rlx.plan_memory(work).lower_bound
    assert "4096 bytes" in text
    assert f"{bound} bytes" in text
    assert f"{bound - 4096} more" in text
    assert "peak at step 3: 12 alive" in text or "peak at step 5: 12 alive" in text
    assert text.index("'n11': 1200 bytes") < text.index("'n10': 1100 bytes")
    assert "and 4 more: 1000 bytes" in text
    assert "later" not in text
    assert isinstance(caught.value, rlx.OutOfDeviceMemory)


def test_a_capacity_that_was_not_reached_says_how_far_the_search_came():
    best = rlx.plan_memory(trace("minimalloc_D")).size
    with pytest.raises(rlx.CapacityError, match=rf"best has {best} bytes.*time_limit="):
        rlx.plan_memory(trace("minimalloc_D"), capacity=990_000)


# exact


@pytest.mark.parametrize("name", HARD)
def test_exact_reaches_the_capacity(name):
    pytest.importorskip("omnimalloc")
    plan = rlx.plan_memory(trace(name), exact=True, capacity=1_048_576, time_limit=60)
    assert plan.size <= 1_048_576
    assert clashes(plan) == []


def test_exact_keeps_what_is_better_and_honours_the_rest():
    pytest.importorskip("omnimalloc")
    work = [I(*each) for each in trace("minimalloc_C")]
    extra = [
        I("aligned", 4096, 0, 0, kind="constant", alignment=8192),
        I("view", 64, 0, 0, alias_of="aligned", alias_offset=64),
    ]
    plan = rlx.plan_memory(work + extra, exact=True, time_limit=2)
    assert plan.offset("aligned") % 8192 == 0
    assert plan.offset("view") == plan.offset("aligned") + 64
    assert plan.size <= rlx.plan_memory(work + extra).size


def test_exact_with_pins_says_that_it_was_not_asked():
    pytest.importorskip("omnimalloc")
    work = [*(I(*each) for each in trace("minimalloc_A")), I("p", 64, 0, 0, offset=64)]
    plan = rlx.plan_memory(work, exact=True)
    assert plan.offset("p") == 64
    assert "omnimalloc was not asked" in plan.report()


@pytest.mark.parametrize("gone", ["Partition", "try_solve_many"])
def test_exact_does_without_what_omnimalloc_does_not_publish(monkeypatch, gone):
    pytest.importorskip("omnimalloc")
    import omnimalloc._cpp

    # The public solver has taken what it needs already.
    import omnimalloc.allocators.supermalloc

    monkeypatch.delattr(omnimalloc._cpp, gone)
    plan = rlx.plan_memory(trace("minimalloc_C"), exact=True, time_limit=60)
    assert plan.optimal
    assert "omnimalloc" in plan.report()


def test_a_wrong_answer_of_omnimalloc_is_thrown_away(monkeypatch):
    pytest.importorskip("omnimalloc")
    from rlx_driver import _plan_exact

    def solve(table, slots, goal, seconds):
        yield _plan_exact.Exact(np.zeros(len(slots), np.int64), True)

    monkeypatch.setattr(_plan_search, "solve", solve)
    plan = rlx.plan_memory(trace("minimalloc_A"), exact=True)
    assert not plan.optimal
    assert clashes(plan) == []
    assert "thrown away" in plan.report()


def test_exact_without_omnimalloc_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "omnimalloc", None)
    with pytest.raises(rlx.MissingPackageError, match=r"pip install rlx-driver\[planner\]"):
        rlx.plan_memory([("a", 1, 0, 0)], exact=True)


# bad input


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (("a", -1, 0, 0), "'a'.*-1 bytes"),
        (("a", 1.0, 0, 0), r"'a'.*size is 1\.0"),
        (("a", True, 0, 0), "'a'.*size is True"),
        (("a", "64", 0, 0), "'a'.*size is '64'"),
        (("a", 64, 0, None), "'a'.*last step is None"),
        (("a", 64, 0.0, 1), "'a'.*first step"),
        (("a", 64, 3, 2), "'a'.*last used at step 2.*first use at step 3"),
        (("a", 2**70, 0, 1), "'a'.*beyond"),
        (("a", 2**61 - 1, 0, 1), "2[*][*]61"),
        (("a", 64, 0), "no interval"),
        (("a", 64, 0, 1, 2), "no interval"),
        (["a", 64, 0, 1], "Interval or"),
        ("abcd", "Interval or"),
        ((["a"], 64, 0, 1), "hashable"),
        (I(["a"], 64, 0, 1), "hashable"),
        (I("a", 64, 0, 0, kind="weight"), "'a'.*'weight'.*intermediate"),
        (I("a", 64, 0, 0, alignment=48), "'a'.*48.*power of two"),
        (I("a", 64, 0, 0, alignment=0), "'a'.*power of two"),
        (I("a", 64, 0, 0, alignment=True), "'a'.*power of two"),
        (I("a", 64, 0, 0, offset=-64), "'a'.*-64"),
        (I("a", 64, 0, 0, offset=3), "'a'.*offset 3.*multiple.*64"),
        (I("a", 64, 0, 0, offset=64.0), r"'a'.*64\.0"),
        (I("a", 64, 0, 0, shape=(5, 4), dtype="f32"), "'a'.*80 bytes.*64"),
        (I("a", 64, 0, 0, shape=(65,)), "'a'.*65 bytes.*64"),
        (I("a", 64, 0, 0, shape=(-1,), dtype="f32"), "'a'.*shape"),
        (I("a", 64, 0, 0, shape=[4], dtype="f32"), "'a'.*shape"),
        (I("a", 64, 0, 0, alias_of="nobody"), "'a'.*'nobody'"),
        (I("a", 64, 0, 0, alias_of=["x"]), "'a' is an alias"),
        (I("a", 64, 0, 0, alias_of="a"), "'a' is an alias of itself"),
        (I("a", 64, 0, 0, alias_offset=8), "'a'.*alias_of"),
        (I("a", 64, 0, 0, alias_of="ok", alias_offset=64), "'a'.*'ok'.*64 to 128"),
        (I("a", 8, 0, 0, alias_of="ok", alias_offset=-8), "'a'.*-8"),
        (I("a", 8, 0, 0, alias_of="ok", alias_offset=8, alignment=16), "'a'.*16 bytes.*'ok'"),
        (I("a", 8, 0, 0, alias_of="ok", alias_offset=32, offset=0), "'a' is pinned to 0"),
        (I("a", 8, 0, 0, alias_of="ok", alias_offset=8, offset=80), "'ok'.*offset 72.*multiple"),
    ],
)
def test_bad_intervals_name_the_node(bad, said):
    work = [("ok", 64, 0, 1), bad]
    with pytest.raises(rlx.PlanError, match=said):
        rlx.plan_memory(work)


def test_a_node_twice():
    with pytest.raises(rlx.DuplicateError, match=r"'a'.*rows 0 and 2"):
        rlx.plan_memory([("a", 1, 0, 0), ("b", 1, 0, 0), ("a", 1, 0, 0)])


def test_aliases_in_a_circle():
    work = [
        I("a", 8, 0, 0, alias_of="b"),
        I("b", 8, 0, 0, alias_of="c"),
        I("c", 8, 0, 0, alias_of="b"),
    ]
    with pytest.raises(rlx.PlanError, match="'b' -> 'c' -> 'b'"):
        rlx.plan_memory(work)


def test_pins_that_disagree():
    work = [I("x", 64, 0, 0, offset=0), I("v", 8, 0, 0, alias_of="x", alias_offset=8, offset=72)]
    with pytest.raises(rlx.PlanError, match=r"'v' is pinned to 72.*'x'"):
        rlx.plan_memory(work)


def test_pins_that_overlap():
    work = [I("p", 65, 0, 4, offset=0), I("q", 64, 4, 5, offset=64), ("a", 64, 0, 9)]
    with pytest.raises(rlx.PlanError, match=r"'p' .*bytes 0 to 65.*'q' .*bytes 64 to 128"):
        rlx.plan_memory(work, capacity=0)


@pytest.mark.parametrize("alignment", [0, -64, 3, 48, 1.0, True, "64", 2**62])
def test_bad_alignment(alignment):
    with pytest.raises(rlx.PlanError, match="power of two"):
        rlx.plan_memory([("a", 1, 0, 0)], alignment=alignment)


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": -1},
        {"capacity": 1.5},
        {"capacity": True},
        {"time_limit": -1},
        {"time_limit": "1"},
        {"time_limit": float("nan")},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_bad_options(options):
    with pytest.raises(rlx.PlanError, match=next(iter(options))):
        rlx.plan_memory([("a", 1, 0, 0)], **options)


def test_what_is_no_iterable():
    with pytest.raises(rlx.PlanError, match="int"):
        rlx.plan_memory(3)


# plans of others


def test_a_plan_of_given_offsets():
    work = [
        ("a", 64, 0, 1),
        I("v", 8, 0, 1, alias_of="a", alias_offset=8),
        ("b", 64, 1, 2),
        ("none", 0, 0, 0),
    ]
    plan = rlx.MemoryPlan.from_offsets(work, {"a": 64, "b": 256})
    assert (plan.offset("a"), plan.offset("v"), plan.offset("b")) == (64, 72, 256)
    assert plan.size == 320
    assert plan.ratio == 2.5
    assert not plan.optimal
    own = rlx.plan_memory(work)
    again = rlx.MemoryPlan.from_offsets(work, {node: own.offset(node) for node in own})
    assert again.offsets.tolist() == own.offsets.tolist()


@pytest.mark.parametrize(
    ("offsets", "error", "said"),
    [
        ({"a": 0, "b": 0}, rlx.PlanError, "'a' .*bytes 0 to 64, steps 0 to 1.*'b' .*share memory"),
        ({"a": 0, "b": 32}, rlx.PlanError, "'b'.*32.*multiple"),
        ({"a": 0, "b": -64}, rlx.PlanError, "'b'.*-64"),
        ({"a": 0, "b": 64.0}, rlx.PlanError, r"'b'.*64\.0"),
        ({"a": 0}, rlx.UnboundNameError, "'b'"),
        ({"a": 0, "b": 64, "c": 0}, rlx.UnboundNameError, "'c'"),
        ({"a": 0, "b": 64, "v": 0}, rlx.PlanError, "'v'.*'a'"),
        ({"a": 0, "b": 64, "p": 0}, rlx.PlanError, "'p' is pinned to offset 1024"),
    ],
)
def test_offsets_that_are_wrong(offsets, error, said):
    work = [("a", 64, 0, 1), I("v", 8, 0, 1, alias_of="a", alias_offset=8), ("b", 64, 1, 2)]
    if "p" in offsets:
        work.append(I("p", 8, 5, 5, offset=1024))
    with pytest.raises(error, match=said):
        rlx.MemoryPlan.from_offsets(work, offsets)


@pytest.mark.parametrize("row", [0, 7, 5000, 12_000])
def test_an_overlap_behind_many_others_is_found(row):
    work = training(1000)
    plan = rlx.plan_memory(work)
    offsets = {node: plan.offset(node) for node in plan}
    moved = plan.nodes[row]
    other = next(node for node in plan.alive_at(plan.life(moved)[0]) if node != moved)
    offsets[moved] = offsets[other]
    with pytest.raises(rlx.PlanError, match="share memory"):
        rlx.MemoryPlan.from_offsets(work, offsets)


# in words and in pictures


def test_the_report():
    work = [
        *((f"n{n}", 64 * (n + 1), n, n + 4) for n in range(20)),
        ("none", 0, 0, 0),
        I("v", 8, 0, 0, alias_of="n0"),
    ]
    plan = rlx.plan_memory(work, capacity=10_000)
    text = plan.report()
    for said in (
        f"size         {plan.size} bytes",
        f"lower bound  {plan.lower_bound} bytes",
        "ratio        1.0",
        "capacity     10000 bytes",
        "22: 20 slots, 1 aliases, 1 empty",
        "found by",
        "peak at step",
        f"'n19': 1280 bytes at {plan.offset('n19')}, steps 19 to 23",
    ):
        assert said in text


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_plot(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{suffix}"
    rlx.plan_memory(trace("fx_resnet50_infer")).plot(path)
    assert path.stat().st_size > 4000
    rlx.plan_memory([]).plot(path)
    rlx.plan_memory([("a", 5, 0, 0)]).plot(path)


def test_the_plot_shows_every_slot(tmp_path, monkeypatch):
    """The rectangles handed to matplotlib are the slots of the plan, and nothing else."""
    pytest.importorskip("matplotlib")
    from matplotlib import collections

    seen = []
    plain = collections.PolyCollection.__init__

    def spy(self, corners, *args, **kwargs):
        seen.append(np.asarray(corners))
        plain(self, corners, *args, **kwargs)

    monkeypatch.setattr(collections.PolyCollection, "__init__", spy)
    plan = rlx.plan_memory([("a", 128, 0, 3), ("b", 64, 2, 5), I("v", 8, 0, 9, alias_of="a")])
    plan.plot(tmp_path / "plan.png")
    boxes = seen[0]
    assert boxes.shape == (2, 4, 2)
    assert boxes[0].min(0).tolist() == [0, plan.offset("a")]
    assert boxes[0].max(0).tolist() == [10, plan.offset("a") + 128]


def test_the_plot_leaves_pyplot_alone_and_matplotlib_is_lazy(tmp_path):
    pytest.importorskip("matplotlib")
    said = must_run(
        f"""
import sys
import rlx_driver as rlx
plan = rlx.plan_memory([("a", 64, 0, 1)])
print("matplotlib" in sys.modules, "omnimalloc" in sys.modules)
plan.plot({str(tmp_path / "plan.png")!r})
print("matplotlib.pyplot" in sys.modules)
"""
    )
    assert said.split() == ["False", "False", "False"]


def test_the_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(rlx.MissingPackageError, match=r"pip install rlx-driver\[viz\]"):
        rlx.plan_memory([("a", 1, 0, 0)]).plot(tmp_path / "plan.png")
