"""Stops and continues a run for every combination of settings that its state depends on; none may change a byte.

    python -m scripts.dev.sweep_resume configs/tiny.yaml        # 64 runs

The tests try a part: each optimizer with each rounding, and with each rounding the values of the other settings.
Exits with 1 if a continued run leaves other bytes or another log than the one that was never stopped.
"""

import argparse
import tempfile
from itertools import product
from pathlib import Path

from qlora.config import load_config
from qlora.optim import OPTIMIZERS
from qlora.training import train
from scripts.dev.kills import differing

STEPS = 5
SETTINGS = {
    "train.optimizer": tuple(OPTIMIZERS),
    "train.rounding": ("stochastic", "master"),
    "data.packing": ("true", "false"),
    "lora.dropout": ("0.0", "0.1"),
    "data.eval": ("0.2", "null"),
}


def main() -> None:
    """Tries each combination with a stop after another step than the one before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="of a small run")
    config, failed = parser.parse_args().config, 0
    for number, values in enumerate(product(*SETTINGS.values())):
        settings = [f"{key}={value}" for key, value in zip(SETTINGS, values, strict=True)]
        settings += [f"train.max_steps={STEPS}", "train.save_every=null"]
        with tempfile.TemporaryDirectory() as work:
            whole, run = Path(work) / "whole", Path(work) / "run"
            train(load_config(config, [*settings, f"train.output_dir={whole}"]))
            stopped = load_config(config, [*settings, f"train.output_dir={run}"])
            train(stopped, stop_at=1 + number % (STEPS - 1))
            train(stopped)
            apart = differing(run, whole)
        failed += bool(apart)
        print(" ".join(values), "differs in " + ", ".join(apart) if apart else "equal", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
