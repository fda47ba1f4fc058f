"""A training run: started or continued, driven, and left behind in its directory."""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import (
    RunDirectory,
    hold_lock,
    load_state,
    save_adapter,
    set_aside,
    write_aside,
    write_text,
)
from qlora.config import RunConfig, absolute_paths, dump_config
from qlora.data import eval_batches
from qlora.errors import ConfigError, ModelError
from qlora.lora import lora_layers
from qlora.model import Evaluation, evaluate, frozen_checksum
from qlora.training.assemble import Assembly, RunPlan, assemble
from qlora.training.determinism import deterministic_algorithms
from qlora.training.guard import StepGuard
from qlora.training.interrupt import Interruption
from qlora.training.loop import Progress, StepReport, run_loop
from qlora.training.metrics import MetricsLog, peak_memory_bytes
from qlora.training.plot import draw_losses
from qlora.training.record import describe_run
from qlora.training.resume import Start, check_folder, check_same_origin, describe_origin, find_start, is_finished
from qlora.training.saving import Saver, check_room
from qlora.training.schedule import learning_rate, resolve_interval


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to.

    Attributes:
        run_dir: Its directory.
        status: `finished`, or `interrupted` with the state saved.
        steps: Optimizer steps done, in all sessions.
        losses: Training loss of every logged step.
        eval_losses: Held-out loss by step.
        tokens_per_second: Mean over the logged steps.
        peak_memory: Bytes, see :func:`qlora.training.metrics.peak_memory_bytes`.
        signal: That interrupted this session, if one did.
    """

    run_dir: Path
    status: str
    steps: int
    losses: list[float]
    eval_losses: dict[int, float]
    tokens_per_second: float
    peak_memory: int
    signal: int | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"run_dir": str(self.run_dir)}


def plan_run(config: RunConfig, resume: str = "auto") -> RunPlan:
    """Assembles a run without training or writing anything: every error that can be had before step 1.

    Args:
        config: Of the run.
        resume: As of :func:`train`.
    """
    config = absolute_paths(config)
    run = RunDirectory(config.train.output_dir)
    start = find_start(run, config, resume)
    assembly = assemble(config)
    check_same_origin(start, config, _record(assembly, start))
    check_room(run, assembly)
    _restore(assembly, run, start)
    return assembly.plan


def train(config: RunConfig, resume: str = "auto", stop_at: int | None = None) -> RunResult:
    """Trains a run, from its start or from where an earlier session stopped.

    Only one process at a time trains in a directory; see :func:`qlora.checkpoint.hold_lock`.

    Args:
        config: Of :func:`qlora.load_config`.
        resume: `auto` continues an unfinished run of the same output_dir, `never` refuses one, and a path
            starts from that checkpoint.
        stop_at: The step to save and stop after, as at Ctrl-C.

    Raises:
        QLoRAError: Of the kind that fits, before or during the run; what was saved stays.
    """
    config = absolute_paths(config)
    run = RunDirectory(config.train.output_dir)
    check_folder(run)
    # Of several processes the first one writes; a launcher ends the others if it can't.
    writes = os.environ.get("RANK", "0") == "0"
    with hold_lock(run.lock) if writes else nullcontext() as warning:
        if writes:
            run.clear_leftovers()
        start = find_start(run, config, resume)
        if is_finished(run, config):
            return _result(run, "finished", run.read_record()["steps"])
        with deterministic_algorithms(config.train.deterministic):
            assembly = assemble(config)
            try:
                return _train(assembly, run, start, stop_at, [warning] if warning else [])
            finally:
                assembly.accelerator.end_training()


def _train(assembly: Assembly, run: RunDirectory, start: Start, stop_at: int | None, remarks: list[str]) -> RunResult:
    model, accelerator = assembly.model, assembly.accelerator
    record = _record(assembly, start)
    check_same_origin(start, assembly.config, record)
    check_room(run, assembly)
    accelerator.wait_for_everyone()
    progress = _restore(assembly, run, start)
    if accelerator.is_main_process:
        for folder in start.damaged:
            set_aside(folder)
        run.keep_metrics_until(-1 if start.checkpoint is None else progress.step)
        # Before the config: a config without a record is taken for something else's.
        run.write_record(record | {"status": "running"})
        write_text(run.config, dump_config(assembly.config))
    accelerator.wait_for_everyone()
    checksum = frozen_checksum(model)
    origin = describe_origin(assembly.config, record)
    received = _run_session(assembly, run, progress, origin, stop_at, remarks + start.describe_damage())
    if frozen_checksum(model) != checksum:
        raise ModelError("The frozen base was changed during training, so the run can't be trusted.")

    status = "finished" if progress.step == assembly.plan.total_steps else "interrupted"
    if accelerator.is_main_process:
        if status == "finished":
            _save_final_adapter(assembly, run)
        run.write_record(record | {"status": status, "steps": progress.step})
        draw_losses(run.read_metrics(), run.path / "loss.png")
    accelerator.wait_for_everyone()
    return _result(run, status, progress.step, received)


def _restore(assembly: Assembly, run: RunDirectory, start: Start) -> Progress:
    """Puts a run's parts where its checkpoint left them, if there is one; returns how far that is."""
    if start.checkpoint is None:
        return Progress()
    progress = Progress.restored(load_state(start.checkpoint, assembly.model, assembly.optimizer))
    if progress.step > assembly.plan.total_steps:
        raise ConfigError(
            f"{run.path} has done {progress.step} steps already, more than the {assembly.plan.total_steps} asked for; "
            "raise train.max_steps or train.epochs, or choose another train.output_dir."
        )
    assembly.plan.in_use["micro_batch_parts"] = progress.num_parts
    return progress


