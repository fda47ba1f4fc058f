"""Real training processes, killed at random moments and continued; each end is compared with an unkilled run's."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from qlora.training.metrics import VOLATILE

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run to kill.

    Attributes:
        name: Name in the report.
        config: Path of the YAML file.
        overrides: Overrides of its keys.
        save_every: Number of steps between saves, and so the most that a kill may cost.
        slow: Whether the disk takes 20 ms longer to sync.
        warm: Whether the run is forked from this process, which has imported everything, instead of started.
    """

    name: str
    config: Path
    overrides: tuple[str, ...] = ()
    save_every: int = 1
    slow: bool = False
    warm: bool = False


@dataclass(slots=True)
class Counts:
    """Outcome of the kills."""

    kills: int = 0
    in_saves: int = 0
    continued: int = 0
    most_lost: int = 0
    runs: int = 0
    differing: int = 0


class Forked:
    """A process forked from this one, with the methods of `subprocess.Popen` that are used here."""

    def __init__(self, run: Callable[[], None], log: TextIO) -> None:
        self.pid, self._status = os.fork(), None
        if self.pid:
            return
        code = 1
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a test runner's streams write elsewhere
            run()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if ended else None
        return self._status

    def wait(self, timeout: float) -> int | None:
        """Wait for the end, and return the exit code."""
        ends = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < ends:
            time.sleep(0.01)
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[str] | Forked


def start(recipe: Recipe, folder: Path) -> Process:
    """Start `qlora train` into a folder; its output goes into a log next to it."""
    settings = [f"train.save_every={recipe.save_every}", *recipe.overrides, f"train.output_dir={folder}"]
    arguments = ["train", str(recipe.config), *settings]
    with log_of(folder).open("a") as log:
        if recipe.warm:
            return Forked(lambda: command(arguments, recipe.slow), log)
        return subprocess.Popen(
            [sys.executable, "-m", "qlora", *arguments],
            stdout=log, stderr=log, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def command(arguments: list[str], slow: bool) -> None:
    """Do in this process what `python -m qlora` does."""
    from qlora.cli.main import main

    if slow:
        sync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(0.02), sync(descriptor))[1]
    os.chdir(ROOT)
    sys.argv = ["qlora", *arguments]
    main()


def warm_up() -> None:
    """Import everything that the command imports."""
    from qlora.cli.main import quiet_libraries

    quiet_libraries()
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import qlora.training  # noqa: F401


def log_of(folder: Path) -> Path:
    """Return the path of a run's log."""
    return folder.parent.with_name(f"{folder.parent.name}.{folder.name}.log")  # a level up: its own disk may be full


def wait_until(condition: Callable[[], bool], process: Process, seconds: float = 300) -> bool:
    """Wait for a condition; return False if the process ended before."""
    ends = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return condition()
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.002)
    return True


def is_training(folder: Path, since: int) -> Callable[[], bool]:
    """Return whether a session that was started at a time in nanoseconds has begun to train."""
    record = folder / "run.json"
    return lambda: record.is_file() and record.stat().st_mtime_ns > since


def lines_of(folder: Path) -> list[dict[str, object]]:
    """Return the logged lines, without an unfinished last line and without volatile values."""
    text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


def logged_step(folder: Path) -> int:
    """Return the last logged step."""
    return max((int(str(line["step"])) for line in lines_of(folder)), default=0)


def saved_step(folder: Path) -> int:
    """Return the step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*[0-9]")), default=0)


def is_amid_save(folder: Path) -> bool:
    """Return whether a killed process left a save unfinished."""
    return any((folder / "checkpoints").glob(".*")) or any(folder.glob(".*"))


def differing(folder: Path, whole: Path) -> list[str]:
    """Return the files that differ between two finished runs."""
    names = sorted({path.name for run in (folder, whole) for path in (run / "adapter").iterdir()})
    files = [run / "adapter" for run in (folder, whole)]
    names_differing = [name for name in names if len({(each / name).read_bytes() for each in files}) > 1]
    return names_differing + ["metrics.jsonl"] * (lines_of(folder) != lines_of(whole))


def finish(recipe: Recipe, folder: Path) -> tuple[Path, float]:
    """Run to the end; return the folder, and the seconds from the first to the last step."""
    since = time.time_ns()
    process = start(recipe, folder)
    assert wait_until(is_training(folder, since), process), log_of(folder).read_text()
    began = time.monotonic()
    assert process.wait(600) == 0, log_of(folder).read_text()
    return folder, time.monotonic() - began


def kill_often(
    recipe: Recipe, work: Path, kills: int, rng: random.Random, number: signal.Signals = signal.SIGKILL
) -> Counts:
    """Send runs a number of signals at random moments, and compare their results with the uninterrupted run's.

    Args:
        recipe: Recipe of the runs.
        work: Folder for the runs.
        kills: Number of signals.
        rng: Source of the moments. One in ten is before the first step.
        number: SIGKILL, or a signal at which the state is saved.
    """
    counts = Counts()
    whole, seconds = finish(recipe, work / "whole")
    while counts.kills < kills:
        folder = work / f"run-{counts.runs}"
        is_new = True
        while True:
            since = time.time_ns()
            process = start(recipe, folder)
            counts.continued += not is_new
            is_new = False
            if counts.kills < kills:
                early = rng.random() < 0.1
                if early or wait_until(is_training(folder, since), process):
                    time.sleep(rng.uniform(0, 4 if early else seconds / 2))
                process.send_signal(number)
            code = process.wait(600)
            if code == 0:
                break
            # The signal itself ends it only before the first step, when there is nothing to save.
            assert code in (-number, 128 + number), log_of(folder).read_text()
            counts.kills += 1
            counts.in_saves += is_amid_save(folder)
            lost = logged_step(folder) - saved_step(folder)
            assert lost <= (recipe.save_every if code < 0 else 0), (folder, lost, code)
            counts.most_lost = max(counts.most_lost, lost)
        counts.runs += 1
        names = differing(folder, whole)
        counts.differing += len(names)
        assert not names, (folder, names)
        shutil.rmtree(folder)
    return counts


def save_when_asked(recipe: Recipe, work: Path, kills: int, rng: random.Random) -> Counts:
    """Send SIGUSR1 at random moments to runs that save nothing else; each is killed after the save and continued."""
    counts = Counts()
    whole, seconds = finish(recipe, work / "whole")
    while counts.kills < kills:
        folder = work / f"run-{counts.runs}"
        while True:
            before, since = saved_step(folder), time.time_ns()
            process = start(recipe, folder)
            counts.continued += before > 0
            if counts.kills < kills and wait_until(lambda: logged_step(folder) > before, process):  # noqa: B023
                assert is_training(folder, since)()
                time.sleep(rng.uniform(0, seconds / 4))
                reached = logged_step(folder)
                process.send_signal(signal.SIGUSR1)
                wait_until(lambda: saved_step(folder) >= reached, process)  # noqa: B023
                process.kill()
            if process.wait(600) == 0:
                break
            assert saved_step(folder) >= reached, log_of(folder).read_text()
            counts.kills += 1
            counts.most_lost = max(counts.most_lost, logged_step(folder) - saved_step(folder))
        counts.runs += 1
        counts.differing += len(differing(folder, whole))
        shutil.rmtree(folder)
    return counts
