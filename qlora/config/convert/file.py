"""Conversion of another trainer's file."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora.config.convert.command import parse_command
from qlora.config.convert.detect import TRAINERS, Trainer, detect
from qlora.config.convert.draft import Draft
from qlora.config.convert.write import config_text, summary_lines
from qlora.config.plain_yaml import MAX_CHARACTERS, parse_yaml
from qlora.config.sections import RunConfig
from qlora.config.sections.train import TOKEN_LOSS_OBJECTIVES
from qlora.errors import ConfigError, plain_message

# Values of required keys that the other config does not set.
PLACEHOLDERS = {
    "model.base": "path/to/base",
    "data.train": [{"path": "data/train.jsonl"}],
    "train.output_dir": "runs/converted",
}


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted config.

    Attributes:
        text: The config of ours, with comments.
        draft: How each key was handled: what was dropped and why, and what to check.
    """

    text: str
    draft: Draft

    @property
    def summary(self) -> list[str]:
        """Lines that say what was dropped and why."""
        return summary_lines(self.draft)


def convert_file(path: Path, template_file: str = "chat_template.jinja") -> Conversion:
    """Convert a config of another trainer.

    Args:
        path: YAML, or a shell script or text file with a command line.
        template_file: Name for a chat template that is written inside the config.

    Raises:
        ConfigError: The file can't be read, or is of an unknown trainer, or is a config of qlora.
    """
    trainer, values, program = _read(path)
    draft = Draft(trainer.name, values, program, [path.name, path.absolute().parent.name])
    trainer.translate(draft, path.parent)
    if draft.template is not None:
        draft.set("data.chat_template", template_file, "written in the original")
    for key, value in PLACEHOLDERS.items():
        if draft.values.get(key) in (None, []):
            draft.values.pop(key, None)
            draft.set(key, value, "not in the original: set it")
            draft.warn(f"{key} is not in the original; set it.")
    draft.drop_rest()
    _drop_unused(draft)
    _drop_invalid(draft)
    order = [f"{section}.{key}" for section, keys in _all_keys().items() for key in keys]
    draft.values = {key: draft.values[key] for key in order if key in draft.values}
    return Conversion(config_text(draft, path.name), draft)


def recognize(values: Any) -> str | None:
    """Return the name of the trainer that a YAML file's values are for; None if they are ours or unknown."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values) or is_ours(values):
        return None
    found = detect(values)
    return None if found is None else found[0].name


def is_ours(values: dict[str, Any]) -> bool:
    """Return whether values have a section with one of our keys in it."""
    sections = _all_keys()
    return any(isinstance(keys, dict) and keys.keys() & {*sections.get(name, ())} for name, keys in values.items())


def _read(path: Path) -> tuple[Trainer, dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there; --from takes a config of another trainer.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{path} has {len(text)} characters; a config has {MAX_CHARACTERS} at most.")
    try:
        values = parse_yaml(text)
    except ValueError as error:
        values = None if path.suffix not in (".yaml", ".yml") else error
    if isinstance(values, ValueError):
        raise ConfigError(f"{path} can't be read as YAML: {values}")
    program = ""
    if not isinstance(values, dict):
        program, values = parse_command(text) or ("", {})
    values = {str(name): value for name, value in values.items()}
    if is_ours(values):
        raise ConfigError(f"{path} is a config of qlora already.")
    found = detect(values, program)
    if found is None:
        names = ", ".join(trainer.name for trainer in TRAINERS)
        raise ConfigError(f"{path} is not recognized as a config of {names}: it has few or none of their keys.")
    return *found, program


def _drop_unused(draft: Draft) -> None:
    """Leave out keys that have no meaning for rows of the objective, which other trainers ignore for them, too."""
    if draft.values.get("train.objective", "sft") in TOKEN_LOSS_OBJECTIVES:
        return
    unused = ["data.loss_on"] if "data.loss_on" in draft.values else []
    unused += ["data.overlong"] if draft.values.get("data.overlong") == "split" else []
    for key in unused:
        del draft.values[key]
        name = draft.comments.pop(key)
        if name in draft.translated:
            draft.drop(name, f"rows of {draft.values['train.objective']} are learned whole")


def _drop_invalid(draft: Draft) -> None:
    """Leave out invalid values, with a warning, so that the result loads."""
    for _ in range(len(draft.values)):
        values: dict[str, dict[str, Any]] = {}
        for key, value in draft.values.items():
            section, _, name = key.partition(".")
            values.setdefault(section, {})[name] = value
        try:
            RunConfig.model_validate(values)
            return
        except ValidationError as error:
            for problem in error.errors():
                reason = plain_message(problem["msg"])
                where = problem["loc"][:2]
                if len(where) == 1:  # keys that contradict each other: each sentence begins with the one to change
                    keys = [f"{where[0]}.{name}" for name in re.findall(r"(?:^|; )(\w+)", reason)]
                else:
                    keys, reason = [".".join(map(str, where))], f"{problem['input']!r:.80} {reason}"
                for key in keys:
                    if key in draft.values:
                        draft.warn(f"{key} ({draft.comments.pop(key)}) is left out: {reason}.")
                        del draft.values[key]
            for key, value in PLACEHOLDERS.items():
                draft.set(key, value, "set it")


def _all_keys() -> dict[str, list[str]]:
    return {name: list(field.annotation.model_fields) for name, field in RunConfig.model_fields.items()}  # type: ignore[union-attr]
