"""The promises of order, on a fake device whose streams are held: work runs as late as it may.

Each scenario is run twice. Once by a Buffer, which has to give the right values; and once, as a
control, by `Raw`: the same memory and the same operations without the driver, which has to give
wrong ones, for otherwise the scenario would prove nothing.

Where the streams are shared, or wait for events, a host wait for held work raises, so that a test
which passes shows that the host did not wait.
"""

from __future__ import annotations

import contextlib
import gc
import random
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver.registry import registry
from rlx_driver.testing import FakeDevice, FakeStream, HangError
from rlx_driver.testing._functional import FakeFunctionalBackend
from rlx_driver.testing._native import FakeArray, FakeBackend
from support import gone

NATIVE = "fake"
FUNCTIONAL = "fake_functional"


def plus(x, n=1):
    return x + n


def times(x, n=2):
    return x * n


def plus_one(x):
    return x + 1


def plus_two(x):
    return x + 2


def five_times(view):
    view.mul_(5)


def wrong_shape(x):
    return x[:1]


# --- a Buffer, and the same without a driver -----------------------------------------------------


@dataclass
class Place:
    """A fake device, the stream that is current on it, and another one."""

    fake: FakeDevice
    way: str
    here: FakeStream
    side: FakeStream
    methods: bool  # whether arrays are taken by `torch()` and `jax()`, which have fast returns

    @property
    def compute(self):
        return self.fake.stream("compute")

    @property
    def copies(self):
        return self.fake.stream("copies")

    @property
    def third(self):
        return self.fake.stream("third")

    def buffer(self, values):
        """A Buffer of these values, with nothing pending."""
        made = rlx.Buffer.zeros(np.shape(values), "f32", self.fake.device)
        made.copy_from(np.asarray(values, np.float32))
        return Methods(made) if self.methods else made

    def raw(self, values):
        """The same memory, with arrays of both frameworks that nobody orders."""
        return Raw(self, self.fake.array(np.asarray(values, np.float32)))

    def raw_read(self, array):
        """The values that a stream of its own sees."""
        with self.fake.stream("raw"):
            return array.read()

    def copied(self, array):
        """A program of the functional framework that reads an array."""
        return self.fake.jit(np.copy)(array)


class Methods:
    """A Buffer by its methods `torch` and `jax`, where the fake frameworks have these names."""

    def __init__(self, buffer):
        self.buffer = buffer

    def array(self, framework):
        return self.buffer.torch() if framework == NATIVE else self.buffer.jax()

    def write(self, framework):
        return self.buffer.write(_builtin(framework))

    def read(self, framework):
        return self.buffer.read(_builtin(framework))

    def update(self, step, *args, framework, **options):
        args = [arg.buffer if isinstance(arg, Methods) else arg for arg in args]
        return self.buffer.update(step, *args, framework=_builtin(framework), **options)

    def copy_from(self, other):
        self.buffer.copy_from(other.buffer if isinstance(other, Methods) else other)

    def to_host(self):
        return self.buffer.to_host()

    def __getitem__(self, key):
        return Methods(self.buffer[key])

    def __setitem__(self, key, value):
        self.buffer[key] = value


def _builtin(framework):
    return {NATIVE: "torch", FUNCTIONAL: "jax"}[framework]


class Raw:
    """One memory and an array of each framework over it, with no order between them."""

    def __init__(self, place, native):
        self.place, self.native = place, native
        backend = registry.get(_builtin(FUNCTIONAL) if place.methods else FUNCTIONAL)
        self.functional = backend.lease(native, None)

    def array(self, framework):
        return self.native if framework == NATIVE else self.functional

    @contextlib.contextmanager
    def write(self, framework):
        yield self.native

    @contextlib.contextmanager
    def read(self, framework):
        yield self.array(framework)

    def update(self, step, *args, framework, ordered=True):
        args = [arg.array(framework) if isinstance(arg, Raw) else arg for arg in args]
        if framework == NATIVE:
            step(self.native, *args)
        else:
            program = self.place.fake.jit(step, donate_argnums=[0])
            self.functional = program(self.functional, *args)

    def copy_from(self, other):
        self.native.copy_(other.native if isinstance(other, Raw) else other)

    def to_host(self):
        values = self.place.raw_read(self.native)
        return types.SimpleNamespace(numpy=lambda: values)

    def __getitem__(self, key):
        return Raw(self.place, self.native[key])

    def __setitem__(self, key, value):
        self.native[key] = value


WAYS = {"shared": "compute", "events": "default", "host": "default"}


@pytest.fixture(params=[False, True], ids=["array", "methods"])
def methods(request, monkeypatch):
    """Whether the fake frameworks stand in for torch and JAX by name."""
    if request.param:
        monkeypatch.setattr(FakeBackend, "name", "torch")
        monkeypatch.setattr(FakeFunctionalBackend, "name", "jax")
        monkeypatch.setattr(FakeArray, "requires_grad", False, raising=False)
    return request.param


@pytest.fixture(params=WAYS)
def place(request, methods):
    yield from make_place(request.param, methods)


@pytest.fixture
def shared(methods):
    yield from make_place("shared", methods)


@pytest.fixture
def events(methods):
    yield from make_place("events", methods)


def make_place(way, methods):
    """In the shared way the current stream is the compute stream, as in ``with stream:``."""
    on_host_wait = "release" if way == "host" else "raise"
    with FakeDevice(order=way, on_host_wait=on_host_wait) as fake, fake.stream(WAYS[way]) as here:
        yield Place(fake, way, here, fake.stream("side"), methods)


def check(place, scenario, expected, *, host_waits=None, control=True):
    """Run a scenario by a Buffer and as a control; tell whether the host waited, and for what."""
    found = _run(place, scenario, place.buffer)
    waits = place.fake.host_waits.copy()
    assert found == expected
    if place.way != "host":
        assert not waits
    elif host_waits is not None:
        assert bool(waits) is host_waits, waits
    if control:
        without = _run(place, scenario, place.raw)
        assert without != expected, "right without the driver too, so this proves nothing"


def _run(place, scenario, make):
    place.fake.log.clear()
    found = scenario(place, make)
    values = found if isinstance(found, tuple) else (found,)
    place.fake.release()
    with place.here:
        seen = [value.read() if hasattr(value, "read") else value for value in values]
    return [np.asarray(value).ravel().tolist() for value in seen]


# --- an update by the functional framework -------------------------------------------------------


def update_then_view(place, make, ordered=True):
    b = make([0, 0])
    place.compute.hold()
    b.update(plus_one, framework=FUNCTIONAL, ordered=ordered)
    with place.side:
        return b.array(NATIVE).clone()


def test_an_update_is_seen_by_a_view_on_another_stream(place):
    check(place, update_then_view, [[1, 1]], host_waits=True)