def _run_session(
    assembly: Assembly,
    run: RunDirectory,
    progress: Progress,
    origin: dict[str, Any],
    stop_at: int | None,
    remarks: list[str],
) -> signal.Signals | None:
    """Trains until the end, a signal or `stop_at`, saving and evaluating on the way; returns the signal."""
    config, plan, accelerator = assembly.config.train, assembly.plan, assembly.accelerator
    total = plan.total_steps
    accelerator.init_trackers("qlora")
    eval_every, save_every = (resolve_interval(value, total) for value in (config.eval_every, config.save_every))
    is_evaluated = any(line["step"] == progress.step and "eval_loss" in line for line in run.read_metrics())
    log = MetricsLog(run, accelerator, total, plan.steps_per_epoch, config.log_every, progress.step)
    log.announce([*(report.summary() for report in plan.datasets.reports), plan.summary(), *remarks])
    saver, guard = Saver(run, assembly, origin, log), StepGuard(run, assembly, progress, log)

    def evaluates_at(step: int) -> bool:
        return step in (0, total) or eval_every is not None and step % eval_every == 0

    def evaluate_now() -> None:
        if plan.datasets.eval:
            log.log_evaluation(progress.step, _evaluate_all(assembly))

    def after_step(report: StepReport) -> bool:
        log.log_step(progress, report)
        guard.note(report)
        is_last = progress.step == total
        # Several must stop after the same step, so they go by what they last told each other.
        stop = interruption.requested if accelerator.num_processes == 1 else report.stop_asked
        stop = stop or progress.step == stop_at
        is_asked = interruption.take_save_request()
        if is_last or stop or is_asked or (save_every and progress.step % save_every == 0):
            saver.save(progress, is_last or stop)
        # After the save, which may be all that a stop leaves time for; a continued run makes up for it.
        if evaluates_at(progress.step) and (is_last or not stop):
            evaluate_now()
        return not stop

    with Interruption() as interruption:
        try:
            saver.try_save(progress)
            if evaluates_at(progress.step) and not is_evaluated:
                evaluate_now()
            run_loop(
                assembly.model, assembly.optimizer, plan.datasets.train, assembly.batches, accelerator,
                progress, total, _rate_of(assembly), config.max_grad_norm, after_step,
                lambda: interruption.requested, guard.on_nonfinite, guard.on_out_of_memory,
            )  # fmt: skip
        except torch.OutOfMemoryError as problem:
            raise ModelError(
                f"Memory ran out after step {progress.step}, in an evaluation, an update or a save, where nothing can "
                "be given up for it; free some, or lower train.micro_batch_size or data.max_seq_len. The same command "
                f"goes on from what was last saved. {problem}"
            ) from problem
        finally:
            log.close()
    return interruption.signal


def _rate_of(assembly: Assembly) -> Callable[[int], float]:
    section, total = assembly.config.train, assembly.plan.total_steps
    return lambda step: learning_rate(step, total, section.learning_rate, section.lr_scheduler, section.warmup_ratio)


def _evaluate_all(assembly: Assembly) -> Evaluation:
    """Evaluates the held-out examples, each process a part of them."""
    accelerator = assembly.accelerator
    examples, capacity = assembly.plan.datasets.eval, assembly.batches.capacity
    batches = eval_batches(examples, assembly.config.train.micro_batch_size, capacity)
    share = islice(batches, accelerator.process_index, None, accelerator.num_processes)
    several = accelerator.num_processes > 1
    return evaluate(assembly.model, share, accelerator.reduce if several else None)


def _save_final_adapter(assembly: Assembly, run: RunDirectory) -> None:
    """Writes the trained adapter with its tokenizer and chat template."""
    with write_aside(run.adapter) as folder:
        save_adapter(assembly.model, folder, assembly.config.model.base)
        assembly.tokenizer.save_pretrained(folder)


def _record(assembly: Assembly, start: Start) -> dict[str, Any]:
    """What run.json says, but for how far the run is."""
    plan = assembly.plan
    return describe_run(assembly.config, assembly.files, assembly.model) | {
        "total_steps": plan.total_steps,
        "in_use": plan.in_use,
        "continued_from": str(start.checkpoint) if start.checkpoint else None,
        "parameters": plan.inventory.as_dict() | {"adapted": [name for name, _ in lora_layers(assembly.model)]},
        "data": [report.as_dict() for report in plan.datasets.reports],
        "examples": {"train": len(plan.datasets.train), "eval": len(plan.datasets.eval)},
    }


def _result(run: RunDirectory, status: str, steps: int, received: signal.Signals | None = None) -> RunResult:
    lines = run.read_metrics()
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return RunResult(
        run_dir=run.path,
        status=status,
        steps=steps,
        losses=[line["loss"] for line in lines if "loss" in line],
        eval_losses={line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line},
        tokens_per_second=sum(speeds) / max(1, len(speeds)),
        peak_memory=peak_memory_bytes(),
        signal=received,
    )
