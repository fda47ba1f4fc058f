"""The cache of tokenized data: entries are complete or absent, shared by runs, and removed when unused for long."""

import errno
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from qlora.data import Source, build_datasets, make_example
from qlora.data import cache as cache_module
from qlora.data.cache import UNUSED_SECONDS, cache_folder, find_entry, new_entry, write_report
from qlora.data.store import ExampleStore, ExampleWriter
from qlora.errors import DataError
from tests.tiny import make_tokenizer, only, write_jsonl


@pytest.fixture
def examples(seed):
    """Documents with ids up to the largest."""
    rng = random.Random(seed)
    lengths = [rng.randrange(1, 30) for _ in range(20)]
    return [make_example([rng.randrange(2**31 - 1) for _ in range(n)], [1] * n) for n in lengths]


def write(folder, examples):
    """Write a complete entry."""
    writer = ExampleWriter(folder)
    for number, example in enumerate(examples):
        writer.append([example], number)
    writer.close()
    write_report(folder, {})


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(20)])


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def build(path, cache):
    return build_datasets(make_tokenizer(), [Source(str(path))], cache_dir=str(cache)).train


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(path):
    path.write_text('{"columns": ')


@pytest.mark.parametrize("damage", [cut, overwrite, os.remove])
@pytest.mark.parametrize(
    "name", ["input_ids.bin", "weights.bin", "lengths.bin", "rows.bin", "columns.json", "report.json"]
)
def test_a_damaged_entry_is_replaced(path, cache, name, damage):
    ids = [example.input_ids.tolist() for example in build(path, cache)]
    entry = only(list(cache.iterdir()))
    whole = contents(entry)
    damage(entry / name)
    assert find_entry(cache, entry.name) is None
    assert [example.input_ids.tolist() for example in build(path, cache)] == ids
    assert list(cache.iterdir()) == [entry]
    assert {name: data for name, data in contents(entry).items() if name.suffix == ".bin"} == {
        name: data for name, data in whole.items() if name.suffix == ".bin"
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, DataError])
def test_an_interrupted_entry_leaves_nothing(cache, error):
    def write_half():
        with new_entry(cache, "0" * 32) as folder:
            (folder / "input_ids.bin").write_bytes(b"half")
            raise error("on the way")

    with pytest.raises(error, match="on the way"):
        write_half()
    assert list(cache.iterdir()) == []


def test_an_entry_appears_under_its_name_once_complete(cache, examples):
    with new_entry(cache, "0" * 32) as folder:
        write(folder, examples)
        assert not (cache / ("0" * 32)).exists()
        assert folder.parent == cache  # a rename over file systems would copy
    assert (cache / ("0" * 32)).is_dir()
    assert len(list(cache.iterdir())) == 1


def test_the_faster_of_two_runs_is_not_disturbed(path, cache):
    """If an entry is made twice at once, the second process keeps the first one's."""
    build(path, cache)
    entry = only(list(cache.iterdir()))
    inode = entry.stat().st_ino
    with new_entry(cache, entry.name) as folder:
        (folder / "input_ids.bin").write_bytes(b"other")
    assert list(cache.iterdir()) == [entry]
    assert entry.stat().st_ino == inode
    assert find_entry(cache, entry.name) is not None


