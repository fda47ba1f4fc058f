"""Kill training runs in many ways, continue them, and report what was lost.

    python -m scripts.dev.kill_runs                             # all of it: about an hour on two cores
    python -m scripts.dev.kill_runs --kills 5 --only tiny

Prints a line for each way and appends it to --out. The tiny base is the quickstart's; the others are real ones, see
QLORA_REALDATA. Ways that need their own disk are skipped, with a message, if mounting is not allowed.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.dev.kills import (
    ROOT,
    Counts,
    Recipe,
    differing,
    finish,
    is_training,
    kill_often,
    log_of,
    logged_step,
    save_when_asked,
    saved_step,
    start,
    wait_until,
    warm_up,
)

REALDATA = Path(os.environ.get("QLORA_REALDATA", ROOT.parent / "shared" / "realdata"))
HEAD = """
| date | way | kills | amid a save | continued | most steps lost | runs compared | differing files | seconds | on |
|---|---|---|---|---|---|---|---|---|---|
"""
TINY = Recipe("tiny", ROOT / "configs" / "tiny.yaml", ("train.max_steps=40", "train.eval_every=10"), warm=True)


def main() -> None:
    """Run every way, print and append its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=100, help="number of kills of the tiny base; of each real one a fifth"
    )
    parser.add_argument("--only", default="", help="only ways whose names contain this")
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(2**31), help="seed of the random moments"
    )
    parser.add_argument("--out", type=Path, help="Markdown file to append to")
    arguments = parser.parse_args()
    print(f"--seed {arguments.seed}")
    rng = random.Random(arguments.seed)
    make_tiny_base()
    warm_up()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        for name, way in list_ways(Path(folder), arguments.kills, rng):
            if arguments.only not in name:
                continue
            work = Path(folder) / name.replace(" ", "-")
            work.mkdir()
            began = time.monotonic()
            try:
                counts = way(work)
            except PermissionError as problem:
                print(f"{name}: skipped: {problem}", flush=True)
                continue
            report(name, counts, time.monotonic() - began, arguments.out)


