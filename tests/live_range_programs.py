"""Programs executed inside a plan: every tensor in its slot, every slot poisoned when it dies."""

from __future__ import annotations

import operator

import numpy as np

import rlx_driver as rlx

POISON = 0xFF  # a NaN of every float


class Memory:
    """The bytes of a plan, and at which step what lies in them dies."""

    def __init__(self, intervals, plan=None):
        self.by_name = {interval.node: interval for interval in intervals}
        self.plan = rlx.plan_memory(intervals) if plan is None else plan
        self.bytes = np.full(self.plan.size + 64, POISON, np.uint8)
        self._skip = -self.bytes.ctypes.data % 64
        last = {}
        for interval in intervals:
            root = interval.node if interval.alias_of is None else interval.alias_of
            whole = interval.whole_run or self.by_name[root].whole_run
            end = float("inf") if whole else interval.last
            last[root] = max(last.get(root, 0), end)
        self._dies = {}
        for root, step in last.items():
            self._dies.setdefault(step, []).append(root)

    def slot(self, name):
        """Return the bytes of a node: a uint8 array over the arena."""
        start = self._skip + self.plan.offset(name)
        return self.bytes[start : start + self.by_name[name].size]

    def end_of(self, step):
        for root in self._dies.pop(step, ()):
            self.slot(root)[:] = POISON


def run_fx(module, intervals, args):
    """Run a torch.fx graph in a plan and return what it returns, flat."""
    import torch

    memory = Memory(intervals)

    def in_slot(name, like):
        """Return a tensor laid out as `like` over the slot."""
        held = memory.slot(name)
        span = 0
        if like.numel():
            ends = zip(like.shape, like.stride(), strict=True)
            span = 1 + sum((n - 1) * s for n, s in ends)
        assert held.nbytes == span * like.element_size(), name
        if not span:
            return torch.empty_like(like)
        flat = torch.from_numpy(held).view(like.dtype)
        made = flat.as_strided(like.shape, like.stride())
        return torch._neg_view(made) if like.is_neg() else made

    def place(name, value, outside=False):
        interval = memory.by_name[name]
        if interval.dtype is not None:
            assert rlx.dtype(value.dtype) == interval.dtype
            assert tuple(value.shape) == interval.shape
            assert value.is_contiguous()
        slot = in_slot(name, value)
        if interval.alias_of is None or outside:
            slot.copy_(value)
        else:
            assert value.numel() == 0 or value.data_ptr() == slot.data_ptr(), name
        return slot

    class Run(torch.fx.Interpreter):
        step = -1

        def run_node(self, node):
            self.step += 1
            value = super().run_node(node)
            if node.op == "output":
                return [each.clone() for each in leaves(value)]
            if isinstance(value, torch.Tensor):
                if node.target is not operator.getitem:
                    repeated = node.op == "get_attr" and memory.by_name[node.name].alias_of
                    if not repeated:
                        value = place(node.name, value, outside=node.op == "placeholder")
                    else:
                        value = in_slot(node.name, value)
            elif isinstance(value, list | tuple):
                taken = {user.args[1]: user.name for user in reversed(node.users)}
                value = [
                    each if each is None else place(taken.get(index, f"{node.name}[{index}]"), each)
                    for index, each in enumerate(value)
                ]
            memory.end_of(self.step)
            return value

    with torch.no_grad():
        return leaves(Run(module).run(*args))


def leaves(tree):
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, list | tuple):
        return [leaf for child in tree for leaf in leaves(child)]
    return [] if tree is None else [tree]


CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def run_jaxpr(closed, intervals, args):
    """Run a jaxpr in a plan and return what it returns."""
    from jax.extend import core

    memory = Memory(intervals)
    step = 0
    constants = 0

    def read(name):
        if not isinstance(name, str):
            return name  # a literal
        interval = memory.by_name[name]
        return memory.slot(name).view(interval.dtype).reshape(interval.shape).copy()

    def write(name, value):
        value = np.asarray(value)
        interval = memory.by_name[name]
        assert (value.dtype, value.shape) == (interval.dtype, interval.shape)
        slot = memory.slot(name)
        if interval.alias_of is None:
            slot[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        assert slot.tobytes() == value.tobytes()
        return name

    def run(jaxpr, consts, names):
        nonlocal step, constants
        scope = dict(zip(jaxpr.invars, names, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            scope[var] = write(f"const:{constants}", const)
            constants += 1

        def name_of(atom):
            return atom.val if isinstance(atom, core.Literal) else scope[atom]

        for equation in jaxpr.eqns:
            operands = [name_of(atom) for atom in equation.invars]
            kind = equation.primitive.name
            if kind in CALLS:
                inner = equation.params[CALLS[kind]]
                closed = isinstance(inner, core.ClosedJaxpr)
                body, held = (inner.jaxpr, inner.consts) if closed else (inner, ())
                scope.update(zip(equation.outvars, run(body, held, operands), strict=True))
                continue
            results = equation.primitive.bind(*map(read, operands), **equation.params)
            if not equation.primitive.multiple_results:
                results = [results]
            single = len(equation.outvars) == 1
            for index, (var, value) in enumerate(zip(equation.outvars, results, strict=True)):
                suffix = "" if single else f".{index}"
                scope[var] = write(f"{kind}:{step}{suffix}", value)
            memory.end_of(step)
            step += 1
        return [name_of(atom) for atom in jaxpr.outvars]

    inputs = [write(f"input:{index}", value) for index, value in enumerate(args)]
    return [read(name) for name in run(closed.jaxpr, closed.consts, inputs)]
