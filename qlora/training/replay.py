"""Saves a step with everything that determines its loss and gradient, and reruns it to find what is not finite."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from qlora.checkpoint import RunDirectory
from qlora.config import RunConfig
from qlora.data import LABEL, Batch, Labels, TokenizedExample, collate
from qlora.errors import CheckpointError
from qlora.files import write_bytes
from qlora.files.json_files import parse_object
from qlora.layers import apply_recompute
from qlora.lora import input_embedding
from qlora.memory.probe import prepare
from qlora.model import flat_parameters, labels_from_config, resolve_device, starts_of
from qlora.objectives import label_loss, training_loss
from qlora.training.loop import LoopParts
from qlora.training.seeds import document_seeds, seed_step

# Number of parameters that a report names.
SHOWN = 8
# Tensors of a saved step; those of the documents' further values have names with this prefix.
TENSORS = ("trained", "input_ids", "weights", "lengths")
VALUE = "value."


@dataclass(frozen=True, slots=True)
class MicroBatchReport:
    """A micro-batch that was rerun.

    Attributes:
        process: Rank of the process that computed it.
        examples: Indices of its documents among the run's examples.
        loss: Its share of the step's loss.
        first_nonfinite: First module whose output was not finite; None if all were finite.
        nonfinite_gradients: Trained parameters whose gradient was not finite.
    """

    process: int
    examples: list[int]
    loss: float
    first_nonfinite: str | None
    nonfinite_gradients: list[str]

    @property
    def is_finite(self) -> bool:
        """Whether loss, gradients and outputs are finite."""
        return math.isfinite(self.loss) and not self.nonfinite_gradients and self.first_nonfinite is None


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """A step that was rerun.

    Attributes:
        step: Number of the step, from 1 as in metrics.jsonl.
        recorded_loss: Loss when the step was saved.
        recorded_grad_norm: Norm of the gradient then, before clipping.
        loss: Loss now.
        grad_norm: Norm of the gradient now.
        is_finite: Whether all numbers are finite now.
        broken: Micro-batches with numbers that are not finite.
        rows: Rows of the data that the step trained on, by source.
    """

    step: int
    recorded_loss: float
    recorded_grad_norm: float
    loss: float
    grad_norm: float
    is_finite: bool
    broken: list[MicroBatchReport]
    rows: dict[str, list[int]]

    def describe(self) -> str:
        """Return one line for people."""
        if self.is_finite:
            return "all its numbers are finite."
        first = self.broken[0]
        where = first.first_nonfinite or "the backward"
        return f"{len(self.broken)} micro-batches are not finite; the first breaks in {where}."

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; numbers that are not finite, which JSON does not have, become strings."""
        values = asdict(self)
        for numbers in (values, *values["broken"]):
            words = {
                key: str(value) for key, value in numbers.items() if value in (math.inf, -math.inf) or value != value
            }
            numbers.update(words)
        return values


def save_step(path: Path, parts: LoopParts, step: int, num_parts: int, about: Mapping[str, Any]) -> None:
    """Write a step's documents, how they were batched, and the trained values that it began with.

    Args:
        path: Path of the file.
        parts: Parts of the run, of which only the optimizer's buffer, the examples and the batches are read.
        step: Number of the step, from 0.
        num_parts: Number of parts that micro-batches were split into.
        about: `loss`, `grad_norm`, `loss_scale` and `rows`, for the report, and `label_weights`, see
            :attr:`qlora.objectives.Objective.label_weights`.

    Raises:
        CheckpointError: The file can't be written.
    """
    flat, plan = parts.optimizer.flat, parts.batches
    indices = plan.window(step)
    window = [parts.examples[index] for index in indices]
    processes = [replace(plan, rank=rank).micro_batches(step, num_parts) for rank in range(plan.world_size)]
    settings = {
        "step": step,
        "seed": plan.seed,
        "packed": plan.capacity is not None,
        "indices": indices,
        "processes": processes,
        "trained": flat.names,
        **about,
    }
    tensors = {
        "trained": flat.data.cpu(),
        "input_ids": torch.from_numpy(np.concatenate([each.input_ids for each in window])),
        "weights": torch.from_numpy(np.concatenate([each.weights for each in window])),
        "lengths": torch.tensor([len(each) for each in window]),
    }
    for name in window[0].values:
        tensors[VALUE + name] = torch.from_numpy(np.stack([each.values[name] for each in window]))
    write_bytes(path, save(tensors, metadata={"step": json.dumps(settings)}))


