"""Random seeds of a step, computed from the run's seed, the step, and the process or the document."""

from collections.abc import Iterable

import torch

# Constants of xxHash (https://xxhash.com) and of the length that CPython's hash of a tuple mixes in.
PRIME_1, PRIME_2, PRIME_5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
LENGTH_SALT = 3527539
MASK = (1 << 64) - 1
# Integers enter modulo this prime.
MODULUS = (1 << 61) - 1
# Keeps the seeds of documents apart from those of processes.
DOCUMENT = 1


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed torch for a step on a process, so that a resumed run draws the same dropout."""
    torch.manual_seed(step_seed(seed, step, process))


def document_seeds(seed: int, step: int, documents: Iterable[int]) -> list[int]:
    """Return a seed for each document of a step, by its index: it does not depend on how documents are batched."""
    return [step_seed(seed, step, DOCUMENT, document) for document in documents]


def step_seed(*numbers: int) -> int:
    """Mix non-negative integers into a seed, a signed 64-bit integer.

    It equals `hash(numbers)` in 64-bit CPython since 3.8, which Python does not guarantee: a run's dropout depends on
    the seed, so it must not change with Python.
    """
    mixed = PRIME_5
    for number in numbers:
        mixed = mixed + number % MODULUS * PRIME_2 & MASK
        mixed = (mixed << 31 | mixed >> 33) * PRIME_1 & MASK
    mixed = mixed + (len(numbers) ^ PRIME_5 ^ LENGTH_SALT) & MASK
    return mixed - (1 << 64) if mixed >> 63 else mixed
