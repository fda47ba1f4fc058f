"""Compare the estimate of a run's memory with a measured step of real size on this machine, by level.

A base with random weights is made of a shape, or of some of its layers, because a step of all may take too long.

    python -m scripts.dev.bench.estimate --shape llama3-8b --layers 2 data.max_seq_len=256
"""

import argparse
import tempfile
import time
from pathlib import Path

from scripts.dev.bench.common import ROOT, SHAPES, append, heading, make_base

TITLE = """# A run's memory, reckoned and measured

`python -m scripts.dev.bench.estimate --out docs/benchmarks/estimate.md`. What `qlora estimate` predicts from a config
alone, and the most that all tensors of a real optimizer step took at once on this machine, by level of recomputation.
What CUDA itself takes is left out on both sides.
"""


def main() -> None:
    """Make the base and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="limits")
    parser.add_argument("--layers", type=int, help="of the shape, as a step of all may take too long")
    parser.add_argument("--config", default=str(ROOT / "configs" / "llama3_8b_24gb.yaml"))
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    sizes = SHAPES[arguments.shape] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), sizes)
        lines = compare(arguments.config, [f"model.base={folder}", *arguments.overrides])
    title = f"memory reckoned and measured, {arguments.shape} with {sizes['num_hidden_layers']} layers"
    lines = [*heading(title, "torch", "transformers", "bitsandbytes"), *lines]
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def compare(config: str, overrides: list[str]) -> list[str]:
    """Return a table with a row for each level that this machine supports."""
    from qlora.config import load_config
    from qlora.layers.recompute import recompute_levels
    from qlora.memory.estimate import estimate
    from qlora.memory.probe import measure_step, prepare
    from qlora.model import resolve_device
    from qlora.objectives import objective_from_section

    settings = load_config(config, overrides)
    loss, started = objective_from_section(settings.train).loss, time.perf_counter()
    reckoned = estimate(settings, loss)
    seconds = time.perf_counter() - started
    model = prepare(settings, resolve_device())
    lines = [f"{reckoned.tokens} tokens; reckoned in {seconds:.2f} s", ""]
    lines += ["| recompute | reckoned, MiB | measured, MiB | ratio |", "|---|---|---|---|"]
    for level in recompute_levels(model):
        by_kind = reckoned.bytes_by_kind(level, reckoned.tokens)
        expected, measured = sum(by_kind.values()) - by_kind["context"], measure_step(model, settings, level, loss)
        lines.append(f"| {level} | {expected / 2**20:.1f} | {measured / 2**20:.1f} | {expected / measured:.4f} |")
    return lines


if __name__ == "__main__":
    main()
