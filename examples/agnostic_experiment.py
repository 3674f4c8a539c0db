"""One experiment, written once: the decay of a vortex, by the lattice Boltzmann method.

The step below asks its arrays for their namespace and knows no framework. A session runs it in
NumPy, torch and JAX, each from the same start, and then in all of them in turn on one set of
handles. The fluid's viscosity, measured from the decay of its energy, is compared with what theory
says, and the fields with each other.

    python examples/agnostic_experiment.py
    python examples/agnostic_experiment.py --size 256 --steps 400 --frameworks numpy,torch,jax

It exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import array_api_extra as xpx
import numpy as np
from array_api_compat import array_namespace
from rich.console import Console
from rich.table import Table

import rlx_driver as rlx

# torch.compile looks through the cache in which array-api-compat keeps namespaces, and says so.
warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")

# The nine velocities of a site, in sites a step, and the weight of each.
VELOCITIES = ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (-1, -1), (1, -1))
WEIGHTS = (4 / 9, *[1 / 9] * 4, *[1 / 36] * 4)
TAU = 0.8  # relaxation time, in steps
VISCOSITY = (TAU - 0.5) / 3  # what theory says, in sites squared a step
SPEED = 0.02  # of the vortices at the start, in sites a step

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "numpy": ("numpy", {}),
    "torch": ("torch", {"eager": True}),
    "torch.compile": ("torch", {}),
    "jax": ("jax", {}),
}
TOLERANCE = 2e-6  # of the fields, which are of the order of one: a few roundings of a float32


def equilibrium(xp: Any, rho: Any, ux: Any, uy: Any) -> Any:
    """Give the distribution that collisions lead to, (9, n, n)."""
    square = 1.5 * (ux * ux + uy * uy)
    parts = []
    for (cx, cy), weight in zip(VELOCITIES, WEIGHTS, strict=True):
        along = 3.0 * (cx * ux + cy * uy)
        parts.append(weight * rho * (1.0 + along + 0.5 * along * along - square))
    return xp.stack(parts)


def moments(xp: Any, f: Any) -> tuple[Any, Any, Any]:
    """Give density and the two components of the velocity, (n, n) each."""
    rho = xp.sum(f, axis=0)
    ux = f[1, ...] - f[3, ...] + f[5, ...] - f[6, ...] - f[7, ...] + f[8, ...]
    uy = f[2, ...] - f[4, ...] + f[5, ...] + f[6, ...] - f[7, ...] - f[8, ...]
    return rho, ux / rho, uy / rho


def advance(*, f: Any, energy: Any, rate: float) -> tuple[dict[str, Any], None]:
    """Collide and stream once, and note the energy.

    Parameters
    ----------
    f
        Density of particles of each velocity at each site, (9, n, n).
    energy
        Mean kinetic energy of a site before each of the last steps, (steps,).
    rate
        How much of the way to equilibrium a collision goes.
    """
    xp = array_namespace(f)
    rho, ux, uy = moments(xp, f)
    now = 0.5 * xp.mean(rho * (ux * ux + uy * uy))
    f = f + rate * (equilibrium(xp, rho, ux, uy) - f)
    moved = [
        xp.roll(f[i, ...], shift=(cy, cx), axis=(0, 1)) for i, (cx, cy) in enumerate(VELOCITIES)
    ]
    # The standard cannot set an element of an array that is immutable; array-api-extra can.
    energy = xpx.at(xp.roll(energy, -1))[-1].set(now)
    return {"f": xp.stack(moved), "energy": energy}, None


def vortices(size: int) -> np.ndarray[Any, Any]:
    """Give the start: four vortices that turn against each other (Taylor and Green), (9, n, n)."""
    x = (np.arange(size) + 0.5) * (2 * math.pi / size)
    ux = -SPEED * np.cos(x)[None, :] * np.sin(x)[:, None]
    uy = SPEED * np.sin(x)[None, :] * np.cos(x)[:, None]
    pressure = -0.25 * SPEED**2 * (np.cos(2 * x)[None, :] + np.cos(2 * x)[:, None])
    return equilibrium(np, 1 + 3 * pressure, ux, uy).astype(np.float32)


def measured_viscosity(energy: np.ndarray[Any, Any], size: int) -> float:
    """Give the viscosity from the decay of the energy, in sites squared a step."""
    times = np.arange(energy.size)
    slope = np.polyfit(times, np.log(energy.astype(np.float64)), 1)[0]
    return float(-slope / (4 * (2 * math.pi / size) ** 2))


@dataclass
class Result:
    """What a run gave."""

    name: str
    field: np.ndarray[Any, Any]
    energy: np.ndarray[Any, Any]
    seconds: float  # a step, without the first
    moved: bool  # whether a handle has another address than before

    @property
    def viscosity(self) -> float:
        """From the decay of its energy."""
        return measured_viscosity(self.energy, self.field.shape[-1])


def run(name: str, parts: list[str], size: int, steps: int, device: rlx.Device) -> Result:
    """Run the experiment, in one framework or in several that take turns on the same handles."""
    with rlx.Session(device) as session:
        state = {"f": ((9, size, size), "f32"), "energy": ((steps,), "f32")}
        compiled = []
        for part in parts:
            framework, options = WAYS[part]
            compiled.append(session.compile(advance, state, framework, **options))
        start = vortices(size)
        places = [handle.address for handle in session.region]
        for pass_ in ("warm up", "measure"):
            session.bind_handle("f", start)
            session.bind_handle("energy", 0)
            begin = time.perf_counter()
            share = steps / len(parts) if pass_ == "measure" else 2
            for turn in range(round(share * len(parts))):
                compiled[int(turn / share)].run(rate=1 / TAU)
            energy = session.read_handle("energy")  # waits for the last step
            seconds = (time.perf_counter() - begin) / steps
        moved = places != [handle.address for handle in session.region]
        return Result(name, session.read_handle("f"), energy, seconds, moved)


def table_of(results: list[Result], size: int, steps: int) -> Table:
    """Give the table of times and results."""
    table = Table(title=f"{steps} steps on {size} x {size} sites, float32")
    table.add_column("run", no_wrap=True)
    for column in ("a step", "site updates", "viscosity", "off theory", "off the first run"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.seconds * 1e3:.3f} ms",
            f"{size * size / result.seconds / 1e6:.1f} M/s",
            f"{result.viscosity:.6f}",
            f"{abs(result.viscosity / VISCOSITY - 1):.2%}",
            f"{np.abs(result.field - results[0].field).max():.1e}",
        )
    return table


def checks_of(results: list[Result]) -> list[tuple[str, bool]]:
    """Give what has to hold, and whether it does."""
    first = results[0]
    return [
        (
            f"the viscosity is {VISCOSITY:.4f} within 1% in every run",
            all(abs(result.viscosity / VISCOSITY - 1) < 0.01 for result in results),
        ),
        (
            f"all fields are equal within {TOLERANCE}",
            all(np.abs(result.field - first.field).max() <= TOLERANCE for result in results),
        ),
        (
            "the energies are equal within 0.01%",
            all(np.allclose(result.energy, first.energy, rtol=1e-4) for result in results),
        ),
        ("every handle stayed at its address", not any(result.moved for result in results)),
    ]


def why_not(way: str, device: rlx.Device) -> str | None:
    """Say why a way to run is not to be had here, if so."""
    framework = WAYS[way][0]
    if importlib.util.find_spec(framework) is None:
        return f"{way} is not installed"
    if framework == "numpy" and not device.is_host:
        return f"{way} does not see {device}"
    return None


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, or say what is wrong with them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=96, help="sites along each side")
    parser.add_argument("--steps", type=int, default=300, help="how many steps a run makes")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0")
    parser.add_argument(
        "--frameworks",
        default=",".join(WAYS),
        help=f"of {', '.join(WAYS)}; those that are not to be had are left out",
    )
    options = parser.parse_args(argv)
    options.frameworks = options.frameworks.split(",")
    for name in options.frameworks:
        if name not in WAYS:
            parser.error(f"unknown framework {name!r}: known are {', '.join(WAYS)}")
    try:
        options.device = rlx.Device(options.device)
    except rlx.DriverError as error:
        parser.error(str(error))
    if not options.device.is_available():
        parser.error(f"{options.device} is not there")
    if options.size < 16 or options.steps < 10:
        parser.error("--size must be at least 16 and --steps at least 10")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the experiment in every framework, and in all of them in turn."""
    options = options_of(argv)
    console = Console(soft_wrap=True, highlight=False)
    reasons = {name: why_not(name, options.device) for name in options.frameworks}
    present = [name for name, reason in reasons.items() if reason is None]
    for reason in filter(None, reasons.values()):
        console.print(f"(left out: {reason})")
    if not present:
        return 2
    shape = options.size, options.steps, options.device
    results = [run(name, [name], *shape) for name in present]
    relay = [name for name in present if name != "torch.compile"]
    if len(relay) > 1:
        results.append(run("in turn", relay, *shape))
    console.print(table_of(results, options.size, options.steps))
    checks = checks_of(results)
    for text, holds in checks:
        console.print(f"{'ok  ' if holds else 'FAIL'} {text}")
    return 0 if all(holds for _, holds in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
