"""Taking turns: who comes first, who may pass, who would wait for ever, and what is left behind."""

import _thread
import contextlib
import itertools
import queue
import random
import re
import signal
import textwrap
import threading
import time
from concurrent.futures import Future, wait

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver import _locks
from support import must_run

DEADLINE = 20


class Actor:
    """A thread that does one thing after the other, as told, so that it can stand in a scope."""

    def __init__(self, name):
        self._calls = queue.SimpleQueue()
        self._inside = []  # scopes that it stands in
        self.name = name
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        everyone.append(self)

    def _run(self):
        while (call := self._calls.get()) is not None:
            future, function, args, kwargs = call
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)
        for scope in reversed(self._inside):
            scope.__exit__(None, None, None)

    def start(self, function, *args, **kwargs):
        """Do something; a Future of what it gives."""
        future = Future()
        self._calls.put((future, function, args, kwargs))
        return future

    def do(self, function, *args, **kwargs):
        return self.start(function, *args, **kwargs).result(DEADLINE)

    def start_to_enter(self, scope):
        def enter():
            scope.__enter__()
            self._inside.append(scope)

        return self.start(enter)

    def enter(self, scope):
        self.start_to_enter(scope).result(DEADLINE)

    def ask(self, scope):
        """Start to enter a scope, and see that it has to wait."""
        future = self.start_to_enter(scope)
        until(lambda: future.done() or self._thread.ident in [r.thread for r in _locks.sleepers])
        assert not future.done(), future
        return future

    def leave(self, scope):
        self._inside.remove(scope)
        self.do(scope.__exit__, None, None, None)


everyone = []


def end_all():
    """Make every actor leave its scopes, and end."""
    for actor in everyone:
        actor._calls.put(None)
    for actor in everyone:
        actor._thread.join(1)
    everyone.clear()


def actors(count):
    return [Actor(f"actor {i}") for i in range(count)]


def buffers(count):
    """Make Buffers whose labels differ."""
    made = [rlx.Buffer.zeros(4 + i) for i in range(count)]
    assert len({b._access.label for b in made}) == count
    return made


