"""Tokenized documents on disk, in columns that describe themselves, written once and memory-mapped for training.

A group is a number of consecutive documents that stay together: one for fine-tuning, two for a preference pair. All
groups of a store have the same size.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora.data.tokens import TokenizedExample

HEADER = "columns.json"
HASH_BYTES = 16
# Columns with entries of this size, such as images, stay on the disk until they are read.
LARGE_ENTRY_BYTES = 64
# Number of ids that are searched at a time.
IDS_PER_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Column:
    """A file of a store, with an entry for every token, document or group.

    Attributes:
        name: Name of the file, without its suffix.
        dtype: Dtype of an entry as NumPy names it, as `int32`, or with its shape in front, as `(2,)float32`.
        per: What has an entry: `token`, `document` or `group`.
        is_compared: Whether equal groups have equal entries, so that the column goes into hashes and digest.
    """

    name: str
    dtype: str
    per: str
    is_compared: bool = True

    def __post_init__(self) -> None:
        """Check the unit.

        Raises:
            ValueError: `per` is unknown.
        """
        if self.per not in ("token", "document", "group"):
            raise ValueError(f"column {self.name}: per '{self.per}' is unknown; use token, document or group")


# Columns of every store. `rows` is the number of the row that a group comes from, counted from 0.
COLUMNS = (
    Column("input_ids", "int32", "token"),
    Column("weights", "float16", "token"),
    Column("lengths", "int64", "document"),
    Column("rows", "int64", "group", is_compared=False),
    Column("hashes", f"V{HASH_BYTES}", "group", is_compared=False),
)


class ExampleWriter:
    """Appends groups of documents to the files of a folder; keeps nothing in memory.

    Args:
        folder: Folder to write into.
        columns: Columns in addition to `COLUMNS`.
    """

    def __init__(self, folder: Path, columns: Sequence[Column] = ()) -> None:
        self._folder, self._columns = folder, (*COLUMNS, *columns)
        self._dtypes = {column.name: np.dtype(column.dtype) for column in self._columns}
        self._files = {column.name: _path(folder, column.name).open("wb") for column in self._columns}
        self._digest = hashlib.sha256()
        self._group_size = 0

    def append(
        self,
        documents: Sequence[TokenizedExample],
        row: int,
        values: Mapping[str, Any] | None = None,
        num_compared: int | None = None,
    ) -> None:
        """Append a group.

        Args:
            documents: Documents of the group, as many as in every other group.
            row: Number of the row that they come from.
            values: Entries of the additional columns by name: for a column per group the entry, for others a sequence
                with the entries of each document. Those of a column per document that is not given are the documents'
                own values.
            num_compared: Number of documents, from the first, that groups are compared by; default: all.

        Raises:
            ValueError: The number of documents differs from other groups', or an entry has another shape than its
                column.
        """
        if self._group_size not in (0, len(documents)):
            raise ValueError(f"a group of {len(documents)} documents in a store with groups of {self._group_size}")
        self._group_size = len(documents)
        own = [column.name for column in self._columns[len(COLUMNS) :] if column.per == "document"]
        entries: dict[str, Any] = {
            **{name: [document.values.get(name) for document in documents] for name in own},
            **(values or {}),
            "input_ids": [document.input_ids for document in documents],
            "weights": [document.weights for document in documents],
            "lengths": [len(document) for document in documents],
            "rows": row,
        }
        written = bytearray()
        num_bytes: list[int] = []
        for number, document in enumerate(documents):
            for column in self._columns:
                if column.per != "group":
                    shape = (len(document),) if column.per == "token" else ()
                    written += self._write(column, entries[column.name][number], shape)
            num_bytes.append(len(written))
        of_group = bytearray()
        for column in self._columns:
            if column.per == "group" and column.name != "hashes":
                of_group += self._write(column, entries[column.name], ())
        self._digest.update(written + of_group)
        compared = written[: num_bytes[(num_compared or len(documents)) - 1]] + of_group
        self._files["hashes"].write(hashlib.blake2b(compared, digest_size=HASH_BYTES).digest())

    def _write(self, column: Column, value: Any, shape: tuple[int, ...]) -> bytes:
        """Write entries, and return what they add to hash and digest."""
        dtype = self._dtypes[column.name]
        array = np.asarray(value, dtype=dtype.base)
        if array.shape != shape + dtype.shape:
            raise ValueError(f"{column.name}: an entry of shape {array.shape}, not {shape + dtype.shape}")
        data = array.tobytes()
        self._files[column.name].write(data)
        return data if column.is_compared else b""

    def close(self) -> str:
        """Sync the files and write the header.

        Returns:
            Digest of all compared columns, equal for equal data.
        """
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        sizes = {name: Path(file.name).stat().st_size for name, file in self._files.items()}
        columns = [asdict(column) | {"bytes": sizes[column.name]} for column in self._columns]
        header = {"group_size": self._group_size, "columns": columns}
        (self._folder / HEADER).write_text(json.dumps(header), encoding="utf-8")
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the files without completing them."""
        for file in self._files.values():
            with suppress(OSError):  # buffered content may not fit on the disk either
                file.close()


