"""The files of a base model: found, checked to be complete, and identified by a fingerprint."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.files.gguf_folder import gguf_folder
from qlora.files.headers import read_header
from qlora.files.json_files import read_object
from qlora.files.rope import extend_context

TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]
HUB_PATTERNS = [*TOKENIZER_PATTERNS, "*.safetensors", "LICENSE*", "NOTICE*", "README.md"]
# Other layouts of the same weights, in Mistral's and Meta's own names.
ORIGINAL_PREFIX = "consolidated"
HUB_DUPLICATES = [f"{ORIGINAL_PREFIX}*.safetensors", "original/*"]
OTHER_WEIGHTS = ("adapter_model.safetensors",)
PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
GGUF_PART = re.compile(r".+-\d{5}-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 10_000
# Not read, because reading a pickle can run code.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SAMPLE_BYTES = 1 << 16
NUM_SAMPLES = 64
# Enough for the largest vocabularies.
GGUF_HEADER_BYTES = 1 << 24


@dataclass(frozen=True)
class BaseFiles:
    """A folder with a model's config, tokenizer and weights in safetensors, or a GGUF file with all of them.

    Attributes:
        folder: The folder; for a GGUF file, one with what it says besides its weights.
        name: The folder, file or hub id passed to :meth:`resolve`.
        gguf: The GGUF file that holds the weights, instead of safetensors.
        rope_scaling: A longer context than the model's own, see :func:`qlora.files.rope.extend_context`.
    """

    folder: Path
    name: str
    gguf: Path | None = None
    rope_scaling: Mapping[str, Any] | None = None

    @classmethod
    def resolve(
        cls,
        base: str,
        revision: str | None = None,
        with_code: bool = False,
        with_weights: bool = True,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> "BaseFiles":
        """Find a base by folder or hub id; download what is not in the hub's cache.

        Args:
            base: A folder, a GGUF file, a folder with one, or a model id on the hub.
            revision: Revision on the hub.
            with_code: Download the model's Python files too.
            with_weights: Download the weights too, and check that they are complete.
            rope_scaling: Extends the context, see :func:`qlora.files.rope.extend_context`.

        Raises:
            ModelError: The base does not exist, has no config or safetensors, a file is damaged, a link leads out of
                the folder, or its context can't be extended.
        """
        patterns = HUB_PATTERNS if with_weights else TOKENIZER_PATTERNS
        if (gguf := _find_gguf(base)) is not None:
            files = cls(gguf_folder(gguf, _sampled_sha256(gguf)), base, gguf, rope_scaling)
            assert files.config is not None
            return files
        folder = _find_folder(base, revision, patterns, with_code)
        if not (folder / "config.json").is_file():
            remedy = "give a model folder of transformers"
            if not Path(base).expanduser().is_dir():
                remedy += ", or, if the repository has GGUF files, download one and name that"
            raise ModelError(f"{base} has no config.json; {remedy}.")
        files = cls(folder, base, rope_scaling=rope_scaling)
        assert files.config is not None  # read now, so that a damaged file is reported before anything is loaded
        if with_weights and not files.weight_files:
            raise ModelError(f"{base} has no *.safetensors{describe_pickles(folder)}.")
        if with_weights:
            assert files.headers
        return files

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json, with the context extended.

        Raises:
            ModelError: It is not a JSON object, or its context can't be extended.
        """
        config = read_object(self.folder / "config.json", ModelError, "download it again")
        return config if self.rope_scaling is None else extend_context(config, self.rope_scaling, self.name)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files that make up the model's weights.

        Raises:
            ModelError: The index is damaged, or a file is missing or not a weight file of this folder.
        """
        if self.gguf is not None:
            return [self.gguf]
        files = self._named_files
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            named_by = "which its index names" if self._has_index else "a part of the same model"
            raise ModelError(f"{self.name} lacks {', '.join(missing)}, {named_by}; download it again.")
        if (self.folder / SINGLE_FILE).is_file() and self.folder / SINGLE_FILE not in files:
            raise ModelError(f"{self.folder} has {SINGLE_FILE} and {INDEX_FILE} for other files; remove one of them.")
        return files

    @property
    def has_weights(self) -> bool:
        """Whether all weight files are in the folder, rather than its config alone."""
        return self.gguf is not None or bool(self._named_files) and all(path.is_file() for path in self._named_files)

    @cached_property
    def tensors(self) -> dict[str, Path]:
        """Tensor names and the files they are in, in the files' order."""
        return {name: path for path, header in self.headers.items() for name in header}

    @cached_property
    def headers(self) -> dict[Path, dict[str, Any]]:
        """Dtype, shape and offsets of the tensors in each safetensors file.

        Raises:
            ModelError: A file is cut short or damaged, or two of them hold the same tensor.
        """
        headers = {path: read_header(path) for path in self.weight_files}
        found: dict[str, Path] = {}
        for path, header in headers.items():
            if twice := next((name for name in header if name in found), None):
                raise ModelError(
                    f"{self.folder}: {found[twice].name} and {path.name} both hold {twice}; remove the files that do "
                    "not belong to the model."
                )
            found |= dict.fromkeys(header, path)
        return headers

    @property
    def commit(self) -> str | None:
        """The commit on the hub, for files in its cache."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def differing(self, fingerprint: dict[str, str]) -> list[str]:
        """Return the names of the files that differ from an earlier fingerprint."""
        here = self.fingerprint()
        return sorted(name for name in {*fingerprint, *here} if fingerprint.get(name) != here.get(name))

    def fingerprint(self) -> dict[str, str]:
        """Return a SHA-256 per file: of all of config.json, and of a weight file's size, header and spaced samples.

        64 samples of 64 KiB distinguish fine-tunes of a model in a second, while hashing 140 GB takes minutes.
        """
        if self.gguf is not None:  # whose config follows from it
            return {self.gguf.name: _sampled_sha256(self.gguf)}
        hashes = {"config.json": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()}
        return hashes | {path.name: _sampled_sha256(path) for path in self.weight_files}

    @cached_property
    def _named_files(self) -> list[Path]:
        """The weight files that the index names; without an index, the single one, or all parts of one."""
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if not self._has_index:
            return [single] if single.is_file() else self._parts()
        weight_map = read_object(index, ModelError, "download it again").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} is damaged; download it again (it has no weight_map).")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index} names {name!r:.80}, which is not a *.safetensors of its folder.")
        return [self.folder / name for name in names]

    @property
    def _has_index(self) -> bool:
        return (self.folder / INDEX_FILE).is_file()

    def _parts(self) -> list[Path]:
        """Return the weight files of a folder without an index; missing ones are known by the numbers of the others."""
        names = {path.name for path in self.folder.glob("*.safetensors")}
        names = {name for name in names if name not in OTHER_WEIGHTS and not name.startswith(ORIGINAL_PREFIX)}
        for match in filter(None, map(PART.fullmatch, sorted(names))):
            count = min(int(match["count"]), MAX_PARTS)
            names |= {f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors" for number in range(1, count + 1)}
        return [self.folder / name for name in sorted(names)]


def find_tokenizer(base: str, revision: str | None = None, with_code: bool = False) -> Path:
    """Return the folder of a base's tokenizer, without its weights; see :meth:`BaseFiles.resolve`."""
    if _find_gguf(base) is not None:
        return BaseFiles.resolve(base).folder
    return _find_folder(base, revision, TOKENIZER_PATTERNS, with_code)


