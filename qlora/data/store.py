"""Tokenized examples on disk: written once, mapped by whoever trains on them, kept under a key of what made them."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import lock_descriptor

from qlora.data.tokens import TokenizedExample
from qlora.errors import DataError

# Entries that no run used for so long are removed when a new one is written.
KEPT_SECONDS = 30 * 24 * 3600
# What a killed process was writing is removed sooner: it has not been written to for so long.
ABANDONED_SECONDS = 24 * 3600
# What an entry is called, and what is not one yet; a cache may lie among files of other kinds.
ASIDE = ".qlora-new-"
OUR_NAMES = re.compile(rf"[0-9a-f]{{32}}|{re.escape(ASIDE)}\w+")
# Ids that are looked through together.
COUNTED_AT_A_TIME = 1 << 22
HASH_BYTES = 16
DTYPES: dict[str, Any] = {
    "input_ids": np.int32, "weights": np.float16, "lengths": np.int64, "rows": np.int64, "hashes": f"V{HASH_BYTES}",
}  # fmt: skip


class ExampleWriter:
    """Appends examples to files; no more is held than their lengths.

    Args:
        folder: To write into.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in DTYPES}
        self._digest = hashlib.sha256()

    def append(self, example: TokenizedExample, row: int) -> None:
        """Adds an example.

        Args:
            example: To add.
            row: Number of the row that it comes from.
        """
        values = {"input_ids": example.input_ids, "weights": example.weights, "lengths": len(example), "rows": row}
        data = {name: np.ascontiguousarray(value, dtype=DTYPES[name]).tobytes() for name, value in values.items()}
        learned = [data[name] for name in ("input_ids", "weights", "lengths")]
        data["hashes"] = hashlib.blake2b(b"".join(learned), digest_size=HASH_BYTES).digest()
        for name, content in data.items():
            self._files[name].write(content)
        for content in learned:
            self._digest.update(content)

    def close(self) -> dict[str, Any]:
        """Syncs the files.

        Returns:
            `digest`, of all ids and weights, and `bytes` by file.
        """
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        sizes = {name: Path(file.name).stat().st_size for name, file in self._files.items()}
        return {"digest": self._digest.hexdigest(), "bytes": sizes}

    def abandon(self) -> None:
        """Closes the files as they are."""
        for file in self._files.values():
            with suppress(OSError):  # what is still to be written may not fit on the disk either
                file.close()


class ExampleStore:
    """The examples of one source, read from disk as they are asked for.

    Args:
        folder: That an `ExampleWriter` wrote.

    Attributes:
        lengths: (examples,), int64, in tokens.
        rows: (examples,), int64: the row that each comes from.
        hashes: (examples,), 16 bytes each: equal where ids and weights are.
    """

    def __init__(self, folder: Path) -> None:
        self.lengths, self.rows, self.hashes = (
            np.fromfile(folder / f"{name}.bin", dtype=DTYPES[name]) for name in ("lengths", "rows", "hashes")
        )
        self._input_ids = np.memmap(folder / "input_ids.bin", dtype=DTYPES["input_ids"], mode="r")
        self._weights = np.memmap(folder / "weights.bin", dtype=DTYPES["weights"], mode="r")
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedExample:
        span = slice(self._ends[index] - self.lengths[index], self._ends[index])
        return TokenizedExample(np.array(self._input_ids[span]), np.array(self._weights[span]))

    def largest_id(self) -> int:
        """Of all tokens."""
        return int(self._input_ids.max())

    def count_ids(self, ids: range) -> np.ndarray:
        """How often each of some ids is in each example, (examples, ids), int64."""
        counts = np.zeros((len(self), len(ids)), dtype=np.int64)
        for start in range(0, len(self._input_ids), COUNTED_AT_A_TIME):
            places = np.asarray(self._input_ids[start : start + COUNTED_AT_A_TIME]) - ids.start
            found = np.flatnonzero((places >= 0) & (places < len(ids)))
            examples = np.searchsorted(self._ends, start + found, side="right")
            np.add.at(counts, (examples, places[found]), 1)
        return counts


