"""YAML as plain values: no tags that make objects, no aliases that multiply, nothing but what is written."""

from typing import Any

import yaml

# Most characters of a config, and most values that it may stand for with its aliases written out.
MAX_CHARACTERS, MAX_VALUES = 1 << 20, 100_000


def parse_yaml(text: str) -> Any:
    """Return the values that a YAML text stands for.

    Raises:
        ValueError: It is broken, has tags beyond YAML's own or a key twice, or stands for more than any config.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters, and {MAX_CHARACTERS} are the most")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        if _count_values(node, {}) > MAX_VALUES:
            raise ValueError(f"its aliases stand for more than {MAX_VALUES} values")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # PyYAML raises Python's own errors for an impossible date, broken base64 or an unhashable key.
    except (yaml.YAMLError, TypeError, AttributeError, OverflowError, LookupError) as error:
        raise ValueError(str(error)) from None


def _count_values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Return the number of values below a node, aliases written out; `known` has those of seen nodes, None if open."""
    if id(node) not in known:
        known[id(node)] = None
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(set(names)) < len(names):
                raise ValueError(f"a key is there twice: {next(name for name in names if names.count(name) > 1)}")
            children = [each for pair in children for each in pair]
        known[id(node)] = 1 + sum(_count_values(child, known) for child in children)
    count = known[id(node)]
    if count is None:
        raise ValueError("an alias stands for what it is part of")
    return count
