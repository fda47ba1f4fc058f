"""Measure the held-out loss after training by method, learning rate, rank and seed, on a real model.

Every method is compared at its best rate of a grid of factors of 3, which grows while the best rate is at an end of it;
then the middle between the best rate and its better neighbour is tried.
Runs of one seed see the same batches. Results are appended to a file as they come; started again, it continues.

    python -m scripts.dev.bench.methods --results FILE --out docs/benchmarks/methods.md
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import qlora
from scripts.dev.bench.common import REALDATA, append, heading

TITLE = """# Initial values and methods of training
"""
MODEL = REALDATA / "models" / "stories260K-hf"
TASK = """`python -m scripts.dev.bench.methods --results FILE --only {table}`. stories260K-hf, a real Llama of 260,032
parameters, in NF4 with double quantization; all linear layers, {steps} steps of 4 × {length} tokens, compute in fp32,
factors in bf16 with stochastic rounding, AdamW, cosine schedule, gradients clipped to norm 0.3. Losses are those of
held-out text after the last step. Runs of one seed see the same batches."""
STEPS, LENGTH = 60, 128
SEEDS = (0, 1, 2)
# Characters of the end of a text that are held out.
HELD_OUT = 20_000
# Rates are powers of 3 times this one. The exponents that the grids begin with, and those of methods that differ.
MIDDLE_RATE = 1e-2
FIRST_EXPONENTS: tuple[float, ...] = (-1, 0)
OTHER_EXPONENTS: dict[str, tuple[float, ...]] = {"LoRA+": (-3, -2)}
LEAST_EXPONENT, MOST_EXPONENT = -5, 2
RANK, ALPHA = 8, 16
# Trained rows that have as many numbers as factors of rank 8, rank · (in + out) / in.
ROWS = {"rank": 16, "rank_pattern": {"[kv]_proj": 12, "(gate|up)_proj": 29, "down_proj": 11}}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "DoRA": {"lora": {"kind": "dora"}},
    "LoRA+": {"train": {"learning_rates": {"lora_B": "16x"}}},
    "EVA": {"lora": {"init": "eva"}},
    "reconstruct": {"lora": {"init": "reconstruct"}},
    "PiSSA": {"lora": {"init": "pissa"}},
    "rows": {"lora": {"kind": "rows", **ROWS}},
    "B alone": {"lora": {"train": "B", "init": "orthogonal"}},
    "adaptive rank": {"lora": {"rank": 16, "alpha": 32, "final_rank": 8}},
}
RANKS, RANKS_ALPHA = (1, 4, 16, 64), 32
AUTO_RANK = 16
TEXTS = ("tinyshakespeare", "alpaca", "wikisql")


@dataclass(frozen=True, slots=True)
class Run:
    """What distinguishes a run from the others; `rate` is an exponent of 3 on the middle rate, or None for `auto`."""

    method: str
    rate: float | None
    seed: int = 0
    rank: int = RANK
    alpha: int = ALPHA
    text: str = "tinyshakespeare"

    @property
    def learning_rate(self) -> float | str:
        """The value of `train.learning_rate`."""
        return "auto" if self.rate is None else float(f"{MIDDLE_RATE * 3**self.rate:.3g}")

    def config(self, texts: Path, output_dir: Path) -> dict[str, dict[str, Any]]:
        """Return the sections of the run's config."""
        changes = METHODS[self.method]
        lora: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha} | changes.get("lora", {})
        if lora.get("kind") == "rows":
            del lora["alpha"]
        return {
            "model": {"base": str(MODEL), "compute_dtype": "float32", "recompute": "none"},
            "lora": lora,
            "data": {
                "train": str(texts / f"{self.text}-train.txt"),
                "eval": str(texts / f"{self.text}-eval.txt"),
                "max_seq_len": LENGTH,
                "overlong": "split",
            },
            "train": {
                "output_dir": str(output_dir),
                "max_steps": STEPS,
                "micro_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "learning_rate": self.learning_rate,
                "optimizer": "adamw_32bit",
                "eval_every": 1.0,
                "save_every": None,
                "seed": self.seed,
            }
            | changes.get("train", {}),
        }


class Results:
    """Losses by run, in a file of JSON lines.

    Args:
        path: The file; created if it does not exist.
        texts: Folder that the texts are written to.
    """

    def __init__(self, path: Path, texts: Path) -> None:
        self.path, self.texts = path, texts
        self.losses: dict[Run, float] = {}
        self.first: dict[Run, float] = {}
        self.seconds: list[float] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            self._add(json.loads(line))

    def loss(self, run: Run) -> float:
        """Return a run's last held-out loss, after training it if it is not known; infinite if the run failed."""
        if run not in self.losses:
            write_text_parts(run.text, self.texts)
            started, error = time.process_time(), ""
            with tempfile.TemporaryDirectory() as folder:
                try:
                    result = qlora.train(run.config(self.texts, Path(folder) / "run"))
                    if result.status != "finished":
                        raise SystemExit(1)
                    found = list(result.eval_losses.values())
                except qlora.QLoRAError as reason:
                    found, error = [float("inf")], str(reason)
            record = {**asdict(run), "first": found[0], "last": found[-1], "cpu": time.process_time() - started}
            with self.path.open("a", encoding="utf-8") as file:
                print(json.dumps(record | ({"error": error} if error else {})), file=file)
            self._add(record)
        return self.losses[run]

    def best(self, runs: dict[float, Run]) -> float:
        """Return the exponent of the best rate; `runs`, by exponent, grows while it is at an end and by half a step."""

        def choose() -> float:
            return min(runs, key=lambda rate: self.loss(runs[rate]))

        while (best := choose()) in (min(runs), max(runs)):
            step = best - 1 if best == min(runs) else best + 1
            if not LEAST_EXPONENT <= step <= MOST_EXPONENT:
                return best
            runs[step] = replace(runs[best], rate=step)
        neighbours = (rate for rate in runs if abs(rate - best) == 1)
        half = (best + min(neighbours, key=lambda rate: self.loss(runs[rate]))) / 2
        runs[half] = replace(runs[best], rate=half)
        return choose()

    def _add(self, record: dict[str, Any]) -> None:
        first, last, cpu = (record.pop(key) for key in ("first", "last", "cpu"))
        record.pop("error", None)
        run = Run(**record)
        self.first[run], self.losses[run] = first, last
        self.seconds.append(cpu)


def write_text_parts(name: str, folder: Path) -> None:
    """Write a text to train on and its end, which is held out, unless they are there."""
    if not (folder / f"{name}-eval.txt").exists():
        text = read_text(name)
        (folder / f"{name}-train.txt").write_text(text[:-HELD_OUT], encoding="utf-8")
        (folder / f"{name}-eval.txt").write_text(text[-HELD_OUT:], encoding="utf-8")


@cache
def read_text(name: str) -> str:
    """Return one of the texts: plays, instructions with answers, or questions to tables; up to 400,000 characters."""
    data = REALDATA / "data"
    if name == "tinyshakespeare":
        text = (data / name / "input.txt").read_text(encoding="utf-8")
    elif name == "alpaca":
        rows = json.loads((data / "llama_factory_demo" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
        text = "\n\n".join(f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows)
    else:
        lines = (data / "mlx_wikisql_lora" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        text = "\n\n".join(json.loads(line)["text"] for line in lines)
    return text[:400_000]


def main() -> None:
    """Train, print the tables, and append them to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines that is continued")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="tables to fill")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, help="page that the tables are appended to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Results(arguments.results, Path(folder))
        lines = [line for name in arguments.only for line in TABLES[name](results, arguments)]
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def compare_methods(results: Results, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the table of methods: all at two rates, then beyond, then the best rates with other seeds."""
    first = {name: OTHER_EXPONENTS.get(name, FIRST_EXPONENTS) for name in arguments.methods}
    grids = {name: {rate: Run(name, rate) for rate in rates} for name, rates in first.items()}
    for place in range(len(FIRST_EXPONENTS)):
        for name, grid in grids.items():
            results.loss(grid[first[name][place]])
    best = {name: results.best(grid) for name, grid in grids.items()}
    losses = {}
    for seed in arguments.seeds:
        for name in arguments.methods:
            losses[name, seed] = results.loss(Run(name, best[name], seed))
    yield from heading("held-out loss by method", "torch", "transformers", "bitsandbytes")
    yield from TASK.format(table="methods", steps=STEPS, length=LENGTH).splitlines()
    yield f"tinyshakespeare; rank {RANK}, alpha {ALPHA}; `rows` trains as many numbers as these factors have. Losses by"
    yield "learning rate are those of seed 0, which decides on the best rate."
    yield ""
    rates = sorted({rate for grid in grids.values() for rate in grid})
    seeds = " | ".join(f"seed {seed}" for seed in arguments.seeds)
    shown = " | ".join(f"{Run('plain', rate).learning_rate:g}" for rate in rates)
    yield f"| method | before | {shown} | best rate | {seeds} | mean | ÷ plain |"
    yield f"|---|{'---|' * (len(rates) + len(arguments.seeds) + 4)}"
    plain = statistics.mean(losses["plain", seed] for seed in arguments.seeds) if "plain" in best else float("nan")
    for name, grid in grids.items():
        own = [losses[name, seed] for seed in arguments.seeds]
        mean = statistics.mean(own)
        cells = [name, f"{results.first[Run(name, best[name])]:.3f}", *row_of_rates(results, grid, rates)]
        cells += [f"{Run(name, best[name]).learning_rate:g}", *(f"{loss:.4f}" for loss in own)]
        yield f"| {' | '.join([*cells, f'{mean:.4f}', f'{mean / plain:.3f}'])} |"
    yield ""


def compare_ranks(results: Results, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the table of ranks: plain adapters with a scaling of alpha / rank."""
    grids = {rank: {rate: Run("plain", rate, 0, rank, RANKS_ALPHA) for rate in FIRST_EXPONENTS} for rank in RANKS}
    best = {rank: results.best(grid) for rank, grid in grids.items()}
    rates = sorted({rate for grid in grids.values() for rate in grid})
    yield from heading("best learning rate by rank", "torch", "transformers", "bitsandbytes")
    yield from TASK.format(table="ranks", steps=STEPS, length=LENGTH).splitlines()
    yield f"tinyshakespeare; plain adapters, scaling {RANKS_ALPHA} / rank, seed 0."
    yield ""
    shown = " | ".join(f"{Run('plain', rate).learning_rate:g}" for rate in rates)
    yield f"| rank | {shown} | best rate |"
    yield f"|---|{'---|' * (len(rates) + 1)}"
    for rank, grid in grids.items():
        cells = [str(rank), *row_of_rates(results, grid, rates), f"{grid[best[rank]].learning_rate:g}"]
        yield f"| {' | '.join(cells)} |"
    yield ""


def compare_auto(results: Results, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the table of `learning_rate: auto` against the best rate of the grid."""
    yield from heading("learning_rate: auto against a sweep", "torch", "transformers", "bitsandbytes")
    yield from TASK.format(table="auto", steps=STEPS, length=LENGTH).splitlines()
    yield f"Plain adapters of rank {AUTO_RANK}, alpha {RANKS_ALPHA}, seed 0."
    yield ""
    yield "| text | before | best rate | loss | auto | loss | difference |"
    yield "|---|---|---|---|---|---|---|"
    for text in TEXTS:
        grid = {rate: Run("plain", rate, 0, AUTO_RANK, RANKS_ALPHA, text) for rate in FIRST_EXPONENTS}
        best = grid[results.best(grid)]
        auto = Run("plain", None, 0, AUTO_RANK, RANKS_ALPHA, text)
        lowest, found = results.loss(best), results.loss(auto)
        cells = [text, f"{results.first[best]:.3f}", f"{best.learning_rate:g}", f"{lowest:.4f}", automatic_rate()]
        yield f"| {' | '.join([*cells, f'{found:.4f}', f'{found / lowest - 1:+.1%}'])} |"
    yield ""


def automatic_rate() -> str:
    """Return the rate that `auto` stands for in these runs."""
    from transformers import AutoConfig

    from qlora.training.auto_rate import auto_rate

    config = AutoConfig.from_pretrained(MODEL)
    return f"{auto_rate(config.model_type, config.hidden_size, AUTO_RANK, RANKS_ALPHA / AUTO_RANK).value:g}"


def row_of_rates(results: Results, grid: dict[float, Run], rates: list[float]) -> list[str]:
    """Return a cell for each rate: the loss with seed 0, if it was trained."""
    return [f"{results.loss(grid[rate]):.4f}" if rate in grid else "" for rate in rates]


TABLES = {"methods": compare_methods, "ranks": compare_ranks, "auto": compare_auto}


if __name__ == "__main__":
    main()
