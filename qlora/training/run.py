"""A training run: started or continued, trained for a session, and recorded in its directory."""

import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora.checkpoint import (
    Best,
    RunDirectory,
    RunRecord,
    evaluation_metrics,
    quarantine,
    save_adapter,
    step_of,
    write_starts,
)
from qlora.config import RunConfig, TrainSection, absolute_paths, dump_config
from qlora.errors import ConfigError, ModelError, QLoRAError
from qlora.files import atomic_folder, hold_lock, write_text
from qlora.lora.experts import describe_dead_experts
from qlora.model import frozen_checksum, resolve_device, write_labels
from qlora.pages import refresh_page
from qlora.processes import Processes
from qlora.training.agreement import check_same
from qlora.training.assemble import assemble
from qlora.training.best import BestWatch, is_better
from qlora.training.callbacks import Callback, check_callbacks
from qlora.training.determinism import deterministic_algorithms
from qlora.training.display import Display
from qlora.training.given import as_config
from qlora.training.metrics import peak_memory_bytes
from qlora.training.origin import OWN_KEYS, flatten
from qlora.training.plan import Assembly, RunPlan
from qlora.training.plot import draw_confusion, draw_losses
from qlora.training.prepare import prepare_run
from qlora.training.resume import Start, check_folder, check_step_size, find_start
from qlora.training.session import SessionOptions, how_to_continue, run_session
from qlora.training.tracking import send_files


