"""A session of a run: it trains, evaluates and saves until the end of the run, a signal or an error."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from qlora.checkpoint import Best, InUse, RunDirectory
from qlora.data import MAIN_SET, ExampleSet, eval_batches
from qlora.errors import ModelError
from qlora.model import Evaluation, evaluate
from qlora.out_of_memory import is_out_of_memory
from qlora.training.best import BestWatch
from qlora.training.callbacks import Callback, call_all
from qlora.training.display import Display
from qlora.training.guard import StepGuard
from qlora.training.interrupt import Interruption
from qlora.training.live_page import LivePage
from qlora.training.loop import LoopCallbacks, LoopSchedule, StepReport, run_loop
from qlora.training.metrics import MetricsLog
from qlora.training.plan import Assembly
from qlora.training.prepare import Prepared
from qlora.training.saving import Saver
from qlora.training.schedule import rate_of, resolve_interval
from qlora.training.tracking import Tracking


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Options of a session.

    Attributes:
        stop_at: Step to save and stop after; None for the end of the run.
        callbacks: Called by the first process.
    """

    stop_at: int | None = None
    callbacks: Sequence[Callback] = ()


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """How a session ended.

    Attributes:
        signal: Signal that ended it, if one did.
        in_use: What the run used at the end.
        best: The best evaluation of the run, if its checkpoint is kept.
        stopped_early: Whether the run ended because evaluations no longer improved.
    """

    signal: signal.Signals | None
    in_use: InUse
    best: Best | None
    stopped_early: bool