def test_an_update_without_order_is_seen_by_the_next_view(place):
    def scenario(place, make):
        b = make([0, 0])
        b.array(NATIVE)
        place.compute.hold()
        b.update(plus_one, framework=FUNCTIONAL, ordered=False)
        assert "plus_one" not in str(place.fake.host_waits)
        with place.side:
            return b.array(NATIVE).clone()

    check(place, scenario, [[1, 1]], host_waits=True)


def test_an_update_is_seen_through_a_view_that_was_out(place):
    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        views = [b.array(NATIVE), c.array(NATIVE)]
        c.update(plus_one, framework=FUNCTIONAL)  # so that the next one finds all in place
        place.compute.hold()
        for each in (b, c):
            each.update(plus_one, framework=FUNCTIONAL)
        return tuple(view.clone() for view in views)

    check(place, scenario, [[1, 1], [2, 2]], host_waits=True, control=place.way != "shared")


def test_an_update_is_seen_on_the_stream_of_the_write_before_it(place):
    def scenario(place, make):
        b = make([0, 0])
        b.update(plus_one, framework=FUNCTIONAL)
        with b.write(NATIVE) as view:
            view.mul_(5)
        place.compute.hold()
        b.update(plus_one, framework=FUNCTIONAL)
        with b.read(NATIVE) as view:
            return view.clone()

    check(place, scenario, [[6, 6]], host_waits=True, control=place.way != "shared")


def test_an_update_is_seen_by_an_update_of_the_other_framework(place):
    def scenario(place, make):
        b = make([1, 1])
        place.compute.hold()
        b.update(plus_one, framework=FUNCTIONAL)
        with place.side:
            b.update(five_times, framework=NATIVE)
            return b.array(NATIVE).clone()

    check(place, scenario, [[10, 10]], host_waits=True)


def test_an_update_is_seen_by_a_copy_to_the_host_and_by_an_assignment(place):
    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        place.compute.hold()
        for each in (b, c):
            each.update(plus_one, framework=FUNCTIONAL)
        with place.side:
            c[:1] = 5
            late = c.array(NATIVE).clone()
        place.fake.on_host_wait = "release"
        return b.to_host().numpy(), late

    on_host_wait = place.fake.on_host_wait
    for make, is_right in ((place.buffer, True), (place.raw, False)):
        assert (_run(place, scenario, make) == [[1, 1], [5, 1]]) is is_right
        place.fake.on_host_wait = on_host_wait


def test_a_slice_sees_the_update_of_its_base_and_the_base_that_of_a_slice(place):
    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        part = b[:1]
        place.compute.hold()
        b.update(plus_one, framework=FUNCTIONAL)
        c[:1].update(plus_two, framework=FUNCTIONAL)
        with place.side:
            return part.array(NATIVE).clone(), c.array(NATIVE).clone()

    check(place, scenario, [[1], [2, 0]], host_waits=True)


def test_an_update_of_a_tree_is_seen_by_views_of_its_leaves(place):
    if place.methods:
        pytest.skip("trees are given by name")

    def scenario(place, make):
        tree = {"a": make([0, 0]), "b": make([1, 1])}
        place.compute.hold()
        if make == place.buffer:
            rlx.update(tree, lambda t: {"a": t["b"] + 1, "b": t["a"] + 3}, framework=FUNCTIONAL)
        else:
            tree["a"].update(plus_two, framework=FUNCTIONAL)
            tree["b"].update(plus_two, framework=FUNCTIONAL)
        with place.side:
            return tree["a"].array(NATIVE).clone(), tree["b"].array(NATIVE).clone()

    check(place, scenario, [[2, 2], [3, 3]], host_waits=True)


@pytest.mark.parametrize("stream", ["here", "side"])
def test_a_result_that_a_user_commits_is_seen(place, stream):
    def scenario(place, make):
        b = make([0, 0])
        with b.write(NATIVE) as view:
            view.fill_(1)
        program = place.fake.jit(plus_one, donate_argnums=[0])
        array = b.array(FUNCTIONAL)
        place.compute.hold()
        result = program(array)
        if make == place.buffer:
            rlx.commit(getattr(b, "buffer", b), result)
        with getattr(place, stream), b.read(NATIVE) as view:
            return view.clone()

    same_stream = (place.way, stream) == ("shared", "here")
    check(place, scenario, [[2, 2]], host_waits=True, control=not same_stream)


# --- a write by the native framework -------------------------------------------------------------


def late_write(place, b, value=7):
    """A write scope whose work does not run before the stream is released."""
    place.here.hold()
    with b.write(NATIVE) as view:
        view.fill_(value)


def test_a_write_is_seen_by_a_reader_on_another_stream(place):
    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        late_write(place, b)
        late_write(place, c)
        with place.side:
            with b.read(NATIVE) as view:
                copy = view.clone()
            return copy, c.array(NATIVE).clone()

    check(place, scenario, [[7, 7], [7, 7]], host_waits=False)


def test_a_write_is_seen_by_a_program_of_the_functional_framework(place):
    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        b.array(FUNCTIONAL)  # so that the array is an old one
        late_write(place, b)
        late_write(place, c)
        return place.copied(b.array(FUNCTIONAL)), place.copied(c.array(FUNCTIONAL))

    check(place, scenario, [[7, 7], [7, 7]], host_waits=True, control=place.way != "shared")


def test_a_write_on_another_stream_is_seen_by_a_program(place):
    def scenario(place, make):
        b = make([0, 0])
        b.array(FUNCTIONAL)
        with place.side:
            place.side.hold()
            with b.write(NATIVE) as view:
                view.fill_(7)
        with b.read(FUNCTIONAL) as array:
            return place.copied(array)

    check(place, scenario, [[7, 7]], host_waits=True)


def test_a_write_is_seen_by_an_update(place):
    def scenario(place, make):
        b = make([0, 0])
        with place.side:
            place.side.hold()
            with b.write(NATIVE) as view:
                view.fill_(7)
        b.update(plus_one, framework=FUNCTIONAL)
        place.side.release()
        return b.array(NATIVE).clone()

    check(place, scenario, [[8, 8]], host_waits=True)


@pytest.mark.parametrize("handed_before", [False, True])
def test_a_write_is_seen_by_a_fetch_of_a_functional_array(place, handed_before):
    """A fetch waits for the definition of its array alone, so the array has to be a new one."""

    def scenario(place, make):
        b = make([0, 0])
        if handed_before:
            b.array(FUNCTIONAL)
        late_write(place, b)
        return b.array(FUNCTIONAL).fetch().wait

    check(place, lambda *args: _later(place, scenario(*args)), [[7, 7]], host_waits=True)


