"""The staging folder of a merge: kept for a merge that resumes, removed at the end, and refused to other merges."""

import subprocess
import sys

import pytest

from qlora.errors import DataError, ExportError
from qlora.files.resumable import put_in_place, resumable_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from qlora.files.resumable import resumable_folder
with resumable_folder(Path(sys.argv[1]), "key") as staging:
    (staging / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write_half(target, key="key", error=KeyboardInterrupt):
    with resumable_folder(target, key) as staging:
        (staging / "half").write_text("half")
        raise error("on the way")


def replace_by_half(target):
    with resumable_folder(target, "key") as staging:
        (staging / "new").mkdir()
        target.mkdir()
        (target / "mine").write_text("precious")
        put_in_place(staging / "new", target)


def test_the_folder_put_in_place_stays_and_the_rest_is_removed(tmp_path):
    target = tmp_path / "parent" / "out"
    with resumable_folder(target, "key") as staging:
        for name in ("good", "bad"):
            (staging / name).mkdir()
            (staging / name / "file").write_text(name)
        assert not target.exists()
        put_in_place(staging / "good", target)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "good"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, DataError])
def test_files_of_an_interrupted_writer_are_there_for_the_next(error, tmp_path):
    with pytest.raises(error):
        write_half(tmp_path / "out", error=error)
    with resumable_folder(tmp_path / "out", "key") as staging:
        assert (staging / "half").read_text() == "half"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_its_files_and_no_lock(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    with resumable_folder(tmp_path / "out", "key") as staging:
        assert (staging / "half").read_text() == "half"


@pytest.mark.parametrize("error", [OSError, ExportError])
def test_a_failure_is_reported_and_leaves_nothing(error, tmp_path):
    with pytest.raises(ExportError, match="on the way"):
        write_half(tmp_path / "out", error=error)
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_writer_are_refused_and_not_touched(tmp_path):
    staging = tmp_path / ".out.merging"
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "out", "first")
    with pytest.raises(ExportError, match=r"\.out\.merging has files of an interrupted merge with other settings"):
        write_half(tmp_path / "out", "second")
    assert (staging / "half").read_text() == "half"
    (staging / "merge_state").unlink()  # not written by a merge at all
    with pytest.raises(ExportError, match="remove .*or choose another folder"):
        write_half(tmp_path / "out", "first")
    assert (staging / "half").read_text() == "half"


def test_a_second_process_is_refused_while_the_first_writes(tmp_path):
    with resumable_folder(tmp_path / "out", "key") as staging:
        (staging / "half").write_text("half")
        with pytest.raises(ExportError, match="being written by another qlora merge"):
            write_half(tmp_path / "out")
        assert (staging / "half").read_text() == "half"


def test_a_target_created_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ExportError, match="out can't be written"):
        replace_by_half(target)
    assert (target / "mine").read_text() == "precious"


def test_too_little_space_leaves_nothing_that_blocks_another_merge(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ExportError, match="No space left"), resumable_folder(target, "key", 1 << 60):
        pass
    with resumable_folder(target, "other") as staging:
        (staging / "new").mkdir()
        put_in_place(staging / "new", target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
