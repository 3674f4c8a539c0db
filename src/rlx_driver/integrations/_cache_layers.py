"""Layers of transformers' static cache whose keys and values lie in handles.

Two generations of transformers are served. Since 5.4 a layer counts its tokens itself, in a tensor;
before, the model told the positions and the layer found its length by looking for zeros. Here
both count in the cache's state handle. Which one is there is seen from a layer, not from a version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import cache_utils

from rlx_driver import dtypes
from rlx_driver.device import Device
from rlx_driver.errors import DTypeError, MissingPackageError, ShapeError

if TYPE_CHECKING:
    from rlx_driver.integrations._cache_store import Store

__all__ = ["HandleLayer", "HandleSlidingLayer", "StoredLayer", "in_handles"]

StaticLayer: Any = getattr(cache_utils, "StaticLayer", None)
StaticSlidingWindowLayer: Any = getattr(cache_utils, "StaticSlidingWindowLayer", None)
if not hasattr(StaticLayer, "lazy_initialization") or StaticSlidingWindowLayer is None:
    import transformers

    raise MissingPackageError(
        f"transformers {transformers.__version__} has no static cache made of layers; HandleCache "
        "needs 4.57 or later: pip install 'rlx-driver[transformers]'"
    )

COUNTS = isinstance(getattr(StaticLayer(max_cache_len=1), "cumulative_length", None), torch.Tensor)
"""Whether a layer counts its tokens in a tensor of its own (transformers 5.4 and later)."""

_mark_static = getattr(torch._dynamo, "mark_static_address", lambda tensor: None)


class StoredLayer(StaticLayer):  # type: ignore[misc]
    """What both kinds of layers do: they take their tensors from the store."""

    cumulative_length: Any

    def place(self, store: Store, index: int) -> None:
        """Say where the layer's handles are; nothing is made yet."""
        self.store = store
        self.index = index
        self.total: Any = None  # a view of the layer's cell of the state
        self.rows: dict[int, tuple[Any, Any]] = {}  # one pair of tensors for each batch, for life

    def lazy_initialization(self, key_states: Any, value_states: Any = None) -> None:
        """Bind the layer to handles, made now or before, for the batch of these states.

        Raises
        ------
        ShapeError, DTypeError, DeviceUnavailableError
            The states do not fit the handles. Nothing was changed.
        """
        _bind(self, key_states, key_states if value_states is None else value_states)

    def match(self, key_states: Any, value_states: Any) -> None:
        """Check that the next states fit; an empty layer changes over to their batch."""
        if key_states.requires_grad or value_states.requires_grad:
            raise DTypeError(
                "the keys and values require grad, and a cache in handles keeps no graph: run the "
                "model under torch.no_grad() or torch.inference_mode(). Nothing was changed"
            )
        if not self.is_initialized or self.signature == _signature(key_states, value_states):
            return
        batch, held = key_states.shape[0], self.keys.shape[0]
        if batch != held and self.host_length():
            raise ShapeError(
                f"the cache holds a batch of {held}, and layer {self.index} was given one of "
                f"{batch}: call reset() first, or go on with {held}. Nothing was changed"
            )
        _bind(self, key_states, value_states)

    def attach(self, batch: int) -> None:
        """Take the first rows of the handles as the tensors of the layer."""
        pair, state = self.store.pairs[self.index], self.store.state
        assert pair is not None
        assert state is not None
        # A view made under inference mode would refuse every later write.
        with torch.inference_mode(False), torch.no_grad():
            if self.total is None:
                cell = _alone(state.torch()[self.index, 0])
                self.total = cell.view(self.cumulative_length.shape) if COUNTS else cell
            if batch not in self.rows:
                key, value = (_alone(handle.torch()) for handle in pair)
                whole = key.shape[0] == batch
                self.rows[batch] = (key, value) if whole else (key[:batch], value[:batch])
                for tensor in (*self.rows[batch], self.total):
                    _mark_static(tensor)
            if self.index == self.store.first:
                state.torch()[-1, 0].fill_(batch)
        self.keys, self.values = self.rows[batch]
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.num_heads = self.keys.shape[1]
        self.batch_size = self.max_batch_size = batch  # the newer name and the older one
        self.k_head_dim = self.head_dim = self.keys.shape[-1]
        self.v_head_dim = self.values.shape[-1]
        if COUNTS:
            self.cumulative_length = self.total
        self.signature = _signature(self.keys, self.values)
        self.is_initialized = True

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the rows inside their handles; copies, as the base class does, and once back."""
        if not self.is_initialized:
            return
        if beam_idx.shape != (self.keys.shape[0],):
            raise ShapeError(
                f"a cache with {self.keys.shape[0]} rows is reordered by as many indices; got "
                f"shape {tuple(beam_idx.shape)}. Nothing was changed"
            )
        index = beam_idx.to(self.keys.device)
        for tensor in (self.keys, self.values):
            tensor.copy_(tensor.index_select(0, index))

    def host_length(self) -> int:
        """Count the tokens seen; blocks on a GPU."""
        return int(self.total) if self.is_initialized else 0

    def known_length(self) -> int | None:
        """Count the tokens seen, or None where that would block."""
        return (
            None if self.is_initialized and self.total.device.type != "cpu" else self.host_length()
        )

    def go_on(self) -> None:
        """Take over what the state says."""

    def release(self) -> None:
        """Let go of every tensor."""
        self.keys = self.values = self.total = None
        self.rows.clear()
        self.is_initialized = False
        if COUNTS:
            self.cumulative_length = None

    def advance(self, tokens: int) -> None:
        """Count tokens that somebody else has written; inside a write scope."""
        self.total.add_(tokens)


if COUNTS:

    class HandleLayer(StoredLayer):
        """A layer of full attention."""

    class HandleSlidingLayer(StoredLayer, StaticSlidingWindowLayer):  # type: ignore[misc]
        """A layer that keeps the last tokens only."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            """Write the states; see the base class."""
            after = self.cumulative_length_int + key_states.shape[-2]
            result = super().update(key_states, value_states, *args, **kwargs)
            if after > self.max_cache_len:  # from here on the base class counts in its int alone
                self.cumulative_length.add_(key_states.shape[-2])
            return result

        def host_length(self) -> int:
            return int(self.cumulative_length_int)

        known_length = host_length

        def go_on(self) -> None:
            self.cumulative_length_int = int(self.total)

        def advance(self, tokens: int) -> None:
            super().advance(tokens)
            self.cumulative_length_int += tokens

else:

    class HandleLayer(StoredLayer):  # type: ignore[no-redef]
        """A layer of full attention."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            """Write the states; see the base class."""
            result = super().update(key_states, value_states, *args, **kwargs)
            self.total.add_(key_states.shape[-2])
            return result

        def get_seq_length(self) -> Any:
            """Count the tokens seen."""
            return self.total if self.is_initialized else 0

    class HandleSlidingLayer(StoredLayer, StaticSlidingWindowLayer):  # type: ignore[misc, no-redef]
        """A layer that keeps the last tokens only."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            """Write the states; see the base class."""
            result = super().update(key_states, value_states, *args, **kwargs)
            self.total.add_(key_states.shape[-2])
            return result

        def host_length(self) -> int:
            return int(self.cumulative_length)

        known_length = host_length

        def go_on(self) -> None:
            self.cumulative_length = int(self.total)

        def advance(self, tokens: int) -> None:
            super().advance(tokens)
            self.cumulative_length += tokens


def in_handles(layers: list[Any], max_cache_len: int) -> list[Any]:
    """Give the same layers with their tensors in handles.

    Raises
    ------
    DTypeError
        A layer is of a kind that cannot be put there.
    """
    dummy = getattr(cache_utils, "DummyLayer", ())
    made: list[Any] = []
    for index, layer in enumerate(layers):
        if type(layer) is StaticLayer:
            made.append(HandleLayer(max_cache_len=layer.max_cache_len))
        elif type(layer) is StaticSlidingWindowLayer:
            window = layer.max_cache_len  # already the smaller of the two
            made.append(HandleSlidingLayer(max_cache_len=max_cache_len, sliding_window=window))
        elif isinstance(layer, dummy):
            made.append(layer)
        else:
            raise DTypeError(
                "HandleCache keeps layers of full, sliding and chunked attention; layer "
                f"{index} of this model is a {type(layer).__name__}: use StaticCache for it"
            )
    return made


def _signature(keys: Any, values: Any) -> tuple[Any, ...]:
    """Give what must be equal for states to go into a layer's tensors."""
    batch, heads, _, dim = keys.shape
    return batch, heads, dim, values.shape[-1], keys.dtype, keys.device


def _alone(tensor: Any) -> Any:
    """Give the same memory as a storage of its own.

    Inputs that share a storage make a compiled program look at every call whether they overlap.
    """
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    try:
        return torch.from_dlpack(tensor)
    except (BufferError, RuntimeError, TypeError):  # a dtype that DLPack lacks: only slower
        return tensor


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _bind(layer: StoredLayer, keys: Any, values: Any) -> None:
    """Give a layer the tensors for a batch of states, and handles if it has none for them."""
    dtype, device = dtypes.dtype(keys.dtype), Device.of(keys)
    shapes = {
        part: (*states.shape[:2], layer.max_cache_len, states.shape[-1])
        for part, states in (("key", keys), ("value", values))
    }
    if not layer.store.require_fit(layer.index, shapes, dtype, device):
        layer.store.make({layer.index: shapes}, dtype, device)
        layer.rows.clear()
    layer.attach(keys.shape[0])
