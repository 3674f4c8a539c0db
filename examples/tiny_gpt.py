"""A byte-level GPT whose one forward runs on NumPy, PyTorch and JAX arrays.

The model is a plain decoder: pre-norm blocks, rotary positions, a SwiGLU MLP and a vocabulary of
the 256 byte values. It is a set of functions over a flat ``{name: array}`` of parameters. The only
step that has to know its framework is `write_kv`, the one that changes memory; everything else is
written against the array's own array API namespace.

The key-value cache is one array of shape ``(layers, 2, batch, heads, max_seq, head_dim)``. Entry 0
of its second axis holds the keys (already rotated), entry 1 the values. It is an argument and the
first result of every step, which is the order in which a donated argument keeps its memory under
`jax.jit` and the order that a driver handle's ``update`` asks for::

    step = cache_step(config)
    kv, logits = step(kv, params, prompt_tokens, 0)       # prefill, many tokens
    kv, logits = step(kv, params, next_token, position)   # decode, one token at a time

Only NumPy and array-api-compat are imported here. Running it on torch or JAX arrays takes nothing
but arrays of that framework.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

KEYS = 0
"""Index of the keys on the second axis of a cache."""
VALUES = 1
"""Index of the values on the second axis of a cache."""

WEIGHTS = Path(__file__).parent / "data" / "tiny_gpt.safetensors"
"""Where the trained weights lie; `train_tiny_gpt.py` writes them."""

_NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model; hashable, so it can be a static argument of `jax.jit`.

    Parameters
    ----------
    layers
        Number of blocks.
    heads
        Attention heads in each block.
    head_dim
        Width of one head, an even number. The model is ``heads * head_dim`` wide.
    hidden
        Width of the MLP inside each block.
    max_seq
        Tokens that a cache made for this model holds, and the longest sequence it was trained on.
    vocab
        Number of tokens; one for each byte value.
    rotary_base
        Ratio between the longest and the shortest rotary period.
    """

    layers: int = 4
    heads: int = 5
    head_dim: int = 32
    hidden: int = 448
    max_seq: int = 512
    vocab: int = 256
    rotary_base: float = 1000.0

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim

    def kv_shape(self, batch: int = 1, max_seq: int | None = None) -> tuple[int, ...]:
        """Return the shape of a key-value cache.

        Parameters
        ----------
        batch
            Sequences held side by side.
        max_seq
            Tokens of each sequence; `Config.max_seq` unless given.

        Returns
        -------
        tuple of int
            ``(layers, 2, batch, heads, max_seq, head_dim)``.
        """
        length = self.max_seq if max_seq is None else max_seq
        return (self.layers, 2, batch, self.heads, length, self.head_dim)


# Parameters ------------------------------------------------------------------------------------