def until(condition):
    """Wait for a condition, at most until the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.0005)


def results(futures):
    return [future.result(DEADLINE) for future in futures]


def in_line(b):
    """Tell how many requests wait for a Buffer."""
    return len(b._access.waiting)


def assert_free(*all_buffers):
    """See that nothing is left behind: neither scopes, nor a line, nor a token that is kept."""
    assert _locks.sleepers == []
    assert not _locks._kept
    for b in all_buffers:
        access = b._access
        assert access.vacant == [None]
        assert access.waiting == []
        assert not access.readers
        assert access.writer == 0
        Actor("visitor").do(b.copy_from, b.numpy() + 1)
        assert access.native_ready
        assert access.functional_ready


@pytest.fixture(autouse=True)
def nobody_in_line(request):
    if request.node.get_closest_marker("jax"):
        rlx.Buffer.zeros(1).update(plus_one)  # loads JAX, which is not to count as waiting
    assert _locks.sleepers == []
    yield
    end_all()
    _locks.sleepers.clear()  # one failure is not to fail the tests that follow
    _locks._kept.clear()


def plus_one(x):
    return x + 1


def work(x):
    """Change memory in place, and take a while."""
    time.sleep(0.001)
    x += 1


@contextlib.contextmanager
def looping(*functions):
    """Call functions again and again, each in a thread of its own."""
    stop = threading.Event()

    def loop(function):
        while not stop.is_set():
            function()

    futures = [Actor(f"loop {i}").start(loop, f) for i, f in enumerate(functions)]
    try:
        yield
    finally:
        stop.set()
        results(futures)


# --- in turn ---------------------------------------------------------------------------------


def test_writers_come_in_the_order_they_asked():
    (b,) = buffers(1)
    order = []

    def write(i):
        with b.write("numpy"):
            order.append(i)

    with b.write("numpy"):
        futures = []
        for i, actor in enumerate(actors(8)):
            futures.append(actor.start(write, i))
            until(lambda: in_line(b) == len(futures))
    results(futures)
    assert order == list(range(8))
    assert_free(b)


def test_a_writer_that_gives_back_does_not_get_ahead_of_the_line():
    (b,) = buffers(1)
    first, second = actors(2)
    scope = b.write("numpy")
    first.enter(scope)
    waiting = second.ask(b.write("numpy"))

    def back_and_again():
        scope.__exit__(None, None, None)
        with pytest.raises(rlx.AccessTimeoutError, match=r"a writer.*'actor 1'"):
            b.write("numpy", timeout=0).__enter__()

    first.do(back_and_again)
    waiting.result(DEADLINE)


@pytest.mark.parametrize(
    "view", [lambda b: b.numpy(), pytest.param(lambda b: b.jax(), marks=pytest.mark.jax)]
)
def test_views_wait_for_a_writer_whose_turn_came(view):
    (b,) = buffers(1)
    first, second, viewer = actors(3)
    view(b), view(b)  # from now on it is at hand
    one, two = b.write("numpy"), b.write("numpy")
    first.enter(one)
    got = second.ask(two)
    first.leave(one)
    got.result(DEADLINE)
    seen = viewer.start(view, b)
    until(lambda: in_line(b) == 1 or seen.done())
    assert not seen.done()
    second.leave(two)
    seen.result(DEADLINE)
    assert_free(b)


def test_readers_are_let_in_together_and_in_their_turn():
    (b,) = buffers(1)
    r1, r2, w1, r3, r4 = actors(5)
    order = []
    pairs = {"first": threading.Barrier(2), "last": threading.Barrier(2)}

    def read(name):
        with b.read("numpy"):
            pairs[name].wait(DEADLINE)  # both are inside
            order.append(name)

    def write():
        with b.write("numpy"):
            order.append("write")

    with b.write("numpy"):
        futures = []
        for actor, call in (
            (r1, (read, "first")),
            (r2, (read, "first")),
            (w1, (write,)),
            (r3, (read, "last")),
            (r4, (read, "last")),
        ):
            futures.append(actor.start(*call))
            until(lambda: in_line(b) == len(futures))
    results(futures)
    assert order == ["first", "first", "write", "last", "last"]
    assert_free(b)


def test_a_reader_does_not_pass_a_writer_in_line():
    (b,) = buffers(1)
    r1, w, r2 = actors(3)
    reading, writing, later = b.read("numpy"), b.write("numpy"), b.read("numpy")
    r1.enter(reading)
    written = w.ask(writing)
    read = r2.ask(later)
    r1.leave(reading)
    written.result(DEADLINE)
    assert not read.done()
    w.leave(writing)
    read.result(DEADLINE)
    r2.leave(later)
    assert_free(b)


def test_readers_are_re_entrant_while_a_writer_waits():
    (b,) = buffers(1)
    reader, writer = actors(2)
    scope = b.read("numpy")
    reader.enter(scope)
    written = writer.ask(b.write("numpy"))

    def again():
        with b.read("numpy", timeout=DEADLINE), rlx.read([b], "numpy", timeout=0):
            pass

    reader.do(again)
    assert not written.done()
    reader.leave(scope)
    written.result(DEADLINE)


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("framework", [pytest.param("jax", marks=pytest.mark.jax), "numpy"])
def test_a_scope_gets_in_beside_a_loop_of_updates(framework, kind):
    (b,) = buffers(1)
    b.update(plus_one, framework=framework)
    pushed = 0
    updates = 0

    def update():
        nonlocal pushed, updates
        pushed += in_line(b) > 0  # somebody waits, and here comes one more
        b.update(plus_one, framework=framework)
        updates += 1

    rounds = 50
    with looping(update):
        for _ in range(rounds):
            seen = updates
            until(lambda seen=seen: updates > seen)
            with getattr(b, kind)("numpy", timeout=DEADLINE):
                pass
    # An update that has begun to ask when the scope does may come first, but not one after it.
    assert pushed <= rounds / 5
    assert_free(b)


def test_a_writer_gets_in_beside_overlapping_readers():
    (b,) = buffers(1)
    inside, overlaps = 0, 0

    def read():
        nonlocal inside, overlaps
        with b.read("numpy"):
            inside += 1
            time.sleep(0.002)  # several are always inside, if nothing keeps them out
            overlaps += inside > 1
            inside -= 1

    with looping(*[read] * 4):
        until(lambda: overlaps)
        for _ in range(20):
            with b.write("numpy", timeout=2):
                assert inside == 0
    assert_free(b)


def test_two_buffers_are_got_beside_threads_that_hammer_one_each():
    a, b = buffers(2)
    passed = 0

    def hammer(x):
        def step(n):
            nonlocal passed
            passed += any(len(request.accesses) == 2 for request in x._access.waiting)
            work(n)

        x.update(step, framework="numpy")

    rounds = 20
    with looping(lambda: hammer(a), lambda: hammer(b)):
        for _ in range(rounds):
            with rlx.write([a, b], "numpy", timeout=2):
                pass
    # Each may have got its turn just before the pair stood in line, and none gets another one.
    assert passed <= 2 * rounds
    assert_free(a, b)


@pytest.mark.parametrize(
    "intrude",
    [
        lambda b: b.write("numpy", timeout=0.01).__enter__(),
        lambda b: b.read("numpy", timeout=0).__enter__(),
        lambda b: rlx.write([b, rlx.Buffer.zeros(2)], "numpy", timeout=0).__enter__(),
    ],
)
def test_what_comes_free_is_kept_for_a_request_over_several(intrude):
    a, b = buffers(2)
    on_a, on_b, pair, intruder = actors(4)
    sa, sb, both = a.write("numpy"), b.write("numpy"), rlx.write([a, b], "numpy")
    on_a.enter(sa)
    on_b.enter(sb)
    got = pair.ask(both)
    on_b.leave(sb)
    assert not got.done()
    with pytest.raises(rlx.AccessTimeoutError, match=r"1 who asked for it before.*'actor 2'"):
        intruder.do(intrude, b)
    on_a.leave(sa)
    got.result(DEADLINE)
    pair.leave(both)
    assert_free(a, b)


@pytest.mark.jax
def test_the_hot_path_does_not_take_what_is_kept():
    a, b = buffers(2)
    b.update(plus_one)
    on_a, pair, updater = actors(3)
    sa, both = a.write("numpy"), rlx.write([a, b], "numpy")
    on_a.enter(sa)
    got = pair.ask(both)
    update = updater.start(b.update, plus_one)
    until(lambda: in_line(b) == 2 or update.done())
    assert not update.done()
    on_a.leave(sa)
    got.result(DEADLINE)
    assert b.epoch == 1
    pair.leave(both)
    update.result(DEADLINE)
    assert b.epoch == 3
    assert_free(a, b)


def test_what_is_kept_for_a_reader_may_be_read_by_those_behind():
    a, b = buffers(2)
    on_a, reader, other, writer = actors(4)
    sa, both = a.write("numpy"), rlx.read([a, b], "numpy")
    on_a.enter(sa)
    got = reader.ask(both)
    scope = b.read("numpy", timeout=DEADLINE)
    other.enter(scope)
    written = writer.ask(b.write("numpy"))
    on_a.leave(sa)
    got.result(DEADLINE)
    other.leave(scope)
    assert not written.done()
    reader.leave(both)
    written.result(DEADLINE)


def test_a_request_without_conflict_does_not_stand_in_line():
    a, b, c = buffers(3)
    on_a, on_line, free = actors(3)
    sa, line = a.write("numpy"), rlx.write([a, b], "numpy")
    on_a.enter(sa)
    got = on_line.ask(line)
    free.enter(c.write("numpy", timeout=0))
    on_a.leave(sa)
    got.result(DEADLINE)


# --- who may pass ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_nested_scope_is_not_stopped_by_what_is_kept(kind):
    a, b = buffers(2)
    nesting, pair = actors(2)
    outer, both = a.read("numpy"), rlx.write([a, b], "numpy")
    nesting.enter(outer)
    got = pair.ask(both)
    inner = getattr(b, kind)("numpy")
    nesting.enter(inner)
    assert not got.done()
    nesting.leave(outer)
    assert not got.done()
    nesting.leave(inner)
    got.result(DEADLINE)
    pair.leave(both)
    assert_free(a, b)


@pytest.mark.parametrize("nested_first", [True, False])
def test_a_nested_scope_passes_who_waits_for_it_by_way_of_another(nested_first):
    a, b, c = buffers(3)
    nesting, pair, between = actors(3)
    on_a, on_c, both = a.write("numpy"), c.write("numpy"), rlx.write([b, c], "numpy")
    nesting.enter(on_a)
    between.enter(on_c)
    got_both = pair.ask(both)  # waits for c, and b is kept for it
    on_b = b.write("numpy")
    if nested_first:
        got_b = nesting.ask(on_b)  # nobody waits for this thread: it comes after the pair
        got_a = between.ask(a.write("numpy"))  # now the pair does
    else:
        got_a = between.ask(a.write("numpy"))
        got_b = nesting.start_to_enter(on_b)
    got_b.result(DEADLINE)
    assert not got_a.done()
    nesting.leave(on_b)
    nesting.leave(on_a)
    got_a.result(DEADLINE)
    assert not got_both.done()
    between.leave(on_c)
    got_both.result(DEADLINE)
    pair.leave(both)


def test_a_nested_scope_passes_who_stands_behind_one_that_waits_for_it():
    a, b, c = buffers(3)
    nesting, first, second = actors(3)
    on_a = a.write("numpy")
    nesting.enter(on_a)
    got_ac = first.ask(rlx.write([a, c], "numpy"))
    got_cb = second.ask(rlx.write([c, b], "numpy"))
    on_b = b.write("numpy")
    nesting.enter(on_b)
    nesting.leave(on_b)
    nesting.leave(on_a)
    got_ac.result(DEADLINE)
    assert not got_cb.done()


def test_who_holds_something_that_nobody_waits_for_does_not_pass():
    a, b, other = buffers(3)
    on_a, pair, holding = actors(3)
    sa = a.write("numpy")
    on_a.enter(sa)
    got = pair.ask(rlx.write([a, b], "numpy"))
    holding.enter(other.write("numpy"))
    with pytest.raises(rlx.AccessTimeoutError, match="asked for it before"):
        holding.enter(b.write("numpy", timeout=0.01))
    on_a.leave(sa)
    got.result(DEADLINE)


@pytest.mark.jax
def test_a_callback_passes_who_waits_for_its_update():
    import jax

    a, b = buffers(2)
    updating, pair = actors(2)
    both = rlx.write([a, b], "numpy")

    def read(x):
        until(lambda: in_line(b) == 1)
        with b.read("numpy") as n:  # kept for the pair, which waits for this to end
            return x + n[0]

    def step(x):
        return jax.pure_callback(read, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    a.numpy()  # so that the update waits for its result
    updated = updating.start(a.update, step)
    until(lambda: a._access.writer)
    got = pair.ask(both)
    updated.result(DEADLINE)
    got.result(DEADLINE)
    pair.leave(both)
    assert_free(a, b)


def test_a_thread_that_python_did_not_start_never_waits():
    """It may be a callback of what it would wait for; only Python's own threads are known."""
    a, b = buffers(2)
    on_a, pair = actors(2)
    sa, both = a.write("numpy"), rlx.write([a, b], "numpy")
    on_a.enter(sa)
    got = pair.ask(both)

    def outcome(buffer):
        future = Future()

        def read():
            try:
                with buffer.read("numpy") as n:
                    future.set_result(n[0].item())
            except BaseException as error:
                future.set_exception(error)

        _thread.start_new_thread(read, ())
        return future

    assert outcome(b).result(DEADLINE) == 0  # kept for the pair, but free
    with pytest.raises(rlx.StaleViewError, match="being written"):
        outcome(a).result(DEADLINE)
    on_a.leave(sa)
    got.result(DEADLINE)
    pair.leave(both)
    assert_free(a, b)


