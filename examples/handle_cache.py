"""A key-value cache that transformers writes and JAX resamples, at one address.

A model writes several continuations of a prompt at once, each token drawn by chance. Then JAX looks
at the keys of all of them where torch has put them, picks the continuation that repeats itself
least, and copies its row of the cache over the others, in place. The model goes on from there. A
program of ten lines that used `StaticCache` differs in two.

    python examples/handle_cache.py
    python examples/handle_cache.py --device cuda:0

The weights are random, so the tokens mean nothing; the checks hold for any weights. It exits with 1
when one fails.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import rlx_driver as rlx
from rlx_driver.integrations.transformers import HandleCache

ROWS, PROMPT, NEW = 4, 12, 16
ROOM = PROMPT + 2 * NEW


def build(device: rlx.Device) -> LlamaForCausalLM:
    """Make a small Llama of random weights, large enough ones that its tokens vary."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.ndim > 1 else 1.0)
    return model.to(str(device))


def write(model: LlamaForCausalLM, tokens: torch.Tensor, cache: Any, **how: Any) -> torch.Tensor:
    """Write on; the user's own lines, which know nothing of handles."""
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=NEW,
        disable_compile=True,
        **how,
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def repetition(keys: list[jax.Array], start: int, stop: int) -> jax.Array:
    """Say of each row how alike the keys of its tokens from start to stop are, 1 when equal."""
    scores = []
    for key in keys:
        new = key[:, :, start:stop]
        new = new / jnp.linalg.norm(new, axis=-1, keepdims=True)
        alike = jnp.einsum("bhid,bhjd->bij", new, new) / key.shape[1]
        scores.append((alike.sum((1, 2)) - (stop - start)) / ((stop - start) * (stop - start - 1)))
    return jnp.stack(scores).mean(0)


def keep_row(handles: Any, row: jax.Array) -> Any:
    """Give every row of the cache what one of them holds."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x[row][None], x.shape), handles)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; exits with a message when it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where model and cache are: cpu, cuda:0")
    args = parser.parse_args(argv)
    try:
        args.device = rlx.Device(args.device)
        args.device.memory()  # raises if there is no such device
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    """Run it, print what happened, and return 0 if every check passes."""
    device = parse(argv).device
    torch.set_num_threads(1)
    model = build(device)
    prompt = torch.randint(1, 256, (1, PROMPT), device=str(device)).repeat(ROWS, 1)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)

    region = rlx.HandleRegion(device)
    cache = HandleCache(model.config, ROOM, region, batch_size=ROWS)  # the line that changes
    home = [handle.address for pair in cache.handles for handle in pair]
    with rlx.command_stream(device), rlx.ledger.record() as record, rlx.no_copies():
        torch.manual_seed(1)
        drafts = write(model, prompt, cache, do_sample=True)
        length = cache.length  # the last token is not in the cache yet

        scores = repetition([key.jax() for key, _ in cache.handles], PROMPT, length)  # in JAX
        best = jnp.argmin(scores)
        rlx.update(cache.handles, keep_row, best)

        chosen = drafts[int(best)].repeat(ROWS, 1)
        torch.manual_seed(2)
        found = write(model, chosen, cache, do_sample=True)

    plain = StaticCache(config=model.config, max_cache_len=ROOM)
    torch.manual_seed(2)
    expected = write(model, chosen, plain, do_sample=True)  # torch alone, from the beginning

    table = Table(title="Continuations", title_justify="left", show_edge=False)
    for column in ("row", "alike", "tokens"):
        table.add_column(column)
    for row, (score, tokens) in enumerate(zip(np.asarray(scores), drafts.tolist(), strict=True)):
        mark = " (kept)" if row == int(best) else ""
        table.add_row(f"{row}{mark}", f"{score:.3f}", " ".join(map(str, tokens[PROMPT:])))
    console.print(f"One cache on {device}, for torch and JAX", style="bold")
    console.print("", table, "")
    report = rlx.memory_report()
    console.print(
        f"The cache is {region.byte_size:,} bytes in {len(region)} handles. {record.counts}"
    )

    checks = {
        "the continuations differ": len({tuple(row) for row in drafts.tolist()}) == ROWS,
        f"the {NEW} tokens after JAX equal those of torch alone": torch.equal(found, expected),
        "the keys and values are at their addresses": (
            home == [handle.address for pair in cache.handles for handle in pair]
        ),
        "0 bytes copied by the driver": record.counts.copies == 0,
        "the memory report names the cache": "cache.0.key" in str(report),
    }
    cache.close()
    region.close()
    for text, passed in checks.items():
        console.print("ok  " if passed else "FAIL", text, style="green" if passed else "bold red")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
