"""A training objective: a loss, and the formats of rows that it can be computed from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlora.data import DataReport
from qlora.model import Loss


@dataclass(frozen=True, slots=True)
class Objective:
    """What a run trains for.

    Attributes:
        name: Value of `train.objective`.
        loss: Loss to evaluate with; :func:`qlora.objectives.training_loss` is the one to train with.
        formats: Formats of rows that it supports, of :data:`qlora.data.formats.FORMATS`.
        remedies: What to do about rows of another format, by format; default: name the supported formats.
        weighted: Loss to train with, if labels have weights; see :attr:`trained`.
        label_weights: Weight of each label's texts while training; None if all weigh the same.
        judge: Loss to compare merged models by, if `loss` needs the model at step 0, which they don't have.
    """

    name: str
    loss: Loss
    formats: frozenset[str]
    remedies: Mapping[str, str] = field(default_factory=dict)
    weighted: Loss | None = None
    label_weights: Sequence[float] | None = None
    judge: Loss | None = None

    @property
    def trained(self) -> Loss:
        """The loss to train with, before what the config adds to it."""
        return self.loss if self.weighted is None else self.weighted

    def unsupported_reasons(self, reports: Sequence[DataReport]) -> list[str]:
        """Return a sentence for each source that the objective can't learn from: why, and what to do."""
        default = f"it learns from {', '.join(sorted(self.formats))} rows"
        return [
            f"train.objective: {self.name} can't learn from the {report.format} rows of {report.source}; "
            f"{self.remedies.get(report.format, default)}."
            for report in reports
            if report.format not in self.formats
        ]
