"""A run's directory: its checkpoints, its metrics, and recovery from an interrupted write."""

import json

import pytest

from qlora.checkpoint import RunDirectory
from qlora.errors import CheckpointError


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def test_only_folders_with_a_step_are_checkpoints_the_oldest_first(run):
    names = ["step-000003", "step-000020", "step-999999", "step-1000000"]
    for name in [*reversed(names), "step-000200-backup", "step-", "step-x", "old-step-000001", ".step-000004.new"]:
        (run.checkpoints / name).mkdir(parents=True)
    assert [path.name for path in run.list_checkpoints()] == names
    assert run.checkpoint(20).name == "step-000020"
    assert run.checkpoint(1_000_000).name == "step-1000000"


def test_lines_after_a_step_and_an_unfinished_one_are_dropped(run):
    run.path.mkdir()
    lines = [{"step": step} for step in (0, 1, 1, 2)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    assert run.read_metrics() == lines
    run.keep_logs_until(1)
    assert run.metrics.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 1}\n'


def test_leftovers_of_a_killed_process_are_cleared_and_nothing_else_is_touched(run):
    for name in ("step-000002", ".step-000004.new", ".step-000001.gone", ".step-000003.old", "trial", ".trial.new"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "file").write_text(name)
    mine = [run.path / ".mine.new", run.path / ".old", run.checkpoints / ".step-mine.new"]
    for path in [*mine, run.path / ".run.json.new", run.path / ".metrics.jsonl.new"]:
        path.write_text("")
    (run.path / ".adapter.old").mkdir()
    run.clear_leftovers()
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-000002", "step-000003", ".step-mine.new"}
    assert (run.checkpoints / "step-000003" / "file").read_text() == ".step-000003.old"
    assert {path.name for path in run.path.iterdir()} == {"checkpoints", "adapter", ".mine.new", ".old"}


def test_lines_logged_after_a_checkpoint_may_be_damaged(run):
    run.path.mkdir()
    run.metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n\0\0\xff\n{"step": 4}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:4 is damaged"):
        run.read_metrics()
    run.keep_logs_until(2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_damaged_lines_of_samples_are_dropped_and_stop_no_run(run):
    run.path.mkdir()
    run.metrics.write_text('{"step": 1}\n')
    run.samples.write_bytes(b'{"step": 0}\n{"step": 1, "sam{"step": 1}\n{"st\xff\n{"step": 1}\n{"step": 2}\n')
    assert [line["step"] for line in run.read_samples()] == [0, 1, 2]
    run.keep_logs_until(1)
    assert run.samples.read_text() == '{"step": 0}\n{"step": 1}\n'