def test_a_write_on_another_stream_is_seen_by_a_fetch(place):
    def scenario(place, make):
        b = make([0, 0])
        b.array(FUNCTIONAL)
        with place.side:
            place.side.hold()
            with b.write(NATIVE) as view:
                view.fill_(7)
        return _later(place, b.array(FUNCTIONAL).fetch().wait)

    check(place, scenario, [[7, 7]], host_waits=True)


def test_a_write_that_the_framework_does_not_count_is_seen_by_a_fetch(place):
    def scenario(place, make):
        b = make([0, 0])
        b.array(FUNCTIONAL)
        place.here.hold()
        with b.write(NATIVE) as view:
            place.fake.launch(fill, view)
        return _later(place, b.array(FUNCTIONAL).fetch().wait)

    check(place, scenario, [[7, 7]], host_waits=True)


class _later:
    """A value to be asked for when everything is released."""

    def __init__(self, place, wait):
        self.read = wait


def test_a_write_is_seen_by_a_fetch_after_an_update_of_something_else(place):
    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        array = b.array(FUNCTIONAL)
        late_write(place, b)
        c.update(plus_one, framework=FUNCTIONAL)
        del array
        return _later(place, b.array(FUNCTIONAL).fetch().wait)

    check(place, scenario, [[7, 7]], host_waits=True)


def test_a_write_is_seen_by_one_on_another_stream(place):
    def scenario(place, make):
        b = make([0, 0])
        late_write(place, b)
        with place.side, b.write(NATIVE) as view:
            view[:1].add_(1)
            return view.clone()

    check(place, scenario, [[8, 7]], host_waits=False)


@pytest.mark.parametrize("scope", ["read", "write"])
def test_a_scope_that_ends_on_another_stream_forgets_nothing(place, scope):
    """What came before it is waited for by those who come after it, wherever it has ended."""

    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        late_write(place, b)
        place.compute.hold()
        c.update(plus_one, framework=FUNCTIONAL, ordered=False)
        found = []
        for each, later in ((b, place.fake.stream("fourth")), (c, place.third)):
            entered = getattr(each, scope)(NATIVE)
            with place.side:
                entered.__enter__()
            with place.third:
                entered.__exit__(None, None, None)
            with later:
                found.append(each.array(NATIVE).clone())
        return tuple(found)

    check(place, scenario, [[7, 7], [1, 1]])


def test_memory_that_is_still_being_zeroed_is_waited_for(place):
    def scenario(place, make):
        place.here.hold()
        if make == place.raw:
            b, c = (Raw(place, place.fake.array(np.zeros(2, np.float32))) for _ in range(2))
        else:
            b, c = (rlx.Buffer.zeros(2, "f32", place.fake.device) for _ in range(2))
            b, c = (Methods(each) if place.methods else each for each in (b, c))
        with place.side:
            copy = b.array(NATIVE).clone()
        return copy, place.copied(c.array(FUNCTIONAL))

    without = _run(place, scenario, place.raw)  # first: nothing is freed yet that would be zero
    assert without != [[0, 0], [0, 0]]
    check(place, scenario, [[0, 0], [0, 0]], host_waits=True, control=False)


def test_a_handle_orders_as_a_buffer_does(place):
    def make(values):
        handle = rlx.BufferHandle("b", 2, "f32", device=place.fake.device)
        return Methods(handle) if place.methods else handle

    def scenario(place, make):
        b = make([0, 0])
        late_write(place, b)
        with place.side:
            copy = b.array(NATIVE).clone()
        b.update(plus_one, framework=FUNCTIONAL)
        return copy, place.copied(b.array(FUNCTIONAL))

    assert _run(place, scenario, make) == [[7, 7], [8, 8]]
    assert _run(place, scenario, place.raw) != [[7, 7], [8, 8]]


# --- a view that is out --------------------------------------------------------------------------


def test_a_plain_write_is_seen_by_an_array_taken_later(place):
    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        for each in (b, c):
            each.array(FUNCTIONAL)
        views = [b.array(NATIVE), c.array(NATIVE)]
        place.here.hold()
        for view in views:
            view.fill_(3)
        return place.copied(b.array(FUNCTIONAL)), _later(place, c.array(FUNCTIONAL).fetch().wait)

    check(place, scenario, [[3, 3], [3, 3]], host_waits=True)


def test_a_plain_write_on_the_stream_that_is_current_now_is_seen(place):
    """The view was taken on one stream, and is written on the one from which the array is taken."""

    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        for each in (b, c):
            each.array(FUNCTIONAL)
        views = [b.array(NATIVE), c.array(NATIVE)]
        place.side.hold()
        with place.side:
            for view in views:
                view.fill_(3)
            return (
                place.copied(b.array(FUNCTIONAL)),
                _later(place, c.array(FUNCTIONAL).fetch().wait),
            )

    check(place, scenario, [[3, 3], [3, 3]], host_waits=True)


def test_a_plain_write_is_seen_by_an_update_and_by_a_copy_to_the_host(place):
    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        views = [b.array(NATIVE), c.array(NATIVE)]
        place.here.hold()
        for view in views:
            view.fill_(3)
        b.update(plus_one, framework=FUNCTIONAL)
        place.here.release()
        place.here.hold()
        views[1].fill_(5)
        place.fake.on_host_wait = "release"
        return b.array(NATIVE).clone(), c.to_host().numpy()

    on_host_wait = place.fake.on_host_wait
    for make, is_right in ((place.buffer, True), (place.raw, False)):
        assert (_run(place, scenario, make) == [[4, 4], [5, 5]]) is is_right
        place.fake.on_host_wait = on_host_wait


def test_a_plain_write_on_the_stream_that_is_current_now_is_copied_to_the_host(place):
    b = place.buffer([0, 0])
    view = b.array(NATIVE)
    place.fake.on_host_wait = "release"
    for value, read in ((3, lambda: b.to_host().numpy()), (0, lambda: place.raw_read(view))):
        place.side.hold()
        with place.side:
            view.fill_(value)
            seen = read()
        assert seen.tolist() == [3, 3], "the control sees the write before"
        place.side.release()


def test_a_view_of_one_stream_is_ordered_on_another_once_it_is_asked_for_there(place):
    def scenario(place, make):
        b = make([0, 0])
        place.here.hold()
        b.array(NATIVE).fill_(3)
        with place.side:
            view = b.array(NATIVE)
            first = view.clone()
            place.side.hold()
            view.add_(1)
        return first, b.array(NATIVE).clone()

    check(place, scenario, [[3, 3], [4, 4]], host_waits=False)


