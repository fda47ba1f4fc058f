"""Folders of images: a folder for each label, below the source or below a folder for each split."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """What is read of a folder.

    Attributes:
        images: Path and label of each image, in order; the label is the name of the folder that it is in.
        ignored: Files that are no images, and images of neither a label nor another split.
    """

    images: list[tuple[Path, str]]
    ignored: list[Path]


def list_files(folder: Path) -> list[Path]:
    """Return the files at any depth below a folder, except hidden ones, in order."""
    return [path for path in sorted(folder.rglob("*")) if not _is_hidden(path, folder) and path.is_file()]


def images_below(folder: Path) -> list[Path]:
    """Return the images at any depth below a folder, in order; names of folders have no meaning here.

    Raises:
        DataError: There are none.
    """
    images = [path for path in list_files(folder) if _is_image(path)]
    if not images:
        raise DataError(f"{folder} has no images ({', '.join(SUFFIXES)}); name another folder, or a file of rows.")
    return images


def find_images(
    folder: Path, files: Collection[Path], split: str | None, splits: Mapping[str, tuple[str, ...]]
) -> ImageFolder:
    """Find the images of a folder that has a folder for each label, maybe below folders for splits.

    A folder is a split if it is named like one, such as `train`, and has folders of images but none of its own.

    Args:
        folder: The folder.
        files: Files below it, as :func:`list_files` returns them.
        split: Split to read; None reads `train`, if there are splits.
        splits: Names of each split.

    Raises:
        DataError: The folder has no such split, or images outside of folders for labels.
    """
    images = [path for path in files if _is_image(path)]
    tops = {
        _below(path, folder)[0].lower(): _below(path, folder)[0] for path in images if len(_below(path, folder)) > 1
    }
    found = _splits(folder, images, splits)
    names = next((names for names in splits.values() if split in names), (split,) if split else splits["train"])
    allowed = found if split is None else tops
    chosen = next((tops[name.lower()] for name in names if name.lower() in allowed), None)
    if chosen is None and (split is not None or found):
        there = ", ".join(sorted(tops.values())) or "no folders"
        raise DataError(
            f"{folder} has no folder of images for the split {split or 'train'!r} (it has {there}); set split to "
            "another one, or name the folder with a folder for each label."
        )
    root = folder if chosen is None else folder / chosen
    of_root = [path for path in images if path.is_relative_to(root)]
    if loose := [path for path in of_root if path.parent == root]:
        raise DataError(
            f"{root} has images outside of folders for labels, such as {loose[0].name}; put them into the folder of "
            "their label, or name a file of rows with the columns image and label."
        )
    others = {tops[name] for name in found} - {chosen}
    read = {*of_root}
    ignored = [path for path in files if path not in read and _below(path, folder)[0] not in others]
    return ImageFolder([(path, _below(path, root)[0]) for path in of_root], ignored)


def num_labels(folder: Path, files: Collection[Path], splits: Mapping[str, tuple[str, ...]]) -> int:
    """Return the number of label folders in a folder, counted over all splits.

    Args:
        folder: The folder.
        files: Files below it, as :func:`list_files` returns them.
        splits: Names of each split.
    """
    named = {name for each in splits.values() for name in each}
    labels: set[str] = set()
    for path in files:
        folders = _below(path, folder)[:-1] if _is_image(path) else ()
        labels.update((folders[1:] if folders and folders[0].lower() in named else folders)[:1])
    return len(labels)


def _splits(folder: Path, images: Collection[Path], splits: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Return the names of the folders that are splits, in lower case."""
    named = {name for each in splits.values() for name in each}
    depths: dict[str, set[int]] = {}
    for path in images:
        depths.setdefault(_below(path, folder)[0].lower(), set()).add(len(_below(path, folder)))
    return {name for name, own in depths.items() if name in named and min(own) > 2}


def _below(path: Path, folder: Path) -> tuple[str, ...]:
    """Return the parts of a path below a folder."""
    return path.relative_to(folder).parts


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in _below(path, folder))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES
