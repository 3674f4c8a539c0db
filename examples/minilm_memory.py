"""How much memory `minilm_three_ways.py` needs: peaks of processes that do it in several ways.

Each way runs in a process of its own, which prints as JSON how much it had at most when all its
frameworks were started, and at its end::

    python examples/minilm_memory.py region numpy,torch,jax   # one region for all
    python examples/minilm_memory.py copies numpy,torch,jax   # weights of its own for each
    python examples/minilm_memory.py region ""                # nothing but the start

The peak is ``VmHWM`` of ``/proc/self/status``. `resource.getrusage` tells the peak too, but it
begins with that of the process which started this one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import minilm
import rlx_driver as rlx

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT = 1.15
"""How much more than the least the three may take."""

SENTENCES = ["Rain is on its way.", "Take an umbrella with you, it will be wet soon."] * 4


class Peak(NamedTuple):
    """What a process had at most, in bytes: with its frameworks started, and in all."""

    started: int
    whole: int


class Peaks(NamedTuple):
    """What was measured.

    Parameters
    ----------
    bare
        A process that starts no framework.
    alone
        One for each framework, with a region.
    together
        All frameworks with one region.
    copies
        All frameworks, each with weights of its own.
    """

    bare: Peak
    alone: dict[str, Peak]
    together: Peak
    copies: Peak

    @property
    def least(self) -> int:
        """Bytes of one framework, the most modest, and of the other runtimes, merely started."""
        return min(
            peak.whole
            + sum(
                other.started - self.bare.started
                for others, other in self.alone.items()
                if others != name
            )
            for name, peak in self.alone.items()
        )

    @property
    def ratio(self) -> float:
        """The peak of all frameworks together over `least`."""
        return self.together.whole / self.least


def measure(frameworks: Sequence[str]) -> Peaks:
    """Run every way in a process of its own, one after the other, on the CPU.

    Raises
    ------
    RuntimeError
        If one of them fails; the text is what it printed.
    """
    return Peaks(
        _child("region", []),
        {name: _child("region", [name]) for name in frameworks},
        _child("region", frameworks),
        _child("copies", frameworks),
    )


def _child(way: str, frameworks: Sequence[str]) -> Peak:
    here = Path(__file__).resolve()
    paths = [str(Path(rlx.__file__).parent.parent), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, str(here), way, ",".join(frameworks)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring {way} {','.join(frameworks)} failed: {done.stderr}")
    return Peak(**json.loads(done.stdout))


# The measured process ---------------------------------------------------------------------------


def peak() -> int:
    """Return the most bytes that this process has had in memory so far."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("this system does not tell the peak of a process")
    return int(found[1]) * 1024


def start(framework: str) -> None:
    """Import a framework and have it compute, so that its runtime is there."""
    if framework == "torch":
        import torch

        torch.set_num_threads(1)
        torch.ones((8, 8)) @ torch.ones((8, 8))
    elif framework == "jax":
        import jax

        jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))).block_until_ready()


def own_weights(framework: str, path: Path) -> dict[str, Any]:
    """Load the weights as a program of one framework does."""
    if framework == "torch":
        from safetensors.torch import load_file
    elif framework == "jax":
        from safetensors.flax import load_file
    else:
        from safetensors.numpy import load_file
    return load_file(str(path))


def main(argv: Sequence[str]) -> None:
    """Go one way in this process, and print its peaks."""
    import safetensors  # noqa: F401
    import scipy.special  # noqa: F401

    way, frameworks = argv[0], [name for name in argv[1].split(",") if name]
    folder = minilm.model_folder()
    config = minilm.read_config(folder)
    ids, mask = minilm.tokenize(folder, SENTENCES)
    for framework in frameworks:
        start(framework)
    started = peak()
    path = folder / "model.safetensors"
    if way == "region" and frameworks:
        region = rlx.HandleRegion.load(path)
        weights = {name: region[name] for name in config.names}
        for framework in frameworks:
            with rlx.no_copies(), rlx.read(weights, framework) as arrays:
                minilm.embed_in(framework, arrays, ids, mask, config)
    kept = []
    if way == "copies":
        for framework in frameworks:
            kept.append(own_weights(framework, path))
            arrays = {name: kept[-1][name] for name in config.names}
            minilm.embed_in(framework, arrays, ids, mask, config)
    print(json.dumps({"started": started, "whole": peak()}))


if __name__ == "__main__":
    main(sys.argv[1:])
