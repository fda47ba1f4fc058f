"""A whole config: the sections together."""

from pydantic import ValidationInfo, field_validator

from qlora.config.sections.base import Section
from qlora.config.sections.data import IMAGES, DataSection
from qlora.config.sections.evaluation import EvalSection
from qlora.config.sections.export import ExportSection
from qlora.config.sections.lora import LoraSection
from qlora.config.sections.model import ModelSection
from qlora.config.sections.train import TOKEN_LOSS_OBJECTIVES, TrainSection


class RunConfig(Section):
    """A whole run: one YAML file."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    eval: EvalSection = EvalSection()
    train: TrainSection
    export: ExportSection = ExportSection()

    @field_validator("data")
    @classmethod
    def _check_sources(cls, value: DataSection) -> DataSection:
        formats = {source.format for source in value.sources}
        if IMAGES in formats and not value.has_images:
            raise ValueError("format is images for one source; set data.format: images, for all of them")
        if value.has_images and formats - {IMAGES, None}:
            raise ValueError("format is images, but one source has another; train on texts in another run")
        return value

    @field_validator("train")
    @classmethod
    def _check_images(cls, value: TrainSection, info: ValidationInfo) -> TrainSection:
        data, evaluation = info.data.get("data"), info.data.get("eval")
        if data is None or not data.has_images:  # absent if invalid itself
            return value
        if value.objective != "classify":
            raise ValueError(f"objective: {value.objective} learns from texts, but data.format is images; set classify")
        if value.classify_by == "tokens" and "classify_by" in value.model_fields_set:
            raise ValueError("classify_by: tokens answers with words, but data.format is images; set it to head")
        texts_only = {
            "train.neftune_alpha": value.neftune_alpha,
            "train.adversarial": value.adversarial,
            "train.keep": value.keep,
            "eval.metrics": evaluation.metrics if evaluation is not None else None,
        }
        if asked := [name for name, setting in texts_only.items() if setting]:
            raise ValueError(f"has data.format: images, but {' and '.join(asked)} is for texts; remove it")
        return value.model_copy(update={"classify_by": "head"})

    @field_validator("train")
    @classmethod
    def _check_groups(cls, value: TrainSection, info: ValidationInfo) -> TrainSection:
        data, lora = info.data.get("data"), info.data.get("lora")
        if data is None or lora is None:  # invalid themselves
            return value
        for group, reason in untrained_groups(lora, data, value).items():
            if group in value.learning_rates:
                raise ValueError(f"learning_rates has a rate of {group}, but {reason}, or remove it")
        return value

    @field_validator("model")
    @classmethod
    def _check_weights(cls, value: ModelSection) -> ModelSection:
        if value.weights in ("sharded", "host") and value.quantization == "none":
            raise ValueError(
                f"weights: {value.weights} is for weights in 4 bits, but quantization is none; set it to nf4, or "
                "weights to device"
            )
        return value

    @field_validator("lora")
    @classmethod
    def _check_reconstruct(cls, value: LoraSection, info: ValidationInfo) -> LoraSection:
        model = info.data.get("model")  # absent if invalid itself
        if value.init == "reconstruct" and model is not None and model.quantization == "none":
            raise ValueError(
                "init: reconstruct makes up for what the quantization lost, but model.quantization is none; set "
                "model.quantization: nf4 or another lora.init"
            )
        return value

    @field_validator("train")
    @classmethod
    def _check_keep(cls, value: TrainSection, info: ValidationInfo) -> TrainSection:
        lora = info.data.get("lora")  # absent if invalid itself
        if value.keep is not None and value.keep.null_space and lora is not None:
            conflicts = {
                "lora.kind: rows has no factor A to hide them from": lora.kind == "rows",
                f"lora.init: {lora.init} starts with an update that sees them": lora.init in ("pissa", "reconstruct"),
                "the adapter of lora.start_from sees them already; set lora.stack: true": lora.start_from is not None
                and not lora.stack,
            }
            if found := [reason for reason, is_so in conflicts.items() if is_so]:
                raise ValueError(f"keep.null_space hides inputs from new adapters, but {' and '.join(found)}")
        if value.keep is not None and value.keep.kl and value.objective in ("reward", "classify"):
            raise ValueError(
                f"keep.kl compares predictions of whole answers, which train.objective: {value.objective} does not "
                "learn; remove keep.kl"
            )
        if value.keep is not None and value.keep.kl and lora is not None and lora.modules_to_save:
            raise ValueError(
                "keep.kl compares the model with its base, whose embedding or head is replaced by lora.modules_to_save "
                f"{lora.modules_to_save}; leave that empty, or remove keep.kl"
            )
        return value

    @field_validator("eval")
    @classmethod
    def _check_metrics(cls, value: EvalSection, info: ValidationInfo) -> EvalSection:
        data = info.data.get("data")  # absent if invalid itself
        if data is not None and value.metrics and not data.measured:
            raise ValueError("metrics compares answers to held-out rows, but no rows are held out; set data.eval")
        return value

    @field_validator("train")
    @classmethod
    def _check_best(cls, value: TrainSection, info: ValidationInfo) -> TrainSection:
        data, metric = info.data.get("data"), value.best_metric
        if data is None or metric is None:
            return value
        key = "keep_best" if value.early_stopping is None else "early_stopping"
        if value.eval_every is None:
            raise ValueError(f"{key} compares evaluations, but eval_every is null; set an interval")
        if not any(metric.startswith(f"{name}_") for name in data.measured):
            measured = f"the sets are {', '.join(data.measured)}" if data.measured else "no rows are held out"
            raise ValueError(
                f"{key} compares by {metric}, but {measured}; set data.eval, and name a metric such as eval_loss"
            )
        return value

    @field_validator("train")
    @classmethod
    def _check_rows(cls, value: TrainSection, info: ValidationInfo) -> TrainSection:
        data = info.data.get("data")  # absent if invalid itself
        if data is None or value.objective in TOKEN_LOSS_OBJECTIVES:
            return value
        what = "labels" if value.objective == "classify" else "judged answers"
        if data.loss_on != "assistant":
            raise ValueError(
                f"objective: {value.objective} learns {what}, so data.loss_on: {data.loss_on} has no effect; remove it"
            )
        if data.overlong == "split":
            raise ValueError(
                f"objective: {value.objective} learns {what}, which can't be split, but data.overlong is split; set "
                "it to truncate, drop or error"
            )
        return value

    @field_validator("train")
    @classmethod
    def _check_classification(cls, value: TrainSection, info: ValidationInfo) -> TrainSection:
        data = info.data.get("data")  # absent if invalid itself
        if data is None:
            return value
        if value.objective != "classify":
            if data.labels is not None:
                raise ValueError(
                    f"objective is {value.objective}, but data.labels names labels; set objective: classify"
                )
            return value
        if isinstance(data.labels, dict) and value.classify_by == "head":
            raise ValueError("classify_by: head needs no words, but data.labels gives some; name the labels in a list")
        named = set(value.class_weights) if isinstance(value.class_weights, dict) else set()
        if data.labels is not None and (unknown := named - set(data.labels)):
            raise ValueError(f"class_weights names {', '.join(sorted(unknown))}, which data.labels does not have")
        return value


def untrained_groups(lora: LoraSection, data: DataSection, train: TrainSection) -> dict[str, str]:
    """Return the groups of `train.learning_rates` that a config does not train, each with what is missing."""
    reasons = {}
    if not train.has_scores:
        reasons["score"] = f"train.objective: {train.objective} trains no head of scores; choose another group"
    if not (data.new_tokens or lora.modules_to_save):
        reasons["embeddings"] = "no embedding or head is trained; set lora.modules_to_save or data.new_tokens"
    if lora.kind != "dora":
        reasons["magnitude"] = f"adapters of lora.kind {lora.kind} have no magnitude; choose another group"
    if lora.kind == "rows":
        reasons |= dict.fromkeys(("lora_A", "lora_B"), "lora.kind rows has no factors; choose another group")
    elif lora.train == "B":
        reasons["lora_A"] = "lora.train: B keeps A; choose another group"
    return reasons
