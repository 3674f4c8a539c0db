"""Run the benchmarks and write their results: ``python -m benchmarks.run [NAME ...]``."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks.harness import RESULTS, machine, report

SUITES = {
    "cpu": (
        "import",
        "views",
        "exchange",
        "update",
        "tree",
        "session",
        "fence",
        "memory",
        "arena",
        "typed_io",
        "snapshot",
        "training",
        "transformers",
        "jax_call",
        "minilm",
    ),
    "cuda": ("cuda", "order", "cuda_typed_io"),
    "plan": ("plan",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmarks to run; all of the device if none")
    parser.add_argument("--device", choices=SUITES, default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    rows = []
    for name in options.names or SUITES[options.device]:
        rows += importlib.import_module(f"benchmarks.bench_{name}").run()
    # A partial run does not take the place of a whole one.
    label = options.device if not options.names else f"{options.device}-{'-'.join(options.names)}"
    print(report(label, rows, machine(options.device), options.out))


if __name__ == "__main__":
    main()