def test_a_plain_write_after_a_scope_is_seen_everywhere(place):
    """The scope is over and has its event; what the view that is out did after it has none."""

    def late(b):
        view = b.array(NATIVE)
        with b.write(NATIVE) as inside:
            inside.fill_(1)
        view.add_(1)
        return b

    def scenario(place, make):
        buffers = [make([0, 0]) for _ in range(4)]
        place.here.hold()
        a, b, c, d = map(late, buffers)
        with place.side:
            read = a.array(NATIVE).clone()
            with b.read(NATIVE) as view:
                inside = view.clone()
            b.update(plus_one, framework=FUNCTIONAL)
            program = place.copied(c.array(FUNCTIONAL))
            fetched = d.array(FUNCTIONAL).fetch()
        return read, inside, program, _later(place, fetched.wait)

    check(place, scenario, [[2, 2]] * 4, host_waits=True)


def fill(values):
    values[...] = 7


def test_a_plain_write_that_the_framework_does_not_count_is_seen_by_programs(place):
    def scenario(place, make):
        b = make([0, 0])
        b.array(FUNCTIONAL)
        view = b.array(NATIVE)
        b.array(FUNCTIONAL)
        place.side.hold()
        with place.side:
            place.fake.launch(fill, view)
            return place.copied(b.array(FUNCTIONAL))

    check(place, scenario, [[7, 7]], host_waits=True)


@pytest.mark.parametrize("counted", [True, False])
def test_a_host_copy_that_an_array_keeps_is_not_shown_again(place, counted):
    def scenario(place, make):
        b = make([0, 0])
        view = b.array(NATIVE)
        assert b.array(FUNCTIONAL).read().tolist() == [0, 0]
        if counted:
            view.fill_(7)
        else:
            place.fake.launch(fill, view)
        return b.array(FUNCTIONAL).read()

    check(place, scenario, [[7, 7]])


# --- readers, and a write that has to leave them alone -------------------------------------------


def test_a_write_waits_for_a_program_that_reads(place):
    def scenario(place, make):
        b = make([1, 1])
        place.compute.hold()
        before = place.copied(b.array(FUNCTIONAL))
        with place.side:
            with b.write(NATIVE) as view:
                view.fill_(9)
            if make == place.buffer and place.way != "host":
                assert place.side.pending == ("fill_",), "it waits on the device"
            return before, b.array(NATIVE).clone()

    check(place, scenario, [[1, 1], [9, 9]], host_waits=True)


def test_a_write_waits_for_a_fetch_that_reads(place):
    def scenario(place, make):
        b = make([1, 1])
        array = b.array(FUNCTIONAL)
        place.copies.hold()
        before = array.fetch()
        with place.side, b.write(NATIVE) as view:
            view.fill_(9)
        return _later(place, before.wait)

    check(place, scenario, [[1, 1]], host_waits=True)


def test_a_write_waits_for_a_program_that_reads_a_retired_array(place):
    """An array that kept its host copy gets a successor, and the first one may still be read."""

    def scenario(place, make):
        b, c = make([1, 1]), make([1, 1])
        arrays = [each.array(FUNCTIONAL) for each in (b, c)]
        for array in arrays:
            array.read()
        for each in (b, c):
            each.array(NATIVE)
        place.compute.hold()
        place.copies.hold()
        before = place.copied(arrays[0]), _later(place, arrays[1].fetch().wait)
        for each in (b, c):
            each.array(FUNCTIONAL)
        with place.side:
            for each in (b, c):
                with each.write(NATIVE) as view:
                    view.fill_(9)
        return before

    check(place, scenario, [[1, 1], [1, 1]], host_waits=True)


def test_every_kind_of_write_waits_for_a_program_that_reads(place):
    def scenario(place, make):
        a, b, c = (make([1, 1]) for _ in range(3))
        source = make([9, 9])
        place.compute.hold()
        before = [place.copied(each.array(FUNCTIONAL)) for each in (a, b, c)]
        with place.side:
            a[:] = 9
            b.copy_from(source)
            c.update(five_times, framework=NATIVE)
        return tuple(before)

    check(place, scenario, [[1, 1]] * 3, host_waits=True)


def test_an_argument_of_an_update_is_not_written_before_the_update_has_read_it(place):
    def scenario(place, make):
        b, argument = make([0, 0]), make([1, 1])
        place.compute.hold()
        b.update(plus, argument, framework=FUNCTIONAL)
        with place.side:
            with argument.write(NATIVE) as view:
                view.fill_(9)
            return b.array(NATIVE).clone()

    check(place, scenario, [[1, 1]], host_waits=True)


def test_an_argument_of_a_native_update_is_read_in_order(place):
    def add(view, other):
        view.add_(other)

    def scenario(place, make):
        b, c, written, to_be_written = (make([1, 1]) for _ in range(4))
        late_write(place, written)
        with place.side:
            b.update(add, written, framework=NATIVE)
        place.here.release()
        with place.side:
            place.side.hold()
            c.update(add, to_be_written, framework=NATIVE)
        with to_be_written.write(NATIVE) as view:
            view.fill_(9)
        with place.side:
            return b.array(NATIVE).clone(), c.array(NATIVE).clone()

    check(place, scenario, [[8, 8], [2, 2]])


def test_readers_on_two_streams_do_not_wait_for_each_other_but_a_write_waits_for_both(place):
    def scenario(place, make):
        b = make([1, 1])
        for stream in (place.here, place.side):
            stream.hold()
        copies = []
        for stream in (place.here, place.side):
            with stream, b.read(NATIVE) as view:
                copies.append(view.clone())
        place.side.release()
        assert place.here.pending, "it is held still"
        assert not place.side.pending, "the reader there did not wait for the one here"
        place.side.hold()
        with place.side, b.read(NATIVE) as view:
            copies.append(view.clone())
        with place.third, b.write(NATIVE) as view:
            view.fill_(9)
        return tuple(copies)

    check(place, scenario, [[1, 1]] * 3, host_waits=False)


@pytest.mark.parametrize("released", ["here", "side"])
def test_a_write_waits_for_the_slower_of_two_readers(place, released):
    def scenario(place, make):
        b = make([1, 1])
        copies = []
        for stream in (place.here, place.side):
            stream.hold()
            with stream, b.read(NATIVE) as view:
                copies.append(view.clone())
        with place.third, b.write(NATIVE) as view:
            view.fill_(9)
        getattr(place, released).release()
        return tuple(copies)

    check(place, scenario, [[1, 1]] * 2, host_waits=False)


def test_a_write_waits_for_a_reader_elsewhere_also_on_the_stream_of_the_last_write(place):
    def scenario(place, make):
        b = make([0, 0])
        with b.write(NATIVE) as view:
            view.fill_(1)
        with place.side:
            place.side.hold()
            with b.read(NATIVE) as view:
                before = view.clone()
        with b.write(NATIVE) as view:
            view.fill_(9)
        return before

    check(place, scenario, [[1, 1]], host_waits=False)


