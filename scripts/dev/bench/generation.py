"""Measure generated tokens on a CPU, one prompt at a time: qlora, PEFT with bitsandbytes, and the model in bf16.

Greedy answers of a model with random weights and an adapter, in the order A B B A and again, as CPU milliseconds per
token; the fastest run of each side counts. bitsandbytes packs its weights for products with one row where the
processor has bf16. A table is appended to `--out`.

    python -m scripts.dev.bench.generation --out docs/benchmarks/generation.md
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import qlora
from qlora.model.generate import ready_to_answer
from scripts.dev.bench.common import SHAPES, TOKENIZER, append, heading, make_base, shape_name

TITLE = """# Generation on a CPU

`python -m scripts.dev.bench.generation`: one prompt of 32 tokens, greedy, rank 16 on all linear layers; CPU
milliseconds per token, in the order A B B A. qlora is measured with its weights packed, or cached where they can't be,
which it does while it answers as far as half of the free memory holds them, and without.
"""
RANK, PROMPT, TOKENS = 16, 32, 48


def main() -> None:
    """Measure, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="limits", help=f"{', '.join(SHAPES)}, or the path of a config.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    title = f"{shape_name(arguments.shape)}, {arguments.threads} thread{'s' * (arguments.threads > 1)}"
    lines = [
        *heading(title, "torch", "transformers", "peft", "bitsandbytes"),
        "| side | ms per token (four runs) | PEFT's time ÷ this side's |",
        "|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), arguments.shape, TOKENIZER)
        sides = {name: build(folder) for name, build in SIDES.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name in 2 * (*sides, *reversed(sides)):
        with ready_to_answer(sides[name]) if name == "qlora" else nullcontext():
            times[name].append(milliseconds(sides[name]))
    theirs = min(times["PEFT"])
    for name, own in times.items():
        lines.append(f"| {name} | {', '.join(f'{each:.1f}' for each in own)} | {theirs / min(own):.2f} |")
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


@torch.no_grad()
def milliseconds(model: Any) -> float:
    """Return the CPU milliseconds of a token."""
    ids = torch.arange(5, 5 + PROMPT).unsqueeze(0)
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    model.eval().generate(ids, **settings)  # imports, and what every size needs
    started = time.process_time()
    model.generate(ids, **settings)
    return (time.process_time() - started) / TOKENS * 1e3


def adapted(folder: str) -> Any:
    """Return the base in 4 bits with adapters."""
    model, _ = qlora.load_base(folder, compute_dtype="bfloat16", device="cpu")
    qlora.add_lora(model, rank=RANK)
    return model


def peft(folder: str) -> Any:
    """Return the base on bitsandbytes' layers with PEFT's adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=settings
    )
    adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, adapters)


def plain(folder: str) -> Any:
    """Return the base in bf16 without adapters."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


SIDES: dict[str, Callable[[str], Any]] = {
    "qlora": adapted,
    "qlora, weights not cached": adapted,
    "PEFT": peft,
    "bf16 without adapters": plain,
}


if __name__ == "__main__":
    main()
