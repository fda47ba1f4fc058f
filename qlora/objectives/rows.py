"""Which rows an objective learns from."""

from collections.abc import Sequence

from qlora.data import DataReport

# Formats of rows that plain fine-tuning can't learn from as they are, and how to learn their answers alone.
REMEDIES = {
    "preference": "set data.format: chosen",
    "kto": "take out the rows whose label is false, and set data.format to messages, alpaca or completion",
    "classification": "set data.format: text",
}


def unsupported_reasons(objective: str, reports: Sequence[DataReport]) -> list[str]:
    """Why an objective can't learn from rows, and what to do: a sentence for each source that it can't learn from."""
    return [
        f"train.objective: {objective} can't learn from the {report.format} rows of {report.source}; to learn their "
        f"answers alone, {REMEDIES[report.format]}."
        for report in reports
        if report.format in REMEDIES
    ]
