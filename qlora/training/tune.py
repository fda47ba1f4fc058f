"""A short search for the learning rate with the lowest held-out loss, by successive halving."""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Never

import torch
from pydantic import ValidationError

from qlora.config import EvalSection, RunConfig, TrainSection, absolute_paths
from qlora.config.sections import parse_duration
from qlora.errors import ConfigError, ModelError, plain_message
from qlora.model import group_rates, resolve_device
from qlora.processes import Processes
from qlora.training.assemble import assemble
from qlora.training.determinism import deterministic_algorithms
from qlora.training.given import as_config
from qlora.training.loop import LoopCallbacks, LoopSchedule, NonFinite, StepReport, run_loop
from qlora.training.plan import Assembly
from qlora.training.progress import Progress
from qlora.training.schedule import rate_of, resolve_warmup
from qlora.training.session import evaluate_examples

# Factors on the config's learning rate.
FACTORS = (1 / 9, 1 / 3, 1, 3, 9)
# Each round has so many times the steps of the one before, for the better half of its rates.
ROUNDS, GROWTH = 3, 2
# Steps that are timed; the first takes longer.
TIMED_STEPS = 2


@dataclass(slots=True)
class RateTrial:
    """A learning rate that was tried.

    Attributes:
        learning_rate: Peak learning rate.
        losses: Held-out loss by number of steps.
        failure: Why it was dropped, if not for its loss: a number was not finite, or other keys don't allow the rate.
    """

    learning_rate: float
    losses: dict[int, float] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class TuneReport:
    """Learning rates, compared by held-out loss.

    Attributes:
        learning_rate: The best rate: the lowest loss of those that were trained longest.
        trials: All rates, from the lowest.
        rounds: Number of steps after which the rates were compared.
        first_loss: Held-out loss before training.
        total_steps: Number of steps of the config's run.
        step_seconds: Measured time of a step.
        notes: What a user should know about the result.
    """

    learning_rate: float
    trials: list[RateTrial]
    rounds: list[int]
    first_loss: float
    total_steps: int
    step_seconds: float
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        loss = min(trial.losses.get(self.rounds[-1], math.inf) for trial in self.trials)
        return f"<TuneReport: learning rate {self.learning_rate:g}, held-out loss {loss:.4f} at step {self.rounds[-1]}>"


@dataclass(frozen=True, slots=True)
class _State:
    """Trained parameters, optimizer and progress of a trial; tensors are on the CPU."""

    parameters: torch.Tensor
    optimizer: dict[str, torch.Tensor]
    progress: Progress

    @classmethod
    def taken_from(cls, assembly: Assembly, progress: Progress) -> "_State":
        """Return a copy of the present state."""
        optimizer = {name: value.to("cpu", copy=True) for name, value in assembly.optimizer.state_dict().items()}
        return cls(assembly.optimizer.flat.data.to("cpu", copy=True), optimizer, replace(progress))

    def restore(self, assembly: Assembly) -> Progress:
        """Put the state back, and return its progress."""
        assembly.optimizer.flat.data.copy_(self.parameters)
        assembly.optimizer.load_state_dict(self.optimizer)
        return replace(self.progress)


@dataclass(slots=True)
class _Candidate:
    """A trial that can be trained further."""

    trial: RateTrial
    section: TrainSection
    state: _State


class _NotFiniteError(Exception):
    """A loss or gradient of a trial is not finite."""


