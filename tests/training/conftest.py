"""Fixtures of training runs that are interrupted."""

import os
import shutil
import signal

import pytest

from qlora.config import load_config
from qlora.training import train
from qlora.training.metrics import MetricsLog
from tests.moe import make_moe
from tests.tiny import run_config

SETTINGS = {"lora__dropout": 0.1, "train__eval_every": 2, "train__save_every": 100}


@pytest.fixture(scope="session")
def moe_base(tmp_path_factory):
    """A tiny base with experts."""
    return make_moe(tmp_path_factory.mktemp("moe") / "base", "mixtral", seed=0)


@pytest.fixture(params=["tiny_base", "moe_base"], ids=["dense", "experts"])
def any_base(request):
    """A base without experts, and one with them."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def interrupt_after(monkeypatch):
    """Send this process a signal during the given step."""

    def arrange(step, number=signal.SIGINT):
        original = MetricsLog.log_step

        def log_step(self, progress, report):
            original(self, progress, report)
            if progress.step == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(MetricsLog, "log_step", log_step)

    yield arrange
    monkeypatch.undo()


@pytest.fixture
def configure(tiny_base, alpaca_file, tmp_path):
    """Build a config whose run is in `tmp_path`."""

    def build(name="run", **settings):
        return load_config(run_config(tiny_base, alpaca_file, tmp_path / name, **(SETTINGS | settings)))

    return build


@pytest.fixture(scope="session")
def whole(tiny_base, alpaca_file, tmp_path_factory):
    """The folder of a finished run of `configure()`; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(load_config(run_config(tiny_base, alpaca_file, folder, **SETTINGS)))
    return folder


@pytest.fixture(scope="session")
def stopped_run(tiny_base, alpaca_file, tmp_path_factory):
    """The folder of a run of `configure()` that was stopped after two steps; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(load_config(run_config(tiny_base, alpaca_file, folder, **SETTINGS)), stop_at=2)
    return folder


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """Return a copy of the stopped run where `configure()` has its run."""
    return shutil.copytree(stopped_run, tmp_path / "run")
