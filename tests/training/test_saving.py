"""Saves: tried before the first step, made on request, and handled if they fail."""

import errno
import os
import shutil
import signal

import pytest

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import CheckpointError
from qlora.files.log_file import LogFile
from qlora.training import plan_run, train
from qlora.training import saving as saving_module
from qlora.training.metrics import MetricsLog
from tests.tiny import run_config
from tests.training.same_run import assert_same_run, lines_of

pytestmark = pytest.mark.slow


@pytest.fixture
def configure(tiny_base, alpaca_file, tmp_path):
    def build(name="run", **settings):
        settings = {"train__save_every": 2, "train__eval_every": 3, **settings}
        return load_config(run_config(tiny_base, alpaca_file, tmp_path / name, **settings))

    return build


@pytest.fixture
def after_step(monkeypatch):
    """Call a function after a step is logged."""

    def arrange(step, happen):
        original = MetricsLog.log_step

        def log_step(self, progress, report):
            original(self, progress, report)
            if progress.step == step:
                happen()

        monkeypatch.setattr(MetricsLog, "log_step", log_step)

    return arrange


@pytest.fixture
def disk(monkeypatch):
    """A disk whose free space a test sets; None is the real one's."""

    class Disk:
        free = None

        def fill(self):
            self.free = 1000

        def clear(self):
            self.free = None

    disk, real = Disk(), shutil.disk_usage

    def usage(path):
        found = real(path)
        return found if disk.free is None else found._replace(free=disk.free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return disk


def saved_steps(tmp_path, name="run"):
    return [path.name for path in RunDirectory(tmp_path / name).list_checkpoints()]


@pytest.mark.parametrize("call", [train, plan_run])
def test_too_little_space_is_reported_before_anything_is_written(call, configure, disk, tmp_path):
    disk.fill()
    wanted = r"run needs space for 3 checkpoints of \d\.\d MB and the final adapter, \d\.\d MB in all, but only 0\.0 MB"
    with pytest.raises(CheckpointError, match=wanted):
        call(configure())
    with pytest.raises(CheckpointError, match="needs space for 1 checkpoints"):
        call(configure(train__save_every=None))
    assert not (tmp_path / "run").exists()


def test_room_is_asked_for_only_for_what_is_not_there_yet(configure, disk, tmp_path):
    train(configure(), stop_at=4)
    disk.free = 2_000_000  # one checkpoint and the adapter, not three checkpoints
    with pytest.raises(CheckpointError, match="needs space for 3 checkpoints"):
        plan_run(configure("other"))
    assert train(configure()).status == "finished"


def test_a_save_is_tried_before_the_first_step(configure, tmp_path, monkeypatch):
    tried = []

    def refuse(folder, *_, **__):
        tried.append(folder.name)
        raise CheckpointError("refused")

    with monkeypatch.context() as patched:
        patched.setattr(saving_module, "save_checkpoint", refuse)
        with pytest.raises(CheckpointError, match="refused"):
            train(configure())
    assert tried == ["trial"]
    assert lines_of(tmp_path / "run") == []
    assert train(configure()).status == "finished"
    assert not (tmp_path / "run" / "checkpoints" / "trial").exists()


def test_a_run_outlives_a_save_that_fails(configure, after_step, disk, tmp_path, monkeypatch, capsys):
    train(configure("whole"))
    capsys.readouterr()
    after_step(3, disk.fill)
    after_step(5, disk.clear)
    assert train(configure(), show_progress=True).status == "finished"
    message = capsys.readouterr().err
    assert message.count("could not be saved") == 1
    assert "Step 4 could not be saved, and step-000002 is the last one saved." in message
    assert "step-000004 can't be written: [Errno 28] No space left on device. It takes " in message
    assert " 0.0 MB are free there. The run continues" in message
    assert saved_steps(tmp_path) == ["step-000002", "step-000006"]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("steps", "stop_at"), [(20, None), (20, 3), (4, None)])
def test_a_run_stops_when_saves_fail_again_and_again_or_the_last_one_does(
    steps, stop_at, configure, after_step, disk, tmp_path, monkeypatch
):
    settings = {"train__max_steps": steps, "data__eval": None}
    train(configure("whole", **settings))
    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "log_step", MetricsLog.log_step)
        after_step(3, disk.fill)
        with pytest.raises(CheckpointError, match=r"could not be saved, and step-000002 is the last one saved"):
            train(configure(**settings), stop_at=stop_at)
    assert lines_of(tmp_path / "run")[-1]["step"] == min(steps, stop_at or 8)
    assert saved_steps(tmp_path) == ["step-000002"]
    disk.clear()
    assert train(configure(**settings)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_old_checkpoint_that_can_not_be_removed_fails_no_save(configure, tmp_path, monkeypatch):
    def refuse(checkpoints, keep, best):
        raise CheckpointError("It can't be removed.")

    settings = {"train__max_steps": 8, "train__keep_checkpoints": 1}
    with monkeypatch.context() as patched:
        patched.setattr(saving_module, "drop_old_checkpoints", refuse)
        message = "\n".join(train(configure(**settings), stop_at=7).notes)
    assert "Step 2 is saved. It can't be removed. Removal is retried at the next save." in message
    assert "could not be saved" not in message
    assert saved_steps(tmp_path) == ["step-000002", "step-000004", "step-000006", "step-000007"]
    train(configure(**settings))
    assert saved_steps(tmp_path) == ["step-000008"]


def test_a_removed_directory_is_reported_and_not_created_again(configure, after_step, tmp_path):
    after_step(3, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="run was removed or unmounted during the run"):
        train(configure())
    assert not (tmp_path / "run").exists()


def test_lines_that_a_full_disk_kept_back_are_written_later(configure, tmp_path, monkeypatch):
    train(configure("whole"))
    original = LogFile.write_out

    def write_out(self):
        if b'"step": 3,' in self._unwritten and b'"step": 5,' not in self._unwritten:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self)

    monkeypatch.setattr(LogFile, "write_out", write_out)
    assert train(configure()).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_saves_when_asked_and_continues(configure, after_step, tmp_path, monkeypatch):
    settings = {"train__save_every": None, "train__max_steps": 8}
    train(configure("whole", **settings))
    with monkeypatch.context():
        after_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        after_step(5, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(configure(**settings))
    assert saved_steps(tmp_path) == ["step-000003"]
    monkeypatch.undo()
    assert train(configure(**settings)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_stop_saves_before_an_evaluation_which_the_next_session_makes(configure, after_step, tmp_path, monkeypatch):
    """An evaluation may take longer than a stop allows."""
    train(configure("whole"))
    train(configure(), stop_at=3)
    assert saved_steps(tmp_path) == ["step-000002", "step-000003"]
    assert [line["step"] for line in lines_of(tmp_path / "run") if "eval_loss" in line] == [0]
    assert train(configure()).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")