def tune(
    config: RunConfig | str | Path | Mapping[str, Any], budget: str = "10m", show_progress: bool = False
) -> TuneReport:
    """Find the learning rate with the lowest held-out loss by successive halving (arXiv:1502.07943).

    Five rates around the config's, or around the one that `auto` computes, are trained from the same start on the same
    batches. After each round, the worse half is dropped, and the others continue for as many steps as they have. The
    schedule of the run is shortened to the steps of the last round. The base is loaded once, and nothing is written.

    Args:
        config: Config that :func:`qlora.load_config` returned, or what it takes.
        budget: Time for training and evaluating, without loading: `90s`, `10m`, `2h`. It determines the number of
            steps, at most those of the run.
        show_progress: Print progress to standard error.

    Raises:
        ConfigError: The budget is no duration or too short, or the config holds out no example.
        QLoRAError: The run can't start, or no rate gave a finite loss.
    """
    try:
        seconds = parse_duration(budget)
    except (TypeError, ValueError):
        raise ConfigError(f"budget: {budget!r} should be a duration such as 90s, 10m or 2h.") from None
    config = absolute_paths(as_config(config))
    # Rates are compared at the full rank: components are removed over a whole run.
    lora = config.lora.model_copy(update={"final_rank": None})
    # They are compared by loss alone: no answers are scored, no metric's file is run, and no checkpoint is the best.
    section = config.train.model_copy(
        update={"early_stopping": None, "keep_best": False, "best_mode": None, "samples": None}
    )
    config = config.model_copy(update={"lora": lora, "train": section, "eval": EvalSection()})
    no_examples = ConfigError(
        "data.eval holds out no example, and learning rates are compared by held-out loss; set data.eval to a share "
        "such as 0.05, or to a file."
    )
    if not config.data.eval:
        raise no_examples
    processes = Processes.start(resolve_device().type == "cpu")
    try:
        if processes.world_size > 1:
            raise ConfigError(f"qlora tune needs a single process, not {processes.world_size}; start it directly.")
        with deterministic_algorithms(config.train.deterministic):
            assembly = assemble(config, processes)
            if not len(assembly.plan.datasets.eval):
                raise no_examples
            return _search(assembly, seconds, show_progress)
    finally:
        processes.end()


def _search(assembly: Assembly, budget: float, is_shown: bool) -> TuneReport:
    """Train all rates, and the better half of them further, until the last round."""
    start = _State.taken_from(assembly, Progress())
    first_loss, step_seconds, evaluation_seconds = _measure(assembly)
    total_steps = assembly.plan.total_steps
    trials = [RateTrial(float(f"{assembly.train.peak * factor:.3g}")) for factor in FACTORS]
    candidates = _make_candidates(assembly, trials, start)
    rounds = plan_rounds(len(candidates), budget, step_seconds, evaluation_seconds, total_steps)
    for steps in rounds:
        for candidate in candidates:
            _train(assembly, candidate, steps, rounds[-1])
            if is_shown:
                print(_describe(candidate.trial, steps, rounds[-1]), file=sys.stderr)
        num_kept = math.ceil(len(candidates) / 2)
        finite = [each for each in candidates if each.trial.failure is None]
        if not finite:
            raise ModelError(f"No learning rate has a finite loss. {' '.join(_failures(trials))}")
        candidates = sorted(finite, key=lambda each: each.trial.losses[steps])[:num_kept]
    best = candidates[0].trial
    return TuneReport(
        learning_rate=best.learning_rate,
        trials=trials,
        rounds=rounds,
        first_loss=first_loss,
        total_steps=total_steps,
        step_seconds=step_seconds,
        notes=[*_failures(trials), *_notes(best, trials, first_loss, rounds[-1], total_steps)],
    )


