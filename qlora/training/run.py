"""A training run: started or continued, driven, and left behind in its directory."""

import hashlib
import signal
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import RunDirectory, load_state, save_adapter, set_aside
from qlora.config import RunConfig, absolute_paths, dump_config
from qlora.data import eval_batches
from qlora.errors import CheckpointError, ConfigError, ModelError
from qlora.files import hold_lock, write_aside, write_text
from qlora.lora import lora_layers
from qlora.model import Evaluation, evaluate, frozen_checksum, resolve_device
from qlora.processes import Processes
from qlora.training.agreement import check_same
from qlora.training.assemble import Assembly, RunPlan, assemble
from qlora.training.determinism import deterministic_algorithms
from qlora.training.guard import StepGuard
from qlora.training.interrupt import Interruption
from qlora.training.loop import Progress, StepReport, run_loop
from qlora.training.metrics import MetricsLog, peak_memory_bytes
from qlora.training.plot import draw_losses
from qlora.training.record import describe_run
from qlora.training.resume import OWN_KEYS, Start, check_folder, check_same_origin, describe_origin, find_start, flatten
from qlora.training.saving import Saver, check_room
from qlora.training.schedule import rate_of, resolve_interval


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a run is after this session.

    Attributes:
        run_dir: Its directory.
        status: `finished`, or `interrupted` with the state saved.
        steps: Optimizer steps done, in all sessions.
        trained_steps: Of those, the ones done in this session: 0 if the run was finished already.
        losses: Training loss of every logged step.
        eval_losses: Held-out loss by step.
        tokens_per_second: Mean over the logged steps.
        peak_memory: Bytes, the most of all sessions; see :func:`qlora.training.metrics.peak_memory_bytes`.
        signal: That interrupted this session, if one did.
        notes: What to know or do next.
    """

    run_dir: Path
    status: str
    steps: int
    trained_steps: int
    losses: list[float]
    eval_losses: dict[int, float]
    tokens_per_second: float
    peak_memory: int
    signal: int | None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"run_dir": str(self.run_dir)}


def plan_run(config: RunConfig, resume: str = "auto", fresh: bool = False) -> RunPlan:
    """Assemble a run without training or writing anything: raises every error that shows before step 1.

    Args:
        config: Of the run.
        resume: As for :func:`train`.
        fresh: As for :func:`train`.
    """
    config = absolute_paths(config)
    run = RunDirectory(config.train.output_dir)
    processes = _start_processes(config)
    start = Start()
    with processes.raise_together():
        if processes.is_first:
            check_folder(run)
            start = find_start(run, config, resume, fresh)
    start = _agree_on(processes, start, config)
    assembly = assemble(config, processes)
    if start.is_done:
        return replace(assembly.plan, notes=_notes_when_done(run, start, config))
    prepared = _prepare(assembly, run, start)
    notes = [*start.describe_damage(), *start.describe_jump(config, prepared.progress.step, assembly.plan.total_steps)]
    if fresh and run.exists():
        notes.append(f"The run in {run.path} would be moved aside.")
    return replace(assembly.plan, notes=notes)


def train(config: RunConfig, resume: str = "auto", stop_at: int | None = None, fresh: bool = False) -> RunResult:
    """Train a run, from its start or from where an earlier session stopped.

    Only one run at a time trains in a directory; see :func:`qlora.checkpoint.hold_lock`. Of several processes the
    first decides where the run starts, and it alone writes.

    Args:
        config: Of :func:`qlora.load_config`.
        resume: `auto` continues the run of the same output_dir; a path starts from that checkpoint, or from the last
            checkpoint of that run.
        stop_at: Step to save and stop after, as at Ctrl-C.
        fresh: Start over. A run in output_dir is moved aside first, to a folder named `NAME.old-1` next to it.

    Raises:
        QLoRAError: Of the kind that fits, before or during the run; what was saved stays.
    """
    config = absolute_paths(config)
    run = RunDirectory(config.train.output_dir)
    processes = _start_processes(config)
    start, remarks = Start(), []
    with ExitStack() as lock:
        with processes.raise_together():
            if processes.is_first:
                check_folder(run)
                if warning := lock.enter_context(hold_lock(run.lock)):
                    remarks.append(warning)
                run.clear_leftovers()
                start = find_start(run, config, resume, fresh)
        start = _agree_on(processes, start, config)
        if start.is_done:
            return _already_finished(run, start, config)
        with deterministic_algorithms(config.train.deterministic):
            assembly = assemble(config, processes)
            try:
                return _train(assembly, run, start, stop_at, remarks)
            finally:
                processes.end()


def _start_processes(config: RunConfig) -> Processes:
    return Processes.start(resolve_device().type == "cpu", config.train.trackers, config.train.output_dir)


def _agree_on(processes: Processes, start: Start, config: RunConfig) -> Start:
    """The first process's start, on all of them, once they have the same config."""
    check_same(processes, {key: value for key, value in flatten(config).items() if key not in OWN_KEYS})
    return processes.broadcast(start)