def replay(config: RunConfig, path: str | Path) -> ReplayReport:
    """Rerun a saved step, micro-batch by micro-batch, and find where its numbers stop being finite.

    Nothing is updated or written. Settings may differ from the run's, to see whether they help.

    Args:
        config: Config with the base and adapters of the run.
        path: Path of a file that :func:`save_step` wrote.

    Raises:
        CheckpointError: The file is not such a file, or belongs to other adapters.
        ModelError: The base can't be loaded.
    """
    settings, tensors = _read(Path(path).expanduser())
    run = RunDirectory(Path(path).expanduser().parent.parent)
    labels = labels_from_config(config, run)
    own = None if labels is None else label_loss(labels, settings["label_weights"])
    _check_labels(path, labels, settings, tensors)
    loss = training_loss(config.train, own)
    starts = starts_of(config, run)
    # As the step was, unless documents can't be kept apart here; each alone gives the same numbers up to rounding.
    data = config.data.model_copy(update={"packing": settings["packed"]})
    model, config, _ = prepare(config.model_copy(update={"data": data}), resolve_device(), loss, starts)
    apply_recompute(model, config.model.recompute)
    flat = flat_parameters(model, config.train)
    if (flat.names, flat.data.shape) != (settings["trained"], tensors["trained"].shape):
        raise CheckpointError(
            f"{path}: its run trained {len(settings['trained'])} parameters, {tensors['trained'].numel()} values; this "
            f"config trains {len(flat.names)}, {flat.data.numel()} values. Replay it with the config.yaml of its run."
        )
    embedding = input_embedding(model)
    vocabulary = 1 if embedding is None else embedding.num_embeddings
    if tensors["input_ids"].min() < 0 or tensors["input_ids"].max() >= vocabulary:
        raise CheckpointError(f"{path} has token ids outside the base's vocabulary of {vocabulary}.")
    flat.data.copy_(tensors["trained"])
    spans = np.split(np.arange(len(tensors["input_ids"])), np.cumsum(tensors["lengths"].numpy())[:-1])
    ids, weights = tensors["input_ids"].numpy(), tensors["weights"].numpy()
    values = {name.removeprefix(VALUE): tensor.numpy() for name, tensor in tensors.items() if name.startswith(VALUE)}
    examples = {
        index: TokenizedExample(ids[span], weights[span], {name: value[place] for name, value in values.items()})
        for place, (index, span) in enumerate(zip(settings["indices"], spans, strict=True))
    }
    num_units = sum(map(loss.units, examples.values()))
    is_scaled = model.dtype == torch.float16
    scale = settings["loss_scale"] if is_scaled else 1.0
    reports, loss_sum = [], 0.0
    step_grad = torch.zeros_like(flat.grad)

    def batch_of(indices: Sequence[int]) -> Batch:
        seeds = document_seeds(settings["seed"], settings["step"], indices)
        return collate([examples[index] for index in indices], config.data.packs, seeds).to(model.device)

    ahead = None
    if loss.ahead is not None:
        every = (batch_of(indices) for micro_batches in settings["processes"] for indices in micro_batches)
        ahead = torch.stack([loss.ahead(model, batch) for batch in every]).sum(0) / num_units
    for process, micro_batches in enumerate(settings["processes"]):
        seed_step(settings["seed"], settings["step"], process)
        for indices in micro_batches:
            batch = replace(batch_of(indices), ahead=ahead)
            flat.zero_grad()
            mean = 0.0
            with _watched(model) as first:
                for computed in loss.training_passes(model, batch):
                    part = computed.total / num_units
                    (part * scale).backward()  # inside, because it recomputes what the hooks watch
                    mean += part.item()
            broken = [
                name
                for name, parameter in model.named_parameters()
                if parameter.grad is not None and not parameter.grad.isfinite().all()
            ]
            step_grad += flat.grad / scale
            loss_sum += mean
            reports.append(MicroBatchReport(process, indices, mean, next(iter(first), None), broken[:SHOWN]))
    broken_batches = [report for report in reports if not report.is_finite]
    return ReplayReport(
        step=settings["step"] + 1,
        recorded_loss=settings["loss"],
        recorded_grad_norm=settings["grad_norm"],
        loss=loss_sum,
        grad_norm=torch.linalg.vector_norm(step_grad).item(),
        is_finite=not broken_batches,
        broken=broken_batches,
        rows=settings["rows"],
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            settings = {"label_weights": None} | parse_object((file.metadata() or {})["step"].encode())
            names = [*TENSORS, *(name for name in file.keys() if name.startswith(VALUE))]  # noqa: SIM118 (not a dict)
            tensors = {name: file.get_tensor(name) for name in names}
        _check(settings, tensors)
        return settings, tensors
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"--replay {path}: not a step that a run saved: {type(error).__name__}: {error}."
        ) from error


