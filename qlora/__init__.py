"""Memory-efficient QLoRA training: an NF4 base, bf16 LoRA, and merged weights that are verified."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qlora.about import __version__, unsupported_reason
from qlora.errors import CheckpointError, ConfigError, DataError, ExportError, ModelError, QLoRAError

if TYPE_CHECKING:
    from qlora.config import RunConfig, load_config
    from qlora.export import MergeReport, merge
    from qlora.lora import LoraLinear, adapters_off, add_lora
    from qlora.model import load_base, load_run
    from qlora.nf4 import NF4Linear
    from qlora.proof import VerifyReport, verify
    from qlora.training import RunResult, train

# Imported at first use: torch takes seconds, and `qlora --help` should not.
_HOMES = {
    "LoraLinear": "qlora.lora",
    "MergeReport": "qlora.export",
    "NF4Linear": "qlora.nf4",
    "RunConfig": "qlora.config",
    "RunResult": "qlora.training",
    "VerifyReport": "qlora.proof",
    "adapters_off": "qlora.lora",
    "add_lora": "qlora.lora",
    "load_base": "qlora.model",
    "load_config": "qlora.config",
    "load_run": "qlora.model",
    "merge": "qlora.export",
    "train": "qlora.training",
    "verify": "qlora.proof",
}

__all__ = [
    "__version__",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "LoraLinear",
    "MergeReport",
    "ModelError",
    "NF4Linear",
    "QLoRAError",
    "RunConfig",
    "RunResult",
    "VerifyReport",
    "adapters_off",
    "add_lora",
    "load_base",
    "load_config",
    "load_run",
    "merge",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora' has no attribute '{name}'")
    if reason := unsupported_reason():
        raise QLoRAError(reason)
    return getattr(import_module(_HOMES[name]), name)