def make_tiny_base() -> None:
    """Make the quickstart's base and data, unless they exist."""
    for script, out in (("make_base.py", "base"), ("make_instructions.py", "data")):
        command = [sys.executable, ROOT / "scripts" / "tiny" / script, "--out", ROOT / ".cache" / "tiny" / out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def list_ways(folder: Path, kills: int, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], Counts]]]:
    """Return the ways to end a run by name, each with the function that tests it in its own folder."""

    def often(recipe: Recipe, count: int, *number: signal.Signals) -> Callable[[Path], Counts]:
        return lambda work: kill_often(recipe, work, count, rng, *number)

    tiny_few = max(1, kills // 10)
    yield "tiny, SIGKILL", often(TINY, kills)
    yield "tiny, SIGKILL on a slow disk", often(replace(TINY, slow=True), tiny_few)
    yield "tiny, SIGTERM", often(replace(TINY, warm=False), tiny_few, signal.SIGTERM)
    yield "tiny, SIGINT", often(TINY, tiny_few, signal.SIGINT)
    yield (
        "tiny, SIGUSR1 and then SIGKILL",
        lambda work: save_when_asked(replace(TINY, save_every=1000), work, tiny_few, rng),
    )
    yield "tiny, a disk that is full for a while", lambda work: full_disk(work, makes_room=True)
    yield "tiny, a disk that stays full", lambda work: full_disk(work, makes_room=False)
    yield "tiny, a disk that can't be written", read_only_disk
    yield "tiny, its directory removed", lost_directory
    yield "tiny, a second run in its directory", second_run
    if not REALDATA.is_dir():
        print(f"real bases: skipped: no real data at {REALDATA}; set QLORA_REALDATA", flush=True)
        return
    for recipe in real_recipes(folder):
        yield f"{recipe.name}, SIGKILL", often(recipe, max(1, kills // 5))


def real_recipes(folder: Path) -> Iterator[Recipe]:
    """Return recipes of a real base: packed in 8 bits, padded with dropout, and with an fp32 master."""
    plays, instructions = "tinyshakespeare/input.txt", "llama_factory_demo/alpaca_en_demo.json"
    for name, data, settings in (
        ("plays, 8 bits, packed", plays, {"train": {"optimizer": "paged_adamw_8bit"}}),
        (
            "instructions, 32 bits, padded",
            instructions,
            {"data": {"packing": False}, "train": {"optimizer": "adamw_32bit"}},
        ),
        ("instructions, master, dropout", instructions, {"lora": {"dropout": 0.1}, "train": {"rounding": "master"}}),
    ):
        config: dict[str, dict[str, Any]] = {
            "model": {"base": str(REALDATA / "models" / "stories260K-hf")},
            "data": {"train": str(REALDATA / "data" / data), "max_seq_len": 384, "eval": 0.01}
            | ({"overlong": "split"} if data == plays else {}),
            "train": {"max_steps": 30, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "eval_every": 10},
        }
        for section, values in settings.items():
            config.setdefault(section, {}).update(values)
        config["train"]["output_dir"] = "given"
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        yield Recipe(name.replace(", ", "-").replace(" ", "-"), path, save_every=3, warm=True)


@contextmanager
def small_disk(folder: Path, megabytes: int, options: str = "rw") -> Iterator[Path]:
    """Mount a separate disk at a folder; its previous contents are restored on exit.

    Raises:
        PermissionError: Mounting is not allowed here.
    """
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,{options}", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError("mounting a disk is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Write a file that takes all free space."""
    with (disk / "other").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            return disk / "other"
    raise AssertionError("a disk without an end")


def full_disk(work: Path, makes_room: bool) -> Counts:
    """Fill the disk during a run; free it at the first save that fails, or after the run ended."""
    recipe = replace(TINY, save_every=5)
    whole, _ = finish(recipe, work / "whole")
    with small_disk(work / "disk", 24) as disk:
        folder = disk / "run"
        process = start(recipe, folder)
        assert wait_until(lambda: saved_step(folder) > 0, process), log_of(folder)
        saved = saved_step(folder)
        other = fill(disk)
        assert wait_until(lambda: logged_step(folder) > saved and "could not be" in log_of(folder).read_text(), process)
        if not makes_room:
            assert process.wait(600) == 1
            assert "MB are free there" in log_of(folder).read_text()
        other.unlink()
        if makes_room:
            assert process.wait(600) == 0, log_of(folder).read_text()
            return Counts(runs=1, differing=len(differing(folder, whole)))
        finish(recipe, folder)
        return Counts(continued=1, runs=1, differing=len(differing(folder, whole)))


def read_only_disk(work: Path) -> Counts:
    """Check that a read-only disk is reported before the first step, or later once saves keep failing."""
    with small_disk(work / "read-only", 24, "ro") as disk:
        process = start(TINY, disk / "run")
        assert process.wait(600) == 1
        output = log_of(disk / "run").read_text()
        assert "run can't be written" in output
        assert "Traceback" not in output
    recipe, folder = replace(TINY, save_every=5), work / "run"
    whole, _ = finish(recipe, work / "whole")
    process = start(recipe, folder)
    assert wait_until(lambda: saved_step(folder) > 0, process), log_of(folder)
    with small_disk(folder / "checkpoints", 24, "ro"):
        assert process.wait(600) == 1
    output = log_of(folder).read_text()
    assert output.count("could not be saved") == 3
    assert "Read-only file system" in output
    finish(recipe, folder)
    return Counts(continued=1, runs=1, differing=len(differing(folder, whole)))


def lost_directory(work: Path) -> Counts:
    """Remove the directory during its run: an error is reported, and the next run starts over."""
    recipe, folder = replace(TINY, save_every=5), work / "run"
    whole, _ = finish(recipe, work / "whole")
    process = start(recipe, folder)
    assert wait_until(lambda: saved_step(folder) > 0, process)
    shutil.rmtree(folder, ignore_errors=True)
    assert process.wait(600) == 1
    assert "was removed or unmounted" in log_of(folder).read_text()
    finish(recipe, folder)
    return Counts(runs=1, differing=len(differing(folder, whole)))


def second_run(work: Path) -> Counts:
    """Start a second run in a directory in use: it is refused, and the first run is not disturbed."""
    folder, since = work / "run", time.time_ns()
    whole, _ = finish(TINY, work / "whole")
    first = start(TINY, folder)
    assert wait_until(is_training(folder, since), first)
    second = start(TINY, folder)
    assert second.wait(600) == 1 or first.poll() is not None
    assert first.wait(600) == 0
    assert f"is in use by process {first.pid} on " in log_of(folder).read_text()
    return Counts(runs=1, differing=len(differing(folder, whole)))


def report(name: str, counts: Counts, seconds: float, out: Path | None) -> None:
    """Print a row, and append it."""
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "bitsandbytes"))
    values = (
        date.today(), name, counts.kills, counts.in_saves, counts.continued, counts.most_lost, counts.runs,
        counts.differing, round(seconds), f"{os.cpu_count()} cores {platform.machine()}, {packages}",
    )  # fmt: skip
    row = f"| {' | '.join(map(str, values))} |"
    print(row, flush=True)
    if out is not None:
        text = out.read_text(encoding="utf-8") if out.exists() else ""
        head = "" if HEAD.strip() in text else HEAD
        out.write_text(f"{text}{head}{row}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
