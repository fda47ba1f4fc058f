"""The training loop."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Never

import torch

from qlora.data import Batch, BatchPlan, TokenizedExample, collate
from qlora.errors import CheckpointError, ModelError
from qlora.lora import WeightsKept, lora_layers
from qlora.model import supervised_loss
from qlora.optim import FlatOptimizer
from qlora.processes import Processes

# Steps without an overflow after which a larger loss scale is tried.
SCALE_GROWTH_STEPS = 2000
# The watch over the loss: steps that it looks on for before it tells anything, the share of its memory that a step
# replaces, and how far above the usual a loss is told, in usual distances and as a share of the usual loss.
WATCH_AFTER, WATCH_RATE, WATCH_DISTANCES, WATCH_SHARE = 20, 0.03, 6, 0.1


@dataclass(slots=True)
class Progress:
    """How far a run is; all that a continued loop starts from.

    Attributes:
        step: Optimizer steps done.
        tokens: Trained on so far, over all processes.
        supervised_tokens: Of those, the ones with a loss.
        loss_scale: Factor on the loss, which keeps small fp16 gradients from vanishing; of no effect elsewhere.
        steps_at_scale: Without an overflow since it last changed.
        skipped: Steps that were left out, as their numbers were not finite.
        num_parts: That every micro-batch is cut into, since memory ran out.
        usual_loss: Running mean of the losses; None before the first.
        usual_distance: Running mean of how far a loss is from it.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    loss_scale: float = 2.0**16
    steps_at_scale: int = 0
    skipped: int = 0
    num_parts: int = 1
    usual_loss: float | None = None
    usual_distance: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Whether a step's loss is far above those of the steps before, which it then counts among.

        A spike counts as the highest loss that is none, so that it does not hide the next.
        """
        if self.usual_loss is None:
            self.usual_loss = loss
        margin = max(WATCH_DISTANCES * self.usual_distance, WATCH_SHARE * abs(self.usual_loss))
        spike = self.step >= WATCH_AFTER and loss > self.usual_loss + margin
        distance = min(loss - self.usual_loss, margin) if spike else loss - self.usual_loss
        self.usual_distance += WATCH_RATE * (abs(distance) - self.usual_distance)
        self.usual_loss += WATCH_RATE * distance
        return spike

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "Progress":
        """What was saved of one.

        Raises:
            CheckpointError: The values are not those of a progress.
        """
        kinds = {field.name: field.type for field in fields(cls)}

        def can_be(name: str, value: Any) -> bool:
            if kinds[name] is int:
                return type(value) is int and value >= (name == "num_parts")
            if value is None:
                return name == "usual_loss"
            return type(value) in (int, float) and math.isfinite(value) and (value > 0 or name != "loss_scale")

        if values.keys() != kinds.keys() or not all(can_be(name, value) for name, value in values.items()):
            raise CheckpointError(f"The checkpoint's progress should be numbers of {', '.join(kinds)}, not {values}.")
        return cls(**values)

    def adapt_loss_scale(self, overflowed: bool) -> None:
        """Halves the scale after gradients that overflowed, and tries the double after many that did not."""
        self.steps_at_scale = 0 if overflowed else self.steps_at_scale + 1
        if overflowed:
            self.loss_scale /= 2
        elif self.steps_at_scale == SCALE_GROWTH_STEPS:
            self.loss_scale, self.steps_at_scale = 2 * self.loss_scale, 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step.

    Attributes:
        loss: Mean over the window's supervised tokens, before the update.
        grad_norm: Before clipping.
        zero_update_share: Of the trained elements with a gradient, those whose stored value the update before this
            step left the same: read with this step's loss, so that the host waits once. None before the first.
        seconds: That the step took.
        tokens: Of the step, over all processes.
        stop_asked: Whether any process wanted to stop when its gradient was ready.
        dead_adapters: That got no gradient.
        spike_above: The usual loss, if this one is far above it.
        was_skipped: Nothing was updated, as loss or gradient were not finite.
        examples: Indices of the step's, over all processes.
    """

    loss: float
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


