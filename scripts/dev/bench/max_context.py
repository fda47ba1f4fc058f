"""Find the longest sequence that trains under a memory cap, by bisection with real steps on a GPU.

A process for each setting: forward, backward and update of one sequence of random tokens, longer or shorter until the
longest that fits is known to 1%, or to --precision. The cap is set in torch's allocator. Without
docs/benchmarks/max_context.md, it has not been run on a GPU. On a CPU, the tensors of a step are counted instead, which
is of use to try the script at a tiny shape.

    python -m scripts.dev.bench.max_context --cap 24 --out docs/benchmarks/max_context.md
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora.memory.probe import measure_peak
from qlora.out_of_memory import is_out_of_memory
from scripts.dev.bench.common import (
    SHAPES,
    Section,
    build_peft,
    build_qlora,
    heading,
    installed,
    make_base,
    peft_loss,
    recompute_levels,
    run_child,
    shape_name,
)

TITLE = """# The longest sequence under a memory cap

`python -m scripts.dev.bench.max_context --out docs/benchmarks/max_context.md`. Forward, backward and update of one
sequence of random tokens, all supervised, batch 1, on a base with random weights; bisection until the longest that
fits is known to 1%. The cap is on what torch's allocator reserves. `peak` is the most that it allocated at that
length; `driver` is the memory in use by the device's count, including the context and paged state.
"""


def main() -> None:
    """Measure, print, and append to `--out` if it is given; with --side, be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3-8b", help=f"{', '.join(SHAPES)}, or the path of a config.json")
    parser.add_argument("--cap", type=float, default=24, help="memory cap in GiB")
    parser.add_argument("--recompute", nargs="+", default=["full", "offload", "offload+tiled"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--longest", type=int, default=1 << 18, help="largest number of tokens to try")
    parser.add_argument("--shortest", type=int, default=512, help="smallest number of tokens to try")
    parser.add_argument("--precision", type=float, default=0.01, help="share of the length to which it is found")
    parser.add_argument("--unpaged", action="store_true", help="keep optimizer state out of managed memory")
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    parser.add_argument("--base", help="a base that exists, instead of a random one of --shape")
    parser.add_argument("--side", choices=["qlora", "peft"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and arguments.shape != "tiny":
        sys.exit(
            "There is no CUDA device here. On one, this finds the longest sequence that trains under a memory cap; "
            "what a config needs is estimated anywhere by `qlora estimate`."
        )
    if unknown := set(arguments.recompute) - set(recompute_levels()):
        sys.exit(f"--recompute: unknown {', '.join(unknown)}; the levels are {', '.join(recompute_levels())}.")
    if arguments.side:
        print(json.dumps(search(arguments)))
        return
    title = f"{shape_name(arguments.shape)}, rank {arguments.rank}, {arguments.cap:g} GiB"
    section = Section(arguments.out, TITLE)
    section.write(
        *heading(title, "torch", "bitsandbytes", "transformers", "peft"),
        "| side | recompute | longest | peak GiB | driver GiB |",
        "|---|---|---|---|---|",
    )
    sides = [("qlora", level) for level in arguments.recompute] + [("peft", "full")] * installed("peft")
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.base:
            make_base(Path(folder), arguments.shape)
        for side, level in sides:
            own = ("shape", "cap", "rank", "longest", "shortest", "precision")
            given = [text for name in own for text in (f"--{name}", str(getattr(arguments, name)))]
            given += ["--side", side, "--base", arguments.base or folder, "--recompute", level]
            found = run_child(__spec__.name, *given, *["--unpaged"] * arguments.unpaged)
            cells = f"{found['longest']:,} | {found['peak'] / 2**30:.2f} | {found['driver'] / 2**30:.2f}"
            section.write(f"| {side} | {level} | {cells} |")


def search(arguments: argparse.Namespace) -> dict[str, int]:
    """Return the longest sequence of one side, and its memory."""
    cap = int(arguments.cap * 2**30)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    step = {"qlora": qlora_step, "peft": peft_step}[arguments.side](arguments)
    memory: dict[int, tuple[int, int]] = {}

    def fits(length: int) -> bool:
        found = step_bytes(lambda: step(length))
        if found is None or not torch.cuda.is_available() and found[0] > cap:
            return False
        memory[length] = found
        return True

    longest = bisect(fits, arguments.shortest, arguments.longest, arguments.precision)
    peak, driver = memory.get(longest, (0, 0))
    return {"longest": longest, "peak": peak, "driver": driver}


def step_bytes(step: Callable[[], None]) -> tuple[int, int] | None:
    """Return the peak of a step's tensors and the memory in use afterwards, or None if memory ran out."""
    if not torch.cuda.is_available():
        peak = measure_peak(step, torch.device("cpu"))
        return peak, peak
    torch.cuda.empty_cache()
    try:
        peak = measure_peak(step, torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    free, total = torch.cuda.mem_get_info()
    return peak, total - free


def bisect(fits: Callable[[int], bool], shortest: int, longest: int, precision: float) -> int:
    """Return the longest length that fits, to a share of it; 0 if the shortest does not fit."""
    if not fits(shortest):
        return 0
    low, high = shortest, shortest
    while low == high and high < longest:  # doubled first, so that no step is far longer than what fits
        high = min(2 * high, longest)
        low = high if fits(high) else low
    while high - low > max(1, low * precision):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def qlora_step(arguments: argparse.Namespace) -> Callable[[int], None]:
    """Return a function that makes a step of qlora on a sequence of a length."""
    from qlora.model import supervised_loss
    from qlora.optim import FlatAdamW, FlatParameters

    (level,) = arguments.recompute
    model, _ = build_qlora(arguments.base, arguments.rank, 2 * arguments.rank, level)
    flat = FlatParameters((name, p) for name, p in model.named_parameters() if p.requires_grad)
    optimizer = FlatAdamW(flat, paged=not arguments.unpaged)

    def step(length: int) -> None:
        flat.zero_grad()
        batch = random_batch(length, model)
        (supervised_loss(model, batch) / batch.total_weight).backward()
        flat.clip_grad_norm(1.0)
        optimizer.step(1e-4)

    return step


def peft_step(arguments: argparse.Namespace) -> Callable[[int], None]:
    """Return a function that makes a step of PEFT's model with bitsandbytes' optimizer."""
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    model, _ = build_peft(arguments.base, arguments.rank, 2 * arguments.rank, "full")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = (AdamW8bit if arguments.unpaged else PagedAdamW8bit)(trained, lr=1e-4)

    def step(length: int) -> None:
        optimizer.zero_grad()
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = peft_loss(model, random_batch(length, model))
        loss.backward()
        optimizer.step()

    return step


def random_batch(length: int, model: Any) -> Any:
    """Return one sequence in which every token is supervised."""
    import numpy as np

    from qlora.data import collate, make_example

    ids = np.random.default_rng(length).integers(model.config.vocab_size, size=length)
    return collate([make_example(ids, [True] * length)], packed=True).to(model.device)


if __name__ == "__main__":
    main()
