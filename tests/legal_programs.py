"""Programs that keep to the contract of the driver, in which the race checker may find nothing."""

import contextlib
import functools
import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import rlx_driver as rlx
from buffer_support import reader_in_flight, start, warm_up

WRITERS = ["numpy", "torch"]


def plus_one(x):
    return x + 1


donating = jax.jit(plus_one, donate_argnums=0)
summed = jax.jit(jnp.sum)


def filled(value=1.0, shape=(4, 16)):
    return rlx.Buffer.from_array(np.full(shape, value, np.float32), copy=True)


class Holder:
    """Something that keeps a view where no frame has it."""


def read_then_write():
    b = filled()
    n, t = b.numpy(), b.torch()
    for i in range(5):
        assert float(summed(b.jax())) == b.numpy().sum()
        n[0] = i
        t[1] = i


def let_go_then_write():
    b = filled()
    n = b.numpy()
    j = b.jax()
    float(j.sum())
    del j
    n[0] = 5
    j = b.jax()
    j = jnp.asarray(j + 1)
    n[0] = 6


def let_go_in_a_function():
    b = filled()

    def look():
        views = {"a": [b.jax()], "b": b[:2].jax()}
        return float(views["a"][0].sum() + views["b"].sum())

    for i in range(3):
        look()
        b.numpy()[...] = i


def assign_from_its_own_view():
    b = filled()
    n, t = b.numpy(), b.torch()
    n[:] = b.jax() * 2
    n[0] = float(b.jax()[0, 0])
    t.copy_(torch.from_dlpack(b.jax() + 1))
    n[:] = b.jax()
    assert n[0, 0] == 3


def scopes_while_a_view_is_held():
    b = filled()
    n = b.numpy()
    for framework in WRITERS:
        held = b.jax()
        with b.write(framework) as view:
            view[0] = 3
        n[1] = 4  # the JAX view is dead, and its holder would get an error
        view[2] = 5
        assert held.is_deleted()


def every_write_of_the_driver_while_a_view_is_held():
    b, other = filled(), filled(3)
    n, t = b.numpy(), b.torch()
    for write in (
        lambda: b.update(plus_one),
        lambda: b.update(plus_one, ordered=False),
        lambda: b.update(jax.jit(plus_one)),
        lambda: b.update(lambda x: x.add_(1), framework="torch"),
        lambda: b.update(plus_one, framework="numpy"),
        lambda: b.copy_from(np.full(b.shape, 7, np.float32)),
        lambda: b.copy_from(other),
        lambda: b.copy_from(b.jax() + 1),
        lambda: b.copy_from(b.numpy()[::-1]),
        lambda: b.copy_from(torch.ones(4, 16, dtype=torch.float64), cast=True),
        lambda: b.__setitem__(..., 4.0),
        lambda: b.__setitem__(0, 5.0),
        lambda: b.__setitem__(slice(2), np.ones((2, 16), "f4")),
        lambda: b[1].update(plus_one),
        lambda: b.view("u8").__setitem__(0, 3),
        lambda: rlx.commit(b, np.full(b.shape, 2, np.float32)),
        lambda: rlx.commit(b, donating(b.jax())),
        lambda: rlx.commit(b, b.jax()),
        lambda: rlx.update({"b": b, "o": other}, lambda s: {"b": s["o"], "o": s["b"]}),
        lambda: b.update(lambda x, y: x + y, other),
        lambda: b.update(lambda x, y: x + y, other.jax()),
        lambda: b.update(lambda x, y: x + y, other, framework="torch"),
        lambda: other.update(lambda x, y: (y * 2, x), b, has_aux=True),
    ):
        held, part = b.jax(), b[:2].jax()
        write()
        n[0] += 0
        assert b.jax() is not None
        t[0] += 0
    del held, part


def parts():
    b = filled()
    left, right = b[:2], b[2:]
    held = left.jax()
    right.numpy()[...] = 3  # other bytes
    b.numpy()[3] = 4
    assert float(held.sum()) == 32
    right.update(plus_one)
    left.numpy()[0] = 1
    held = left.jax(), right.jax(), b.jax(), b.view("i32").jax()
    b.update(plus_one)
    b.numpy()[...] = 0
    new = donating(left.jax())
    right.numpy()[...] = 1
    rlx.commit(left, new)
    rlx.commit([left, right], [donating(left.jax()), donating(right.jax())])
    with rlx.write([left, right], "numpy") as (a, c):
        a[...] = c
    del held


def trees():
    state = {"w": filled(), "m": [filled(0)]}
    n = rlx.views(state, "numpy")
    held = rlx.views(state, "jax")
    rlx.update(state, lambda s: {"w": s["w"] - s["m"][0], "m": [s["m"][0] + 1]})
    n["w"][0] = 3
    with rlx.read(state, "jax") as s:
        float(s["w"].sum())
    del s
    n["m"][0][...] = 2
    with rlx.write(state, "torch") as s:
        s["w"].zero_()
    rlx.commit(state, {"w": np.zeros((4, 16), "f4"), "m": [torch.ones(4, 16)]})
    rlx.commit(state, rlx.views(state, "jax"))
    n["w"][0] = 3
    del held


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, batch):
    grad = batch.mean() * jnp.ones_like(state["w"])
    return {"w": state["w"] - 0.1 * grad, "m": state["m"] + grad}, grad.sum()


