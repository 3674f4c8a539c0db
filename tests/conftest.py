"""Global state is set back around every test; tests that need what is not here are skipped."""

from __future__ import annotations

import pytest

import rlx_driver as rlx
from rlx_driver.registry import registry
from support import cuda_works, installed


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in ("torch", "jax"):
        if item.get_closest_marker(name) and not installed(name):
            pytest.skip(f"{name} is not installed")
    if item.get_closest_marker("cuda") and not cuda_works():
        pytest.skip("no GPU that torch can use")


@pytest.fixture(autouse=True)
def on_the_host(request):
    """Where JAX has a GPU too, it makes arrays on the host, but for the tests of CUDA."""
    if not cuda_works() or not installed("jax") or request.node.get_closest_marker("cuda"):
        yield
        return
    import jax

    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(autouse=True)
def clean_state():
    """Start with an empty ledger, and take out again what a test has registered."""
    rlx.ledger.reset()
    known = set(registry._factories)
    yield
    for name in set(registry._factories) - known:
        registry.unregister(name)
    rlx.ledger.reset()
