"""What the tests of order share: a place where streams can be held, and memory without a driver."""

from __future__ import annotations

import contextlib
import types
from dataclasses import dataclass

import numpy as np

import rlx_driver as rlx
from rlx_driver.registry import registry
from rlx_driver.testing import FakeDevice, FakeStream

NATIVE = "fake"
FUNCTIONAL = "fake_functional"


@dataclass
class Place:
    """A fake device, the stream that is current on it, and another one."""

    fake: FakeDevice
    way: str
    spelling: str
    here: FakeStream
    side: FakeStream

    @property
    def compute(self):
        return self.fake.stream("compute")

    @property
    def copies(self):
        return self.fake.stream("copies")

    def buffer(self, values):
        """A Buffer of these values, with nothing pending."""
        made = rlx.Buffer.zeros(np.shape(values), "f32", self.fake.device)
        made.copy_from(np.asarray(values, np.float32))
        return made if self.spelling == "array" else Methods(made)

    def raw(self, values):
        """The same memory, with arrays of both frameworks that nobody orders."""
        return Raw(self.fake, self.fake.array(np.asarray(values, np.float32)))

    def copied(self, array):
        """A program of the functional framework that reads an array."""
        return self.fake.jit(np.copy)(array)


class Methods:
    """A Buffer by `torch()` and `jax()`, whose fast returns have no other way to be reached.

    The fake frameworks have the names of torch and JAX then; see the fixture `place`.
    """

    def __init__(self, buffer):
        self.wrapped = buffer

    def array(self, framework):
        return self.wrapped.torch() if framework == NATIVE else self.wrapped.jax()

    def write(self, framework):
        return self.wrapped.write("torch")

    def read(self, framework):
        return self.wrapped.read("torch" if framework == NATIVE else "jax")

    def update(self, step, *args, framework, **options):
        name = "torch" if framework == NATIVE else "jax"
        return self.wrapped.update(step, *args, framework=name, **options)

    def copy_from(self, other):
        self.wrapped.copy_from(getattr(other, "wrapped", other))

    def __getitem__(self, key):
        return Methods(self.wrapped[key])

    def __setitem__(self, key, value):
        self.wrapped[key] = value

    def __getattr__(self, name):
        return getattr(self.wrapped, name)


class Raw:
    """What a Buffer is without the driver: one memory, two arrays, no order between them."""

    def __init__(self, fake, native):
        self.fake, self.native = fake, native
        self.functional = _backend(fake, "lease")(native, None)

    def array(self, framework):
        return self.native if framework == NATIVE else self.functional

    @contextlib.contextmanager
    def write(self, framework):
        yield self.native

    @contextlib.contextmanager
    def read(self, framework):
        yield self.array(framework)

    def update(self, step, *args, framework, ordered=True):
        if framework == NATIVE:
            step(self.native, *args)
            return
        args = [arg.functional if isinstance(arg, Raw) else arg for arg in args]
        self.functional = self.fake.jit(step, donate_argnums=[0])(self.functional, *args)

    def copy_from(self, other):
        self.native.copy_(other.native if isinstance(other, Raw) else np.asarray(other))

    def to_host(self):
        with self.fake.stream("raw copies to the host"):
            values = self.native.read()
        return types.SimpleNamespace(numpy=lambda: values)

    def __getitem__(self, key):
        return Raw(self.fake, self.native[key])

    def __setitem__(self, key, value):
        self.native[key] = value


def _backend(fake, method):
    names = [name for name in registry.loaded if hasattr(registry.loaded[name], method)]
    backends = [registry.get(name) for name in (FUNCTIONAL, "jax", *names)]
    return next(getattr(b, method) for b in backends if fake.device in b.devices("fpga"))
