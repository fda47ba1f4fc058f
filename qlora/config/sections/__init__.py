"""The schema of a config: sections, keys, types, defaults, ranges and meanings."""

from qlora.config.sections.data import DataSection, SourceSection
from qlora.config.sections.evaluation import EvalSection, SamplesSection, metric_name
from qlora.config.sections.export import ExportSection
from qlora.config.sections.lora import LoraSection
from qlora.config.sections.model import ModelSection
from qlora.config.sections.objectives import PreferenceSection
from qlora.config.sections.run import RunConfig
from qlora.config.sections.train import TrainSection
from qlora.config.sections.values import layer_indices, parse_duration, parse_size, rate_factor

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
    "layer_indices",
    "metric_name",
    "parse_duration",
    "parse_size",
    "rate_factor",
]
