"""Values of several settings to try together: each value or each pair of values once, or every combination."""

import os
from collections.abc import Sequence
from itertools import combinations, cycle, islice, product
from typing import Any


def pairs(*settings: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return few combinations in which any two settings have any two of their values.

    With QLORA_SWEEP=1 in the environment, these are all combinations.

    Args:
        settings: Values of each setting.

    Returns:
        Combinations for `pytest.mark.parametrize`, in an order that is always the same.
    """
    every = list(product(*(range(len(values)) for values in settings)))
    if not os.environ.get("QLORA_SWEEP"):
        every = _covering(every)
    return [tuple(values[place] for values, place in zip(settings, places, strict=True)) for places in every]


def each(*settings: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return fewer combinations than :func:`pairs`, in which each setting has each of its values.

    With QLORA_SWEEP=1 in the environment, these are all combinations.

    Args:
        settings: Values of each setting.
    """
    if os.environ.get("QLORA_SWEEP"):
        return list(product(*settings))
    return list(islice(zip(*map(cycle, settings), strict=False), max(map(len, settings))))


def _covering(every: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Take the combination that adds most pairs, until all pairs are covered."""
    of_each = [set(combinations(enumerate(places), 2)) for places in every]
    missing, taken = set().union(*of_each), []
    while missing:
        best = max(range(len(every)), key=lambda number: len(missing & of_each[number]))
        taken.append(every[best])
        missing -= of_each[best]
    return taken
