"""YAML and command-line overrides into a RunConfig; all problems told at once."""

import difflib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from qlora.config.aliases import ALIASES
from qlora.config.plain_yaml import parse_yaml
from qlora.config.sections import RunConfig, SourceSection
from qlora.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file. Precedence: overrides, then the file, then defaults.

    Args:
        path: A YAML file.
        overrides: `section.key=value`, the value in YAML: `train.max_steps=100`.

    Raises:
        ConfigError: The file is absent or no YAML, or keys or values are wrong: all of them in one message.
    """
    path = Path(path)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "'qlora init' writes one" if path.suffix in (".yaml", ".yml") else "a config is a YAML file"
        raise ConfigError(f"Config file not found: {path} ({hint}).") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, and no run's: it has no config.yaml and run.json.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold sections (model, lora, data, train, export), not {values!r:.80}.")
    values = {section: keys for section, keys in values.items() if keys is not None}  # all its keys commented out
    for override in overrides:
        _apply_override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_describe(problem) for problem in error.errors()]
        raise ConfigError("\n".join([f"{path}: {len(lines)} problem(s)", *lines])) from None


def absolute_paths(config: RunConfig) -> RunConfig:
    """The config with every path that is here made absolute, so that a run is found again from another folder."""

    def resolved(value: object) -> object:
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        return str(path.absolute()) if path is not None and path.exists() else value

    model = config.model.model_copy(update={"base": resolved(config.model.base)})
    paths: dict[str, object] = {}
    for key in ("train", "eval"):
        sources = getattr(config.data, key)
        if isinstance(sources, list):
            paths[key] = [source.model_copy(update={"path": resolved(source.path)}) for source in sources]
    if config.data.cache_dir is not None:  # it is made if it is not there
        paths["cache_dir"] = str(Path(config.data.cache_dir).expanduser().absolute())
    # A word without a suffix of letters, such as llama3.1, is a template's name, no matter which files are here.
    if Path(config.data.chat_template).suffix.strip(".0123456789"):
        paths["chat_template"] = resolved(config.data.chat_template)
    return config.model_copy(update={"model": model, "data": config.data.model_copy(update=paths)})


def dump_config(config: RunConfig) -> str:
    """The config as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"Override '{override}' should read section.key=value, as train.max_steps=100.")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"Override '{override}': the value can't be read as YAML: {error}") from None
    group = values.get(section)
    values[section] = {**(group if isinstance(group, dict) else {}), name: value}


def _describe(problem: Any) -> str:
    location = problem["loc"]
    key = _key_of(location)
    if problem["type"] == "extra_forbidden":
        return f"  {key}: unknown key.{_suggest(location)}"
    if problem["type"] == "missing" and isinstance(location[-1], str):
        return f"  {key}: missing; it has no default."
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return f"  {key}: {problem['input']!r:.200} {message}"


def _key_of(location: Sequence[str | int]) -> str:
    """What a user wrote: `section.key`, and of a source in a list `data.train[0].path`."""
    key = ".".join(map(str, location[:2]))
    # Below section.key pydantic also names the members of a union, which a user never wrote.
    for place, (part, name) in enumerate(pairwise(location)):
        if isinstance(part, int):
            return ".".join([f"{key}[{part}]", str(name), *map(str, location[place + 2 :])])
    return key


def _suggest(location: Sequence[str | int]) -> str:
    name = str(location[-1])
    if len(location) > 2:  # of a source
        near = difflib.get_close_matches(name, SourceSection.model_fields, n=1)
        if near:
            return f" Did you mean {near[0]}?"
    if name in ALIASES:
        return f" Here it is {ALIASES[name]}."
    sections = {section: _keys_of(section) for section in RunConfig.model_fields}
    exact = [f"{section}.{name}" for section, keys in sections.items() if name in keys]
    if exact:
        return f" Did you mean {' or '.join(exact)}?"
    if len(location) == 1:
        near = difflib.get_close_matches(name, sections, n=1)
    else:
        section = str(location[0])
        near = [f"{section}.{key}" for key in difflib.get_close_matches(name, sections[section], n=1)]
    near += [
        f"{section}.{key}"
        for section, keys in sections.items()
        for key in difflib.get_close_matches(name, keys, n=1, cutoff=0.8)
    ]
    return f" Did you mean {near[0]}?" if near else ""


def _keys_of(section: str) -> list[str]:
    annotation = RunConfig.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return list(annotation.model_fields)
