"""A key-value cache for transformers whose layers live in handles."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from rlx_driver.errors import DTypeError, MissingPackageError, ShapeError, UnboundNameError

try:
    import torch
    from transformers.cache_utils import StaticCache
except ImportError as error:
    raise MissingPackageError(
        "rlx_driver.integrations.transformers needs torch and transformers: "
        "pip install 'rlx-driver[transformers]'"
    ) from error

from rlx_driver import dtypes
from rlx_driver.device import Device
from rlx_driver.integrations._cache_layers import StoredLayer, in_handles
from rlx_driver.integrations._cache_store import Store

if TYPE_CHECKING:
    from rlx_driver.handle import BufferHandle, HandleRegion

__all__ = ["HandleCache"]


class HandleCache(StaticCache):  # type: ignore[misc]
    """A `StaticCache` of transformers whose keys and values lie in handles.

    Pass it as ``past_key_values``, to ``generate`` or to the model. torch computes what it computes
    with a `StaticCache`; between two calls JAX and NumPy read and change the same memory through
    `handles`.

    Parameters
    ----------
    config
        The model's config.
    max_cache_len
        Tokens that it can hold. (Layers with a shorter window keep the window.)
    region
        The `HandleRegion` to live in. Handles of these names that it has already are taken over
        with what they hold: the cache goes on where it was. None: a region of its own, on the
        model's device, or on the host where `batch_size` is given.
    batch_size
        Rows to make room for, beams included. The handles are made now, and their addresses are
        fixed until `close`; smaller batches use the first rows. None: they are made by the first
        forward pass, for its batch; a larger batch after `reset` gets new handles.
    dtype
        Of the handles that `batch_size` makes; None: the config's, or torch's default.
    name
        The first part of the handles' names: ``cache.0.key``, ``cache.0.value``, and so on, and
        ``cache.state``.

    Raises
    ------
    DTypeError
        `config` is no config of a model with a decoder, or a layer is of a kind that handles cannot
        hold (linear attention, compressed attention).
    ShapeError
        A number is not positive, or handles of the region do not fit.
    ClosedHandleError
        The region is closed.

    Notes
    -----
    A forward pass checks batch, dtype, device and room before any byte changes. On a GPU the tokens
    of compiled forward passes are counted at the next prefill, and not before.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=16,
    ...     hidden_size=16,
    ...     intermediate_size=16,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=2,
    ...     num_key_value_heads=1,
    ... )
    >>> with HandleCache(config, max_cache_len=8, batch_size=3) as cache:
    ...     len(cache.handles), cache.handles[0][0].shape, cache.length
    (2, (3, 1, 8, 8), 0)
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        region: HandleRegion | None = None,
        *,
        batch_size: int | None = None,
        dtype: Any = None,
        name: str = "cache",
    ) -> None:
        max_cache_len = _positive(max_cache_len, "max_cache_len")
        text = _text_config(config)
        super().__init__(config, max_cache_len)
        self.layers: list[Any] = in_handles(self.layers, max_cache_len)
        self._ours = [layer for layer in self.layers if isinstance(layer, StoredLayer)]
        if not self._ours:
            raise DTypeError("no layer of this model stores keys and values: it needs no cache")
        # A window that was cut to max_cache_len is one that must not slide.
        bounded = [layer for layer in self._ours if layer.max_cache_len == max_cache_len]
        self._capacity = max_cache_len if bounded else None
        self._seen = 0  # tokens that were counted without asking a GPU: at most those there are
        lengths = [getattr(layer, "max_cache_len", 0) for layer in self.layers]
        self._store = Store(name, region, lengths, fixed=batch_size is not None)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, StoredLayer):
                layer.place(self._store, index)
        if batch_size is not None:
            self._make(text, _positive(batch_size, "batch_size"), dtype)
        self._go_on()

    # --- the handles -------------------------------------------------------------------------

    @property
    def handles(self) -> list[tuple[BufferHandle, BufferHandle] | None]:
        """For each layer its key and value handle, of shape (batch, heads, tokens, dim).

        None stands for a layer that stores nothing (one that shares another's keys and values).
        Empty before the handles are made.
        """
        if self._store.state is None:
            return []
        return list(self._store.pairs)

    @property
    def region(self) -> HandleRegion | None:
        """The region that the handles live in; None before one is made."""
        return self._store.region

    @property
    def name(self) -> str:
        """The first part of the handles' names."""
        return self._store.name

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._store.closed

    def close(self) -> None:
        """Give the handles up, and the region if it is the cache's own. Twice is fine."""
        self._store.close()
        for layer in self._ours:
            layer.release()

    def __enter__(self) -> HandleCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the tokens --------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Tokens that the cache has seen, as an int; blocks on a GPU."""
        self._store.require_open()
        self._seen = self._ours[0].host_length()
        return self._seen

    def advance(self, tokens: int) -> None:
        """Count tokens that another framework has appended to every layer.

        In a layer of full attention token number i lies at position i. A window that is full
        moves to the left by one for each token, and the newest is last.

        Parameters
        ----------
        tokens
            How many.

        Raises
        ------
        ShapeError
            There is no room for as many, or the number is negative.
        UnboundNameError
            There are no handles yet.
        """
        tokens = operator.index(tokens)
        if tokens < 0:
            raise ShapeError(f"tokens are counted forward; got {tokens}. Use reset() to start over")
        if self._store.state is None:
            raise UnboundNameError(
                "the cache has no handles yet: pass batch_size, or run the model once"
            )
        self._require_room(tokens, self.length)
        for layer in self._ours:
            if not layer.is_initialized:
                layer.attach(self._store.rows)
        with self._store.writing():
            for layer in self._ours:
                layer.advance(tokens)
        self._seen += tokens

    def reset(self) -> None:
        """Zero the handles and forget the tokens; addresses stay. The next batch may differ."""
        if self._store.state is not None:
            with self._store.writing() as (*tensors, state):
                for tensor in tensors:
                    tensor.zero_()
                state[:-1].zero_()  # the batch stays, as the layers do
        for layer in self.layers:
            if not isinstance(layer, StoredLayer):
                layer.reset()
            elif layer.is_initialized:
                layer.go_on()
        self._seen = 0

    def fence(self) -> None:
        """Let torch's next work come after all that JAX does with the handles.

        ``generate`` and eager forward passes do it by themselves. Call it before each call of a
        forward pass that you have compiled, where JAX has used the handles meanwhile. Copies:
        never. Blocks: on the host until JAX is done with them. Arrays from ``handle.jax()`` are
        dead afterwards.

        Raises
        ------
        ClosedHandleError
            The cache, its region or a handle is closed.
        ZeroCopyError, StaleViewError
            As for `Buffer.write`.
        """
        self._store.order()

    # --- what transformers calls -------------------------------------------------------------

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Write a layer's new states; see transformers.

        Raises
        ------
        ShapeError, DTypeError, DeviceUnavailableError, ClosedHandleError
            The states do not fit. The layer is unchanged.
        """
        layer = self.layers[layer_idx]
        counts = layer is self._ours[0] and not torch.compiler.is_compiling()
        if counts:
            self._prepare(key_states.shape[-2])
        if not torch.compiler.is_compiling() and isinstance(layer, StoredLayer):
            layer.match(key_states, value_states)
        result: tuple[Any, Any] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        if counts:
            self._seen += key_states.shape[-2]
        return result

    def get_mask_sizes(self, query_length: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Give length and offset of the mask for a coming forward pass; see transformers.

        ``generate`` asks before each forward pass, a compiled one too: so this is where to look
        whether there is room.
        """
        if not torch.compiler.is_compiling():
            tokens = query_length.shape[0] if hasattr(query_length, "shape") else query_length
            self._prepare(int(tokens))
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, *args, **kwargs)
        return sizes

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the rows for beam search, inside the handles."""
        self._store.order()
        super().reorder_cache(beam_idx)

    # --- inside ------------------------------------------------------------------------------

    def _prepare(self, tokens: int) -> None:
        """Look before a forward pass whether all is open, in order, and has room."""
        self._store.order()
        if self._capacity is not None:
            known = self._ours[0].known_length()
            if known is None and tokens > 1 and not torch.cuda.is_current_stream_capturing():
                known = self.length  # a prefill is worth the wait; generate asks before it, too
            self._require_room(tokens, self._seen if known is None else known)

    def _require_room(self, tokens: int, length: int) -> None:
        if self._capacity is not None and length + tokens > self._capacity:
            raise ShapeError(
                f"cache {self.name!r} holds {length} tokens of {self._capacity} and was given "
                f"{tokens} more: make it with a larger max_cache_len, or reset() it. Nothing was "
                "changed"
            )

    def _make(self, text: Any, batch: int, dtype: Any) -> None:
        """Make all handles from what the config says, or check those that are there."""
        dt = dtypes.dtype(_dtype_of(text) if dtype is None else dtype)
        heads = text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        stored = getattr(text, "num_key_value_heads", None) or heads
        device = Device() if self._store.region is None else self._store.region.device
        spec = {
            layer.index: dict.fromkeys(("key", "value"), (batch, stored, layer.max_cache_len, dim))
            for layer in self._ours
        }
        if not all(self._store.require_fit(i, each, dt, device) for i, each in spec.items()):
            self._store.make(spec, dt, device)

    def _go_on(self) -> None:
        """Bind every layer to what the handles hold, if they hold anything."""
        state = self._store.state
        if state is None:
            return
        batch = int(state.torch()[-1, 0])
        if not 0 <= batch <= self._store.rows:
            raise ShapeError(
                f"handle {state.name!r} says that {batch} rows of {self._store.rows} are in use: "
                "it is not the state of a cache"
            )
        if batch:
            for layer in self._ours:
                layer.attach(batch)
                layer.go_on()
            self._seen = self._ours[0].host_length()


def _positive(number: Any, what: str) -> int:
    try:
        value = operator.index(number)
    except TypeError:
        value = 0
    if value < 1:
        raise ShapeError(f"{what} is a positive number; got {number!r}")
    return value


def _text_config(config: Any) -> Any:
    """Give the part of a config that describes the decoder."""
    get = getattr(config, "get_text_config", None)
    text = None if get is None else get(decoder=True)
    if text is None or not hasattr(text, "num_hidden_layers"):
        raise DTypeError(
            "HandleCache is made from the config of a model that generates text (model.config); "
            f"got {type(config).__name__}, which has no layers of a decoder"
        )
    return text


def _dtype_of(text: Any) -> Any:
    found = getattr(text, "dtype", None)
    return torch.get_default_dtype() if found is None else found
