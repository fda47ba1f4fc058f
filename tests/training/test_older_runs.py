"""Runs that qlora 0.1.0 (commit 7a44b9f) made still continue, merge and verify.

They are in tests/runs_of_0_1_0: `base` is a random Llama of one layer, `finished` a run of four steps on `rows.jsonl`,
`interrupted` the same run stopped after two, both on a CPU.
"""

import shutil
from pathlib import Path

import pytest
import torch

from qlora.about import __version__
from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import ConfigError, ModelError
from qlora.export import merge
from qlora.model import load_run
from qlora.proof import verify
from qlora.training import assemble, train

pytestmark = pytest.mark.slow

OLDER_RUNS = Path(__file__).parents[1] / "runs_of_0_1_0"


@pytest.fixture
def older_runs(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("they were trained on a CPU, and continue on one")
    folder = Path(shutil.copytree(OLDER_RUNS, tmp_path / "older"))
    for path in (*folder.glob("*/config.yaml"), *folder.glob("*/run.json")):
        path.write_text(path.read_text().replace("{folder}", str(folder)))
    return folder


def resume(folder, *overrides):
    return train(load_config(folder / "config.yaml", [f"train.output_dir={folder}", *overrides]))


def test_an_older_finished_run_is_finished_and_merges(older_runs, tmp_path):
    assert resume(older_runs / "finished").trained_steps == 0
    report = merge(older_runs / "finished", tmp_path / "merged")
    assert report.step == 4
    assert verify(older_runs / "finished", tmp_path / "merged").matches


def test_an_older_interrupted_run_ends_as_it_would_have_then(older_runs, tmp_path):
    result = resume(older_runs / "interrupted")
    assert (result.status, result.steps, result.trained_steps) == ("finished", 4, 2)
    then = RunDirectory(older_runs / "finished").read_metrics()
    # Another processor rounds differently.
    assert result.losses == pytest.approx([line["loss"] for line in then if "loss" in line], abs=1e-2)
    merge(older_runs / "interrupted", tmp_path / "merged")
    assert verify(older_runs / "interrupted", tmp_path / "merged").matches


def test_an_older_finished_run_trains_on(older_runs):
    assert resume(older_runs / "finished", "train.max_steps=5").trained_steps == 1


def test_a_checkpoint_of_an_older_run_loads(older_runs):
    model, tokenizer = load_run(older_runs / "interrupted" / "checkpoints" / "step-000002", "cpu")
    assert not model.training
    assert tokenizer.chat_template is not None


def test_what_an_older_run_can_not_continue_with_is_refused_with_the_versions(older_runs):
    """0.1.0 held out one example of every source, however small."""
    record = older_runs / "interrupted" / "run.json"
    record.write_text(record.read_text().replace('"train": 10', '"train": 9'))
    with pytest.raises(ConfigError, match=rf"number of examples: .*(.|\n)*qlora: 0\.1\.0 → {__version__}\n"):
        resume(older_runs / "interrupted")


def test_an_older_interrupted_run_is_not_checked_for_merging(older_runs, monkeypatch):
    def refuse(*_arguments):
        raise ModelError("its layers can't be merged")

    monkeypatch.setattr(assemble, "check_mergeable", refuse)
    assert resume(older_runs / "interrupted").trained_steps == 2
    with pytest.raises(ModelError, match="can't be merged"):
        resume(older_runs / "interrupted", f"train.output_dir={older_runs / 'new'}")
