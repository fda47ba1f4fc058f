"""Measure training steps of qlora and of a peer: tokens per second, MFU, HFU and peak memory.

Each side runs in its own process, in the order A B B A, on the same random weights, tokens, seed, rank, targets and
initial values of the factors; a row is void if the losses of the first 20 steps differ by more than `--tolerance`.
First both run at the same recomputation, then each at its other settings, and the best of each are compared. qlora's
step is `run_loop` as a run calls it; PEFT's and unsloth's are the step of transformers' trainer, TRL's its own. A peer
that is not installed is reported and skipped. With `--documents`, the rows are documents of different lengths, which
qlora packs into sequences and PEFT pads to the longest of the step; tokens are counted without padding.

MFU takes the operations that the model needs without any recomputation, HFU those that were dispatched (Triton kernels
are not counted); both against the best matrix product measured here. Written for GPUs too, with CUDA's
events as the clock and its allocator's peak, but NOT YET RUN ON A GPU.

    python -m scripts.dev.bench.train_step --peer peft --out docs/benchmarks/train_step.md
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.dev.bench.common import (
    SHAPES,
    TOKENIZER,
    Section,
    build_peft,
    build_qlora,
    heading,
    installed,
    make_base,
    peft_loss,
    random_rows,
    recompute_levels,
    run_child,
    set_peft_values,
    shape_name,
)
from scripts.dev.bench.counts import Watch

PEERS = {
    "peft": ("peft",),
    "peft-liger": ("peft", "liger_kernel"),
    "unsloth": ("unsloth",),
    "trl": ("peft", "trl"),
}
# Besides `none` and `full` with autocast, which is how transformers' trainer runs with bf16=True.
OTHER_SETTINGS = {"peft": ("none", "full"), "peft-liger": (), "unsloth": ("unsloth+autocast",), "trl": ()}
# qlora with cached dequantized weights, as `auto` does if memory is free.
HELD = "+held"
COMPARED = 20
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 1.0
TITLE = """# Training steps of qlora and other trainers

`python -m scripts.dev.bench.train_step --peer peft --out docs/benchmarks/train_step.md`: a process per run in the order
A B B A; the same random weights, tokens, rank, targets and initial values of the factors on both sides.

Tokens/s are of the median step after warm-up, of two runs. CPU seconds of a step are the host's over all threads; with
one thread they are more reliable than the clock if other programs ran too, with more they include waiting. MFU
takes the operations that the model needs without recomputation (4 · linear weights + 7 · sequence · width · layers +
6 · LoRA weights per token), HFU those that were dispatched, both as a share of the best bf16 matrix product measured up
to the row. Peak memory is the allocator's on a GPU; on a CPU it is the rise of resident memory during training above
that of the loaded model. If losses of the first steps differ by more than the tolerance, both rows are void, and the
lower one says so. With `--documents`, the rows are documents of different lengths, which qlora packs and PEFT pads;
tokens are counted without padding.

