"""A whole config: the five sections together."""

from pydantic import ValidationInfo, field_validator

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

    @field_validator("train")
    @classmethod
    def _check_keep(cls, value: TrainSection, info: ValidationInfo) -> TrainSection:
        lora = info.data.get("lora")  # absent if invalid itself
        if value.keep is not None and value.keep.kl and lora is not None and lora.modules_to_save:
            raise ValueError(
                "keep.kl compares the model with its base, whose embedding or head is replaced by lora.modules_to_save "
                f"{lora.modules_to_save}; leave that empty, or remove keep.kl"
            )
        return value

    @field_validator("train")
    @classmethod
    def _check_embedding_rate(cls, value: TrainSection, info: ValidationInfo) -> TrainSection:
        data, lora = info.data.get("data"), info.data.get("lora")  # absent if invalid themselves
        trains_rows = data is None or lora is None or data.new_tokens or lora.modules_to_save
        if value.embedding_learning_rate is not None and not trains_rows:
            raise ValueError(
                "embedding_learning_rate is set, but no embedding or head is trained; set lora.modules_to_save or "
                "data.new_tokens, or remove it"
            )
        return value
