"""A run's directory: which folders are its checkpoints, and records that are none."""

import json

import pytest

from qlora.checkpoint import RunDirectory
from qlora.checkpoint.run_dir import RECORD_KEYS
from qlora.errors import CheckpointError


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def test_checkpoints_are_those_with_a_step_alone_the_oldest_first(run):
    names = ["step-000003", "step-000020", "step-999999", "step-1000000"]
    for name in [*reversed(names), "step-000200-backup", "step-", "step-x", "old-step-000001", ".step-000004.new"]:
        (run.checkpoints / name).mkdir(parents=True)
    assert [path.name for path in run.list_checkpoints()] == names
    assert run.checkpoint(20).name == "step-000020"
    assert run.checkpoint(1_000_000).name == "step-1000000"


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"status": "finished"}'])
def test_a_record_of_something_else_is_refused(run, text):
    run.path.mkdir()
    run.record.write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json lacks .*base, .*not written by qlora train"):
        run.read_record()


@pytest.mark.parametrize("lost", RECORD_KEYS)
def test_a_record_without_a_key_is_refused_by_it(run, lost):
    run.write_record({key: {} for key in RECORD_KEYS})
    assert set(run.read_record()) == set(RECORD_KEYS)
    run.write_record({key: {} for key in RECORD_KEYS if key != lost})
    with pytest.raises(CheckpointError, match=rf"run\.json lacks {lost};"):
        run.read_record()


def test_lines_after_a_step_are_dropped_with_the_unfinished_one(run):
    run.path.mkdir()
    lines = [{"step": step} for step in (0, 1, 1, 2)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    assert run.read_metrics() == lines
    run.keep_metrics_until(1)
    assert run.metrics.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 1}\n'
