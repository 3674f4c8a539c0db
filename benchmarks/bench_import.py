"""``import rlx_driver``, against importing the packages it needs."""

import subprocess
import sys

from benchmarks.harness import Row

TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def spent(statement: str) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run() -> list[Row]:
    ours, theirs = [], []
    for _ in range(12):
        ours.append(spent("import rlx_driver"))
        theirs.append(spent("import numpy, ml_dtypes, array_api_compat"))
    against = "import numpy, ml_dtypes, array_api_compat"
    return [Row("import rlx_driver", min(ours), against, min(theirs), 1.3)]