# --- waiting for ever ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("reads", [False, True])
def test_who_closes_a_circle_gets_an_error_and_the_rest_goes_on(count, reads):
    all_buffers, all_actors = buffers(count), actors(count)
    held = [b.read("numpy") if reads else b.write("numpy") for b in all_buffers]
    wanted = [all_buffers[(i + 1) % count].write("numpy") for i in range(count)]
    for actor, scope in zip(all_actors, held, strict=True):
        actor.enter(scope)
    futures = [all_actors[i].ask(wanted[i]) for i in range(count - 1)]
    with pytest.raises(rlx.StaleViewError) as caught:
        all_actors[-1].enter(wanted[-1])
    text = str(caught.value)
    assert re.search(r"never end.*which this thread holds.*one rlx\.write\(\[\.\.\.\]\)", text)
    for b in all_buffers:
        assert b._access.label in text
    for actor in all_actors[:-1]:
        assert actor.name in text
    assert ("both" in text) is (count == 2)
    assert not any(future.done() for future in futures)
    all_actors[-1].leave(held[-1])
    for i in reversed(range(count - 1)):
        futures[i].result(DEADLINE)
        all_actors[i].leave(wanted[i])
        all_actors[i].leave(held[i])
    assert_free(*all_buffers)


@pytest.mark.parametrize("count", [2, 3])
def test_of_threads_that_close_a_circle_at_once_one_gets_an_error(count):
    threads = actors(count)
    for _ in range(30):
        all_buffers = buffers(count)
        together = threading.Barrier(count)

        def nest(i, all_buffers=all_buffers, together=together):
            with all_buffers[i].write("numpy"):
                together.wait(DEADLINE)
                with all_buffers[(i + 1) % count].write("numpy") as n:
                    n += 1

        futures = [actor.start(nest, i) for i, actor in enumerate(threads)]
        errors = [future.exception(DEADLINE) for future in futures]
        assert [type(e) for e in errors if e is not None] == [rlx.StaleViewError]
        assert sum(b.numpy()[0] for b in all_buffers) == count - 1
        assert_free(*all_buffers)


