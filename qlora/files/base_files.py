"""The files of a base model: found, checked to be complete, and identified by a fingerprint."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.files.find_base import HUB_PATTERNS, ORIGINAL_PREFIX, TOKENIZER_PATTERNS, find_base
from qlora.files.headers import read_header
from qlora.files.json_files import read_object
from qlora.files.rope import extend_context
from qlora.files.sampled_hash import sampled_sha256

OTHER_WEIGHTS = ("adapter_model.safetensors",)
PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
MAX_PARTS = 10_000
# Not read, because reading a pickle can run code.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


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
        folder, gguf = find_base(base, revision, patterns, with_code)
        if not (folder / "config.json").is_file():
            remedy = "give a model folder of transformers"
            if (folder / "run.json").is_file():
                remedy = "it is a run: merge it with qlora merge, or name it as lora.start_from to train it further"
            elif not Path(base).expanduser().is_dir():
                remedy += ", or, if the repository has GGUF files, download one and name that"
            raise ModelError(f"{base} has no config.json; {remedy}.")
        files = cls(folder, base, gguf, rope_scaling)
        assert files.config is not None  # read now, so that a damaged file is reported before anything is loaded
        if with_weights and not files.weight_files:
            raise ModelError(f"{base} has no *.safetensors{describe_pickles(folder)}.")
        if with_weights:
            assert files.headers is not None
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
        return bool(self._named_files) and all(path.is_file() for path in self._named_files)

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
        headers = {path: read_header(path) for path in self.weight_files if path.suffix == ".safetensors"}
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
        """Return a SHA-256 per file: of all of config.json, and of what :func:`sampled_sha256` takes of the weights."""
        weights = {path.name: sampled_sha256(path) for path in self.weight_files}
        if self.gguf is not None:  # its config follows from it
            return weights
        return {"config.json": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()} | weights

    @cached_property
    def _named_files(self) -> list[Path]:
        """The GGUF file; or the files that the index names, and without one the single file or all parts of one."""
        if self.gguf is not None:
            return [self.gguf]
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
    return find_base(base, revision, TOKENIZER_PATTERNS, with_code).folder


def find_adapter(name: str) -> Path | None:
    """Return the folder of a PEFT adapter, with its tokenizer; None if a folder or hub repository holds none.

    Raises:
        ModelError: There is no such folder or repository.
    """
    folder, _ = find_base(name, None, [*TOKENIZER_PATTERNS, "adapter_model.safetensors"])
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