def plan_rounds(
    num_rates: int, budget: float, step_seconds: float, evaluation_seconds: float, total_steps: int
) -> list[int]:
    """Return the numbers of steps after which rates are compared: as many as the budget allows.

    Args:
        num_rates: Number of rates in the first round; later rounds have half of those before them, rounded up.
        budget: Time for training and evaluating, in seconds.
        step_seconds: Time of a step.
        evaluation_seconds: Time of an evaluation.
        total_steps: Largest number of steps.

    Raises:
        ConfigError: The budget is too short for a step of each rate.
    """
    counts = [num_rates]
    while len(counts) < ROUNDS:
        counts.append(math.ceil(counts[-1] / 2))
    # Steps of all rounds together, if the first has one.
    units = sum(count * (GROWTH**place - (GROWTH ** (place - 1) if place else 0)) for place, count in enumerate(counts))
    evaluations = sum(counts) * evaluation_seconds
    first = int((budget - evaluations) / (units * step_seconds))
    if first < 1:
        needed = math.ceil(units * step_seconds + evaluations)
        raise ConfigError(
            f"budget: {budget:g}s is too short: a step takes {step_seconds:.2g} s and an evaluation "
            f"{evaluation_seconds:.2g} s, so {needed}s is the least. Raise it, or hold out fewer rows."
        )
    first = min(first, max(1, total_steps // GROWTH ** (ROUNDS - 1)))
    return sorted({min(first * GROWTH**place, total_steps) for place in range(ROUNDS)})


def _make_candidates(assembly: Assembly, trials: list[RateTrial], start: _State) -> list[_Candidate]:
    """Return the trials whose rate the other keys allow; the others fail."""
    section, total_steps = assembly.train, assembly.plan.total_steps
    warmup_ratio = min(resolve_warmup(section, total_steps) / total_steps, 0.99)
    section = section.model_copy(update={"warmup_steps": None, "warmup_ratio": warmup_ratio})
    candidates = []
    for trial in trials:
        floor = min(section.min_learning_rate, trial.learning_rate)
        try:
            own = section.model_copy(update={"min_learning_rate": floor}).with_learning_rate(trial.learning_rate)
        except ValidationError as error:
            trial.failure = "; ".join(f"train.{each['loc'][0]} {plain_message(each['msg'])}" for each in error.errors())
        else:
            candidates.append(_Candidate(trial, own, start))
    return candidates


def _measure(assembly: Assembly) -> tuple[float, float, float]:
    """Return the held-out loss before training, and the seconds of a step and of an evaluation.

    Raises:
        ModelError: The loss is not finite.
    """
    started = time.perf_counter()
    loss = evaluate_examples(assembly, assembly.plan.datasets.eval).loss
    evaluation_seconds = time.perf_counter() - started
    if not math.isfinite(loss):
        raise ModelError(f"The held-out loss is {loss} before training; qlora eval evaluates the base alone.")
    seconds: list[float] = []

    def after_step(report: StepReport) -> bool:
        seconds.append(report.seconds)
        return len(seconds) < TIMED_STEPS

    # One step more than is run: a run whose steps all overflowed in fp16 would end with an error.
    schedule = LoopSchedule(TIMED_STEPS + 1, rate_of(assembly.train, TIMED_STEPS), assembly.train.max_grad_norm)
    # A step that is not finite is skipped here, and takes as long.
    run_loop(assembly.loop_parts, Progress(), schedule, LoopCallbacks(after_step, on_nonfinite=lambda _: None))
    return loss, seconds[-1], evaluation_seconds


def _train(assembly: Assembly, candidate: _Candidate, steps: int, last_step: int) -> None:
    """Continue a trial up to a step of a schedule, and evaluate it."""
    trial, section = candidate.trial, candidate.section
    progress = candidate.state.restore(assembly)
    assembly.optimizer.flat.set_rates(group_rates(section))
    schedule = LoopSchedule(last_step, rate_of(section, last_step), section.max_grad_norm)
    callbacks = LoopCallbacks(after_step=lambda _: progress.step < steps, on_nonfinite=_refuse)
    try:
        run_loop(assembly.loop_parts, progress, schedule, callbacks)
    except _NotFiniteError as problem:
        trial.failure = str(problem)
        return
    loss = evaluate_examples(assembly, assembly.plan.datasets.eval).loss
    if not math.isfinite(loss):
        trial.failure = f"the held-out loss is {loss} after {steps} steps"
        return
    trial.losses[steps] = loss
    candidate.state = _State.taken_from(assembly, progress)


def _refuse(found: NonFinite) -> Never:
    raise _NotFiniteError(f"step {found.step + 1}: the loss is {found.loss}, the gradient's norm {found.grad_norm}")


def _describe(trial: RateTrial, steps: int, last_step: int) -> str:
    result = f"held-out loss {trial.losses[steps]:.4f}" if trial.failure is None else trial.failure
    return f"step {steps}/{last_step}  learning rate {trial.learning_rate:g}  {result}"


def _failures(trials: list[RateTrial]) -> list[str]:
    return [f"Learning rate {trial.learning_rate:g} failed: {trial.failure}." for trial in trials if trial.failure]


def _notes(best: RateTrial, trials: list[RateTrial], first_loss: float, last_step: int, total_steps: int) -> list[str]:
    notes = []
    if last_step < total_steps:
        notes.append(
            f"The rates were compared after {last_step:,} of the run's {total_steps:,} steps. The best rate of the "
            "whole run may differ; a larger budget compares them for longer."
        )
    rates = [trial.learning_rate for trial in trials if trial.losses]
    if best.learning_rate in (min(rates), max(rates)) and len(rates) > 1:
        place = "lowest" if best.learning_rate == min(rates) else "highest"
        notes.append(
            f"{best.learning_rate:g} is the {place} rate that was tried; tune again around it with "
            f"train.learning_rate={best.learning_rate:g}."
        )
    if best.losses[last_step] >= first_loss:
        notes.append(f"No rate lowered the held-out loss, which is {first_loss:.4f} before training.")
    return notes