def _train(assembly: Assembly, run: RunDirectory, start: Start, stop_at: int | None, remarks: list[str]) -> RunResult:
    model, processes, total_steps = assembly.model, assembly.processes, assembly.plan.total_steps
    prepared = _prepare(assembly, run, start)
    record, progress, first_step = prepared.record, prepared.progress, prepared.progress.step
    if run.path in start.origins and start.finished_steps == first_step == total_steps:
        return _already_finished(run, start, assembly.config)
    with processes.raise_together():
        if processes.is_first:
            if start.fresh and run.exists():
                remarks.append(f"The run in {run.path} was moved to {run.move_aside()}.")
            for folder in start.damaged:
                set_aside(folder)
            run.keep_metrics_until(-1 if start.checkpoint is None else first_step)
            # Before the config: a config without a record is not taken for a run.
            run.write_record(record | {"status": "running"})
            write_text(run.config, dump_config(assembly.config))
    remarks += start.describe_damage() + start.describe_jump(assembly.config, first_step, total_steps)
    checksum = frozen_checksum(model)
    received = _run_session(assembly, run, prepared, stop_at, remarks)

    status = "finished" if progress.step == total_steps else "interrupted"
    with processes.raise_together():
        if frozen_checksum(model) != checksum:
            raise ModelError("The frozen base was changed during training, so the run can't be trusted.")
        if processes.is_first:
            if status == "finished":
                _save_final_adapter(assembly, run)
            run.write_record(record | {"status": status, "steps": progress.step})
            draw_losses(run.read_metrics(), run.path / "loss.png")
    notes = []
    if status == "interrupted":
        notes.append(f"Stopped at step {progress.step} of {total_steps}. {how_to_continue(start.fresh)}")
    return _result(run, status, progress.step, progress.step - first_step, received, notes)


