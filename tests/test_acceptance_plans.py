"""Plans, live ranges and arenas as an outsider sees them: public names, own checks."""

from __future__ import annotations

import bisect
import copy
import operator
import pickle
import random

import numpy as np
import pytest

import rlx_driver as rlx
from plan_support import trace
from rlx_driver import Interval

torch = pytest.importorskip("torch")

nn, functional = torch.nn, torch.nn.functional


def peak(intervals, alignment=1):
    """Give the peak of the sum of the sizes alive, by a walk over the steps."""
    change = {}
    for _, size, first, last in intervals:
        rounded = -(-size // alignment) * alignment
        change[first] = change.get(first, 0) + rounded
        change[last + 1] = change.get(last + 1, 0) - rounded
    now = most = 0
    for step in sorted(change):
        now += change[step]
        most = max(most, now)
    return most


def assert_sound(intervals, plan, alignment=64):
    """Look at neighbours in a list of what is alive, in the order of offsets."""
    events = []
    for node, size, first, last in intervals:
        offset = plan.offset(node)
        assert offset >= 0
        assert offset % alignment == 0
        assert offset + size <= plan.size
        if size:
            events += [(first, 1, offset, size), (last + 1, 0, offset, size)]
    alive = []
    for _, begins, offset, size in sorted(events):
        at = bisect.bisect_left(alive, (offset, size))
        if not begins:
            assert alive.pop(at) == (offset, size)
            continue
        assert at == len(alive) or offset + size <= alive[at][0]
        assert at == 0 or sum(alive[at - 1]) <= offset
        alive.insert(at, (offset, size))


def chain(count, seed=0):
    """Layers one after the other: a slot meets only the one before and the one behind."""
    sizes = random.Random(seed)
    return [(n, 64 * sizes.randrange(1, 5000), n, n + 1) for n in range(count)]


def blocks(layers, seed=0):
    """Forward, backward in reverse, then an optimizer; sizes of a transformer, odd ones too."""
    pick = random.Random(seed)
    sizes = [256 * d * n for d in (256, 512, 1024) for n in (1, 16)] + [4, 260, 3072]
    work, saved, grads, step = [], [], [], 0
    for _ in range(layers * 30):
        size = pick.choice(sizes)
        if pick.random() < 0.4:
            saved.append((size, step))
        else:
            work.append((len(work), size, step, step + pick.choice([1, 1, 1, 2, 3])))
        step += 1
    for size, first in reversed(saved):
        work.append((len(work), size, first, step + 1))
        work.append((len(work), pick.choice(sizes), step, step + pick.choice([1, 2])))
        if pick.random() < 0.25:
            grads.append((pick.choice(sizes), step))
        step += 1
    for size, first in grads:
        work.append((len(work), size, first, step + 2))
        work.append((len(work), size, step, step + 1))
        step += 1
    return work


# plans


@pytest.mark.parametrize("count", [2, 100, 3000, 10_000])
@pytest.mark.parametrize("alignment", [1, 64])
def test_a_chain_of_layers_is_laid_from_both_ends(count, alignment):
    work = chain(count)
    plan = rlx.plan_memory(work, alignment=alignment)
    assert_sound(work, plan, alignment)
    assert plan.size == plan.lower_bound == peak(work)
    assert plan.optimal


def test_a_chain_that_grows_above_its_peak_of_odd_sizes():
    work = [(n, size - n % 3, first, last) for n, size, first, last in chain(4000, seed=1)]
    plan = rlx.plan_memory(work)
    assert_sound(work, plan)
    assert peak(work) <= plan.lower_bound <= peak(work, 64)
    assert plan.ratio <= 1.005


@pytest.mark.parametrize("layers", [4, 60, 150])
def test_forward_backward_and_optimizer_come_within_half_a_percent(layers):
    work = blocks(layers, seed=layers)
    plan = rlx.plan_memory(work)
    assert_sound(work, plan)
    assert plan.size <= 1.005 * peak(work, 64)


def test_chains_around_pins_and_alignments_of_their_own():
    work = chain(500)
    rich = [Interval(*each, alignment=256 if each[0] % 3 else None) for each in work]
    rich += [Interval("table", 1000, 9, 9, offset=8192)]
    plan = rlx.plan_memory(rich, alignment=16)
    assert_sound([*work, ("table", 1000, 9, 9)], plan, 16)
    assert plan.offset("table") == 8192
    assert all(plan.offset(n) % 256 == 0 for n in range(500) if n % 3)


def test_a_long_chain_of_aliases_given_backwards_is_one_slot():
    views = [Interval(n, 64, n, n, alias_of=n - 1) for n in range(1, 20_000)]
    plan = rlx.plan_memory([*reversed(views), Interval(0, 64, 0, 0), ("late", 64, 19_999, 20_000)])
    assert plan.root(19_999) == 0
    assert plan.life(0) == (0, 19_999)
    assert plan.size == 128


def test_a_plan_travels_and_is_checked_on_arrival():
    x = Interval("x", 4096, 0, 3, dtype="bf16", shape=(2048,))
    work = [x, ("y", 100, 3, 4), ("z", 8, 5, 5)]
    plan = rlx.plan_memory(work, alignment=128, capacity=9000)
    for other in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan), copy.copy(plan)):
        assert other.offsets.tolist() == plan.offsets.tolist()
        assert other.report() == plan.report()
        assert other.interval("x") == plan.interval("x")
        assert (other.alignment, other.capacity, other.optimal) == (128, 9000, plan.optimal)
        assert not other.offsets.flags.writeable
        other.validate()
    make, state = plan.__reduce__()[:2]
    broken = [value * 0 if isinstance(value, np.ndarray) else value for value in state]
    with pytest.raises(rlx.PlanError, match="share memory"):
        make(*broken)


