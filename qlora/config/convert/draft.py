"""A draft of a config, made from the values of another trainer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora.config.convert.dropped import drop_reason
from qlora.config.convert.names import NAMES, SAME_NAMES
from qlora.errors import without_secrets

# Values that switch a key off.
OFF: tuple[Any, ...] = (None, False, "", "none", "None", "no", [], {})


def one_line(text: str) -> str:
    """Return text as one printable line without secrets: it is printed, and written into comments."""
    printable = "".join(character if character.isprintable() else " " for character in without_secrets(text))
    return " ".join(printable.split())


class Draft:
    """Collects our values, where they come from, and how every key of the other config was handled.

    Args:
        trainer: Name of the other trainer.
        values: Its keys and values.
        program: Start of the command that they were given to, empty for a file with nothing else.
        names: Names of their file and of its folder.

    Attributes:
        values: Our values by full name, `lora.rank`.
        comments: Where each value comes from.
        translated: The other trainer's keys that have become one of ours.
        dropped: The other trainer's keys that have not, with the reason.
        off: Its keys that are empty or switched off.
        unknown: Its keys that are in no table.
        warnings: What differs from what the other config asks for.
        template: A chat template that was written inside the other config.
    """

    def __init__(self, trainer: str, values: Mapping[str, Any], program: str = "", names: Sequence[str] = ()) -> None:
        self.trainer, self.program, self.names = trainer, program, names
        self._left = dict(values)
        self.values: dict[str, Any] = {}
        self.comments: dict[str, str] = {}
        self.translated: list[str] = []
        self.dropped: dict[str, str] = {}
        self.off: list[str] = []
        self.unknown: list[str] = []
        self.warnings: list[str] = []
        self.template: str | None = None

    def take(self, *names: str) -> Any:
        """Remove keys from what is left to handle, and return the first of their values that is not None."""
        return self.take_named(*names)[1]

    def take_named(self, *names: str) -> tuple[str, Any]:
        """Remove keys as `take` does, and return the first that has a value with its value."""
        found = [(name, self._left.pop(name)) for name in names if name in self._left]
        for name, value in found:
            (self.off if value is None else self.translated).append(name)
        return next((one for one in found if one[1] is not None), (names[0], None))

    def peek(self, *names: str) -> Any:
        """Return the first value of the keys that is not None, and leave them."""
        return next((self._left[name] for name in names if self._left.get(name) is not None), None)

    def left(self) -> Iterator[tuple[str, Any]]:
        """The keys that are not handled yet, with their values."""
        yield from list(self._left.items())

    def set(self, key: str, value: Any, comment: str) -> None:
        """Set one of our keys, unless it is set; the comment says where the value comes from."""
        if key not in self.values:
            self.values[key] = value
            self.comments[key] = comment

    def set_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Set the other trainer's defaults where its config is silent and ours would differ."""
        for key, value in defaults.items():
            self.set(key, value, f"{self.trainer}'s default")

    def warn(self, text: str) -> None:
        """Add a difference that a reader should check."""
        text = one_line(text)
        if text not in self.warnings:
            self.warnings.append(text)

    def drop(self, name: str, reason: str) -> None:
        """Record a key as dropped."""
        self._left.pop(name, None)
        if name in self.translated:
            self.translated.remove(name)
        self.dropped[name] = reason

    def drop_rest(self) -> None:
        """Record every key that is left: empty or off, dropped for a reason, or unknown."""
        missing: dict[str, list[str]] = {}
        for name, value in self.left():
            found, ours = drop_reason(name), NAMES.get(name) or SAME_NAMES.get(name)
            if value in OFF:
                self.off.append(name)
            elif ours is not None and (found is None or found[1]):
                self.dropped[name] = f"{ours} takes no such value"
            elif found is None:
                self.unknown.append(name)
            else:
                reason, is_missing = found
                self.dropped[name] = reason
                if is_missing:
                    missing.setdefault(reason, []).append(name)
        for reason, names in missing.items():
            self.warn(f"Without effect here: {', '.join(names)}. {reason[0].upper()}{reason[1:]}.")
        self._left.clear()