def drop_in_training():
    state = {"w": filled(), "m": filled(0)}
    n = rlx.views(state, "numpy")
    with rlx.no_copies():
        for i in range(4):
            new, loss = train_step(rlx.views(state, "jax"), jnp.ones(4))
            rlx.commit(state, new)
            if i % 2:
                float(loss), n["w"].sum(), state["m"].torch().sum()
    del new
    n["w"][...] = 0
    views = rlx.views(state, "jax")
    for _ in range(3):
        views, loss = train_step(views, jnp.ones(4))
    rlx.commit(state, views)
    del views
    n["w"][...] = 0


def training_with_torch():
    weight, moment = filled(), filled(0)
    parameter = torch.nn.Parameter(weight.torch())
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for _ in range(3):
        moment.update(lambda m, w: 0.9 * m + w, weight)
        loss = (parameter * moment.torch()).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(summed(weight.jax()))
        with torch.no_grad():
            parameter.mul_(0.5)
    weight.update(plus_one)


def decode_loop():
    kv = rlx.BufferHandle("kv", (2, 8, 16), "bf16")
    n, t = kv.numpy(), kv.torch()

    def append(cache, row, position):
        return jax.lax.dynamic_update_slice(cache, row[:, None, :], (0, position, 0))

    attend = jax.jit(lambda cache, q: jnp.einsum("hsd,hd->hs", cache, q))
    with rlx.no_copies():
        for position in range(8):
            kv.update(append, jnp.ones((2, 16), jnp.bfloat16), position)
            scores = attend(kv.jax(), jnp.ones((2, 16), jnp.bfloat16))
            assert scores.shape == (2, 8)
            assert t[:, position].sum() == 32
            float(scores[0, 0])
            n[:, position] *= 2  # evict, scale: plain writes between steps
    kv.close()


def unordered_chain():
    b = filled(0)
    n = b.numpy()
    for _ in range(5):
        b.update(plus_one, ordered=False)
    seen = b.jax()
    assert float(seen[0, 0]) == 5
    b.update(plus_one, ordered=False)
    b[:2].update(plus_one, ordered=False)
    assert b.numpy()[0, 0] == 7
    del seen
    n[0] = 0


def exceptions_in_blocks():
    b, c = filled(), filled()
    n = b.numpy()
    held = b.jax()
    with pytest.raises(ZeroDivisionError), b.write("numpy") as w:
        w[0] = 1 / 0
    n[0] = 4
    with pytest.raises(ZeroDivisionError), b.read("jax"):
        1 / 0  # noqa: B018
    n[0] = 5

    def broken(x, y):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        c.update(broken, b)
    with pytest.raises(ZeroDivisionError):
        b.update(broken, c, framework="numpy")
    n[0] = 6
    with pytest.raises(rlx.ShapeError):
        b.update(lambda x: x[0])
    with pytest.raises(rlx.ShapeError):
        rlx.commit(b, np.zeros(3, "f4"))
    n[0] = 7
    del held


