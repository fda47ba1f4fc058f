"""Restores a run from its checkpoint, and checks that it can continue."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save

from qlora.checkpoint import RunDirectory, RunRecord, load_state
from qlora.errors import CheckpointError, ConfigError
from qlora.lora import starts_to_tensors
from qlora.training.agreement import check_same
from qlora.training.origin import describe_origin, fixed_in_use
from qlora.training.plan import Assembly
from qlora.training.progress import Progress
from qlora.training.record import make_record
from qlora.training.resume import Start, check_same_origin
from qlora.training.saving import check_room


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run about to train.

    Attributes:
        progress: Progress that it starts from.
        record: Record of the run at its start.
        origin: Everything that determines its steps, see :func:`qlora.training.origin.describe_origin`.
        fresh: Whether the run was started over.
    """

    progress: Progress
    record: RunRecord
    origin: dict[str, Any]
    fresh: bool


def prepare_run(assembly: Assembly, run: RunDirectory, start: Start) -> Prepared:
    """Restore a run's checkpoint, if there is one, and check that the run can continue from it.

    Raises:
        QLoRAError: Base, data or settings are not those that the run began with, the disk has too little room, or the
            processes would not train the same run: on every process.
    """
    processes, plan = assembly.processes, assembly.plan
    record = make_record(assembly, start)
    origin = describe_origin(assembly.config, record)
    progress = Progress()
    with processes.raise_together():
        check_same_origin(start, origin)
        if processes.is_first:
            check_room(run, assembly, [] if start.fresh else run.list_checkpoints())
        if start.checkpoint is not None:
            if not start.checkpoint.is_dir():
                raise CheckpointError(
                    f"{start.checkpoint} was not found. Put train.output_dir on a file system that all processes share."
                )
            progress = Progress.restored(
                load_state(start.checkpoint, assembly.model, assembly.optimizer, assembly.ranks)
            )
        if progress.step > plan.total_steps:
            raise ConfigError(
                f"{run.path} has done {progress.step} steps already, more than the {plan.total_steps} of the config; "
                "raise train.max_steps or train.epochs, start over with --fresh, or choose another train.output_dir."
            )
    trained = assembly.optimizer.flat.data.cpu().view(torch.uint8).numpy().tobytes()
    starts = save(starts_to_tensors(assembly.starts))
    facts = {
        "first step": progress.step,
        "trained parameters": hashlib.sha256(trained).hexdigest()[:12],
        "starts of the adapters": hashlib.sha256(starts).hexdigest()[:12],
    }
    check_same(processes, fixed_in_use(origin) | facts)
    in_use = replace(record.in_use, micro_batch_parts=progress.num_parts)
    return Prepared(progress, replace(record, in_use=in_use), origin, start.fresh)
