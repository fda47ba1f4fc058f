"""Files of a run: adapters in PEFT's format, training state, the run directory, and the base's files."""

from qlora.checkpoint.adapter import load_adapter, read_adapter_config, read_adapter_tensors, save_adapter
from qlora.checkpoint.atomic import write_aside, write_text
from qlora.checkpoint.base_files import BaseFiles, find_tokenizer
from qlora.checkpoint.run_dir import RunDirectory, step_of
from qlora.checkpoint.state import drop_old_checkpoints, load_state, save_checkpoint

__all__ = [
    "BaseFiles",
    "RunDirectory",
    "drop_old_checkpoints",
    "find_tokenizer",
    "load_adapter",
    "load_state",
    "read_adapter_config",
    "read_adapter_tensors",
    "save_adapter",
    "save_checkpoint",
    "step_of",
    "write_aside",
    "write_text",
]
