"""The examples run, in whatever is installed, and refuse in words what they cannot do."""

from __future__ import annotations

import re

import numpy as np
import pytest

from example_programs import EXAMPLES, demo, python
from support import frameworks, installed

pytest.importorskip("rich", reason="the examples print with it")
pytest.importorskip("safetensors", reason="the weights of the examples are stored in it")


def must_pass(done, tokens, baseline, seen_by):
    """Assert that a demo passed its checks, and that what it prints is what it checks."""
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if re.match("ok|FAIL", line)] == [
        f"ok   all {tokens} tokens equal those of {baseline} alone",
        "ok   so do those of the runs through the host",
        "ok   0 bytes copied by the driver from the first token to the last",
        "ok   the cache has one address in all frameworks, before and after",
        "ok   so has each of the weights",
        "ok   weights and cache are in memory once",
    ]
    assert re.search(r"^Ledger of .* 0 copies \(0 bytes\)", done.stdout, re.MULTILINE)
    rows = re.findall(r"^ (\w+) +│ (0x\w+) +│ (0x\w+) *$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == seen_by
    assert len({address for row in rows for address in row[1:]}) == 1


def phases(done):
    """Give the phases that a demo names as the writers of its text, with their tokens."""
    rows = re.findall(r"^ (\w+ in \w+) +│ (\d+) ", done.stdout, re.MULTILINE)
    return [(name, int(count)) for name, count in rows]


# --- the demo ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.jax
def test_one_cache_goes_through_all_three_frameworks():
    done = demo("--tokens", 24)
    assert not done.stderr
    must_pass(done, 24, "torch", ["torch", "jax", "numpy"])
    assert phases(done) == [("prefill in torch", 1), ("decode in jax", 11), ("decode in torch", 12)]
    assert "read in NumPy" in done.stdout
    assert "copies of 0 bytes" in done.stdout
    assert "left out" not in done.stdout
    assert len(re.findall(r"\d\.\d{3} ms", done.stdout)) == 9  # three phases, run in three ways
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.slow
@pytest.mark.torch
def test_the_order_of_the_frameworks_is_the_order_of_the_phases():
    options = ("--frameworks", "numpy,torch", "--prompt", "[b]ü :smile: ")
    done = demo("--tokens", 8, *options, hidden=["jax"])
    must_pass(done, 8, "torch", ["numpy", "torch"])
    assert [name for name, _ in phases(done)] == [
        "prefill in numpy",
        "decode in torch",
        "decode in numpy",
    ]
    assert "[b]ü :smile:" in done.stdout, "what is written is shown as it is"


@pytest.mark.slow
@pytest.mark.parametrize("framework", frameworks("numpy", "torch", "jax"))
def test_each_framework_does_it_alone(framework):
    done = demo("--tokens", 6, "--frameworks", framework)
    must_pass(done, 6, "torch" if installed("torch") else "numpy", [framework])
    assert phases(done) == [(f"prefill in {framework}", 1), (f"decode in {framework}", 5)]


@pytest.mark.slow
@pytest.mark.parametrize("present", frameworks("numpy", "torch"))
def test_it_runs_in_what_is_installed_and_says_what_is_not(present):
    hidden = [name for name in ("torch", "jax") if name != present]
    done = demo("--tokens", 6, hidden=hidden)
    order = [present, *(["numpy"] if present != "numpy" else [])]
    must_pass(done, 6, present, order)
    assert f"(not installed here, so left out: {', '.join(hidden)})" in done.stdout
    assert {name for name, _ in phases(done)} == {f"prefill in {present}", f"decode in {present}"}


@pytest.mark.slow
@pytest.mark.jax
def test_jax_without_torch_is_compared_with_numpy():
    done = demo("--tokens", 6, hidden=["torch"])
    must_pass(done, 6, "numpy", ["jax", "numpy"])
    assert phases(done) == [("prefill in jax", 1), ("decode in jax", 5)]


def test_a_framework_that_is_missing_is_asked_for():
    done = demo("--frameworks", "jax,numpy", hidden=["torch", "jax"])
    assert done.returncode == 2
    assert "jax is not installed here: pip install 'rlx-driver[jax]'" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--frameworks", "numpy,mlx"], "unknown framework 'mlx': known are torch, jax, numpy"),
        (["--frameworks", ""], "unknown framework ''"),
        (["--tokens", "5000"], "--tokens 5000 is too many: a cache of 512 tokens leaves room for"),
        (["--prompt", "x" * 600], "leaves room for 0 after this prompt"),
        (["--prompt", ""], "--prompt is empty"),
        (["--tokens", "1"], "--tokens must be at least 2"),
        (["--tokens", "-3"], "--tokens must be at least 2"),
        (["--tokens", "many"], "invalid int value"),
        (["--device", "abacus"], "'abacus' is of no known kind"),
        (["--device", "vulkan"], "vulkan:0 has no backend here"),
        (["--device", "cuda:0"], "torch was asked for and does not import here"),
    ],
    ids=lambda value: " ".join(value)[:24] if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_words(options, says):
    done = demo("--frameworks", "numpy", *options, hidden=["torch", "jax"])
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


