"""What a run learns: its loss, and the formats of rows that the loss can be computed from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlora.data import DataReport
from qlora.model import Loss


@dataclass(frozen=True, slots=True)
class Objective:
    """What a run learns from its rows.

    Attributes:
        name: Value of `train.objective`.
        loss: Loss to train and evaluate with.
        formats: Formats of rows that it learns from, of :data:`qlora.data.formats.FORMATS`.
        remedies: What to do about rows of other formats, if there is more to say than which formats it learns from.
    """

    name: str
    loss: Loss
    formats: frozenset[str]
    remedies: Mapping[str, str] = field(default_factory=dict)

    def unsupported_reasons(self, reports: Sequence[DataReport]) -> list[str]:
        """Return a sentence for each source that the objective can't learn from: why, and what to do."""
        default = f"it learns from {', '.join(sorted(self.formats))} rows"
        return [
            f"train.objective: {self.name} can't learn from the {report.format} rows of {report.source}; "
            f"{self.remedies.get(report.format, default)}."
            for report in reports
            if report.format not in self.formats
        ]
