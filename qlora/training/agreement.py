"""Whether all processes are about to train the same run."""

import hashlib
from typing import Any

import torch

from qlora.config import RunConfig
from qlora.errors import ConfigError
from qlora.optim import FlatParameters
from qlora.processes import Processes
from qlora.training.resume import compare_origins, describe_changes, flatten

# Keys that may differ between the processes' configs: where files are, and what only the first process does.
OWN_KEYS = {"train.output_dir", "train.trackers", "data.cache_dir"}


def check_same_run(
    processes: Processes, config: RunConfig, origin: dict[str, Any], step: int, flat: FlatParameters
) -> None:
    """Compare what each process is about to train from with the first process's.

    Args:
        processes: Of the run.
        config: Of this process.
        origin: What its run follows from, see :func:`qlora.training.resume.describe_origin`.
        step: Where it starts.
        flat: Trained parameters, as restored.

    Raises:
        ConfigError: They differ: the same error on every process.
    """
    trained = flat.data.cpu().view(torch.uint8).numpy().tobytes()
    own = {
        "settings": {key: value for key, value in flatten(config).items() if key not in OWN_KEYS},
        "origin": origin,
        "start": {"first step": step, "trained parameters": hashlib.sha256(trained).hexdigest()[:12]},
    }
    everyone = processes.gather(own)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        differences = [
            *describe_changes(first["settings"], other["settings"]),
            *compare_origins(first["origin"], other["origin"]),
            *describe_changes(first["start"], other["start"]),
        ]
        if differences:
            raise ConfigError(
                f"Processes 0 and {rank} of {processes.world_size} would not train the same run (process 0 → process "
                f"{rank}):\n"
                + "\n".join(f"  {difference}" for difference in differences)
                + "\nGive all processes the same config, base files, data files and train.output_dir, on a file system "
                "that they share."
            )
