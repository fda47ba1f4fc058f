"""Errors that a user can cause; each names the thing, its value and the remedy, and shows no secret."""

import os
import re
from collections.abc import Sequence

# Patterns of secrets, by kind.
SECRETS = {
    "a token of the hub": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "a token of GitHub": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "a key of AWS": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END|\Z)"),
    "a password in a URL": re.compile(r"(?<=://)[^\s/@:\"']*:[^\s/@\"']+(?=@)"),
}
# Environment variables whose values are secrets, even if they match no pattern.
SECRET_NAMES = re.compile(r".*_(TOKEN|API_KEY|SECRET|SECRET_ACCESS_KEY|PASSWORD)")
LEAST_SECRET_CHARACTERS = 8


class QLoRAError(Exception):
    """Base class of every error that qlora raises for a user's mistake.

    Args:
        message: Secrets in it are replaced: messages of libraries that read files or call the hub may contain some.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(without_secrets(str(message)))


class ConfigError(QLoRAError):
    """A config file, key, value or command-line override is wrong."""


class DataError(QLoRAError):
    """A data file or row can't be used."""


class ModelError(QLoRAError):
    """A base model, target name or training step can't be used."""


class CheckpointError(QLoRAError):
    """A run directory, checkpoint or adapter can't be written or read."""


class ExportError(QLoRAError):
    """Merged weights can't be written, or would be wrong."""


def plain_message(text: str) -> str:
    """Return a pydantic message without pydantic's prefix."""
    return text.removeprefix("Value error, ").replace("Input should", "should")


def find_secrets(text: str) -> list[str]:
    """Return the kinds of secrets that a text seems to contain."""
    return [kind for kind, pattern in SECRETS.items() if pattern.search(text)]


def secrets_of_environment() -> list[str]:
    """Return the values of environment variables that are secrets by their names."""
    return [
        value
        for name, value in os.environ.items()
        if SECRET_NAMES.fullmatch(name) and len(value) >= LEAST_SECRET_CHARACTERS
    ]


def without_secrets(text: str, known: Sequence[str] | None = None) -> str:
    """Return the text with secrets replaced by ***.

    Args:
        text: Any text.
        known: Secrets besides those that are found by pattern; those of the environment if None. For many texts, take
            :func:`secrets_of_environment` once.
    """
    for value in secrets_of_environment() if known is None else known:
        text = text.replace(value, "***")
    for pattern in SECRETS.values():
        text = pattern.sub("***", text)
    return text
