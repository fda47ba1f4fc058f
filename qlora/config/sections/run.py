"""A whole config: the five sections together."""

from qlora.config.sections.base import Section
from qlora.config.sections.data import DataSection
from qlora.config.sections.export import ExportSection
from qlora.config.sections.lora import LoraSection
from qlora.config.sections.model import ModelSection
from qlora.config.sections.train import TrainSection


class RunConfig(Section):
    """A whole run: one YAML file."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection
    export: ExportSection = ExportSection()
