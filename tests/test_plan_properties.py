"""Plans of random intervals: valid, sound against brute force, the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import rlx_driver as rlx
from plan_support import clashes, smallest

KINDS = st.sampled_from(["intermediate"] * 6 + ["input", "output", "constant"])
POWERS = st.sampled_from([1, 2, 8, 64])


@st.composite
def steps(draw, last=12):
    first = draw(st.integers(0, last))
    return first, draw(st.integers(first, min(last, first + draw(st.integers(0, last)))))


@st.composite
def programs(draw, most=40, pins=True, aliases=True, alignments=True, largest=600):
    made = []
    for node in range(draw(st.integers(0, most))):
        first, last = draw(steps())
        size = draw(st.integers(0, largest))
        alignment = draw(st.none() | POWERS) if alignments else None
        offset = None
        if pins and draw(st.integers(0, 9)) == 0:
            offset = draw(st.integers(0, 8)) * 64
        kind = draw(KINDS) if aliases else "intermediate"
        alias = None
        if aliases and made and draw(st.integers(0, 3)) == 0:
            alias = draw(st.sampled_from(made))
            size = draw(st.integers(0, alias.size))
            room = alias.size - size
            made.append(
                rlx.Interval(
                    node,
                    size,
                    first,
                    last,
                    alias_of=alias.node,
                    alias_offset=draw(st.integers(0, room)),
                    kind=kind,
                )
            )
            continue
        made.append(
            rlx.Interval(node, size, first, last, offset=offset, alignment=alignment, kind=kind)
        )
    return made


def try_to_plan(program, **options):
    """Plan, or skip a program whose pins overlap."""
    try:
        return rlx.plan_memory(program, **options)
    except rlx.PlanError as error:
        assume("share memory" not in str(error))
        raise


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs(), alignment=POWERS, seed=st.integers(0, 3))
def test_every_plan_is_valid(program, alignment, seed):
    plan = try_to_plan(program, alignment=alignment, seed=seed)
    plan.validate()
    assert clashes(plan) == []
    ends = [plan.offset(each.node) + each.size for each in program if each.size]
    assert plan.size == max(ends, default=0) >= plan.lower_bound
    assert plan.ratio >= 1.0
    if plan.optimal:
        assert plan.size == plan.lower_bound
    by_node = {each.node: each for each in program}
    for each in program:
        root = by_node[plan.root(each.node)]
        if each.alias_of is not None:
            parent = plan.offset(each.alias_of)
            assert plan.offset(each.node) == parent + each.alias_offset
            assert plan.root(each.alias_of) == root.node
        first, last = plan.life(each.node)
        assert first <= each.first <= each.last <= last
        if each.whole_run:
            assert (first, last) == (min(plan.firsts), max(plan.lasts))
        if each.alias_of is None and each.size:
            assert plan.offset(each.node) % (each.alignment or alignment) == 0
        if each.offset is not None:
            assert plan.offset(each.node) == each.offset


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs(), alignment=POWERS)
def test_the_same_every_time_and_again_from_its_offsets(program, alignment):
    one = try_to_plan(program, alignment=alignment)
    other = rlx.plan_memory(program, alignment=alignment)
    assert one.offsets.tolist() == other.offsets.tolist()
    again = rlx.MemoryPlan.from_offsets(
        program, {node: one.offset(node) for node in one}, alignment=alignment
    )
    assert (again.size, again.lower_bound) == (one.size, one.lower_bound)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    program=programs(most=5, aliases=False, largest=20),
    alignment=st.sampled_from([1, 4, 16]),
)
def test_the_bound_is_never_above_the_best_plan_there_is(program, alignment):
    plan = try_to_plan(program, alignment=alignment)
    best = smallest(program, alignment)
    assert plan.lower_bound <= best <= plan.size
    if plan.optimal:
        assert plan.size == best


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs(most=5, aliases=False, pins=False, alignments=False, largest=20))
def test_few_slots_are_planned_as_well_as_can_be(program):
    assert rlx.plan_memory(program, alignment=1).size == smallest(program, 1)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs(aliases=False), alignment=POWERS, capacity=st.integers(0, 20_000))
def test_a_capacity_is_kept_or_refused(program, alignment, capacity):
    plan = try_to_plan(program, alignment=alignment)
    if plan.size <= capacity:
        fitting = rlx.plan_memory(program, alignment=alignment, capacity=capacity)
        assert fitting.size <= capacity
        assert fitting.capacity == capacity
    else:
        with pytest.raises(rlx.CapacityError, match=rf"{capacity} bytes(.|\n)*alive"):
            rlx.plan_memory(program, alignment=alignment, capacity=capacity)


@settings(max_examples=100, deadline=None)
@given(program=programs(pins=False, aliases=False), data=st.data())
def test_the_validator_finds_what_looking_at_all_pairs_finds(program, data):
    program = [each for each in program if each.size]
    offsets = {each.node: data.draw(st.integers(0, 30)) * (each.alignment or 8) for each in program}
    overlap = any(
        one.first <= other.last
        and other.first <= one.last
        and offsets[one.node] < offsets[other.node] + other.size
        and offsets[other.node] < offsets[one.node] + one.size
        for at, one in enumerate(program)
        for other in program[:at]
    )
    if overlap:
        with pytest.raises(rlx.PlanError, match="share memory"):
            rlx.MemoryPlan.from_offsets(program, offsets, alignment=8)
    else:
        plan = rlx.MemoryPlan.from_offsets(program, offsets, alignment=8)
        assert plan.offsets.tolist() == [offsets[each.node] for each in program]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs(most=14, pins=False), alignment=POWERS)
def test_exact_is_never_worse(program, alignment):
    pytest.importorskip("omnimalloc")
    own = rlx.plan_memory(program, alignment=alignment)
    exact = rlx.plan_memory(program, alignment=alignment, exact=True, time_limit=0.5)
    assert exact.lower_bound == own.lower_bound <= exact.size <= own.size
    assert clashes(exact) == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs(most=5, pins=False, aliases=False, alignments=False, largest=20))
def test_exact_finds_the_best(program):
    pytest.importorskip("omnimalloc")
    plan = rlx.plan_memory(program, alignment=1, exact=True, time_limit=5)
    assert plan.size == smallest(program, 1)


@pytest.mark.parametrize("seed", range(3))
def test_thousands_of_random_slots(seed):
    random = np.random.default_rng(seed)
    first = random.integers(0, 2000, 4000)
    life = random.geometric(0.02, 4000)
    sizes = random.integers(1, 5000, 4000)
    work = [
        (node, int(size), int(start), int(start + length))
        for node, (size, start, length) in enumerate(zip(sizes, first, life, strict=True))
    ]
    plan = rlx.plan_memory(work)
    assert clashes_fast(plan) == 0
    assert plan.ratio < 1.1


def clashes_fast(plan):
    """Count pairs that share a byte while both are alive: every slot against all."""
    low, high = plan.offsets, plan.offsets + plan.sizes
    count = 0
    for at in range(len(plan)):
        meets = (plan.firsts[:at] <= plan.lasts[at]) & (plan.lasts[:at] >= plan.firsts[at])
        count += int((meets & (low[:at] < high[at]) & (high[:at] > low[at])).sum())
    return count
