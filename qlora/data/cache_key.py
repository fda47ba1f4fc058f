"""Cache keys: hashes of everything that a source's tokenized examples depend on."""

import hashlib
import json
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from qlora.data.options import EncodeOptions
from qlora.data.rows import load_hub
from qlora.data.sources import Source, find_files
from qlora.errors import DataError


def key_of(source: Source, tokenizer: Any, options: EncodeOptions) -> str:
    """Return the cache key of a source's tokenized examples.

    Raises:
        DataError: A file can't be read.
    """
    paths = find_files(source)
    if paths and source.max_rows is None:
        content: Any = [(str(path.absolute()), _hash_file(path)) for path in paths]
    elif paths:  # hashing a large file may take much longer than reading its first rows
        stats = [(path.absolute(), path.stat()) for path in paths]
        content = [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    else:
        content = [(file["filename"], Path(file["filename"]).stat().st_size) for file in load_hub(source).cache_files]
    parts = [
        _hash_of_code(),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        asdict(replace(options, on_bad_row="drop")),
        asdict(replace(source, weight=1.0)),
        content,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def stamps_of(source: Source) -> list[tuple[int, int]]:
    """Return size and modification time of each file of a source."""
    return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in find_files(source))]


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from None


@cache
def _hash_of_code() -> str:
    """Hash the code that reads, renders and tokenizes, as a change to it may change the result."""
    digest = hashlib.sha256()
    readers = [files("qlora.files") / "json_values.py", *files("qlora.data").iterdir()]
    for file in sorted(readers, key=lambda entry: entry.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    for package in ("transformers", "tokenizers", "datasets"):
        digest.update(version(package).encode())
    return digest.hexdigest()
