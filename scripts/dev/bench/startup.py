"""Measure whole commands on a tiny model, compared with importing the libraries that they need.

Each command runs in a process of its own, on one thread, in the order A B B A; its CPU seconds are those of all that it
started. Modules are read from bytecode, as those of an installed package are. A table is appended to `--out`.

    python -m scripts.dev.bench.startup --out docs/benchmarks/startup.md
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.dev.bench.common import ROOT, append, heading, make_base

TITLE = """# Time to the first step and back

`python -m scripts.dev.bench.startup`: CPU seconds of whole commands, on one thread. The first two are the libraries
alone: as `import torch, transformers`, and with what any training on them imports besides, the class of the model,
bitsandbytes and accelerate. `qlora train` trains a tiny Llama for one step and writes a checkpoint, the adapter, the
record, the page and the plot; the other verbs work on its config and its run.
"""
CLASSES = "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM"
SIZES = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = {"num_key_value_heads": 2, "vocab_size": 32}


def main() -> None:
    """Measure, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    lines = [
        *heading("one step", "torch", "transformers", "bitsandbytes", "accelerate"),
        "| command | CPU seconds (two runs) |",
        "|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_run(folder)
        run, merged = str(folder / "run"), str(folder / "merged")
        commands = {
            "import torch, transformers": ["-c", "import torch, transformers"],
            "and the model's class, bitsandbytes, accelerate": ["-c", f"import bitsandbytes, accelerate; {CLASSES}"],
            "qlora --help": ["-m", "qlora", "--help"],
            "qlora estimate": ["-m", "qlora", "estimate", str(config)],
            "qlora preview": ["-m", "qlora", "preview", str(config)],
            "qlora train": ["-m", "qlora", "train", str(config)],
            "qlora merge": ["-m", "qlora", "merge", run, "-o", merged],
            "qlora verify": ["-m", "qlora", "verify", run, merged],
        }
        written = {"qlora train": run, "qlora merge": merged}
        found: dict[str, list[float]] = {command: [] for command in commands}
        # The first round compiles what Python has not compiled yet.
        for command in (*commands, *commands, *reversed(commands)):
            if command in written:
                shutil.rmtree(written[command], ignore_errors=True)
            found[command].append(cpu_seconds(commands[command]))
    lines += [
        f"| {command} | {', '.join(f'{each:.2f}' for each in seconds)} |" for command, (_, *seconds) in found.items()
    ]
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def write_run(folder: Path) -> Path:
    """Write a base, data and a config; return the config."""
    make_base(folder / "base", SIZES | VOCABULARY)
    rows = [json.dumps({"input_ids": [index % 2 for index in range(64)]}) for _ in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    config = {
        "model": {"base": str(folder / "base")},
        "data": {"train": str(folder / "rows.jsonl"), "eval": None, "max_seq_len": 64, "cache_dir": str(folder)},
        "train": {"output_dir": str(folder / "run"), "max_steps": 1},
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return folder / "config.yaml"


def cpu_seconds(arguments: list[str]) -> float:
    """Run Python with some arguments, and return the CPU seconds of it and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