def test_the_clock_of_a_time_limit_runs_while_intervals_are_read(monkeypatch):
    """Once reading has taken all the time, only the first sweep is left."""
    from rlx_driver import _plan_search, plan

    now = [0.0]

    def clock():
        now[0] += 0.01
        return now[0]

    def slow():
        yield from trace("minimalloc_B")
        now[0] += 10

    monkeypatch.setattr(plan.time, "monotonic", clock)
    tries = []
    offer = _plan_search.Search.offer
    monkeypatch.setattr(
        _plan_search.Search, "offer", lambda *args: tries.append(args[2]) or offer(*args)
    )
    rlx.plan_memory(slow(), time_limit=5)
    assert len(tries) == 1


# live ranges against a run of the program


def run_and_measure(module, args):
    """Run a graph with real tensors; give the peak of its storages, from first to last use."""
    nodes = list(module.graph.nodes)
    last = {used: step for step, node in enumerate(nodes) for used in node.all_input_nodes}
    given = iter(torch.utils._pytree.tree_leaves(args))
    values, kept, size, lives, whole = {}, [], {}, {}, set()
    for step, node in enumerate(nodes):
        if node.op == "output":
            values[node] = [values[each] for each in node.all_input_nodes]
        elif node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(module)
        else:
            look_up = values.__getitem__
            values[node] = node.target(
                *torch.fx.map_arg(node.args, look_up), **torch.fx.map_arg(node.kwargs, look_up)
            )
        for tensor in torch.utils._pytree.tree_leaves(values[node]):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            kept.append(storage)
            key = storage._cdata
            size[key] = storage.nbytes()
            first, end = lives.get(key, (step, step))
            lives[key] = first, max(end, step, last.get(node, step))
            if node.op in ("placeholder", "get_attr", "output"):
                whole.add(key)
    ends = (0, len(nodes) - 1)
    return peak([(key, size[key], *(ends if key in whole else lives[key])) for key in size])


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        state = (x.new_zeros(x.shape[0], 16), x.new_zeros(x.shape[0], 16))
        steps = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            steps.append(self.out(state[0]))
        return torch.stack(steps, 1)


