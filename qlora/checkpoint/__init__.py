"""Files of a run: adapters in PEFT's format, training state, the run's record and its directory."""

from qlora.checkpoint.adapter import (
    adapter_digest,
    adapter_scalings,
    load_adapter,
    read_adapter_config,
    read_adapter_rows,
    read_adapter_tensors,
    save_adapter,
)
from qlora.checkpoint.adapter_rows import StoredRows
from qlora.checkpoint.record import (
    BaseRecord,
    ExampleCounts,
    InUse,
    Inventory,
    MemoryUse,
    Quantization,
    RunRecord,
)
from qlora.checkpoint.run_dir import RunDirectory, step_of
from qlora.checkpoint.starts import read_starts, write_starts
from qlora.checkpoint.state import (
    adapter_bytes,
    check_whole,
    checkpoint_bytes,
    drop_old_checkpoints,
    load_state,
    newest_whole,
    quarantine,
    read_origin,
    save_checkpoint,
)

__all__ = [
    "BaseRecord",
    "ExampleCounts",
    "InUse",
    "Inventory",
    "MemoryUse",
    "Quantization",
    "RunDirectory",
    "RunRecord",
    "StoredRows",
    "adapter_bytes",
    "adapter_digest",
    "adapter_scalings",
    "check_whole",
    "checkpoint_bytes",
    "drop_old_checkpoints",
    "load_adapter",
    "load_state",
    "newest_whole",
    "read_adapter_config",
    "read_adapter_rows",
    "read_adapter_tensors",
    "read_origin",
    "read_starts",
    "save_adapter",
    "save_checkpoint",
    "quarantine",
    "write_starts",
    "step_of",
]
