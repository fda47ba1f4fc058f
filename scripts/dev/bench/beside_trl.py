"""Train the same pairs by DPO with qlora and with TRL's DPOTrainer on PEFT and bitsandbytes: memory and speed.

Each runs in a process of its own, in the order A B B A, on the same tokens and a random Llama, without activation
checkpointing and with it; TRL in bf16 by autocast, as it does by default. A table is appended to
docs/benchmarks/preferences.md.

    python -m scripts.dev.bench.beside_trl
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.dev.bench.common import (
    BENCHMARKS,
    SHAPES,
    TOKENIZER,
    append,
    build_qlora,
    heading,
    make_base,
    random_rows,
    run_child,
)

TARGET = BENCHMARKS / "preferences.md"
TITLE = "# Preference objectives\n"
ORDER = ("qlora", "trl", "trl", "qlora")
RANK = 16


def main() -> None:
    """Measure, print and append the table; with --trainer, be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="limits", choices=SHAPES)
    parser.add_argument("--pairs", type=int, default=1, help="pairs per batch")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of each side, of which half are the prompt")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--trainer", choices=["qlora", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--recompute", choices=["none", "full"], default="none", help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trainer:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), arguments.shape, TOKENIZER)
        lines = table(arguments, folder)
    print("\n".join(lines))
    append(TARGET, TITLE, lines)


def table(arguments: argparse.Namespace, base: str) -> list[str]:
    """Run both trainers twice at each level of recomputation."""
    size = f"{arguments.pairs} × 2 × {arguments.seq_len} tokens"
    lines = [
        *heading(
            f"DPO compared with TRL: {arguments.shape}, {size}", "torch", "transformers", "trl", "peft", "bitsandbytes"
        ),
        "`python -m scripts.dev.bench.beside_trl`. Saved: bytes per token that autograd keeps for the backward. Peak:",
        "of the tensors of a step, without the model. Two runs of each, A B B A; the faster one counts.",
        "Dequantized: weights dequantized per layer and step; a layer has seven.",
        "",
        "| recompute | trainer | loss | saved B/token | peak, MiB | dequantized | tokens/s | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recompute in ("none", "full"):
        results: dict[str, list[dict[str, Any]]] = {"qlora": [], "trl": []}
        for trainer in ORDER:
            given = [*sys.argv[1:], "--trainer", trainer, "--recompute", recompute, "--base", base]
            results[trainer].append(run_child(__spec__.name, *given))
        best = {trainer: max(runs, key=lambda run: run["speed"]) for trainer, runs in results.items()}
        for trainer, one in best.items():
            speeds = ", ".join(f"{run['speed']:.0f}" for run in results[trainer])
            lines.append(
                f"| {recompute} | {trainer} | {one['loss']:.4f} | {one['saved']:,.0f} | {one['peak'] / 2**20:.0f} | "
                f"{one['dequantized']:g} | {speeds} | {one['cpu']:.1f} |"
            )
        ours, theirs = best["qlora"], best["trl"]
        lines.append(
            f"| {recompute} | ours ÷ TRL's | | {ours['saved'] / theirs['saved']:.2f} | "
            f"{ours['peak'] / theirs['peak']:.2f} | {ours['dequantized'] / theirs['dequantized']:.2f} | "
            f"{ours['speed'] / theirs['speed']:.2f} | "
            f"{ours['cpu'] / theirs['cpu']:.2f} |"
        )
    return lines


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Count bytes, then time steps of one of the two."""
    import torch

    from qlora.memory.probe import measure_peak
    from scripts.dev.bench.counts import Watch, held_for_backward

    model, loss, step = SIDES[arguments.trainer](arguments)
    value = loss()  # a first run may fill caches
    value.backward()
    tokens = 2 * arguments.pairs * arguments.seq_len
    saved = held_for_backward(loss, model).saved / tokens
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    peak = measure_peak(lambda: loss().backward(), torch.device("cpu"), held)
    peak -= sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values())
    with Watch(torch.device("cpu")) as work:
        step()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(arguments.steps):
        step()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "loss": value.item(),
        "saved": saved,
        "peak": peak,
        "dequantized": work.dequantized / model.config.num_hidden_layers,
        "speed": arguments.steps * tokens / seconds,
        "cpu": cpu,
    }


def make_rows(arguments: argparse.Namespace) -> list[list[int]]:
    """Return the sides of pairs with a common prompt, chosen and rejected in turn."""
    half = arguments.seq_len // 2
    prompts = random_rows(arguments.pairs, half, 32_000)
    answers = random_rows(2 * arguments.pairs, arguments.seq_len - half, 32_000, seed=1)
    return [prompts[number // 2] + answer for number, answer in enumerate(answers)]


def prepare_qlora(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return qlora's model, its loss and its step."""
    from qlora.config import TrainSection
    from qlora.data import collate, make_example
    from qlora.objectives import objective_from_section
    from qlora.optim import FlatParameters, make_optimizer

    model, _ = build_qlora(arguments.base, RANK, 2 * RANK, arguments.recompute)
    flat = FlatParameters((name, p) for name, p in model.named_parameters() if p.requires_grad)
    optimizer = make_optimizer("adamw_32bit", flat)
    half = arguments.seq_len // 2
    documents = [make_example(row, [place >= half for place in range(len(row))]) for row in make_rows(arguments)]
    batch = collate(documents, packed=True)
    dpo = objective_from_section(TrainSection(objective="dpo", output_dir="run")).loss

    def loss() -> Any:
        (computed,) = dpo.training_passes(model, batch)
        return computed.total / dpo.units(batch)

    def step() -> None:
        flat.zero_grad()
        loss().backward()
        flat.clip_grad_norm(1.0)
        optimizer.step(1e-5)

    return model, loss, step


def prepare_trl(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the model of TRL's DPOTrainer, its loss and its step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer

    is_recomputed = arguments.recompute == "full"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        arguments.base, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
    )
    for module in base.modules():
        # Otherwise its first evaluation repacks the weights in place, and no gradient is computed.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=base,
            args=DPOConfig(
                output_dir=folder, use_cpu=True, bf16=True, report_to=[], per_device_train_batch_size=arguments.pairs,
                gradient_checkpointing=is_recomputed, gradient_checkpointing_kwargs={"use_reentrant": False},
            ),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
    model = trainer.model.train()
    if is_recomputed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = make_rows(arguments)
    ids = torch.tensor(rows[::2] + rows[1::2])  # all chosen ones first
    completion = (torch.arange(arguments.seq_len) >= arguments.seq_len // 2).long().expand(len(ids), -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)

    def loss() -> Any:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, batch)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return model, loss, step


SIDES = {"qlora": prepare_qlora, "trl": prepare_trl}

if __name__ == "__main__":
    main()
