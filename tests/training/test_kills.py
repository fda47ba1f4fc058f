"""Real processes, killed at random moments: a short form of scripts/dev/kill_runs.py."""

import random

import pytest

from scripts.dev import kills
from tests.tiny import run_config
from tests.training.ranks import needs_fork


@needs_fork
@pytest.mark.slow
def test_killed_runs_continue_and_end_like_uninterrupted_ones(tiny_base, alpaca_file, tmp_path, seed):
    config = run_config(tiny_base, alpaca_file, tmp_path / "config", train__max_steps=12, lora__dropout=0.1)
    recipe = kills.Recipe("tiny", config, save_every=2, warm=True)
    counts = kills.kill_often(recipe, tmp_path, 2, random.Random(seed))
    assert counts.kills == counts.continued == 2
    assert counts.differing == 0
    assert counts.most_lost <= 2
