"""Sources of rows: files, folders with splits, datasets on the hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora.data.image_folders import find_images
from qlora.errors import ConfigError, DataError

# File types by suffix.
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
# A path with one of these suffixes is a file name, even if there is no such file.
OTHER_SUFFIXES = (".gz", ".zip", ".yaml", ".md", ".xlsx", ".zst", ".bz2", ".xz")
# Usual names of the splits of a dataset.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "heldout"),
    "test": ("test", "testing"),
}
# Files that describe others: in datasets saved by `datasets`, and in LLaMA-Factory's data folders.
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json")
SHOWN_FILES = 8


@dataclass(frozen=True, slots=True)
class Source:
    """A source of rows, and how to read it.

    Attributes:
        path: A file, a folder of files, or a dataset on the hub as `owner/name` or `owner/name:split`. Files are
            `.json` (an array, objects or lines), `.jsonl`, `.csv`, `.tsv`, `.parquet`, `.arrow` or `.txt` (one
            row of text); text files may also be compressed as `.gz`.
        weight: How often an epoch sees each example: 2 is twice, 0.5 half of them.
        split: Split of a folder or dataset; `train` by default, if it has splits.
        subset: Subset of a dataset on the hub that has several.
        revision: Revision of a dataset on the hub.
        type: Type of a file whose name does not show it: a value of `TYPES`, or `lines` for a row of text per line.
        encoding: Encoding of text files.
        header: Whether a table's first line names its columns, see :class:`qlora.data.tables.HeaderRule`.
        max_rows: Number of rows to read from the start; None reads all.
        format: Format of the rows: one of :data:`qlora.data.formats.FORMATS`, or `auto`.
        columns: Names of columns in the data, by our names.
        roles: Our names of roles, by the names in the data.
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

    @property
    def folder(self) -> Path:
        """Folder that relative paths in the rows count from: the file's, or the source itself."""
        try:
            path = Path(self.path).expanduser()
            return path.parent if path.is_file() else path
        except (OSError, RuntimeError):  # reported by find_files
            return Path()


def labelled_images(source: Source) -> list[tuple[Path, str]]:
    """Return the images of a source that is a folder with a folder for each label, with their labels, in order.

    Raises:
        DataError: The folder has no such split, or images outside of folders for labels.
    """
    if source.format != "images":
        return []
    path = Path(source.path).expanduser()
    if not path.is_dir():
        return []
    if any(_is_data(file.relative_to(path)) and type_of(file) != "text" for file in path.rglob("*") if file.is_file()):
        return []  # a file of rows names its images
    return find_images(path, source.split, SPLITS)


def find_files(source: Source) -> list[Path]:
    """Return the files of a source, in order; none for a dataset on the hub.

    Raises:
        ConfigError: The file or folder is absent.
        DataError: It can't be read, or a folder has no data.
    """
    try:
        path = Path(source.path).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # the name is too long, or ~user names no user
        raise DataError(f"{source.path} can't be read: {error}") from None
    if is_file:
        return [path]
    if is_folder and (images := labelled_images(source)):
        return [image for image, _ in images]
    if is_folder:
        return _files_of_folder(path, source.split)
    if path.suffix.lower() in (*TYPES, *OTHER_SUFFIXES) or source.path.startswith((".", "/", "~")):
        raise ConfigError(
            f"Data file not found: {source.path}; data.train, data.eval and data.retain take files, folders or "
            "datasets on the hub."
        )
    return []


def file_notes(source: Source) -> list[str]:
    """Return lines on the files of a folder that are read and ignored, or on a split that a single file ignores.

    Of a folder of images the number is told, not the names.
    """
    path = Path(source.path).expanduser()
    if path.is_file() and source.split is not None:
        return [f"split {source.split!r} is ignored, as {path.name} is a single file"]
    if not path.is_dir():
        return []
    read = find_files(source)
    if images := labelled_images(source):
        labels = len({label for _, label in images})
        return [f"{len(images)} images in the folders of {labels} labels"]
    others = sorted({other for other in path.rglob("*") if other.is_file()} - {*read})
    ignored = [other for other in others if not _is_hidden(other.relative_to(path))]
    groups = {"files read": read, "files ignored": ignored}
    return [f"{what}: {_list_names(path, files)}" for what, files in groups.items() if files]


def _list_names(folder: Path, files: list[Path]) -> str:
    """List the first names in a folder, and how many more there are."""
    more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
    return ", ".join(str(path.relative_to(folder)) for path in files[:SHOWN_FILES]) + more


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    """Return the data files of a split below a folder; files without a split in their path are training data."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_data(path.relative_to(folder))]
    wanted = next((name for name, words in SPLITS.items() if split in words), split) or "train"
    splits = {path: _split_of(path.relative_to(folder), wanted) for path in files}
    chosen = [path for path in files if splits[path] == wanted]
    if not chosen and wanted == "train":
        chosen = [path for path in files if splits[path] is None]
    if any(type_of(path) != "text" for path in chosen):
        chosen = [path for path in chosen if type_of(path) != "text"]  # a licence or a description next to the data
    if not chosen:
        there = ", ".join(path.name for path in files[:4]) or "nothing"
        raise DataError(
            f"{folder} has no data of the split '{wanted}' (it has {there}); set split to another one, or name a file."
        )
    return chosen


def _is_data(path: Path) -> bool:
    """Return whether a file has rows: it isn't hidden, a description of other files, or a cache of `datasets`."""
    is_ignored = path.name in DESCRIPTIONS or path.match("cache-*.arrow")
    return not _is_hidden(path) and not is_ignored and type_of(path) is not None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split_of(path: Path, wanted: str) -> str | None:
    """Return the first split in a file's name, or else in the name of the nearest folder that has one."""
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
    """Return the type of a file by its suffix, or None if that is unknown."""
    name = Path(path.name.lower())
    return TYPES.get(name.with_suffix("").suffix if name.suffix == ".gz" else name.suffix)
