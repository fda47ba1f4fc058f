"""Which rows an objective learns from."""

from qlora.data import DataReport

# Formats of rows that plain fine-tuning can't learn from as they are, and how their answers alone are learnt.
REMEDIES = {
    "preference": "set data.format: chosen",
    "kto": "take out the rows whose label is false, and set data.format to messages, alpaca or completion",
    "classification": "set data.format: text",
}


def why_not_learnt(objective: str, report: DataReport) -> str | None:
    """Why an objective can't learn from a source's rows, and what to do; None if it can."""
    if report.format not in REMEDIES:
        return None
    return (
        f"train.objective: {objective} can't learn from the {report.format} rows of {report.source}; to learn their "
        f"answers alone, {REMEDIES[report.format]}."
    )
