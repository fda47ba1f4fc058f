"""A model's output head: over the vocabulary, or a few scores of a whole document."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

# The end of the names of transformers' classes that score documents, and the attribute that holds their head.
SCORER_CLASS, SCORE = "ForSequenceClassification", "score"


@dataclass(frozen=True, slots=True)
class ScoreHead:
    """A linear head that scores a whole document instead of predicting its next token; it is trained in full.

    Attributes:
        num_labels: Number of scores of a document.
        labels: Name of each score; empty for a reward.
        problem_type: `single_label_classification` or `multi_label_classification`, as transformers names what the
            scores stand for; None for a reward.
        pad_token: Token that texts are padded with, which no training document ends with: transformers reads the scores
            at the last token that is another one. None if it was not chosen yet.
    """

    num_labels: int
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    pad_token: str | None = None

    def __post_init__(self) -> None:
        """Check that every score has a name, or none.

        Raises:
            ValueError: The names are not as many as the scores.
        """
        if self.num_labels < 1 or len(self.labels) not in (0, self.num_labels):
            raise ValueError(f"{self.num_labels} scores and {len(self.labels)} labels")

    def scores_the_same(self, other: "ScoreHead") -> bool:
        """Return whether two heads have as many scores, by the same names where both have names."""
        is_named = bool(self.labels and other.labels)
        return self.num_labels == other.num_labels and (not is_named or self.labels == other.labels)

    def config(self) -> dict[str, Any]:
        """Return the keys of transformers' config that describe the head."""
        names = self.labels or tuple(f"LABEL_{number}" for number in range(self.num_labels))
        return {
            "num_labels": self.num_labels,
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": self.problem_type,
        }


def stored_head(config: Mapping[str, Any]) -> ScoreHead | None:
    """Return the head that a config.json describes; None unless it is that of a model that scores documents."""
    if not any(str(name).endswith(SCORER_CLASS) for name in config.get("architectures") or ()):
        return None
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        number = config.get("num_labels")
        return ScoreHead(number if type(number) is int and number > 0 else 2)  # transformers' default
    try:
        by_id = {int(key): str(name) for key, name in names.items()}
        labels = tuple(by_id[number] for number in range(len(by_id)))
    except (ValueError, KeyError):
        return ScoreHead(len(names))
    is_named = labels != tuple(f"LABEL_{number}" for number in range(len(labels)))
    problem = config.get("problem_type")
    return ScoreHead(len(labels), labels if is_named else (), problem if isinstance(problem, str) else None)


def scores_documents(model: nn.Module) -> bool:
    """Return whether a model scores whole documents, instead of predicting their tokens."""
    return type(model).__name__.endswith(SCORER_CLASS)


def output_head(model: Any) -> Any:
    """Return a model's output head, over the vocabulary or of scores; None if it has none."""
    if scores_documents(model):
        return getattr(model, SCORE, None)
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None
