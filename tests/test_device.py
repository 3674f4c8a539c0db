"""Devices: values that name a place, and what happens when the place is not there."""

from __future__ import annotations

import copy
import pickle
import types

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver import Device, MemoryInfo
from rlx_driver.backends.numpy import NumpyBackend
from rlx_driver.registry import registry
from support import Exporter, aligned, frameworks, make

KINDS = [
    "cpu",
    "metal",
    "mlx",
    "ane",
    "cuda",
    "rocm",
    "tpu",
    "gpu",
    "vulkan",
    "opengl",
    "directx",
    "webgpu",
    "fpga",
]
BUILT_IN = {"cpu", "cuda", "rocm", "metal", "tpu"}


# --- values --------------------------------------------------------------------------------------


def test_the_kinds_are_those_of_the_rlx_driver():
    assert list(Device.kinds()) == KINDS
    assert len(KINDS) == 13


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_valid_device(kind):
    device = Device(kind)
    assert (device.kind, device.index) == (kind, 0)
    assert device.name
    assert device.is_host is (kind == "cpu")
    assert Device(kind, 3).index == Device(f"{kind}:3").index == 3


@pytest.mark.parametrize(
    ("spec", "kind", "index"),
    [
        ("cpu", "cpu", 0),
        ("cpu:0", "cpu", 0),
        ("CUDA:2", "cuda", 2),
        (" cuda:1 ", "cuda", 1),
        ("mps", "metal", 0),
        ("mps:1", "metal", 1),
        ("host", "cpu", 0),
        ("wgpu", "gpu", 0),
        ("tpu:15", "tpu", 15),
    ],
)
def test_spellings(spec, kind, index):
    assert (Device(spec).kind, Device(spec).index) == (kind, index)


def test_an_alias_is_the_same_device():
    assert Device("mps") == Device("metal")
    assert hash(Device("mps")) == hash(Device("metal"))
    assert str(Device("mps:1")) == "metal:1"


def test_a_device_makes_itself():
    device = Device("cuda", 1)
    assert Device(device) == device
    assert Device(device, 1) == device


@pytest.mark.parametrize("index", [0, 1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_text_round_trips(kind, index):
    device = Device(kind, index)
    assert Device(str(device)) == device
    assert eval(repr(device)) == device


def test_the_host_is_spelt_without_an_index():
    assert str(Device("cpu")) == "cpu"
    assert str(Device("cuda")) == "cuda:0"


def test_equality_and_hash():
    assert Device("cuda") == Device("cuda:0") == Device("cuda", 0)
    assert Device("cuda") != Device("cuda:1")
    assert Device("cuda") != Device("rocm")
    assert Device("cuda") != "cuda"
    assert len({Device("cuda"), Device("cuda:0"), Device("cuda:1"), Device("cpu")}) == 3


def test_names_are_for_people():
    assert Device("cuda").name == "CUDA"
    assert Device("ane").name == "Apple Neural Engine"
    assert Device("cuda:1").name == "CUDA"
    assert len({Device(kind).name for kind in KINDS}) == 13


@pytest.mark.parametrize("change", ["kind", "index", "_kind", "_index", "anything"])
def test_a_device_cannot_be_changed(change):
    device = Device("cuda:1")
    with pytest.raises(AttributeError):
        setattr(device, change, 2)
    with pytest.raises(AttributeError):
        delattr(device, change)
    assert device == Device("cuda:1")


@pytest.mark.parametrize("device", [Device("cpu"), Device("cuda:3"), Device("fpga")])
def test_a_device_pickles_and_copies(device):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(device, protocol)) == device
    assert copy.copy(device) == copy.deepcopy(device) == device


def test_integers_of_numpy_are_indices():
    assert str(Device("cuda", np.int64(2))) == "cuda:2"
    assert str(Device("cuda", True)) == "cuda:1"


@pytest.mark.parametrize(
    "spec", ["", "cuda:", "cuda:-1", "cuda:x", "cuda 0", "cuda:0:1", ":0", "0", "cuda,0"]
)
def test_what_is_no_spelling_is_refused(spec):
    with pytest.raises(rlx.DeviceUnavailableError, match="spell it as a kind"):
        Device(spec)


@pytest.mark.parametrize("spec", [None, 5, 1.5, object(), ["cuda"], b"cuda"])
def test_what_is_no_device_is_refused(spec):
    with pytest.raises(rlx.DeviceUnavailableError, match="names no device"):
        Device(spec)


@pytest.mark.parametrize("spec", ["npu", "xpu:0", "gpux"])
def test_an_unknown_kind_is_refused_and_the_known_ones_named(spec):
    with pytest.raises(rlx.DeviceUnavailableError) as caught:
        Device(spec)
    assert all(kind in str(caught.value) for kind in KINDS)
    assert spec in str(caught.value)


@pytest.mark.parametrize("index", [-1, 1.5, "1", np.float32(1), [0]])
def test_what_is_no_index_is_refused(index):
    with pytest.raises(rlx.DeviceUnavailableError, match="index"):
        Device("cuda", index)


def test_two_different_indices_are_refused():
    assert Device("cuda:1", 1) == Device("cuda:1")
    with pytest.raises(rlx.DeviceUnavailableError, match="give one"):
        Device("cuda:1", 2)


# --- DLPack --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "number"),
    [("cpu", 1), ("cuda", 2), ("metal", 8), ("rocm", 10), ("vulkan", 7), ("webgpu", 15)],
)
def test_the_dlpack_pair(kind, number):
    assert Device(kind, 2).dlpack_device == (number, 2)


