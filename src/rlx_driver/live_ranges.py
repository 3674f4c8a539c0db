"""Live ranges of real programs: the intervals of a torch.fx graph or of a jaxpr."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlx_driver.errors import MissingPackageError

if TYPE_CHECKING:
    from rlx_driver.interval import Interval

__all__ = ["intervals_from_fx", "intervals_from_jaxpr"]


def intervals_from_fx(graph_module_or_fn: Any, /, *args: Any, **kwargs: Any) -> list[Interval]:
    """Give the memory that each node of a torch program needs, and from when to when.

    Nothing is computed and nothing allocated for it: the program runs on torch's fake tensors,
    which have shapes and storages but no bytes. Arguments are read for their shapes only. No
    copies, does not block, nothing is changed. Takes time linear in the number of nodes.

    Parameters
    ----------
    graph_module_or_fn
        A function or `torch.nn.Module`, traced with `make_fx` down to ATen operators; a
        `torch.fx.GraphModule` or `torch.export.ExportedProgram`, taken as it is.
    *args, **kwargs
        What to call it with: tensors (real, fake or on the meta device) and pytrees of them;
        values of other types are constants. They may be left out for an exported program, and for
        a graph whose placeholders carry ``meta["val"]``.

    Returns
    -------
    list of Interval
        In graph order, one for each tensor. A node's step is its position in the graph, a node is
        named as in the graph, sizes are in bytes. dtype and shape are there where the
        tensor is contiguous and NumPy has its dtype. A tensor that shares another's storage (a
        view, an operation in place) is an alias of the first node of that storage. Results of a
        node that gives several belong to the ``getitem`` that takes them, from the step of the
        node on; one that nobody takes is ``"node[index]"``. If no one node spans all that is used
        of a storage (two arguments that overlap), ``"node.storage"`` does.

        Kinds: placeholders are inputs, but those of an exported program's parameters, buffers and
        constants are constants, as is what ``get_attr`` gives; what is returned is output, unless
        it is one of those.

    Raises
    ------
    PlanError
        It cannot be traced (a shape or a branch depends on values, an operator has no shape rule),
        a size is symbolic, or arguments are missing; the text names the node.
    MissingPackageError
        torch is not installed.

    Examples
    --------
    >>> import torch
    >>> import rlx_driver as rlx
    >>> for interval in rlx.intervals_from_fx(lambda x: x.exp().view(8).sum(), torch.ones(2, 4)):
    ...     print(interval.node, interval.size, interval.first, interval.last, interval.kind)
    x_1 32 0 1 input
    exp 32 1 3 intermediate
    view 32 2 3 intermediate
    sum_1 4 3 4 output
    """
    found: list[Interval] = _tracer("fx", "torch").intervals(graph_module_or_fn, args, kwargs)
    return found


def intervals_from_jaxpr(fn: Any, /, *args: Any, **kwargs: Any) -> list[Interval]:
    """Give the memory that each equation of a JAX program needs, and from when to when.

    The program is traced with `jax.make_jaxpr`, and nothing is computed. No copies, does not block.
    Takes time linear in the number of equations.

    Parameters
    ----------
    fn
        A function, jitted or not; or a jaxpr (`jax.extend.core.ClosedJaxpr` or `Jaxpr`), without
        arguments.
    *args, **kwargs
        What to call it with: arrays, `jax.ShapeDtypeStruct` and pytrees of them.

    Returns
    -------
    list of Interval
        Arguments (``"input:0"``) come first; then, in the order of the equations, their results
        (``"dot_general:12"``: primitive and step, ``"split:3.0"`` where there are several). Calls
        (jit, checkpoint, custom derivatives) are inlined; an equation's step is its position after
        that, and returning is one step more. Sizes are in bytes; dtype and shape are there for
        every dtype that NumPy has. What reshape and its like make of another value is an alias of
        it, unless XLA has to copy it, because both are arguments or results of the program.
        Kinds: arguments are inputs, captured arrays (``"const:0"``) constants, what is returned is
        output, unless it is one of those.

        ``scan``, ``while``, ``cond`` and others with a body remain one equation. Beside its
        results it has an interval ``"scan:5.scratch"`` of that one step, as large as the peak
        of what the body holds beside operands and results.

    Raises
    ------
    PlanError
        It cannot be traced (a shape or a Python branch depends on values), or a shape is symbolic.
    MissingPackageError
        JAX is not installed.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import rlx_driver as rlx
    >>> x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    >>> for interval in rlx.intervals_from_jaxpr(lambda x: jnp.exp(x).reshape(8).max(), x):
    ...     print(interval.node, interval.size, interval.first, interval.last, interval.kind)
    input:0 32 0 0 input
    exp:0 32 0 2 intermediate
    reshape:1 32 1 2 intermediate
    reduce_max:2 4 2 3 output
    """
    found: list[Interval] = _tracer("jaxpr", "jax").intervals(fn, args, kwargs)
    return found


def _tracer(module: str, framework: str) -> Any:
    try:
        importlib.import_module(framework)
    except ImportError as error:
        raise MissingPackageError(
            f"intervals_from_{module} was asked for, and {framework} cannot be imported "
            f"({error}): install rlx-driver[{framework}]"
        ) from error
    return importlib.import_module(f"rlx_driver.integrations.{module}")
