"""Every key with its type, default, range, meaning and example, read from the sections."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from qlora.config.sections import RunConfig
from qlora.errors import ConfigError

# A source is a group of keys inside `data.train`, `data.eval` and `data.retain`.
SOURCE = "data.train[]"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a config.

    Attributes:
        name: Full name, `train.learning_rate` or `train.keep.kl`; of a key of a source, `data.train[].path`.
        type: What a value may be: the choices, or the kinds of value.
        range: Bounds of a number, empty if it has none.
        default: Default in YAML; None if the key is required.
        meaning: One or two sentences.
        example: A value in YAML.
    """

    name: str
    type: str
    range: str
    default: str | None
    meaning: str
    example: str

    @property
    def group(self) -> str:
        """The section, a key that holds a group, such as `train.keep`, or `data.train[]`."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The name inside its group."""
        return self.name.rpartition(".")[2]


def list_keys() -> list[Key]:
    """Return every key in the order of the sections, then those of groups inside them and of a source."""
    return list(_keys())


def group_meanings() -> dict[str, str]:
    """Return what each group of keys holds, by its name."""
    schema = json_schema()
    return {group: schema["$defs"][name]["description"] for group, name in _groups(schema).items()}


def find_keys(name: str) -> list[Key]:
    """Return the keys that a name stands for: one key, the keys of a section, or a key without its section.

    Raises:
        ConfigError: No key has the name; the closest names are listed.
    """
    keys = list_keys()
    wanted = name.replace("data.eval[]", SOURCE).replace("data.retain[]", SOURCE)
    found = [key for key in keys if wanted in (key.name, key.group)] or [key for key in keys if key.key == wanted]
    if found:
        return found
    near = difflib.get_close_matches(wanted, [key.name for key in keys], n=3)
    near += [key.name for key in keys if key.key in difflib.get_close_matches(wanted.rpartition(".")[2], [key.key])]
    hint = f" Closest: {', '.join(dict.fromkeys(near))}." if near else " 'qlora explain' lists all."
    raise ConfigError(f"There is no key '{name}'.{hint}")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A config of qlora"}


def as_yaml(value: object) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _keys() -> Iterator[Key]:
    schema = json_schema()
    for group, definition in _groups(schema).items():
        section = schema["$defs"][definition]
        for name, field in section["properties"].items():
            yield Key(
                name=f"{group}.{name}",
                type=_type_of(field),
                range=", ".join(dict.fromkeys(_bounds(field))),
                default=None if name in section.get("required", ()) else as_yaml(field["default"]),
                meaning=field["description"],
                example=as_yaml(field["examples"][0]),
            )


def _groups(schema: dict[str, Any]) -> dict[str, str]:
    """Return the name of each group's definition in the schema."""
    sections = {name: field["$ref"].rpartition("/")[2] for name, field in schema["properties"].items()}
    nested = {
        f"{section}.{name}": definition
        for section, owner in sections.items()
        for name, field in schema["$defs"][owner]["properties"].items()
        for part in _parts(field)
        if (definition := part.get("$ref", "").rpartition("/")[2]) not in ("", "SourceSection")
    }
    return {**sections, **nested, SOURCE: "SourceSection"}


def _parts(field: dict[str, Any]) -> list[dict[str, Any]]:
    return field.get("anyOf") or field.get("oneOf") or [field]


def _type_of(field: dict[str, Any]) -> str:
    names = list(dict.fromkeys(_type_of_part(part) for part in _parts(field)))
    if "number" in names and "integer" in names:
        names.remove("integer")
    if all("enum" in part for part in _parts(field)):
        return " | ".join(names)
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _type_of_part(part: dict[str, Any]) -> str:
    if "$ref" in part:
        return "source" if part["$ref"].endswith("/SourceSection") else "mapping"
    if "enum" in part:
        return " | ".join(value if isinstance(value, str) else json.dumps(value) for value in part["enum"])
    if "const" in part:
        return str(part["const"])
    if part["type"] == "array":
        items = part.get("prefixItems") or [part["items"]]
        return f"list of {len(items)} numbers" if "prefixItems" in part else f"list of {_type_of(items[0])}"
    if part["type"] == "object":
        return "mapping"
    return str(part["type"])


def _bounds(field: dict[str, Any]) -> Iterator[str]:
    for part in _parts(field):
        for bound, sign in BOUNDS.items():
            if bound in part and part[bound] < 1 << 32:
                yield f"{sign} {part[bound]:g}"
        yield from (bound for item in part.get("prefixItems", ()) for bound in _bounds(item))