@dataclass(frozen=True, slots=True)
class NonFinite:
    """A step whose loss or gradient is not finite.

    Attributes:
        step: From 0.
        loss: Of the window.
        grad_norm: Before clipping.
        suspects: Indices of the examples whose own losses are not finite; of all if only the gradient is not.
    """

    step: int
    loss: float
    grad_norm: float
    suspects: list[int]

    @property
    def message(self) -> str:
        """What a user is told."""
        return (
            f"Step {self.step + 1}: the loss is {self.loss} and the gradient's norm {self.grad_norm}. Nothing was "
            "updated; lower train.learning_rate, or set model.compute_dtype to bfloat16 or float32 if it is float16."
        )


def refuse_nonfinite(found: NonFinite) -> Never:
    """Ends a run at the first step whose numbers are not finite."""
    raise ModelError(found.message)


def refuse_out_of_memory(step: int) -> Never:
    """Ends a run that memory is too small for."""
    raise ModelError(f"Step {step + 1}: memory ran out; lower train.micro_batch_size or data.max_seq_len.")


def run_loop(
    model: Any,
    optimizer: FlatOptimizer,
    examples: Sequence[TokenizedExample],
    plan: BatchPlan,
    processes: Processes,
    progress: Progress,
    total_steps: int,
    learning_rate: Callable[[int], float],
    max_grad_norm: float | None,
    after_step: Callable[[StepReport], bool],
    stop_asked: Callable[[], bool] = lambda: False,
    on_nonfinite: Callable[[NonFinite], None] = refuse_nonfinite,
    on_out_of_memory: Callable[[int], None] = refuse_out_of_memory,
) -> None:
    """Trains from `progress` on until `total_steps`, or until `after_step` returns False.

    Every step's gradient is the sum over its micro-batches and processes, divided by the weight of the supervised
    tokens of the whole window: how a window is cut into micro-batches or spread over processes makes no difference.
    The host waits for the device once a step, between the gradient and its use. A step that memory runs out in
    changes nothing, and is repeated once something was given up.

    Args:
        model: With adapters, in training mode, on the processes' device.
        optimizer: Over the adapters' flat buffer.
        examples: All of them, on every process.
        plan: Which of them a step takes.
        processes: That share each window.
        progress: Changed in place.
        total_steps: Of the run.
        learning_rate: Of a step, from 0.
        max_grad_norm: Gradients are clipped to it, if given.
        after_step: Called with what the step did; logs, evaluates, saves, and says whether to go on, the same on
            every process.
        stop_asked: Whether this process wants to stop; what any of them says is in the step's report.
        on_nonfinite: Called on every process with a step whose numbers are not finite; raises, or the step is skipped.
        on_out_of_memory: Called on every process with a step, from 0, that memory ran out in on any of them; raises,
            or gives up what takes memory.

    Raises:
        ModelError: An adapter got no gradient in the first step, or a callback gave up.
    """
    flat = optimizer.flat
    is_scaled = next(model.base_model.parameters()).dtype == torch.float16
    first_step = True
    while progress.step < total_steps:
        started, step = time.perf_counter(), progress.step
        window = [examples[index] for index in plan.window(step)]
        total_weight = sum(example.total_weight for example in window)
        seed_step(plan.seed, step, plan.rank)
        flat.zero_grad()
        scale = progress.loss_scale if is_scaled else 1.0
        micro_batches = plan.micro_batches(step, progress.num_parts)
        losses: list[torch.Tensor] = []
        batches = (collate([examples[index] for index in each], plan.capacity is not None) for each in micro_batches)
        ran_out = not _accumulate(model, batches, total_weight, scale, losses)
        loss_sum = sum(losses, torch.zeros((), device=processes.device))
        sums = torch.stack([loss_sum, *(torch.full_like(loss_sum, asked) for asked in (stop_asked(), ran_out))])
        if processes.world_size > 1:
            flat.grad.copy_(processes.sum(flat.grad))
            sums = processes.sum(sums)
        if is_scaled:
            flat.grad.div_(scale)
        num_dead = torch.count_nonzero(_gradient_norms(model) == 0)
        norm = flat.clip_grad_norm(max_grad_norm)
        read = torch.stack([*sums, norm, optimizer.zero_update_share, num_dead]).tolist()
        loss, stops, out_of_memory, norm_value, share, dead = read
        if out_of_memory:
            on_out_of_memory(step)
            continue
        is_first_update = optimizer.step_count == 0
        is_finite = math.isfinite(loss) and math.isfinite(norm_value)
        # An overflow of scaled fp16 gradients skips the step and lowers the scale, until that can't help any more.
        overflowed = is_scaled and scale >= 1 and math.isfinite(loss) and not is_finite
        was_skipped = not (is_finite or overflowed)
        if was_skipped:
            suspects = _suspects(losses, micro_batches, processes) or plan.window(step)
            on_nonfinite(NonFinite(step, loss, norm_value, suspects))
            progress.skipped += 1
        if first_step and is_finite:
            check_gradients(model)
            first_step = False
        rate = learning_rate(step)
        usual = progress.usual_loss
        spiked = is_finite and progress.is_spike(loss)
        if is_finite:
            optimizer.step(rate)
        if is_scaled:
            progress.adapt_loss_scale(not is_finite)

        progress.step += 1
        progress.tokens += sum(map(len, window))
        progress.supervised_tokens += sum(example.num_supervised for example in window)
        seconds = time.perf_counter() - started
        last_share = None if is_first_update else share
        report = StepReport(
            loss, norm_value, rate, last_share, seconds, sum(map(len, window)), stops > 0, int(dead),
            usual if spiked else None, was_skipped, plan.window(step),
        )  # fmt: skip
        if not after_step(report):
            return
    if optimizer.step_count == 0 and is_scaled:
        raise ModelError(
            "The fp16 gradients of every step overflowed, so nothing was learnt; set model.compute_dtype to bfloat16 "
            "or float32."
        )