def read_header(folder: Path) -> tuple[int, list[Column]]:
    """Read the group size and the columns of a store, and check the sizes of its files.

    Raises:
        OSError: A file is absent.
        ValueError: The header is damaged, or a file has another size than it says.
    """
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        group_size, sizes = header["group_size"], [entry.pop("bytes") for entry in header["columns"]]
        columns = [Column(**entry) for entry in header["columns"]]
        is_complete = group_size >= 1 and {*COLUMNS} <= {*columns}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / HEADER} is damaged") from error
    if not is_complete:
        raise ValueError(f"{folder / HEADER} is damaged")
    if [_path(folder, column.name).stat().st_size for column in columns] != sizes:
        raise ValueError(f"{folder} has files of other sizes than {HEADER} says")
    return group_size, columns


def _path(folder: Path, column: str) -> Path:
    return folder / f"{column}.bin"


class ExampleStore:
    """The documents of one source, read from disk on access.

    Args:
        folder: Folder that an `ExampleWriter` wrote.

    Attributes:
        group_size: Number of documents per group.
        columns: Columns by name.
        lengths: (documents,), int64, in tokens.
        rows: (groups,), int64: number of the row that each group comes from.
        hashes: (groups,), 16 bytes each: equal for groups with equal compared columns.
    """

    def __init__(self, folder: Path) -> None:
        self.group_size, columns = read_header(folder)
        self.columns = {column.name: column for column in columns}
        self._values = {column.name: _open(folder, column) for column in columns}
        self._own = [column.name for column in columns if column.per == "document" and column not in COLUMNS]
        self.lengths, self.rows, self.hashes = (self._values[name] for name in ("lengths", "rows", "hashes"))
        self._ends = np.cumsum(self.lengths)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return len(self.rows)

    def values(self, name: str) -> np.ndarray:
        """Return all entries of a column, (tokens, documents or groups, …)."""
        return self._values[name]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedExample:
        span = slice(self._ends[index] - self.lengths[index], self._ends[index])
        ids, weights = (np.array(self._values[name][span]) for name in ("input_ids", "weights"))
        return TokenizedExample(ids, weights, {name: self._values[name][index] for name in self._own})

    def largest_id(self) -> int:
        """Return the largest token id."""
        return int(self._values["input_ids"].max())

    def last_ids(self) -> set[int]:
        """Return the ids of tokens that documents end with."""
        return {*np.unique(self._values["input_ids"][self._ends - 1]).tolist()}

    def count_ids(self, ids: range) -> np.ndarray:
        """Count how often each of some ids occurs in each document, (documents, ids), int64."""
        counts = np.zeros((len(self), len(ids)), dtype=np.int64)
        input_ids = self._values["input_ids"]
        for start in range(0, len(input_ids), IDS_PER_BLOCK):
            places = np.asarray(input_ids[start : start + IDS_PER_BLOCK]) - ids.start
            found = np.flatnonzero((places >= 0) & (places < len(ids)))
            documents = np.searchsorted(self._ends, start + found, side="right")
            np.add.at(counts, (documents, places[found]), 1)
        return counts


