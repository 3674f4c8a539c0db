"""The forward pass in one arena runs as a program, and its checks notice what they check."""

from __future__ import annotations

import re

import pytest

from example_programs import demo

pytest.importorskip("rich", reason="the examples print with it")
pytest.importorskip("safetensors", reason="the weights of the examples are stored in it")

ARENA_CHECKS = [
    "ok   the logits of 3 prompts equal eager torch's, bit for bit",
    "ok   so they do in a second round in the same arena",
    "ok   so they do after a reset of the arena",
    "ok   every operator writes into its slot or in place, none is copied",
    "ok   all {} nodes lie where the plan has them, views too",
    "ok   the arena is as large as the plan, but for alignment",
    "ok   a run allocates less than 2% of that, for workspace",
    "ok   {}: the logits are read where they lie, without a copy",
]


def arena_must_pass(done, readers, *more):
    """Assert that the forward pass passed its checks; give the numbers in its tables."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    rows = re.findall(r"^ ([^│\n]+?) +│ +([\d,]+) │", done.stdout, re.MULTILINE)
    numbers = {name: int(number.replace(",", "")) for name, number in rows}
    nodes = numbers["operators in the graph"] + 1  # the input has a slot too
    checks = "\n".join(ARENA_CHECKS).format(nodes, ", ".join(readers)).splitlines()
    lines = [line for line in done.stdout.splitlines() if re.match("ok|FAIL", line)]
    assert lines == [*checks, *more]
    addresses = re.findall(r"^ (\w+) +│ (0x\w+) │", done.stdout, re.MULTILINE)
    assert [name for name, _ in addresses] == readers
    assert len({address for _, address in addresses}) == 1
    assert max(map(len, done.stdout.splitlines())) <= 100
    return numbers


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.jax
def test_a_forward_pass_runs_in_one_arena():
    options = ("--batch", 2, "--prompt", "[b]ü :smile: ", "--debug")
    done = demo("--tokens", 24, *options, name="arena_inference")
    debug = "ok   in a debug arena no node is touched outside of its life"
    found = arena_must_pass(done, ["numpy", "torch", "jax"], debug)
    assert found["views"] + found["write into their slot"] == found["operators in the graph"]
    assert found["work in place"] == found["copied into their slot"] == 0
    assert found["lower bound"] == found["plan"] < found["eager torch, peak"]
    assert found["plan"] * 5 < found["all intermediates, without reuse"]
    ends = 2 * 24 * (8 + 256 * 4)  # the tokens and the logits, which the plan keeps all the time
    small = found["allocated while it runs, peak"]
    assert 0 <= found["traced graph in torch, peak"] + ends - found["plan"] <= small
    assert small <= 64, "a few numbers that torch wraps as tensors"
    assert "Debug arena: the plan takes" in done.stdout


@pytest.mark.slow
@pytest.mark.torch
def test_a_forward_pass_in_one_arena_needs_no_jax():
    done = demo("--tokens", 8, name="arena_inference", hidden=["jax"])
    arena_must_pass(done, ["numpy", "torch"])


@pytest.mark.slow
@pytest.mark.cuda
def test_a_forward_pass_runs_in_one_arena_on_a_gpu():
    done = demo("--tokens", 64, "--device", "cuda:0", "--debug", name="arena_inference")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert "ok   in a debug arena no node is touched outside of its life" in done.stdout


@pytest.mark.slow
@pytest.mark.torch
def test_the_plan_of_the_forward_pass_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="plans are drawn with it")
    done = demo("--tokens", 8, "--plot", tmp_path / "plan.png", name="arena_inference")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    done = demo("--tokens", 8, "--plot", tmp_path / "no" / "plan.png", name="arena_inference")
    assert done.returncode == 2
    assert "--plot" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.torch
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tokens", "0"], "--tokens is 0: give 1 to 512"),
        (["--tokens", "513"], "--tokens is 513: give 1 to 512"),
        (["--batch", "0"], "--batch is 0: give 1 or more"),
        (["--prompt", ""], "--prompt is empty"),
        (["--device", "abacus"], "'abacus' is of no known kind"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_of_the_forward_pass_are_refused_in_words(options, says):
    done = demo(*options, name="arena_inference")
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_forward_pass_asks_for_torch():
    done = demo(name="arena_inference", hidden=["torch", "jax"])
    assert done.returncode == 1
    assert "pip install 'rlx-driver[torch]'" in done.stderr
    assert "Traceback" not in done.stderr


WRONG_LOGITS = """
run = arena_inference.ArenaProgram.__call__
arena_inference.ArenaProgram.__call__ = lambda self, *given: run(self, *given).mul_(1.0001)
"""
BUSY_OPERATOR = """
bind = arena_inference.ArenaProgram.bind
def bind_more(self, arena):
    bind(self, arena)
    step, call = self._calls[-1]
    self._calls[-1] = (step, lambda: (call(), arena_inference.torch.empty(10**6))[0])
arena_inference.ArenaProgram.bind = bind_more
"""
TOO_FAR = """
bind = arena_inference.ArenaProgram.bind
def bind_too_far(self, arena):
    bind(self, arena)
    step, call = self._calls[-1]
    mm = self.tensors["mm"]  # long dead at the end
    self._calls[-1] = (step, lambda: (mm.fill_(3), call()))
arena_inference.ArenaProgram.bind = bind_too_far
"""


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize(
    ("before", "fails"),
    [
        (WRONG_LOGITS, ["the logits of 3 prompts", "so they do in a second", "so they do after"]),
        (BUSY_OPERATOR, ["a run allocates less than 2%"]),
        (TOO_FAR, ["in a debug arena"]),
    ],
    ids=["logits", "allocation", "dead slot"],
)
def test_a_check_of_the_forward_pass_that_fails_is_the_exit_code(before, fails):
    options = ("--tokens", 8, "--debug")
    done = demo(*options, name="arena_inference", hidden=["jax"], before=before)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(found) >= len(fails)
    for text in fails:
        assert any(line.startswith(f"FAIL {text}") for line in found), found