def test_an_update_waits_for_a_reader_of_the_other_framework(place):
    def scenario(place, make):
        b = make([1, 1])
        with place.side:
            place.side.hold()
            with b.read(NATIVE) as view:
                before = view.clone()
        b.update(plus_one, framework=FUNCTIONAL)
        return before

    check(place, scenario, [[1, 1]], host_waits=True)


@pytest.mark.parametrize("handed_before", [False, True])
def test_a_program_that_donates_comes_after_readers_of_the_other_framework(place, handed_before):
    """The array may be donated, so that whoever takes it may write."""

    def scenario(place, make):
        b = make([1, 1])
        if handed_before:
            b.array(FUNCTIONAL)
        with place.side:
            place.side.hold()
            with b.read(NATIVE) as view:
                before = view.clone()
        result = place.fake.jit(plus_one, donate_argnums=[0])(b.array(FUNCTIONAL))
        if make == place.buffer:
            rlx.commit(getattr(b, "buffer", b), result)
        return before

    check(place, scenario, [[1, 1]])


def test_a_copy_between_buffers_is_a_reader_of_its_source(place):
    def scenario(place, make):
        source, target = make([1, 1]), make([0, 0])
        place.here.hold()
        target.copy_from(source)
        with place.side, source.write(NATIVE) as view:
            view.fill_(9)
        return target.array(NATIVE).clone()

    check(place, scenario, [[1, 1]], host_waits=False)


def test_a_copy_into_a_buffer_is_seen_elsewhere(place):
    def scenario(place, make):
        source, target, other = make([1, 1]), make([0, 0]), make([0, 0])
        place.side.hold()
        with place.side:
            target.copy_from(source)
            other[:] = 5
        with place.third:
            copies = target.array(NATIVE).clone(), other.array(NATIVE).clone()
        return *copies, place.copied(target.array(FUNCTIONAL))

    check(place, scenario, [[1, 1], [5, 5], [1, 1]], host_waits=True)


def test_a_copy_between_buffers_sees_a_write_of_its_source(place):
    def scenario(place, make):
        source, target, other = make([1, 1]), make([0, 0]), make([0, 0])
        late_write(place, source)
        with place.side:
            target.copy_from(source)
        place.compute.hold()
        source.update(plus_one, framework=FUNCTIONAL)
        with place.side:
            other.copy_from(source)
        return target.array(NATIVE), other.array(NATIVE)

    check(place, scenario, [[7, 7], [8, 8]], host_waits=True)


# --- parts, and everything together --------------------------------------------------------------


@pytest.mark.parametrize("handed_before", [False, True])
def test_updates_through_two_slices_are_seen_by_a_fetch_of_the_base(place, handed_before):
    def scenario(place, make):
        b = make([0, 0])
        if handed_before:
            b.array(FUNCTIONAL)
        place.compute.hold()
        b[:1].update(plus_one, framework=FUNCTIONAL)
        b[1:].update(plus_two, framework=FUNCTIONAL)
        return _later(place, b.array(FUNCTIONAL).fetch().wait)

    check(place, scenario, [[1, 2]])


def test_an_update_of_a_slice_is_seen_by_a_fetch_of_another_that_overlaps(place):
    def scenario(place, make):
        b = make([0, 0, 0])
        left, right = b[:2], b[1:]
        left.array(FUNCTIONAL)
        place.compute.hold()
        right.update(plus_one, framework=FUNCTIONAL)
        left.update(plus_two, framework=FUNCTIONAL)
        whole = b.array(FUNCTIONAL).fetch()
        return _later(place, whole.wait), _later(place, right.array(FUNCTIONAL).fetch().wait)

    check(place, scenario, [[2, 3, 1], [3, 1]])


def test_a_step_that_is_refused_leaves_the_order_as_it_was(place):
    def scenario(place, make):
        b, c = make([0, 0]), make([0, 0])
        for each in (b, c):
            late_write(place, each)
            with contextlib.suppress(rlx.ShapeError):
                if make == place.buffer:
                    each.update(wrong_shape, framework=FUNCTIONAL)
        with place.side:
            copy = b.array(NATIVE).clone()
            fetched = c.array(FUNCTIONAL).fetch()
        return copy, _later(place, fetched.wait)

    check(place, scenario, [[7, 7], [7, 7]])


@pytest.mark.parametrize("how", ["first view", "refused step"])
@pytest.mark.parametrize("updates", range(6))
def test_no_number_of_updates_lets_a_write_look_like_none(place, updates, how):
    """Whether an array is fresh is told by counts, which begin anew with the first view."""

    def scenario(place, make):
        b = make([0, 0])
        for _ in range(updates):
            b.update(plus_one, framework=FUNCTIONAL)
        b.array(FUNCTIONAL)
        if how == "first view":
            source = make([7, 7])
            place.here.hold()
            b.copy_from(source)
            b.array(NATIVE)
        else:
            view = b.array(NATIVE)
            place.here.hold()
            view.fill_(7)
            with contextlib.suppress(rlx.ShapeError):
                if make == place.buffer:
                    b.update(wrong_shape, framework=FUNCTIONAL)
        return _later(place, b.array(FUNCTIONAL).fetch().wait)

    check(place, scenario, [[7, 7]], host_waits=True)


def test_a_step_that_is_refused_forgets_no_reader(place):
    """It has fenced the readers of a slice, and then it did not write."""

    def scenario(place, make):
        b = make([1, 1])
        place.copies.hold()
        before = b[:1].array(FUNCTIONAL).fetch()
        with contextlib.suppress(rlx.ShapeError):
            if make == place.buffer:
                b.update(wrong_shape, framework=FUNCTIONAL)
        with place.side, b.write(NATIVE) as view:
            view.fill_(9)
        return _later(place, before.wait)

    check(place, scenario, [[1]], host_waits=True)


@pytest.mark.parametrize("updated_before", [False, True])
def test_an_update_that_has_to_be_copied_back_is_in_order(place, updated_before):
    def scenario(place, make):
        b = make([1, 1])
        with place.side:
            if updated_before:
                b.update(plus_one, framework=FUNCTIONAL)
            else:
                with b.write(NATIVE) as view:
                    view.fill_(2)
            place.fake.fail_next("donate")
            place.side.hold()
            place.fake.on_host_wait = "release"
            b.update(plus_one, framework=FUNCTIONAL)
        return b.array(NATIVE).clone(), place.copied(b.array(FUNCTIONAL))

    assert _run(place, scenario, place.buffer) == [[3, 3], [3, 3]]


def use_memory(place):
    """Let the functional framework write to all memory that was given back to it."""
    return [place.fake.functional(np.full(2, 9, np.float32)) for _ in range(30)]


