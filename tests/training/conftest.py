"""Fixtures of training runs that are interrupted."""

import os
import signal

import pytest

from qlora.config import load_config
from qlora.training.metrics import MetricsLog
from tests.tiny import run_config


@pytest.fixture
def interrupt_after(monkeypatch):
    """Sends this process a signal while the given step is at hand."""

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
    def build(name="run", **settings):
        settings = {"lora__dropout": 0.1, "train__eval_every": 2, "train__save_every": 100, **settings}
        return load_config(run_config(tiny_base, alpaca_file, tmp_path / name, **settings))

    return build
