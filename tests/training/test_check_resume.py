"""`qlora doctor --check-resume`: passes a config whose run continues exactly, and finds one that does not."""

import json
import multiprocessing
from importlib import import_module
from pathlib import Path

import pytest

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.training import train
from tests.cli import run
from tests.tiny import run_config
from tests.training.ranks import needs_fork

pytestmark = pytest.mark.slow

module = import_module("qlora.training.check_resume")


@pytest.fixture
def config(tiny_base, alpaca_file, tmp_path):
    """Return the config of an existing run, which must not be changed."""
    return run_config(tiny_base, alpaca_file, tmp_path / "run", train__trackers=["none-such"], lora__dropout=0.1)


@pytest.fixture
def here(monkeypatch):
    """Run the sessions in this process, where a test can change them."""

    def arrange(meddle=lambda config, stop_at: config):
        def train_here(config, run, stop_at=None):
            values = {"output_dir": str(run.path), "max_steps": 4, "eval_every": 2, "trackers": []}
            config = config.model_copy(update={"train": config.train.model_copy(update=values)})
            return train(meddle(config, stop_at), stop_at=stop_at)

        monkeypatch.setattr(module, "_train_in_process", train_here)

    return arrange


def test_a_session_is_a_process_of_its_own(config, tmp_path):
    apart = RunDirectory(tmp_path / "apart")
    assert module._train_in_process(load_config(config), apart, 1).steps == 1
    assert apart.list_checkpoints() == [apart.checkpoint(1)]


@needs_fork
def test_a_run_that_continues_exactly_is_reported_and_leaves_nothing(config, tmp_path, monkeypatch):
    """In three forked processes, which share their imports."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr("multiprocessing.get_context", lambda method: fork)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("mine")
    report = run("doctor", "--check-resume", config, "--json").json()
    assert report == {"matches": True, "steps": 4, "stopped_after": 2, "differing": [], "repeats": None}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.yaml"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_run_that_does_not_is_reported_with_the_differences(config, here, monkeypatch):
    restore = import_module("qlora.training.prepare").load_state

    def forget(folder, model, optimizer, ranks):
        progress = restore(folder, model, optimizer, ranks)
        optimizer.generator.manual_seed(7)  # of the rounding
        return progress

    monkeypatch.setattr("qlora.training.prepare.load_state", forget)
    here()
    done = run("doctor", "--check-resume", config)
    assert done.code == 1
    assert "its resume is not exact" in done.out
    assert "adapter/adapter_model.safetensors" in done.out
    assert "checkpoints/step-000004/optimizer.safetensors" in done.out
    assert "step 4, loss: " in done.out


def test_a_machine_that_does_not_repeat_its_results_is_reported_as_such(config, here):
    seeds = iter(range(9))

    def meddle(config, stop_at):
        return config.model_copy(
            update={"train": config.train.model_copy(update={"learning_rate": 1e-3 + next(seeds) * 1e-5})}
        )

    here(lambda config, stop_at: config if "stopped" in config.train.output_dir else meddle(config, stop_at))
    done = run("doctor", "--check-resume", config, "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert (report["matches"], report["repeats"]) == (False, False)
    assert not list(Path(config).parent.glob(".check-resume-*"))


def test_a_config_that_can_not_be_run_is_reported(tmp_path):
    done = run("doctor", "--check-resume", tmp_path / "none.yaml")
    assert done.code == 2
    assert "none.yaml" in done.error()


def test_an_unwritable_folder_is_reported(tiny_base, alpaca_file, tmp_path):
    config = run_config(tiny_base, alpaca_file, tmp_path / "run")
    values = json.loads(config.read_text())
    values["train"]["output_dir"] = "/proc/run"
    config.write_text(json.dumps(values))
    done = run("doctor", "--check-resume", config)
    assert done.code == 1
    assert "/proc can't be written" in done.error()
