"""Arrays of frameworks without a backend: described by a capsule of their own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rlx_driver import dlpack
from rlx_driver.backends.base import ArrayFacts, Obstacle
from rlx_driver.device import Device
from rlx_driver.errors import DriverError, UnknownFrameworkError, ZeroCopyError

__all__ = ["foreign_facts"]


def foreign_facts(x: Any) -> ArrayFacts:
    """Describe any DLPack exporter by a capsule of its own that is dropped unused."""
    if not hasattr(x, "__dlpack__") or not hasattr(x, "__dlpack_device__"):
        raise UnknownFrameworkError(
            f"a {type(x).__qualname__} is no array of a known framework and has no __dlpack__ "
            "with __dlpack_device__; make it an array first, for example with numpy.asarray"
        )
    try:
        device = Device.from_dlpack(*map(int, x.__dlpack_device__()))
        options: dict[str, Any] = {} if device.is_host else {"stream": -1}
        try:
            capsule = x.__dlpack__(max_version=(1, 0), **options)
        except TypeError:
            capsule = x.__dlpack__(**options)
        found = dlpack.inspect(capsule)
    except DriverError as error:
        if isinstance(error, UnknownFrameworkError):
            raise
        raise ZeroCopyError(f"the exporter {type(x).__qualname__} is malformed: {error}") from error
    except Exception as error:
        raise ZeroCopyError(
            f"the exporter {type(x).__qualname__} failed in __dlpack__: {error}"
        ) from error
    obstacle = None
    if found.dtype is None:
        text = f"its DLPack dtype (code {found.code}, {found.bits} bits) is in no table of ours"
        obstacle = Obstacle("dtype", text, "convert it first", copyable=False)
    size = 1 if found.dtype is None else found.dtype.itemsize
    return ArrayFacts(
        found.address if math.prod(found.shape) else 0,
        found.shape,
        tuple(stride * size for stride in found.element_strides),
        np.dtype(bool) if found.dtype is None else found.dtype,
        device,
        read_only=found.read_only,
        obstacle=obstacle,
    )