def _open(folder: Path, column: Column) -> np.ndarray:
    """Open a column: mapped if it has an entry per token, or a large one per document; else read into memory."""
    path, dtype = _path(folder, column.name), np.dtype(column.dtype)
    is_mapped = column.per == "token" or dtype.itemsize >= LARGE_ENTRY_BYTES
    return np.memmap(path, dtype=dtype, mode="r") if is_mapped else np.fromfile(path, dtype=dtype)


def find_repeats(stores: Sequence[ExampleStore]) -> list[np.ndarray]:
    """Find the groups that repeat an earlier one, of the same store or of one before it.

    Returns:
        For each store (groups,), bool. Only the hashes and their order are held in memory.
    """
    hashes = np.concatenate([store.hashes for store in stores])
    repeats = np.ones(len(hashes), dtype=bool)
    repeats[np.unique(hashes, return_index=True)[1]] = False  # return_index gives the first of each
    return np.split(repeats, np.cumsum([store.num_groups for store in stores])[:-1])


class ExampleSet(Sequence[TokenizedExample]):
    """Documents chosen from stores by whole groups, in a fixed order; a group may be chosen several times.

    Args:
        stores: Stores to choose from.
        places: (documents, 2), int64: number of the store, and of the document in it.
        group_size: Number of documents per group, equal in all stores that are chosen from.
    """

    def __init__(self, stores: Sequence[ExampleStore], places: np.ndarray, group_size: int = 1) -> None:
        self.stores, self.places, self.group_size = stores, places, group_size

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        """Return a document, or for a slice of whole groups a set.

        Raises:
            ValueError: A slice parts a group.
        """
        if isinstance(index, slice):
            if self.group_size > 1:
                chosen = range(len(self))[index]
                if chosen.step != 1 or chosen.start % self.group_size or len(chosen) % self.group_size:
                    raise ValueError(f"{index} parts a group of {self.group_size} documents")
            return ExampleSet(self.stores, self.places[index], self.group_size)
        store, place = self.places[index]
        return self.stores[store][place]

    def rows_of(self, indices: Sequence[int]) -> dict[int, list[int]]:
        """Return the rows that documents come from, by number of store: counted from 1, sorted, each once."""
        rows: dict[int, set[int]] = {}
        for store, place in self.places[list(indices)].tolist():
            rows.setdefault(store, set()).add(int(self.stores[store].rows[place // self.group_size]) + 1)
        return {store: sorted(rows[store]) for store in sorted(rows)}

    def count_ids(self, ids: range) -> list[int]:
        """Count how often each of some ids occurs, in a document chosen several times as often."""
        counts = np.zeros(len(ids), dtype=np.int64)
        for number, store in enumerate(self.stores):
            chosen = self.places[self.places[:, 0] == number, 1]
            counts += np.bincount(chosen, minlength=len(store)) @ store.count_ids(ids)
        return counts.tolist()

    def values(self, name: str) -> np.ndarray:
        """Return the entries of a column with one per document or group, (documents or groups, …), in order."""
        chosen = [self.stores[number] for number in np.unique(self.places[:, 0])] or self.stores[:1]
        size = self.group_size if chosen[0].columns[name].per == "group" else 1
        places = self.places[::size]
        first = chosen[0].values(name)
        found = np.zeros((len(places), *first.shape[1:]), dtype=first.dtype)
        for number in np.unique(places[:, 0]):
            here = places[:, 0] == number
            found[here] = self.stores[number].values(name)[places[here, 1] // size]
        return found

    @property
    def lengths(self) -> np.ndarray:
        """(documents,), int64, in tokens."""
        return self.values("lengths")
