"""Train a few steps with `qlora train` at different settings, and print what each run used and how fast it was.

Each row is a run in its own process on the same base and tokens, from reading the config to the final save: what was
chosen for `auto`, the memory that was predicted and tried, and the median speed of the steps after the warm-up.

    python -m scripts.dev.bench.runs --row model.recompute=auto --row model.weights=host --out PAGE
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.dev.bench.common import ROOT, SHAPES, Section, cell, heading, make_base, random_rows, shape_name

GIB = 1 << 30
TITLE = """# Runs of `qlora train`

`python -m scripts.dev.bench.runs`. Random weights and tokens; a process for each row. Predicted and tried memory are
those of the largest micro-batch; the second is known on GPUs only.
"""


def main() -> None:
    """Train, print, and append to `--out` if it is given; exit with 1 if a run fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs="+", action="append", metavar="KEY=VALUE", help="settings of a run")
    parser.add_argument("--shape", default="limits", help=f"{', '.join(SHAPES)}, or the path of a config.json")
    parser.add_argument("--base", help="a base that exists, instead of a random one of --shape")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--out", type=Path, help="page to append the table to")
    arguments = parser.parse_args()
    if arguments.steps <= arguments.warm_up:
        parser.error(f"--steps {arguments.steps}: none is timed after --warm-up {arguments.warm_up}; take more")
    title = f"{shape_name(arguments.shape)}, rank {arguments.rank}, {arguments.batch} × {arguments.seq_len} tokens"
    section = Section(arguments.out, TITLE)
    section.write(
        *heading(title, "torch", "bitsandbytes", "transformers"),
        "| settings | recompute | why | predicted GiB | tried GiB | peak GiB | state paged | tokens/s | dequantize |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arguments.base:
            make_base(folder / "base", arguments.shape)
        config = write_config(folder, arguments)
        has_failed = False
        for index, settings in enumerate(arguments.row or [["model.recompute=auto"]]):
            row, has_ended = train(config, folder / f"run-{index}", settings, arguments.warm_up)
            section.write(row)
            has_failed |= not has_ended
    if has_failed:
        sys.exit(1)


def write_config(folder: Path, arguments: argparse.Namespace) -> Path:
    """Write rows of random tokens, and the config of a run on them."""
    base = arguments.base or str(folder / "base")
    vocabulary = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    rows = random_rows(arguments.steps * arguments.batch, arguments.seq_len, vocabulary)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    config = {
        "model": {"base": base, "compute_dtype": "bfloat16"},
        "lora": {"rank": arguments.rank},
        "data": {"train": str(data), "max_seq_len": arguments.seq_len + 1, "cache_dir": str(folder / "cache")},
        "train": {
            "output_dir": str(folder / "run"), "max_steps": arguments.steps, "micro_batch_size": arguments.batch,
            "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "log_every": 1,
        },
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def train(config: Path, run: Path, settings: list[str], warm_up: int) -> tuple[str, bool]:
    """Train with some settings; return the row of the table, with the error if the run fails, and whether it ended."""
    command = [sys.executable, "-m", "qlora", "train", str(config), f"train.output_dir={run}", *settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    name = " ".join(settings)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return f"| {name} | failed with exit code {done.returncode}: {cell(last)} | | | | | | | |", False
    used = json.loads((run / "run.json").read_text(encoding="utf-8"))["in_use"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in logged if "tokens_per_second" in line][warm_up:]
    speed = statistics.median(line["tokens_per_second"] for line in steps)
    memory = used["memory"]
    sizes = [memory["estimated"], memory["measured"], max(line["peak_memory"] for line in steps)]
    return " | ".join([
        f"| {name}", used["recompute"], cell(used["recompute_why"]), *map(gib, sizes),
        "yes" if used["optimizer_state_paged"] else "no", f"{speed:,.0f}", f"{cell(used['dequantize'])} |",
    ]), True  # fmt: skip


def gib(num_bytes: Any) -> str:
    """Return bytes in GiB; a dash if they are not known."""
    return "–" if num_bytes is None else f"{num_bytes / GIB:.2f}"


if __name__ == "__main__":
    main()
