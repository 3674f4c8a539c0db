"""One key-value cache that PyTorch, JAX and NumPy work on in turn, without a copy.

A small byte-level GPT (`tiny_gpt.py`) continues a prompt. torch reads the prompt into the cache,
JAX goes on from there in the same memory, torch takes over again, and NumPy looks at what the
cache says about the model's attention. The weights are in memory once, for all of them.

    python examples/kv_handoff.py
    python examples/kv_handoff.py --frameworks jax,torch --prompt "def __init__(self"
    python examples/kv_handoff.py --device cuda:0

It checks itself: the tokens against a run in torch alone, the ledger of copies, the addresses. It
exits with 1 when a check fails. It runs with the frameworks that are installed, NumPy alone too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import rlx_driver as rlx
import tiny_gpt

try:
    import torch
except ImportError:
    torch = None
try:
    import jax
except ImportError:
    jax = None

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

FRAMEWORKS = {"torch": torch, "jax": jax, "numpy": np}
ROUNDS = 5  # times are medians over so many runs, in turn with the runs to compare with


class Phase(NamedTuple):
    """Which framework writes which of the new tokens."""

    kind: str
    framework: str
    start: int
    stop: int


class Transcript:
    """A prompt and the tokens written after it, how many the cache holds, and the time of each."""

    def __init__(self, prompt: str) -> None:
        self.tokens: list[int] = tiny_gpt.encode(prompt)[0].tolist()
        self.prompt_length = len(self.tokens)
        self.cached = 0
        self.seconds: list[float] = []  # of each call of the model, divided by the tokens it read
        self._clock = time.perf_counter()

    def unread(self) -> np.ndarray:
        """Return what the cache does not hold yet: first the prompt, then always the last token."""
        return np.array([self.tokens[self.cached :]], np.int32)

    def add(self, token: Any) -> None:
        """Append a token, an array of any framework."""
        newest = token.item()  # waits for the framework, so that the time is the whole time
        now = time.perf_counter()
        self.seconds.append((now - self._clock) / (len(self.tokens) - self.cached))
        self._clock = now
        self.cached = len(self.tokens)
        self.tokens.append(newest)

    def new(self) -> list[int]:
        """Return the tokens after the prompt."""
        return self.tokens[self.prompt_length :]


# The model in handles ---------------------------------------------------------------------------


class Model(NamedTuple):
    """A model whose weights and cache are handles: memory that every framework can see."""

    config: tiny_gpt.Config
    step: Callable[..., tuple[Any, Any]]
    weights: dict[str, rlx.BufferHandle]
    kv: rlx.BufferHandle


def next_token_step(config: tiny_gpt.Config) -> Callable[..., tuple[Any, Any]]:
    """Return ``step(kv, weights, tokens, position) -> (kv, next token)``, for any framework."""
    forward = tiny_gpt.cache_step(config)

    def step(kv: Any, weights: Mapping[str, Any], tokens: Any, position: Any) -> tuple[Any, Any]:
        kv, logits = forward(kv, weights, tokens, position)
        return kv, tiny_gpt.greedy(logits)

    return step


def load(config: tiny_gpt.Config, arrays: Mapping[str, np.ndarray], device: rlx.Device) -> Model:
    """Put the weights into handles of one region, and an empty cache beside them."""
    region = rlx.HandleRegion(device)
    weights = region.create({name: (array.shape, "f32") for name, array in arrays.items()})
    for name, array in arrays.items():
        weights[name].copy_from(array)  # the only copy of the weights, for all frameworks
    kv = rlx.BufferHandle("kv", config.kv_shape(), "f32", region=region)
    return Model(config, next_token_step(config), weights, kv)


# The same cache in three frameworks -------------------------------------------------------------


def torch_phase(model: Model, transcript: Transcript, count: int) -> None:
    """Write `count` tokens in torch, where the step changes the cache that it is given."""
    weights = rlx.views(model.weights, "torch")
    with model.kv.write("torch") as cache:  # ours alone, after all that JAX had to do with it
        for _ in range(count):
            tokens = torch.tensor(transcript.unread(), device=cache.device)
            _, token = model.step(cache, weights, tokens, transcript.cached)
            transcript.add(token)


def jax_phase(model: Model, transcript: Transcript, count: int) -> None:
    """Write `count` tokens in JAX, where the step is pure and returns a new cache."""
    weights = rlx.views(model.weights, "jax")
    for _ in range(count):
        tokens, position = transcript.unread(), transcript.cached
        # Jitted at the first call, with the cache donated: the new one lies where the old one was.
        token = model.kv.update(model.step, weights, tokens, position, has_aux=True)
        transcript.add(token)


def numpy_phase(model: Model, transcript: Transcript, count: int) -> None:
    """Write `count` tokens in NumPy, where the step changes the cache that it is given."""
    weights = rlx.views(model.weights, "numpy")
    with model.kv.write("numpy") as cache:
        for _ in range(count):
            _, token = model.step(cache, weights, transcript.unread(), transcript.cached)
            transcript.add(token)


RUN_PHASE = {"torch": torch_phase, "jax": jax_phase, "numpy": numpy_phase}


def with_one_handle(model: Model, phases: Sequence[Phase], prompt: str) -> Transcript:
    """Run the phases one after the other. There is nothing to do between them."""
    model.kv[...] = 0.0  # so that no run can live on what the one before it left in the cache
    transcript = Transcript(prompt)
    for phase in phases:
        RUN_PHASE[phase.framework](model, transcript, phase.stop - phase.start)
    return transcript


def attention_table(model: Model, transcript: Transcript) -> Table:
    """Read in NumPy what the newest token in the cache looks at, and how long its vectors are."""
    kv, weights = model.kv, model.weights
    if not kv.device.is_host:  # NumPy sees host memory only, so here it needs copies
        kv = kv.to_host()
        weights = {name: weight.to_host() for name, weight in weights.items()}
    last = transcript.cached - 1
    token = np.array([[transcript.tokens[last]]])
    with rlx.read(weights, "numpy") as arrays, kv.read("numpy") as cache:
        looks = tiny_gpt.last_attention(arrays, token, cache, last, config=model.config)
        norms = tiny_gpt.cache_norms(cache, transcript.cached).mean(axis=(2, 3, 4))
    entropies = tiny_gpt.attention_entropy(looks).mean(axis=(1, 2))
    best = looks.mean(axis=(1, 2)).argmax(axis=-1)
    rows = [
        (
            layer,
            f"{entropies[layer]:.2f} bits",
            f"{tiny_gpt.decode([transcript.tokens[best[layer]]])!r} at {best[layer]}",
            *(f"{norm:.2f}" for norm in norms[layer]),
        )
        for layer in range(model.config.layers)
    ]
    columns = ("layer", "entropy", "looks most at", "mean key", "mean value")
    return table(f"Attention of token {last}, read in NumPy", *columns, rows=rows)


# What to compare with: the same without the driver ----------------------------------------------


def from_host(array: np.ndarray, framework: str, device: rlx.Device) -> Any:
    """Bring a NumPy array into a framework the usual way, which copies for torch and JAX."""
    if framework == "torch":
        return torch.tensor(array, device=str(device))
    if framework == "jax":
        return jax.numpy.asarray(array)
    return np.require(array, requirements="W")  # what came from JAX is read-only


def to_host(array: Any, framework: str) -> np.ndarray:
    """Bring an array of a framework to NumPy the usual way."""
    return array.numpy(force=True) if framework == "torch" else np.asarray(array)


class Plain(NamedTuple):
    """The model as a program has it that has no driver: the weights once for each framework."""

    config: tiny_gpt.Config
    device: rlx.Device
    step: dict[str, Callable[..., tuple[Any, Any]]]
    weights: dict[str, dict[str, Any]]


def load_plain(
    config: tiny_gpt.Config,
    arrays: Mapping[str, np.ndarray],
    device: rlx.Device,
    frameworks: Sequence[str],
) -> Plain:
    """Give each framework weights and a step of its own."""
    step = next_token_step(config)
    steps = dict.fromkeys(frameworks, step)
    if "jax" in steps:
        steps["jax"] = jax.jit(step, donate_argnums=0)
    weights = {
        framework: {name: from_host(array, framework, device) for name, array in arrays.items()}
        for framework in frameworks
    }
    return Plain(config, device, steps, weights)


def without_driver(
    plain: Plain, phases: Sequence[Phase], prompt: str, *, through_the_host: bool
) -> Transcript:
    """Run the phases with the cache in NumPy between any two tokens, or only between phases."""
    order = [framework for _, framework, start, stop in phases for _ in range(start, stop)]
    empty = np.zeros(plain.config.kv_shape(), np.float32)
    cache = from_host(empty, order[0], plain.device)
    transcript = Transcript(prompt)
    for framework, following in itertools.pairwise([*order, order[-1]]):
        step, weights = plain.step[framework], plain.weights[framework]
        tokens = transcript.unread()
        if framework == "torch":
            tokens = torch.tensor(tokens, device=cache.device)
        cache, token = step(cache, weights, tokens, transcript.cached)
        if through_the_host or following != framework:
            cache = from_host(to_host(cache, framework), following, plain.device)
        transcript.add(token)
    return transcript


# The report -------------------------------------------------------------------------------------


def table(title: str, *columns: str, rows: Sequence[Sequence[Any]]) -> Table:
    """Build a table."""
    made = Table(*columns, title=title, title_justify="left", title_style="bold", show_edge=False)
    for row in rows:
        made.add_row(*map(str, row))
    return made


def text_table(transcript: Transcript, phases: Sequence[Phase]) -> Table:
    """Show the text, and which framework wrote which part of it."""
    length = transcript.prompt_length
    rows = [("prompt", length, tiny_gpt.decode(transcript.tokens[:length]))]
    for kind, framework, start, stop in phases:
        text = tiny_gpt.decode(transcript.new()[start:stop])
        rows.append((f"{kind} in {framework}", stop - start, text))
    return table("The text, and who wrote it", "phase", "tokens", "text", rows=rows)


def time_table(runs: Mapping[str, Sequence[Transcript]], phases: Sequence[Phase]) -> Table:
    """Show the median time of a token in each phase, for each way to run it."""
    rows = []
    for kind, framework, start, stop in phases:
        medians = (np.median([run.seconds[start:stop] for run in way]) for way in runs.values())
        rows.append((f"{kind} in {framework}", *(f"{s * 1e3:.3f} ms" for s in medians)))
    return table("Time for each token, read or written", "phase", *runs, rows=rows)


def addresses(handle: rlx.BufferHandle, frameworks: Sequence[str]) -> dict[str, int]:
    """Ask each framework itself at which address it sees a handle."""
    ask: dict[str, Callable[[Any], int]] = {
        "torch": lambda view: view.data_ptr(),
        "jax": lambda view: view.block_until_ready().unsafe_buffer_pointer(),
        "numpy": lambda view: view.ctypes.data,
    }
    return {name: ask[name](handle.array(name)) for name in frameworks}


# The command line -------------------------------------------------------------------------------


def chosen_frameworks(asked: str | None) -> list[str]:
    """Return the frameworks that were asked for, or all that are installed."""
    if asked is None:
        return [name for name, module in FRAMEWORKS.items() if module]
    names = list(dict.fromkeys(name.strip() for name in asked.split(",")))
    for name in names:
        if name not in FRAMEWORKS:
            raise ValueError(f"unknown framework {name!r}: known are {', '.join(FRAMEWORKS)}")
        if FRAMEWORKS[name] is None:
            raise ValueError(f"{name} is not installed here: pip install 'rlx-driver[{name}]'")
    return names


def plan(frameworks: Sequence[str], tokens: int, device: rlx.Device) -> list[Phase]:
    """Prefill in the first framework, decode in the others, and then in the first one again."""
    if len(frameworks) > 1 and frameworks[-1] == "numpy":
        frameworks = frameworks[:-1]  # it only reads
    if "numpy" in frameworks and not device.is_host:
        raise ValueError(f"numpy cannot write to {device}: name it last, to read a copy")
    first, *others = frameworks
    decoders = [*others, first]
    if tokens <= len(decoders):
        raise ValueError(f"--tokens must be at least {len(decoders) + 1}, one for each phase")
    ends = [1 + (tokens - 1) * i // len(decoders) for i in range(len(decoders) + 1)]
    spans = zip(decoders, ends, ends[1:], strict=False)
    return [Phase("prefill", first, 0, 1), *(Phase("decode", *span) for span in spans)]


def make_equal(frameworks: Sequence[str], device: rlx.Device) -> None:
    """Have all frameworks compute in true float32 and on one device."""
    if torch:
        torch.set_num_threads(1)  # a token is too little work to share
        torch.set_float32_matmul_precision("highest")
    if "jax" in frameworks:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave torch some memory
        jax.config.update("jax_default_matmul_precision", "highest")
        jax.config.update("jax_default_device", jax.devices(device.kind)[device.index])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and prepare what it asks for; exits with a message if that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where the memory is: cpu, cuda:0")
    parser.add_argument(
        "--frameworks",
        help="in the order in which they write; numpy in the last place only reads "
        "(default: torch,jax,numpy, or those of them that are installed)",
    )
    parser.add_argument("--prompt", default="The with statement ")
    parser.add_argument("--tokens", type=int, default=120, help="to write, in all phases together")
    args = parser.parse_args(argv)
    try:
        args.device = rlx.Device(args.device)
        args.device.memory()  # raises if there is no such device
        args.frameworks = chosen_frameworks(args.frameworks)
        args.phases = plan(args.frameworks, args.tokens, args.device)
        args.config, args.arrays = tiny_gpt.load_params()
        room = args.config.max_seq + 1 - len(args.prompt.encode())  # the last token is not read
        if not args.prompt:
            raise ValueError("--prompt is empty: the model needs a byte to begin with")
        if args.tokens > room:
            raise ValueError(
                f"--tokens {args.tokens} is too many: a cache of {args.config.max_seq} tokens "
                f"leaves room for {max(room, 0)} after this prompt"
            )
        make_equal(args.frameworks, args.device)
    except (ValueError, RuntimeError) as error:  # the driver's errors are such, too
        parser.error(str(error))
    return args


def report(
    args: argparse.Namespace, runs: Mapping[str, Sequence[Transcript]], model: Model
) -> Console:
    """Print what was written, what the cache says in NumPy, and how long it took."""
    console = Console(
        width=None if sys.stdout.isatty() else 100, highlight=False, markup=False, emoji=False
    )
    console.print(f"One cache on {args.device}, for {', '.join(args.frameworks)}", style="bold")
    if missing := [name for name, module in FRAMEWORKS.items() if not module]:
        console.print(f"(not installed here, so left out: {', '.join(missing)})")
    written = runs["one handle"][0]
    console.print("", text_table(written, args.phases), "")
    if "numpy" in args.frameworks:
        allowed = rlx.no_copies() if args.device.is_host else contextlib.nullcontext()
        with rlx.ledger.record() as reading, allowed:
            console.print(attention_table(model, written))
        console.print(f"NumPy was given copies of {reading.counts.bytes_copied:,} bytes for it.\n")
    console.print(time_table(runs, args.phases))
    note = f"Medians of {ROUNDS} runs, after one run that compiled and is not timed. "
    if any(phase.framework != "numpy" for phase in args.phases):
        note += (
            "Through the host, the cache goes to NumPy and back at each token: "
            f"{model.kv.byte_size:,} bytes here, and longer for a larger one. With one handle "
            "nothing moves, at any size."
        )
    else:
        note += "NumPy is on the host already, so that the two ways do the same."
    console.print(note + "\n")
    return console


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, print the report, and return 0 if every check passes."""
    args = parse(argv)
    with rlx.command_stream(args.device):  # on a GPU: torch and JAX on one stream
        return demo(args)