def how_to_continue(fresh: bool) -> str:
    """A sentence for the end of a session that did not finish its run."""
    return f"The same command{' without --fresh' if fresh else ''} continues the run from its last save."


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A run about to train.

    Attributes:
        progress: Where it starts.
        record: What run.json says, except how far the run is.
        origin: What it follows from, see :func:`qlora.training.resume.describe_origin`.
        fresh: Whether it was started over.
    """

    progress: Progress
    record: dict[str, Any]
    origin: dict[str, Any]
    fresh: bool


def _prepare(assembly: Assembly, run: RunDirectory, start: Start) -> _Prepared:
    """Put a run's parts where its checkpoint left them, if there is one, and check that it can go on from there.

    Raises:
        QLoRAError: Base, data or settings are not those that the run began with, the disk has too little room, or the
            processes would not train the same run: on every process.
    """
    processes, plan = assembly.processes, assembly.plan
    record = _record(assembly, start)
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
            progress = Progress.restored(load_state(start.checkpoint, assembly.model, assembly.optimizer))
        if progress.step > plan.total_steps:
            raise ConfigError(
                f"{run.path} has done {progress.step} steps already, more than the {plan.total_steps} asked for; raise "
                "train.max_steps or train.epochs, start over with --fresh, or choose another train.output_dir."
            )
    trained = assembly.optimizer.flat.data.cpu().view(torch.uint8).numpy().tobytes()
    facts = {"first step": progress.step, "trained parameters": hashlib.sha256(trained).hexdigest()[:12]}
    check_same(processes, origin["in_use"] | facts)
    plan.in_use["micro_batch_parts"] = progress.num_parts
    return _Prepared(progress, record, origin, start.fresh)


def _run_session(
    assembly: Assembly, run: RunDirectory, prepared: _Prepared, stop_at: int | None, remarks: list[str]
) -> signal.Signals | None:
    """Train until the end, a signal or `stop_at`, saving and evaluating on the way; return the signal."""
    config, plan, processes = assembly.config.train, assembly.plan, assembly.processes
    progress = prepared.progress
    total = plan.total_steps
    processes.start_trackers("qlora")
    eval_every, save_every = (resolve_interval(value, total) for value in (config.eval_every, config.save_every))
    is_evaluated = processes.broadcast(
        processes.is_first and any(line["step"] == progress.step and "eval_loss" in line for line in run.read_metrics())
    )
    log = MetricsLog(run, processes, total, plan.steps_per_epoch, config.log_every, progress.step)
    log.announce([*(report.summary() for report in plan.datasets.reports), plan.summary(), *remarks])
    saver, guard = Saver(run, assembly, prepared.origin, log), StepGuard(run, assembly, progress, log)

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
        stop = interruption.requested if processes.world_size == 1 else report.stop_asked
        stop = stop or progress.step == stop_at
        is_asked = interruption.take_save_request()
        if is_last or stop or (save_every and progress.step % save_every == 0):
            with processes.raise_together():
                saver.save(progress, is_last or stop)
        elif is_asked:  # of this process alone
            saver.save(progress, False)
        # After the save, which may be all that a stop leaves time for; a continued run makes up for it.
        if evaluates_at(progress.step) and (is_last or not stop):
            evaluate_now()
        return not stop

    with Interruption() as interruption:
        try:
            with processes.raise_together():
                saver.try_save(progress)
            if evaluates_at(progress.step) and not is_evaluated:
                evaluate_now()
            run_loop(
                assembly.model, assembly.optimizer, plan.datasets.train, assembly.batches, processes,
                progress, total, rate_of(config, total), config.max_grad_norm, after_step,
                lambda: interruption.requested, guard.on_nonfinite, guard.on_out_of_memory,
            )  # fmt: skip
        except torch.OutOfMemoryError as problem:
            raise ModelError(
                f"Memory ran out after step {progress.step}, in an evaluation, an update or a save, where the step "
                "can't be retried with less; free some, or lower train.micro_batch_size or data.max_seq_len. "
                f"{how_to_continue(prepared.fresh)} {problem}"
            ) from problem
        except BaseException as stop:  # such as a second Ctrl-C
            stop.add_note(how_to_continue(prepared.fresh))
            raise
        finally:
            log.close()
    return interruption.signal


def _evaluate_all(assembly: Assembly) -> Evaluation:
    """Evaluate the held-out examples, each process a part of them."""
    processes = assembly.processes
    examples, capacity = assembly.plan.datasets.eval, assembly.batches.capacity
    batches = eval_batches(examples, assembly.config.train.micro_batch_size, capacity)
    share = islice(batches, processes.rank, None, processes.world_size)
    return evaluate(assembly.model, share, processes.sum)


def _save_final_adapter(assembly: Assembly, run: RunDirectory) -> None:
    """Write the trained adapter with its tokenizer and chat template."""
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
        "started_from": start.started_from,
        "final_step": start.final_step,
        "parameters": plan.inventory.as_dict() | {"adapted": [name for name, _ in lora_layers(assembly.model)]},
        "data": [report.as_dict() for report in plan.datasets.reports],
        "examples": {"train": len(plan.datasets.train), "eval": len(plan.datasets.eval)},
    }


def _already_finished(run: RunDirectory, start: Start, config: RunConfig) -> RunResult:
    """The result of the session that finished the run, and what to do next."""
    assert start.finished_steps is not None
    return _result(run, "finished", start.finished_steps, 0, None, _notes_when_done(run, start, config))


def _notes_when_done(run: RunDirectory, start: Start, config: RunConfig) -> list[str]:
    notes = [
        f"Already finished at step {start.finished_steps}; nothing was trained. To train on, raise train.max_steps or "
        f"train.epochs; to start over, add --fresh, which keeps {run.path} under another name."
    ]
    if ignored := start.changes(config, flatten(config).keys() - OWN_KEYS):
        notes.append(f"Ignored, because the run is finished: {'; '.join(sorted(ignored))}.")
    return notes


def _result(
    run: RunDirectory, status: str, steps: int, trained_steps: int, received: signal.Signals | None, notes: list[str]
) -> RunResult:
    lines = run.read_metrics()
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    peaks = [line["peak_memory"] for line in lines if "peak_memory" in line]
    if trained_steps or not peaks:
        peaks.append(peak_memory_bytes())
    return RunResult(
        run_dir=run.path,
        status=status,
        steps=steps,
        trained_steps=trained_steps,
        losses=[line["loss"] for line in lines if "loss" in line],
        eval_losses={line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line},
        tokens_per_second=sum(speeds) / max(1, len(speeds)),
        peak_memory=max(peaks),
        signal=received,
        notes=notes,
    )