def run_session(
    assembly: Assembly,
    run: RunDirectory,
    prepared: Prepared,
    watch: BestWatch,
    display: Display,
    options: SessionOptions,
) -> SessionEnd:
    """Train until the end, a signal or a given step, saving and evaluating on the way.

    Args:
        assembly: Parts of the run.
        run: Directory of the run.
        prepared: The run, ready to train; its progress is changed in place.
        watch: The best evaluation so far, alike on every process; it is changed in place.
        display: Display of the run.
        options: Options of the session.

    Raises:
        QLoRAError: Training failed; what was saved stays.
    """
    config, plan, processes = assembly.config.train, assembly.plan, assembly.processes
    progress, total = prepared.progress, plan.total_steps
    first_step = progress.step
    with processes.raise_together():
        tracking = Tracking(processes, assembly.config, run.path.name)
    sample_every = None if config.samples is None else config.samples.every
    eval_every, save_every, sample_every = (
        resolve_interval(value, total) for value in (config.eval_every, config.save_every, sample_every)
    )
    evaluated = {f"{name}_loss" for name in plan.datasets.held_out}
    lines = processes.broadcast(run.read_metrics() if processes.is_first else [])
    is_evaluated = any(line["step"] == progress.step and evaluated <= line.keys() for line in lines)
    sampled = processes.broadcast([line["step"] for line in run.read_samples()] if processes.is_first else [])
    log = MetricsLog(
        run,
        processes,
        tracking,
        total_steps=total,
        steps_per_epoch=plan.steps_per_epoch,
        log_every=config.log_every,
        display=display,
        unit="images" if assembly.config.data.has_images else "tok",
    )
    saver = Saver(run, assembly, prepared.origin, log)
    guard = StepGuard(run, assembly, progress, log, prepared.record.in_use)
    page = LivePage(run, log.announce)

    def evaluates_at(step: int) -> bool:
        return step in (0, total) or eval_every is not None and step % eval_every == 0

    def samples_at(step: int) -> bool:
        is_due = step in (0, total) or sample_every is not None and step % sample_every == 0
        return config.samples is not None and (is_due or watch.is_exhausted)

    def save_unsaved() -> None:
        if progress.step > first_step:  # before that, there is nothing new to save
            saver.save(progress, True)

    def call(name: str, *arguments: Any) -> None:
        if processes.is_first and call_all(options.callbacks, name, (progress.step, *arguments), save_unsaved):
            interruption.request_stop()

    def save_now(is_last: bool) -> None:
        folder = saver.save(progress, is_last)
        if folder is not None:
            call("on_save", folder)

    def save_evaluated(is_last: bool) -> bool:
        """Save an evaluated step that has no checkpoint yet; return whether it has one now, on every process."""
        folder = run.checkpoint(progress.step)
        with processes.raise_together():
            if processes.is_first and not folder.is_dir():
                save_now(is_last)
        return processes.broadcast(folder.is_dir())

    def keep_best(value: float) -> None:
        """Keep the checkpoint of this step if it is the best so far."""
        if watch.observe(progress.step, value) and save_evaluated(is_last=False):
            watch.keep(progress.step, value)
            with processes.raise_together():
                if processes.is_first:
                    saver.best = run.checkpoint(progress.step)
                    saver.save_record(replace(prepared.record, in_use=guard.in_use, best=watch.best), progress.step)

    def evaluate_now() -> None:
        evaluations = {name: evaluate_examples(assembly, examples) for name, examples in plan.datasets.held_out.items()}
        scores = assembly.scorer.score(assembly.model, assembly.tokenizer, processes)
        for name, values in scores.by_set.items():
            evaluations[name] = replace(evaluations[name], metrics=evaluations[name].metrics | values)
        log.log_evaluation(progress.step, evaluations)
        if scores.answered and processes.is_first:
            display.show_event(progress.step, scores.describe())
        for name, evaluation in evaluations.items():
            if name == MAIN_SET:
                call("on_evaluation", evaluation)
            else:
                call("on_other_evaluation", name, evaluation)
        if watch.metric is not None:
            keep_best(processes.broadcast(metric_of(evaluations, watch.metric)))

    def look(evaluates: bool, samples: bool = True) -> None:
        """Evaluate and take samples, as far as they are due at this step, and show both on the page."""
        if evaluates:
            evaluate_now()
        if samples := samples and samples_at(progress.step):
            log.log_samples(progress.step, assembly.sampler.take(assembly.model, assembly.tokenizer, processes))
        if (evaluates or samples) and processes.is_first:
            page.refresh()

    def after_step(report: StepReport) -> bool:
        log.log_step(progress, report)
        guard.note(report)
        call("on_step", report)
        is_last = progress.step == total
        # Several processes must stop after the same step, so they use what they exchanged in that step.
        stop = interruption.requested if processes.world_size == 1 else report.stop_asked
        stop = stop or progress.step == options.stop_at
        is_asked = interruption.take_save_request()
        if is_last or stop or (save_every and progress.step % save_every == 0):
            with processes.raise_together():
                save_now(is_last or stop)
        elif is_asked:  # by a signal to this process only
            save_now(False)
        # After the save, because a stop may leave no time for more; a continued run evaluates then.
        if is_last or not stop:
            look(evaluates_at(progress.step))
        if not (stop or is_last) and processes.world_size == 1 and interruption.requested:  # by a callback since
            saver.save(progress, True)
            stop = True
        if watch.is_exhausted and not is_last:
            save_evaluated(is_last=True)
        return not (stop or watch.is_exhausted)

    if watch.best is not None:
        saver.best = run.checkpoint(watch.best.step)
    with Interruption() as interruption:
        callbacks = LoopCallbacks(
            after_step=after_step,
            stop_asked=lambda: interruption.requested,
            on_nonfinite=guard.on_nonfinite,
            on_out_of_memory=guard.on_out_of_memory,
        )
        try:
            with processes.raise_together():
                saver.try_save(progress)
            look(evaluates_at(progress.step) and not is_evaluated, progress.step not in sampled)
            schedule = LoopSchedule(total, rate_of(assembly.train, total), config.max_grad_norm)
            if not watch.is_exhausted:
                run_loop(assembly.loop_parts, progress, schedule, callbacks)
        except BaseException as stop:  # such as a second Ctrl-C
            if is_out_of_memory(stop):
                raise ModelError(
                    f"Memory ran out after step {progress.step}, in an evaluation, an update or a save, where the step "
                    "can't be retried with less; free some, or lower train.micro_batch_size or data.max_seq_len. "
                    f"{how_to_continue(prepared.fresh)} {stop}"
                ) from stop
            stop.add_note(how_to_continue(prepared.fresh))
            raise
        finally:
            log.close()
    return SessionEnd(interruption.signal, guard.in_use, watch.best, watch.is_exhausted and progress.step < total)


def how_to_continue(fresh: bool) -> str:
    """Return the sentence that ends a session which did not finish its run."""
    return f"The same command{' without --fresh' if fresh else ''} continues the run from its last save."


def evaluate_examples(assembly: Assembly, examples: ExampleSet) -> Evaluation:
    """Evaluate a set of examples, each process a part of them."""
    processes = assembly.processes
    batches = eval_batches(examples, assembly.config.train.micro_batch_size, assembly.batches.capacity)
    share = islice(batches, processes.rank, None, processes.world_size)
    return evaluate(assembly.model, share, processes.sum, assembly.objective.loss)


def metric_of(evaluations: Mapping[str, Evaluation], name: str) -> float:
    """Return a metric of the evaluations, by its name in metrics.jsonl."""
    values = {
        f"{group}_{metric}": value
        for group, each in evaluations.items()
        for metric, value in {"loss": each.loss, **each.metrics}.items()
    }
    return values[name]
