"""A directory's lock: it has one named holder at a time, and is released however the holder ends."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from qlora.errors import CheckpointError
from qlora.files import hold_lock

HOLD = """
import signal, sys
from pathlib import Path
from qlora.files.lock import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "runs" / "one" / "run.lock"


def test_the_lock_file_names_its_holder_and_is_removed_at_the_end(lock, tmp_path):
    with hold_lock(lock) as warning:
        assert warning is None
        holder = json.loads(lock.read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
    assert list(tmp_path.iterdir()) == []


def test_the_folder_stays_if_it_is_not_empty_or_existed_before(lock, tmp_path):
    with hold_lock(lock):
        (lock.parent / "file").write_text("")
    assert [path.name for path in lock.parent.iterdir()] == ["file"]
    (lock.parent / "file").unlink()
    with hold_lock(lock):
        pass
    assert lock.parent.is_dir()


def test_a_second_holder_is_refused_with_the_name_of_the_first(lock):
    with hold_lock(lock):
        before = lock.read_text()
        holder = rf"one is in use by process {os.getpid()} on {socket.gethostname()} since 20\d\d-"
        with pytest.raises(CheckpointError, match=holder), hold_lock(lock):
            pytest.fail("there are two")
        assert lock.read_text() == before
    with hold_lock(lock):
        pass


def test_a_killed_process_holds_nothing(lock):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"in use by process {process.pid} on"), hold_lock(lock):
            pass
        process.send_signal(signal.SIGKILL)
    assert json.loads(lock.read_text())["pid"] == process.pid  # a killed process leaves the file
    with hold_lock(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 3}', "\0" * 9])
def test_a_holder_without_a_name_holds_the_lock_too(text, lock):
    with hold_lock(lock):
        lock.write_text(text)
        with pytest.raises(CheckpointError, match="in use by another process"), hold_lock(lock):
            pass


def test_the_lock_of_a_recreated_folder_is_left_to_its_holder(lock):
    with hold_lock(lock):
        lock.unlink()
        with hold_lock(lock):
            pass
        lock.write_text("another's")
    assert lock.read_text() == "another's"


def test_a_file_system_without_locks_is_reported(lock, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("qlora.files.lock.lock_descriptor", refuse)
    with hold_lock(lock) as warning:
        assert f"{lock.parent}: its file system has no locks" in warning
    assert not lock.exists()


def test_a_folder_that_can_not_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"one can't be written: .* MB are free"):  # noqa: SIM117
        with hold_lock(tmp_path / "file" / "one" / "run.lock"):
            pass


def test_an_error_inside_is_raised_unchanged(lock):
    with pytest.raises(OSError, match="mine"), hold_lock(lock):
        raise OSError("mine")
    assert not lock.exists()
