"""Where rows are: files, folders with their splits, data sets on the hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora.errors import ConfigError, DataError

# What a file holds, by the end of its name.
TYPES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
# A name that ends so is meant as a file, even where there is none.
OTHER_SUFFIXES = (".gz", ".zip", ".yaml", ".md", ".xlsx", ".zst", ".bz2", ".xz")
# Names of the parts that data sets are usually cut into.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "heldout"),
    "test": ("test", "testing"),
}
# Files that describe others: of data sets saved by datasets, and of folders of LLaMA-Factory.
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json")
SHOWN_FILES = 8


@dataclass(frozen=True, slots=True)
class Source:
    """Rows somewhere, and how to read them.

    Attributes:
        path: A file, a folder of files, or a data set on the hub as `owner/name` or `owner/name:split`. Files are
            `.json` (an array, objects or lines), `.jsonl`, `.csv`, `.tsv`, `.parquet`, `.arrow` or `.txt` (one
            row of text), the textual ones also with `.gz`.
        weight: How often an epoch sees its examples: 2 is twice, 0.5 a half of them.
        split: Of a folder or a data set; `train` where it has parts of such names.
        subset: Of a data set on the hub that has several.
        revision: Of a data set on the hub.
        type: What a file holds if its name does not tell: one of `TYPES`, or `lines`: a row of text each.
        encoding: Of textual files.
        header: Whether a table's first line names its columns, see :class:`qlora.data.tables.HeaderRule`.
        max_rows: The first so many rows are read; all of them if None.
        format: How the columns are read: one of :data:`qlora.data.formats.FORMATS`, or `auto`.
        columns: Our name of a column to theirs.
        roles: Their name of a speaker to ours.
    """

    path: str
    weight: float = 1.0
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    type: str = "auto"
    encoding: str = "utf-8"
    header: bool | str = "auto"
    max_rows: int | None = None
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


def find_files(source: Source) -> list[Path]:
    """The files of a source, in order; none if it is a data set on the hub.

    Raises:
        ConfigError: It names a file or folder that is absent.
        DataError: It can't be read or holds nothing to read.
    """
    try:
        path = Path(source.path).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a home that is nobody's
        raise DataError(f"{source.path} can't be read: {error}") from None
    if is_file:
        return [path]
    if is_folder:
        return _files_of_folder(path, source.split)
    if path.suffix.lower() in (*TYPES, *OTHER_SUFFIXES) or source.path.startswith((".", "/", "~")):
        raise ConfigError(f"Data file not found: {source.path}; data.train and data.eval name files or hub data sets.")
    return []


def file_notes(source: Source) -> list[str]:
    """Lines on the files of a folder that are read and that are not, or on a split that a single file can't have."""
    path = Path(source.path).expanduser()
    if path.is_file() and source.split is not None:
        return [f"split {source.split!r} is not used, as {path.name} is one file"]
    if not path.is_dir():
        return []
    read = find_files(source)
    others = sorted({other for other in path.rglob("*") if other.is_file()} - {*read})
    left_out = [other for other in others if not _is_hidden(other.relative_to(path))]
    groups = {"files read": read, "files left out": left_out}
    return [f"{what}: {_list_names(path, files)}" for what, files in groups.items() if files]


def _list_names(folder: Path, files: list[Path]) -> str:
    """The first names in a folder, and how many more there are."""
    more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
    return ", ".join(str(path.relative_to(folder)) for path in files[:SHOWN_FILES]) + more


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    """The data files below a folder that belong to a split; without such names, all are taken for training data."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_data(path.relative_to(folder))]
    wanted = next((name for name, words in SPLITS.items() if split in words), split) or "train"
    splits = {path: _split_of(path.relative_to(folder), wanted) for path in files}
    chosen = [path for path in files if splits[path] == wanted]
    if not chosen and wanted == "train":
        chosen = [path for path in files if splits[path] is None]
    if any(type_of(path) != "text" for path in chosen):
        chosen = [path for path in chosen if type_of(path) != "text"]  # a licence or a description beside the data
    if not chosen:
        there = ", ".join(path.name for path in files[:4]) or "nothing"
        raise DataError(
            f"{folder} holds no data of the split '{wanted}' (there is {there}); set split, or name a file."
        )
    return chosen


def _is_data(path: Path) -> bool:
    """Whether a file of a folder holds rows: none that is hidden, describes others, or was left behind by datasets."""
    is_left = path.name in DESCRIPTIONS or path.match("cache-*.arrow")
    return not _is_hidden(path) and not is_left and type_of(path) is not None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split_of(path: Path, wanted: str) -> str | None:
    """The split that a file's name tells first, or else the folder nearest to it that tells one."""
    for part in (path.name.lower(), *(part.lower() for part in reversed(path.parts[:-1]))):
        words = re.split(r"[^a-z0-9]+", part)
        if wanted not in SPLITS and (wanted in words or part.startswith(wanted)):
            return wanted
        for word in words:
            named = next((name for name, names in SPLITS.items() if word in names), None)
            if named is not None:
                return named
    return None


def type_of(path: Path) -> str | None:
    """What a file holds by its name, or None if that does not tell."""
    name = Path(path.name.lower())
    return TYPES.get(name.with_suffix("").suffix if name.suffix == ".gz" else name.suffix)
