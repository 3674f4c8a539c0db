"""The examples as programs, run in whatever is installed or as if something were not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

# What a program runs under: some packages look as if they were not installed.
HIDE = """
import sys
from importlib.machinery import PathFinder

hidden = {hidden!r}
finders = list(sys.meta_path)


class Visible:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            return None
        specs = (finder.find_spec(name, path, target) for finder in finders)
        return next((spec for spec in specs if spec is not None), None)

    find_distributions = PathFinder.find_distributions


sys.meta_path[:] = [Visible]
sys.path.insert(0, {examples!r})
"""


def python(*argv):
    """Run Python on some arguments, with nothing in the environment that colours the output."""
    skip = {"FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"}
    env = {name: value for name, value in os.environ.items() if name not in skip}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), *sys.path]))
    env["PYTHONIOENCODING"] = "utf-8"
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def demo(*argv, hidden=(), before="", name="kv_handoff"):
    """Run a demo: as it is, or with packages hidden and some code before its `main`."""
    if not hidden and not before:
        return python(EXAMPLES / f"{name}.py", *argv)
    hidden = {*hidden, *(["jaxlib"] if "jax" in hidden else [])}
    start = HIDE.format(hidden=hidden, examples=str(EXAMPLES))
    code = f"{start}\nimport {name}\n{before}\nsys.exit({name}.main(sys.argv[1:]))"
    return python("-c", code, *argv)
