"""Losses, and the supervised one, which never holds the logits of a whole batch."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from qlora.data import Batch, TokenizedExample
from qlora.data.images import normalize
from qlora.data.tokens import PIXELS
from qlora.errors import ModelError
from qlora.kernels import linear_token_loss, recipe_of
from qlora.layers.attention import mask_arguments
from qlora.lora import ScoreHead, head_blocks, text_model
from qlora.lora.head import PIXEL_VALUES

# Largest relative difference between the loss in chunks and the loss of the model's own logits, from rounding.
TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The loss of a batch.

    Attributes:
        total: Sum of the loss over the batch, a scalar in fp32, not yet divided by any count.
        metrics: Other sums over the batch by name, scalars in fp32; they get no gradient.
        counts: Counts of the batch, of the shape :attr:`Loss.counts`; None if it has none.
    """

    total: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    counts: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss to train and evaluate with.

    Attributes:
        compute: Computes the loss of a batch that is on the model's device.
        units: Number of units in an example or a batch: what a sum of losses or metrics is divided by for the mean.
        metrics: Names of the metrics of every :class:`StepLoss`. They are fixed, because processes add up their
            metrics even if one of them ran out of memory before it computed any.
        counts: Shape of the counts of every :class:`StepLoss`, which evaluations add up over batches and processes.
        summarize: Computes further metrics from these sums, for those that are no means over units.
        passes: Yields the parts of a loss that is trained in several passes; the backward of each is run before the
            next is asked for. The loss and its metrics are the sums over the parts. By default there is one pass,
            which `compute` returns.
        group_size: Number of consecutive documents that the loss takes together.
        columns: What the loss reads of `Batch.values`, by column: the value of a made-up document.
        has_reference: Whether it compares the model with itself at step 0, whose adapters are then kept.
        ahead: Computes, before any part of a step gets a gradient, sums over a batch that the loss needs for the whole
            step, (num_ahead,), fp32. Their means per unit are :attr:`qlora.data.Batch.ahead`. Then only the first
            document of each group gets a gradient; the others are for these sums.
        num_ahead: Number of these sums.
        is_per_token: Whether the loss is a cross-entropy per unit of supervised weight, which has a perplexity.
        head: Head of scores of whole documents that the loss is computed from; None for the head over the vocabulary.
    """

    compute: Callable[[Any, Batch], StepLoss]
    units: Callable[[TokenizedExample | Batch], float]
    metrics: tuple[str, ...] = ()
    counts: tuple[int, ...] = (0,)
    summarize: Callable[[list[Any]], Mapping[str, float]] | None = None
    passes: Callable[[Any, Batch], Iterable[StepLoss]] | None = None
    group_size: int = 1
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    has_reference: bool = False
    ahead: Callable[[Any, Batch], torch.Tensor] | None = None
    num_ahead: int = 0
    is_per_token: bool = False
    head: ScoreHead | None = None

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of all metrics of an evaluation, those that are summarized included."""
        nothing = torch.zeros(self.counts, dtype=torch.int64).tolist()
        return (*self.metrics, *(() if self.summarize is None else self.summarize(nothing)))

    def training_passes(self, model: Any, batch: Batch) -> Iterable[StepLoss]:
        """Return the passes of a training step; run the backward of each before you take the next."""
        batch = self.learned_part(model, batch)
        return (self.compute(model, batch),) if self.passes is None else self.passes(model, batch)

    def learned_part(self, model: Any, batch: Batch) -> Batch:
        """Return the documents of a batch that `compute` takes, with the means of :attr:`ahead`.

        Where the batch has none, they are those of the batch itself.
        """
        if self.ahead is None:
            return batch
        ahead = self.ahead(model, batch) / self.units(batch) if batch.ahead is None else batch.ahead
        return replace(batch.select(range(0, len(batch.lengths), self.group_size)), ahead=ahead)

    def sums(self, step: StepLoss) -> torch.Tensor:
        """Return the total and the metrics of a batch, (1 + metrics,) in fp32, without their gradient."""
        return torch.stack([step.total, *(step.metrics[name] for name in self.metrics)]).detach()


def supervised_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Compute the sum over the supervised tokens of a batch of -log p(token) times the token's weight.

    Args:
        model: A causal language model of transformers.
        batch: A batch on the model's device.

    Returns:
        A scalar, fp32; divide it by the weight of all supervised tokens that you average over.
    """
    return _token_loss(model, batch)[0]


def _token_loss(
    model: Any, batch: Batch, label_smoothing: float = 0.0, by_probability: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a loss of the supervised tokens, and their plain cross-entropy; see :func:`linear_token_loss`."""
    hidden = text_model(model)(**model_inputs(model, batch)).last_hidden_state
    rows, norm = supervised_rows(hidden, batch)
    return loss_of_rows(model, batch, rows, norm, batch.weights, label_smoothing, by_probability)


