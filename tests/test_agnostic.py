"""Steps against their arrays' own namespace, and the experiment that is one."""

from __future__ import annotations

import re

import numpy as np
import pytest

import rlx_driver as rlx
from example_programs import EXAMPLES, demo
from support import frameworks

pytest.importorskip("rich", reason="the example prints with it")
pytest.importorskip("array_api_extra", reason="the example uses it")


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import agnostic_experiment

    return agnostic_experiment


def by_hand(experiment, bring, steps, size=24):
    """Make some steps on plain arrays; the field and the energies."""
    f, energy = bring(experiment.vortices(size)), bring(np.zeros(steps, np.float32))
    for _ in range(steps):
        state, outputs = experiment.advance(f=f, energy=energy, rate=1 / experiment.TAU)
        assert outputs is None
        f, energy = state["f"], state["energy"]
    return f, energy


def test_the_step_keeps_to_the_standard(experiment):
    strict = pytest.importorskip("array_api_strict")
    expected = by_hand(experiment, np.array, 10)
    found = by_hand(experiment, strict.asarray, 10)
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(strict.zeros(1)), "nothing turned it into another array"
        assert ours.dtype == strict.float32
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("framework", frameworks())
def test_a_session_runs_it_as_it_runs_by_hand(experiment, framework):
    field, energy = by_hand(experiment, np.array, 12)
    options = {"eager": True} if framework == "torch" else {}
    state = {"f": (field.shape, "f32"), "energy": (energy.shape, "f32")}
    with rlx.Session() as session:
        step = session.compile(experiment.advance, state, framework, **options)
        step.bind_handle("f", experiment.vortices(24))
        step.bind_handle("energy", 0)
        for _ in range(12):
            step.run(rate=1 / experiment.TAU)
        np.testing.assert_allclose(step.read_handle("f"), field, atol=experiment.TOLERANCE)
        np.testing.assert_allclose(step.read_handle("energy"), energy, rtol=1e-4)


def test_the_experiment_keeps_mass_and_knows_its_theory(experiment):
    field, energy = by_hand(experiment, np.array, 40, size=32)
    assert field.sum(dtype=np.float64) == pytest.approx(32 * 32, rel=1e-6)
    assert (np.diff(energy) < 0).all()
    found = experiment.measured_viscosity(energy, 32)
    assert found == pytest.approx(experiment.VISCOSITY, rel=0.01)


def test_a_framework_without_a_backend_runs_no_session():
    strict = pytest.importorskip("array_api_strict")
    with rlx.Session() as session, pytest.raises(rlx.ZeroCopyError, match="array_api_strict"):
        session.compile(lambda u: ({}, None), {"u": (3, "f32")}, strict)


# --- the program ---------------------------------------------------------------------------------

CHECKS = [
    "ok   the viscosity is 0.1000 within 1% in every run",
    "ok   all fields are equal within 2e-06",
    "ok   the energies are equal within 0.01%",
    "ok   every handle stayed at its address",
]
SMALL = ("--size", 32, "--steps", 30)


def run(*options, **more):
    return demo(*SMALL, *options, name="agnostic_experiment", **more)


def rows(done):
    """Give the rows of the table, as names with the viscosity found."""
    found = re.findall(r"^│ ([\w. ]+?) +│ .*? ms │.*?│ +(0\.\d{6}) │", done.stdout, re.MULTILINE)
    return [name for name, viscosity in found if 0.099 < float(viscosity) < 0.101]


def checks(done):
    return [line for line in done.stdout.splitlines() if re.match("ok|FAIL", line)]


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.jax
def test_all_frameworks_give_the_same():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert rows(done) == ["numpy", "torch", "torch.compile", "jax", "in turn"]
    assert checks(done) == CHECKS


def test_numpy_alone_is_enough():
    done = run(hidden=["torch", "jax"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(done) == ["numpy"]
    assert checks(done) == CHECKS
    assert "(left out: torch.compile is not installed)" in done.stdout


@pytest.mark.parametrize(
    ("before", "fails"),
    [
        ("agnostic_experiment.VISCOSITY *= 1.02", ["FAIL the viscosity"]),
        (
            "agnostic_experiment.WAYS['torch'] = ('numpy', {})\n"
            "own = agnostic_experiment.run\n"
            "def spoilt(name, *rest):\n"
            "    result = own(name, *rest)\n"
            "    result.field[0, 0, 0] += 1e-5 * (name == 'torch')\n"
            "    result.energy[3] *= 1 + 1e-3 * (name == 'torch')\n"
            "    result.moved = name == 'torch'\n"
            "    return result\n"
            "agnostic_experiment.run = spoilt",
            ["FAIL all fields", "FAIL the energies", "FAIL every handle"],
        ),
    ],
    ids=["theory", "results"],
)
def test_a_check_that_fails_is_said_and_is_the_exit_code(before, fails):
    done = run("--frameworks", "numpy,torch", hidden=["torch", "jax"], before=before)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line for line in checks(done) if line.startswith("FAIL")]
    assert len(failed) == len(fails)
    assert all(line.startswith(start) for line, start in zip(failed, fails, strict=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--frameworks", "numpy,mlx"], "unknown framework 'mlx'"),
        (["--steps", "3"], "--steps at least 10"),
        (["--size", "many"], "invalid int value"),
        (["--device", "abacus"], "'abacus' is of no known kind"),
        (["--device", "vulkan"], "vulkan:0 is not there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_words(options, says):
    done = run(*options, hidden=["torch", "jax"])
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
