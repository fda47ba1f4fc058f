"""Trains the same batches with qlora and with PEFT + bitsandbytes, and compares loss and time.

Each runs in a process of its own, in the order A B B A, on the same tokens, seed, rank and learning rate, without
recomputation and with it. A table is appended to docs/benchmarks/beside_peft.md.

    python scripts/bench/beside_peft.py --base FOLDER --text FILE
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[2] / "docs" / "benchmarks" / "beside_peft.md"
ORDER = ("qlora", "peft", "peft", "qlora")


def main() -> None:
    """Measures, prints and appends the table; called with --trainer it is one of the measured processes."""
    realdata = Path(os.environ.get("QLORA_REALDATA", "../shared/realdata"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(realdata / "models" / "stories260K-hf"))
    parser.add_argument("--text", default=str(realdata / "data" / "tinyshakespeare" / "input.txt"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=384)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--trainer", choices=["qlora", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--recompute", choices=["none", "full"], default="none", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trainer:
        print(json.dumps(measure(arguments)))
        return
    lines = table(arguments)
    print("\n".join(lines))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with TARGET.open("a", encoding="utf-8") as file:
        file.write("\n".join([*lines, "", ""]))


def table(arguments: argparse.Namespace) -> list[str]:
    """Runs both trainers twice at each level of recomputation."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "bitsandbytes", "transformers", "peft"))
    lines = [
        f"## {date.today()}: {Path(arguments.base).name}, {arguments.steps} steps of {arguments.batch} × "
        f"{arguments.seq_len} tokens, rank 8, alpha 16, lr {arguments.learning_rate:g}",
        "",
        f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}; {packages}",
        "",
        "| recompute | trainer | held-out loss before | after | seconds of training (two runs) |",
        "|---|---|---|---|---|",
    ]
    for recompute in ("none", "full"):
        results: dict[str, list[dict[str, Any]]] = {"qlora": [], "peft": []}
        for trainer in ORDER:
            command = [sys.executable, __file__, *sys.argv[1:], "--trainer", trainer, "--recompute", recompute]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[trainer].append(json.loads(output.splitlines()[-1]))
        for trainer, runs in results.items():
            seconds = ", ".join(f"{run['seconds']:.1f}" for run in runs)
            lines.append(f"| {recompute} | {trainer} | {runs[0]['before']:.4f} | {runs[0]['after']:.4f} | {seconds} |")
        best = {trainer: min(run["seconds"] for run in runs) for trainer, runs in results.items()}
        lines.append(f"| {recompute} | PEFT's time ÷ ours | | | {best['peft'] / best['qlora']:.2f} |")
    return lines


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains with one of the two, on batches made by the same code."""
    import torch

    from qlora.data import BatchPlan, Source, Treatment, build_datasets, collate, eval_batches
    from qlora.model import evaluate

    model, tokenizer, parameters = BUILDERS[arguments.trainer](arguments)
    datasets = build_datasets(
        tokenizer, [Source(arguments.text)], 0.02, Treatment(max_seq_len=arguments.seq_len, overlong="split")
    )
    plan = BatchPlan(datasets.train.lengths, arguments.batch, 1)
    batches = [collate([datasets.train[index] for index in plan.window(step)]) for step in range(arguments.steps)]
    unwrapped = model.base_model.model if arguments.trainer == "peft" else model
    before = evaluate(unwrapped, eval_batches(datasets.eval, arguments.batch)).loss
    model.train()
    train = train_qlora if arguments.trainer == "qlora" else train_peft
    started = time.perf_counter()
    train(model, parameters, batches, arguments.learning_rate)
    seconds = time.perf_counter() - started
    assert torch.isfinite(torch.tensor(before))
    return {
        "before": before,
        "after": evaluate(unwrapped, eval_batches(datasets.eval, arguments.batch)).loss,
        "seconds": seconds,
    }


def build_qlora(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Our base with our adapters, and their flat buffer."""
    from qlora.lora import add_lora
    from qlora.model import apply_recompute, load_base
    from qlora.optim import FlatParameters

    model, tokenizer = load_base(arguments.base)
    add_lora(model, rank=8, alpha=16, seed=0)
    apply_recompute(model, arguments.recompute)
    return model, tokenizer, FlatParameters((n, p) for n, p in model.named_parameters() if p.requires_grad)


def train_qlora(model: Any, flat: Any, batches: list[Any], learning_rate: float) -> None:
    """Our step."""
    from qlora.model import supervised_loss
    from qlora.optim import FlatAdamW

    optimizer = FlatAdamW(flat, "adamw_32bit")
    for batch in batches:
        flat.zero_grad()
        (supervised_loss(model, batch) / batch.num_supervised).backward()
        flat.clip_grad_norm(1.0)
        optimizer.step(learning_rate)


def build_peft(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """PEFT's adapters on bitsandbytes' own layers, as transformers loads them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    torch.manual_seed(0)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.bfloat16, quantization_config=quantization)
    for module in model.modules():
        # Else its first evaluation repacks the weights in place, and no gradient comes back.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    if arguments.recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, AutoTokenizer.from_pretrained(arguments.base), trained


def train_peft(model: Any, parameters: Any, batches: list[Any], learning_rate: float) -> None:
    """The step that transformers' trainer makes."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), batch.labels.view(-1), reduction="sum")
        (loss / batch.num_supervised).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


BUILDERS = {"qlora": build_qlora, "peft": build_peft}

if __name__ == "__main__":
    main()