def _check(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Check that an untrusted file has the values of a step.

    Raises:
        ValueError: A value is wrong; `KeyError`, `TypeError` and `AttributeError` mean the same.
    """
    lengths, indices, processes = tensors["lengths"].tolist(), settings["indices"], settings["processes"]
    rows = [row for rows in settings["rows"].values() for row in rows]
    integers = [settings["step"], settings["seed"], *indices, *rows]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in integers):
        raise ValueError("its step, seed, documents or rows are not numbers")
    numbers = [settings["loss"], settings["grad_norm"], settings["loss_scale"]]
    if not all(type(number) in (int, float) for number in numbers) or not settings["loss_scale"] > 0:
        raise ValueError("its loss, norm or scale is not a number")
    weights = settings["label_weights"]
    if weights is not None and not all(type(number) in (int, float) for number in weights):
        raise ValueError("its weights of labels are not numbers")
    if not all(batch for batches in processes for batch in batches):
        raise ValueError("a micro-batch is empty")
    if sorted(index for batches in processes for batch in batches for index in batch) != sorted(indices):
        raise ValueError("its documents are not those of its micro-batches")
    if (tensors["input_ids"].dtype, tensors["weights"].dtype) != (torch.int32, torch.float16):
        raise ValueError("its token ids or weights have the wrong dtype")
    num_tokens = {len(tensors["input_ids"]), len(tensors["weights"]), sum(lengths)}
    if len(indices) != len(lengths) or min(lengths) < 1 or len(num_tokens) != 1 or "packed" not in settings:
        raise ValueError("its documents do not have the recorded lengths")
    if any(len(tensor) != len(indices) for name, tensor in tensors.items() if name.startswith(VALUE)):
        raise ValueError("values of its documents are missing")


def _check_labels(
    path: str | Path, labels: Labels | None, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Check that the labels of a step's texts are among those of its run.

    Raises:
        CheckpointError: They are not.
    """
    if labels is None:
        return
    size, given, weights = len(labels.names), tensors.get(VALUE + LABEL), settings["label_weights"]
    most = 1 if labels.is_multiple else size - 1
    shape = (len(settings["indices"]), size) if labels.is_multiple else (len(settings["indices"]),)
    has_all = given is not None and given.shape == shape and given.min() >= 0 and given.max() <= most
    if not has_all or len(weights or labels.names) != size:
        raise CheckpointError(
            f"{path} has other labels than its run, {', '.join(labels.names[:SHOWN])}; keep the file in the folder of "
            "the run that saved it."
        )


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose outputs are not finite, in the order in which they are computed."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and not output.detach().isfinite().all():
                found.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
