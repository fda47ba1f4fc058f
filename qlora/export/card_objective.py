"""What a run learned, as rows of the model card."""

from qlora.config import RunConfig
from qlora.config.sections.objectives import PREFERENCE_DEFAULTS


def unit_of(objective: str) -> tuple[str, int]:
    """Return what a card counts the rows of an objective in, and how many documents each of these has."""
    if objective == "kto":  # each has another row's answer beside it
        return "rated answers", 2
    return ("pairs", 2) if objective in (*PREFERENCE_DEFAULTS, "reward") else ("documents", 1)


def objective_rows(config: RunConfig) -> dict[str, str]:
    """Return what a card says about a run's objective, by the names of its rows."""
    train = config.train
    options: dict[str, object] = {}
    if train.preference is not None:
        options |= train.preference.model_dump(exclude_none=True)
    if train.reward is not None:
        options |= train.reward.model_dump()
    if train.classify_by is not None:
        options["by"] = train.classify_by
    if train.class_weights is not None:
        options["class weights"] = train.class_weights
    if train.token_loss != "ce":
        options["token loss"] = train.token_loss
    if train.label_smoothing:
        options["label smoothing"] = train.label_smoothing
    shown = [
        f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in options.items()
    ]
    rows = {"objective": ", ".join([train.objective, *shown])}
    return rows | ({"loss on": config.data.loss_on} if train.objective == "sft" else {})
