"""Typed config sections, read from YAML with overrides."""

from qlora.config.load import absolute_paths, dump_config, load_config
from qlora.config.sections import (
    DataSection,
    EvalSection,
    ExportSection,
    LoraSection,
    ModelSection,
    PreferenceSection,
    RunConfig,
    SamplesSection,
    SourceSection,
    TrainSection,
    metric_name,
)

__all__ = [
    "DataSection",
    "EvalSection",
    "ExportSection",
    "LoraSection",
    "ModelSection",
    "PreferenceSection",
    "RunConfig",
    "SamplesSection",
    "SourceSection",
    "TrainSection",
    "absolute_paths",
    "dump_config",
    "load_config",
    "metric_name",
]
