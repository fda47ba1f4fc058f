"""Whether all processes are about to train the same run."""

from collections.abc import Mapping
from typing import Any

from qlora.errors import ConfigError
from qlora.processes import Processes
from qlora.training.resume import describe_changes


def check_same(processes: Processes, facts: Mapping[str, Any]) -> None:
    """Compare what each process found with what the first one found.

    Args:
        processes: Of the run.
        facts: Plain values by what they are, for people to read.

    Raises:
        ConfigError: They differ: the same error on every process.
    """
    everyone = processes.gather(dict(facts))
    for rank, other in enumerate(everyone):
        if differences := describe_changes(everyone[0], other):
            raise ConfigError(
                f"Process {rank} of {processes.world_size} has other inputs than process 0 (0 → {rank}):\n"
                + "\n".join(f"  {difference}" for difference in differences)
                + "\nGive all processes the same config, base files and data files, and a train.output_dir on a file "
                "system that they share."
            )
