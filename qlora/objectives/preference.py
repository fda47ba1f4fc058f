"""Learning from pairs of answers of which the first is preferred: DPO, IPO, ORPO, SimPO and CPO."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qlora.config import PreferenceSection
from qlora.data import Batch, TokenizedExample
from qlora.data.batches import to_device
from qlora.model import SUPERVISED, Loss, StepLoss
from qlora.model.log_probs import document_log_probs, reference_log_probs
from qlora.objectives.objective import Objective

GROUP_SIZE = 2
METRICS = (
    "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected", "log_prob_chosen", "log_prob_rejected",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer of each pair.

    Attributes:
        log_probs: Log-probability of each answer, (pairs,), fp32.
        reference: That under the model at step 0; zeros for a loss without a reference.
        lengths: Number of supervised tokens of each answer, by their weights, (pairs,), fp32.
    """

    log_probs: torch.Tensor
    reference: torch.Tensor
    lengths: torch.Tensor

    def scores(self, options: PreferenceSection) -> torch.Tensor:
        """Return the logarithm of the answers' probability relative to the reference, (pairs,), per token if asked."""
        ratio = self.log_probs - self.reference
        return ratio / self.lengths if options.length_normalize else ratio

    @property
    def mean_log_probs(self) -> torch.Tensor:
        """Mean log-probability of each answer's tokens, (pairs,)."""
        return self.log_probs / self.lengths


Rule = Callable[[Answers, Answers, PreferenceSection], torch.Tensor]


def logistic(chosen: Answers, rejected: Answers, options: PreferenceSection) -> torch.Tensor:
    """Return -log σ(β Δ - γ) of each pair, with the share `label_smoothing` of the preferences taken for reversed.

    Δ is the difference of the scores. With a reference this is DPO (arXiv:2305.18290); without, CPO (arXiv:2401.08417),
    and SimPO (arXiv:2405.14734) with scores per token and a margin γ.
    """
    assert options.beta is not None
    logits = options.beta * (chosen.scores(options) - rejected.scores(options)) - (options.gamma or 0.0)
    smoothing = options.label_smoothing or 0.0
    return -F.logsigmoid(logits) * (1 - smoothing) - F.logsigmoid(-logits) * smoothing


def squared(chosen: Answers, rejected: Answers, options: PreferenceSection) -> torch.Tensor:
    """Return (Δ - 1 / 2β)² of each pair: IPO (arXiv:2310.12036), with scores per token as its authors computed it."""
    assert options.beta is not None
    return (chosen.scores(options) - rejected.scores(options) - 1 / (2 * options.beta)).square()


def odds_ratio(chosen: Answers, rejected: Answers, options: PreferenceSection) -> torch.Tensor:
    """Return -β log σ(log odds(chosen) - log odds(rejected)) of each pair: ORPO (arXiv:2403.07691).

    The odds are those of a probability per token, exp of the mean log-probability.
    """
    assert options.beta is not None
    log_odds = _log_odds(chosen.mean_log_probs) - _log_odds(rejected.mean_log_probs)
    return -options.beta * F.logsigmoid(log_odds)


def _log_odds(log_probs: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) given log p, which is kept below zero so that the odds stay finite."""
    log_probs = log_probs.clamp(max=-torch.finfo(torch.float32).eps)
    return log_probs - torch.log(-torch.expm1(log_probs))


@dataclass(frozen=True, slots=True)
class _Kind:
    rule: Rule
    has_reference: bool


KINDS: Mapping[str, _Kind] = {
    "dpo": _Kind(logistic, has_reference=True),
    "ipo": _Kind(squared, has_reference=True),
    "orpo": _Kind(odds_ratio, has_reference=False),
    "simpo": _Kind(logistic, has_reference=False),
    "cpo": _Kind(logistic, has_reference=False),
}


def preference_objective(name: str, options: PreferenceSection) -> Objective:
    """Return an objective of `KINDS`; its loss is a mean over pairs.

    A shared prompt is not learned: only the answers are supervised. With `sft_weight`, the mean negative
    log-probability of the chosen answer's tokens is added. The metrics are means over pairs: the rewards β · score, how
    often that of the chosen answer is larger (0.5 where they are equal, as at the start), and the answers'
    log-probabilities.
    """
    kind = KINDS[name]

    def compute(model: Any, batch: Batch) -> StepLoss:
        # Before the model's own forward, whose activations are then kept until the backward.
        reference = reference_log_probs(model, batch) if kind.has_reference else None
        log_probs = document_log_probs(model, batch)
        reference = torch.zeros_like(log_probs) if reference is None else reference
        lengths = to_device(torch.tensor(batch.weight_sums, dtype=torch.float32), log_probs.device)
        chosen, rejected = (
            Answers(log_probs[side::GROUP_SIZE], reference[side::GROUP_SIZE], lengths[side::GROUP_SIZE])
            for side in range(GROUP_SIZE)
        )
        losses = kind.rule(chosen, rejected, options)
        if options.sft_weight:
            losses = losses - options.sft_weight * chosen.mean_log_probs
        return StepLoss(losses.sum(), _metrics(chosen, rejected, options))

    return Objective(
        name=name,
        loss=Loss(
            compute=compute,
            units=num_pairs,
            metrics=METRICS,
            group_size=GROUP_SIZE,
            has_reference=kind.has_reference,
        ),
        formats=frozenset({"preference"}),
        judge=answers_loss(first_of_pairs) if kind.has_reference else None,
        remedies={"kto": "set train.objective: kto", "chosen": "set data.format: preference"},
    )


def answers_loss(chosen: Callable[[Batch], Sequence[int]]) -> Loss:
    """Return the cross-entropy of the tokens of some answers, which a model has without a reference.

    Args:
        chosen: Returns the documents of a batch with these answers.
    """

    def compute(model: Any, batch: Batch) -> StepLoss:
        documents = chosen(batch)
        if not documents:
            return StepLoss(torch.zeros((), device=batch.input_ids.device))
        return SUPERVISED.compute(model, batch.select(documents))

    def units(part: TokenizedExample | Batch) -> float:
        return sum(part.weight_sums[each] for each in chosen(part)) if isinstance(part, Batch) else part.total_weight

    return Loss(compute, units, is_per_token=True)


def first_of_pairs(batch: Batch) -> Sequence[int]:
    """Return the chosen answers of a batch."""
    return range(0, len(batch.lengths), GROUP_SIZE)


def num_pairs(part: TokenizedExample | Batch) -> float:
    """Return the number of pairs in a batch; a document is half a pair."""
    return (len(part.lengths) if isinstance(part, Batch) else 1) / GROUP_SIZE


@torch.no_grad()
def _metrics(chosen: Answers, rejected: Answers, options: PreferenceSection) -> dict[str, torch.Tensor]:
    assert options.beta is not None
    won, lost = (options.beta * each.scores(options) for each in (chosen, rejected))
    accuracy = (won > lost).float() + 0.5 * (won == lost)
    values = (accuracy, won - lost, won, lost, chosen.log_probs, rejected.log_probs)
    return {name: value.sum() for name, value in zip(METRICS, values, strict=True)}
