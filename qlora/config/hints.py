"""Suggestions for unknown keys."""

import difflib
from collections.abc import Sequence
from typing import get_args

from pydantic import BaseModel

from qlora.config.convert.dropped import drop_reason
from qlora.config.convert.names import NAMES
from qlora.config.sections import RunConfig, SourceSection
from qlora.config.sections.base import Section

# Least similarity of a name at the top level to a section for which it is taken.
SECTION_CUTOFF = 0.75


def suggest(location: Sequence[str | int]) -> str:
    """Return a sentence that suggests the key that was meant, with a leading blank; empty if nothing is close.

    Args:
        location: Where pydantic found the key: section, key, and inside of that the place of a source or a key.
    """
    name = str(location[-1])
    if len(location) > 2:
        group = nested_section(*location[:2]) or SourceSection
        near = difflib.get_close_matches(name, group.model_fields, n=1)
        if near:
            return f" Did you mean {near[0]}?"
    if name in NAMES:
        return f" In qlora, it is {NAMES[name]}."
    exact = full_names(name)
    if exact:
        return f" Did you mean {' or '.join(exact)}?"
    near = close_names(name, None if len(location) == 1 else str(location[0]))
    is_misspelt = bool(near) and bool(difflib.get_close_matches(name, [near[0].rpartition(".")[2]], cutoff=0.88))
    if (found := drop_reason(name)) is not None and not is_misspelt:
        return f" It has no counterpart: {found[0]}."
    return f" Did you mean {near[0]}?" if near else ""


def full_names(name: str) -> list[str]:
    """Return the full names of the keys that have this name, in any section."""
    return [f"{section}.{name}" for section in RunConfig.model_fields if name in keys_of(section)]


def close_names(name: str, section: str | None = None) -> list[str]:
    """Return sections and keys with a similar name; those in the given section first.

    Args:
        name: A section or a key.
        section: The section that the key is in, which is searched first; None at the top level.
    """
    if section is None:
        near = difflib.get_close_matches(name, RunConfig.model_fields, n=1, cutoff=SECTION_CUTOFF)
    else:
        near = [f"{section}.{key}" for key in difflib.get_close_matches(name, keys_of(section), n=1)]
    for other in RunConfig.model_fields:
        near += [f"{other}.{key}" for key in difflib.get_close_matches(name, keys_of(other), n=1, cutoff=0.8)]
    return near


def nested_section(section: str | int, key: str | int) -> type[Section] | None:
    """Return the class of the group of keys that a key holds, such as `train.keep`; None for other keys."""
    if section not in RunConfig.model_fields or key not in keys_of(str(section)):
        return None
    owner = RunConfig.model_fields[str(section)].annotation
    assert isinstance(owner, type)
    assert issubclass(owner, BaseModel)
    parts = get_args(owner.model_fields[str(key)].annotation)
    groups = (part for part in parts if isinstance(part, type) and issubclass(part, Section))
    return next((group for group in groups if group is not SourceSection), None)


def keys_of(section: str) -> list[str]:
    """Return the keys of a section."""
    annotation = RunConfig.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return list(annotation.model_fields)
