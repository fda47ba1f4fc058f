"""Files of a run: adapters in PEFT's format, training state, the run's record and its directory."""

from qlora.checkpoint.adapter import load_adapter, save_adapter, wrap_adapter
from qlora.checkpoint.adapter_rows import StoredRows
from qlora.checkpoint.evaluations import evaluation_metrics, is_evaluated, metric_label, mode_of
from qlora.checkpoint.peft_folder import (
    PeftAdapter,
    adapter_digest,
    read_adapter,
    read_adapter_config,
)
from qlora.checkpoint.record import (
    BaseRecord,
    Best,
    ExampleCounts,
    InUse,
    Inventory,
    MemoryUse,
    Quantization,
    RunRecord,
)
from qlora.checkpoint.releases import read_releases, record_release
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
    "Best",
    "ExampleCounts",
    "InUse",
    "Inventory",
    "MemoryUse",
    "Quantization",
    "PeftAdapter",
    "RunDirectory",
    "RunRecord",
    "StoredRows",
    "adapter_bytes",
    "adapter_digest",
    "check_whole",
    "checkpoint_bytes",
    "drop_old_checkpoints",
    "evaluation_metrics",
    "is_evaluated",
    "metric_label",
    "mode_of",
    "load_adapter",
    "load_state",
    "newest_whole",
    "read_adapter",
    "read_adapter_config",
    "read_origin",
    "read_releases",
    "read_starts",
    "record_release",
    "save_adapter",
    "save_checkpoint",
    "quarantine",
    "write_starts",
    "step_of",
    "wrap_adapter",
]