def make_entry(cache, examples, barrier):
    """Find or make the entry, as a process does that needs it."""
    barrier.wait()
    if find_entry(cache, "a" * 32) is None:
        with new_entry(cache, "a" * 32) as folder:
            write(folder, examples)
    assert find_entry(cache, "a" * 32) is not None
    assert ExampleStore(cache / ("a" * 32))[-1].input_ids.tolist() == examples[-1].input_ids.tolist()


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("trial", range(5))
def test_processes_that_put_one_entry_in_place_at_once_all_have_it(cache, examples, damaged, trial):
    if damaged:
        (cache / ("a" * 32)).mkdir(parents=True)
        (cache / ("a" * 32) / "report.json").write_text("{}")
    context = multiprocessing.get_context("fork")
    arguments = (cache, examples, context.Barrier(4))
    processes = [context.Process(target=make_entry, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [entry.name for entry in cache.iterdir()] == ["a" * 32]


@pytest.mark.slow
@pytest.mark.slow
def test_processes_that_tokenize_one_source_at_once_all_have_it(path, cache):
    program = (
        "import sys, time\n"
        "from qlora.data import Source, build_datasets\n"
        "from tests.tiny import make_tokenizer\n"
        "tokenizer = make_tokenizer()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "train = build_datasets(tokenizer, [Source(sys.argv[1])], cache_dir=sys.argv[2]).train\n"
        "print(sum(int(example.input_ids.sum()) for example in train), flush=True)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", program, str(path), str(cache)], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert {out for out, _ in outputs} == {f"{sum(int(each.input_ids.sum()) for each in build(path, cache))}\n"}
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("room", [0, 500, 20_000])
def test_a_full_disk_is_reported_with_the_key_and_leaves_nothing(path, cache, room):
    """Files may not grow beyond some bytes: as on a full disk, some of what is written fails when it is flushed."""
    write_jsonl(path, [{"text": "x" * 1000}] * 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(DataError) as caught:
            build(path, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(caught.value)
    assert f"can't be written to {cache}: {os.strerror(errno.EFBIG)}; set data.cache_dir to another" in message
    assert list(cache.iterdir()) == []
    assert len(build(path, cache)) == 20


@pytest.mark.parametrize("where", ["file", "below a file"])
def test_a_cache_that_can_not_be_written_is_reported_with_the_key(path, tmp_path, where):
    (tmp_path / "taken").write_text("mine")
    cache = tmp_path / "taken" if where == "file" else tmp_path / "taken" / "below"
    with pytest.raises(DataError) as caught:
        build(path, cache)
    assert str(cache) in str(caught.value)
    assert "data.cache_dir" in str(caught.value)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_cache_that_can_only_be_read_serves_what_it_has(path, cache, monkeypatch):
    def refuse(*_arguments, **_settings):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    before = [example.input_ids.tolist() for example in build(path, cache)]
    monkeypatch.setattr(cache_module.os, "utime", refuse)
    monkeypatch.setattr(cache_module.tempfile, "mkdtemp", refuse)
    assert [example.input_ids.tolist() for example in build(path, cache)] == before
    write_jsonl(path, [{"text": "new"}])
    with pytest.raises(DataError, match=r"Permission denied; set data\.cache_dir to another folder"):
        build(path, cache)


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_entries_that_were_not_used_for_long_are_removed(path, cache, tmp_path):
    names = {"a" * 32: UNUSED_SECONDS + 60, "b" * 32: UNUSED_SECONDS - 60, ".qlora-new-abc_1": UNUSED_SECONDS + 60}
    for name, seconds in names.items():
        (cache / name).mkdir(parents=True)
        (cache / name / "input_ids.bin").write_bytes(b"1234")
        age(cache / name / "input_ids.bin", seconds)
        age(cache / name, seconds)
    (cache / ".qlora-new-abc_2").mkdir()
    (cache / ".qlora-new-abc_2" / "input_ids.bin").write_bytes(b"1234")  # is being written by another run
    age(cache / ".qlora-new-abc_2", UNUSED_SECONDS + 60)
    build(path, cache)
    assert (cache / ".qlora-new-abc_2").is_dir()
    assert {entry.name for entry in cache.iterdir()} & set(names) == {"b" * 32}


def test_an_entry_that_is_used_stays(path, cache, tmp_path):
    build(path, cache)
    entry = only(list(cache.iterdir()))
    age(entry, UNUSED_SECONDS + 60)
    build(path, cache)  # is found, and is young again
    build(write_jsonl(tmp_path / "other.jsonl", [{"text": "other"}]), cache)
    assert entry.is_dir()
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("mine", ["notes", "models/llama/model.bin", "0123abc", ".new-thing", "A" * 32])
def test_what_is_not_of_this_cache_is_left_alone_however_old(path, cache, mine):
    """A user may name a folder that has other files too."""
    (cache / mine).parent.mkdir(parents=True, exist_ok=True)
    (cache / mine).write_text("mine")
    for each in (cache / mine, *(cache / mine).parents):
        if each.is_relative_to(cache):
            age(each, 10 * UNUSED_SECONDS)
    build(path, cache)
    assert (cache / mine).read_text() == "mine"


def test_an_entry_that_another_run_removes_meanwhile_is_no_error(path, cache, monkeypatch):
    gone = [SimpleNamespace(name="a" * 32, stat=lambda: os.stat(cache / "gone"))]
    cache.mkdir()
    iterdir = type(cache).iterdir
    monkeypatch.setattr(type(cache), "iterdir", lambda self: iter(gone) if self == cache else iterdir(self))
    assert len(build(path, cache)) == 20


@pytest.mark.parametrize(("cache_dir", "xdg", "expected"), [
    ("/somewhere", "/xdg", "/somewhere"),
    ("~/mine", "/xdg", "/home/me/mine"),
    (None, "/xdg", "/xdg/qlora/data"),
    (None, "", "/home/me/.cache/qlora/data"),
])  # fmt: skip
def test_where_the_cache_is(cache_dir, xdg, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert str(cache_folder(cache_dir)) == expected