@pytest.mark.parametrize("kind", ["ane", "tpu", "opengl", "directx", "fpga"])
def test_a_kind_that_dlpack_does_not_know_has_no_pair(kind):
    with pytest.raises(rlx.DeviceUnavailableError, match=f"no device type for {kind}:0"):
        _ = Device(kind).dlpack_device


@pytest.mark.parametrize(
    ("pair", "device"),
    [
        ((1, 0), "cpu"),
        ((1, 3), "cpu:3"),
        ((2, 1), "cuda:1"),
        ((3, 1), "cpu"),  # pinned memory carries the index of its GPU
        ((11, 1), "cpu"),
        ((8, 0), "metal"),
        ((10, 1), "rocm:1"),
        ((13, 0), "cuda"),
    ],
)
def test_a_pair_names_a_device(pair, device):
    assert Device.from_dlpack(*pair) == Device(device)


def test_a_pair_of_no_known_type_is_refused():
    with pytest.raises(rlx.UnknownFrameworkError, match="99"):
        Device.from_dlpack(99, 0)


# --- where arrays live ---------------------------------------------------------------------------


@pytest.mark.parametrize("framework", frameworks())
def test_arrays_on_the_host(framework):
    assert Device.of(make(framework)) == Device("cpu")


def test_buffers_tell_their_own():
    assert Device.of(rlx.Buffer.zeros(3)) == Device("cpu")
    with rlx.BufferHandle("kv", (3,), "f32") as handle:
        assert Device.of(handle) == Device("cpu")


def test_foreign_exporters_are_asked_and_not_consumed():
    foreign = Exporter(aligned(4))
    assert Device.of(foreign) == Device("cpu")
    assert foreign.calls == 0


class Somewhere:
    def __init__(self, pair):
        self.pair = pair

    def __dlpack_device__(self):
        if isinstance(self.pair, Exception):
            raise self.pair
        return self.pair


def test_foreign_exporters_may_be_anywhere():
    assert Device.of(Somewhere((2, 1))) == Device("cuda:1")
    assert Device.of(Somewhere((np.int32(1), 0))) == Device("cpu")


@pytest.mark.parametrize(
    "pair",
    [(99, 0), (1,), (1, 0, 0), (), None, 5, "cpu", ("a", "b"), (1, -1), KeyError("x"), OSError()],
    ids=repr,
)
def test_exporters_that_name_no_device_are_refused(pair):
    with pytest.raises(rlx.UnknownFrameworkError, match=r"Somewhere|DLPack device type"):
        Device.of(Somewhere(pair))


@pytest.mark.parametrize("x", [[1.0], 5, None, "cpu", np.float32(1), object()])
def test_what_is_no_array_lives_nowhere(x):
    with pytest.raises(rlx.UnknownFrameworkError, match=type(x).__name__):
        Device.of(x)


@pytest.mark.torch
def test_devices_of_torch():
    import torch

    assert Device(torch.device("cpu")) == Device("cpu")
    assert Device(torch.device("cuda")) == Device("cuda:0")
    assert Device(torch.device("cuda", 3)) == Device("cuda:3")
    assert Device(torch.device("mps")) == Device("metal")
    with pytest.raises(rlx.DeviceUnavailableError, match="meta"):
        Device(torch.device("meta"))
    with pytest.raises(rlx.UnknownFrameworkError, match="meta"):
        Device.of(torch.empty(3, device="meta"))


@pytest.mark.torch
@pytest.mark.cuda
def test_tensors_on_a_gpu():
    import torch

    x = torch.zeros(3, device="cuda")
    assert Device.of(x) == Device(x.device) == Device("cuda:0")


@pytest.mark.jax
def test_devices_of_jax():
    import jax

    assert Device(jax.devices("cpu")[0]) == Device("cpu")
    fake = types.SimpleNamespace(platform="gpu", local_hardware_id=1)
    assert Device(fake) == Device("cuda:1")
    fake = types.SimpleNamespace(platform="tpu", local_hardware_id=None)
    assert Device(fake) == Device("tpu:0")


