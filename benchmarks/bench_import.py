"""``import rlx_driver``, against importing the packages it needs; both from compiled bytecode."""

import compileall
import subprocess
import sys
from pathlib import Path

import rlx_driver
from benchmarks.harness import Row

TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def spent(statement: str) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run() -> list[Row]:
    # An installed package has its bytecode; a checkout may be told not to write it.
    compileall.compile_dir(Path(rlx_driver.__file__).parent, quiet=1)
    ours, theirs = [], []
    for _ in range(15):
        ours.append(spent("import rlx_driver"))
        theirs.append(spent("import numpy, ml_dtypes, array_api_compat"))
    against = "import numpy, ml_dtypes, array_api_compat"
    return [Row("import rlx_driver", min(ours), against, min(theirs), 1.3)]
