"""Suggestions for unknown keys."""

import difflib
from collections.abc import Sequence

from pydantic import BaseModel

from qlora.config.convert.dropped import drop_reason
from qlora.config.convert.names import NAMES
from qlora.config.sections import RunConfig, SourceSection

# Least similarity of a name at the top level to a section for which it is taken.
SECTION_CUTOFF = 0.75


def suggest(location: Sequence[str | int]) -> str:
    """Return a sentence that suggests the key that was meant, with a leading blank; empty if nothing is close.

    Args:
        location: Where pydantic found the key: section, key, and for a key of a source its place.
    """
    name = str(location[-1])
    if len(location) > 2:  # a key of a source
        near = difflib.get_close_matches(name, SourceSection.model_fields, n=1)
        if near:
            return f" Did you mean {near[0]}?"
    if name in NAMES:
        return f" Here it is {NAMES[name]}."
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


def keys_of(section: str) -> list[str]:
    """Return the keys of a section."""
    annotation = RunConfig.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return list(annotation.model_fields)
