"""Runs and their merged folders."""

import shutil

import pytest

from qlora.config import load_config
from qlora.export import merge
from qlora.training import train
from tests.tiny import make_base, run_config


@pytest.fixture(scope="session")
def merged(tiny_base, alpaca_file, tmp_path_factory):
    """A run and its merged folder; not to be changed."""
    folder = tmp_path_factory.mktemp("verify")
    train(load_config(run_config(tiny_base, alpaca_file, folder / "run")))
    merge(folder / "run", folder / "out")
    return folder


@pytest.fixture(scope="session")
def tied(alpaca_file, tmp_path_factory):
    """The same with a base whose head is tied to its embedding; not to be changed."""
    folder = tmp_path_factory.mktemp("tied")
    base = make_base(folder / "base", seed=2, tie_word_embeddings=True)
    train(load_config(run_config(base, alpaca_file, folder / "run", train__max_steps=2)))
    merge(folder / "run", folder / "out")
    return folder


@pytest.fixture
def own(merged, tmp_path):
    """A copy of `merged` that a test may change."""
    for name in ("run", "out"):
        shutil.copytree(merged / name, tmp_path / name)
    return tmp_path
