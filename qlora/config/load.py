"""YAML and command-line overrides to a RunConfig; all problems are reported together."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qlora.config.convert import recognize
from qlora.config.convert.names import NAMES
from qlora.config.hints import close_names, full_names, nested_section, suggest
from qlora.config.plain_yaml import parse_yaml
from qlora.config.sections import RunConfig
from qlora.config.sections.evaluation import USER_METRIC
from qlora.errors import ConfigError, plain_message


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config. Overrides win over the config, and the config over the defaults.

    Args:
        source: A YAML file, or its sections as a dict: `{"model": {"base": …}, "data": {"train": …}, …}`.
        overrides: `section.key=value`, with the value in YAML: `train.max_steps=100`.

    Raises:
        ConfigError: The file is absent, not YAML or a config of another trainer, or keys or values are invalid; one
            message lists all of them.
    """
    if isinstance(source, Mapping):
        return _validate("config", source, overrides)
    path = Path(source)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "'qlora init' writes one" if path.suffix in (".yaml", ".yml") else "a config is a YAML file"
        raise ConfigError(f"Config file not found: {path} ({hint}).") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a folder, but not a run: it has no config.yaml and run.json. Name a YAML file."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold sections (model, lora, data, eval, train, export), not {values!r:.80}.")
    if (trainer := recognize(values)) is not None:
        raise ConfigError(f"{path} is a config of {trainer}. Convert it with: qlora init --from {path} -o my.yaml")
    return _validate(str(path), values, overrides)


def _validate(name: str, sections: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    values = {section: keys for section, keys in sections.items() if keys is not None}  # all its keys commented out
    for override in overrides:
        _apply_override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_describe(problem) for problem in error.errors()]
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError("\n".join([f"{name} has {count}:", *lines])) from None


def absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with existing paths made absolute, so that its run works from another folder."""

    def resolved(value: object) -> object:
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        return str(path.absolute()) if path is not None and path.exists() else value

    model = config.model.model_copy(update={"base": resolved(config.model.base)})
    paths: dict[str, object] = {}
    if config.data.cache_dir is not None:  # created if it is absent
        paths["cache_dir"] = str(Path(config.data.cache_dir).expanduser().absolute())
    # A word without a suffix of letters, such as llama3.1, is a template's name, no matter which files are here.
    if Path(config.data.chat_template).suffix.strip(".0123456789"):
        paths["chat_template"] = resolved(config.data.chat_template)
    lora = config.lora.model_copy(update={"start_from": resolved(config.lora.start_from)})
    sources = config.data.each_source(lambda source: source.model_copy(update={"path": resolved(source.path)}))
    data, train = sources.model_copy(update=paths), config.train
    if train.keep is not None:
        keep = train.keep.model_copy(update={"null_space": resolved(train.keep.null_space)})
        train = train.model_copy(update={"keep": keep})
    if train.samples is not None:
        samples = train.samples.model_copy(update={"prompts": resolved(train.samples.prompts)})
        train = train.model_copy(update={"samples": samples})
    functions = [USER_METRIC.fullmatch(metric) for metric in config.eval.metrics]
    metrics = [
        metric if found is None else f"{resolved(found['path'])}:{found['function']}"
        for metric, found in zip(config.eval.metrics, functions, strict=True)
    ]
    evaluation = config.eval.model_copy(update={"metrics": metrics})
    return config.model_copy(update={"model": model, "lora": lora, "data": data, "eval": evaluation, "train": train})


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML with every key."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, _ = key.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"Override '{override}' should read section.key=value, as {_meant(section, text)}.")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"Override '{override}': the value can't be read as YAML: {error}") from None
    *outer, name = key.strip().split(".")
    group = values
    for part in outer:
        inner = group.get(part)
        group[part] = group = dict(inner) if isinstance(inner, dict) else {}
    group[name] = value


def _meant(name: str, value: str) -> str:
    """Return an override in full for a key without its section, or an example if no key is close."""
    near = [NAMES[name]] if name in NAMES else full_names(name) or close_names(name)
    keys = [key for key in near if "." in key]
    return f"{keys[0]}={value}" if keys and value else "train.max_steps=100"


def _describe(problem: Any) -> str:
    location = problem["loc"]
    key = _key_of(location)
    if problem["type"] == "extra_forbidden":
        return f"  {key}: unknown key.{suggest(location)}"
    if problem["type"] == "missing" and isinstance(location[-1], str):
        return f"  {key}: missing; it has no default."
    message = plain_message(problem["msg"])
    if problem["type"] == "model_type" and len(location) > 1 and (group := nested_section(*location[:2])):
        message = f"should hold keys: {', '.join(group.model_fields)}"
    return f"  {key}: {problem['input']!r:.200} {message}"


def _key_of(location: Sequence[str | int]) -> str:
    """Return the key as the user wrote it: `section.key`, `train.keep.kl`, or `data.train[0].path` in a list."""
    if len(location) > 2 and nested_section(*location[:2]):
        return ".".join(map(str, location))
    key = ".".join(map(str, location[:2]))
    # Below section.key, pydantic also names the members of a union, which are not in the file.
    for place, (part, name) in enumerate(pairwise(location)):
        if isinstance(part, int):
            return ".".join([f"{key}[{part}]", str(name), *map(str, location[place + 2 :])])
    return key