**Not yet run on a GPU.**
"""


def main() -> None:
    """Measure, print, and append to `--out` if it is given; with --side, be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, default="peft")
    parser.add_argument("--shape", default="limits", help=f"{', '.join(SHAPES)}, or the path of a config.json")
    parser.add_argument(
        "--tokenizer", type=Path, default=TOKENIZER, help="tokenizer that is saved with the random model"
    )
    parser.add_argument("--recompute", nargs="+", choices=settings(), default=[f"none{HELD}", "none", "full"])
    parser.add_argument("--equal-only", action="store_true", help="skip the other settings of each side")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument(
        "--documents",
        type=int,
        nargs=2,
        metavar=("SHORTEST", "LONGEST"),
        help="lengths of documents, which qlora packs",
    )
    parser.add_argument("--steps", type=int, default=30, help="steps of a run, including warm-up")
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; fewer than the cores if they are shared")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest relative difference of a loss")
    parser.add_argument("--once", action="store_true", help="run each side once; the order is A B instead of A B B A")
    parser.add_argument("--unpaged", action="store_true", help="keep optimizer state out of managed memory")
    parser.add_argument("--base", help="a base that exists, instead of a random one of --shape")
    parser.add_argument("--out", type=Path, help="page to append the table to")
    parser.add_argument("--side", choices=["qlora", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.documents and arguments.peer == "trl":
        parser.error("--documents: TRL takes a fixed number of rows per step; compare with another --peer")
    if arguments.steps <= arguments.warm_up:
        parser.error(f"--steps {arguments.steps}: none is timed after --warm-up {arguments.warm_up}; take more")
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    section = Section(arguments.out, TITLE)
    if arguments.base:
        write_table(arguments, arguments.base, section)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_base(Path(folder), arguments.shape, arguments.tokenizer)
            write_table(arguments, folder, section)


def write_table(arguments: argparse.Namespace, base: str, section: Section) -> None:
    """Run both sides at all settings, and write a side's row once its last run has ended."""
    peer = arguments.peer
    if has_peer := installed(*PEERS[peer]):
        both = {level: f"{level.removesuffix(HELD)}+autocast" for level in (f"none{HELD}", "none", "full")}
        pairs = [(level, both.get(level)) for level in arguments.recompute]
    else:
        pairs = [(level, None) for level in arguments.recompute]
    others = [] if arguments.equal_only else [level for level in settings() if level not in arguments.recompute]
    peer_others = OTHER_SETTINGS[peer] if has_peer and not arguments.equal_only else ()

    def run(side: str, setting: str) -> dict[str, Any]:
        own: tuple[str, ...] = (
            "--shape",
            "--tokenizer",
            "--rank",
            "--batch",
            "--seq-len",
            "--steps",
            "--warm-up",
            "--threads",
        )
        own += ("--peer",)
        given = [text for name in own for text in (name, str(getattr(arguments, name[2:].replace("-", "_"))))]
        given += ["--unpaged"] * arguments.unpaged
        if arguments.documents:
            given += ["--documents", *map(str, arguments.documents)]
        return run_child(__spec__.name, *given, "--side", side, "--setting", setting, "--base", base)

    packages = ("torch", "bitsandbytes", "transformers", "peft", "liger-kernel", "unsloth", "trl")
    title = f"{shape_name(arguments.shape)}, rank {arguments.rank}, {arguments.batch} × {arguments.seq_len} tokens"
    if arguments.documents:
        title += " of documents of {} to {}".format(*arguments.documents)
    section.write(
        *heading(f"{title}, {peer}", *packages),
        f"{arguments.steps} steps, the first {arguments.warm_up} not timed; learning rate {LEARNING_RATE:g}; "
        f"{arguments.threads or 'all'} threads.",
        "",
        "| recompute | side | tokens/s of each run | step s | CPU s | MFU | HFU | peak MB | optimizer | losses |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    order = ("qlora", "peer") if arguments.once else ("qlora", "peer", "peer", "qlora")
    best: dict[str, float] = {}
    peak = 0.0
    for level, peer_setting in [*pairs, *((level, None) for level in others), *((None, one) for one in peer_others)]:
        sides = {"qlora": level, "peer": peer_setting}
        results: dict[str, list[dict[str, Any]]] = {}
        is_void = False
        for side in order:
            setting = sides[side]
            if not setting:
                continue
            runs = results.setdefault(side, [])
            runs.append(run(side, setting))
            # The best of all processes, because other programs may have slowed one down.
            peak = max(peak, runs[-1]["matrix_flops"])
            if len(runs) == order.count(side):
                losses, is_void = compare(results, arguments.tolerance)
                section.write(row(setting, "qlora" if side == "qlora" else peer, runs, peak, losses))
        if not is_void:
            for side, runs in results.items():
                best[side] = max(best.get(side, 0.0), *(speed(run) for run in runs))
        if len(results) == 2 and not is_void:
            ratio = statistics.mean(map(speed, results["qlora"])) / statistics.mean(map(speed, results["peer"]))
            ours, theirs = (min(run["cpu"] for run in results[side]) for side in ("qlora", "peer"))
            cells = f"{ratio:.2f} | | {theirs / ours:.2f} | | | | | |"
            section.write(f"| {sides['qlora']} | ours ÷ {peer}'s speed | {cells}")
    if len(best) == 2:
        section.write(f"| best of each | ours ÷ {peer}'s speed | {best['qlora'] / best['peer']:.2f} | | | | | | | |")
    section.write("", f"The best bf16 matrix product had {peak / 1e12:.2f} TFLOP/s.")
    if not has_peer:
        section.write("", f"{' and '.join(PEERS[peer])} must be installed for {peer}'s rows, which are missing.")


def settings() -> list[str]:
    """Return qlora's settings: the levels of recomputation, and the cheapest one with cached weights."""
    return [f"none{HELD}", *recompute_levels()]


def compare(results: dict[str, list[dict[str, Any]]], tolerance: float) -> tuple[str, bool]:
    """Return a description of the losses, and whether they void the row."""
    ours = next(iter(results.values()))[0]["losses"][:COMPARED]
    summary = f"{ours[0]:.3f} → {ours[-1]:.3f}"
    if len(results) == 1:
        return summary, False
    theirs = results["peer"][0]["losses"][:COMPARED]
    difference = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    is_void = not difference <= tolerance
    return f"{'VOID: ' if is_void else ''}{summary}, difference up to {difference:.2%}", is_void


def row(setting: str, side: str, runs: list[dict[str, Any]], peak: float, losses: str) -> str:
    """Return one line of the table."""
    speeds = [speed(run) for run in runs]
    best, first = max(speeds), runs[0]
    seconds = ", ".join(f"{run['seconds']:.3f}" for run in runs)
    cpu = ", ".join(f"{run['cpu']:.3f}" for run in runs)
    shares = [f"{best * first[key] / peak:.0%}" for key in ("model_flops", "executed_flops")]
    memory = ", ".join(f"{run['memory'] / 1e6:,.0f}" for run in runs)
    cells = [setting, side, ", ".join(f"{one:,.0f}" for one in speeds), seconds, cpu, *shares, memory]
    return f"| {' | '.join(cells)} | {first['optimizer']} | {losses} |"


def speed(run: dict[str, Any]) -> float:
    """Return the tokens per second of a run's median step."""
    return run["tokens"] / run["seconds"]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with one side, and return its measurements."""
    if arguments.side == "peer" and arguments.peer == "unsloth":
        import unsloth  # noqa: F401  (it wants to be imported before the libraries that it changes)
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    train = train_qlora if arguments.side == "qlora" else train_trl if arguments.peer == "trl" else train_peer
    with train(arguments) as (model, optimizer, run):
        clock = Clock(model.device)
        run(arguments.steps, clock.tick)
        seconds, cpu, memory = (
            clock.seconds(arguments.warm_up),
            clock.cpu_seconds(arguments.warm_up),
            clock.peak_bytes(),
        )
        with Watch(model.device) as work:
            run(1, lambda _: True)
    layers = model.config.num_hidden_layers
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = linear_weights(arguments.base)
    examples, plan = make_examples(arguments, model.config.vocab_size)
    counts = [[len(examples[index]) for index in plan.window(step)] for step in range(arguments.steps)]
    tokens = statistics.mean(map(sum, counts[arguments.warm_up :]))
    seen = sum(length**2 for lengths in counts for length in lengths) / sum(map(sum, counts))
    attention = 7 * seen * model.config.hidden_size * layers
    assert all(torch.isfinite(torch.tensor(clock.losses)))
    return {
        "seconds": seconds,
        "cpu": cpu,
        "tokens": tokens,
        "losses": clock.losses,
        "memory": memory,
        "matrix_flops": matrix_peak(),
        "optimizer": optimizer,
        "model_flops": 4 * weights + attention + 6 * trained,
        "executed_flops": work.flops / tokens,
    }


def linear_weights(base: str) -> int:
    """Return the number of weights that a token is multiplied by: those of all linear layers, including the head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


class Clock:
    """Step times, losses and peak memory; on a GPU by events, which do not block.

    Args:
        device: Device that the steps run on.
    """

    def __init__(self, device: Any) -> None:
        import torch

        self._cuda = torch.cuda if device.type == "cuda" else None
        self.losses: list[float] = []
        self._marks: list[Any] = []
        self._used: list[float] = []
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident memory
            self._resident = resident("VmRSS")
        self._mark()

    def tick(self, loss: float) -> bool:
        """Record the end of a step; return True, so that training continues."""
        self.losses.append(float(loss))
        self._mark()
        return True

    def seconds(self, warm_up: int) -> float:
        """Return the median time of a step, without the first ones."""
        return statistics.median(self.step_seconds()[warm_up:])

    def step_seconds(self) -> list[float]:
        """Return the seconds of every step."""
        if self._cuda:
            self._cuda.synchronize()
            return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]
        return [after - before for before, after in pairwise(self._marks)]

    def peak_bytes(self) -> int:
        """Return the highest memory since the clock was made."""
        return self._cuda.max_memory_allocated() if self._cuda else resident("VmHWM") - self._resident

    def cpu_seconds(self, warm_up: int) -> float:
        """Return the median CPU seconds of a step over all threads, which other programs barely change."""
        return statistics.median([after - before for before, after in pairwise(self._used)][warm_up:])

    def _mark(self) -> None:
        self._used.append(time.process_time())
        if self._cuda:
            event = self._cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())


def resident(key: str) -> int:
    """Return a line of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def matrix_peak() -> float:
    """Return the operations per second of the best of ten large products in bf16."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock = Clock(device)
    for _ in range(12):
        left @ right
        clock.tick(0.0)
    return 2 * size**3 / min(clock.step_seconds()[2:])


def make_examples(arguments: argparse.Namespace, vocabulary: int) -> tuple[list[Any], Any]:
    """Return enough documents for all steps, with every token supervised, and their order."""
    import numpy as np

    from qlora.data import BatchPlan, make_example

    count = (arguments.steps + 1) * arguments.batch
    rows = random_rows(count, arguments.seq_len, vocabulary)
    if arguments.documents:
        shortest, longest = arguments.documents
        drawn = np.random.default_rng(0).integers(shortest, longest + 1, 2 * count * arguments.seq_len // shortest)
        ends = np.cumsum(drawn)
        drawn = drawn[ends <= count * arguments.seq_len]
        rows = [piece.tolist() for piece in np.split(np.concatenate(rows), ends[: len(drawn)])[:-1]]
    lengths = np.array([len(row) for row in rows])
    plan = BatchPlan(lengths, arguments.batch, 1, arguments.seq_len if arguments.documents else None)
    return [make_example(row, [True] * len(row)) for row in rows], plan


@contextmanager
def train_qlora(arguments: argparse.Namespace) -> Iterator[tuple[Any, str, Callable[..., None]]]:
    """Return qlora's model, the optimizer's name, and a function that trains some more steps."""
    level, holds = arguments.setting.removesuffix(HELD), arguments.setting.endswith(HELD)
    model, _ = build_qlora(arguments.base, arguments.rank, 2 * arguments.rank, level, holds=holds)
    yield model, *qlora_steps(model, arguments, arguments.unpaged)


def qlora_steps(model: Any, arguments: argparse.Namespace, unpaged: bool = False) -> tuple[str, Callable[..., None]]:
    """Return the name of the optimizer of qlora's model, and a function that trains some more steps."""
    from qlora.model import SUPERVISED
    from qlora.optim import FlatParameters, make_optimizer
    from qlora.processes import Processes
    from qlora.training.loop import LoopCallbacks, LoopParts, LoopSchedule, run_loop
    from qlora.training.progress import Progress

    examples, plan = make_examples(arguments, model.config.vocab_size)
    on_gpu = "adamw_8bit" if unpaged else "paged_adamw_8bit"
    name = on_gpu if model.device.type == "cuda" else "adamw_32bit"
    flat = FlatParameters((name, p) for name, p in model.named_parameters() if p.requires_grad)
    progress, processes = Progress(), Processes(device=model.device)
    parts = LoopParts(model, make_optimizer(name, flat), SUPERVISED, examples, batches=plan, processes=processes)

    def run(steps: int, tick: Callable[[float], bool]) -> None:
        schedule = LoopSchedule(progress.step + steps, lambda _: LEARNING_RATE, MAX_GRAD_NORM)
        run_loop(parts, progress, schedule, LoopCallbacks(lambda report: tick(report.loss)))

    return f"FlatAdamW {name}, bf16", run


@contextmanager
def train_peer(arguments: argparse.Namespace) -> Iterator[tuple[Any, str, Callable[..., None]]]:
    """Return PEFT's or unsloth's model, the optimizer's name, and a function that trains some more steps."""
    import torch

    from qlora.data import collate

    words = arguments.setting.split("+")
    if arguments.peer == "unsloth":
        model = build_unsloth(arguments, words[0])
    else:
        if arguments.peer == "peft-liger":
            from liger_kernel.transformers import _apply_liger_kernel
            from transformers import AutoConfig

            _apply_liger_kernel(AutoConfig.from_pretrained(arguments.base).model_type)
        model, _ = build_peft(arguments.base, arguments.rank, 2 * arguments.rank, arguments.setting)
    examples, plan = make_examples(arguments, model.config.vocab_size)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, name = make_optimizer(parameters, arguments.unpaged)
    steps_done = 0

    def run(steps: int, tick: Callable[[float], bool]) -> None:
        nonlocal steps_done
        for _ in range(steps):
            batch = collate([examples[index] for index in plan.window(steps_done)]).to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled="autocast" in words):
                loss = peft_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            steps_done += 1
            tick(loss.item())

    yield model, name, run


def make_optimizer(parameters: list[Any], unpaged: bool) -> tuple[Any, str]:
    """Return the optimizer that users of PEFT take, and its name; paging needs CUDA."""
    import torch

    if parameters[0].device.type == "cuda":
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        kind = AdamW8bit if unpaged else PagedAdamW8bit
        return kind(parameters, lr=LEARNING_RATE, weight_decay=0.0), f"bitsandbytes {kind.__name__}, fp32"
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0), "torch AdamW, fp32"


