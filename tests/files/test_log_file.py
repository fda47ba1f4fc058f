"""A log on a disk that is full for a while: no line is lost or torn."""

import errno
import json

import pytest

from qlora.files.log_file import LogFile


class FullDisk:
    """File on a disk with a few bytes left, and none after them."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, content):
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(content[: self.left])
        self.left -= written
        return written

    def close(self):
        self.file.close()


def test_a_line_that_was_written_in_part_is_completed_later(tmp_path):
    log = LogFile(tmp_path / "log.jsonl")
    log.append({"step": 0})
    log._file = FullDisk(log._file, left=5)
    log.append({"step": 1})
    log.append({"step": 2})
    with pytest.raises(OSError, match="No space left"):
        log.write_out()
    log._file.left = 1000
    log.append({"step": 3})
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_a_file_that_can_not_be_opened_yet_is_opened_later(tmp_path):
    log = LogFile(tmp_path / "absent" / "log.jsonl")
    log.append({"step": 0})
    with pytest.raises(FileNotFoundError):
        log.write_out()
    (tmp_path / "absent").mkdir()
    log.append({"step": 1})
    assert (tmp_path / "absent" / "log.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'
