"""The processes of a run, under torchrun, accelerate or alone: the only interface to accelerate's Accelerator."""

import atexit
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qlora.errors import ConfigError, ModelError, QLoRAError
from qlora.out_of_memory import is_out_of_memory

Value = TypeVar("Value")

# Processes wait this long for the first one, which may tokenize large data.
PATIENCE = timedelta(hours=12)


class Processes:
    """One process among those that train together.

    Collective methods (`sum`, `max`, `gather`, `broadcast`, `wait`, `agree`, `raise_together`) must be
    called by every process in the same order. Alone, they return what they are given.

    Args:
        rank: Rank of this process, from 0.
        world_size: Number of processes.
        device: Device that this process computes on.
        accelerator: accelerate's Accelerator; needed for several processes or for trackers.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, device: str | torch.device = "cpu", accelerator: Any = None
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self._accelerator = accelerator
        self._host_group: Any = None
        self._is_in_step = True

    @classmethod
    def start(cls, on_cpu: bool, trackers: Sequence[str] = (), folder: str | Path = ".") -> "Processes":
        """Join the processes that a launcher started.

        Args:
            on_cpu: Compute on the CPU even if accelerate finds a GPU.
            trackers: Names of accelerate's trackers to log to; they start on the first process.
            folder: Folder that trackers write to.

        Raises:
            ConfigError: A tracker is unknown or not installed, or accelerate joined a different number of processes
                than the launcher started.
        """
        from accelerate import Accelerator, InitProcessGroupKwargs

        check_trackers(trackers)
        launched = int(os.environ.get("WORLD_SIZE", 1))
        try:
            accelerator = Accelerator(
                cpu=on_cpu,
                log_with=list(trackers) or None,
                project_dir=Path(folder).expanduser(),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            )
        except ValueError as error:
            raise ConfigError(f"accelerate can't join the {launched} processes of WORLD_SIZE: {error}") from error
        if launched != accelerator.num_processes:
            raise ConfigError(
                f"A launcher started {launched} processes, but accelerate joined {accelerator.num_processes}: they "
                "would train separately in one directory. Launch with torchrun, or set up accelerate config for this "
                "machine."
            )
        if launched > 1:
            atexit.register(accelerator.state.destroy_process_group)
        return cls(accelerator.process_index, launched, accelerator.device, accelerator)

    @property
    def is_first(self) -> bool:
        """Whether this process decides, writes and reports."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elementwise sum of a tensor over all processes, on each of them."""
        if self.world_size == 1:
            return tensor
        with self.watching_others():
            return self._accelerator.reduce(tensor, reduction="sum")

    def max(self, number: float) -> float:
        """Return the largest of the processes' numbers, rounded to fp32, on each of them."""
        if self.world_size == 1:
            return number
        own = torch.tensor([number], dtype=torch.float32, device=self.device)  # MPS has no fp64
        with self.watching_others():
            return self._accelerator.gather(own).max().item()

    def gather(self, value: Value) -> list[Value]:
        """Return the processes' picklable values by rank, on each of them."""
        if self.world_size == 1:
            return [value]
        from accelerate.utils import gather_object

        with self.watching_others():
            return gather_object([value])

    def broadcast(self, value: Value) -> Value:
        """Return the first process's picklable value, on all of them."""
        if self.world_size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        with self.watching_others():
            return broadcast_object_list([value])[0]

    def agree(self, number: int) -> list[int]:
        """Return the processes' numbers by rank, on each of them; the device is not waited for."""
        if self.world_size == 1:
            return [number]
        if self._host_group is None:
            self._host_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        numbers = torch.empty(self.world_size, dtype=torch.int64)
        with self.watching_others():
            all_gather(numbers, torch.tensor([number]), group=self._host_group)
        return numbers.tolist()

    @contextmanager
    def watching_others(self) -> Iterator[None]:
        """Raise a ModelError if an exchange in the body fails: another process has ended, or memory ran out in NCCL."""
        try:
            yield
        except RuntimeError as error:
            first, *_ = str(error).splitlines() or [""]
            is_exchange = isinstance(error, dist.DistError) or "gloo" in first.lower()
            if not is_exchange:
                raise
            self.leave()
            if is_out_of_memory(error):
                raise ModelError(
                    "NCCL ran out of memory for its own buffers, after which it can't be used any more. Set "
                    "model.recompute: full, or lower train.micro_batch_size or data.max_seq_len; the same command "
                    f"continues the run from its last save. ({first})"
                ) from error
            raise ModelError(
                "Another process of the run has ended; its last message has the reason. The same command continues "
                f"the run from its last save. ({first})"
            ) from error

    def leave(self) -> None:
        """Give up on the other processes, with which this one is no longer in step; its next error ends it."""
        self._is_in_step = False

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.world_size > 1:
            with self.watching_others():
                self._accelerator.wait_for_everyone()

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise a QLoRAError of the body on every process, so that none waits for one that has exited."""
        problem = None
        try:
            yield
        except QLoRAError as error:
            if not self._is_in_step:
                raise
            problem = error
        problems = {rank: error for rank, error in enumerate(self.gather(problem)) if error is not None}
        if not problems:
            return
        rank, first = next(iter(problems.items()))
        if len(problems) < self.world_size and rank > 0:
            first = type(first)(f"Process {rank} of {self.world_size}: {first}")
        raise first

    def start_trackers(
        self, project: str, settings: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Start the trackers that :meth:`start` was given.

        Args:
            project: Name of the project that they log to.
            settings: Settings of the run: numbers, booleans and texts.
            options: Arguments of trackers, by their names.
        """
        if self._accelerator is not None:
            with self._prints_apart():
                self._accelerator.init_trackers(project, dict(settings), {name: {**options[name]} for name in options})

    @property
    def trackers(self) -> list[Any]:
        """The trackers that were started, on the first process: instances of accelerate's GeneralTracker."""
        return list(self._accelerator.trackers) if self._accelerator is not None and self.is_first else []

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers to the trackers."""
        if self._accelerator is not None:
            self._accelerator.log(dict(values), step=step)

    def end(self) -> None:
        """End the trackers. The processes stay joined until they exit, so that they can train again."""
        if self._accelerator is not None:
            with self._prints_apart():
                for tracker in self._accelerator.trackers:
                    tracker.finish()

    def _prints_apart(self) -> AbstractContextManager[Any]:
        """Return a context in which what trackio prints goes to standard error, because standard output is for reports.

        Not with W&B, which records the streams that it finds as it starts.
        """
        assert self._accelerator is not None, "trackers are accelerate's"
        names = {str(each) for each in self._accelerator.log_with}
        return redirect_stdout(sys.stderr) if "trackio" in names and "wandb" not in names else nullcontext()


def all_gather(out: torch.Tensor, own: torch.Tensor, group: Any, async_op: bool = False) -> Any:
    """Gather tensors of all processes of a group, by the name that this version of torch has for it.

    Args:
        out: Tensor that those of all processes are written to, in the order of their ranks.
        own: Tensor of this process.
        group: The group.
        async_op: Whether to return before it is done.

    Returns:
        What to wait for if `async_op`, else None.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(out, own, group=group, async_op=async_op)


def check_trackers(names: Sequence[str]) -> None:
    """Check that accelerate has every tracker; it would drop missing ones silently.

    Raises:
        ConfigError: A tracker is unknown or not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available, known = set(map(str, get_available_trackers())), set(map(str, LOGGER_TYPE_TO_CLASS))
    for name in names:
        if name not in known:
            raise ConfigError(f"train.trackers: '{name}' is unknown; accelerate has {', '.join(sorted(known))}.")
        if name not in available:
            raise ConfigError(f"train.trackers: {name} is not installed; run pip install {name}.")