def build_unsloth(arguments: argparse.Namespace, checkpointing: str) -> Any:
    """Return unsloth's model with its adapters; needs a GPU."""
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        arguments.base, max_seq_length=arguments.seq_len, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing={"none": False, "full": True}.get(checkpointing, checkpointing),
    )
    set_peft_values(model, 0)
    return model.train()


@contextmanager
def train_trl(arguments: argparse.Namespace) -> Iterator[tuple[Any, str, Callable[..., None]]]:
    """Return TRL's SFTTrainer over PEFT's model; each call of the function is a separate training."""
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = build_peft(arguments.base, arguments.rank, 2 * arguments.rank, "none")
    examples, plan = make_examples(arguments, model.config.vocab_size)
    ordered = [index for step in range(arguments.steps + 1) for index in plan.window(step)]
    rows = datasets.Dataset.from_list([{"input_ids": list(examples[index].input_ids)} for index in ordered])
    on_gpu = model.device.type == "cuda"
    on_gpus = "adamw_8bit" if arguments.unpaged else "paged_adamw_8bit"
    optimizer = on_gpus if on_gpu else "adamw_torch"

    class InOrder(SFTTrainer):  # type: ignore[misc]
        loss = 0.0

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(rows)

        def training_step(self, *positional: Any, **named: Any) -> Any:
            result = super().training_step(*positional, **named)
            self.loss = result.item()
            return result

    def run(steps: int, tick: Callable[[float], bool]) -> None:
        class Ticks(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                tick(trainer.loss)

        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=arguments.batch,
                gradient_checkpointing="full" in arguments.setting,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                bf16=True,
                use_cpu=not on_gpu,
                optim=optimizer,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=MAX_GRAD_NORM,
                max_length=arguments.seq_len,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            trainer = InOrder(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[Ticks()])
            trainer.train()

    yield model, f"{optimizer} of transformers", run


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
