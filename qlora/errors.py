"""The errors a user can cause; each names the thing, its value and the remedy."""


class QLoRAError(Exception):
    """Base of every error that qlora raises for a user's mistake."""


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
