"""The examples of training run, and notice when what they show is not so."""

from __future__ import annotations

import re

import pytest

from example_programs import EXAMPLES, demo, python

pytest.importorskip("rich", reason="the examples print with it")
pytest.importorskip("optax", reason="the examples train with it")

pytestmark = [pytest.mark.torch, pytest.mark.jax]

SMALL = ("--steps", 4, "--layers", 1, "--max-seq", 16, "--batch", 4, "--hidden", 16)


def checks(done):
    """Give the checks that a program printed, and whether they passed."""
    return {
        text: passed == "ok"
        for passed, text in re.findall(r"^(ok|FAIL) +(.+)$", done.stdout, re.MULTILINE)
    }


@pytest.mark.slow
def test_the_training_goes_across_frameworks(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "costs.png"
    done = python(EXAMPLES / "train_across_frameworks.py", *SMALL, "--plot", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert len(checks(done)) == 7
    assert all(checks(done).values())
    assert "all step counters say 12" in done.stdout
    assert "0 copies (0 bytes)" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


SPOILED = {
    "another decay": (
        "real = across.optax.adamw\n"
        "across.optax.adamw = lambda *a, **k: real(*a, **(k | {'weight_decay': 5.0}))",
        "every cost equals that of torch alone within 0.0001",
    ),
    "no step counted": (
        "real = across.Bound.in_jax\n"
        "def in_jax(self, tokens):\n"
        "    cost = real(self, tokens)\n"
        "    for handle in self.region:\n"
        "        if handle.name.startswith('adamw/step'):\n"
        "            handle.update(lambda x: x - 1, framework='numpy')\n"
        "    return cost\n"
        "across.Bound.in_jax = in_jax\n"
        "across.rlx.no_copies = across.rlx.ledger.record",
        "all step counters say 12",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "noticed"), SPOILED.values(), ids=SPOILED.keys())
def test_the_training_notices_what_is_not_equal(spoil, noticed):
    before = f"import train_across_frameworks as across\n{spoil}"
    done = demo(*SMALL, before=before, name="train_across_frameworks")
    assert done.returncode == 1, done.stdout + done.stderr
    assert not checks(done)[noticed]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "1"], "--steps must be at least 2"),
        (["--device", "abacus"], "'abacus' is of no known kind"),
    ],
)
def test_bad_options_of_the_training_are_refused_in_words(options, says):
    done = demo(*options, name="train_across_frameworks")
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_gradients_are_accumulated_by_both():
    done = python(EXAMPLES / "gradient_accumulation.py", "--steps", 4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(checks(done).values()) == [True, True]


@pytest.mark.slow
def test_the_accumulation_notices_a_gradient_that_is_lost():
    before = (
        "import gradient_accumulation as program\n"
        "program.add_gradient = lambda grads, params, x, y: grads"
    )
    done = demo("--steps", 2, before=before, name="gradient_accumulation")
    assert done.returncode == 1, done.stdout + done.stderr
    assert not checks(done)["the weights are those of torch alone within 1e-5"]


@pytest.mark.slow
def test_beams_are_reordered_in_place_by_all():
    done = python(EXAMPLES / "beam_reorder.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by numpy, torch, jax in turn" in done.stdout
    assert list(checks(done).values()) == [True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_the_reordering_notices_beams_that_stay(framework):
    result = "kv" if framework == "jax" else "None"
    before = (
        f"import beam_reorder as program\nprogram.STEPS[{framework!r}] = lambda kv, index: {result}"
    )
    done = demo(before=before, name="beam_reorder")
    assert done.returncode == 1, done.stdout + done.stderr
    assert not checks(done)["a tensor held from the start shows the right cache after every round"]
