"""Compare the estimate of a run's memory with a measured step of real size on this machine, by level.

A base with random weights is made of a shape, or of some of its layers, because a step of all may take too long.

    python -m scripts.dev.bench.estimate --shape llama3-8b --layers 2 data.max_seq_len=256
"""

import argparse
import tempfile
import time
from pathlib import Path

from scripts.dev.bench.common import ROOT, SHAPES, append, heading, make_base

TITLE = """# A run's memory, predicted and measured

`python -m scripts.dev.bench.estimate --out docs/benchmarks/estimate.md`. The prediction of `qlora estimate` from
a config, and the peak of all tensors in a real optimizer step on this machine, by level of recomputation. CUDA's own
memory is not included in either.
"""


def main() -> None:
    """Make the base and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="limits")
    parser.add_argument(
        "--layers", type=int, help="number of the shape's layers to use, because a step of all may take too long"
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "llama3_8b_24gb.yaml"))
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    sizes = SHAPES[arguments.shape] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), sizes)
        lines = compare(arguments.config, [f"model.base={folder}", *arguments.overrides])
    title = f"memory predicted and measured, {arguments.shape} with {sizes['num_hidden_layers']} layers"
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
    predicted = estimate(settings, loss)
    seconds = time.perf_counter() - started
    model, settings, loss = prepare(settings, resolve_device(), loss)
    lines = [f"{predicted.tokens} tokens; predicted in {seconds:.2f} s", ""]
    lines += ["| recompute | predicted, MiB | measured, MiB | ratio |", "|---|---|---|---|"]
    for level in recompute_levels(model):
        by_kind = predicted.bytes_by_kind(level, predicted.tokens)
        expected, measured = sum(by_kind.values()) - by_kind["context"], measure_step(model, settings, level, loss)
        lines.append(f"| {level} | {expected / 2**20:.1f} | {measured / 2**20:.1f} | {expected / measured:.4f} |")
    return lines


if __name__ == "__main__":
    main()
