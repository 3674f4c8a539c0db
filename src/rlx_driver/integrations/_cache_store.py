"""The handles of a key-value cache: their names in a region, making them, whether they fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlx_driver import _hooks, tree
from rlx_driver.backends.base import FunctionalBackend
from rlx_driver.errors import ClosedHandleError, DeviceUnavailableError, DTypeError, ShapeError
from rlx_driver.handle import HandleRegion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlx_driver.device import Device
    from rlx_driver.handle import BufferHandle
    from rlx_driver.scopes import WriteScope

__all__ = ["Store"]

Pair = tuple["BufferHandle", "BufferHandle"]


class Store:
    """The handles of one cache.

    For each layer a key and a value handle, ``NAME.0.key`` and so on, of the shape (batch, heads,
    tokens, dim); and ``NAME.state``, integers whose first column says how many tokens each layer
    has seen, and at last how many rows the batch in use has. The state is a handle too, so that a
    file or another cache can go on with it.

    Parameters
    ----------
    name
        The first part of every name.
    region
        Where to make them; None: a region of its own, made with the first handle.
    lengths
        For each layer the tokens that it stores, 0 for one that stores nothing.
    fixed
        Whether handles that are there keep their batch for life.
    """

    def __init__(
        self, name: str, region: HandleRegion | None, lengths: list[int], *, fixed: bool
    ) -> None:
        self.name = name
        self.region = region
        self.owns_region = region is None
        self.lengths = lengths
        self.fixed = fixed
        self.pairs: list[Pair | None] = [None] * len(lengths)
        self.state: BufferHandle | None = None
        self.closed = False
        if region is not None:
            if region.is_closed:
                raise ClosedHandleError(f"the region for cache {name!r} is closed: make a new one")
            self._adopt(region)

    @property
    def handles(self) -> list[BufferHandle]:
        """Every handle that there is, the state last."""
        made = [handle for pair in self.pairs if pair is not None for handle in pair]
        return made if self.state is None else [*made, self.state]

    @property
    def first(self) -> int:
        """The first layer that stores anything."""
        return next(i for i, length in enumerate(self.lengths) if length)

    @property
    def rows(self) -> int:
        """The batch that the handles have room for; 0 without any."""
        pair = self.pairs[self.first]
        return 0 if pair is None else pair[0].shape[0]

    def require_open(self) -> None:
        """Raise when the cache was closed."""
        if self.closed:
            raise ClosedHandleError(
                f"cache {self.name!r} is closed: make a new HandleCache, over the same region to "
                "go on with handles that are still open"
            )

    def writing(self) -> WriteScope:
        """Give a scope in which torch writes all of it."""
        self.require_open()
        return tree.write(self.handles, "torch")

    def order(self) -> None:
        """Let torch's next work come after all work on the handles that the driver knows of.

        Arrays that JAX has are fenced; where there are none, nothing but a look-up happens.
        """
        self.require_open()
        handles = self.handles
        if _hooks.checker is not None or any(
            handle._access.handed or handle._access.retired for handle in handles
        ):
            with tree.write(handles, "torch"):
                pass
            return
        for handle in handles:
            handle.torch()

    def require_fit(
        self, index: int, shapes: Mapping[str, Any], dtype: Any, device: Device
    ) -> bool:
        """Tell whether a layer has handles with room for shapes (batch, heads, tokens, dim).

        False: there are none, or they may make room for larger ones.

        Raises
        ------
        DeviceUnavailableError, DTypeError, ShapeError
            The handles, or the region, are for something else.
        """
        self.require_open()
        if self.region is not None and self.region.device != device:
            raise DeviceUnavailableError(
                f"the model computes layer {index} on {device}, and cache {self.name!r} lies on "
                f"{self.region.device}: pass region=HandleRegion({str(device)!r}), or move the "
                "model"
            )
        pair = self.pairs[index]
        if pair is None:
            return False
        for handle, shape in zip(pair, shapes.values(), strict=True):
            if handle.dtype != dtype:
                raise DTypeError(
                    f"the model computes {dtype.name}, and handle {handle.name!r} is "
                    f"{handle.dtype.name}: pass dtype={dtype.name!r} to HandleCache"
                )
            if handle.shape[1:] != shape[1:]:
                raise ShapeError(
                    f"layer {index} of the model stores (heads, tokens, dim) = {shape[1:]}, and "
                    f"handle {handle.name!r} has {handle.shape[1:]}: the handles were made for "
                    "another model, or the config does not tell its shapes; leave batch_size out "
                    "then, so that they come from the first forward pass"
                )
            if shape[0] <= handle.shape[0]:
                continue
            if self.fixed:
                raise ShapeError(
                    f"a batch of {shape[0]} was given to cache {self.name!r}, which has room for "
                    f"{handle.shape[0]} for life (num_beams and num_return_sequences multiply the "
                    "batch): make the cache with a larger batch_size"
                )
            return False
        return True

    def make(self, spec: Mapping[int, Mapping[str, Any]], dtype: Any, device: Device) -> None:
        """Make the handles of layers, in one allocation; those that are too small are closed."""
        if self.region is None:
            self.region = HandleRegion(device)
        if self.state is None:
            # As transformers counts; JAX owns no int64 in its default mode.
            wide = not isinstance(self.region.backend, FunctionalBackend)
            # A cell begins every 16 bytes: compiled programs copy inputs that are aligned to less.
            width, dt = (2, "i64") if wide else (4, "i32")
            cells = ((len(self.lengths) + 1, width), dt)
            self.state = self.region.create({self._state_name: cells})[self._state_name]
        for index in spec:
            for handle in self.pairs[index] or ():
                handle.close()
            self.pairs[index] = None
        entries = {
            self._handle_name(index, part): (shape, dtype)
            for index, shapes in spec.items()
            for part, shape in shapes.items()
        }
        made = self.region.create(entries)
        for index in spec:
            key, value = (made[self._handle_name(index, part)] for part in ("key", "value"))
            self.pairs[index] = (key, value)

    def close(self) -> None:
        """Close the handles, and the region if it is the cache's own."""
        self.closed = True
        for handle in self.handles:
            handle.close()
        if self.owns_region and self.region is not None:
            self.region.close()

    @property
    def _state_name(self) -> str:
        return f"{self.name}.state"

    def _handle_name(self, index: int, part: str) -> str:
        return f"{self.name}.{index}.{part}"

    def _adopt(self, region: HandleRegion) -> None:
        """Take handles of these names that the region has already: all, or none are there."""
        wanted = {
            index: (self._handle_name(index, "key"), self._handle_name(index, "value"))
            for index, length in enumerate(self.lengths)
            if length
        }
        names = [self._state_name, *(name for pair in wanted.values() for name in pair)]
        found = [name for name in names if name in region]
        if not found:
            return
        missing = [name for name in names if name not in region]
        if missing:
            raise ShapeError(
                f"the region has {found[0]!r} and lacks {missing[0]!r}: it was made for another "
                "model. Pass another name= to HandleCache, or close those handles"
            )
        batches = set()
        for index, pair in wanted.items():
            for handle in (region[name] for name in pair):
                if len(handle.shape) != 4 or handle.shape[2] != self.lengths[index]:
                    raise ShapeError(
                        f"handle {handle.name!r} of the region has shape {handle.shape}; layer "
                        f"{index} needs (batch, heads, {self.lengths[index]}, dim): pass the "
                        "max_cache_len that it was made with"
                    )
                batches.add(handle.shape[0])
        state = region[self._state_name]
        if state.ndim != 2 or len(state) != len(self.lengths) + 1 or state.dtype.kind != "i":
            raise ShapeError(
                f"handle {state.name!r} is {state.dtype.name}{list(state.shape)} and not the state "
                f"of a cache of {len(self.lengths)} layers: pass another name="
            )
        if len(batches) != 1:
            raise ShapeError(
                f"the handles of cache {self.name!r} have room for different batches: "
                f"{sorted(batches)}"
            )
        for index, (key, value) in wanted.items():
            self.pairs[index] = (region[key], region[value])
        self.state, self.fixed = state, True