def test_two_readers_that_both_ask_to_write_get_an_error_each():
    (b,) = buffers(1)
    for actor in (readers := actors(2)):
        actor.enter(b.read("numpy"))
    for actor in readers:
        with pytest.raises(rlx.StaleViewError, match="leave the read scope"):
            actor.enter(b.write("numpy"))


def test_a_reader_that_asks_for_what_a_waiting_writer_holds():
    a, b = buffers(2)
    reader, writer = actors(2)
    reading, writing, wanted = a.read("numpy"), b.write("numpy"), a.write("numpy")
    reader.enter(reading)
    writer.enter(writing)
    got = writer.ask(wanted)
    with pytest.raises(rlx.StaleViewError, match="both in one"):
        reader.enter(b.read("numpy"))
    again = a.read("numpy")  # it did not lose what it holds
    reader.enter(again)
    reader.leave(again)
    reader.leave(reading)
    got.result(DEADLINE)


@pytest.mark.parametrize(
    "ask",
    [
        lambda b: b.numpy(),
        lambda b: b.to_host(),
        lambda b: b.copy_from(np.zeros(b.shape, np.float32)),
        lambda b: b.update(plus_one, framework="numpy"),
        pytest.param(lambda b: b.update(plus_one), marks=pytest.mark.jax),
        lambda b: rlx.write([b, rlx.Buffer.zeros(2)], "numpy").__enter__(),
        lambda b: b.close(),
    ],
)
def test_every_access_finds_that_it_would_close_a_circle(ask):
    a, b = buffers(2)
    waiting, closing = actors(2)
    on_a, on_b, wanted = a.write("numpy"), b.write("numpy"), a.write("numpy")
    waiting.enter(on_b)
    closing.enter(on_a)
    got = waiting.ask(wanted)
    with pytest.raises(rlx.StaleViewError, match="never end"):
        closing.do(ask, b)
    closing.leave(on_a)
    got.result(DEADLINE)
    waiting.leave(wanted)
    waiting.leave(on_b)
    assert_free(a, b)


