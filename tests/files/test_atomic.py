"""Folders and files are written completely or not at all, even if writing fails or is killed."""

import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora.errors import CheckpointError, ExportError
from qlora.files import atomic_folder, discard, free_bytes, write_text
from qlora.files.atomic import make_folder, settle


@contextmanager
def no_room_for(num_bytes):
    """Let the system refuse every write beyond `num_bytes` of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def target(tmp_path):
    """A folder with an old version of its files."""
    target = tmp_path / "place" / "target"
    target.mkdir(parents=True)
    (target / "file").write_text("old")
    return target


def write_half(target, error):
    with atomic_folder(target) as folder:
        (folder / "file").write_text("new")
        raise error("on the way")


def assert_only_old(target):
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert [path.name for path in target.iterdir()] == ["file"]
    assert (target / "file").read_text() == "old"


def test_a_folder_replaces_the_old_one_as_a_whole(target):
    with atomic_folder(target) as folder:
        (folder / "other").write_text("new")
        (folder / "nested").mkdir()
        (folder / "nested" / "deep").write_text("new")
        assert (target / "file").read_text() == "old"
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*")) == [
        "nested",
        "nested/deep",
        "other",
    ]
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_new_folder_is_created_with_its_parents(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, CheckpointError, OSError])
def test_a_failure_leaves_only_the_old_folder(error, target):
    raised = CheckpointError if error is OSError else error
    with pytest.raises(raised):
        write_half(target, error)
    assert_only_old(target)


def test_a_failure_without_an_old_folder_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="on the way"):
        write_half(tmp_path / "target", ValueError)
    assert list(tmp_path.iterdir()) == []


def write_plain(folder):
    (folder / "file").write_bytes(bytes(100_000))


def write_tensors(folder):
    save_file({"weight": torch.zeros(100_000)}, folder / "file")


@pytest.mark.parametrize("write", [write_plain, write_tensors])
def test_a_full_disk_is_reported_with_the_space_left_and_the_old_folder_stays(write, target):
    with no_room_for(10_000), pytest.raises(CheckpointError, match=r"target can't be written.* \d+\.\d MB are free"):  # noqa: SIM117
        with atomic_folder(target) as folder:
            write(folder)
    assert_only_old(target)


def test_the_error_has_the_given_type(target):
    with pytest.raises(ExportError, match="can't be written"), atomic_folder(target, ExportError):
        raise OSError("no room")
    assert_only_old(target)


def test_a_folder_that_can_not_be_renamed_leaves_the_old_one(target, monkeypatch):
    rename = Path.rename

    def refuse_the_new(self, other):
        if self.name.endswith(".new"):
            raise OSError("not now")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(CheckpointError, match="not now"), atomic_folder(target) as folder:
        (folder / "file").write_text("new")
    assert_only_old(target)


def test_leftovers_of_a_killed_process_are_removed(target):
    for suffix in ("new", "old"):
        leftover = target.with_name(f".{target.name}.{suffix}")
        leftover.mkdir()
        (leftover / "junk").write_text("half")
    with atomic_folder(target) as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert [path.name for path in target.iterdir()] == ["file"]


def test_a_kill_between_the_two_renames_loses_nothing(target):
    """At that moment the old folder is renamed, and the new one not yet in place."""
    target.rename(target.with_name(f".{target.name}.old"))
    new = target.with_name(f".{target.name}.new")
    new.mkdir()
    (new / "file").write_text("new")
    settle(target)
    assert_only_old(target)
    settle(target)
    assert_only_old(target)


def test_a_kill_between_the_two_renames_is_recovered_even_if_the_next_write_fails(target):
    target.rename(target.with_name(f".{target.name}.old"))
    with pytest.raises(ValueError, match="on the way"):
        write_half(target, ValueError)
    assert_only_old(target)


def test_a_kill_after_both_renames_leaves_the_new_one(target):
    shutil.copytree(target, target.with_name(f".{target.name}.old"))
    (target / "file").write_text("new")
    settle(target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert (target / "file").read_text() == "new"


def test_a_folder_that_is_being_removed_is_not_found_under_its_name(target, monkeypatch):
    def stop(path, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            discard(target)
    assert not target.exists()
    settle(target)  # does not restore it
    assert list(target.parent.iterdir()) == []


def test_nothing_is_written_without_enough_space(target):
    needed = free_bytes(target) + 10**12
    with (
        pytest.raises(
            CheckpointError, match=rf"target can't be .*It takes {needed / 1e6:.1f} MB\. \d+\.\d MB are free"
        ),
        atomic_folder(target, needed=needed),
    ):
        pytest.fail("there is no room to write into")
    assert_only_old(target)


def test_files_and_folders_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    synced, target = [], tmp_path / "a" / "target"
    sync, rename = os.fsync, Path.rename

    def record_sync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def record_rename(self, other):
        synced.append(f"{self.name} becomes {other.name}")
        return rename(self, other)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with atomic_folder(target) as folder:
        (folder / "nested").mkdir()
        (folder / "nested" / "file").write_text("new")
    aside = tmp_path / "a" / ".target.new"
    before = synced[: synced.index(".target.new becomes target")]
    assert {str(tmp_path), str(aside), str(aside / "nested"), str(aside / "nested" / "file")} <= set(before)
    assert synced[-1] == str(target.parent)


def test_folders_that_are_created_are_returned(tmp_path):
    assert make_folder(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
    assert make_folder(tmp_path / "a" / "b") == []


def test_a_text_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "text"
    write_text(path, "one")
    write_text(path, "two ü")
    assert path.read_text(encoding="utf-8") == "two ü"
    assert [path.name for path in path.parent.iterdir()] == ["text"]


def test_a_text_that_does_not_fit_leaves_the_old_one(tmp_path):
    path = tmp_path / "text"
    write_text(path, "old")
    with no_room_for(1_000), pytest.raises(CheckpointError, match="MB are free"):
        write_text(path, "x" * 10_000)
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_target_inside_a_file_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        write_text(tmp_path / "file" / "text", "x")
    with pytest.raises(CheckpointError, match="can't be written"), atomic_folder(tmp_path / "file" / "folder"):
        pass


def test_a_second_writer_is_refused_and_the_first_one_is_complete(target):
    with atomic_folder(target) as folder:
        (folder / "one").write_text("one")
        with (
            pytest.raises(ExportError, match="is being written by another process; wait for it"),
            atomic_folder(target, ExportError) as other,
        ):
            (other / "two").write_text("two")
        settle(target)
        (folder / "file").write_text("new")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"one": "one", "file": "new"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_what_a_killed_writer_left_is_replaced(target):
    staging = target.with_name(".target.new")
    staging.mkdir()
    (staging / "half").write_text("half")
    with atomic_folder(target) as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in target.iterdir()] == ["file"]
