"""Random programs over several handles see what a run of one operation after the other sees."""

from __future__ import annotations

import collections
import functools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("jax")

import random_programs
from random_executors import ByHand, Driver, Place, differences

pytestmark = [
    pytest.mark.torch,
    pytest.mark.jax,
    pytest.mark.filterwarnings("ignore::rlx_driver.errors.RecompilationWarning"),
]

found: list[str] = []
"""What was found wrong: a race shows now and then, so from then on each program runs often."""


@functools.cache
def place():
    return Place("cpu")


@st.composite
def programs(draw):
    return random_programs.draw(lambda n: draw(st.integers(0, n - 1)))


def seeded(seed, **options):
    return random_programs.draw(random.Random(seed).randrange, **options)


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(programs())
def test_every_look_shows_what_came_before_it_and_nothing_later(program):
    for _ in range(5 if found else 1):
        try:
            wrong = differences(program, Driver, place())
        except Exception as error:
            error.add_note(repr(program))
            found.append(repr(error))
            raise
        found.extend(wrong)
        assert not wrong, "\n".join([repr(program), *wrong])


def test_longer_programs_than_hypothesis_makes():
    """What `python -m benchmarks.random_programs` runs 2,000 of."""
    for seed in range(150):
        program = seeded(seed)
        wrong = differences(program, Driver, place())
        assert not wrong, "\n".join([f"seed {seed}", repr(program), *wrong])


def test_the_same_programs_without_the_driver_go_wrong():
    wrong = 0
    for seed in range(100):
        wrong += bool(differences(seeded(seed), ByHand, place()))
        if wrong == 5:
            return
    raise AssertionError(f"{wrong} of 100 went wrong, so the programs would prove little")


def test_by_hand_they_are_right_when_everything_is_waited_for():
    """The positive control goes wrong by its order alone, and not by what it does."""
    waiting = functools.partial(ByHand, waiting=True)
    for seed in range(40):
        assert not differences(seeded(seed), waiting, place())


@pytest.mark.parametrize("options", [{}, {"cuda": True, "streams": 3}], ids=["cpu", "cuda"])
def test_what_is_drawn(options):
    drawn = [seeded(seed, **options) for seed in range(300)]
    kinds = collections.Counter(type(op).__name__ for program in drawn for op in program.ops)
    assert min(kinds[kind] for kind in ("Look", "Reader", "Collect", "Write", "Update")) > 30
    assert min(kinds[kind] for kind in ("Copy", "Fill", "Commit", "Dead")) > 30
    hows = {(type(op).__name__, op.how) for p in drawn for op in p.ops if hasattr(op, "how")}
    assert hows == {
        (kind, how) for kind in ("Look", "Reader", "Write") for how in ("fresh", "held", "scope")
    }
    assert {op.stream for p in drawn for op in p.ops} == set(range(options.get("streams", 1)))
    if options:
        assert not [op for p in drawn for op in p.ops if getattr(op, "by", "") == "numpy"]


def test_the_text_of_a_program_makes_it_again():
    for seed in range(20):
        program = seeded(seed)
        assert eval(repr(program), vars(random_programs)) == program
