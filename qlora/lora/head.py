"""A model's output head: over the vocabulary, or a few scores of a whole document."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

# The ends of the names of transformers' classes that score documents, texts or images, and the attributes that hold
# their head.
SCORER_CLASSES, SCORES = ("ForSequenceClassification", "ForImageClassification"), ("score", "classifier", "head")
# The argument of a forward pass that models of images are given.
PIXEL_VALUES = "pixel_values"


@dataclass(frozen=True, slots=True)
class ScoreHead:
    """A linear head that scores a whole document instead of predicting its next token; it is trained in full.

    Attributes:
        num_labels: Number of scores of a document.
        labels: Name of each score; empty for a reward.
        problem_type: `single_label_classification` or `multi_label_classification`, as transformers names what the
            scores stand for; None for a reward.
        pad_token: Token that texts are padded with, which no training document ends with: transformers reads the scores
            at the last token that is another one. None if it was not chosen yet, and for images.
        of_images: Whether the documents are images.
    """

    num_labels: int
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    pad_token: str | None = None
    of_images: bool = False

    def __post_init__(self) -> None:
        """Check that every score has a name, or none.

        Raises:
            ValueError: The names are not as many as the scores.
        """
        if self.num_labels < 1 or len(self.labels) not in (0, self.num_labels):
            raise ValueError(f"{self.num_labels} scores and {len(self.labels)} labels")

    @property
    def auto_class(self) -> str:
        """Name of the class of transformers that loads a model with such a head."""
        return f"AutoModel{SCORER_CLASSES[self.of_images]}"

    @property
    def pipeline(self) -> str:
        """The hub's name of what such a model is for."""
        return "image-classification" if self.of_images else "text-classification"

    @property
    def documents(self) -> str:
        """What is scored, in the plural."""
        return "images" if self.of_images else "texts"

    def pad_id(self, tokenizer: Any) -> int | None:
        """Return the token that texts are padded with, of a base's tokenizer; None for images, which need none."""
        return None if self.of_images else tokenizer.pad_token_id

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
    classes = [str(name) for name in config.get("architectures") or () if str(name).endswith(SCORER_CLASSES)]
    if not classes:
        return None
    of_images = classes[0].endswith(SCORER_CLASSES[1])
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        number = config.get("num_labels")
        number = number if type(number) is int and number > 0 else 2  # transformers' default
        return ScoreHead(number, of_images=of_images)
    try:
        by_id = {int(key): str(name) for key, name in names.items()}
        labels = tuple(by_id[number] for number in range(len(by_id)))
    except (ValueError, KeyError):
        return ScoreHead(len(names), of_images=of_images)
    is_named = labels != tuple(f"LABEL_{number}" for number in range(len(labels)))
    problem = config.get("problem_type")
    problem = problem if isinstance(problem, str) else None
    return ScoreHead(len(labels), labels if is_named else (), problem, of_images=of_images)


def scores_documents(model: nn.Module) -> bool:
    """Return whether a model scores whole documents, instead of predicting their tokens."""
    return type(model).__name__.endswith(SCORER_CLASSES)


def reads_images(model: Any) -> bool:
    """Return whether a model of transformers takes images instead of tokens."""
    return getattr(model, "main_input_name", None) == PIXEL_VALUES


def score_name(model: nn.Module) -> str | None:
    """Return the name of the head of a model that scores documents; None if it has none under a known name."""
    return next((name for name in SCORES if isinstance(getattr(model, name, None), nn.Module)), None)


def output_head(model: Any) -> Any:
    """Return a model's output head, over the vocabulary or of scores; None if it has none."""
    if scores_documents(model):
        name = score_name(model)
        return None if name is None else getattr(model, name)
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def input_embedding(model: Any) -> Any:
    """Return a model's embedding of tokens; None for a model of images, which has none."""
    return None if reads_images(model) else model.get_input_embeddings()


def embedding_and_head(model: Any) -> dict[str, Any]:
    """Return a model's embedding and output head by their names, as far as it has them, in the model's order."""
    both = [layer for layer in (input_embedding(model), output_head(model)) if layer is not None]
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in both)}
