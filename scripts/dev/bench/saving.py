"""Measure how long a save blocks the training loop, compared with the time of a step.

Saves twenty times: the quickstart's tiny run, whose step is measured here too, and the state of a Llama-3-8B at rank 16
(42 million trained values), whose layers have no weights here. Appends to docs/benchmarks/saving.md.

    python -m scripts.dev.bench.saving [--folder DISK]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.checkpoint import save_checkpoint
from qlora.config import load_config
from qlora.lora import AdapterSpec, LoraLinear
from qlora.optim import FlatParameters, make_optimizer
from qlora.training import train
from qlora.training.progress import Progress
from scripts.dev.bench.common import BENCHMARKS, ROOT, versions

NUM_SAVES = 20
# Width in and out of a layer's linears, and how many layers there are.
LLAMA_8B = {
    "q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096),
}  # fmt: skip
NUM_LAYERS = 32
# A step of 16 × 2048 tokens at 2,400 tokens a second: torchtune's figure for an 8B model on an RTX 4090.
ASSUMED_STEP_SECONDS = 16 * 2048 / 2400
SAVE_EVERY = 200
TARGET = BENCHMARKS / "saving.md"
HEAD = """
| date | state | MB | save, median s | save, longest s | step s | share of the loop, a save every 200 steps | versions |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; default: a temporary one")
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model, step_seconds = tiny_model(Path(folder))
        rows.append(measure("tiny, 8 bits", model, "adamw_8bit", Path(folder), step_seconds))
        for name, optimizer, rounding in (
            ("Llama-3-8B r16, 8 bits", "adamw_8bit", "stochastic"),
            ("Llama-3-8B r16, 32 bits", "adamw_32bit", "stochastic"),
            ("Llama-3-8B r16, 32 bits and master", "adamw_32bit", "master"),
        ):
            rows.append(measure(name, llama_8b(), optimizer, Path(folder), ASSUMED_STEP_SECONDS, rounding))
    text = arguments.out.read_text(encoding="utf-8") if arguments.out.exists() else ""
    head = "" if HEAD.strip() in text else HEAD
    arguments.out.write_text(text + head + "".join(f"{row}\n" for row in rows), encoding="utf-8")


def tiny_model(folder: Path) -> tuple[nn.Module, float]:
    """Return layers of the quickstart's sizes, and the seconds of a step of its run."""
    for script, out in (("make_base.py", "base"), ("make_instructions.py", "data")):
        command = [sys.executable, ROOT / "scripts" / "tiny" / script, "--out", ROOT / ".cache" / "tiny" / out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    overrides = ["train.max_steps=40", f"train.output_dir={folder / 'run'}", "train.save_every=null"]
    result = train(load_config(str(ROOT / "configs" / "tiny.yaml"), overrides))
    tokens = [line["tokens"] for line in read_lines(folder / "run")]
    mean_tokens = (tokens[-1] - tokens[0]) / (len(tokens) - 1)
    widths = {"q": (192, 192), "k": (192, 192), "v": (192, 192), "o": (192, 192)}
    widths |= {"gate": (192, 512), "up": (192, 512), "down": (512, 192)}
    return layers(widths, 3), mean_tokens / result.tokens_per_second


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Return the training steps that a run logged."""
    from qlora.checkpoint import RunDirectory

    return [line for line in RunDirectory(run).read_metrics() if "loss" in line]


def llama_8b() -> nn.Module:
    """Return an 8B Llama's adapters at rank 16."""
    return layers(LLAMA_8B, NUM_LAYERS)


def layers(widths: dict[str, tuple[int, int]], count: int) -> nn.Module:
    """Return adapters with values around linears without any."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(count))
    for layer in model.layers:
        for name, (inside, outside) in widths.items():
            linear = LoraLinear(nn.Linear(inside, outside, bias=False, device="meta"), AdapterSpec(16, 32))
            linear.base.requires_grad_(False)
            for factor in ("lora_A", "lora_B"):
                empty = getattr(linear, factor)
                setattr(linear, factor, nn.Parameter(torch.randn(empty.shape).to(empty.dtype)))
            setattr(layer, name, linear)
    return model


def measure(
    name: str, model: nn.Module, optimizer_name: str, folder: Path, step_seconds: float, rounding: str = "stochastic"
) -> str:
    """Save repeatedly, each time after an update; return a table's row and print it."""
    flat = FlatParameters((key, value) for key, value in model.named_parameters() if value.requires_grad)
    optimizer = make_optimizer(optimizer_name, flat, rounding=rounding)
    flat.grad.normal_()
    optimizer.step(1e-3)
    seconds = []
    target = folder / "checkpoints" / "step"
    for _ in range(NUM_SAVES):
        started = time.perf_counter()
        save_checkpoint(target, model, optimizer, asdict(Progress()), "base", {})
        seconds.append(time.perf_counter() - started)
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    median = statistics.median(seconds)
    share = median / (SAVE_EVERY * step_seconds + median)
    packages = versions("torch", "safetensors")
    row = (
        f"| {date.today()} | {name} | {size:.1f} | {median:.3f} | {max(seconds):.3f} | {step_seconds:.3f} "
        f"| {share:.3%} | {packages} |"
    )
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
