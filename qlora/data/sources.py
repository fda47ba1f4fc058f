"""Sources of rows: files, folders with splits, datasets on the hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora.data.image_folders import find_images, list_files, num_labels
from qlora.data.problems import counted
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


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """Files that a source is read from.

    Attributes:
        paths: The files, in order; none for a dataset on the hub.
        labels: Label of each file, if these are images in folders by label; otherwise empty.
        ignored: Other files of such folders.
    """

    paths: list[Path]
    labels: list[str] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)


def find_files(source: Source) -> FoundFiles:
    """Return the files of a source.

    Raises:
        ConfigError: The file or folder is absent.
        DataError: It can't be read, or a folder has no data, or both images in folders and a file of rows.
    """
    try:
        path = Path(source.path).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # the name is too long, or ~user names no user
        raise DataError(f"{source.path} can't be read: {error}") from None
    if is_file:
        return FoundFiles([path])
    if is_folder and source.format == "images" and (found := _labelled_images(path, source.split)):
        return found
    if is_folder:
        return FoundFiles(_files_of_folder(path, source.split))
    if path.suffix.lower() in (*TYPES, *OTHER_SUFFIXES) or source.path.startswith((".", "/", "~")):
        raise ConfigError(
            f"Data file not found: {source.path}; data.train, data.eval and data.retain take files, folders or "
            "datasets on the hub."
        )
    return FoundFiles([])


def file_notes(source: Source, found: FoundFiles) -> list[str]:
    """Return lines on the files of a folder that are read and ignored, or on a split that a single file ignores.

    A folder of images is reported by its number of images.

    Args:
        source: The source.
        found: Its files.
    """
    path = Path(source.path).expanduser()
    if path.is_file() and source.split is not None:
        return [f"split {source.split!r} is ignored, as {path.name} is a single file"]
    if not path.is_dir():
        return []
    if found.labels:
        note = f"{len(found.paths)} images in the folders of {len({*found.labels})} labels"
        if found.ignored:
            first = found.ignored[0].relative_to(path)
            note += f"; {counted(len(found.ignored), 'other file')} ignored, such as {first}"
        return [note]
    others = sorted({other for other in path.rglob("*") if other.is_file()} - {*found.paths})
    ignored = [other for other in others if not _is_hidden(other.relative_to(path))]
    groups = {"files read": found.paths, "files ignored": ignored}
    return [f"{what}: {_list_names(path, files)}" for what, files in groups.items() if files]


def _labelled_images(folder: Path, split: str | None) -> FoundFiles | None:
    """Return the images of a folder with a folder for each label; None if a file of rows names its images."""
    files = list_files(folder)
    rows = [file for file in files if _is_data(file.relative_to(folder)) and type_of(file) != "text"]
    if rows and num_labels(folder, files, SPLITS) > 1:
        raise DataError(
            f"{folder} has images in folders and {rows[0].relative_to(folder)}; name the file, or remove it."
        )
    if rows:
        return None
    found = find_images(folder, files, split, SPLITS)
    if not found.images:
        return None
    return FoundFiles([image for image, _ in found.images], [label for _, label in found.images], found.ignored)


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
