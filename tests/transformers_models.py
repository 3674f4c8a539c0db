"""Small models of random weights, and how the tests run them."""

from __future__ import annotations

import functools

import torch
import transformers

LENGTH = 40
"""Tokens that the caches of the tests hold."""

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def config_of(name):
    """Give the config of a small model."""
    if name == "llama":
        return transformers.LlamaConfig(**_COMMON)
    if name == "qwen":
        return transformers.Qwen3Config(**_COMMON, head_dim=16)
    if name == "gemma":  # one layer of a window, one of full attention
        kinds = ["sliding_attention", "full_attention"]
        return transformers.Gemma3TextConfig(
            **_COMMON, head_dim=16, sliding_window=8, layer_types=kinds
        )
    if name == "mistral":  # windows only
        return transformers.MistralConfig(**_COMMON, sliding_window=8)
    assert name == "gpt2"
    return transformers.GPT2Config(
        vocab_size=64,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


@functools.cache
def model_of(name):
    """Build a small model whose greedy tokens vary."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0 if weight.ndim > 1 else 1.0)
    return model


def prompt_of(batch, tokens, seed=0):
    """Give random tokens, none of which is padding."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (batch, tokens), generator=made)


def generate(model, prompt, cache, new=16, **more):
    """Generate greedily; the mask may be given."""
    more.setdefault("attention_mask", torch.ones_like(prompt))
    more.setdefault("do_sample", False)
    return model.generate(prompt, past_key_values=cache, max_new_tokens=new, **more)


def static(model, length=LENGTH):
    """Give the cache of transformers that HandleCache stands in for."""
    return transformers.StaticCache(config=model.config, max_cache_len=length)


def dynamic(model):
    """Give the cache that grows."""
    return transformers.DynamicCache(config=model.config)
