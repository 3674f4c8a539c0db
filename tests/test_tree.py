"""Trees of buffers: structure kept, all or nothing, results of a user's own program taken over."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest

import rlx_driver as rlx

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402

from buffer_support import (  # noqa: E402
    address,
    enter_and_leave,
    in_thread,
    is_intact,
    ones,
    reader_in_flight,
    run_python,
    slow_read,
    warm_up,
)

pytestmark = [
    pytest.mark.jax,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::rlx_driver.errors.RecompilationWarning"),
]

Layer = namedtuple("Layer", ["weight", "bias"])


def filled(value, shape=64):
    return rlx.Buffer.from_array(np.full(shape, value, np.float32), copy=True)


def nested():
    return {
        "layers": [Layer(filled(1), filled(2)), Layer(filled(3), None)],
        "pair": (filled(4), {"deep": filled(5)}),
        "none": None,
        "empty": [],
    }


TREES = {
    "one": lambda: filled(1),
    "dict": lambda: {"b": filled(1), "a": filled(2)},
    "list": lambda: [filled(1), filled(2)],
    "tuple": lambda: (filled(1), filled(2)),
    "namedtuple": lambda: Layer(filled(1), filled(2)),
    "ordered": lambda: OrderedDict(b=filled(1), a=filled(2)),
    "nested": nested,
    "nothing": dict,
}

leaves = jax.tree_util.tree_leaves
structure = jax.tree_util.tree_structure
FRAMEWORKS = ["numpy", "torch", "jax"]


def values(tree):
    return [b.numpy().flat[0].item() for b in leaves(tree)]


def copied(leaf):
    return leaf.numpy().copy() if isinstance(leaf, rlx.Buffer) else leaf


def plus_one(tree):
    return jax.tree_util.tree_map(lambda x: x + 1, tree)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
class TestStructure:
    def test_views_keep_it_and_are_the_memory(self, make, framework):
        tree = make()
        with rlx.no_copies():
            found = rlx.views(tree, framework)
        assert structure(found) == structure(tree)
        assert [address(a) for a in leaves(found)] == [b.address for b in leaves(tree)]
        assert all(
            b.array(framework) is a for a, b in zip(leaves(found), leaves(tree), strict=True)
        )

    def test_read_keeps_it(self, make, framework):
        tree = make()
        with rlx.read(tree, framework) as found:
            assert structure(found) == structure(tree)
            assert [address(a) for a in leaves(found)] == [b.address for b in leaves(tree)]
            for b in leaves(tree):
                with pytest.raises(rlx.AccessTimeoutError):
                    in_thread(lambda b=b: b.write("numpy", timeout=0).__enter__())
        assert all(b.epoch == 0 for b in leaves(tree))

    def test_write_keeps_it(self, make, framework):
        tree = make()
        if framework == "jax":
            with pytest.raises(rlx.ZeroCopyError, match="update"), rlx.write(tree, "jax"):
                pass
            return
        before = values(tree)
        with rlx.write(tree, framework) as found:
            assert structure(found) == structure(tree)
            for a in leaves(found):
                a += 1
            for b in leaves(tree):
                with pytest.raises(rlx.AccessTimeoutError):
                    in_thread(lambda b=b: b.read("numpy", timeout=0).__enter__())
        assert values(tree) == [v + 1 for v in before]
        assert all(b.epoch == 1 for b in leaves(tree))

    def test_update_keeps_it(self, make, framework):
        tree = make()
        before, where = values(tree), [b.address for b in leaves(tree)]

        def step(found, extra, *, scale):
            assert structure(found) == structure(tree)
            assert list(extra) == ["x"]
            return plus_one(found), scale

        aux = rlx.update(tree, step, {"x": 1}, framework=framework, has_aux=True, scale=2.0)
        assert float(aux) == 2
        assert values(tree) == [v + 1 for v in before]
        assert all(b.epoch == 1 for b in leaves(tree))
        assert [address(b.jax()) for b in leaves(tree)] == where

    def test_commit_takes_it(self, make, framework):
        tree = make()
        before = values(tree)
        new = jax.tree_util.tree_map(
            lambda b: rlx.exchange(b.numpy() + 1, framework, copy=True), tree
        )
        rlx.commit(tree, new)
        assert values(tree) == [v + 1 for v in before]
        assert all(b.epoch == 1 for b in leaves(tree))


def test_two_hundred_tree_updates_stay_in_place():
    tree = nested()
    held = rlx.views(tree, "torch")
    where = [b.address for b in leaves(tree)]
    with rlx.no_copies():
        for _ in range(200):
            rlx.update(tree, plus_one)
    assert values(tree) == [v + 200 for v in (1, 2, 3, 4, 5)]
    assert [float(t[-1]) for t in leaves(held)] == values(tree)
    assert [address(b.jax()) for b in leaves(tree)] == where


def test_a_registered_pytree_is_a_tree():
    @jax.tree_util.register_pytree_node_class
    class State:
        def __init__(self, m, v):
            self.m, self.v = m, v

        def tree_flatten(self):
            return (self.m, self.v), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    tree = State(filled(1), filled(2))
    assert isinstance(rlx.views(tree, "torch"), State)
    with rlx.write(tree, "numpy") as found:
        found.m += 1
    rlx.update(tree, lambda s: State(s.v, s.m))
    assert (tree.m.numpy()[0], tree.v.numpy()[0]) == (2, 2)


def test_handles_and_slices_are_leaves():
    base = filled(1, (4, 16))
    tree = {"h": rlx.BufferHandle("h", 16), "s": base[1], "t": base[2:]}
    with rlx.no_copies():
        rlx.update(tree, plus_one)
    assert base.numpy()[:, 0].tolist() == [1, 2, 2, 2]
    assert (tree["h"].numpy() == 1).all()


# --- what is refused -------------------------------------------------------------------------

CALLS = {
    "views": lambda tree: rlx.views(tree, "numpy"),
    "views jax": lambda tree: rlx.views(tree, "jax"),
    "read": lambda tree: enter_and_leave(rlx.read(tree, "numpy")),
    "write": lambda tree: enter_and_leave(rlx.write(tree, "torch")),
    "update": lambda tree: rlx.update(tree, plus_one),
    "numpy update": lambda tree: rlx.update(tree, plus_one, framework="numpy"),
    "commit": lambda tree: rlx.commit(tree, jax.tree_util.tree_map(copied, tree)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(
    "twice",
    [
        lambda b: [b, b],
        lambda b: {"x": b, "y": [b]},
        lambda b: [b, b[1]],
        lambda b: [b[0:2], b[1:3]],
        lambda b: [b[1], b[1]],
        lambda b: [b[0], b.view("u8")],
        lambda b: [b[2], b, b[0]],
        lambda b: [b[0:4], b[1], b[3]],
    ],
    ids=["same", "nested", "slice", "overlap", "equal", "view", "middle", "inside"],
)
def test_memory_that_stands_twice_is_refused(call, twice):
    b = filled(1, (4, 16))
    j = b.jax()
    with pytest.raises(rlx.DuplicateError, match=r"stands twice.*once"):
        call(twice(b))
    assert not j.is_deleted()
    assert b.epoch == 0
    with b.write("numpy", timeout=0):
        pass


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_disjoint_slices_are_allowed(call):
    b = filled(1, (4, 16))
    call([b[0], b[2:4], b[1]])


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("leaf", [1.0, "b", np.zeros(3), object()])
def test_a_leaf_that_is_no_buffer_is_refused(call, leaf):
    with pytest.raises(rlx.DTypeError, match="Buffers"):
        call([filled(1), leaf])


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("step", "error", "text"),
    [
        (lambda t: [t["a"], t["b"]], rlx.ShapeError, "structure"),
        (lambda t: {"a": t["a"]}, rlx.ShapeError, "structure"),
        (lambda t: (t, 1), rlx.ShapeError, "has_aux=True"),
        (lambda t: {"a": t["a"] + 1, "b": t["b"][:2]}, rlx.ShapeError, r"\(2,\)"),
        (lambda t: {"a": t["a"] + 1, "b": t["b"] > 0}, rlx.DTypeError, "bool"),
    ],
    ids=["list", "missing", "pair", "shape", "dtype"],
)
def test_a_wrong_result_changes_no_buffer(framework, step, error, text):
    tree = {"a": filled(1), "b": filled(2)}
    views = rlx.views(tree, "jax")
    with pytest.raises(error, match=text):
        rlx.update(tree, step, framework=framework)
    assert values(tree) == [1, 2]
    if framework == "jax":
        assert not any(j.is_deleted() for j in leaves(views))
        assert all(b.epoch == 0 for b in leaves(tree))
    rlx.update(tree, plus_one, framework=framework)
    assert values(tree) == [2, 3]


def test_an_undonated_tree_step_inside_no_copies_changes_nothing():
    tree = {"a": filled(1), "b": filled(2)}
    views = rlx.views(tree, "jax")
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError, match="no_copies"):
        rlx.update(tree, jax.jit(plus_one))
    assert values(tree) == [1, 2]
    assert not any(j.is_deleted() for j in leaves(views))
    with rlx.ledger.record() as r:
        rlx.update(tree, jax.jit(plus_one))
    assert values(tree) == [2, 3]
    assert r.counts.bytes_copied == 512
    assert all(b.epoch == 1 for b in leaves(tree))


def test_one_closed_buffer_stops_the_whole_tree():
    tree = [filled(1), filled(2)]
    j = tree[0].jax()
    tree[1].close()
    for call in CALLS.values():
        with pytest.raises(rlx.ClosedHandleError):
            call(tree)
    assert not j.is_deleted()
    assert (tree[0].numpy() == 1).all()
    assert tree[0].epoch == 0
    with tree[0].write("numpy", timeout=0):
        pass


def test_a_tree_write_fences_all_readers():
    warm_up()
    tree = {"a": ones(), "b": ones(), "c": filled(0)}
    results = [reader_in_flight(tree[name].jax()) for name in "ab"]
    with rlx.write(tree, "torch") as found:
        for t in found.values():
            t.zero_()
    assert all(map(is_intact, results))
    assert values(tree) == [0, 0, 0]


# --- commit ----------------------------------------------------------------------------------

train = jax.jit(
    lambda state, x: (jax.tree_util.tree_map(lambda s: s + x, state), x * 2), donate_argnums=0
)


def test_a_donated_result_is_taken_over_without_a_copy():
    tree = nested()
    held = leaves(rlx.views(tree, "numpy"))
    where = [b.address for b in leaves(tree)]
    with rlx.no_copies(), rlx.ledger.record() as r:
        for i in range(10):
            state, loss = train(rlx.views(tree, "jax"), 1.0)
            rlx.commit(tree, state)
            assert float(loss) == 2
            assert all(b.epoch == i + 1 for b in leaves(tree))
            now = leaves(rlx.views(tree, "jax"))
            assert all(a is b for a, b in zip(now, leaves(state), strict=True))
    assert r.counts.copies == 0
    assert values(tree) == [11, 12, 13, 14, 15]
    assert [float(n[0]) for n in held] == values(tree)
    assert [address(j) for j in leaves(rlx.views(tree, "jax"))] == where
    rlx.update(tree, plus_one)
    assert values(tree) == [12, 13, 14, 15, 16]


def test_an_untouched_view_given_back_changes_nothing():
    tree = {"a": filled(1), "b": filled(2)}
    views = rlx.views(tree, "jax")
    with rlx.no_copies():
        rlx.commit(tree, views)
    assert [b.epoch for b in leaves(tree)] == [0, 0]
    assert not any(j.is_deleted() for j in leaves(views))
    half = jax.jit(lambda x: x + 1, donate_argnums=0)
    with rlx.no_copies():
        rlx.commit(tree, {"a": half(views["a"]), "b": views["b"]})
    assert [tree[name].epoch for name in "ab"] == [1, 0]
    assert values(tree) == [2, 2]
    assert tree["b"].jax() is views["b"]


def test_the_own_torch_or_numpy_view_given_back_is_a_write():
    tree = {"a": filled(1), "b": filled(2)}
    with rlx.write(tree, "torch"):
        pass
    views = rlx.views(tree, "torch")
    views["a"] += 1
    rlx.commit(tree, views)
    assert values(tree) == [2, 2]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_foreign_values_are_copied_in(framework):
    tree = {"a": filled(1), "b": filled(2)}
    new = {
        name: rlx.exchange(np.full(64, v, np.float32), framework, copy=True)
        for name, v in (("a", 7), ("b", 8))
    }
    held = tree["a"].numpy()
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError, match="no_copies"):
        rlx.commit(tree, new)
    assert values(tree) == [1, 2]
    assert [b.epoch for b in leaves(tree)] == [0, 0]
    with rlx.ledger.record() as r:
        rlx.commit(tree, new)
    assert values(tree) == [7, 8]
    assert (held == 7).all()
    assert r.counts.bytes_copied == 512
    assert (np.asarray(new["a"]) == 7).all()


@pytest.mark.parametrize(
    ("new", "error", "text"),
    [
        (lambda a, b: {"a": a + 1}, rlx.ShapeError, "structure"),
        (lambda a, b: [a + 1, b], rlx.ShapeError, "structure"),
        (lambda a, b: {"a": a + 1, "b": b[:2]}, rlx.ShapeError, r"\(2,\)"),
        (lambda a, b: {"a": a + 1, "b": b.astype(np.int32)}, rlx.DTypeError, "int32"),
        (lambda a, b: {"a": a + 1, "b": object()}, rlx.UnknownFrameworkError, "object"),
        (lambda a, b: {"a": a + 1, "b": torch.ones(64, requires_grad=True)},
         rlx.ZeroCopyError, "detach"),
    ],
    ids=["missing", "list", "shape", "dtype", "foreign", "grad"],
)  # fmt: skip
@pytest.mark.parametrize("donated", [False, True])
def test_a_commit_that_does_not_fit_changes_nothing(new, error, text, donated):
    tree = {"a": filled(1), "b": filled(2)}
    if donated:
        a = jax.jit(lambda x: x + 1, donate_argnums=0)(tree["a"].jax())
        wrong = new(np.zeros(64, np.float32), np.zeros(64, np.float32))
        if isinstance(wrong, dict):
            wrong["a"] = a
    else:
        wrong = new(np.zeros(64, np.float32), np.zeros(64, np.float32))
    with pytest.raises(error, match=text):
        rlx.commit(tree, wrong)
    assert [x.epoch for x in leaves(tree)] == [0, 0]
    assert (tree["b"].numpy() == 2).all()
    if donated:
        rlx.commit(tree["a"], a)
    assert values(tree) == [2 if donated else 1, 2]


def test_one_value_in_no_copies_stops_the_adoption_of_the_others():
    tree = {"a": filled(1), "b": filled(2)}
    new = jax.jit(lambda x: x + 1, donate_argnums=0)(tree["a"].jax())
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError, match="no_copies"):
        rlx.commit(tree, {"a": new, "b": jnp.ones(64)})
    assert [b.epoch for b in leaves(tree)] == [0, 0]
    rlx.commit(tree, {"a": new, "b": jnp.ones(64)})
    assert values(tree) == [2, 1]


def test_an_alias_that_blocks_one_commit_blocks_all():
    tree = {"a": filled(1), "b": filled(2)}
    alias = np.asarray(tree["b"].jax())
    with pytest.raises(rlx.ZeroCopyError, match="alias"):
        rlx.commit(tree, {"a": np.full(64, 8, np.float32), "b": np.full(64, 9, np.float32)})
    assert values(tree) == [1, 2]
    assert [b.epoch for b in leaves(tree)] == [0, 0]
    del alias
    rlx.commit(tree, {"a": np.full(64, 8, np.float32), "b": np.full(64, 9, np.float32)})
    assert values(tree) == [8, 9]


def test_swapped_results_are_put_where_they_belong():
    tree = {"a": filled(1), "b": filled(2)}
    step = jax.jit(lambda t: {"a": t["a"] * 10, "b": t["b"] * 10}, donate_argnums=0)
    new = step(rlx.views(tree, "jax"))
    rlx.commit(tree, {"a": new["b"], "b": new["a"]})
    assert values(tree) == [20, 10]
    assert [address(b.jax()) for b in leaves(tree)] == [b.address for b in leaves(tree)]
    rlx.update(tree, plus_one)
    assert values(tree) == [21, 11]


def test_values_that_are_views_of_the_other_buffer_are_swapped():
    tree = {"a": filled(1), "b": filled(2)}
    views = rlx.views(tree, "numpy")
    rlx.commit(tree, {"a": views["b"].copy(), "b": views["a"].copy()})
    assert values(tree) == [2, 1]
    views = rlx.views(tree, "numpy")
    rlx.commit(tree, {"a": views["b"], "b": views["a"]})
    assert values(tree) == [1, 2]


def test_buffers_as_values():
    tree, other = {"a": filled(1), "b": filled(2)}, {"a": filled(7), "b": filled(8)}
    rlx.commit(tree, other)
    assert values(tree) == [7, 8]
    assert values(other) == [7, 8]
    assert [b.epoch for b in leaves(other)] == [0, 0]
    rlx.commit(tree, {"a": tree["b"], "b": tree["a"]})
    assert values(tree) == [8, 7]


def test_a_donated_view_whose_result_never_comes_back_is_told():
    b = filled(1)
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(b.jax())
    for use in (
        b.jax,
        lambda: b.update(lambda x: x),
        lambda: b.write("numpy").__enter__(),
        lambda: b.read("jax").__enter__(),
        lambda: rlx.update([b], plus_one),
        lambda: rlx.views([b], "jax"),
        lambda: b.update(lambda x: None, framework="torch"),
    ):
        with pytest.raises(rlx.StaleViewError, match=r"donated.*commit.*copy_from"):
            use()
    assert b.epoch == 0
    rlx.commit(b, result)
    assert (b.numpy() == 2).all()
    assert b.epoch == 1
    b.update(lambda x: x + 1)
    assert (b.numpy() == 3).all()


def test_copy_from_takes_over_like_commit():
    b = filled(1)
    n = b.numpy()
    with rlx.no_copies():
        b.copy_from(jax.jit(lambda x: x + 1, donate_argnums=0)(b.jax()))
    assert (n == 2).all()
    assert b.epoch == 1
    assert address(b.jax()) == b.address


def test_new_bytes_replace_a_donated_and_lost_view():
    b = filled(1)
    jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(b.jax()))
    with pytest.raises(rlx.StaleViewError, match="commit"):
        b.jax()
    b.copy_from(np.full(64, 5, np.float32))
    assert (b.numpy() == 5).all()
    b.update(lambda x: x + 1)
    assert (np.asarray(b.jax()) == 6).all()


def test_adoption_inside_a_trace_copies_nothing_baked():
    b = filled(1)

    @jax.jit
    def outer(x):
        rlx.commit(b, x)
        return x

    with pytest.raises(rlx.DriverError):
        outer(jnp.ones(64))
    assert (b.numpy() == 1).all()
    assert b.epoch == 0


def test_commit_orders_views_that_are_out():
    warm_up()
    b = ones()
    n, t = b.numpy(), b.torch()
    step = jax.jit(lambda x: x + slow_read(x / x), donate_argnums=0)
    for i in range(3):
        rlx.commit(b, step(b.jax()))
        assert (n == i + 2).all()
        assert float(t[-1, -1]) == i + 2


def test_trees_without_jax():
    run_python(
        """
        import sys
        from collections import namedtuple
        import numpy as np, rlx_driver as rlx
        Layer = namedtuple("Layer", "w b")
        make = lambda v: rlx.Buffer.from_array(np.full(8, v, np.float32), copy=True)
        tree = {"z": [make(1), (make(2), None)], "a": Layer(make(3), {"k": make(4)})}
        views = rlx.views(tree, "numpy")
        assert type(views["a"]) is Layer and views["z"][1][1] is None
        views["a"].b["k"] += 1
        with rlx.write(tree, "numpy") as t:
            t["z"][0][...] = 9
        with rlx.read(tree, "numpy") as t:
            assert t["z"][0][0] == 9 and t["a"].b["k"][0] == 5
        def step(t):
            t["a"].w[...] *= 2
            return {"z": [t["z"][0] + 1, (t["z"][1][0], None)], "a": t["a"]}
        rlx.update(tree, step, framework="numpy")
        assert (tree["z"][0].numpy() == 10).all() and (tree["a"].w.numpy() == 6).all()
        rlx.commit(tree, {"z": [np.zeros(8, np.float32), (np.ones(8, np.float32), None)],
                          "a": Layer(tree["a"].w, {"k": np.ones(8, np.float32)})})
        assert tree["z"][0].epoch == 3 and (tree["z"][0].numpy() == 0).all()
        for bad in ([tree["z"][0]] * 2, {"a": tree["z"][0], "b": tree["z"][0][2:]}):
            try:
                rlx.views(bad, "numpy")
            except rlx.DuplicateError:
                continue
            raise AssertionError
        try:
            rlx.commit(tree, {"z": []})
        except rlx.ShapeError:
            pass
        assert "jax" not in sys.modules and "torch" not in sys.modules
        """
    )
