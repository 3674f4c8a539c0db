"""A real model's forward pass in one arena: every intermediate has its place before the run.

The small GPT (`tiny_gpt.py`) is traced with torch.fx, its intermediates are planned into one arena,
and the graph runs there, each operator writing straight into its slot (`arena_program.py`). On a
CPU the arena is NumPy's memory, on a GPU torch's.

    python examples/arena_inference.py
    python examples/arena_inference.py --tokens 512 --batch 2 --plot plan.png
    python examples/arena_inference.py --device cuda:0 --debug

It checks itself: the logits against eager torch bit for bit, addresses, and what was allocated. It
exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import rlx_driver as rlx
import tiny_gpt

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # read at the import: torch's profiler is to be quiet
try:
    import torch

    from arena_program import ArenaProgram
except ImportError as error:
    sys.exit(f"this example runs a torch program ({error}): pip install 'rlx-driver[torch]'")

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PROMPT = "The with statement is used to wrap the execution of a block with methods defined by "
ROUNDS = 15  # times are medians over so many runs, eager and in the arena in turn
WORKSPACE = 0.02  # part of the plan that operators may allocate for themselves while they run


class Model(NamedTuple):
    """The model: its weights in handles of one region, and its forward pass over their views."""

    weights: list[torch.Tensor]
    forward: Callable[..., torch.Tensor]


def load(
    config: tiny_gpt.Config, arrays: Mapping[str, np.ndarray], region: rlx.HandleRegion
) -> Model:
    """Put the weights into handles; eager torch and the arena's program use the same."""
    handles = region.create({name: (array.shape, "f32") for name, array in arrays.items()})
    for name, array in arrays.items():
        handles[name].copy_from(array)

    def forward(tokens: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        params = dict(zip(handles, weights, strict=True))
        return tiny_gpt.forward(params, tokens, None, 0, config=config)[1]

    return Model([handle.torch() for handle in handles.values()], forward)


def make_prompts(text: str, batch: int, tokens: int, device: rlx.Device) -> list[torch.Tensor]:
    """Return three prompts of ``(batch, tokens)``: the text, the text backwards, and noise."""
    bytes_ = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    noise = np.random.default_rng(0).integers(0, 256, batch * tokens)
    rows = (np.resize(each, (batch, tokens)) for each in (bytes_, bytes_[::-1], noise))
    return [torch.tensor(each, device=str(device)) for each in rows]


# What is allocated ------------------------------------------------------------------------------


def wait(device: rlx.Device) -> None:
    """Block until the device has done what was asked of it."""
    if not device.is_host:
        torch.cuda.synchronize(device.index)


def torch_peak(run: Callable[[], Any], device: rlx.Device) -> int:
    """Return the most bytes that torch held during a run, beyond what it held before.

    Only what torch's own allocator gives is counted. An arena on a CPU is NumPy's memory.
    """
    gc.collect()
    wait(device)
    if not device.is_host:
        torch.cuda.reset_peak_memory_stats(device.index)
        before = torch.cuda.memory_allocated(device.index)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device.index) - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.11 speaks of cycles; there are none
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            kept = run()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    del kept
    changes = [(each["ts"], each["args"]["Bytes"]) for each in events if each["name"] == "[memory]"]
    sizes = [size for _, size in sorted(changes, key=lambda change: change[0])]
    return int(np.cumsum([0, *sizes]).max())


def make_arena(plan: rlx.MemoryPlan, device: rlx.Device) -> tuple[rlx.Arena, int]:
    """Make an arena, and return it with the bytes that its framework's allocator says it took."""
    gc.collect()
    if not device.is_host:
        before = torch.cuda.memory_allocated(device.index)
        arena = rlx.Arena(plan, device, name="forward")
        return arena, torch.cuda.memory_allocated(device.index) - before
    tracemalloc.start()
    arena = rlx.Arena(plan, device, name="forward")
    only_numpy = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    taken = tracemalloc.take_snapshot().filter_traces([only_numpy])
    tracemalloc.stop()
    return arena, sum(trace.size for trace in taken.traces)


# The runs ---------------------------------------------------------------------------------------


