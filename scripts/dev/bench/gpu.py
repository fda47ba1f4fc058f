"""Run everything that a first GPU should answer, in one command and 12 minutes, and write the tables.

The parts run in this order, each in processes of its own with a limit of its own: the tests that need CUDA, without
managed memory; training steps beside PEFT at the shape of Llama-3.1-8B; runs of `qlora train` that choose their level
of recomputation, and that keep the weights on the host; the bandwidth of the dequantization; the longest sequence in 24
GiB; and last what uses managed memory, which can hang a machine that lacks support for it. A part that fails, or takes
too long, is written down with the end of its output, and the next one starts. Each part appends the rows of its tables
to --out as it measures them; gpu.md has a line for each part. Exits with 1 if a part failed or was cut off. NOT YET RUN
ON A GPU.

    python -m scripts.dev.bench.gpu                              # on a GPU; appends to docs/benchmarks
    python -m scripts.dev.bench.gpu --tiny --out /tmp/tables     # small shapes, also on a CPU, to try the script
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.dev.bench.common import BENCHMARKS, ROOT, Section, cell, heading, installed

TITLE = """# The parts of `scripts.dev.bench.gpu`

`python -m scripts.dev.bench.gpu`. A line for each part, and the end of its output if it failed or was cut off.
"""
BENCH = "scripts.dev.bench"
BUDGET, LEAST_SECONDS = 720, 10
OUTPUT_LINES = 25


@dataclass(frozen=True)
class Part:
    """A part of the whole.

    Attributes:
        name: What it answers.
        command: Python's arguments.
        limit: Seconds after which it is stopped, with a budget of `BUDGET`.
        needs: Packages that it needs.
        uses_base: Whether it needs the random base, which the part named `base` makes.
    """

    name: str
    command: list[str]
    limit: int
    needs: tuple[str, ...] = ()
    uses_base: bool = False


@dataclass(frozen=True)
class Outcome:
    """Result of a part.

    Attributes:
        status: `done`, or why not.
        seconds: Seconds that it took.
        output: End of its output.
        has_failed: Whether it failed or was cut off.
    """

    status: str
    seconds: float
    output: list[str]
    has_failed: bool = False


def main() -> None:
    """Run the parts, and print each outcome and append it to gpu.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, also on a CPU")
    parser.add_argument("--budget", type=int, default=BUDGET, help="seconds for all parts; their limits follow it")
    parser.add_argument("--only", nargs="+", metavar="PART", help="names of the parts to run")
    parser.add_argument("--out", type=Path, default=BENCHMARKS, help="folder of the pages that tables are appended to")
    arguments = parser.parse_args()
    import torch

    if not (torch.cuda.is_available() or arguments.tiny):
        sys.exit("There is no CUDA device here. To try this script with small shapes on a CPU, add --tiny and --out.")
    deadline = time.monotonic() + arguments.budget
    with tempfile.TemporaryDirectory(dir=folder_in_memory(arguments.tiny)) as folder:
        parts = list(all_parts(Path(folder) / "base", arguments.out.resolve(), arguments.tiny))
        names = [part.name for part in parts]
        if unknown := set(arguments.only or ()) - set(names):
            sys.exit(f"--only: unknown {', '.join(unknown)}; the parts are {', '.join(names)}.")
        wanted = set(arguments.only or names)
        if any(part.uses_base for part in parts if part.name in wanted):
            wanted.add("base")
        section = Section(arguments.out / "gpu.md", TITLE)
        section.write(
            *heading("tiny" if arguments.tiny else "all parts", "torch", "triton", "bitsandbytes", "transformers"),
            "| part | outcome | seconds |",
            "|---|---|---|",
        )
        failed: dict[str, list[str]] = {}
        try:
            for part in (part for part in parts if part.name in wanted):
                if part.uses_base and "base" in failed:
                    outcome = Outcome("skipped: there is no base", 0, [])
                else:
                    limit = part.limit * arguments.budget / BUDGET
                    outcome = run(part, min(limit, deadline - time.monotonic()))
                section.write(f"| {part.name} | {cell(outcome.status)} | {outcome.seconds:.0f} |")
                if outcome.has_failed:
                    failed[part.name] = outcome.output
        finally:
            for name, output in failed.items():
                section.write("", f"The end of {name}:", "", "```", *output, "```")
    if failed:
        sys.exit(1)