def find_adapter(name: str) -> Path | None:
    """Return the folder of a PEFT adapter, with its tokenizer; None if a folder or hub repository holds none.

    Raises:
        ModelError: There is no such folder or repository.
    """
    if _find_gguf(name) is not None:
        return None
    folder = _find_folder(name, None, [*TOKENIZER_PATTERNS, "adapter_model.safetensors"], with_code=False)
    return folder if (folder / "adapter_config.json").is_file() else None


def unsupported_format(base: str, stored_in: str) -> ModelError:
    """Return the error for a base whose weights are stored in a format that cannot be read."""
    return ModelError(
        f"{base} is stored in {stored_in}, which is not supported; use the same model in 16-bit safetensors."
    )


def describe_pickles(folder: Path) -> str:
    """Return the end of an error about missing files that names the pickled ones there; empty if there are none."""
    names = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not names:
        return ""
    return (
        f"; pickled weights are not read, because they can run code ({', '.join(names[:4])}): use a revision in "
        "safetensors, or, if you trust them, load them with transformers and save them"
    )


def _find_folder(base: str, revision: str | None, patterns: list[str], with_code: bool) -> Path:
    folder = Path(base).expanduser()
    if not folder.is_dir():
        return _download(base, revision, patterns + ["*.py"] * with_code)
    _check_links(folder)
    return folder


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

    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(f"The model folder {base} does not exist.")
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_DUPLICATES))
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{base} is not a local folder, and could not be downloaded from the hub: {reason}") from error


def _sampled_sha256(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        length = file.read(8)
        # A GGUF file does not say how long its header is.
        num_bytes = GGUF_HEADER_BYTES if path.suffix == ".gguf" else int.from_bytes(length, "little")
        digest.update(length + file.read(num_bytes))
        for sample in range(NUM_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