@pytest.mark.jax
def test_an_update_that_waits_is_part_of_a_circle():
    a, b = buffers(2)
    a.update(plus_one)
    updating, closing = actors(2)
    on_b = b.write("numpy")
    closing.enter(on_b)

    def step(x):
        b.numpy()  # in the step's trace, while the update holds a
        return x + 1

    update = updating.start(a.update, step)
    until(lambda: in_line(b) == 1)
    with pytest.raises(rlx.StaleViewError, match="never end"):
        closing.do(a.numpy)
    closing.leave(on_b)
    update.result(DEADLINE)
    assert_free(a, b)


def test_trying_without_waiting_closes_no_circle():
    a, b = buffers(2)
    waiting, trying = actors(2)
    on_a, on_b = a.write("numpy"), b.write("numpy")
    waiting.enter(on_b)
    trying.enter(on_a)
    got = waiting.ask(a.write("numpy"))
    with pytest.raises(rlx.AccessTimeoutError, match=r"a writer.*'actor 0'"):
        trying.enter(b.write("numpy", timeout=0))
    with pytest.raises(rlx.StaleViewError, match="never end"):
        trying.enter(b.write("numpy", timeout=DEADLINE))
    trying.leave(on_a)
    got.result(DEADLINE)


def test_waiting_for_who_waits_is_no_circle():
    a, b, c = buffers(3)
    first, second, third = actors(3)
    sa, sb, wants_a, wants_b = a.write("numpy"), b.write("numpy"), a.write("numpy"), b.read("numpy")
    first.enter(sa)
    second.enter(sb)
    got_a = second.ask(wants_a)
    third.enter(c.write("numpy"))
    got_b = third.ask(wants_b)
    first.leave(sa)
    got_a.result(DEADLINE)
    second.leave(wants_a)
    second.leave(sb)
    got_b.result(DEADLINE)