@pytest.mark.jax
def test_traced_values_live_nowhere():
    import jax

    def look(x):
        with pytest.raises(rlx.UnknownFrameworkError, match="traced"):
            Device.of(x)
        return x

    jax.jit(look)(1.0)


# --- use -----------------------------------------------------------------------------------------


def test_the_host_is_always_there():
    host = Device("cpu")
    assert host.is_available()
    assert host.backend is registry.get("numpy")
    assert host.xp.asarray([1.0]).dtype == np.float64
    assert rlx.available_devices()[0] == host
    assert not Device("cpu:7").is_available()


def test_available_devices_are_available():
    devices = rlx.available_devices()
    assert len(set(devices)) == len(devices)
    for device in devices:
        assert device.is_available()
        assert device.backend.devices(device.kind)


def test_memory_of_the_host_in_bytes():
    memory = Device("cpu").memory()
    assert isinstance(memory, MemoryInfo)
    assert 0 < memory.free <= memory.total
    assert memory.total > 1 << 20


def test_memory_counts_what_the_driver_holds():
    before = Device("cpu").memory().in_use
    b = rlx.Buffer.zeros((1000,), "f32")
    assert Device("cpu").memory().in_use == before + 4000
    view = b.numpy()
    del b
    assert Device("cpu").memory().in_use == before + 4000, "the view still holds it"
    del view
    assert Device("cpu").memory().in_use == before


USES = {
    "backend": lambda device: device.backend,
    "xp": lambda device: device.xp,
    "memory": lambda device: device.memory(),
    "buffer": lambda device: rlx.Buffer.zeros(3, "f32", device),
    "stream": rlx.command_stream,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - BUILT_IN))
def test_a_kind_without_a_backend_says_what_is_missing_and_how_to_add_it(kind, use):
    device = Device(kind)
    assert not device.is_available()
    with pytest.raises(rlx.DeviceUnavailableError) as caught:
        use(device)
    assert f"{kind}:0 has no backend here" in str(caught.value)
    assert f"rlx_driver.register_backend(name, factory, kinds=({kind!r},))" in str(caught.value)


@pytest.mark.torch
@pytest.mark.jax
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("kind", ["cuda", "rocm", "metal", "tpu"])
def test_a_device_that_is_not_on_this_machine_says_so(kind, use):
    device = Device(kind, 9)
    assert not device.is_available()
    with pytest.raises(rlx.DeviceUnavailableError) as caught:
        use(device)
    assert f"{kind}:9 is not on this machine" in str(caught.value)
    assert "install rlx-driver[" in str(caught.value)


# --- a backend of a third party ------------------------------------------------------------------


class Tile(np.ndarray):
    """The arrays of a made-up accelerator."""


class TileBackend(NumpyBackend):
    """Host memory that calls itself an FPGA."""

    name = "tiles"
    packages = ("test_device",)
    kinds = ("fpga",)
    made = 0

    def __init__(self):
        type(self).made += 1

    def devices(self, kind):
        return [Device("fpga", i) for i in range(2)] if kind == "fpga" else []

    def device_of(self, array):
        return Device("fpga", 1)

    def owns(self, obj):
        return isinstance(obj, Tile)

    def allocate(self, device, nbytes):
        return np.zeros(nbytes, np.uint8).view(Tile)

    def memory(self, device):
        return MemoryInfo(1024, 512, 0)

    def namespace(self):
        return types.ModuleType("tiles_xp")


@pytest.fixture
def tiles():
    TileBackend.made = 0
    rlx.register_backend(
        "tiles", TileBackend, packages=TileBackend.packages, kinds=TileBackend.kinds
    )
    return registry


def test_a_registered_backend_serves_its_kind(tiles):
    device = Device("fpga:1")
    assert TileBackend.made == 0, "it is made on first use"
    assert device.is_available()
    assert not Device("fpga:2").is_available()
    assert device.backend.name == "tiles"
    assert device.memory() == MemoryInfo(1024, 512, 0)
    assert device.xp.__name__ == "tiles_xp"
    assert [d for d in rlx.available_devices() if d.kind == "fpga"] == [Device("fpga"), device]
    assert isinstance(device.backend.allocate(device, 16), Tile)
    assert TileBackend.made == 1


def test_a_registered_backend_owns_its_arrays(tiles):
    assert Device.of(np.zeros(3).view(Tile)) == Device("fpga:1")
    assert Device.of(np.zeros(3)) == Device("cpu")


def test_a_backend_taken_out_leaves_the_kind_without_one(tiles):
    assert Device("fpga").is_available()
    registry.unregister("tiles")
    with pytest.raises(rlx.DeviceUnavailableError, match="has no backend here"):
        _ = Device("fpga").backend


def test_a_test_that_registers_a_backend_leaves_nothing_behind():
    assert not Device("fpga").is_available()