@pytest.mark.parametrize("how", ["copy_from", "from_array"])
def test_a_copy_of_a_functional_array_may_outlive_it(place, how):
    """Its memory goes back to the other framework, which knows nothing of the copy under way."""

    def scenario(place, make):
        target = make([0, 0])
        array = place.fake.functional(np.full(2, 5, np.float32))
        with place.side:
            place.side.hold()
            if make == place.raw:
                target.copy_from(registry.for_kind("fpga").share(array, None))
            elif how == "copy_from":
                target.copy_from(array)
            else:
                target = rlx.Buffer.from_array(array, copy=True)
        del array
        use_memory(place)
        place.side.release()
        return target.array(target._backend.name if how == "from_array" else NATIVE).clone()

    if how == "from_array":
        assert _run(place, scenario, place.buffer) == [[5, 5]]
    else:
        check(place, scenario, [[5, 5]])


def test_a_result_that_is_copied_back_may_be_gone_before_the_copy_is_made(place):
    def scenario(place, make):
        b = make([1, 1])
        place.fake.fail_next("donate")
        on_host_wait, place.fake.on_host_wait = place.fake.on_host_wait, "release"
        with place.side:
            b.array(NATIVE)
            place.side.hold()
            b.update(plus_one, framework=FUNCTIONAL)
        place.fake.on_host_wait = on_host_wait
        use_memory(place)
        place.side.release()
        return b.array(NATIVE).clone()

    assert _run(place, scenario, place.buffer) == [[2, 2]]


# --- who is not waited for -----------------------------------------------------------------------


def test_a_copy_to_the_host_waits_for_its_own_producers_only(place):
    b, unrelated = place.buffer([1, 1]), place.buffer([0, 0])
    with place.side, b.write(NATIVE) as view:
        view.fill_(7)
    place.fake.on_host_wait = "raise"
    place.here.hold()
    place.compute.hold()
    with unrelated.write(NATIVE) as view:
        view.fill_(9)
    assert b.to_host().numpy().tolist() == [7, 7]
    with pytest.raises(HangError, match="compute" if place.way == "shared" else "default"):
        place.fake.array(np.zeros(2)).read()  # the control: what the current stream holds
    with pytest.raises(HangError):
        unrelated.to_host()
    place.fake.release()
    assert unrelated.to_host().numpy().tolist() == [9, 9]


def test_a_copy_to_the_host_of_an_updated_buffer_waits_for_the_update_only(place):
    b, unrelated = place.buffer([1, 1]), place.buffer([0, 0])
    b.update(plus_one, framework=FUNCTIONAL)
    place.fake.on_host_wait = "raise"
    place.fake.stream("default").hold()
    place.compute.hold()
    with contextlib.suppress(HangError):  # which in the host way waits for here
        unrelated.update(plus_one, framework=FUNCTIONAL)
    assert b.to_host().numpy().tolist() == [2, 2]


def test_a_copy_to_the_host_leaves_nothing_to_wait_for(place):
    """It is done when the call returns: nobody has to wait for what the current stream holds."""
    b, c = place.buffer([1, 1]), place.buffer([1, 1])
    c.array(FUNCTIONAL)
    place.fake.on_host_wait = "raise"
    unrelated = place.fake.array(np.zeros(2))
    place.here.hold()
    unrelated.add_(1)
    b.to_host()
    with place.side:
        with b.write(NATIVE) as view:
            view.fill_(9)
        c.to_host()
        place.fake.array(np.zeros(2))
    assert place.side.pending == ()
    assert place.here.pending == ("add_",)


def test_work_on_a_side_stream_does_not_wait_for_unrelated_programs(place):
    b, unrelated = place.buffer([1, 1]), place.buffer([0, 0])
    unrelated.array(FUNCTIONAL)
    place.fake.on_host_wait = "raise"
    place.compute.hold()
    place.here.hold()
    pending = place.copied(unrelated.array(FUNCTIONAL))
    stage = rlx.command_stream(place.fake.device, side=True)
    with stage:
        b.copy_from(np.full(2, 7, np.float32))
    stage.wait()
    assert not pending.is_ready()
    with stage:
        assert b.array(NATIVE).read().tolist() == [7, 7]
    with pytest.raises(HangError):
        place.here.synchronize()


def test_settled_accesses_on_the_shared_stream_need_no_event(shared):
    b = shared.buffer([0, 0])
    b.array(NATIVE)
    b.update(plus_one, framework=FUNCTIONAL)
    b.array(FUNCTIONAL)
    before = len(shared.fake.events)
    shared.compute.hold()
    copies = []
    for _ in range(3):
        b.update(plus_one, framework=FUNCTIONAL)
        b.array(NATIVE).add_(1)
        with b.write(NATIVE) as view:
            view.add_(1)
        with b.read(NATIVE):
            pass
        copies.append(shared.copied(b.array(FUNCTIONAL)))
    shared.compute.release()
    assert [copy.read().tolist() for copy in copies] == [[4, 4], [7, 7], [10, 10]]
    assert len(shared.fake.events) == before
    assert rlx.ledger.host_waits == 0


def test_updates_on_the_shared_stream_need_no_fence(shared):
    b = shared.buffer([0, 0])
    view = b.array(NATIVE)
    b.update(plus_one, framework=FUNCTIONAL)
    for _ in range(3):
        view.add_(1)
        b.update(plus_one, framework=FUNCTIONAL)
        assert b.array(FUNCTIONAL).fetch().wait().tolist() == view.read().tolist()
    assert not [entry for entry in shared.fake.work if "fence" in entry]


def test_the_same_accesses_on_two_streams_do_need_events(events):
    """The control of the test above."""
    b = events.buffer([0, 0])
    b.array(NATIVE)
    before = len(events.fake.events)
    b.update(plus_one, framework=FUNCTIONAL)
    b.array(NATIVE).add_(1)
    assert len(events.fake.events) > before


def test_accesses_on_one_stream_of_the_native_framework_wait_for_nothing(place):
    b = place.buffer([0, 0])
    b.array(NATIVE)
    before = [entry for entry in place.fake.events if "wait" in entry]
    for _ in range(3):
        b.array(NATIVE).add_(1)
        with b.write(NATIVE) as view:
            view.add_(1)
    assert [entry for entry in place.fake.events if "wait" in entry] == before


def test_an_array_stays_the_one_it_is_until_somebody_writes(place):
    b = place.buffer([0, 0])
    array = b.array(FUNCTIONAL)
    view = b.array(NATIVE)
    with b.read(NATIVE):
        pass
    assert b.array(FUNCTIONAL) is array
    b[:1].update(plus_one, framework=FUNCTIONAL)
    assert array.is_deleted()
    array = b.array(FUNCTIONAL)
    assert b.array(FUNCTIONAL) is array
    view.add_(1)
    assert b.array(FUNCTIONAL) is not array


