"""Where the files of a base are: a folder, the hub's cache, or a folder that is made of a GGUF file."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from qlora.errors import ModelError
from qlora.files.gguf_folder import gguf_folder
from qlora.files.sampled_hash import sampled_sha256

TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]
HUB_PATTERNS = [*TOKENIZER_PATTERNS, "*.safetensors", "LICENSE*", "NOTICE*", "README.md"]
# Other layouts of the same weights, in Mistral's and Meta's own names.
ORIGINAL_PREFIX = "consolidated"
HUB_DUPLICATES = [f"{ORIGINAL_PREFIX}*.safetensors", "original/*"]
GGUF_PART = re.compile(r".+-\d{5}-of-(?P<count>\d{5})\.gguf")


class Place(NamedTuple):
    """Where a base is.

    Attributes:
        folder: A folder of transformers.
        gguf: The GGUF file that it was made of, which holds the weights; None if the folder is the base.
    """

    folder: Path
    gguf: Path | None = None


def find_base(base: str, revision: str | None, patterns: list[str], with_code: bool = False) -> Place:
    """Find a base by its name; download what is not in the hub's cache.

    Args:
        base: A folder, a GGUF file, a folder with one, or a model id on the hub.
        revision: Revision on the hub.
        patterns: Files to download.
        with_code: Download the model's Python files too.

    Raises:
        ModelError: The base does not exist, a GGUF file can't be read, or a link leads out of the folder.
    """
    if (gguf := _find_gguf(base)) is not None:
        return Place(gguf_folder(gguf, sampled_sha256(gguf)), gguf)
    folder = Path(base).expanduser()
    if not folder.is_dir():
        return Place(_download(base, revision, patterns + ["*.py"] * with_code))
    _check_links(folder)
    return Place(folder)


def _find_gguf(base: str) -> Path | None:
    """Return the GGUF file that a base names, or the one of a folder without safetensors; None without one.

    Raises:
        ModelError: A folder has several, the file does not exist, or it is a part of a model.
    """
    path = Path(base).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise ModelError(f"The GGUF file {base} does not exist.")
        return _whole_gguf(path)
    found = sorted(path.glob("*.gguf")) if path.is_dir() and not any(path.glob("*.safetensors")) else []
    if len(found) > 1 and not all(GGUF_PART.fullmatch(file.name) for file in found):
        names = ", ".join(file.name for file in found[:4])
        raise ModelError(f"{base} has {len(found)} GGUF files ({names}); name one of them in model.base.")
    return _whole_gguf(found[0]) if found else None


def _whole_gguf(path: Path) -> Path:
    """Return a GGUF file, after checking that its name is not that of a part.

    Raises:
        ModelError: It is.
    """
    match = GGUF_PART.fullmatch(path.name)
    if match is not None and int(match["count"]) > 1:
        raise ModelError(
            f"{path} is one of {int(match['count'])} parts; join them with llama.cpp's gguf-split --merge, and name "
            "the result."
        )
    return path


def _check_links(folder: Path) -> None:
    """Check that no file is a link out of the folder, since a release copies what the folder holds.

    In the hub's cache, links lead to the model's blobs, and from there to wherever its client keeps those.

    Raises:
        ModelError: A link leads elsewhere.
    """
    here = folder.resolve()
    blobs = here.parent.parent / "blobs" if here.parent.name == "snapshots" else None
    for path in (*here.glob("*"), *here.glob("*/*")):
        if not path.is_symlink() or path.resolve().is_relative_to(here):
            continue
        if Path(os.path.normpath(path.parent / path.readlink())).parent != blobs:
            raise ModelError(f"{path} is a link to {path.readlink()}, outside of {folder}; replace it by the file.")


def _download(base: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    if Path(base).expanduser().is_file():
        raise ModelError(f"{base} is a file; name a model folder, a GGUF file or a model id on the hub.")
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(f"The model folder {base} does not exist.")
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_DUPLICATES))
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).splitlines()[0].removeprefix("Got: ") if str(error) else type(error).__name__
        raise ModelError(
            f"There is no folder {base}, and no model {base} could be downloaded from the hub: "
            f"{reason}. Check the name, run hf auth login for a gated model, or name a local folder."
        ) from error
