"""The registry: backends are found when they are needed, and a broken one fails alone."""

from __future__ import annotations

import threading
import types
from importlib import metadata

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver.backends.base import Backend
from rlx_driver.backends.numpy import NumpyBackend
from rlx_driver.registry import ENTRY_POINT_GROUP, Registry, register_backend, registry
from support import address, aligned, must_run


class Kite(NumpyBackend):
    """A backend that keeps its arrays in NumPy."""

    name = "kite"
    packages = ("kites",)
    kinds = ("fpga",)

    def devices(self, kind):
        return [rlx.Device(kind)] if kind in ("fpga", "cpu", "cuda") else []


class Toy(np.ndarray):
    """Its arrays."""


class ToyBackend(NumpyBackend):
    """A framework of its own, whose arrays are seen by type."""

    name = "toys"
    packages = ("test_registry",)
    kinds = ()

    def owns(self, obj):
        return isinstance(obj, Toy)

    def share(self, array, facts):
        return super().share(array, facts).view(Toy)

    def duplicate(self, array):
        return super().duplicate(array).view(Toy)


class Point:
    """An entry point."""

    def __init__(self, name, load):
        self.name = name
        self.value = f"somewhere:{name}"
        self.dist = types.SimpleNamespace(name=f"{name}-package")
        self._load = load

    def load(self):
        return self._load()


@pytest.fixture
def fresh():
    """A registry of its own, so that nothing is loaded yet."""
    return Registry()


@pytest.fixture
def entry_points(monkeypatch):
    """Entry points of other packages, and how often they were read."""
    found = types.SimpleNamespace(points=[], reads=0)

    def read(*, group):
        assert group == ENTRY_POINT_GROUP == "rlx_driver.backends"
        found.reads += 1
        return list(found.points)

    monkeypatch.setattr(metadata, "entry_points", read)
    return found


# --- looking up ----------------------------------------------------------------------------------


def test_nothing_is_loaded_before_it_is_asked_for(fresh):
    assert fresh.loaded == {}
    backend = fresh.get("numpy")
    assert list(fresh.loaded) == ["numpy"]
    assert fresh.get("numpy") is backend
    assert isinstance(backend, Backend)


def test_our_own_backends_are_known_without_reading_entry_points(fresh, entry_points):
    fresh.get("numpy")
    assert fresh.for_kind("cpu").name == "numpy"
    assert fresh.for_array(np.zeros(3)).name == "numpy"
    assert fresh.for_array([1, 2]) is None
    assert entry_points.reads == 0


def test_entry_points_are_read_once_for_a_name_that_nobody_knows(fresh, entry_points):
    for _ in range(3):
        with pytest.raises(rlx.UnknownFrameworkError, match="known are jax, numpy, torch"):
            fresh.get("mystery")
    assert fresh.for_kind("vulkan") is None
    assert fresh.names() == ["jax", "numpy", "torch"]
    assert entry_points.reads == 1


def test_an_unknown_name_says_what_to_do():
    with pytest.raises(rlx.UnknownFrameworkError) as caught:
        registry.get("tensorflow")
    text = str(caught.value)
    assert "'tensorflow'" in text
    assert "from_dlpack" in text
    assert "register_backend" in text


