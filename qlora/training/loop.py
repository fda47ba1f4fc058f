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


@dataclass(slots=True)
class Progress:
    """How far a run is; all that a continued loop starts from.

    Attributes:
        step: Optimizer steps done.
        tokens: Trained on so far, over all processes.
        supervised_tokens: Of those, the ones with a loss.
        loss_scale: State of the fp16 loss scaling; empty elsewhere.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    loss_scale: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step.

    Attributes:
        loss: Mean over the window's supervised tokens, before the update.
        grad_norm: Before clipping.
        zero_update_share: Of the trained elements with a gradient, those whose stored value stayed the same.
        seconds: That the step took.
        tokens: Of the step, over all processes.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    zero_update_share: float
    seconds: float
    tokens: int


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
) -> None:
    """Trains from `progress` on until `total_steps`, or until `after_step` returns False.

    Every step's gradient is the sum over its micro-batches and processes, divided by the weight of the supervised
    tokens of the whole window: how a window is cut into micro-batches or spread over processes makes no difference.

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
        after_step: Called with what the step did; logs, evaluates, saves, and says whether to go on.

    Raises:
        ModelError: The loss is not finite, or an adapter got no gradient in the first step.
    """
    flat, device = optimizer.flat, accelerator.device
    scaler: Any = torch.amp.GradScaler(device.type, enabled=next(model.base_model.parameters()).dtype == torch.float16)
    if progress.loss_scale:
        scaler.load_state_dict(progress.loss_scale)
    first_step = True
    while progress.step < total_steps:
        started, step = time.perf_counter(), progress.step
        window = [examples[index] for index in plan.window(step)]
        total_weight = sum(example.total_weight for example in window)
        # Dropout follows from seed, step and process, so that a resumed run draws the same.
        torch.manual_seed(hash((plan.seed, step, plan.rank)))
        flat.zero_grad()
        loss = torch.zeros((), device=device)
        for indices in plan.micro_batches(step):
            batch = collate([examples[index] for index in indices], packed=plan.capacity is not None).to(device)
            micro_loss = supervised_loss(model, batch) / total_weight
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        if accelerator.num_processes > 1:
            flat.grad.copy_(accelerator.reduce(flat.grad, reduction="sum"))
            loss = accelerator.reduce(loss, reduction="sum")
        scaler.unscale_(optimizer)
        norm = flat.clip_grad_norm(max_grad_norm)
        loss_value, norm_value = torch.stack([loss, norm]).tolist()
        # An overflow of scaled fp16 gradients skips the step and lowers the scale, until that can't help any more.
        may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1
        _check_finite(step, loss_value, norm_value, may_overflow)
        if first_step and math.isfinite(norm_value):
            check_gradients(model)
            first_step = False
        rate = learning_rate(step)
        unchanged = scaler.step(optimizer, rate)
        scaler.update()

        progress.step += 1
        progress.tokens += sum(map(len, window))
        progress.supervised_tokens += sum(example.num_supervised for example in window)
        progress.loss_scale = scaler.state_dict()
        share = 1.0 if unchanged is None else unchanged.item()
        seconds = time.perf_counter() - started
        report = StepReport(loss_value, norm_value, rate, share, seconds, sum(map(len, window)))
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


def _check_finite(step: int, loss: float, norm: float, may_overflow: bool) -> None:
    if not math.isfinite(loss) or not (math.isfinite(norm) or may_overflow):
        raise ModelError(
            f"Step {step + 1}: the loss is {loss} and the gradient's norm {norm}. Nothing was updated; lower "
            "train.learning_rate, or set model.compute_dtype to bfloat16 or float32 if it is float16."
        )
