"""generate of transformers on a cache in handles, against its StaticCache.

Alone, on any device: ``python -m benchmarks.bench_transformers --device cuda --size large``.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import rlx_driver as rlx
from benchmarks.harness import RESULTS, Row, machine, report
from rlx_driver.integrations.transformers import HandleCache

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {  # hidden, layers, heads, key-value heads, vocabulary
    "small": (256, 4, 8, 4, 1024),
    "medium": (1024, 12, 16, 4, 8192),
    "large": (2048, 16, 32, 8, 32_000),
}
TARGET = 1.03


def model_of(size: str, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Build a Llama of random weights."""
    hidden, layers, heads, stored, words = SIZES[size]
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=stored,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype).eval()


def in_turns(*calls: Callable[[], object], turns: int, device: str) -> list[list[float]]:
    """Time calls one after the other, in both orders, so that none is always first.

    Many short calls: on a busy machine a short one is more often undisturbed.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(turns):
        order = range(len(calls)) if turn % 2 else reversed(range(len(calls)))
        for position in order:
            gc.collect()
            start = time.perf_counter()
            calls[position]()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[position].append(time.perf_counter() - start)
    return seconds


def run(
    device: str = "cpu", size: str = "small", batch: int = 2, tokens: int = 24, turns: int = 60
) -> list[Row]:
    torch.set_num_threads(1)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = model_of(size, device, dtype)
    prompt = torch.randint(1, 1000, (batch, 64), device=device)
    room = prompt.shape[1] + tokens
    static = StaticCache(config=model.config, max_cache_len=room)
    region = rlx.HandleRegion("cpu" if device == "cpu" else "cuda:0")
    ours = HandleCache(model.config, room, region, batch_size=batch, dtype=dtype)

    def generate(cache: Any, **more: Any) -> torch.Tensor:
        cache.reset()
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
            **more,
        )

    rows = []
    ways = {"generate": {"disable_compile": True}}
    if device != "cpu":
        ways["generate, compiled decode"] = {}
    for name, more in ways.items():
        calls = [lambda c=cache, m=more: generate(c, **m) for cache in (ours, static)]
        first, second = (call() for call in calls)  # compiles, and makes handles and views
        if not torch.equal(first, second):
            raise AssertionError("the two caches gave different tokens")
        for call in calls:
            call()
        mine, theirs = map(min, in_turns(*calls, turns=turns, device=device))
        label = f"{name}, Llama {size}, batch {batch}, {tokens} tokens"
        rows.append(Row(label, mine, "StaticCache", theirs, TARGET))
    ours.close()
    region.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    given = parser.parse_args()
    rows = run(given.device, given.size, given.batch, given.tokens, given.turns)
    label = f"{given.device}-transformers"
    facts = machine(given.device) | {"transformers": transformers.__version__}
    print(report(label, rows, facts, given.out))


if __name__ == "__main__":
    main()