def failing_program():
    b = filled()

    def callback(_):
        raise ArithmeticError

    def failing(x):
        return jax.pure_callback(callback, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    held = b.jax()
    for use in (lambda: b.update(failing), b.jax, b.numpy):
        with contextlib.suppress(rlx.UpdateFailedError):
            use()
    b[...] = 0.0
    b.numpy()[0] = 1
    assert float(b.jax().sum()) == 16
    del held


def refused_fence():
    b = filled()
    n = b.numpy()
    held = b.jax()
    alias = np.asarray(held)
    with pytest.raises(rlx.ZeroCopyError), b.write("numpy"):
        pass
    del alias
    with b.write("numpy") as w:
        w[0] = 9
    n[0] = 8


def lost_donation_that_is_overwritten():
    b = filled()
    donating(b.jax()).block_until_ready()
    with pytest.raises(rlx.StaleViewError):
        b.jax()
    b.copy_from(np.zeros(b.shape, "f4"))
    donating(b.jax())
    b[...] = 3.0
    assert b.numpy().sum() == 192
    donating(b.jax())
    rlx.commit(b, torch.zeros(4, 16))


def garbage():
    b = filled()
    n = b.numpy()
    for i in range(4):
        cycle = Holder()
        cycle.me, cycle.view = cycle, b.jax()
        if i == 3:
            cycle.more = [b[:2].jax(), b.jax()]
        del cycle  # let go; the collector has not come by yet
        n[0] = i + 2
        if i == 1:
            gc.collect()
        elif i == 2:
            b.jax()
        else:
            b.update(plus_one)
    cycle = Holder()
    cycle.me, cycle.view = cycle, b.jax()
    del cycle
    n[0] = 9


def garbage_without_collector():
    gc.disable()
    try:
        garbage()
    finally:
        gc.enable()


def closing():
    with rlx.BufferHandle("kv", 64) as kv:
        n, held = kv.numpy(), kv.jax()
    n[0] = 3  # the handle is gone, the memory is ours
    b = filled()
    n, part = b.numpy(), b[1].jax()
    b.close()
    n[...] = 3
    region = rlx.HandleRegion("cpu")
    a = region.create({"a": (64, "f32")})["a"]
    view = a.jax(), a.numpy()
    region.close()
    view[1][0] = 5
    del held, part


def many_readers_in_threads():
    b = filled()
    n = b.numpy()
    turn = threading.Lock()

    def work(i):
        for k in range(6):
            if k % 3 == i % 3:
                b.update(plus_one, ordered=bool(k % 2))
            elif k % 3 == 1:
                with b.read("jax") as j:
                    float(summed(j))
                del j
            else:
                with b.write("numpy") as w:
                    w += 1
            with turn, b.write("torch"):
                pass
            with contextlib.suppress(RuntimeError, ValueError):  # another thread wrote meanwhile
                float(summed(b.jax()))

    for future in [start(work, i) for i in range(4)]:
        future.result(timeout=120)
    n[0] = 0


def reader_under_way():
    warm_up()
    b = rlx.Buffer.from_array(np.ones((512, 512), np.float32), copy=True)
    out = reader_in_flight(b.jax())
    with b.write("numpy") as n:
        n[...] = 7
    assert bool((np.asarray(out) == 1).all())
    n[0] = 3


def callbacks():
    a, b = filled(1), filled(2)

    def look(x):
        return x + b.numpy()[0, 0] + float(b.jax()[0, 0])

    def step(x):
        return jax.pure_callback(look, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    a.update(step)
    assert a.numpy()[0, 0] == 5
    b.numpy()[0] = 4


def modes_of_torch():
    b = filled()
    with torch.no_grad():
        b.torch().add_(1)
    with torch.inference_mode():
        float(b.jax().sum())
        b.torch().add_(1)
    weight = torch.nn.Parameter(b.torch())
    weight.data.zero_()
    assert float(b.jax().sum()) == 0


def odd_sizes():
    empty, scalar = rlx.Buffer.zeros((0, 4)), rlx.Buffer.zeros(())
    for b in (empty, scalar):
        held = b.jax()
        b.update(plus_one)
        b.numpy()[...] = 3
        del held
        rlx.commit(b, donating(b.jax()))
        b.numpy()[...] = 4
    held = empty.jax()
    empty.numpy()[...] = 3
    del held


def new_memory_at_an_old_address():
    for _ in range(20):
        b = filled()
        held = b.jax()
        b.update(plus_one)
        del b
        b = filled(3)
        b.numpy()[0] = 7
    del held


def handles_made_and_used_inside():
    kv = rlx.BufferHandle("late", (4, 16))
    assert not kv.is_allocated
    kv.numpy()[0] = 1
    float(kv.jax().sum())
    kv.torch()[0] = 2
    kv.update(plus_one)
    kv.close()


def steps_that_swap_and_keep():
    a, b = filled(1), filled(2)
    pair = [a, b]
    for _ in range(3):
        held = rlx.views(pair, "jax")
        rlx.update(pair, lambda t: [t[1], t[0]])
        rlx.update(pair, lambda t: [t[1], t[0]], framework="numpy")
        assert held[0].is_deleted()
    new = jax.jit(lambda t: [t[1], t[0]], donate_argnums=0)(rlx.views(pair, "jax"))
    rlx.commit(pair, new)
    rlx.commit(pair, rlx.views(pair[::-1], "jax"))
    a.numpy()[0] = 8


def arrays_that_jax_passes_on():
    b = filled()
    n = b.numpy()
    same = jax.jit(lambda x: x)(b.jax())
    b.update(plus_one)
    del same
    n[0] = 3
    x, y = jax.device_put((b.jax(), b.jax()))
    del x, y
    n[0] = 4
    jax.block_until_ready(b.jax())
    n[0] = 5
    repr(b.jax()), hash(b), b.jax().tolist()
    n[0] = 6
    jax.vmap(jnp.sum)(b.jax()), jax.grad(lambda x: (x * b.torch().sum().item()).sum())(b.jax())
    n[0] = 7


LEGAL = [
    read_then_write,
    let_go_then_write,
    let_go_in_a_function,
    assign_from_its_own_view,
    scopes_while_a_view_is_held,
    every_write_of_the_driver_while_a_view_is_held,
    parts,
    trees,
    drop_in_training,
    training_with_torch,
    decode_loop,
    unordered_chain,
    exceptions_in_blocks,
    failing_program,
    refused_fence,
    lost_donation_that_is_overwritten,
    garbage,
    garbage_without_collector,
    closing,
    many_readers_in_threads,
    reader_under_way,
    callbacks,
    modes_of_torch,
    odd_sizes,
    new_memory_at_an_old_address,
    handles_made_and_used_inside,
    steps_that_swap_and_keep,
    arrays_that_jax_passes_on,
]
