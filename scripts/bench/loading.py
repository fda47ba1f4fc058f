"""Measures how much host memory loading a base takes, beside the size of its files.

Makes a random Llama checkpoint of the sizes asked for in a temporary folder, loads it in a new process, and appends
a line to docs/benchmarks/loading.md: the highest resident memory during the load above that before it.

    python scripts/bench/loading.py --layers 8 --hidden 2048 --intermediate 8192
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

TARGET = Path(__file__).parents[2] / "docs" / "benchmarks" / "loading.md"
TITLE = """# Host memory while a base is loaded

Random Llama checkpoints in bf16, loaded on a CPU: `python scripts/bench/loading.py`. The bound is the 4-bit model, two
of its largest tensors and 400 MB. Peaks are resident memory (VmHWM) above what was resident after the imports.

| date | checkpoint MB | 4-bit model MB | largest tensor MB | bound MB | peak MB | seconds | versions |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Makes the checkpoint, measures, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", MAKE, folder, json.dumps(vars(arguments))], check=True)
        checkpoint = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6
        command = [sys.executable, __file__, "--measure", folder]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
    largest = 2 * arguments.hidden * max(arguments.intermediate, arguments.vocabulary) / 1e6
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    row = (
        f"| {date.today()} | {checkpoint:.0f} | {found['base']:.0f} | {largest:.0f} "
        f"| {found['base'] + 2 * largest + 400:.0f} | {found['peak']:.0f} | {found['seconds']:.1f} | {packages} |"
    )
    print(row)
    if not TARGET.exists():
        TARGET.write_text(TITLE, encoding="utf-8")
    with TARGET.open("a", encoding="utf-8") as file:
        file.write(row + "\n")


def measure(folder: str) -> dict[str, float]:
    """Loads a base and tells what it took, in MB and seconds."""
    import bitsandbytes  # noqa: F401  (imported before, as all that is not the base's)
    import torch

    from qlora.model import load_base, take_inventory

    torch.ones(8, 8) @ torch.ones(8, 8)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident memory so far
    before, started = resident("VmRSS"), time.perf_counter()
    model, _ = load_base(folder, compute_dtype="bfloat16")
    seconds, peak = time.perf_counter() - started, resident("VmHWM") - before
    return {"peak": peak, "base": take_inventory(model).base_bytes / 1e6, "seconds": seconds}


def resident(key: str) -> float:
    """A line of /proc/self/status, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


MAKE = """
import json, sys, torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sizes = json.loads(sys.argv[2])
config = LlamaConfig(
    hidden_size=sizes["hidden"], intermediate_size=sizes["intermediate"], num_hidden_layers=sizes["layers"],
    vocab_size=sizes["vocabulary"], num_attention_heads=sizes["hidden"] // 128,
)
torch.set_default_dtype(torch.bfloat16)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(sys.argv[1])
"""

if __name__ == "__main__":
    main()