# --- memory that is freed ------------------------------------------------------------------------


def test_memory_is_not_used_again_before_a_stream_has_read_it(place):
    def scenario(place, make):
        b = make([1, 1])
        place.side.hold()
        with place.side, b.read(NATIVE) as view:
            copy = view.clone()
        del b, view
        gc.collect()
        others = [place.fake.array(np.full(2, 9, np.float32)) for _ in range(30)]
        place.side.release()
        del others
        return copy

    check(place, scenario, [[1, 1]])


def test_memory_that_an_update_still_uses_is_not_used_again(place):
    def scenario(place, make):
        b = make([1, 1])
        place.compute.hold()
        b.update(plus_one, framework=FUNCTIONAL, ordered=False)
        seen = place.copied(b.array(FUNCTIONAL))
        del b
        gc.collect()
        others = [place.fake.array(np.full(2, 9, np.float32)) for _ in range(30)]
        place.compute.release()
        del others
        return seen

    check(place, scenario, [[2, 2]], control=False)  # its arrays keep it by themselves


# --- command streams -----------------------------------------------------------------------------


@pytest.fixture
def plain(request):
    """A place without another current stream than the default one."""
    with FakeDevice() as fake:
        yield fake


@pytest.mark.parametrize("way", WAYS)
def test_a_command_stream_works_in_the_way_of_its_device(way):
    with FakeDevice(order=way) as fake:
        stream = rlx.command_stream(fake.device)
        assert isinstance(stream, rlx.CommandStream)
        assert stream.device == fake.device
        assert (stream.native is fake.stream("compute")) is (way == "shared")
        assert str(stream.sharing.way) == way
        side = rlx.command_stream(fake.device, side=True)
        assert side.native not in (stream.native, fake.stream("compute"), fake.stream())


def test_a_way_is_forced_for_the_work_under_one_stream(plain):
    plain.on_host_wait = "release"
    b = rlx.Buffer.zeros(2, "f32", plain.device)
    b.array(FUNCTIONAL)
    for way in WAYS:
        stream = rlx.command_stream(plain.device, order=way)
        plain.stream("compute").hold()
        plain.log.clear()
        with stream:
            b.update(plus_one, framework=FUNCTIONAL)
            b.array(NATIVE).add_(1)
        assert bool(plain.host_waits) is (way == "host")
        assert (stream.native is plain.stream("compute")) is (way == "shared")
        plain.release()
    assert b.to_host().numpy().tolist() == [6, 6]


def test_a_way_that_is_unknown_or_cannot_be_had_is_refused(plain):
    with pytest.raises(rlx.DriverError, match="'best' is no way"):
        rlx.command_stream(plain.device, order="best")
    with pytest.raises(rlx.DriverError, match="cannot be had"):
        rlx.command_stream(plain.device, side=True, order="shared")


def test_streams_nest_and_each_thread_has_its_own(plain):
    outer, inner = (rlx.command_stream(plain.device, side=True) for _ in range(2))

    def current():
        work = plain.array(np.zeros(1))
        del work
        return plain.log[-1].stream

    assert current() == "default"
    with outer:
        assert current() == outer.native.name
        with inner:
            assert current() == inner.native.name
            with outer:
                assert current() == outer.native.name
            with ThreadPoolExecutor(1) as another:
                assert another.submit(current).result() == "default"
        assert outer.launch(current) == outer.native.name
        assert inner.launch(current) == inner.native.name
        assert current() == outer.native.name
    assert current() == "default"


def test_launched_work_runs_when_its_stream_does(plain):
    stream = rlx.command_stream(plain.device, side=True)
    x = plain.array(np.ones(2))
    stream.native.hold()
    y = stream.launch(lambda: x * 5)
    event = stream.record()
    assert isinstance(event, rlx.Event)
    assert not event.is_ready()
    with pytest.raises(HangError, match=stream.native.name):
        stream.wait()
    with pytest.raises(HangError, match=stream.native.name):
        event.wait()
    stream.native.release()
    assert event.is_ready()
    event.wait()
    stream.submit_and_wait()
    assert y.read().tolist() == [5, 5]


def test_events_are_timed(plain):
    stream = rlx.command_stream(plain.device, side=True)
    x = plain.array(np.ones(2))
    start = stream.record()
    stream.launch(lambda: x.add_(1).add_(1))
    assert start.elapsed_ms(stream.record()) == 2


@pytest.mark.parametrize("what", ["stream", "event"])
def test_a_stream_waits_for_another_on_the_device(plain, what):
    first, second = (rlx.command_stream(plain.device, side=True) for _ in range(2))
    x = plain.array(np.zeros(2))
    for ordered in (True, False):
        first.native.hold()
        first.launch(x.fill_, 7)
        if ordered:
            second.wait_for(first if what == "stream" else first.record())
        copy = second.launch(x.clone)
        assert second.native.pending == (("clone",) if ordered else ())
        first.native.release()
        second.wait()
        with second:
            assert copy.read().tolist() == [7, 7] if ordered else [0, 0]
        x.fill_(0)


def test_a_stream_waits_for_one_of_another_device():
    with FakeDevice(count=2) as fake:
        first, second = map(rlx.command_stream, fake.devices)
        x = fake.array(np.ones(2), fake.devices[1])
        first.native.hold()
        first.launch(lambda: fake.array(np.zeros(2)))
        second.wait_for(first)
        copy = second.launch(x.clone)
        assert second.native.pending == ("clone",)
        first.native.release()
        with second:
            assert copy.read().tolist() == [1, 1]


def test_a_stream_comes_after_the_functional_arrays_that_it_tracks(plain):
    stream = rlx.command_stream(plain.device, side=True)
    plain.stream("compute").hold()
    array = plain.jit(plus_one)(plain.functional(np.zeros(2)))
    stream.track({"a": [array]})
    flag = plain.array(np.zeros(1))
    stream.launch(flag.fill_, 1)
    assert stream.native.pending == ("fill_",)
    plain.stream("compute").release()
    stream.wait()
    assert flag.read() == 1