# --- nothing left behind ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_request_that_gave_up_leaves_nothing_behind(kind):
    a, b, c = buffers(3)
    holding, giving_up = actors(2)
    scope = b.write("numpy")
    holding.enter(scope)
    said = r"a writer \(thread 'actor 0'\)\. Nothing was changed"
    for timeout in (0, 0.01, -1):
        with pytest.raises(rlx.AccessTimeoutError, match=said):
            giving_up.enter(getattr(rlx, kind)([a, b, c], "numpy", timeout=timeout))
        assert_free(a, c)
    holding.leave(scope)
    assert_free(a, b, c)


def test_those_behind_a_request_that_gave_up_go_on():
    a, b, c = buffers(3)
    reader, writer, behind, on_a, on_c = actors(5)
    scope = b.read("numpy")
    reader.enter(scope)
    gave_up = writer.ask(rlx.write([a, b, c], "numpy", timeout=1))
    got_b = behind.ask(b.read("numpy"))
    got_a = on_a.ask(a.write("numpy"))
    got_c = on_c.ask(rlx.read([c], "numpy"))
    with pytest.raises(rlx.AccessTimeoutError, match="1 reader"):
        gave_up.result(DEADLINE)
    results([got_a, got_b, got_c])


@pytest.mark.parametrize("granted", [False, True], ids=["waiting", "granted meanwhile"])
def test_an_interrupted_request_leaves_nothing_behind(granted):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only the main thread is interrupted")
    a, b = buffers(2)
    holding, interrupting = actors(2)
    scope = b.write("numpy")
    holding.enter(scope)
    arrived = threading.Event()

    def interrupted(*_):
        if arrived.is_set():
            return
        arrived.set()
        if granted:
            holding.leave(scope)
            assert b._access.writer == threading.get_ident()
        raise KeyboardInterrupt

    def interrupt():
        until(lambda: in_line(b))
        # Python misses a signal that comes just before the wait begins.
        while not arrived.wait(0.05):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupted)
    try:
        done = interrupting.start(interrupt)
        with pytest.raises(KeyboardInterrupt):
            rlx.write([a, b], "numpy", timeout=DEADLINE).__enter__()
        done.result(DEADLINE)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert_free(a)
    if not granted:
        holding.leave(scope)
    assert_free(a, b)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_an_error_in_a_scope_lets_those_in_line_in(kind):
    a, b = buffers(2)
    failing, waiting = actors(2)
    entered = threading.Event()
    go_on = threading.Event()

    def fail():
        with getattr(rlx, kind)([a, b], "numpy"):
            entered.set()
            assert go_on.wait(DEADLINE)
            raise KeyError("mine")

    failed = failing.start(fail)
    assert entered.wait(DEADLINE)
    scope = rlx.write([a, b], "numpy")
    got = waiting.ask(scope)
    go_on.set()
    with pytest.raises(KeyError, match="mine"):
        failed.result(DEADLINE)
    got.result(DEADLINE)
    waiting.leave(scope)
    assert_free(a, b)


def test_those_in_line_for_a_closed_buffer_get_an_error():
    a, b = buffers(2)
    holding, closing, *others = actors(7)
    scope = b.write("numpy")
    holding.enter(scope)
    closed = closing.start(b.close)
    until(lambda: in_line(b) == 1)
    futures = [
        others[0].ask(b.write("numpy")),
        others[1].ask(b.read("numpy")),
        others[2].ask(rlx.write([a, b], "numpy")),
        others[3].ask(rlx.read([b, a], "numpy", timeout=DEADLINE)),
        others[4].start(b.copy_from, np.ones(b.shape, np.float32)),
    ]
    until(lambda: in_line(b) == 6)
    holding.leave(scope)
    closed.result(DEADLINE)
    for future in futures:
        with pytest.raises(rlx.ClosedHandleError):
            future.result(DEADLINE)
    assert_free(a)
    assert b._access.waiting == []


