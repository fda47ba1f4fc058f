"""The training loop."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Never

import torch

from qlora.data import Batch, BatchPlan, TokenizedExample, collate
from qlora.errors import ModelError
from qlora.layers.placement import uneven_passes
from qlora.lora import RankBudget, RecomputedWeights, lora_experts, lora_layers
from qlora.model import Loss
from qlora.model.reached import refuse_unreached
from qlora.optim import FlatOptimizer
from qlora.out_of_memory import is_out_of_memory
from qlora.processes import Processes
from qlora.training.progress import Progress
from qlora.training.seeds import document_seeds, seed_step


@dataclass(frozen=True, slots=True)
class LoopParts:
    """Parts of a run that every step uses.

    Attributes:
        model: Model with adapters, in training mode, on the processes' device.
        optimizer: Optimizer over the adapters' flat buffer.
        loss: Loss that is minimized.
        examples: All examples, on every process.
        batches: Plan of the examples of each step.
        processes: Processes that share each step.
        ranks: Budget of the adapters' components, if it shrinks.
    """

    model: Any
    optimizer: FlatOptimizer
    loss: Loss
    examples: Sequence[TokenizedExample]
    batches: BatchPlan
    processes: Processes
    ranks: RankBudget | None = None


@dataclass(frozen=True, slots=True)
class LoopSchedule:
    """How long and how fast to train.

    Attributes:
        total_steps: Number of optimizer steps of the run.
        learning_rate: Returns the learning rate of a step, from 0.
        max_grad_norm: Norm that gradients are clipped to; None for no clipping.
    """

    total_steps: int
    learning_rate: Callable[[int], float]
    max_grad_norm: float | None


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step.

    Attributes:
        loss: Mean over the step's units, before the update.
        metrics: Mean of each of the loss's metrics over the same units.
        grad_norm: Norm of the gradient before clipping.
        learning_rate: Learning rate of the update.
        zero_update_share: Share of the trained elements with a gradient whose stored value the previous update did not
            change. It is read with this step's loss, so that the host waits once. None before the first update.
        seconds: Duration of the step.
        tokens: Number of tokens, over all processes.
        stop_asked: Whether any process wanted to stop when its gradient was ready.
        dead_adapters: Number of adapters that got no gradient.
        spike_above: The usual loss, if this loss is far above it.
        was_skipped: Whether nothing was updated, because loss or gradient were not finite.
        examples: Indices of the examples, over all processes.
        mean_rank: Mean rank after the update, if it shrinks.
    """

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float
    zero_update_share: float | None
    seconds: float
    tokens: int
    stop_asked: bool
    dead_adapters: int
    spike_above: float | None
    was_skipped: bool
    examples: list[int]
    mean_rank: float | None


@dataclass(frozen=True, slots=True)
class NonFinite:
    """A step whose loss or gradient is not finite.

    Attributes:
        step: Number of the step, from 0.
        loss: Mean loss of the step.
        grad_norm: Norm of the gradient before clipping.
        suspects: Indices of the examples of micro-batches whose loss is not finite; of all examples if only the
            gradient is not.
    """

    step: int
    loss: float
    grad_norm: float
    suspects: list[int]

    @property
    def message(self) -> str:
        """Message for the user: what happened, and what to do."""
        return (
            f"Step {self.step + 1}: the loss is {self.loss} and the gradient's norm {self.grad_norm}. Nothing was "
            "updated; lower train.learning_rate, or set model.compute_dtype to bfloat16 or float32 if it is float16."
        )


def refuse_nonfinite(found: NonFinite) -> Never:
    """End a run at the first step whose numbers are not finite."""
    raise ModelError(found.message)


def refuse_out_of_memory(step: int) -> Never:
    """End a run that has too little memory."""
    raise ModelError(f"Step {step + 1}: memory ran out; lower train.micro_batch_size or data.max_seq_len.")


