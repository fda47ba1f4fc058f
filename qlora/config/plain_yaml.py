"""YAML as plain values: no tags that create objects, no duplicate keys, and aliases only up to a limit."""

import copy
from functools import lru_cache
from typing import Any

import yaml

# More than any config needs: characters, and values with every alias expanded.
MAX_CHARACTERS, MAX_VALUES = 1 << 20, 100_000


def parse_yaml(text: str) -> Any:
    """Return the values of a YAML text.

    Raises:
        ValueError: The text is not YAML, has tags that are not YAML's own or a duplicate key, or is too large.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MAX_CHARACTERS:,} are allowed")
    try:
        return copy.deepcopy(_parse(text))  # the caller may change it
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@lru_cache(maxsize=4)  # a verb reads the config of its run in many places, and PyYAML is slow
def _parse(text: str) -> Any:
    try:
        # In Python, not libyaml: its composer recurses on the C stack, which deep nesting would overflow.
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > MAX_VALUES:
            raise ValueError(f"its aliases expand to more than {MAX_VALUES:,} values")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_in_one_line(error)) from None
    # PyYAML raises Python's own errors for invalid dates, invalid base64 and keys that can't be hashed.
    except (yaml.YAMLError, TypeError, AttributeError, OverflowError, LookupError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _in_one_line(error: yaml.MarkedYAMLError) -> str:
    """Return where a text is not YAML, and why; PyYAML's own message has five lines."""
    mark, start = error.problem_mark or error.context_mark, error.context_mark
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    begun = (
        "" if mark is None or start is None or start.line == mark.line else f" (which starts in line {start.line + 1})"
    )
    return place + " ".join(text for text in (error.context and error.context + begun, error.problem) if text)


def _count_values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Count the values below a node with every alias expanded; `known` has those of nodes seen, None for open ones."""
    if id(node) not in known:
        known[id(node)] = None
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(set(names)) < len(names):
                raise ValueError(f"a key appears twice: {next(name for name in names if names.count(name) > 1)}")
            children = [each for pair in children for each in pair]
        known[id(node)] = 1 + sum(_count_values(child, known) for child in children)
    count = known[id(node)]
    if count is None:
        raise ValueError("an alias refers to a value that contains it")
    return count