def test_a_forked_child_starts_without_a_line():
    must_run(
        textwrap.dedent(
            """
            import os, signal, threading, time, warnings
            warnings.simplefilter("ignore")
            import rlx_driver as rlx
            from rlx_driver import _locks
            a, b = rlx.Buffer.zeros(4), rlx.Buffer.zeros(4)
            with b.write("numpy"):
                def pair():
                    with rlx.write([a, b], "numpy", timeout=20) as arrays:
                        for n in arrays:
                            n += 1
                thread = threading.Thread(target=pair, daemon=True)
                thread.start()
                end = time.monotonic() + 20
                while not _locks.sleepers:
                    assert time.monotonic() < end
                pid = os.fork()
                if pid == 0:
                    signal.alarm(20)
                    assert not _locks.sleepers and not _locks._kept
                    for x in (a, b):
                        assert not x._access.waiting
                        try:
                            x.write("numpy").__enter__()
                        except rlx.StaleViewError as error:
                            assert "parent" in str(error)
                        else:
                            os._exit(1)
                    fresh = rlx.Buffer.zeros(3)
                    with fresh.write("numpy", timeout=1):
                        pass
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            thread.join(20)
            assert a.numpy()[0] == b.numpy()[0] == 1
            """
        )
    )


# --- all at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["numpy", pytest.param("jax", marks=pytest.mark.jax)])
def test_many_threads_with_random_scopes(framework):
    all_buffers = [rlx.Buffer.zeros(8) for _ in range(4)]
    guard = threading.Lock()
    writing = dict.fromkeys(all_buffers, 0)
    reading = dict.fromkeys(all_buffers, 0)
    written = dict.fromkeys(all_buffers, 0)
    wrong = []
    counts = {"scopes": 0, "late": 0, "circles": 0}
    for b in all_buffers:
        b.update(plus_one, framework=framework)
        written[b] += 1

    @contextlib.contextmanager
    def inside(writes, reads):
        """Note who is where, and look for those who must not be."""
        with guard:
            for b in writes:
                wrong.extend([b] * (writing[b] or reading[b]))
                writing[b] += 1
            for b in reads:
                wrong.extend([b] * writing[b])
                reading[b] += 1
            counts["scopes"] += 1
        yield
        with guard:
            for b in writes:
                writing[b] -= 1
                written[b] += 1
            for b in reads:
                reading[b] -= 1

    def one(rng, depth):
        some = rng.sample(all_buffers, rng.choice((1, 1, 2, 3)))
        timeout = rng.choice((None, None, 0, 0.001))
        action = rng.choice(("read", "write", "update", "update"))
        if action == "update" and len(some) == 1:
            some[0].update(plus_one, framework=framework)
            with guard:
                written[some[0]] += 1
            return
        if action == "update":
            state, *arguments = some

            def step(x, *_):
                with inside([state], arguments):
                    x += 1

            state.update(step, *arguments, framework="numpy")
            return
        scope = getattr(rlx, action)(some, "numpy", timeout=timeout)
        with scope as arrays, inside(*((some, ()) if action == "write" else ((), some))):
            values = [n[0].item() for n in arrays]
            if action == "write":
                for n in arrays:
                    n += 1
            if rng.random() < 0.3:
                time.sleep(0.0002)  # others come in between
                if depth:
                    tried(rng, depth - 1)
            for n, value in zip(arrays, values, strict=True):
                if (n != value + (action == "write")).any():
                    wrong.append("torn")

    def tried(rng, depth):
        try:
            one(rng, depth)
        except rlx.AccessTimeoutError:
            counts["late"] += 1
        except rlx.StaleViewError as error:
            counts["circles"] += "never end" in str(error)

    def many(seed):
        rng = random.Random(seed)
        end = time.monotonic() + 1.5
        for _ in itertools.takewhile(lambda _: time.monotonic() < end, range(1200)):
            tried(rng, 2)

    futures = [actor.start(many, seed) for seed, actor in enumerate(actors(8))]
    assert not wait(futures, DEADLINE).not_done, "some are stuck"
    results(futures)
    assert wrong == []
    assert counts["scopes"] > 100
    for b in all_buffers:
        assert b.numpy().tolist() == [written[b]] * b.shape[0]
    assert_free(*all_buffers)
