"""A check that all processes are about to train the same run."""

from collections.abc import Mapping
from typing import Any

from qlora.errors import ConfigError
from qlora.processes import Processes
from qlora.training.origin import describe_changes


def check_same(processes: Processes, facts: Mapping[str, Any]) -> None:
    """Compare the facts of each process with those of the first.

    Args:
        processes: Processes of the run.
        facts: JSON values by their names in the error message.

    Raises:
        ConfigError: They differ; the error is the same on every process.
    """
    everyone = processes.gather(dict(facts))
    for rank, other in enumerate(everyone):
        missing = dict.fromkeys(everyone[0].keys() - other.keys())
        if differences := describe_changes(everyone[0], other | missing):
            raise ConfigError(
                f"Process {rank} of {processes.world_size} has other inputs than process 0 (0 → {rank}):\n"
                + "\n".join(f"  {difference}" for difference in differences)
                + "\nGive all processes the same config, base files, data files and installed packages, and a "
                "train.output_dir on a file system that they share."
            )
