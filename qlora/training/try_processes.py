"""The processes that a launcher started, tried: whether they add up numbers, and how fast."""

import time

import torch

from qlora.errors import ModelError
from qlora.processes import Processes

# Numbers that are added up: 64 MiB in fp32, as the gradients of 17 million trained parameters.
TRIED = 1 << 24


def try_processes(processes: Processes) -> str:
    """Add up known numbers over processes, and describe what came out; every process must call it.

    Raises:
        ModelError: The sums are wrong: on every process.
    """
    count, seconds = processes.world_size, 0.0
    own = torch.arange(TRIED, dtype=torch.float32, device=processes.device).remainder_(1000) + processes.rank
    expected = (own - processes.rank) * count + count * (count - 1) / 2
    for _ in range(2):  # the first time sets up connections
        processes.agree(0)
        started = time.perf_counter()
        is_right = torch.equal(processes.sum(own.clone()), expected)
        seconds = time.perf_counter() - started
    with processes.raise_together():
        if not is_right:
            raise ModelError(f"The {count} processes add up numbers wrong; check the drivers and the network.")
    rate = own.nbytes / processes.max(seconds) / 1e9
    return f"{count}: sums are right, at {rate:.1f} GB/s"