def same_logits(
    program: ArenaProgram, prompts: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> bool:
    """Run all prompts one after the other, and compare every bit with what eager torch gave."""
    return all(
        torch.equal(program(prompt), logits)
        for prompt, logits in zip(prompts, expected, strict=True)
    )


def median_times(runs: Sequence[Callable[[], Any]], device: rlx.Device) -> list[float]:
    """Return the median seconds of each of some functions, which are run in turn."""
    seconds = np.empty((ROUNDS, len(runs)))
    for round_ in seconds:
        for at, run in enumerate(runs):
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            round_[at] = time.perf_counter() - start
    return np.median(seconds, axis=0).tolist()


def debugged(
    program: ArenaProgram, prompts: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> tuple[bool, str]:
    """Run in a debug arena, where what is dead is poisoned and what lies between is watched."""
    with rlx.Arena(program.plan, rlx.Device.of(prompts[0]), debug=True) as arena:
        program.bind(arena)
        try:
            same = same_logits(program, prompts, expected)
            arena.check()
        except (rlx.ArenaCorruptionError, rlx.StaleViewError) as error:
            return False, str(error)
        return same, f"the plan takes {arena.size_bytes:,} bytes with guards between the slots"


def readers(arena: rlx.Arena, node: str) -> dict[str, tuple[int, int]]:
    """Have each framework that can see a node tell its address and the best token at the end."""
    ask: dict[str, Callable[[Any], int]] = {
        "numpy": lambda view: view.ctypes.data,
        "torch": lambda view: view.data_ptr(),
        "jax": lambda view: view.block_until_ready().unsafe_buffer_pointer(),
    }
    seen = {}
    with rlx.no_copies():  # a copy would raise
        for name, address in ask.items():
            with contextlib.suppress(rlx.UnknownFrameworkError, rlx.DeviceUnavailableError):
                if rlx.explain(arena.view(node), name).shares:
                    view = arena.buffer(node).array(name)
                    seen[name] = (address(view), int(view[0, -1].argmax()))
    return seen


# The report -------------------------------------------------------------------------------------


def table(title: str, *columns: str, rows: Sequence[Sequence[Any]]) -> Table:
    """Build a table, its numbers to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
    for at, column in enumerate(columns):
        made.add_column(column, justify="right" if at == 1 else "left")
    for row in rows:
        made.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    return made


def node_table(program: ArenaProgram) -> Table:
    """Show how many nodes the graph has, and what became of them."""
    kinds = program.count()
    plan = program.plan
    rows = [
        ("operators in the graph", sum(kinds.values()), ""),
        ("views", kinds["view"], "made once, when the program is bound to the arena"),
        ("write into their slot", kinds["out"], "by out=, copy_ or fill_"),
        ("work in place", kinds["in place"], ""),
        ("copied into their slot", kinds["copied"], ", ".join(program.copied()) or "none"),
        ("slots", sum(plan.root(node) == node for node in plan), "for inputs and intermediates"),
    ]
    return table("The program", "", "nodes", "", rows=rows)


def memory_table(program: ArenaProgram, measured: Mapping[str, int]) -> Table:
    """Show what the plan takes beside what torch takes."""
    plan = program.plan
    without = sum(plan.interval(node).size for node in plan if plan.root(node) == node)
    rows = [
        ("all intermediates, without reuse", without, "sum of the slots"),
        ("eager torch, peak", measured["eager"], "of the model as it is written"),
        ("traced graph in torch, peak", measured["graph"], "torch.fx frees after the last use"),
        ("lower bound", plan.lower_bound, "tokens and logits are kept for the whole run"),
        ("plan", plan.size, "the smallest" if plan.optimal else f"{plan.ratio:.4f} of the bound"),
        ("arena, allocated", measured["arena"], "slack for its alignment is part of it"),
        ("allocated while it runs, peak", measured["run"], "operators' own workspace"),
    ]
    return table("Bytes, weights not counted", "", "bytes", "", rows=rows)


# The command line -------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and prepare what it asks for; exits with a message if that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where the arena is: cpu, cuda:0")
    parser.add_argument("--prompt", default=PROMPT, help="repeated until there are enough tokens")
    parser.add_argument("--tokens", type=int, default=256, help="of each sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--debug", action="store_true", help="run in a debug arena too")
    parser.add_argument("--plot", type=Path, help="draw the plan into this file (png, svg, pdf)")
    args = parser.parse_args(argv)
    try:
        args.device = rlx.Device(args.device)
        args.device.memory()  # raises if there is no such device
        args.config, args.arrays = tiny_gpt.load_params()
        if not args.prompt:
            raise ValueError("--prompt is empty: the model needs a byte to begin with")
        if not 1 <= args.tokens <= args.config.max_seq:
            raise ValueError(f"--tokens is {args.tokens}: give 1 to {args.config.max_seq}")
        if args.batch < 1:
            raise ValueError(f"--batch is {args.batch}: give 1 or more")
    except (ValueError, RuntimeError) as error:  # the driver's errors are such, too
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, print the report, and return 0 if every check passes."""
    args = parse(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave torch some memory
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)  # steady times, on a computer that does other things too
    with rlx.command_stream(args.device), rlx.HandleRegion(args.device) as region, torch.no_grad():
        return demo(args, load(args.config, args.arrays, region))


def demo(args: argparse.Namespace, model: Model) -> int:
    """Run the forward pass in both ways, and print what came of them."""
    device = args.device
    prompts = make_prompts(args.prompt, args.batch, args.tokens, device)
    program = ArenaProgram(model.forward, prompts[:1], model.weights)
    plan = program.plan
    if args.plot:
        try:
            plan.plot(args.plot)
        except (ImportError, OSError, ValueError) as error:
            print(f"--plot {args.plot}: {error}", file=sys.stderr)
            return 2

    eager = functools.partial(model.forward, prompts[0], *model.weights)
    graph = functools.partial(program.graph, prompts[0], *model.weights)
    run = functools.partial(program, prompts[0])
    expected = [model.forward(prompt, *model.weights).clone() for prompt in prompts]
    arena, held = make_arena(plan, device)
    with arena:
        program.bind(arena)
        first = same_logits(program, prompts, expected)
        second = same_logits(program, prompts, expected)
        for warm in (eager, graph, run):
            warm()  # libraries take their workspace once
        measured = {"eager": torch_peak(eager, device), "graph": torch_peak(graph, device)}
        measured |= {"arena": held, "run": torch_peak(run, device)}
        seconds = median_times([eager, run], device)
        lost = program.misplaced()
        logits = program.returned[0]
        seen, home = readers(arena, logits), arena.buffer(logits).address
        arena.reset()
        program.bind(arena)
        after_reset = same_logits(program, prompts, expected)
    checks = {
        f"the logits of {len(prompts)} prompts equal eager torch's, bit for bit": first,
        "so they do in a second round in the same arena": second,
        "so they do after a reset of the arena": after_reset,
        "every operator writes into its slot or in place, none is copied": not program.copied(),
        f"all {len(program.tensors)} nodes lie where the plan has them, views too": not lost,
        "the arena is as large as the plan, but for alignment": 0 <= held - plan.size < 1024,
        f"a run allocates less than {WORKSPACE:.0%} of that, for workspace": (
            measured["run"] < WORKSPACE * plan.size
        ),
        f"{', '.join(seen)}: the logits are read where they lie, without a copy": (
            {address for address, _ in seen.values()} == {home}
            and {token for _, token in seen.values()} == {int(expected[0][0, -1].argmax())}
        ),
    }

    console = Console(
        width=None if sys.stdout.isatty() else 100, highlight=False, markup=False, emoji=False
    )
    shape = f"{args.batch} x {args.tokens} tokens"
    console.print(f"A forward pass over {shape} in one arena on {device}\n", style="bold")
    console.print(node_table(program), "")
    console.print(memory_table(program, measured), "")
    theirs, ours = seconds
    rows = [
        ("eager torch", f"{theirs * 1e3:.3f} ms", ""),
        ("in the arena", f"{ours * 1e3:.3f} ms", f"{ours / theirs:.2f} of eager"),
    ]
    console.print(table(f"Time of a run, median of {ROUNDS}", "", "time", "", rows=rows), "")
    rows = [(name, hex(address), repr(chr(token))) for name, (address, token) in seen.items()]
    console.print(table("Who reads the logits", "", "address", "next byte", rows=rows), "")
    if args.debug:
        passed, text = debugged(program, prompts, expected)
        checks["in a debug arena no node is touched outside of its life"] = passed
        console.print(f"Debug arena: {text}\n")
    for text, passed in checks.items():
        console.print("ok  " if passed else "FAIL", text, style="green" if passed else "bold red")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