def loss_of_rows(
    model: Any,
    batch: Batch,
    rows: torch.Tensor,
    norm: Callable[[torch.Tensor], torch.Tensor] | None,
    weights: torch.Tensor | None,
    label_smoothing: float = 0.0,
    by_probability: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of the supervised tokens and their plain cross-entropy, from their hidden states.

    Args:
        model: A causal language model.
        batch: The batch.
        rows: See :func:`supervised_rows`, as `norm`.
        norm: Norm that the rows still need.
        weights: Weight of each token, (supervised tokens,), fp32; None if all are 1.
        label_smoothing: See :func:`linear_token_loss`, as `by_probability`.
        by_probability: Multiply by the tokens' probabilities.
    """
    head = model.get_output_embeddings()
    scale, softcap = logit_transform(model.config)
    labels = batch.labels.flatten().index_select(0, batch.supervised)
    return linear_token_loss(
        rows, head_blocks(head), labels, head.bias,
        logit_scale=scale, softcap=softcap, row_weights=weights, norm=norm,
        label_smoothing=label_smoothing, by_probability=by_probability,
    )  # fmt: skip


# The loss of supervised fine-tuning, per unit of supervised weight.
SUPERVISED = Loss(
    compute=lambda model, batch: StepLoss(supervised_loss(model, batch)),
    units=lambda part: part.total_weight,
    is_per_token=True,
)


def token_loss(label_smoothing: float, by_probability: bool) -> Loss:
    """Return a variant of :data:`SUPERVISED` to train with; its metric `cross_entropy` is the plain one.

    Args:
        label_smoothing: Share of each target that is spread evenly over the vocabulary.
        by_probability: Multiply each token's loss by the token's probability, as DFT does (arXiv:2508.05629).
    """

    def compute(model: Any, batch: Batch) -> StepLoss:
        loss, plain = _token_loss(model, batch, label_smoothing, by_probability)
        return StepLoss(loss, {"cross_entropy": plain})

    return Loss(compute, SUPERVISED.units, metrics=("cross_entropy",))


def supervised_rows(
    hidden: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor] | None]:
    """Return the hidden states that the supervised tokens are predicted from, and the norm that they still need.

    Args:
        hidden: Last hidden states of the batch, (batch, seq, features).
        batch: The batch.

    Returns:
        (supervised tokens, features), and the last norm where its input is enough to compute it again.
    """
    return rows_at(hidden, batch.supervised)


def rows_at(
    hidden: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor] | None]:
    """Return the hidden states of some tokens, and the norm that they still need.

    Args:
        hidden: Last hidden states of a batch, (batch, seq, features).
        places: (tokens,), int64: their indices in the flattened batch.

    Returns:
        (tokens, features), and the last norm where its input is enough to compute it again.
    """
    recipe = recipe_of(hidden)
    if recipe is not None:
        (hidden,) = recipe.inputs
    rows = hidden.flatten(0, 1).index_select(0, places)
    return rows, None if recipe is None else recipe.source.function


def model_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Return a model's arguments for a batch; positions that restart separate packed documents, not a mask."""
    if PIXELS in batch.values:
        return {PIXEL_VALUES: normalize(batch.values, model.dtype)}
    positions = batch.position_ids
    if positions is not None and _has_axes(model.config):
        # Text, and the three axes of images. Given two dimensions, some of these models don't look for documents.
        positions = positions.expand(4, *positions.shape)
    return {
        "input_ids": batch.input_ids,
        "position_ids": positions,
        "use_cache": False,
        **mask_arguments(model, batch.attention_mask, batch.cu_seq_lens, batch.lengths),
    }


def _has_axes(config: Any) -> bool:
    """Return whether an architecture's rotary embedding has axes for images, as Qwen-VL's has."""
    return "mrope_section" in (getattr(config.get_text_config(), "rope_parameters", None) or {})


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Return the factor and the soft cap that an architecture applies to its logits, from its config's keys."""
    text_config = config.get_text_config()
    scale = getattr(text_config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale *= getattr(text_config, "lm_head_multiplier", None) or 1.0  # Falcon H1
    scale /= getattr(text_config, "logits_scaling", None) or 1.0  # Granite divides
    return scale, getattr(text_config, "final_logit_softcapping", None)


@torch.no_grad()
def check_loss(model: Any, batch: Batch) -> None:
    """Check the loss against that of the model's own logits, which some architectures compute in another way.

    Args:
        model: A model with or without adapters; it is left in evaluation mode.
        batch: A small batch with supervised tokens.

    Raises:
        ModelError: They differ or are not finite, or the model can't run with its layers replaced.
    """
    try:
        model.train()  # runs the code that some architectures have for training only; its loss differs by dropout
        supervised_loss(model, batch)
        model.eval()
        loss = supervised_loss(model, batch).item()
        logits = model(**model_inputs(model, batch)).logits
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"{type(model).__name__} can't be run with its linear layers quantized and adapted: {error}. "
            "Some architectures use weights of layers directly; model.quantization=none or other lora.targets may help."
        ) from error
    expected = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), reduction="sum").item()
    if not math.isfinite(loss):
        raise ModelError(
            f"The loss of {type(model).__name__} is {loss} before any training: its weights or activations do not fit "
            f"{model.dtype}; set model.compute_dtype to bfloat16 or float32."
        )
    if not abs(loss - expected) <= TOLERANCE * abs(expected):
        raise ModelError(
            f"{type(model).__name__} computes its logits from its hidden states in an unsupported way (loss {loss:.4f} "
            f"in chunks, {expected:.4f} from its own logits), so training would be wrong; use another architecture."
        )