def find_repeats(stores: Sequence[ExampleStore]) -> list[np.ndarray]:
    """Find the examples that repeat an earlier one, of the same store or of one before it.

    Returns:
        For each store (examples,), bool. No more than the hashes and their order is held.
    """
    hashes = np.concatenate([store.hashes for store in stores])
    repeats = np.ones(len(hashes), dtype=bool)
    repeats[np.unique(hashes, return_index=True)[1]] = False  # the index is that of the first
    return np.split(repeats, np.cumsum([len(store) for store in stores])[:-1])


class ExampleSet(Sequence[TokenizedExample]):
    """Examples chosen from stores, in a fixed order; one may be chosen several times.

    Args:
        stores: To choose from.
        places: (examples, 2), int64: the store and the example in it.
    """

    def __init__(self, stores: Sequence[ExampleStore], places: np.ndarray) -> None:
        self.stores, self.places = stores, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ExampleSet(self.stores, self.places[index])
        store, place = self.places[index]
        return self.stores[store][place]

    def rows_of(self, indices: Sequence[int]) -> dict[int, list[int]]:
        """Rows that examples come from, counted from 1, by the number of their store; each once, in order."""
        rows: dict[int, set[int]] = {}
        for store, place in self.places[list(indices)].tolist():
            rows.setdefault(store, set()).add(int(self.stores[store].rows[place]) + 1)
        return {store: sorted(rows[store]) for store in sorted(rows)}

    def count_ids(self, ids: range) -> list[int]:
        """How often each of some ids is in the examples, each as often as it was chosen."""
        counts = np.zeros(len(ids), dtype=np.int64)
        for number, store in enumerate(self.stores):
            chosen = self.places[self.places[:, 0] == number, 1]
            counts += np.bincount(chosen, minlength=len(store)) @ store.count_ids(ids)
        return counts.tolist()

    @property
    def lengths(self) -> np.ndarray:
        """(examples,), int64, in tokens."""
        lengths = np.zeros(len(self.places), dtype=np.int64)
        for number, store in enumerate(self.stores):
            here = self.places[:, 0] == number
            lengths[here] = store.lengths[self.places[here, 1]]
        return lengths


def cache_folder(cache_dir: str | None) -> Path:
    """Where tokenized data is kept: as told, or in the user's cache."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora" / "data"


def find_entry(cache: Path, key: str) -> dict[str, Any] | None:
    """What is known of the entry of a key, or None if there is none that is whole."""
    entry = cache / key
    try:
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        sizes = {name: (entry / f"{name}.bin").stat().st_size for name in DTYPES}
        if sizes != about["bytes"] or not isinstance(about["report"], dict):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError):  # a cache shared for reading serves too
        os.utime(entry)
    return about


@contextmanager
def new_entry(cache: Path, key: str) -> Iterator[Path]:
    """Gives a folder to write an entry into, which takes its place in the cache at the end, whole or not at all.

    Raises:
        DataError: The cache can't be written, or the disk is full.
    """
    aside: Path | None = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_unused(cache)
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=cache))
        yield aside
        _put_in_place(aside, cache, key)
    except OSError as error:
        raise DataError(
            f"Tokenized data can't be kept in {cache}: {error.strerror or error}; set data.cache_dir elsewhere."
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _remove_unused(cache: Path) -> None:
    for other in cache.iterdir():
        with suppress(FileNotFoundError):  # another run may have been faster
            if not OUR_NAMES.fullmatch(other.name):
                continue
            if other.name.startswith(ASIDE):
                touched, kept = max(path.stat().st_mtime for path in (other, *other.iterdir())), ABANDONED_SECONDS
            else:
                touched, kept = other.stat().st_mtime, KEPT_SECONDS
            if time.time() - touched > kept:
                shutil.rmtree(other, ignore_errors=True)


def _put_in_place(aside: Path, cache: Path, key: str) -> None:
    """Makes a folder the entry of a key, unless another run was faster; a damaged entry gives way."""
    with _lock(cache):
        if find_entry(cache, key) is None:
            shutil.rmtree(cache / key, ignore_errors=True)
            aside.rename(cache / key)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps other processes out that lock the same folder, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            lock_descriptor(descriptor)
        yield
    finally:
        os.close(descriptor)