@dataclass(frozen=True, slots=True)
class LoopCallbacks:
    """Functions that the loop calls.

    Attributes:
        after_step: Called after every step; logs, evaluates and saves. Returns whether to continue, the same on
            every process.
        stop_asked: Returns whether this process wants to stop; the step's report says on every process whether any
            of them does.
        on_nonfinite: Called on every process with a step whose numbers are not finite; raises, or the step is skipped.
        on_out_of_memory: Called on every process with a step, from 0, if memory ran out on any of them; raises, or
            frees memory so that the step is retried.
    """

    after_step: Callable[[StepReport], bool]
    stop_asked: Callable[[], bool] = lambda: False
    on_nonfinite: Callable[[NonFinite], None] = refuse_nonfinite
    on_out_of_memory: Callable[[int], None] = refuse_out_of_memory


def run_loop(parts: LoopParts, progress: Progress, schedule: LoopSchedule, callbacks: LoopCallbacks) -> None:
    """Train from `progress` until the last step, or until `after_step` returns False.

    A step's gradient is the sum over its micro-batches and processes, divided by the units of the whole window: it
    does not depend on how the window is split into micro-batches or over processes. The host waits for the device once
    a step, between the gradient and its use. A step in which memory ran out changes nothing, and is retried once
    memory was freed.

    Args:
        parts: Parts of the run.
        progress: Where to start; changed in place.
        schedule: How long and how fast to train.
        callbacks: Functions that are called during and after a step.

    Raises:
        ModelError: An adapter got no gradient in the first step, or a callback raised it.
    """
    model, optimizer, loss, plan, processes = parts.model, parts.optimizer, parts.loss, parts.batches, parts.processes
    flat, ranks = optimizer.flat, parts.ranks
    is_scaled = next(model.base_model.parameters()).dtype == torch.float16
    first_step = True
    while progress.step < schedule.total_steps:
        started, step = time.perf_counter(), progress.step
        window = [parts.examples[index] for index in plan.window(step)]
        num_units = sum(map(loss.units, window))
        seed_step(plan.seed, step, plan.rank)
        flat.zero_grad()
        scale = progress.loss_scale if is_scaled else 1.0
        micro_batches = plan.micro_batches(step, progress.num_parts)
        own: list[torch.Tensor] = []
        batches = partial(_batches, parts, step, micro_batches)
        ahead, has_fit = _look_ahead(parts, batches(), num_units)
        # Others may go on, for which this process has to be there.
        ran_out = not (_accumulate(parts, batches(ahead) if has_fit else (), num_units, scale, own) and has_fit)
        sums = sum(own, torch.zeros(1 + len(loss.metrics), device=processes.device))
        sums = torch.stack([*sums, *(torch.full_like(sums[0], flag) for flag in (callbacks.stop_asked(), ran_out))])
        if processes.world_size > 1:
            flat.grad.copy_(processes.sum(flat.grad))
            sums = processes.sum(sums)
        if is_scaled:
            flat.grad.div_(scale)
        num_dead = torch.count_nonzero(_gradient_norms(model) == 0)
        norm = flat.clip_grad_norm(schedule.max_grad_norm)
        read = torch.stack([*sums, norm, optimizer.zero_update_share, num_dead]).tolist()
        mean, *metrics, stops, out_of_memory, norm_value, share, dead = read
        if out_of_memory:
            callbacks.on_out_of_memory(step)
            continue
        is_first_update = optimizer.step_count == 0
        is_finite = math.isfinite(mean) and math.isfinite(norm_value)
        # An overflow of scaled fp16 gradients skips the step and lowers the scale, until a lower scale can't help.
        overflowed = is_scaled and scale >= 1 and math.isfinite(mean) and not is_finite
        was_skipped = not (is_finite or overflowed)
        if was_skipped:
            suspects = _suspects(own, micro_batches, processes) or plan.window(step)
            callbacks.on_nonfinite(NonFinite(step, mean, norm_value, suspects))
            progress.skipped += 1
        if first_step and is_finite:
            check_gradients(model)
            first_step = False
        rate = schedule.learning_rate(step)
        usual = progress.usual_loss
        spiked = is_finite and progress.is_spike(mean)
        if is_finite:
            if ranks is not None:
                ranks.observe()
            optimizer.step(rate)
            if ranks is not None:
                ranks.prune(step)
        if is_scaled:
            progress.adapt_loss_scale(not is_finite)

        progress.step += 1
        progress.tokens += sum(map(len, window))
        progress.supervised_tokens += sum(example.num_supervised for example in window)
        report = StepReport(
            loss=mean,
            metrics=dict(zip(loss.metrics, metrics, strict=True)),
            grad_norm=norm_value,
            learning_rate=rate,
            zero_update_share=None if is_first_update else share,
            seconds=time.perf_counter() - started,
            tokens=sum(map(len, window)),
            stop_asked=stops > 0,
            dead_adapters=int(dead),
            spike_above=usual if spiked else None,
            was_skipped=was_skipped,
            examples=plan.window(step),
            mean_rank=None if ranks is None else ranks.mean_rank,
        )
        if not callbacks.after_step(report):
            return
    if optimizer.step_count == 0 and is_scaled:
        raise ModelError(
            "The fp16 gradients of every step overflowed, so nothing was trained; set model.compute_dtype to bfloat16 "
            "or float32."
        )


