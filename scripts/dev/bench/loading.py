"""Measure the host memory that loading a base takes, compared with the size of its files.

Makes a random Llama checkpoint of the given sizes in a temporary folder, loads it in a new process, and appends
a line to docs/benchmarks/loading.md: the highest resident memory during the load above that before it.

    python -m scripts.dev.bench.loading --layers 8 --hidden 2048 --intermediate 8192
    python -m scripts.dev.bench.loading --base FOLDER
"""

import argparse
import json
import math
import re
import tempfile
import time
from datetime import date
from pathlib import Path

from scripts.dev.bench.common import BENCHMARKS, make_base, run_child, versions

TARGET = BENCHMARKS / "loading.md"
TITLE = """# Host memory while a base is loaded

Random Llama checkpoints in bf16, loaded on a CPU: `python -m scripts.dev.bench.loading`. The bound is the 4-bit model,
two of its largest tensors and 400 MB. Peaks are resident memory (VmHWM) above what was resident after the imports.

| date | checkpoint MB | 4-bit model MB | largest tensor MB | bound MB | peak MB | seconds | versions |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Make the checkpoint, measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--base", type=Path, help="folder of a checkpoint, instead of a random one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    sizes = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 128,
        "vocab_size": arguments.vocabulary,
    }
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.base or Path(folder)
        if arguments.base is None:
            make_base(base, sizes)
        files = [*base.glob("*.safetensors")]
        checkpoint = sum(path.stat().st_size for path in files) / 1e6
        largest = max(largest_tensor(path) for path in files) / 1e6
        found = run_child(__spec__.name, "--measure", str(base))
    packages = versions("torch", "transformers", "bitsandbytes")
    row = (
        f"| {date.today()} | {checkpoint:.0f} | {found['base']:.0f} | {largest:.0f} "
        f"| {found['base'] + 2 * largest + 400:.0f} | {found['peak']:.0f} | {found['seconds']:.1f} | {packages} |"
    )
    print(row)
    if not TARGET.exists():
        TARGET.write_text(TITLE, encoding="utf-8")
    with TARGET.open("a", encoding="utf-8") as file:
        file.write(row + "\n")


def largest_tensor(path: Path) -> int:
    """Return the bytes of the largest tensor of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = (file.get_slice(name) for name in file.keys())  # noqa: SIM118  (it is no dict)
        return max(math.prod(each.get_shape()) * int(re.sub(r"\D", "", each.get_dtype())) // 8 for each in tensors)


def measure(folder: str) -> dict[str, float]:
    """Load a base; return the memory and time that it took, in MB and seconds."""
    import bitsandbytes  # noqa: F401  (imported before, as all that is not the base's)
    import torch

    from qlora.model import load_base, take_inventory

    torch.ones(8, 8) @ torch.ones(8, 8)
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident memory
    before, started = resident("VmRSS"), time.perf_counter()
    model, _ = load_base(folder, compute_dtype="bfloat16")
    seconds, peak = time.perf_counter() - started, resident("VmHWM") - before
    return {"peak": peak, "base": take_inventory(model).base_bytes / 1e6, "seconds": seconds}


def resident(key: str) -> float:
    """Return a line of /proc/self/status, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
