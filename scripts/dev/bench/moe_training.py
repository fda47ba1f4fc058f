"""Train a tiny mixture of experts and a dense reference of it on the same batches, and compare the losses.

python -m scripts.dev.bench.moe_training --out docs/benchmarks/moe.md
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qlora.lora import add_lora, lora_experts, lora_layers
from qlora.model import load_base
from qlora.optim import FlatParameters, make_optimizer
from scripts.dev.bench.common import REALDATA, append, heading
from scripts.dev.bench.dense_experts import adapt_experts, copy_dequantized

ABOUT = """`python -m scripts.dev.bench.moe_training --out docs/benchmarks/moe.md`. A Qwen3-MoE of {size:,} parameters
({experts} experts, {top_k} of each token; bytes as tokens) is trained in full for {pretraining} steps on one half of
tinyshakespeare. Then rank {rank} on all linear layers and experts ({expert_rank} in these) is trained for {steps} steps
on the other half, {batch} × {length} tokens a step, learning rate {rate:g}, from two copies of the same first values:

- **qlora**: experts in NF4, computed by qlora's products.
- **dense**: the dequantized weights with W + scaling · B A formed by autograd, computed by transformers' eager code.
- **dense, moved**: the same from first values of A that differ by less than a rounding step of the compute dtype. It
  shows how far rounding alone drives two runs apart.

The optimizer and all other layers are the same. Losses are in nats per byte; held out are {held:,} later bytes.
"""
SIZES = {
    "vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
PRETRAINING, STEPS, BATCH, LENGTH, RATE, RANK, HELD_OUT = 300, 200, 4, 128, 2e-3, 8, 16_384
SHOWN = (1, 10, 50, 100, 150, 200)


def read_bytes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the bytes to train the base on, those to adapt it to, and those held out."""
    text = torch.tensor([*(REALDATA / "data" / "tinyshakespeare" / "input.txt").read_bytes()])
    half = len(text) // 2
    return text[:half], text[half:-HELD_OUT], text[-HELD_OUT:]


def draw(data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random excerpts, (batch, length)."""
    starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()])


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the next byte."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def make_base(folder: Path, data: torch.Tensor) -> int:
    """Train a model in full and save it; return its number of parameters."""
    torch.manual_seed(0)
    model, generator = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(PRETRAINING):
        optimizer.zero_grad()
        loss_of(model, draw(data, generator)).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def train(model: Any, data: torch.Tensor, held_out: torch.Tensor) -> tuple[list[float], float]:
    """Train what a model lets train; return the loss of each step, and the held-out loss after the last."""
    trained = ((name, each) for name, each in model.named_parameters() if each.requires_grad)
    optimizer = make_optimizer("adamw_32bit", FlatParameters(trained))
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        optimizer.flat.zero_grad()
        loss = loss_of(model, draw(data, generator))
        loss.backward()
        optimizer.step(RATE)
        losses.append(loss.item())
    with torch.no_grad():
        return losses, loss_of(model, held_out.view(-1, LENGTH)).item()


def make_dense(base: Path, ours: Any, dtype: str) -> Any:
    """Return the dense reference of an adapted model, with its first values."""
    dense, _ = load_base(str(base), "none", compute_dtype=dtype, device="cpu")
    copy_dequantized(ours, dense)
    add_lora(dense, rank=RANK, alpha=2 * RANK, dtype=torch.float32, expert_rank=0)
    firsts = dict(lora_layers(ours))
    for name, layer in lora_layers(dense):
        layer.lora_A.data.copy_(firsts[name].lora_A)
    adapt_experts(dense, lora_experts(ours))
    return dense


def move(model: Any, dtype: str) -> Any:
    """Multiply the first values of a model by numbers that differ from 1 by less than a rounding step of a dtype."""
    generator, step = torch.Generator().manual_seed(2), torch.finfo(getattr(torch, dtype)).eps
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 1 + step * (torch.rand(parameter.shape, generator=generator) - 0.5)
    return model


def compare(base: Path, data: torch.Tensor, held_out: torch.Tensor, dtype: str) -> list[str]:
    """Train all sides in a compute dtype; return a table's row for each, and for their differences."""
    ours, _ = load_base(str(base), compute_dtype=dtype, device="cpu")
    add_lora(ours, rank=RANK, alpha=2 * RANK, dtype=torch.float32)
    sides = {"qlora": ours, "dense": make_dense(base, ours, dtype)}
    sides["dense, moved"] = move(make_dense(base, ours, dtype), dtype)
    lines, losses = [], {}
    for name, model in sides.items():
        with torch.no_grad():
            start = loss_of(model, held_out.view(-1, LENGTH)).item()
        found, held = train(model, data, held_out)
        losses[name] = [*found, held]
        shown = [found[step - 1] for step in SHOWN] + [held]
        lines.append(f"| {dtype} | {name} | {start:.4f} | " + " | ".join(f"{value:.4f}" for value in shown) + " |")
    for name in ("qlora", "dense, moved"):
        *apart, held = (abs(one - other) for one, other in zip(losses[name], losses["dense"], strict=True))
        most = [max(apart[:step]) for step in SHOWN] + [held]
        title = f"{name}: largest difference from dense so far"
        lines.append(f"| {dtype} | {title} | | " + " | ".join(f"{value:.1e}" for value in most) + " |")
    return lines


def main() -> None:
    """Train, print the table and append it to a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page to append to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    own, other, held_out = read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        size = make_base(Path(folder), own)
        rows = [row for dtype in ("float32", "bfloat16") for row in compare(Path(folder), other, held_out, dtype)]
    about = ABOUT.format(
        size=size, experts=SIZES["num_experts"], top_k=SIZES["num_experts_per_tok"], pretraining=PRETRAINING, rank=RANK,
        expert_rank=RANK // SIZES["num_experts_per_tok"], steps=STEPS, batch=BATCH, length=LENGTH, rate=RATE,
        held=HELD_OUT,
    )  # fmt: skip
    steps = " | ".join(f"step {step}" for step in SHOWN)
    table = [f"| compute | side | held out, before | {steps} | held out |", "|---|---|---" + "|---" * 7 + "|"]
    lines = [
        *heading("Experts compared with dense code", "torch", "transformers", "bitsandbytes"),
        about,
        *table,
        *rows,
    ]
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, "# Mixtures of experts\n", lines)


if __name__ == "__main__":
    main()
