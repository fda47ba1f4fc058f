"""Options of tokenizing."""

from dataclasses import dataclass

from qlora.data.labels import Labels
from qlora.errors import ConfigError

CHOICES = {
    "loss_on": ("assistant", "last", "all"),
    "overlong": ("drop", "truncate", "split", "error"),
    "on_bad_row": ("error", "drop"),
}


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How examples are tokenized; with tokenizer and source, everything that the tokenized data depends on.

    Attributes:
        loss_on: See :class:`qlora.data.encode.ExampleEncoder`.
        max_seq_len: Maximum length of a document in tokens.
        overlong: How longer documents are handled: `drop`, `truncate`, `split` or `error`; always counted. A group of
            several documents is dropped or truncated whole, and never split.
        on_bad_row: How rows that can't be used are handled: `error`, or `drop`, which counts them.
        labels: Labels that texts are classified by; None reads labelled texts without learning from them.
    """

    loss_on: str = "assistant"
    max_seq_len: int = 2048
    overlong: str = "drop"
    on_bad_row: str = "error"
    labels: Labels | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is unknown, or `max_seq_len` is less than 1.
        """
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{name}: '{value}' is unknown; use one of {', '.join(known)}.")
        if self.max_seq_len < 1:
            raise ConfigError(f"max_seq_len: {self.max_seq_len} should be at least 1.")
