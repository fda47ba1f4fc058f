"""Folders of images: a folder for each label, below the source or below a folder for each split."""

from pathlib import Path

from qlora.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_images(folder: Path, split: str | None, splits: dict[str, tuple[str, ...]]) -> list[tuple[Path, str]]:
    """Return the images below a folder with their labels, the names of the folders that they are in, in order.

    A folder with sub-folders that are named like splits, such as `train` and `test`, has its labels below these.

    Args:
        folder: The folder.
        split: Split to read; None reads `train`, if there are splits.
        splits: Names of each split.

    Returns:
        Path and label of each image; empty if the folder has none.

    Raises:
        DataError: The folder has no such split, or images outside of folders for labels.
    """
    by_name = {path.name.lower(): path for path in _folders(folder)}
    names = next((names for names in splits.values() if split in names), (split,) if split else splits["train"])
    has_splits = any(name in by_name for each in splits.values() for name in each)
    chosen = next((by_name[name.lower()] for name in names if name.lower() in by_name), None)
    if chosen is None and (split is not None or has_splits):
        there = ", ".join(sorted(path.name for path in by_name.values())) or "no folders"
        raise DataError(
            f"{folder} has no folder of images for the split {split or 'train'!r} (it has {there}); set split to "
            "another one, or name the folder with a folder for each label."
        )
    root = folder if chosen is None else chosen
    if loose := [path for path in sorted(root.iterdir()) if _is_image(path)]:
        raise DataError(
            f"{root} has images outside of folders for labels, such as {loose[0].name}; put them into the folder of "
            "their label, or name a file of rows with the columns image and label."
        )
    return [
        (path, label.name)
        for label in _folders(root)
        for path in sorted(label.rglob("*"))
        if _is_image(path) and not any(part.startswith(".") for part in path.relative_to(label).parts)
    ]


def _folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
