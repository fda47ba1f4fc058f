"""The folder aside: kept for who continues, cleared by who ends, and never another's."""

import subprocess
import sys

import pytest

from qlora.errors import DataError, ExportError
from qlora.files.resumable import put_in_place, resumable_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from qlora.files.resumable import resumable_folder
with resumable_folder(Path(sys.argv[1]), "key") as aside:
    (aside / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write_half(target, key="key", error=KeyboardInterrupt):
    with resumable_folder(target, key) as aside:
        (aside / "half").write_text("half")
        raise error("on the way")


def replace_by_half(target):
    with resumable_folder(target, "key") as aside:
        (aside / "new").mkdir()
        target.mkdir()
        (target / "mine").write_text("precious")
        put_in_place(aside / "new", target)


def test_what_is_put_in_place_stays_and_the_rest_goes(tmp_path):
    target = tmp_path / "parent" / "out"
    with resumable_folder(target, "key") as aside:
        for name in ("good", "bad"):
            (aside / name).mkdir()
            (aside / name / "file").write_text(name)
        assert not target.exists()
        put_in_place(aside / "good", target)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "good"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, DataError])
def test_what_an_interrupted_writer_left_is_there_for_the_next(error, tmp_path):
    with pytest.raises(error):
        write_half(tmp_path / "out", error=error)
    with resumable_folder(tmp_path / "out", "key") as aside:
        assert (aside / "half").read_text() == "half"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_its_work_and_no_lock(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    with resumable_folder(tmp_path / "out", "key") as aside:
        assert (aside / "half").read_text() == "half"


@pytest.mark.parametrize("error", [OSError, ExportError])
def test_a_failure_is_reported_and_leaves_nothing(error, tmp_path):
    with pytest.raises(ExportError, match="on the way"):
        write_half(tmp_path / "out", error=error)
    assert list(tmp_path.iterdir()) == []


def test_anothers_leftovers_are_refused_and_not_touched(tmp_path):
    aside = tmp_path / ".out.merging"
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "out", "first")
    with pytest.raises(ExportError, match=r"\.out\.merging holds what a merge with other settings"):
        write_half(tmp_path / "out", "second")
    assert (aside / "half").read_text() == "half"
    (aside / "merge_state").unlink()  # not written by a merge at all
    with pytest.raises(ExportError, match="Remove .*or choose another folder"):
        write_half(tmp_path / "out", "first")
    assert (aside / "half").read_text() == "half"


def test_a_second_process_is_refused_while_the_first_writes(tmp_path):
    with resumable_folder(tmp_path / "out", "key") as aside:
        (aside / "half").write_text("half")
        with pytest.raises(ExportError, match="being written by another qlora merge"):
            write_half(tmp_path / "out")
        assert (aside / "half").read_text() == "half"


def test_a_target_that_came_to_be_meanwhile_is_not_replaced(tmp_path):
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
