"""Run many random programs through the driver and by hand, and count the wrong ones.

    python -m benchmarks.random_programs --programs 2000
    python -m benchmarks.random_programs --programs 500 --device cuda:0 --order events

The programs and the two executors are those of ``tests/test_random_programs.py``. It exits with 1
when a program is wrong with the driver, or when none is without it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--order", choices=("shared", "events", "host"), help="on CUDA")
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--side", type=int, default=256, help="of the matrices")
    parser.add_argument("--by-hand", type=int, default=400, help="how many run by hand too")
    parser.add_argument("--seconds", type=float, help="stop when so much time is over")
    parser.add_argument("--out", type=Path, help="a file for the counts, as JSON")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.order:
        os.environ["RLX_STREAM_ORDER"] = options.order  # before the device is first used
    counts = run(options)
    print(json.dumps(counts, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(counts, indent=1) + "\n")
    return 0 if counts["wrong with the driver"] == 0 < counts["wrong without it"] else 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(TESTS))
    from benchmarks.harness import machine
    from random_executors import ByHand, Driver, Place, differences
    from random_programs import draw

    cuda = options.device.startswith("cuda")
    place = Place(options.device, options.order)
    apart = Place(options.device)  # by hand torch does not run on JAX's stream
    ran = operations = without = 0
    failures: list[str] = []
    start = time.perf_counter()
    for seed in range(options.seed, options.seed + options.programs):
        program = draw(
            random.Random(seed).randrange, cuda=cuda, streams=3 if cuda else 1, side=options.side
        )
        try:
            wrong = differences(program, Driver, place)
        except Exception:
            wrong = [traceback.format_exc()]
        if wrong:
            failures.append("\n".join([f"seed {seed}", repr(program), *wrong]))
            print(failures[-1], flush=True)
        if ran < options.by_hand:
            without += bool(differences(program, ByHand, apart))
        ran += 1
        operations += len(program.ops)
        if options.seconds and time.perf_counter() - start > options.seconds:
            break
    return {
        "machine": machine(options.device),
        "order": options.order or "as it is found",
        "programs": ran,
        "operations": operations,
        "wrong with the driver": len(failures),
        "programs by hand": min(ran, options.by_hand),
        "wrong without it": without,
        "seconds": round(time.perf_counter() - start, 1),
        "failures": failures[:5],
    }


if __name__ == "__main__":
    sys.exit(main())