def test_our_own_entry_points_name_our_own_backends():
    points = {p.name: p for p in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if not points:
        pytest.skip("the package is not installed, only on the path")
    for name in ("numpy", "torch", "jax"):
        assert points[name].value.startswith(f"rlx_driver.backends.{name}:")


def test_one_backend_whichever_thread_asks_first(fresh):
    made, gate = [], threading.Barrier(8)

    class Slow(Kite):
        def __init__(self):
            made.append(self)

    fresh.register("slow", Slow)
    found = []

    def ask():
        gate.wait()
        found.append(fresh.get("slow"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert set(map(id, found)) == {id(made[0])}


def test_arrays_are_told_by_their_type(fresh):
    class Mine(np.ndarray):
        pass

    assert fresh.for_array(np.zeros(3).view(Mine)).name == "numpy"
    for stranger in (np.float32(1), np.dtype("f4"), [1], 5, None, object()):
        assert fresh.for_array(stranger) is None


# --- registering ---------------------------------------------------------------------------------


def test_a_backend_is_made_once_and_on_first_use(fresh):
    made = []

    def factory():
        made.append(Kite())
        return made[-1]

    fresh.register("kite", factory, packages=("kites",), kinds=("fpga",))
    assert "kite" in fresh.names()
    assert made == []
    assert fresh.get("kite") is fresh.for_kind("fpga") is made[0]
    assert len(made) == 1


def test_a_registered_framework_takes_part_in_exchange():
    register_backend("toys", ToyBackend, packages=ToyBackend.packages)
    x = aligned(16)
    y = rlx.exchange(x, "toys", copy=False)
    assert type(y) is Toy
    assert address(y) == address(x)
    z = rlx.exchange(y, "numpy", copy=False)
    assert address(z) == address(x)
    assert rlx.exchange(y, "toys") is y
    c = rlx.exchange(x, "toys", copy=True)
    assert type(c) is Toy
    assert address(c) != address(x)
    assert rlx.explain(x, "toys").target == "toys"


@pytest.mark.torch
@pytest.mark.jax
def test_a_registered_framework_meets_the_others():
    register_backend("toys", ToyBackend, packages=ToyBackend.packages)
    for other in ("torch", "jax"):
        x = rlx.exchange(aligned(16), other)
        for _ in range(2):
            y = rlx.exchange(x, "toys", copy=False)
            assert type(y) is Toy
            assert address(y) == address(x)
        for _ in range(2):
            assert address(rlx.exchange(aligned(16).view(Toy), other)) % 64 == 0


def test_registering_takes_the_place_of_a_backend_and_unregistering_gives_it_back(fresh):
    class Better(NumpyBackend):
        pass

    ours = fresh.get("numpy")
    fresh.register("numpy", Better, packages=("numpy",), kinds=("cpu",))
    assert type(fresh.get("numpy")) is Better
    assert fresh.for_kind("cpu") is fresh.get("numpy")
    assert fresh.for_array(np.zeros(3)) is fresh.get("numpy")
    fresh.unregister("numpy")
    assert type(fresh.get("numpy")) is type(ours)
    assert fresh.for_kind("cpu") is fresh.for_array(np.zeros(3)) is fresh.get("numpy")


def test_unregistering_leaves_the_others_alone(fresh):
    fresh.register("kite", Kite, packages=("kites",), kinds=("fpga", "cuda"))
    fresh.register("other", Kite, packages=("others",), kinds=("vulkan",))
    kept, numpy = fresh.get("other"), fresh.get("numpy")
    fresh.unregister("kite")
    assert fresh.get("other") is fresh.for_kind("vulkan") is kept
    assert fresh.get("numpy") is numpy
    assert fresh.for_kind("fpga") is None
    assert fresh._kinds["cuda"] == "torch"
    with pytest.raises(rlx.UnknownFrameworkError):
        fresh.get("kite")


def test_unregistering_what_is_not_there_changes_nothing(fresh):
    numpy = fresh.get("numpy")
    fresh.unregister("nobody")
    assert fresh.get("numpy") is numpy


def test_a_fast_lane_does_not_outlive_its_backend():
    x = aligned(16).view(Toy)
    register_backend("toys", ToyBackend, packages=ToyBackend.packages)
    y = rlx.exchange(x, "numpy")
    assert type(y) is np.ndarray
    registry.unregister("toys")
    assert rlx.exchange(x, "numpy") is x, "a Toy is an array of NumPy again"


def test_reset_forgets_everything(fresh):
    fresh.register("kite", Kite, kinds=("fpga",))
    fresh.get("kite")
    fresh.reset()
    assert fresh.loaded == {}
    assert fresh.for_kind("fpga") is None


# --- entry points --------------------------------------------------------------------------------


def test_a_backend_is_found_by_its_entry_point(fresh, entry_points):
    entry_points.points = [Point("kite", lambda: Kite)]
    backend = fresh.get("kite")
    assert type(backend) is Kite
    assert fresh.for_kind("fpga") is backend
    assert "kite" in fresh.names()
    assert entry_points.reads == 1


def test_a_backend_is_found_by_the_kind_it_serves(fresh, entry_points):
    entry_points.points = [Point("kite", lambda: Kite)]
    assert type(fresh.for_kind("fpga")) is Kite


def test_entry_points_take_nobodys_place(fresh, entry_points):
    class Greedy(Kite):
        packages = ("numpy", "kites")
        kinds = ("cpu", "cuda", "fpga")

    entry_points.points = [
        Point("numpy", lambda: pytest.fail("ours are not loaded from there")),
        Point("greedy", lambda: Greedy),
        Point("kite", lambda: Kite),
    ]
    assert type(fresh.get("greedy")) is Greedy
    assert fresh.for_kind("cpu").name == "numpy"
    assert fresh._kinds["cuda"] == "torch"
    assert fresh.for_kind("fpga") is fresh.get("greedy")
    assert fresh.for_array(np.zeros(3)).name == "numpy"


def test_a_registered_name_wins_over_an_entry_point(fresh, entry_points):
    class Mine(Kite):
        pass

    entry_points.points = [Point("kite", lambda: Kite)]
    fresh.register("kite", Mine)
    with pytest.raises(rlx.UnknownFrameworkError):
        fresh.get("unknown")
    assert type(fresh.get("kite")) is Mine


def test_an_entry_point_may_be_a_plain_function(fresh, entry_points):
    entry_points.points = [Point("kite", lambda: lambda: Kite())]
    assert type(fresh.get("kite")) is Kite


@pytest.mark.parametrize(
    "error", [ImportError("no wings"), AttributeError("no wings"), RuntimeError("no wings")]
)
def test_a_broken_entry_point_fails_alone(fresh, entry_points, error):
    def load():
        raise error

    entry_points.points = [Point("broken", load), Point("kite", lambda: Kite)]
    with pytest.raises(rlx.UnknownFrameworkError):
        fresh.get("mystery")
    assert type(fresh.get("kite")) is Kite
    assert fresh.for_kind("vulkan") is None
    for _ in range(2):
        with pytest.raises(rlx.DeviceUnavailableError) as caught:
            fresh.get("broken")
        text = str(caught.value)
        assert "'broken'" in text
        assert "somewhere:broken" in text
        assert "no wings" in text
        assert "uninstall broken-package" in text
        assert caught.value.__cause__ is error


def test_a_broken_entry_point_does_not_hide_the_devices(entry_points, monkeypatch):
    def load():
        raise ImportError("no wings")

    monkeypatch.setattr(registry, "_entry_points_read", False)
    entry_points.points = [Point("broken", load)]
    assert rlx.available_devices()[0] == rlx.Device("cpu")
    assert not rlx.Device("vulkan").is_available()


# --- broken backends -----------------------------------------------------------------------------


def test_a_backend_whose_import_fails_is_unavailable(fresh):
    def factory():
        raise ImportError("libkite.so: no such file")

    fresh.register("kite", factory, kinds=("fpga",))
    for ask in (lambda: fresh.get("kite"), lambda: fresh.for_kind("fpga")):
        with pytest.raises(rlx.DeviceUnavailableError) as caught:
            ask()
        assert "'kite'" in str(caught.value)
        assert "libkite.so" in str(caught.value)
        assert "unregister" in str(caught.value)
        assert isinstance(caught.value.__cause__, ImportError)
    assert "kite" not in fresh.loaded


def test_a_backend_whose_import_fails_is_left_out_of_the_devices():
    def factory():
        raise ImportError("libkite.so: no such file")

    register_backend("kite", factory, kinds=("fpga",))
    assert rlx.Device("cpu") in rlx.available_devices()
    assert not rlx.Device("fpga").is_available()
    with pytest.raises(rlx.DeviceUnavailableError, match="libkite"):
        _ = rlx.Device("fpga").backend


def test_a_backend_may_come_right_later(fresh):
    errors = [ImportError("not yet")]

    def factory():
        if errors:
            raise errors.pop()
        return Kite()

    fresh.register("kite", factory)
    with pytest.raises(rlx.DeviceUnavailableError, match="not yet"):
        fresh.get("kite")
    assert type(fresh.get("kite")) is Kite


def test_other_errors_of_a_factory_are_not_dressed_up(fresh):
    def factory():
        raise ZeroDivisionError

    fresh.register("kite", factory)
    with pytest.raises(ZeroDivisionError):
        fresh.get("kite")


def test_a_missing_framework_names_its_extra():
    must_run(
        """
import sys
sys.modules["torch"] = None  # importing it raises ImportError
import rlx_driver as rlx
from rlx_driver.registry import registry
try:
    registry.get("torch")
except rlx.DeviceUnavailableError as error:
    assert "pip install 'rlx-driver[torch]'" in str(error)
else:
    raise AssertionError("it did not raise")
"""
    )
