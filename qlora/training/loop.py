"""The training loop."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora.data import BatchPlan, TokenizedExample, collate
from qlora.errors import ModelError
from qlora.lora import lora_layers
from qlora.model import supervised_loss
from qlora.optim import FlatAdamW

# Steps without an overflow after which a larger loss scale is tried.
SCALE_GROWTH_STEPS = 2000


@dataclass(slots=True)
class Progress:
    """How far a run is; all that a continued loop starts from.

    Attributes:
        step: Optimizer steps done.
        tokens: Trained on so far, over all processes.
        supervised_tokens: Of those, the ones with a loss.
        loss_scale: Factor on the loss, which keeps small fp16 gradients from vanishing; of no effect elsewhere.
        steps_at_scale: Without an overflow since it last changed.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    loss_scale: float = 2.0**16
    steps_at_scale: int = 0

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
    """

    loss: float
    grad_norm: float
    learning_rate: float
    zero_update_share: float | None
    seconds: float
    tokens: int
    stop_asked: bool


def run_loop(
    model: Any,
    optimizer: FlatAdamW,
    examples: Sequence[TokenizedExample],
    plan: BatchPlan,
    accelerator: Any,
    progress: Progress,
    total_steps: int,
    learning_rate: Callable[[int], float],
    max_grad_norm: float | None,
    after_step: Callable[[StepReport], bool],
    stop_asked: Callable[[], bool] = lambda: False,
) -> None:
    """Trains from `progress` on until `total_steps`, or until `after_step` returns False.

    Every step's gradient is the sum over its micro-batches and processes, divided by the weight of the supervised
    tokens of the whole window: how a window is cut into micro-batches or spread over processes makes no difference.
    The host waits for the device once a step, between the gradient and its use.

    Args:
        model: With adapters, in training mode, on the accelerator's device.
        optimizer: Over the adapters' flat buffer.
        examples: All of them, on every process.
        plan: Which of them a step takes.
        accelerator: Of accelerate; used for its processes.
        progress: Changed in place.
        total_steps: Of the run.
        learning_rate: Of a step, from 0.
        max_grad_norm: Gradients are clipped to it, if given.
        after_step: Called with what the step did; logs, evaluates, saves, and says whether to go on, the same on
            every process.
        stop_asked: Whether this process wants to stop; what any of them says is in the step's report.

    Raises:
        ModelError: The loss is not finite, or an adapter got no gradient in the first step.
    """
    flat, device = optimizer.flat, accelerator.device
    is_scaled = next(model.base_model.parameters()).dtype == torch.float16
    first_step = True
    while progress.step < total_steps:
        started, step = time.perf_counter(), progress.step
        window = [examples[index] for index in plan.window(step)]
        total_weight = sum(example.total_weight for example in window)
        # Dropout follows from seed, step and process, so that a resumed run draws the same.
        torch.manual_seed(hash((plan.seed, step, plan.rank)))
        flat.zero_grad()
        scale = progress.loss_scale if is_scaled else 1.0
        # The loss, and how many processes want to stop.
        sums = torch.zeros(2, device=device)
        for indices in plan.micro_batches(step):
            batch = collate([examples[index] for index in indices], packed=plan.capacity is not None).to(device)
            micro_loss = supervised_loss(model, batch) / total_weight
            (micro_loss * scale).backward()
            sums[0] += micro_loss.detach()
        sums[1] += stop_asked()
        if accelerator.num_processes > 1:
            flat.grad.copy_(accelerator.reduce(flat.grad, reduction="sum"))
            sums = accelerator.reduce(sums, reduction="sum")
        if is_scaled:
            flat.grad.div_(scale)
        norm = flat.clip_grad_norm(max_grad_norm)
        loss, stops, norm_value, share = torch.stack([*sums, norm, optimizer.zero_update_share]).tolist()
        is_first_update = optimizer.step_count == 0
        # An overflow of scaled fp16 gradients skips the step and lowers the scale, until that can't help any more.
        overflowed = is_scaled and scale >= 1 and not math.isfinite(norm_value)
        _check_finite(step, loss, norm_value, overflowed)
        if first_step and not overflowed:
            check_gradients(model)
            first_step = False
        rate = learning_rate(step)
        if not overflowed:
            optimizer.step(rate)
        if is_scaled:
            progress.adapt_loss_scale(overflowed)

        progress.step += 1
        progress.tokens += sum(map(len, window))
        progress.supervised_tokens += sum(example.num_supervised for example in window)
        seconds = time.perf_counter() - started
        last_share = None if is_first_update else share
        report = StepReport(loss, norm_value, rate, last_share, seconds, sum(map(len, window)), stops > 0)
        if not after_step(report):
            return
    if optimizer.step_count == 0:
        raise ModelError(
            "The fp16 gradients of every step overflowed, so nothing was learnt; set model.compute_dtype to bfloat16 "
            "or float32."
        )


def check_gradients(model: Any) -> None:
    """Sees that the gradient reaches every adapter.

    Raises:
        ModelError: Some B has none; the layers are named.
    """
    layers = dict(lora_layers(model))
    norms = torch.stack([_grad_norm(layer.lora_B) for layer in layers.values()]).tolist()
    dead = [name for name, norm in zip(layers, norms, strict=True) if norm == 0]
    if dead:
        raise ModelError(
            f"No gradient reached {len(dead)} of {len(layers)} adapters in the first step: {', '.join(dead[:4])}. "
            "Layers that the forward pass never uses can't be trained; leave them out of lora.targets."
        )


def _grad_norm(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.norm()


def _check_finite(step: int, loss: float, norm: float, overflowed: bool) -> None:
    if not math.isfinite(loss) or not (math.isfinite(norm) or overflowed):
        raise ModelError(
            f"Step {step + 1}: the loss is {loss} and the gradient's norm {norm}. Nothing was updated; lower "
            "train.learning_rate, or set model.compute_dtype to bfloat16 or float32 if it is float16."
        )
