"""Memory-efficient QLoRA training: an NF4 base, bf16 LoRA, and merged weights that are verified."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qlora.about import __version__, unsupported_reason
from qlora.allocator import use_expandable_segments
from qlora.errors import CheckpointError, ConfigError, DataError, ExportError, ModelError, QLoRAError

if TYPE_CHECKING:
    from qlora.checkpoint import save_adapter
    from qlora.config import RunConfig, load_config
    from qlora.export import MergeReport, QuantizeReport, quantize
    from qlora.lora import LoraLinear, adapters_off, add_lora
    from qlora.model import Prediction, generate, load_base, load_run, predict
    from qlora.nf4 import NF4Linear
    from qlora.pages import RunsReport, report
    from qlora.proof import VerifyReport, verify
    from qlora.training import (
        Callback,
        EvaluationReport,
        Preview,
        RunResult,
        StopTraining,
        TuneReport,
        estimate,
        evaluate,
        merge,
        preview,
        train,
        tune,
    )

# Here, because nothing can have been put on a GPU by this package before.
use_expandable_segments()

# Imported at first use: torch takes seconds, and `qlora --help` should not.
_HOMES = {
    "Callback": "qlora.training",
    "EvaluationReport": "qlora.training",
    "LoraLinear": "qlora.lora",
    "MergeReport": "qlora.export",
    "NF4Linear": "qlora.nf4",
    "Prediction": "qlora.model",
    "Preview": "qlora.training",
    "QuantizeReport": "qlora.export",
    "RunConfig": "qlora.config",
    "RunResult": "qlora.training",
    "RunsReport": "qlora.pages",
    "StopTraining": "qlora.training",
    "TuneReport": "qlora.training",
    "VerifyReport": "qlora.proof",
    "adapters_off": "qlora.lora",
    "add_lora": "qlora.lora",
    "estimate": "qlora.training",
    "evaluate": "qlora.training",
    "generate": "qlora.model",
    "load_base": "qlora.model",
    "load_config": "qlora.config",
    "load_run": "qlora.model",
    "merge": "qlora.training",
    "predict": "qlora.model",
    "preview": "qlora.training",
    "quantize": "qlora.export",
    "report": "qlora.pages",
    "save_adapter": "qlora.checkpoint",
    "train": "qlora.training",
    "tune": "qlora.training",
    "verify": "qlora.proof",
}

__all__ = [
    "__version__",
    "Callback",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EvaluationReport",
    "ExportError",
    "LoraLinear",
    "MergeReport",
    "ModelError",
    "NF4Linear",
    "Prediction",
    "Preview",
    "QLoRAError",
    "QuantizeReport",
    "RunConfig",
    "RunResult",
    "RunsReport",
    "StopTraining",
    "TuneReport",
    "VerifyReport",
    "adapters_off",
    "add_lora",
    "estimate",
    "evaluate",
    "generate",
    "load_base",
    "load_config",
    "load_run",
    "merge",
    "predict",
    "preview",
    "quantize",
    "report",
    "save_adapter",
    "train",
    "tune",
    "verify",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora' has no attribute '{name}'")
    if reason := unsupported_reason():
        raise QLoRAError(reason)
    return getattr(import_module(_HOMES[name]), name)