def test_a_failure_travels_to_the_streams_that_wait(plain):
    first, second, third = (rlx.command_stream(plain.device, side=True) for _ in range(3))
    before = first.record()
    first.launch(lambda: 1 // 0)
    assert first.launch(lambda: 5) is None
    event = first.record()
    second.wait_for(first)
    third.wait_for(before)
    assert second.launch(lambda: 5) is None
    assert third.launch(lambda: 5) == 5
    third.wait_for(second)
    assert third.launch(lambda: 6) is None
    for each in (first, event, second, third):
        with pytest.raises(ZeroDivisionError):
            each.wait()
    assert [each.launch(lambda: 7) for each in (first, second, third)] == [7, 7, 7]


def test_work_that_fails_on_the_device_is_raised_by_wait(plain):
    stream = rlx.command_stream(plain.device, side=True)
    x = plain.array(np.zeros(2))
    stream.native.hold()
    plain.fail_next("work", ArithmeticError("on the device"))
    assert stream.launch(x.add_, 1) is x
    stream.native.release()
    with pytest.raises(ArithmeticError, match="on the device"):
        stream.wait()
    stream.wait()


def test_what_pending_work_uses_is_kept_until_it_is_done(plain):
    class Scratch:
        pass

    stream = rlx.command_stream(plain.device, side=True)
    x = plain.array(np.zeros(2))
    stream.native.hold()
    scratch = Scratch()
    kept = weakref.ref(scratch)
    stream.launch(_use, x, scratch)
    del scratch
    stream.record()
    assert not gone(kept)
    stream.native.release()
    stream.record()
    assert gone(kept)


def _use(x, scratch):
    x.add_(1)


def test_memory_of_an_array_made_on_a_stream_is_kept_for_its_work(plain):
    """The array is dropped before its work has run, and other work on another stream allocates."""
    stream = rlx.command_stream(plain.device, side=True)
    x = plain.array(np.full(2, 5.0))
    stream.native.hold()
    stream.launch(x.mul_, 2)
    address = x.address
    del x

    def is_free():
        arrays = [plain.array(np.zeros(2)) for _ in range(5)]
        return address in [array.address for array in arrays]

    assert not is_free()
    stream.native.release()
    stream.wait()
    assert is_free()


# --- programs by chance, as late as may be -------------------------------------------------------


class Program:
    """Operations by chance on two buffers, and what they give when each waits for the one before.

    Every stream is held, and work runs only where the host waits for it or a stream is released by
    one piece of work: so whatever is not ordered is out of order.
    """

    def __init__(self, place, make, seed, streams):
        self.place, self.make, self.streams = place, make, streams
        self.chance = random.Random(seed)
        self.buffers = [make([0] * 4), make([1] * 4)]
        self.values = [np.zeros(4, np.float32), np.ones(4, np.float32)]
        self.found, self.expected = [], []
        self.read_by_programs = [False, False]
        place.fake.on_host_wait = "release"
        place.fake.hold()

    def run(self, length):
        for _ in range(length):
            stream = self.chance.choice(self.streams)
            with stream:
                self.operation()(self.chance.randrange(2))
            if self.chance.random() < 0.3:
                self.chance.choice([*self.streams, self.place.compute]).release(1)
        self.place.fake.release()
        with self.streams[0]:
            return [np.asarray(value.read()).tolist() for value in self.found]

    def operation(self):
        names = [name for name in dir(self) if name.startswith("do_")]
        return getattr(self, self.chance.choice(names))

    def part(self, index):
        """A slice, as a Buffer and as values."""
        if self.chance.random() < 0.5:
            return self.buffers[index], self.values[index]
        start = self.chance.randrange(3)
        return self.buffers[index][start : start + 2], self.values[index][start : start + 2]

    def see(self, found, values):
        self.found.append(found)
        self.expected.append(values.tolist())

    def fenced(self, index):
        """Note that readers are ordered, so that a plain write may follow."""
        self.read_by_programs[index] = False
        return self.part(index)

    def do_write(self, index):
        buffer, values = self.fenced(index)
        with buffer.write(NATIVE) as view:
            view.mul_(2)
            view.add_(3)
        values[:] = values * 2 + 3

    def do_write_through_a_view(self, index):
        if self.read_by_programs[index]:
            return  # only a scope waits for those
        buffer, values = self.part(index)
        buffer.array(NATIVE).add_(5)
        values += 5

    def do_read(self, index):
        buffer, values = self.part(index)
        with buffer.read(NATIVE) as view:
            self.see(view.clone(), values)

    def do_look(self, index):
        buffer, values = self.part(index)
        self.see(buffer.array(NATIVE).clone(), values)

    def do_update(self, index):
        buffer, values = self.fenced(index)
        buffer.update(times, framework=FUNCTIONAL, ordered=self.chance.random() < 0.5)
        values *= 2

    def do_update_that_is_refused(self, index):
        if self.make == self.place.buffer:
            with contextlib.suppress(rlx.ShapeError):
                self.buffers[index].update(wrong_shape, framework=FUNCTIONAL)

    def do_commit(self, index):
        if self.read_by_programs[index]:
            return  # nobody can fence what a program of the user donates
        buffer = self.buffers[index]
        program = self.place.fake.jit(plus_one, donate_argnums=[0])
        result = program(buffer.array(FUNCTIONAL))
        if self.make == self.place.buffer:
            rlx.commit(getattr(buffer, "buffer", buffer), result)
        else:
            buffer.functional = result
        self.values[index] += 1

    def do_update_by_the_other(self, index):
        self.buffers[index].update(
            plus, self.buffers[1 - index], framework=FUNCTIONAL, ordered=self.chance.random() < 0.5
        )
        self.values[index] += self.values[1 - index]
        self.read_by_programs = [index == 1, index == 0]

    def do_update_natively(self, index):
        self.fenced(index)
        self.buffers[index].update(five_times, framework=NATIVE)
        self.values[index] *= 5

    def do_program(self, index):
        self.read_by_programs[index] = True
        buffer, values = self.part(index)
        self.see(self.place.copied(buffer.array(FUNCTIONAL)), values)

    def do_fetch(self, index):
        self.read_by_programs[index] = True
        buffer, values = self.part(index)
        self.see(_later(self.place, buffer.array(FUNCTIONAL).fetch().wait), values)

    def do_copy_to_the_host(self, index):
        host = self.buffers[index].to_host().numpy()
        self.see(types.SimpleNamespace(read=lambda: host), self.values[index])

    def do_copy(self, index):
        self.fenced(index)
        self.buffers[index].copy_from(self.buffers[1 - index])
        self.values[index][:] = self.values[1 - index]

    def do_assign(self, index):
        self.fenced(index)
        self.buffers[index][1:3] = 7
        self.values[index][1:3] = 7


@pytest.mark.parametrize("several", [False, True], ids=["one stream", "three streams"])
def test_programs_by_chance_are_right_and_without_the_driver_they_are_not(place, several):
    streams = [place.here]
    if several:
        streams += [place.side, place.third]
    right = 0
    for seed in range(40):
        for make in (place.buffer, place.raw):
            program = Program(place, make, seed, streams)
            with np.errstate(over="ignore"):
                found = program.run(25)
            place.fake.log.clear()
            if make == place.buffer:
                assert found == program.expected, f"seed {seed}"
            else:
                right += found == program.expected
    if several or place.way != "shared":
        assert right < 20