def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of a model.

    Matrices are stored as ``(inputs, outputs)``, so that they are applied as ``x @ matrix``.

    Parameters
    ----------
    config
        The shape of the model.

    Returns
    -------
    dict of str to tuple of int
        In the order in which the forward uses them.
    """
    width, hidden = config.width, config.hidden
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab, width)}
    for layer in range(config.layers):
        shapes |= {
            f"layer.{layer}.attention.norm": (width,),
            f"layer.{layer}.attention.qkv": (width, 3 * width),
            f"layer.{layer}.attention.out": (width, width),
            f"layer.{layer}.mlp.norm": (width,),
            f"layer.{layer}.mlp.gate_up": (width, 2 * hidden),
            f"layer.{layer}.mlp.down": (hidden, width),
        }
    return shapes | {"norm": (width,), "head": (width, config.vocab)}


def init_params(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the parameters of an untrained model.

    Gains start at one and matrices from a normal distribution of variance ``1 / inputs``; the two
    matrices of a block that add to the residual stream are scaled down by the number of additions.

    Parameters
    ----------
    config
        The shape of the model.
    seed
        Seed of NumPy's generator.

    Returns
    -------
    dict of str to numpy.ndarray
        float32 arrays, named and shaped as `param_shapes` says.
    """
    generator = np.random.default_rng(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        if len(shape) == 1:
            params[name] = np.ones(shape, np.float32)
            continue
        scale = 0.02 if name == "embedding" else 1 / math.sqrt(shape[0])
        if name.endswith((".out", ".down")):
            scale /= math.sqrt(2 * config.layers)
        params[name] = scale * generator.standard_normal(shape, dtype=np.float32)
    return params


def save_params(
    path: str | Path,
    params: Mapping[str, np.ndarray],
    config: Config,
    *,
    dtype: str = "float16",
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters to a safetensors file that also holds their config.

    Parameters
    ----------
    path
        File to write.
    params
        NumPy arrays by name.
    config
        Their model's shape, kept as JSON under ``config`` in the file's metadata.
    dtype
        dtype in the file: ``"float16"`` halves the file and is a rounding of about 0.05 percent.
    facts
        Anything else worth keeping in the metadata, such as how the model was trained.
    """
    from safetensors.numpy import save_file

    metadata = {"config": json.dumps(dataclasses.asdict(config))}
    metadata |= {name: str(value) for name, value in (facts or {}).items()}
    arrays = {name: np.ascontiguousarray(value.astype(dtype)) for name, value in params.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, str(path), metadata=metadata)


def load_params(path: str | Path = WEIGHTS) -> tuple[Config, dict[str, np.ndarray]]:
    """Read parameters and their config from a file that `save_params` wrote.

    Parameters
    ----------
    path
        The safetensors file; the trained weights beside this module unless given.

    Returns
    -------
    config : Config
        The shape of the model.
    params : dict of str to numpy.ndarray
        float32 arrays.

    Raises
    ------
    ValueError
        If the file's tensors are not those that its config asks for.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        config = Config(**json.loads(file.metadata()["config"]))
        params = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    expected = param_shapes(config)
    found = {name: value.shape for name, value in params.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise ValueError(f"{path} does not hold the parameters of {config}: {wrong}")
    return config, {name: params[name] for name in expected}


# Text ------------------------------------------------------------------------------------------


def encode(text: str) -> np.ndarray:
    """Return the tokens of a text: its UTF-8 bytes, as an int32 array of shape ``(1, length)``."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)[None]


def decode(tokens: Any) -> str:
    """Return the text of an array or list of tokens; bytes that are no UTF-8 become U+FFFD."""
    return bytes(np.asarray(tokens, np.uint8).reshape(-1)).decode(errors="replace")


# The cache -------------------------------------------------------------------------------------


def write_kv(kv: Any, layer: int, which: int, position: Any, value: Any) -> Any:
    """Store the keys or the values of some consecutive tokens in a cache.

    Parameters
    ----------
    kv
        The cache. A NumPy array or a torch tensor is written in place; of a JAX array a new one is
        made (in the same memory, inside a jitted function that donates it).
    layer
        Block that the keys or values belong to.
    which
        `KEYS` or `VALUES`.
    position
        Index of the first token; for JAX it may be traced.
    value
        ``(batch, heads, tokens, head_dim)``, cast to the dtype of the cache.

    Returns
    -------
    array
        The cache that holds them: `kv` itself for NumPy and torch.

    Raises
    ------
    ValueError
        If the tokens do not fit. Where `position` is traced nothing can be raised, and JAX moves
        the tokens back to the last place where they fit.
    """
    tokens, max_seq = value.shape[2], kv.shape[4]
    if isinstance(position, (int, np.integer)) and not 0 <= position <= max_seq - tokens:
        raise ValueError(
            f"{tokens} tokens at position {position} do not fit a cache of {max_seq} tokens"
        )
    xp = array_api_compat.array_namespace(kv)
    value = xp.astype(value, kv.dtype, copy=False)
    if array_api_compat.is_jax_array(kv):
        import jax

        start = (layer, which, 0, 0, position, 0)
        return jax.lax.dynamic_update_slice(kv, value[None, None], start)
    kv[layer, which, :, :, position : position + tokens] = value
    return kv


def _read_kv(kv: Any, layer: int, which: int, position: Any, tokens: int) -> Any:
    """Return one layer's keys or values as float32, cut to what is written where that is known."""
    xp = array_api_compat.array_namespace(kv)
    length = position + tokens if isinstance(position, (int, np.integer)) else kv.shape[4]
    return xp.astype(kv[layer, which, :, :, :length], xp.float32, copy=False)


# The model -------------------------------------------------------------------------------------


def _arange(length: int, like: Any) -> Any:
    """Count from 0 on the device of `like`."""
    xp = array_api_compat.array_namespace(like)
    device = array_api_compat.device(like) if array_api_compat.is_torch_array(like) else None
    return xp.arange(length, device=device)


def _rms_norm(x: Any, gain: Any) -> Any:
    """Scale each token to unit root mean square, then by a learned gain."""
    xp = array_api_compat.array_namespace(x)
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + _NORM_EPSILON) * gain


def _rotary_angles(tokens: int, position: Any, like: Any, config: Config) -> tuple[Any, Any]:
    """Return the cosines and sines, ``(tokens, head_dim / 2)``, of the tokens' rotations."""
    xp = array_api_compat.array_namespace(like)
    pairs = config.head_dim // 2
    exponent = xp.astype(_arange(pairs, like), xp.float32) * (-math.log(config.rotary_base) / pairs)
    index = xp.astype(_arange(tokens, like) + position, xp.float32)
    angles = index[:, None] * xp.exp(exponent)
    return xp.cos(angles), xp.sin(angles)


def _rotate(x: Any, angles: tuple[Any, Any]) -> Any:
    """Turn each pair ``(x[i], x[i + head_dim / 2])`` by its angle."""
    xp = array_api_compat.array_namespace(x)
    cos, sin = angles
    pairs = x.shape[-1] // 2
    first, second = x[..., :pairs], x[..., pairs:]
    return xp.concat([first * cos - second * sin, first * sin + second * cos], axis=-1)


def _project(
    params: Mapping[str, Any], layer: int, x: Any, angles: tuple[Any, Any], config: Config
) -> tuple[Any, Any, Any]:
    """Return a block's queries, keys and values, each ``(batch, heads, tokens, head_dim)``."""
    xp = array_api_compat.array_namespace(x)
    batch, tokens, _ = x.shape
    normed = _rms_norm(x, params[f"layer.{layer}.attention.norm"])
    qkv = normed @ params[f"layer.{layer}.attention.qkv"]
    qkv = xp.reshape(qkv, (batch, tokens, 3, config.heads, config.head_dim))
    qkv = xp.permute_dims(qkv, (2, 0, 3, 1, 4))
    return _rotate(qkv[0, ...], angles), _rotate(qkv[1, ...], angles), qkv[2, ...]


def _attention_weights(queries: Any, keys: Any, position: Any) -> Any:
    """Return how much each query looks at each key: ``(batch, heads, queries, keys)``."""
    xp = array_api_compat.array_namespace(queries)
    scores = queries @ xp.matrix_transpose(keys) / math.sqrt(queries.shape[-1])
    index = _arange(queries.shape[2], queries) + position
    visible = _arange(keys.shape[2], queries)[None, :] <= index[:, None]
    scores = xp.where(visible, scores, -math.inf)
    scores = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return scores / xp.sum(scores, axis=-1, keepdims=True)


def _attend(queries: Any, keys: Any, values: Any, position: Any) -> Any:
    """Average the values that each query may see: ``(batch, heads, queries, head_dim)``."""
    return _attention_weights(queries, keys, position) @ values


def _finish_block(params: Mapping[str, Any], layer: int, x: Any, attended: Any) -> Any:
    """Add a block's attention and then its MLP to the residual stream."""
    xp = array_api_compat.array_namespace(x)
    joined = xp.reshape(xp.permute_dims(attended, (0, 2, 1, 3)), x.shape)
    x = x + joined @ params[f"layer.{layer}.attention.out"]
    normed = _rms_norm(x, params[f"layer.{layer}.mlp.norm"])
    gate_up = normed @ params[f"layer.{layer}.mlp.gate_up"]
    hidden = gate_up.shape[-1] // 2
    half_gate, up = 0.5 * gate_up[..., :hidden], gate_up[..., hidden:]
    # SiLU, gate * sigmoid(gate), in a form that cannot overflow.
    gated = half_gate * (1 + xp.tanh(half_gate)) * up
    return x + gated @ params[f"layer.{layer}.mlp.down"]


def _embed(params: Mapping[str, Any], tokens: Any) -> Any:
    """Return the residual stream's start, ``(batch, tokens, width)``."""
    table = params["embedding"]
    xp = array_api_compat.array_namespace(table)
    rows = xp.take(table, xp.reshape(tokens, (-1,)), axis=0)
    return xp.reshape(rows, (*tokens.shape, table.shape[1]))


def forward(
    params: Mapping[str, Any],
    tokens: Any,
    kv: Any,
    position: Any,
    *,
    config: Config,
    attend: Callable[[Any, Any, Any, Any], Any] = _attend,
) -> tuple[Any, Any]:
    """Run the model over some consecutive tokens.

    Parameters
    ----------
    params
        Parameters by name, float32 arrays of one framework.
    tokens
        Integers of shape ``(batch, tokens)``: a prompt, or one token of each sequence.
    kv
        The cache, with everything before `position` already in it, in float32 or any float dtype
        that casts to it; or None to run without one, where `tokens` is then the whole sequence.
        What lies in the cache after the tokens is not looked at, but must be finite.
    position
        Index of the first of the tokens. A Python int lets the model read only the written part
        of the cache; a traced or array scalar makes it read all of it under a mask, which keeps
        one compiled program for every position.
    config
        The shape of the model.
    attend
        Replaces the attention ``(queries, keys, values, position) -> attended``, for a training
        loop that has a fused kernel.

    Returns
    -------
    kv : array or None
        The cache with the tokens' keys and values in it: written in place for NumPy and torch, a
        new array for JAX.
    logits : array
        float32, ``(batch, tokens, vocab)``; row ``i`` scores the token that follows token ``i``.

    Raises
    ------
    ValueError
        If the tokens do not fit the cache (see `write_kv`).
    """
    x = _embed(params, tokens)
    count = tokens.shape[1]
    angles = _rotary_angles(count, position, x, config)
    for layer in range(config.layers):
        queries, keys, values = _project(params, layer, x, angles, config)
        if kv is not None:
            kv = write_kv(kv, layer, KEYS, position, keys)
            kv = write_kv(kv, layer, VALUES, position, values)
            keys = _read_kv(kv, layer, KEYS, position, count)
            values = _read_kv(kv, layer, VALUES, position, count)
        x = _finish_block(params, layer, x, attend(queries, keys, values, position))
    return kv, _rms_norm(x, params["norm"]) @ params["head"]


@functools.cache
def cache_step(config: Config) -> Callable[[Any, Mapping[str, Any], Any, Any], tuple[Any, Any]]:
    """Return the model as a step over its cache: ``step(kv, params, tokens, position)``.

    The cache comes first in the arguments and in the results. The same function is returned for
    the same config, so that whoever compiles it compiles it once.

    Parameters
    ----------
    config
        The shape of the model.

    Returns
    -------
    callable
        ``step(kv, params, tokens, position) -> (kv, logits)``, as `forward`.
    """

    def step(kv: Any, params: Mapping[str, Any], tokens: Any, position: Any) -> tuple[Any, Any]:
        return forward(params, tokens, kv, position, config=config)

    return step


def greedy(logits: Any) -> Any:
    """Return the best next token of each sequence, ``(batch, 1)``, from a step's logits."""
    xp = array_api_compat.array_namespace(logits)
    return xp.argmax(logits[:, -1:, :], axis=-1)


# What a cache says, in NumPy -------------------------------------------------------------------


def cache_norms(kv: np.ndarray, length: int) -> np.ndarray:
    """Return the length of every key and value vector in a cache.

    Parameters
    ----------
    kv
        The cache, or a read-only view of it; float32 or bfloat16.
    length
        Tokens written so far.

    Returns
    -------
    numpy.ndarray
        float32, ``(layers, 2, batch, heads, length)``.
    """
    vectors = kv[:, :, :, :, :length].astype(np.float32)
    return np.sqrt(np.sum(vectors * vectors, axis=-1))


def last_attention(
    params: Mapping[str, np.ndarray],
    token: np.ndarray,
    kv: np.ndarray,
    position: int,
    *,
    config: Config,
) -> np.ndarray:
    """Return what the newest token looks at, from a cache that already holds it.

    The token is run once more, but its keys and values are read and never written, so that `kv`
    may be a read-only view of a cache which another framework owns.

    Parameters
    ----------
    params
        Parameters by name.
    token
        The token at `position` of each sequence, ``(batch, 1)``.
    kv
        The cache, with `position` and everything before it in it.
    position
        Index of the token.
    config
        The shape of the model.

    Returns
    -------
    numpy.ndarray
        float32, ``(layers, batch, heads, position + 1)``; each row adds up to one.
    """
    x = _embed(params, token)
    angles = _rotary_angles(1, position, x, config)
    looks = []
    for layer in range(config.layers):
        queries, _, _ = _project(params, layer, x, angles, config)
        weights = _attention_weights(queries, _read_kv(kv, layer, KEYS, position, 1), position)
        looks.append(weights[:, :, 0])
        attended = weights @ _read_kv(kv, layer, VALUES, position, 1)
        x = _finish_block(params, layer, x, attended)
    return np.stack(looks)


def attention_entropy(weights: np.ndarray) -> np.ndarray:
    """Return the entropy, in bits, of attention weights over their last axis.

    Zero bits is a look at one token; ``log2(n)`` bits is an even look at ``n`` of them.

    Parameters
    ----------
    weights
        Weights that add up to one along the last axis, as `last_attention` returns.

    Returns
    -------
    numpy.ndarray
        float32, the shape of `weights` without its last axis.
    """
    safe = np.where(weights > 0, weights, 1)
    return -np.sum(weights * np.log2(safe), axis=-1)