@dataclass(frozen=True, slots=True, repr=False)
class RunResult:
    """State of a run after a session.

    Attributes:
        run_dir: Directory of the run.
        status: `finished`, or `interrupted` with the state saved.
        steps: Number of optimizer steps done, in all sessions.
        trained_steps: Number of those done in this session; 0 if the run was finished already.
        losses: Training loss of every logged step.
        evaluations: Every metric of the evaluations, by its name in metrics.jsonl and by step: `eval_loss`,
            `eval_NAME_loss` of a further set of `data.eval`, `retain_loss`, and others.
        best: The best evaluation, if its checkpoint is kept (`train.keep_best`, `train.early_stopping`).
        tokens_per_second: Mean over the logged steps.
        peak_memory: Peak memory of all sessions in bytes; see :func:`qlora.training.metrics.peak_memory_bytes`.
        signal: Signal that interrupted this session, if one did.
        notes: What a user should know or do next.
    """

    run_dir: Path
    status: str
    steps: int
    trained_steps: int
    losses: list[float]
    evaluations: dict[str, dict[int, float]]
    best: Best | None
    tokens_per_second: float
    peak_memory: int
    signal: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def eval_losses(self) -> dict[int, float]:
        """Held-out loss by step: of the first set in `data.eval`."""
        return self.evaluations.get("eval_loss", {})

    @property
    def eval_metrics(self) -> dict[str, float]:
        """Metrics of the last held-out evaluation by name, such as the accuracy of a classification."""
        last = {name: list(values.values())[-1] for name, values in self.evaluations.items() if name != "eval_loss"}
        return {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        also = {"eval_losses": self.eval_losses, "eval_metrics": self.eval_metrics}
        return asdict(self) | {"run_dir": str(self.run_dir)} | also

    def __repr__(self) -> str:
        loss = f", loss {self.losses[-1]:.4f}" if self.losses else ""
        held_out = f", held-out loss {list(self.eval_losses.values())[-1]:.4f}" if self.eval_losses else ""
        return f"<RunResult: {self.status} at step {self.steps:,}{loss}{held_out}, {self.run_dir}>"


def plan_run(config: RunConfig, resume: str = "auto", fresh: bool = False) -> RunPlan:
    """Assemble a run without training or writing anything; raises every error that shows before step 1.

    Args:
        config: Config of the run.
        resume: See :func:`train`.
        fresh: See :func:`train`.
    """
    config = absolute_paths(config)
    run = RunDirectory(config.train.output_dir)
    processes = _start_processes(config)
    start = Start()
    with processes.raise_together():
        if processes.is_first:
            check_folder(run)
            start = find_start(run, config, resume, fresh)
            check_step_size(start, config, processes.world_size)
    start = _agree_on(processes, start, config)
    assembly = assemble(config, processes, start.checkpoint)
    if start.is_done:
        return replace(assembly.plan, notes=_notes_when_done(run, start, config))
    prepared = prepare_run(assembly, run, start)
    notes = [*start.describe_damage(), *assembly.notes]
    notes += start.describe_processes(processes.world_size)
    notes += start.describe_jump(assembly.train, prepared.progress.step, assembly.plan.total_steps)
    if fresh and run.exists():
        notes.append(f"The run in {run.path} would be kept under another name.")
    return replace(assembly.plan, in_use=prepared.record.in_use, notes=notes)


def train(
    config: RunConfig | str | Path | Mapping[str, Any],
    resume: str = "auto",
    stop_at: int | None = None,
    fresh: bool = False,
    rows: Iterable[Mapping[str, Any]] | None = None,
    callbacks: Sequence[Callback] = (),
    show_progress: bool = False,
) -> RunResult:
    """Train a run, from its start or from where an earlier session stopped.

    Only one run at a time can train in a directory; see :func:`qlora.files.hold_lock`. Of several processes, the
    first decides where the run starts, and only the first writes.

    Args:
        config: Config that :func:`qlora.load_config` returned, or what it takes: a YAML file, or sections in a dict.
        resume: `auto` continues the run of the same output_dir; a path starts from that checkpoint, or from the last
            checkpoint of that run.
        stop_at: Step to save and stop after, as at Ctrl-C.
        fresh: Start over. A run in output_dir is first renamed to `NAME.old-1`.
        rows: Rows to train on instead of `data.train`: a list of dicts, or a `datasets.Dataset`. They are written to
            a file in the user's cache, so that the run continues and can be evaluated without them.
        callbacks: Called at every step, evaluation and save; see :class:`qlora.Callback`.
        show_progress: Print a progress line and messages to standard error. Without it, messages are notes of the
            result.

    Raises:
        QLoRAError: The run can't start, or failed; what was saved stays.
    """
    check_callbacks(callbacks)
    config = absolute_paths(as_config(config, rows))
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
                check_step_size(start, config, processes.world_size)
        start = _agree_on(processes, start, config)
        if start.is_done:
            return _already_finished(run, start, config, resume)
        with deterministic_algorithms(config.train.deterministic):
            assembly = assemble(config, processes, start.checkpoint)
            try:
                options = SessionOptions(stop_at, callbacks)
                return _train(assembly, run, start, options, remarks=remarks, is_shown=show_progress)
            except BaseException:
                if processes.is_first and _has_begun(run):
                    lock.close()  # before, because the page calls a run that is locked running
                    refresh_page(run)
                raise
            finally:
                processes.end()


def _has_begun(run: RunDirectory) -> bool:
    """Return whether a run's record says that it is running; one that was refused is left as it was."""
    try:
        return run.read_record().status == "running"
    except QLoRAError:
        return False


def _start_processes(config: RunConfig) -> Processes:
    return Processes.start(resolve_device().type == "cpu", config.train.trackers, config.train.output_dir)


def _agree_on(processes: Processes, start: Start, config: RunConfig) -> Start:
    """Return the first process's start on all processes, after checking that they have the same config."""
    check_same(processes, {key: value for key, value in flatten(config).items() if key not in OWN_KEYS})
    return processes.broadcast(start)


def _train(
    assembly: Assembly,
    run: RunDirectory,
    start: Start,
    options: SessionOptions,
    *,
    remarks: list[str],
    is_shown: bool,
) -> RunResult:
    model, processes, total_steps = assembly.model, assembly.processes, assembly.plan.total_steps
    prepared = prepare_run(assembly, run, start)
    record, progress, first_step = prepared.record, prepared.progress, prepared.progress.step
    if run.path in start.origins and start.finished_steps == first_step == total_steps:
        return _already_finished(run, start, assembly.config, "auto")
    if options.stop_at is not None and options.stop_at <= first_step:
        raise ConfigError(f"stop_at: {options.stop_at} should be after step {first_step}, where the run starts now.")
    watch = BestWatch()
    with processes.raise_together():
        if processes.is_first:
            if start.fresh and run.exists():
                remarks.append(f"The run in {run.path} was moved to {run.move_aside()}.")
            for folder in start.damaged:
                quarantine(folder)
            run.keep_logs_until(-1 if start.checkpoint is None else first_step)
            saved = [step_of(folder) or 0 for folder in run.list_checkpoints()]
            watch = BestWatch.restored(assembly.config.train, run.read_metrics(), saved, record.stopped_early)
            record = replace(record, best=watch.best)
            if assembly.starts:
                write_starts(run.starts, assembly.starts)
            if (labels := assembly.plan.datasets.labels) is not None:
                write_labels(run.labels, labels, assembly.config.data.max_seq_len)
            # Before the config, because a config without a record is not recognized as a run.
            run.write_record(record)
            write_text(run.config, dump_config(assembly.config))
    remarks += [*start.describe_damage(), *assembly.notes]
    remarks += start.describe_processes(processes.world_size)
    remarks += start.describe_jump(assembly.train, first_step, total_steps)
    checksum = frozen_checksum(model)
    display = Display(total_steps, first_step, is_shown and processes.is_first)
    display.show([*(report.summary() for report in assembly.plan.datasets.all_reports), assembly.plan.summary()])
    if first_step:
        display.show([f"Continuing after step {first_step:,} from {start.checkpoint}."])
    display.announce(remarks)
    record = processes.broadcast(record)
    prepared = replace(prepared, record=record)
    end = run_session(assembly, run, prepared, processes.broadcast(watch), display, options)

    is_finished = progress.step == total_steps or end.stopped_early
    record = replace(
        record,
        in_use=end.in_use,
        status="finished" if is_finished else "interrupted",
        steps=progress.step,
        best=end.best,
        stopped_early=progress.step if end.stopped_early else record.stopped_early,
    )
    with processes.raise_together():
        if frozen_checksum(model) != checksum:
            raise ModelError(
                "The frozen base was changed during training, so the run can't be trusted; train it again."
            )
        if processes.is_first:
            if is_finished:
                _save_final_adapter(assembly, run)
            run.write_record(record)
            _draw(run, assembly)
            display.announce([problem] if (problem := refresh_page(run)) else [])
            display.announce(send_files(processes, [run.page, run.samples]))
    notes = [*display.messages]
    if is_finished and assembly.ranks is not None:
        notes.append(assembly.ranks.describe())
    if end.stopped_early:
        notes.append(f"{_describe_stop(assembly.train, progress.step)} To train on, raise train.max_steps.")
    if is_finished:
        notes += _describe_best(run, record, assembly.train) + describe_dead_experts(model)
    if not is_finished:
        notes.append(f"Stopped at step {progress.step} of {total_steps}. {how_to_continue(start.fresh)}")
    return _result(run, record.status, progress.step, progress.step - first_step, notes=notes, received=end.signal)


def _draw(run: RunDirectory, assembly: Assembly) -> None:
    """Draw the run's losses, and the confusion matrix of its last evaluation if it classifies."""
    lines, labels = run.read_metrics(), assembly.plan.datasets.labels
    ylabel = "loss per supervised token (nats)" if assembly.objective.loss.is_per_token else "loss"
    draw_losses(lines, run.path / "loss.png", run.path.name, ylabel)
    matrices = [(line["step"], line["eval_confusion"]) for line in lines if "eval_confusion" in line]
    if labels is not None and not labels.is_multiple and matrices:
        step, matrix = matrices[-1]
        title = f"{run.path.name}, step {step:,}"
        draw_confusion(matrix, labels.names, run.path / "confusion.png", title)


def _save_final_adapter(assembly: Assembly, run: RunDirectory) -> None:
    """Write the trained adapter with its tokenizer and chat template."""
    with atomic_folder(run.adapter) as folder:
        save_adapter(assembly.model, folder, assembly.config.model.base)
        assembly.tokenizer.save_pretrained(folder)


def _already_finished(run: RunDirectory, start: Start, config: RunConfig, resume: str) -> RunResult:
    """Return the result of the session that finished the run, and what to do next."""
    assert start.finished_steps is not None
    notes = _notes_when_done(run, start, config)
    if resume != "auto":
        notes.append(f"--resume {resume} had no effect; to start from there, choose another train.output_dir.")
    return _result(run, "finished", start.finished_steps, 0, notes=notes)


def _notes_when_done(run: RunDirectory, start: Start, config: RunConfig) -> list[str]:
    assert start.record is not None
    early = " (stopped early)" if start.record.stopped_early == start.finished_steps else ""
    notes = [
        f"Already finished at step {start.finished_steps}{early}; nothing was trained. To continue training, raise "
        f"train.max_steps or train.epochs; to start over, add --fresh, which keeps {run.path} under another name.",
        *_describe_best(run, start.record, config.train),
    ]
    if ignored := start.changes(config, flatten(config).keys() - OWN_KEYS):
        notes.append(f"Ignored, because the run is finished: {'; '.join(sorted(ignored))}.")
    return notes


def _describe_stop(section: TrainSection, step: int) -> str:
    """Return why a run stopped early."""
    assert section.early_stopping is not None
    stopping = section.early_stopping
    count = "the last evaluation" if stopping.patience == 1 else f"the last {stopping.patience} evaluations"
    least = f" by more than {stopping.min_delta:g}" if stopping.min_delta else ""
    return f"Stopped early at step {step}: {stopping.metric} did not improve in {count}{least}."


def _describe_best(run: RunDirectory, record: RunRecord, section: TrainSection) -> list[str]:
    """Return which checkpoint is released, if that is the best one, and whether training was of use."""
    best = record.best
    if best is None:
        return []
    first = evaluation_metrics(run.read_metrics(until=0)).get(best.metric, {}).get(0)
    notes = [
        f"The best is step {best.step}, with {best.metric} {best.value:.4f}: merge, verify, generate, chat, eval and "
        "predict take it; --checkpoint last takes the last step."
    ]
    if first is not None and is_better(best.metric, section.best_mode, first, best.value):
        notes.append(f"The base is better: {best.metric} {first:.4f} before training.")
    return notes


def _result(
    run: RunDirectory,
    status: str,
    steps: int,
    trained_steps: int,
    *,
    notes: list[str],
    received: signal.Signals | None = None,
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
        evaluations=evaluation_metrics(lines),
        # Only the first process has the run's files, unless the folder is shared.
        best=run.read_record().best if run.record.is_file() else None,
        tokens_per_second=sum(speeds) / max(1, len(speeds)),
        peak_memory=max(peaks),
        signal=received,
        notes=notes,
    )