def check_gradients(model: Any) -> None:
    """Check that the gradient reaches every adapter.

    Raises:
        ModelError: The B of some layers has no gradient.
    """
    layers = [name for adapters in (lora_layers(model), lora_experts(model)) for name, _ in adapters]
    norms = _gradient_norms(model).tolist()
    refuse_unreached([name for name, norm in zip(layers, norms, strict=True) if norm == 0], layers)


def _batches(
    parts: LoopParts, step: int, micro_batches: Sequence[Sequence[int]], ahead: torch.Tensor | None = None
) -> Iterator[Batch]:
    """Yield the micro-batches of a step, with the means of the look-ahead pass, if the loss has one."""
    plan = parts.batches
    for indices in micro_batches:
        documents = [parts.examples[index] for index in indices]
        batch = collate(documents, plan.capacity is not None, document_seeds(plan.seed, step, indices))
        yield batch if ahead is None else replace(batch, ahead=ahead)


def _look_ahead(parts: LoopParts, batches: Iterable[Batch], num_units: float) -> tuple[torch.Tensor | None, bool]:
    """Return what a step's loss needs of all its micro-batches and processes, and whether memory sufficed."""
    loss = parts.loss
    if loss.ahead is None:
        return None, True
    total, has_fit = torch.zeros(loss.num_ahead, device=parts.processes.device), True
    try:
        with uneven_passes(parts.model, is_retried=True):
            for batch in batches:
                total += loss.ahead(parts.model, batch.to(parts.model.device))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        has_fit = False
    return parts.processes.sum(total) / num_units, has_fit


def _accumulate(
    parts: LoopParts, batches: Iterable[Batch], num_units: float, scale: float, sums: list[torch.Tensor]
) -> bool:
    """Add the gradients of micro-batches, and append loss and metrics of each; return False if memory ran out."""
    try:
        with uneven_passes(parts.model, is_retried=True):
            for batch in batches:
                sums.append(_train_on(parts, batch, num_units, scale))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The backward, which was aborted, would have taken these; the forward's tensors are freed with its frames.
        RecomputedWeights.clear()
        return False
    return True


def _train_on(parts: LoopParts, batch: Batch, num_units: float, scale: float) -> torch.Tensor:
    """Add the gradients of a micro-batch, and return its loss and metrics; no other frame holds its graph."""
    passes = []
    for computed in parts.loss.training_passes(parts.model, batch.to(parts.model.device)):
        (computed.total / num_units * scale).backward()
        passes.append(parts.loss.sums(computed))
    return torch.stack(passes).sum(0) / num_units


def _gradient_norms(model: Any) -> torch.Tensor:
    """Return the norm of each adapter's gradient, (adapters,): B's, because those of A are zero in the first step."""
    trained = [layer.first_trained for _, layer in lora_layers(model)]
    trained += [layer.lora_B for _, layer in lora_experts(model)]  # of all experts, some of which have tokens
    return torch.stack(torch._foreach_norm([each.grad for each in trained if each.grad is not None]))


def _suspects(sums: list[torch.Tensor], micro_batches: list[list[int]], processes: Processes) -> list[int]:
    """Return the examples of the micro-batches, on any process, whose losses are not finite."""
    own = [
        index
        for (loss, *_), indices in zip(sums, micro_batches, strict=True)
        if not math.isfinite(loss.item())
        for index in indices
    ]
    return [index for indices in processes.gather(own) for index in indices]
