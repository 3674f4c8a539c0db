"""Train the model of `tiny_gpt.py` on the Python documentation that every Python carries.

The text is ``pydoc_data.topics``, the pages behind ``help("...")``. Many paragraphs occur on
several pages; only the first of each is kept, so that the held-out part is text that the model
never saw. The forward is that of the examples; torch adds gradients and a fused attention kernel.

    python examples/train_tiny_gpt.py

takes some minutes on two cores and writes ``examples/data/tiny_gpt.safetensors``.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch

import tiny_gpt

PIECE_BYTES = 4096
HELD_OUT_EVERY = 20


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Return the training text and the held-out text as uint8 arrays.

    Returns
    -------
    train, held_out : numpy.ndarray
        Every twentieth piece of about 4 KiB is held out. Pieces end where paragraphs end.
    """
    seen = set()
    pieces: list[list[str]] = [[]]
    size = 0
    for name in sorted(topics):
        for paragraph in topics[name].strip().split("\n\n"):
            if paragraph.strip() in seen:
                continue
            seen.add(paragraph.strip())
            pieces[-1].append(paragraph)
            size += len(paragraph) + 2
            if size >= PIECE_BYTES:
                pieces.append([])
                size = 0
    texts = ["\n\n".join(piece) + "\n\n" for piece in pieces]
    held_out = "".join(texts[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY])
    del texts[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    return tuple(np.frombuffer(t.encode(), np.uint8) for t in ("".join(texts), held_out))


def fused_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int
) -> torch.Tensor:
    """Do what the model's own attention does over a whole sequence, in one kernel."""
    del position  # a whole sequence starts at 0
    return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)


def bits_per_byte(
    params: dict[str, torch.Tensor], tokens: torch.Tensor, config: tiny_gpt.Config
) -> torch.Tensor:
    """Return the mean cost of predicting each token of ``(batch, tokens)`` from those before."""
    _, logits = tiny_gpt.forward(
        params, tokens[:, :-1], None, 0, config=config, attend=fused_attention
    )
    flat = logits.reshape(-1, config.vocab)
    return torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1)) / math.log(2)


@torch.no_grad()
def evaluate(params: dict[str, torch.Tensor], text: torch.Tensor, config: tiny_gpt.Config) -> float:
    """Return the bits per byte of a text, read in windows of the model's length."""
    windows = text.unfold(0, config.max_seq + 1, config.max_seq)
    costs = [bits_per_byte(params, part, config) for part in windows.split(8)]
    sizes = [len(part) for part in windows.split(8)]
    return float(sum(cost * size for cost, size in zip(costs, sizes, strict=True)) / sum(sizes))


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Rise linearly over `warm_up` steps, then fall along a cosine to nearly zero."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def sample(params: dict[str, np.ndarray], config: tiny_gpt.Config, prompt: str, count: int) -> str:
    """Continue a prompt greedily, in NumPy."""
    kv = np.zeros(config.kv_shape(), np.float32)
    tokens, position, chosen = tiny_gpt.encode(prompt), 0, []
    room = config.max_seq - tokens.shape[1]
    for _ in range(min(count, room)):
        kv, logits = tiny_gpt.forward(params, tokens, kv, position, config=config)
        position += tokens.shape[1]
        tokens = tiny_gpt.greedy(logits)
        chosen.append(int(tokens[0, 0]))
    return tiny_gpt.decode(chosen)


def train(args: argparse.Namespace) -> None:
    """Train, report and save."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    config = tiny_gpt.Config(
        layers=args.layers,
        heads=args.heads,
        head_dim=args.head_dim,
        hidden=args.hidden,
        max_seq=args.max_seq,
    )
    train_bytes, held_out_bytes = corpus()
    train_text = torch.from_numpy(train_bytes.astype(np.int64))
    held_out_text = torch.from_numpy(held_out_bytes.astype(np.int64))
    initial = tiny_gpt.init_params(config, args.seed)
    params = {name: torch.from_numpy(v).requires_grad_() for name, v in initial.items()}
    total = sum(p.numel() for p in params.values())
    print(f"{total:,} parameters, {len(train_text):,} bytes to train on, ", end="")
    print(f"{len(held_out_text):,} held out")

    matrices = [p for p in params.values() if p.ndim > 1]
    gains = [p for p in params.values() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    generator = np.random.default_rng(args.seed)
    start = time.perf_counter()
    recent = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate, args.warm_up)
        # Every other step reads sequences of half the length: cheaper, and no worse to learn from.
        shorter = 1 + step % 2
        length = config.max_seq // shorter
        starts = generator.integers(0, len(train_text) - length, args.batch * shorter)
        windows = starts[:, None] + np.arange(length + 1)
        cost = bits_per_byte(params, train_text[torch.from_numpy(windows)], config)
        optimizer.zero_grad()
        cost.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        recent.append(cost.item())
        if (step + 1) % args.report == 0 or step + 1 == args.steps:
            held_out = evaluate(params, held_out_text, config)
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1:5d}  train {np.mean(recent):.4f}  "
                f"held out {held_out:.4f} bits per byte  {seconds:.0f} s",
                flush=True,
            )
            recent = []

    weights = {name: p.detach().numpy() for name, p in params.items()}
    facts = {
        "text": f"pydoc_data.topics of Python {platform.python_version()}, PSF License",
        "text_sha256": hashlib.sha256(train_bytes.tobytes()).hexdigest(),
        "steps": args.steps,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "held_out_bits_per_byte": f"{held_out:.4f}",
        "torch": torch.__version__,
    }
    tiny_gpt.save_params(args.out, weights, config, facts=facts)
    config, stored = tiny_gpt.load_params(args.out)
    stored_params = {name: torch.from_numpy(v) for name, v in stored.items()}
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, ", end="")
    print(f"held out {evaluate(stored_params, held_out_text, config):.4f} bits per byte")
    for prompt in ("The with statement ", "class ", "An exception "):
        print(f"\n--- {prompt!r}\n{prompt}{sample(stored, config, prompt, 200)}")


def main() -> None:
    """Read the command line and train."""
    default = tiny_gpt.Config()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=tiny_gpt.WEIGHTS)
    parser.add_argument("--batch", type=int, default=4, help="full-length sequences in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--warm-up", type=int, default=100, help="steps")
    parser.add_argument("--weight-decay", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=int, default=200, help="steps between reports")
    for name in ("layers", "heads", "head_dim", "hidden", "max_seq"):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(default, name))
    train(parser.parse_args())


if __name__ == "__main__":
    main()