class Skips(nn.Module):
    """A U-Net of two levels."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.up = nn.GroupNorm(4, 16), nn.ConvTranspose2d(16, 8, 2, 2)
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        skip = functional.silu(self.down(x))
        x = functional.silu(self.norm(self.middle(functional.max_pool2d(skip, 2))))
        return self.last(torch.cat([self.up(x), skip], 1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return functional.relu(self.norm(self.second(functional.relu(self.first(x)))) + x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.project, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        batch, length, _ = x.shape
        split = self.project(self.norm(x)).view(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4)
        weights = (split[0] @ split[1].transpose(-1, -2)).softmax(-1)
        mixed = (weights @ split[2]).transpose(1, 2).reshape(batch, length, 16)
        return x + functional.gelu(self.out(mixed))


def with_adamw(model):
    """A training step: loss, gradients, and AdamW written out."""
    parameters = list(model.parameters())

    def step(means, squares, x, y):
        loss = (model(x) - y).square().mean()
        new = []
        grads = torch.autograd.grad(loss, parameters)
        for p, g, m, v in zip(parameters, grads, means, squares, strict=True):
            m, v = m.mul(0.9).add(g, alpha=0.1), v.mul(0.999).addcmul(g, g, value=0.001)
            new.append((p.detach() * 0.9999 - 1e-3 * m / (v.sqrt() + 1e-8), m, v))
        return loss, new

    zeros = [torch.zeros_like(p) for p in parameters]
    return step, [each.clone() for each in zeros], zeros


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Cell, (2, 5, 8)),
        (Skips, (1, 3, 8, 8)),
        (Residual, (2, 3, 8, 8)),
        (Attention, (2, 6, 16)),
    ],
)
def test_the_peak_of_a_training_step_is_that_of_a_run(model, shape):
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.manual_seed(0)
    model, x = model(), torch.randn(shape)
    step, means, squares = with_adamw(model)
    args = (means, squares, x, torch.zeros_like(model(x)))
    traced = make_fx(step)(*args)
    measured = run_and_measure(traced, args)
    for program in (step, traced):
        plan = rlx.plan_memory(rlx.intervals_from_fx(program, *args), alignment=1)
        assert plan.lower_bound == measured
    inference = rlx.plan_memory(rlx.intervals_from_fx(model, x), alignment=1)
    assert inference.lower_bound < measured


# arenas, by what lies in the bytes


@pytest.mark.parametrize("backend", [None, "jax"])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f8_e4m3fn", "i8", "i16", "f64", "bool"])
def test_what_is_too_long_is_cut_off_and_neighbours_keep_their_bytes(backend, dtype):
    if backend:
        pytest.importorskip(backend)
    plan = rlx.plan_memory([(n, 40 + n, 0, 9) for n in range(5)], alignment=8)
    with rlx.Arena(plan, backend=backend) as arena:
        for n in range(5):
            arena.write(n, np.full(40 + n, 0xAA, np.uint8))
        room = 42 // rlx.dtype(dtype).itemsize
        assert arena.write_input_f32(2, dtype, np.ones(1000, np.float32)) == room
        assert arena.read_output_f32(2, dtype, room).tolist() == [1.0] * room
        with pytest.raises(rlx.ShapeError):
            arena.read_output_f32(2, dtype, room + 1)
        assert all((arena.read(n) == 0xAA).all() for n in (0, 1, 3, 4))


def test_an_arena_of_a_plan_that_travelled_serves_three_frameworks():
    jax = pytest.importorskip("jax")
    work = [Interval("x", 4096, 0, 1, dtype="f32", shape=(32, 32)), ("y", 100, 1, 2)]
    plan = pickle.loads(pickle.dumps(rlx.plan_memory(work)))
    values = np.arange(1024, dtype=np.float32).reshape(32, 32)
    with rlx.Arena(plan) as arena:
        for given in (values, torch.from_numpy(values), jax.numpy.asarray(values)):
            arena["x"] = given * 2
            slot = arena.buffer("x")
            assert slot.numpy().ctypes.data == slot.torch().data_ptr() == slot.address
            assert slot.jax().unsafe_buffer_pointer() == arena.address + arena.byte_offset("x")
            np.testing.assert_array_equal(arena.read("x"), values * 2)
