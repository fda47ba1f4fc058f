"""File I/O: atomic writes, locks, JSON, safetensors, and a base's files."""

from qlora.files.atomic import atomic_folder, discard, free_bytes, make_folder, old_name, sync, write_bytes, write_text
from qlora.files.base_files import BaseFiles, find_adapter, find_tokenizer
from qlora.files.lock import hold_lock

__all__ = [
    "BaseFiles",
    "discard",
    "find_adapter",
    "find_tokenizer",
    "free_bytes",
    "hold_lock",
    "make_folder",
    "old_name",
    "sync",
    "atomic_folder",
    "write_bytes",
    "write_text",
]
