"""Feed damaged and hostile input to everything that reads a file: each is read, or refused with a QLoRAError.

    python -m scripts.dev.fuzz --inputs 100000 [--seconds 3600] [--target config …] [--seed 7]

An input is a valid file with changed bytes or values, or something else at its path. Reading may raise only a
QLoRAError, must leave no file behind, and must not take much time or memory. The tests run a few inputs of each.
"""

import argparse
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random, SystemRandom

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from scripts.dev.fuzzing.altering import contents
from scripts.dev.fuzzing.samples import Samples
from scripts.dev.fuzzing.targets import Target, each_refused, make_targets

# Limits of one input, and the memory limit of the whole process, which protects the machine.
SECONDS, MEGABYTES, MOST_BYTES = 20, 512, 12 << 30


class TooLong(BaseException):
    """Raised when time is up; not an Exception, so that no handler of errors catches it."""


def attack(target: Target, rng: Random) -> None:
    """Make one input and read it.

    Raises:
        AssertionError: It left a file behind or took too much memory.
        TooLong: It took too long.
        Exception: It raised something else than a QLoRAError.
    """
    with tempfile.TemporaryDirectory() as name:
        given = target.write(rng, Path(name))
        before, held = contents(Path(name)), peak_bytes(reset=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            each_refused(lambda: target.read(given))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        more = peak_bytes() - held
        assert more < MEGABYTES << 20, f"{more >> 20} MB more"
        assert contents(Path(name)) == before, "files were left behind"


def peak_bytes(reset: bool = False) -> int:
    """Return the highest resident memory since the last reset, as Linux counts it."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def attack_with_many(target: Target, inputs: int, start: int, deadline: float) -> int:
    """Make and read many inputs; return how many. If inputs fail, the error of the smallest one is raised."""
    count = 0

    @seed(start)
    @settings(
        max_examples=inputs, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(rng=st.randoms(use_true_random=False))
    def attack_with_one(rng: Random) -> None:
        nonlocal count
        if time.monotonic() < deadline:
            count += 1
            attack(target, rng)

    before = signal.signal(signal.SIGALRM, _stop)
    try:
        attack_with_one()
    finally:
        signal.signal(signal.SIGALRM, before)
    return count


def _stop(*_: object) -> None:
    raise TooLong(f"more than {SECONDS} seconds")


def main() -> None:
    """Print inputs and seconds by target; a finding is shown with its traceback, and the next target follows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="number of inputs over all targets")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time limit for all targets together")
    parser.add_argument("--target", nargs="*", help="only these targets")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(2**31))
    arguments = parser.parse_args()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    logging.disable(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    print(f"seed {arguments.seed}\n| target | inputs | seconds |\n|---|---|---|", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Samples(Path(folder)))
        chosen = {name: targets[name] for name in arguments.target or targets}
        shares, deadline = sum(target.share for target in chosen.values()), time.monotonic() + arguments.seconds
        for name, target in chosen.items():
            started, inputs = time.monotonic(), round(arguments.inputs * target.share / shares)
            try:
                count = f"{attack_with_many(target, inputs, arguments.seed, deadline):,}"
            except (Exception, TooLong):  # a finding
                count, failed = "FOUND", True
                traceback.print_exc()
            print(f"| {name} | {count} | {time.monotonic() - started:.0f} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
