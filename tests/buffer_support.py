"""Helpers of the tests of buffers: addresses, slow readers, other threads, other processes."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np

import rlx_driver as rlx

SIDE = 512
CHAIN = 40

x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def address(array):
    """Give the address of an array of any of the three frameworks."""
    if isinstance(array, np.ndarray):
        return array.__array_interface__["data"][0]
    if isinstance(array, jax.Array):
        return jax.block_until_ready(array).unsafe_buffer_pointer()
    return array.data_ptr()


def ones(side=SIDE):
    """Make a Buffer that `slow_read` can take."""
    return rlx.Buffer.from_array(np.ones((side, side), np.float32), copy=True)


@jax.jit
def slow_read(x):
    """Read a matrix of ones again and again; ones as long as nobody writes to it meanwhile."""
    y = x
    for _ in range(CHAIN):
        y = (y @ x) * (1 / SIDE)
    return y


def warm_up():
    """Compile `slow_read`, so that dispatching it takes no time."""
    jax.block_until_ready(slow_read(jnp.ones((SIDE, SIDE))))


def enter_and_leave(scope):
    """Enter a scope, if that is possible, and leave it at once."""
    with scope:
        pass


def in_thread(function, *args, **kwargs):
    """Call a function in another thread and give its result, or raise its error here."""
    return start(function, *args, **kwargs).result(timeout=60)


def start(function, *args, **kwargs):
    """Call a function in another thread; a Future of the result."""
    future = Future()

    def run():
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def reader_in_flight(array):
    """Dispatch a slow reader from another thread: one thread's programs run in order anyway."""
    return in_thread(slow_read, array)


def is_intact(result):
    """Tell whether a slow reader saw nothing but ones."""
    return bool((np.asarray(result) == 1).all())


def ever(trial, attempts=10):
    """Tell whether a trial is ever true: a positive control may be unlucky, not always."""
    return any(trial() for _ in range(attempts))


def run_python(code, timeout=120, **environment):
    """Run a program in a new interpreter; its output, or an error with what it said."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout
