"""Measure how much a model forgets of its old text while it learns a new one, at equal loss on the new one.

Stories of the model's own kind are the old text, Shakespeare is the new one. Every setting is trained with both ways
to split the stories: those that a run may use (null space, replay), and those that its forgetting is measured on.
Results are appended to a file of JSON lines as they come; those in it already are not measured again.

    python -m scripts.dev.bench.forgetting --results forgetting.jsonl --out docs/benchmarks/methods.md
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from qlora import Callback, load_run, merge, train
from qlora.checkpoint import RunDirectory, read_adapter, read_starts
from qlora.lora import lora_layers
from qlora.model import null_space
from qlora.training.loop import StepReport
from scripts.dev.bench.common import REALDATA, append, heading
from scripts.dev.bench.initial_values import TITLE

ABOUT = """`python -m scripts.dev.bench.forgetting --out docs/benchmarks/methods.md`. A real model of 260,032 parameters
in NF4, trained on stories, learns Shakespeare: rank 8, alpha 16, all linear layers, {steps} steps of {batch} × {length}
tokens, learning rate {rate:g} with a cosine. Every {every} steps, the loss is measured on held-out Shakespeare and on
stories that the run never sees, in nats per token. The columns give the rise of the loss on stories where that on
Shakespeare first falls to a level, interpolated, and in brackets how much less it rises than with the plain run; a dash
is a level that is not reached. Of five stories, two or three are hidden or replayed, and the others are measured, both
ways round with a seed each; figures are means of the two runs.
"""
BATCH, LENGTH, STEPS, EVERY, RATE = 2, 256, 64, 8, 3e-3
TIMED, TIMED_STEPS, ROUNDS = ("plain", "kl 1", "null space", "null space + kl 1"), 12, 4
TRAIN_CHARACTERS, EVAL_CHARACTERS = 120_000, 5_000


@dataclass(frozen=True)
class Setting:
    """What a run does against forgetting.

    Attributes:
        rate: Learning rate.
        kl: Factor of the divergence from the base.
        hides: Whether the inputs of old stories are hidden from the adapters.
        constants: Other values of constants of `qlora.model.null_space`.
        replay: Weight of old stories in the training data; 0 for none.
    """

    rate: float = RATE
    kl: float = 0.0
    hides: bool = False
    constants: Mapping[str, float] = field(default_factory=dict)
    replay: float = 0


def hiding(features: float) -> Setting:
    """Return a setting that hides directions up to this share of the features."""
    constants = {"ENERGY": 1.0, "MOST_OF_FEATURES": features, "MOST_DIRECTIONS": 1 << 10}
    return Setting(hides=True, constants=constants)


SETTINGS = {
    "plain": Setting(),
    "plain, a third of the rate": Setting(rate=RATE / 3),
    "kl 0.1": Setting(kl=0.1),
    "kl 0.3": Setting(kl=0.3),
    "kl 1": Setting(kl=1),
    "kl 3": Setting(kl=3),
    "null space": Setting(hides=True),
    "null space, 12.5% of the features": hiding(0.125),
    "null space, 25% of the features": hiding(0.25),
    "null space, 75% of the features": hiding(0.75),
    "null space + kl 0.3": Setting(hides=True, kl=0.3),
    "null space + kl 1": Setting(hides=True, kl=1),
    "replay, weight 5": Setting(replay=5),
    "replay, weight 20": Setting(replay=20),
    "null space + replay, weight 20": Setting(hides=True, replay=20),
}


@dataclass(frozen=True)
class Run:
    """What a run has shown.

    Attributes:
        name: Name of its setting.
        fold: 0 or 1: which half of the stories it used, and its seed.
        new: Losses on held-out new text, from before the first step on.
        old: Losses on unseen old text, at the same steps.
        residuals: See :func:`residuals`; empty if the run hides nothing.
    """

    name: str
    fold: int
    new: list[float]
    old: list[float]
    residuals: dict[str, list[float]]

    def rise(self, level: float) -> float | None:
        """Return by how much the old loss has risen where the new one first falls to a level; None if it does not."""
        for index in range(1, len(self.new)):
            before, after = self.new[index - 1 : index + 1]
            if after <= level:
                share = (before - level) / (before - after)
                return self.old[index - 1] + share * (self.old[index] - self.old[index - 1]) - self.old[0]
        return None


class ProcessorSeconds(Callback):
    """Collects the processor's seconds between the ends of steps, on which the load of the machine has no influence."""

    def __init__(self) -> None:
        self.all: list[float] = []
        self._last: float | None = None

    def on_step(self, step: int, report: StepReport) -> None:
        """Add a step's."""
        now = time.process_time()
        if self._last is not None:
            self.all.append(now - self._last)
        self._last = now


def main() -> None:
    """Measure what is missing, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--levels", type=float, nargs="+", default=[3.4, 3.3, 3.2, 3.15])
    parser.add_argument("--results", type=Path, default=Path("forgetting.jsonl"))
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    lines = arguments.results.read_text(encoding="utf-8").splitlines() if arguments.results.exists() else []
    runs = [Run(**json.loads(line)) for line in lines]
    done = {(run.name, run.fold) for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        for fold in (0, 1):
            bench = Bench(Path(folder) / str(fold), fold)
            for name in arguments.settings:
                if (name, fold) not in done:
                    runs.append(bench.train(name))
                    with arguments.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(runs[-1])) + "\n")
        costs = costs_table(bench)
    chosen = {name: [run for run in runs if run.name == name] for name in arguments.settings}
    page = [
        *heading("Forgetting", "torch", "transformers", "bitsandbytes"),
        *ABOUT.format(steps=STEPS, batch=BATCH, length=LENGTH, rate=RATE, every=EVERY).splitlines(),
        "",
        *losses_table(chosen, arguments.levels),
        "",
        *residuals_table([run.residuals for run in chosen.get("null space", [])]),
        "",
        *costs,
    ]
    print("\n".join(page))
    if arguments.out:
        append(arguments.out, TITLE, page)


class Bench:
    """Texts of a fold, and the runs on them.

    Args:
        folder: A new folder for files and runs.
        fold: 0 or 1: which half of the stories a run may use, and its seed.
    """

    def __init__(self, folder: Path, fold: int) -> None:
        self.folder, self.fold = folder, fold
        folder.mkdir()
        new = (REALDATA / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
        old = (REALDATA / "tokenizers" / "cs336_tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
        stories = [story for story in map(str.strip, old.split("<|endoftext|>")) if story]
        self._write("train", [new[:TRAIN_CHARACTERS]])
        self._write("eval", [new[TRAIN_CHARACTERS:][:EVAL_CHARACTERS]])
        self._write("used", stories[fold::2])
        self._write("unseen", stories[1 - fold :: 2])

    def train(self, name: str) -> Run:
        """Train with a setting."""
        setting, run = SETTINGS[name], self.folder / f"run-{[*SETTINGS].index(name)}"
        with patch.dict(vars(null_space), setting.constants):
            result = train(self._config(run, setting))
        return Run(
            name=name,
            fold=self.fold,
            new=[*result.eval_losses.values()],
            old=[*result.evaluations["retain_loss"].values()],
            residuals=residuals(run) if setting.hides else {},
        )

    def step_seconds(self, name: str) -> float:
        """Return the processor's smallest seconds of a setting's step, from a run that evaluates nothing."""
        config, seconds = self._config(self.folder / "timed", SETTINGS[name]), ProcessorSeconds()
        config["data"]["retain"] = None
        config["train"] |= {"eval_every": None, "max_steps": TIMED_STEPS}
        train(config, fresh=True, callbacks=[seconds])
        return min(seconds.all)

    def _write(self, name: str, documents: Sequence[str]) -> None:
        rows = (json.dumps({"text": document}) + "\n" for document in documents)
        self._file(name).write_text("".join(rows), encoding="utf-8")

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _config(self, run: Path, setting: Setting) -> dict[str, Any]:
        sources: list[dict[str, Any]] = [{"path": str(self._file("train"))}]
        if setting.replay:
            sources.append({"path": str(self._file("used")), "weight": setting.replay})
        keep: dict[str, Any] = {"kl": setting.kl}
        if setting.hides:
            keep["null_space"] = str(self._file("used"))
        return {
            "model": {"base": str(REALDATA / "models" / "stories260K-hf"), "recompute": "none"},
            "lora": {"rank": 8, "alpha": 16},
            "data": {
                "train": sources,
                "eval": str(self._file("eval")),
                "retain": str(self._file("unseen")),
                "max_seq_len": LENGTH,
                "overlong": "split",
                "cache_dir": str(self.folder / "cache"),
            },
            "train": {
                "output_dir": str(run),
                "max_steps": STEPS,
                "micro_batch_size": BATCH,
                "gradient_accumulation_steps": 1,
                "learning_rate": setting.rate,
                "eval_every": EVERY,
                "save_every": None,
                "seed": self.fold,
                "keep": keep,
            },
        }


def residuals(run: Path) -> dict[str, list[float]]:
    """Return ‖ΔW V‖ of a run that hides the directions V, and its share of ‖ΔW‖, at worst over the layers.

    By where ΔW is from: the adapter's file, or weights merged in fp32 or fp16 minus the dequantized base.
    """
    model, _ = load_run(run)
    layers = dict(lora_layers(model))
    starts = read_starts(RunDirectory(run).starts)
    hidden = {name: start.null_space.double() for name, start in starts.items() if start.null_space is not None}
    deltas = {name: stored.delta for name, stored in read_adapter(run / "adapter").layers.items()}
    changes = {"adapter": {name: each.scaling * each.B.double() @ each.A.double() for name, each in deltas.items()}}
    for dtype in ("float32", "float16"):
        merged = run.with_name(f"{run.name}-{dtype}")
        merge(run, merged, dtype=dtype)
        weights = load_file(merged / "model.safetensors")
        changes[f"merged, {dtype}"] = {
            name: weights[f"{name}.weight"].double() - layer.base.dequantize(torch.float32)
            for name, layer in layers.items()
        }
    found = {}
    for source, by_layer in changes.items():
        seen = {name: (change @ hidden[name]).norm().item() for name, change in by_layer.items()}
        found[source] = [max(seen.values()), max(norm / by_layer[name].norm().item() for name, norm in seen.items())]
    return found


def losses_table(chosen: Mapping[str, Sequence[Run]], levels: Sequence[float]) -> Iterator[str]:
    """Return a line for every setting."""
    titles = " | ".join(f"at {level:g}" for level in levels)
    yield f"| setting | last loss, Shakespeare | last rise, stories | {titles} |"
    yield f"|---|---|---|{'---|' * len(levels)}"
    plain = [_mean_rise(chosen["plain"], level) for level in levels]
    for name, runs in chosen.items():
        cells = []
        for level, most in zip(levels, plain, strict=True):
            rise = _mean_rise(runs, level)
            less = "" if rise is None or most is None or name == "plain" else f" ({100 * (1 - rise / most):.0f}%)"
            cells.append("–" if rise is None else f"{rise:.3f}{less}")
        last, risen = mean(run.new[-1] for run in runs), mean(run.old[-1] - run.old[0] for run in runs)
        yield f"| {name} | {last:.3f} | {risen:.3f} | {' | '.join(cells)} |"


def _mean_rise(runs: Sequence[Run], level: float) -> float | None:
    rises = [rise for run in runs if (rise := run.rise(level)) is not None]
    return mean(rises) if len(rises) == len(runs) else None


def residuals_table(found: Sequence[Mapping[str, Sequence[float]]]) -> Iterator[str]:
    """Return a line for every place that ΔW is taken from, at worst over runs and layers."""
    if found:
        yield "| ΔW of the run with null space | ‖ΔW V‖ | ‖ΔW V‖ ÷ ‖ΔW‖ |"
        yield "|---|---|---|"
    for source in found[0] if found else ():
        norm, share = (max(each[source][index] for each in found) for index in (0, 1))
        yield f"| {source} | {norm:.1e} | {share:.1e} |"


def costs_table(bench: Bench) -> list[str]:
    """Return a line for every kind of setting: medians and ranges over rounds, in which they alternate."""
    rounds = [{name: bench.step_seconds(name) for name in TIMED} for _ in range(ROUNDS)]
    return costs_lines(rounds)


def costs_lines(rounds: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the lines of :func:`costs_table` from the seconds of each round."""
    lines = ["| setting | processor's s / step | ÷ plain, in the same round |", "|---|---|---|"]
    for name in TIMED:
        ratios = [each[name] / each["plain"] for each in rounds]
        seconds = median(each[name] for each in rounds)
        lines.append(f"| {name} | {seconds:.3f} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
    return lines


if __name__ == "__main__":
    main()
