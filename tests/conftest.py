"""Fixtures that every folder shares."""

import os
import random

import pytest
import torch

# Tests are small: a second thread gains nothing, and where the cores are shared it waits a hundred times longer.
torch.set_num_threads(1)


@pytest.fixture
def seed() -> int:
    """A fresh seed for each test; a failure shows it, and QLORA_TEST_SEED brings it back."""
    seed = int(os.environ.get("QLORA_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"QLORA_TEST_SEED={seed}")
    return seed


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """The source of a test's random inputs."""
    return torch.Generator().manual_seed(seed)