def demo(args: argparse.Namespace) -> int:
    """Run the ways in turn, print what came of them, and return 0 if every check passes."""
    device, phases, prompt = args.device, args.phases, args.prompt
    # NumPy sees host memory only; of any other device it gets copies, in the end.
    sharing = [name for name in args.frameworks if name != "numpy" or device.is_host]
    baseline = "torch" if torch else "numpy"
    whole = [Phase("all", baseline, 0, args.tokens)]

    in_use = device.memory().in_use
    model = load(args.config, args.arrays, device)
    home = addresses(model.kv, sharing)
    used = {phase.framework for phase in [*phases, *whole]}
    plain = load_plain(args.config, args.arrays, device, used)
    ways: dict[str, Callable[[], Transcript]] = {
        "one handle": lambda: with_one_handle(model, phases, prompt),
        "through the host": lambda: without_driver(plain, phases, prompt, through_the_host=True),
        f"{baseline} alone": lambda: without_driver(plain, whole, prompt, through_the_host=False),
    }
    for run in ways.values():
        run()  # neither timed nor counted: JAX compiles, and views are made
    runs: dict[str, list[Transcript]] = {name: [] for name in ways}
    with rlx.ledger.record() as hot, rlx.no_copies():  # any copy by the driver would raise
        for _ in range(ROUNDS):
            for name, run in ways.items():
                runs[name].append(run())
    console = report(args, runs, model)

    away = addresses(model.kv, sharing)
    rows = [(name, hex(home[name]), hex(away[name])) for name in sharing]
    columns = ("framework", "before the first token", "after the last token")
    console.print(table("Where each framework sees the cache", *columns, rows=rows), "")
    needed = model.kv.byte_size + sum(weight.byte_size for weight in model.weights.values())
    held = device.memory().in_use - in_use
    console.print(f"Weights and cache are {needed:,} bytes. The driver holds {held:,} for all.")
    console.print(f"Ledger of {ROUNDS} runs with one handle: {hot.counts}\n")

    shared, hosted, single = ([run.new() for run in way] for way in runs.values())
    views = [(weight.address, addresses(weight, sharing)) for weight in model.weights.values()]
    checks = {
        f"all {args.tokens} tokens equal those of {baseline} alone": shared == single,
        "so do those of the runs through the host": hosted == single,
        "0 bytes copied by the driver from the first token to the last": hot.counts.copies == 0,
        "the cache has one address in all frameworks, before and after": (
            {*home.values(), *away.values()} == {model.kv.address}
        ),
        "so has each of the weights": all({*seen.values()} == {own} for own, seen in views),
        "weights and cache are in memory once": 0 <= held - needed < 256 * (len(views) + 1),
    }
    for text, passed in checks.items():
        console.print("ok  " if passed else "FAIL", text, style="green" if passed else "bold red")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
