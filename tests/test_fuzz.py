"""A few hostile inputs for every reader, and a check that findings are found; scripts.dev.fuzz makes more."""

import math
import mmap
import time

import pytest

from scripts.dev import fuzz
from scripts.dev.fuzzing import altering
from scripts.dev.fuzzing import targets as readers

INPUTS = 40
NAMES = (
    "config", "rows", "formats", "adapter", "checkpoint", "run", "base", "architecture", "generation", "tokenizer",
    "template",
)  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return fuzz.make_targets(fuzz.Samples(tmp_path_factory.mktemp("samples")))


def test_every_target_has_its_turn(targets):
    assert set(targets) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_damaged_or_hostile_is_read_or_refused(targets, seed, name):
    assert fuzz.attack_with_many(targets[name], INPUTS, seed, math.inf) >= INPUTS // 2


@pytest.mark.parametrize("name", ["base", "adapter", "checkpoint", "run", "rows", "tokenizer", "architecture"])
def test_what_is_not_damaged_is_read(targets, tmp_path, monkeypatch, name):
    """Otherwise everything might be refused for another reason than its damage."""
    found = []
    monkeypatch.setattr(altering, "altered_file", lambda rng, name, content: content)
    monkeypatch.setattr(readers, "each_refused", lambda read: found.append(read()))
    found.append(targets[name].read(targets[name].write(_Unmoved(), tmp_path)))
    assert any(found)


class _Unmoved:
    """Randomness that always chooses the first or the middle."""

    def choice(self, values):
        return values[0]

    def random(self):
        return 0.5


def leave_a_file(folder):
    (folder / "left").touch()


def take_memory(_):
    taken = mmap.mmap(-1, 3 << 28)  # from the system, and not from freed memory that the process keeps
    taken[:: mmap.PAGESIZE] = b"x" * (len(taken) // mmap.PAGESIZE)
    return taken


def sleep_on(_):
    try:
        time.sleep(60)
    except Exception:
        return


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda _: {}["x"], "KeyError"),
        (leave_a_file, "AssertionError"),
        (take_memory, "AssertionError"),
        (sleep_on, "TooLong"),
    ],
    ids=["error", "file", "memory", "time"],
)
def test_a_finding_is_found(monkeypatch, read, found):
    if read is sleep_on:
        monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    target = fuzz.Target(lambda rng, folder: folder, read)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 (one of them is no Exception)
        fuzz.attack_with_many(target, 1, 0, math.inf)
    assert type(caught.value).__name__ == found