SPOIL_A_TOKEN = """
add = kv_handoff.Transcript.add
kv_handoff.RUN_PHASE["numpy"] = lambda model, transcript, count: [
    add(transcript, kv_handoff.np.int32(0)) for _ in range(count)
]
"""
MOVE_A_VIEW = """
seen = kv_handoff.addresses
kv_handoff.addresses = lambda handle, names: {n: a + 64 for n, a in seen(handle, names).items()}
"""


@pytest.mark.parametrize(
    ("before", "fails"),
    [
        (SPOIL_A_TOKEN, ["FAIL all 6 tokens equal those of numpy alone"]),
        (
            MOVE_A_VIEW,
            [
                "FAIL the cache has one address in all frameworks, before and after",
                "FAIL so has each of the weights",
            ],
        ),
    ],
    ids=["tokens", "addresses"],
)
def test_a_check_that_fails_is_said_and_is_the_exit_code(before, fails):
    done = demo("--tokens", 6, hidden=["torch", "jax"], before=before)
    assert done.returncode == 1, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("FAIL")] == fails


def test_a_copy_on_the_way_ends_the_demo():
    copying = """
    phase = kv_handoff.RUN_PHASE["numpy"]
    def copying_phase(model, transcript, count):
        model.kv.to_host()
        phase(model, transcript, count)
    kv_handoff.RUN_PHASE["numpy"] = copying_phase
    """.replace("\n    ", "\n")
    done = demo("--tokens", 6, hidden=["torch", "jax"], before=copying)
    assert done.returncode == 1
    assert "ZeroCopyError: a copy of 2,621,440 bytes was needed" in done.stderr


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.jax
def test_one_cache_on_a_gpu():
    done = demo("--tokens", 24, "--device", "cuda:0")
    must_pass(done, 24, "torch", ["torch", "jax"])
    assert re.search(r"NumPy was given copies of [1-9][\d,]+ bytes", done.stdout)
    refused = demo("--device", "cuda:0", "--frameworks", "numpy,torch")
    assert refused.returncode == 2
    assert "numpy cannot write to cuda:0" in refused.stderr


# --- the model and its training ------------------------------------------------------------------


@pytest.fixture
def tiny_gpt(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import tiny_gpt

    return tiny_gpt


def greedy_tokens(tiny_gpt, framework, prompt, count=40):
    """Continue a prompt on plain arrays of a framework."""
    config, arrays = tiny_gpt.load_params()
    step = tiny_gpt.cache_step(config)
    bring = np.array
    if framework == "torch":
        import torch

        bring = torch.tensor
    elif framework == "jax":
        import jax

        bring, step = jax.numpy.asarray, jax.jit(step, donate_argnums=0)
    params = {name: bring(array) for name, array in arrays.items()}
    kv, tokens = bring(np.zeros(config.kv_shape(), np.float32)), bring(tiny_gpt.encode(prompt))
    position, chosen = 0, []
    for _ in range(count):
        kv, logits = step(kv, params, tokens, position)
        position += tokens.shape[1]
        tokens = tiny_gpt.greedy(logits)
        chosen.append(int(tokens[0, 0]))
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["What is a generator? ", "def __init__(self"])
@pytest.mark.parametrize("framework", frameworks("torch", "jax"))
def test_the_model_writes_the_same_in_every_framework(tiny_gpt, framework, prompt):
    expected = greedy_tokens(tiny_gpt, "numpy", prompt)
    if framework == "jax":
        import jax

        with jax.default_device(jax.devices("cpu")[0]):
            assert greedy_tokens(tiny_gpt, "jax", prompt) == expected
    else:
        assert greedy_tokens(tiny_gpt, "torch", prompt) == expected


def test_the_model_writes_words(tiny_gpt):
    text = tiny_gpt.decode(greedy_tokens(tiny_gpt, "numpy", "The with statement "))
    assert {"a", "single", "of", "the"} <= set(text.split())


def test_the_weights_are_small_enough_to_ship(tiny_gpt):
    assert tiny_gpt.WEIGHTS.stat().st_size <= 4_000_000
    config, params = tiny_gpt.load_params()
    assert {name: value.shape for name, value in params.items()} == tiny_gpt.param_shapes(config)
    assert all(value.dtype == np.float32 for value in params.values())


@pytest.mark.slow
@pytest.mark.torch
def test_training_runs_and_writes_what_the_model_reads(tiny_gpt, tmp_path):
    out = tmp_path / "weights.safetensors"
    size = {"layers": 1, "heads": 2, "head-dim": 8, "hidden": 16, "max-seq": 256}
    options = [f"--{name}={value}" for name, value in size.items()]
    done = python(EXAMPLES / "train_tiny_gpt.py", "--steps", 3, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout
    config, params = tiny_gpt.load_params(out)
    assert (config.layers, config.heads, config.head_dim, config.max_seq) == (1, 2, 8, 256)
    assert all(np.isfinite(value).all() for value in params.values())


@pytest.mark.jax
def test_the_example_of_order_is_wrong_by_hand_and_right_through_a_buffer():
    done = python(EXAMPLES / "order.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"through a Buffer +. 0 of 20", done.stdout), done.stdout
    by_hand = re.search(r"by hand, no waiting +. (\d+) of 20", done.stdout)
    assert int(by_hand[1]) > 0, "the control shows no race"
    assert "handed out at" in done.stdout
    assert "in checked" in done.stdout
