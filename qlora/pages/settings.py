"""The settings of a run with their defaults, and the settings in which runs differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora.config import RunConfig, SourceSection
from qlora.config.reference import as_yaml

# The least that a config says; everything else in it is a default.
LEAST = {"model": {"base": "."}, "data": {"train": "."}, "train": {"output_dir": "."}}
SOURCE = SourceSection(path=".").model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of a config.

    Attributes:
        key: Full name, such as `train.learning_rate`.
        value: Value in YAML.
        default: Default in YAML; None for keys that have to be given.
    """

    key: str
    value: str
    default: str | None

    @property
    def is_default(self) -> bool:
        """Whether the value is the default."""
        return self.value == self.default

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"is_default": self.is_default}


def list_settings(config: RunConfig) -> list[Setting]:
    """Return every key of a config, those that differ from their defaults first."""
    least = RunConfig.model_validate(LEAST)
    defaults = dict(_keys(least))
    given = {f"{section}.{key}" for section, keys in LEAST.items() for key in keys}
    found = [Setting(key, value, None if key in given else defaults[key]) for key, value in _keys(config)]
    return sorted(found, key=lambda setting: setting.is_default)


def differing(runs: Sequence[Mapping[str, str]]) -> dict[str, list[str | None]]:
    """Return the keys whose values are not the same in all runs, with the value of each run, None where it has none.

    Args:
        runs: Values of each run by key.
    """
    keys = dict.fromkeys(key for run in runs for key in run)
    values = {key: [run.get(key) for run in runs] for key in keys}
    return {key: found for key, found in values.items() if len({*found}) > 1}


def _keys(config: RunConfig) -> Iterator[tuple[str, str]]:
    for section, values in config.model_dump(mode="json").items():
        for key, value in values.items():
            yield f"{section}.{key}", as_yaml(_short(value))


def _short(value: Any) -> Any:
    """Return a value of a config without the keys of its groups that are null, and without defaults of its sources."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == SOURCE.keys():
        own = {key: item for key, item in value.items() if item != SOURCE[key]}
        return own["path"] if own.keys() == {"path"} else own
    return {key: _short(item) for key, item in value.items() if item is not None}