def seed_step(seed: int, step: int, process: int) -> None:
    """Has dropout follow from seed, step and process, so that a resumed run draws the same."""
    torch.manual_seed(hash((seed, step, process)))


def check_gradients(model: Any) -> None:
    """Sees that the gradient reaches every adapter.

    Raises:
        ModelError: Some B has none; the layers are named.
    """
    layers = dict(lora_layers(model))
    norms = _gradient_norms(model).tolist()
    dead = [name for name, norm in zip(layers, norms, strict=True) if norm == 0]
    if dead:
        raise ModelError(
            f"No gradient reached {len(dead)} of {len(layers)} adapters in the first step: {', '.join(dead[:4])}. "
            "Layers that the forward pass never uses can't be trained; leave them out of lora.targets."
        )


def _accumulate(
    model: Any, batches: Iterable[Batch], total_weight: float, scale: float, losses: list[torch.Tensor]
) -> bool:
    """Adds the gradients of micro-batches up, and keeps their losses; False if memory ran out."""
    try:
        for batch in batches:
            loss = supervised_loss(model, batch.to(model.device)) / total_weight
            (loss * scale).backward()
            losses.append(loss.detach())
    except torch.OutOfMemoryError:
        # What the backward was to take from them; the tensors of the forward go with its frames.
        WeightsKept.clear()
        return False
    return True


def _gradient_norms(model: Any) -> torch.Tensor:
    """(adapters,): of each B; those of A are zero in the first step."""
    grads = [grad for _, layer in lora_layers(model) if (grad := layer.lora_B.grad) is not None]
    return torch.stack(torch._foreach_norm(grads))


def _suspects(losses: list[torch.Tensor], micro_batches: list[list[int]], processes: Processes) -> list[int]:
    """Examples of the micro-batches, on any process, whose losses are not finite."""
    own = [
        index
        for loss, indices in zip(losses, micro_batches, strict=True)
        if not math.isfinite(loss.item())
        for index in indices
    ]
    return [index for indices in processes.gather(own) for index in indices]
