"""Files of a run: adapters in PEFT's format, training state, the run directory, and the base's files."""

from qlora.checkpoint.adapter import (
    adapter_digest,
    adapter_scaling,
    load_adapter,
    read_adapter_config,
    read_adapter_rows,
    read_adapter_tensors,
    save_adapter,
)
from qlora.checkpoint.adapter_rows import StoredRows
from qlora.checkpoint.atomic import (
    discard,
    free_bytes,
    make_folder,
    old_name,
    sync,
    write_aside,
    write_bytes,
    write_text,
)
from qlora.checkpoint.base_files import BaseFiles, find_tokenizer
from qlora.checkpoint.lock import hold_lock
from qlora.checkpoint.run_dir import RunDirectory, step_of
from qlora.checkpoint.state import (
    adapter_bytes,
    check_whole,
    checkpoint_bytes,
    drop_old_checkpoints,
    load_state,
    newest_whole,
    read_origin,
    save_checkpoint,
    set_aside,
)

__all__ = [
    "BaseFiles",
    "RunDirectory",
    "StoredRows",
    "adapter_bytes",
    "adapter_digest",
    "adapter_scaling",
    "check_whole",
    "checkpoint_bytes",
    "discard",
    "drop_old_checkpoints",
    "find_tokenizer",
    "free_bytes",
    "hold_lock",
    "load_adapter",
    "load_state",
    "make_folder",
    "newest_whole",
    "old_name",
    "read_adapter_config",
    "read_adapter_rows",
    "read_adapter_tensors",
    "read_origin",
    "save_adapter",
    "save_checkpoint",
    "set_aside",
    "step_of",
    "sync",
    "write_aside",
    "write_bytes",
    "write_text",
]