def all_parts(base: Path, out: Path, is_tiny: bool) -> Iterator[Part]:
    """Return the parts in their order.

    Args:
        base: Folder of the random base that they share.
        out: Folder of the pages.
        is_tiny: Small shapes.
    """
    shape = "tiny" if is_tiny else "llama3-8b"
    sizes = ["--shape", shape, "--base", str(base), "--rank", "4" if is_tiny else "16"]
    steps = [*sizes, "--batch", "2", "--seq-len", "32" if is_tiny else "2048"]
    steps += ["--steps", "4" if is_tiny else "20", "--warm-up", "1" if is_tiny else "8"]
    short = ["--steps", "4" if is_tiny else "10", "--warm-up", "1" if is_tiny else "4"]
    context = ["--cap", "0.002", "--shortest", "16", "--longest", "512"] if is_tiny else ["--cap", "24"]
    levels = ["full"] if is_tiny else ["full", "offload"]
    tests = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py")) if is_for_gpus(path)]
    parallel = ["-n", "8"] if installed("xdist") and not is_tiny else []

    def page(name: str) -> list[str]:
        return ["--out", str(out / f"{name}.md")]

    def test(marks: str) -> list[str]:
        return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, *tests]

    make = f"from pathlib import Path; from {BENCH}.common import make_base; make_base(Path({str(base)!r}), {shape!r})"
    unpaged = ["train.optimizer=adamw_8bit"]
    yield Part("base", ["-c", make], 90)
    yield Part("tests", [*test("gpu and not paged"), *parallel], 150, ("pytest",))
    yield Part(
        "train_step",
        ["-m", f"{BENCH}.train_step", *steps, "--recompute", "none", "full", "--equal-only", "--once", "--unpaged",
         *page("train_step")],
        200,
        uses_base=True,
    )  # fmt: skip
    yield Part(
        "runs",
        ["-m", f"{BENCH}.runs", *steps, *short, "--row", "model.recompute=auto", *unpaged,
         "--row", "model.weights=host", *unpaged, *page("runs")],
        110,
        uses_base=True,
    )  # fmt: skip
    tiny = ["--tiny"] if is_tiny else []
    yield Part("dequantize", ["-m", f"{BENCH}.dequantize", *tiny, *page("dequantize")], 50, ("triton",))
    yield Part(
        "max_context",
        ["-m", f"{BENCH}.max_context", *sizes, *context, "--recompute", *levels, "--precision", "0.05", "--unpaged",
         *page("max_context")],
        120,
        uses_base=True,
    )  # fmt: skip
    yield Part("paged tests", test("gpu and paged"), 60, ("pytest",))
    yield Part(
        "paged run",
        ["-m", f"{BENCH}.runs", *steps, *short, "--row", "train.optimizer=paged_adamw_8bit", *page("runs")],
        60,
        uses_base=True,
    )  # fmt: skip


def run(part: Part, limit: float) -> Outcome:
    """Run a part in a process group of its own, for a number of seconds at most."""
    if missing := [package for package in part.needs if not installed(package)]:
        return Outcome(f"skipped: {', '.join(missing)} is not installed", 0, [])
    if limit < LEAST_SECONDS:
        return Outcome("skipped: the budget is spent", 0, [])
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, *part.command], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:  # Ctrl-C too
            if code != 0:  # its children too, which would keep the GPU's memory
                kill_group(process)
        output.seek(0)
        ending = output.read().splitlines()[-OUTPUT_LINES:]
    seconds = time.monotonic() - started
    if code is None:
        return Outcome(f"cut off after {limit:.0f} s", seconds, ending, has_failed=True)
    summary = ""
    if part.command[:2] == ["-m", "pytest"]:
        summary = f": {ending[-1] if ending else 'no output'}"
    if code == 0:
        return Outcome(f"done{summary}", seconds, [])
    return Outcome(f"FAILED with exit code {code}{summary}", seconds, ending, has_failed=True)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def is_for_gpus(path: Path) -> bool:
    """Return whether a file has tests that need CUDA."""
    return "mark.gpu" in path.read_text(encoding="utf-8")


def folder_in_memory(is_tiny: bool) -> str | None:
    """Return a folder in memory with room for the base of 8 billion parameters, which is read many times, or None."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > (1 << 20 if is_tiny else 40 << 30)
    return str(memory) if has_room else None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the current part ends too
    main()
