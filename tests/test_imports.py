"""What importing the package costs, and that NumPy alone is enough for the rest of it."""

from __future__ import annotations

import sys

import pytest

from support import must_run

HIDE = """
import sys

class Hidden:
    '''Makes the frameworks look as if they were not installed.'''

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "jax", "jaxlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def test_importing_loads_no_framework():
    loaded = must_run(
        """
import sys
import rlx_driver as rlx
rlx.Device("cuda:0"), rlx.Device.kinds(), rlx.dtype("bf16"), rlx.ledger.snapshot()
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "jax", "jaxlib"}))
"""
    )
    assert loaded.strip() == "[]"


def test_what_not_every_program_uses_is_loaded_when_it_is_asked_for():
    loaded = must_run(
        """
import sys
import rlx_driver as rlx
subjects = ("interval", "plan", "arena", "session", "live_ranges", "typed_io", "_memory_report")
there = lambda: [name for name in subjects if f"rlx_driver.{name}" in sys.modules]
print(there(), set(rlx.__all__) <= set(dir(rlx)))
rlx.plan_memory
print(there(), rlx.plan_memory is rlx.plan_memory)
assert all(getattr(rlx, name) is not None for name in rlx.__all__)
print(there() == list(subjects))
try:
    rlx.banana
except AttributeError as error:
    print(error)
"""
    )
    assert loaded.splitlines() == [
        "[] True",
        "['interval', 'plan'] True",
        "True",
        "module 'rlx_driver' has no attribute 'banana'",
    ]


def test_work_in_numpy_loads_no_framework():
    loaded = must_run(
        """
import sys
import numpy as np
import rlx_driver as rlx
x = np.zeros(16, np.float32)
assert rlx.exchange(x, "numpy") is x
assert rlx.explain(x, "numpy") and rlx.Device.of(x) == rlx.Device("cpu")
b = rlx.Buffer.zeros((4, 4), "bf16")
b.numpy()[0] = 1
with b.write("numpy") as view:
    view[1] = 2
b.update(lambda x: x * 2, framework="numpy")
rlx.Device("cpu").memory(), rlx.command_stream().wait()
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "jax", "jaxlib"}))
"""
    )
    assert loaded.strip() == "[]"


@pytest.mark.torch
@pytest.mark.jax
@pytest.mark.parametrize(("asked", "other"), [("torch", "jax"), ("jax", "torch")])
def test_asking_for_one_framework_loads_that_one_alone(asked, other):
    loaded = must_run(
        f"""
import sys
import numpy as np
import rlx_driver as rlx
rlx.exchange(np.zeros(16, np.float32), {asked!r})
print([name in sys.modules for name in ({asked!r}, {other!r})])
"""
    )
    assert loaded.strip() == "[True, False]"


def test_without_the_frameworks_numpy_does_everything():
    must_run(
        HIDE
        + """
import numpy as np
import rlx_driver as rlx

x = np.arange(6.0)
assert rlx.exchange(x, "numpy") is x
assert rlx.exchange(x, "numpy", copy=True).tolist() == x.tolist()
b = rlx.Buffer.from_array(x, copy=False)
b.numpy()[0] = 7
assert x[0] == 7
b.update(lambda x: x + 1, framework="numpy")
assert x[0] == 8 and b.epoch == 1
b[1:3] = 0
assert x.tolist() == [8, 0, 0, 4, 5, 6]
h = rlx.BufferHandle("kv", (2, 3), "bf16")
with h.write("numpy") as view:
    view[...] = 3
assert h.numpy().astype("f4").sum() == 18
h.close()
assert np.asarray(b) is not None and np.from_dlpack(b).tolist() == x.tolist()
assert rlx.available_devices() == [rlx.Device("cpu")]
assert rlx.Device("cpu").is_available() and not rlx.Device("cuda").is_available()
assert rlx.Device("cpu").memory().total > 0
stream = rlx.command_stream("cpu")
assert stream.launch(lambda: 5) == 5
stream.wait()
assert rlx.dtype("bf16").itemsize == 2
assert not {"torch", "jax"} & set(sys.modules)
"""
    )


def test_without_a_framework_its_name_raises_with_the_remedy():
    must_run(
        HIDE
        + """
import numpy as np
import rlx_driver as rlx

x = np.arange(6.0)
b = rlx.Buffer.from_array(x, copy=False)

def refused(framework, call, *args):
    try:
        call(*args)
    except rlx.DeviceUnavailableError as error:
        assert isinstance(error, RuntimeError)
        assert framework in str(error) and f"rlx-driver[{framework}]" in str(error), error
        assert isinstance(error.__cause__, ImportError)
    else:
        raise AssertionError(f"{call} did not raise")

for framework in ("torch", "jax"):
    for copy in (False, None, True):
        refused(framework, lambda: rlx.exchange(x, framework, copy=copy))
    refused(framework, rlx.explain, x, framework)
    refused(framework, getattr(b, framework))
    refused(framework, b.array, framework)
    refused(framework, lambda: b.read(framework).__enter__())
refused("torch", lambda: b.write("torch").__enter__())
refused("torch", rlx.command_stream, "cuda")
refused("torch", lambda: rlx.Device("cuda").backend)
refused("torch", lambda: rlx.Device("metal").xp)
refused("torch", rlx.Buffer.zeros, 3, "f32", "cuda:0")
refused("torch", rlx.TorchStream)
refused("jax", rlx.JaxStream)
refused("jax", lambda: rlx.Device("tpu").memory())
assert rlx.exchange(x, "numpy") is x and b.epoch == 0 and x.tolist() == [0, 1, 2, 3, 4, 5]
with b.write("numpy") as view:
    view[0] = 1
assert rlx.ledger.copies == 0
"""
    )


def test_a_default_update_without_jax_raises_with_the_remedy():
    must_run(
        HIDE
        + """
import rlx_driver as rlx
b = rlx.Buffer.zeros(3)
try:
    b.update(lambda x: x + 1)
except rlx.DeviceUnavailableError as error:
    assert "rlx-driver[jax]" in str(error)
else:
    raise AssertionError("it did not raise")
assert b.numpy().tolist() == [0, 0, 0] and b.epoch == 0
b.update(lambda x: x + 1, framework="numpy")
assert b.numpy().tolist() == [1, 1, 1]
"""
    )


def test_dtypes_of_a_missing_framework_say_so():
    must_run(
        HIDE
        + """
import rlx_driver as rlx
from rlx_driver import dtypes
for framework, give in (("torch", dtypes.torch_dtype), ("jax", dtypes.jax_dtype)):
    try:
        give("bf16")
    except rlx.DTypeError as error:
        assert f"rlx-driver[{framework}]" in str(error)
    else:
        raise AssertionError("it did not raise")
"""
    )


@pytest.mark.torch
@pytest.mark.jax
def test_a_framework_that_breaks_while_it_is_imported_is_unavailable():
    must_run(
        """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")  # a half-installed one
import numpy as np
import rlx_driver as rlx
try:
    rlx.exchange(np.zeros(3), "torch")
except rlx.DeviceUnavailableError as error:
    assert "torch" in str(error)
else:
    raise AssertionError("it did not raise")
assert rlx.exchange(np.zeros(16, "f4"), "jax").shape == (16,)
"""
    )


def test_every_public_name_is_there_and_documented():
    import rlx_driver

    assert len(set(rlx_driver.__all__)) == len(rlx_driver.__all__)
    for name in rlx_driver.__all__:
        thing = getattr(rlx_driver, name)
        assert thing.__doc__, name
    assert all(name in dir(rlx_driver) for name in rlx_driver.__all__)
    assert "rlx_driver" in sys.modules
