"""The files of a base model: found, checked to be whole, and told apart by a fingerprint."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qlora.errors import ModelError
from qlora.files.headers import read_header
from qlora.files.json_files import read_object

TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]
HUB_PATTERNS = [*TOKENIZER_PATTERNS, "*.safetensors", "LICENSE*", "NOTICE*", "README.md"]
HUB_DUPLICATES = ["consolidated*.safetensors", "original/*"]
# Python objects, which are programs to whoever reads them.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
SAMPLE_BYTES = 1 << 16
NUM_SAMPLES = 64


@dataclass(frozen=True)
class BaseFiles:
    """A folder with a model's config, weights in safetensors, and tokenizer.

    Attributes:
        folder: Where they are.
        name: The folder or hub id that was asked for.
    """

    folder: Path
    name: str

    @classmethod
    def resolve(cls, base: str, revision: str | None = None, with_code: bool = False) -> "BaseFiles":
        """Finds a base by folder or hub id; downloads what is not in the hub's cache.

        Args:
            base: A folder, or an id on the hub.
            revision: On the hub.
            with_code: Download the Python files that come with it, too.

        Raises:
            ModelError: It is neither, has no config or safetensors, a file is damaged or leads elsewhere.
        """
        folder = _find_folder(base, revision, HUB_PATTERNS, with_code)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{base} has no config.json, so it is no model folder of transformers.")
        files = cls(folder, base)
        if not files.weight_files:
            raise ModelError(f"{base} holds no *.safetensors{describe_pickles(folder)}.")
        assert files.headers  # read now, so that a damaged file is told before anything is loaded
        assert files.config is not None
        return files

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json.

        Raises:
            ModelError: It is no JSON object.
        """
        return read_object(self.folder / "config.json", ModelError, "download it again")

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that make up the model.

        Raises:
            ModelError: The index is damaged, or names what is not there or no weight file of this folder.
        """
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.is_file():
            weight_map = read_object(index, ModelError, "download it again").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelError(f"{index} is damaged; download it again (it has no weight_map).")
            names = set(map(str, weight_map.values()))
            wrong = sorted(name for name in names if Path(name).name != name or not name.endswith(".safetensors"))
            if wrong:
                raise ModelError(f"{index} names {wrong[0]!r:.80}, which is no *.safetensors of its folder.")
            missing = sorted(name for name in names if not (self.folder / name).is_file())
            if missing:
                raise ModelError(f"{self.name} lacks {', '.join(missing)}, which its index names; download it again.")
            if single.is_file() and single.name not in names:
                raise ModelError(
                    f"{self.folder} has {single.name} and {index.name} for other files; remove one of them."
                )
            return [self.folder / name for name in sorted(names)]
        return [single] if single.is_file() else []

    @cached_property
    def tensors(self) -> dict[str, Path]:
        """Tensor names and the files they are in, in the files' order."""
        return {name: path for path, header in self.headers.items() for name in header}

    @cached_property
    def headers(self) -> dict[Path, dict[str, Any]]:
        """What each weight file says of its tensors: dtype, shape and place.

        Raises:
            ModelError: A file is cut short or damaged.
        """
        return {path: read_header(path) for path in self.weight_files}

    def open_tensors(self) -> dict[str, Any]:
        """All tensors by name, each read from its file when it is indexed, and not before."""
        # Read and not mapped: pages of a mapped file count as this process's memory until the system wants them back.
        return {
            name: file.get_slice(name)
            for path, header in self.headers.items()
            for file in [safe_open(path, framework="pt", backend="pread")]
            for name in header
        }

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor as stored; None if it is not there by this name, or there in 4 bits."""
        if name not in self.tensors or f"{name}.absmax" in self.tensors:
            return None
        return tuple(self.headers[self.tensors[name]][name]["shape"])

    def dtype_name(self, name: str) -> str:
        """Dtype of a tensor as safetensors writes it: F16, BF16, I64, …"""
        return self.headers[self.tensors[name]][name]["dtype"]

    @property
    def most_parameters(self) -> int:
        """That the weight files can hold: their values, or as many as a bit each would make where they are packed."""
        entries = [entry for header in self.headers.values() for entry in header.values()]
        if "quantization_config" in self.config or self.is_bitsandbytes_4bit:
            return 8 * sum(last - first for first, last in (entry["data_offsets"] for entry in entries))
        return sum(prod(entry["shape"]) for entry in entries)

    @property
    def commit(self) -> str | None:
        """The commit on the hub, for files in its cache."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def differing(self, fingerprint: dict[str, str]) -> list[str]:
        """Names of the files that are not those of an earlier fingerprint."""
        here = self.fingerprint()
        return sorted(name for name in {*fingerprint, *here} if fingerprint.get(name) != here.get(name))

    @property
    def is_bitsandbytes_4bit(self) -> bool:
        """Whether the weights are in bitsandbytes' 4-bit format already."""
        return any(".quant_state.bitsandbytes__" in name for name in self.tensors)

    def fingerprint(self) -> dict[str, str]:
        """A hash per file: of config.json whole; of a weight file its size, header and evenly spaced samples.

        Samples of 64 × 64 KiB tell fine-tunes of a model apart in a second where hashing 140 GB takes minutes.
        """
        hashes = {"config.json": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()}
        return hashes | {path.name: _sampled_sha256(path) for path in self.weight_files}


def find_tokenizer(base: str, revision: str | None = None, with_code: bool = False) -> Path:
    """The folder of a base's tokenizer, without downloading its weights; see :meth:`BaseFiles.resolve`."""
    return _find_folder(base, revision, TOKENIZER_PATTERNS, with_code)


def describe_pickles(folder: Path) -> str:
    """What an error says of the pickled files in a folder that lacks others: nothing where there are none."""
    names = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not names:
        return ""
    return (
        f"; pickled weights are not read, as they can run code ({', '.join(names[:4])}): take a revision in "
        "safetensors, or, where you trust them, load them with transformers and save them"
    )


def _find_folder(base: str, revision: str | None, patterns: list[str], with_code: bool) -> Path:
    folder = Path(base).expanduser()
    if not folder.is_dir():
        return _download(base, revision, patterns + ["*.py"] * with_code)
    _check_links(folder)
    return folder


def _check_links(folder: Path) -> None:
    """Sees that no file is a link out of the folder: what is found there is read, and released with what is made of it.

    In the hub's cache, links lead to the model's blobs, and from there to wherever its client keeps those.
    """
    here = folder.resolve()
    blobs = here.parent.parent / "blobs" if here.parent.name == "snapshots" else None
    for path in (*here.glob("*"), *here.glob("*/*")):
        if not path.is_symlink() or path.resolve().is_relative_to(here):
            continue
        if Path(os.path.normpath(path.parent / path.readlink())).parent != blobs:
            raise ModelError(f"{path} is a link to {path.readlink()}, outside of {folder}; put the file itself there.")


def _download(base: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(f"There is no model folder {base}.")
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_DUPLICATES))
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{base} is no model folder here, and can't be had from the hub: {reason}") from error


def _sampled_sha256(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        length = file.read(8)
        digest.update(length + file.read(int.from_bytes(length, "little")))
        for sample in range(NUM_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
