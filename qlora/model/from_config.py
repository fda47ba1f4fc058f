"""Base, adapters, data and optimizer from the sections of a config."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from qlora.config import DataSection, LoraSection, ModelSection, SourceSection, TrainSection
from qlora.config.sections import layer_indices, rate_factor
from qlora.data import (
    Datasets,
    EncodeOptions,
    ImageProcessor,
    Labels,
    Source,
    add_new_tokens,
    build_datasets,
    set_special_tokens,
)
from qlora.errors import ConfigError, ModelError
from qlora.files import BaseFiles
from qlora.lora import (
    AdapterSpec,
    LayerStart,
    ScoreHead,
    Targets,
    TrainedHead,
    apply_starts,
    check_ranks,
    match_targets,
    output_head,
    reset_experts,
    scores_documents,
    specs_of_experts,
    train_rows,
    trained_rows,
    wrap_experts,
    wrap_linears,
)
from qlora.model.base import load_frozen
from qlora.model.loss import Loss
from qlora.model.on_weight import OnWeight
from qlora.model.quantization import settings_of_base
from qlora.model.shares import check_share
from qlora.optim import FlatOptimizer, FlatParameters, make_optimizer
from qlora.processes import Processes

Specs = dict[str, AdapterSpec]


def base_files(section: ModelSection, with_weights: bool = True) -> BaseFiles:
    """Find the files of the base that a config names; see :meth:`BaseFiles.resolve`."""
    scaling = None if section.rope_scaling is None else section.rope_scaling.model_dump()
    return BaseFiles.resolve(
        section.base, section.revision, section.trust_remote_code, with_weights, rope_scaling=scaling
    )


def check_base(section: ModelSection, files: BaseFiles, skeleton: Any, dtype: torch.dtype) -> Any:
    """Check that a base will be in 4 bits as a config asks for, before its weights are read.

    Args:
        section: Model section of the config.
        files: The base's files; only config.json is read.
        skeleton: The base without weights.
        dtype: Compute dtype of the run.

    Returns:
        The settings that it will be quantized by; None for 16 bits.

    Raises:
        ModelError: `model.keep_16bit` is unknown or has no effect, or most weights would stay in 16 bits.
    """
    settings = settings_of_base(files, skeleton, section.quantization, section.double_quant, dtype, section.keep_16bit)
    if settings is not None and not section.allow_unquantized:
        check_share(files.name, skeleton, settings)
    return settings


def base_from_section(
    section: ModelSection,
    device: str | torch.device = "auto",
    on_weight: OnWeight | None = None,
    head: ScoreHead | None = None,
    seed: int = 0,
    processes: Processes | None = None,
) -> Any:
    """Load the base that a config names, frozen and without its tokenizer; see :func:`load_base` for other arguments.

    Args:
        section: Model section of the config. With `weights: auto`, the weights are on the device; one process alone
            has sharded weights on the host.
        device: See :func:`load_base`.
        on_weight: See :func:`load_base`.
        head: See :func:`load_base`.
        seed: See :func:`load_base`.
        processes: Processes that share the weights; None for this one alone.
    """
    settings = section.model_dump(exclude={"recompute", "weight_cache"})
    alone = {"auto": "device", "sharded": "host"}
    if processes is None:
        settings["weights"] = alone.get(section.weights, section.weights)
    return load_frozen(device=device, on_weight=on_weight, head=head, seed=seed, processes=processes, **settings)


def adapter_spec(section: LoraSection) -> AdapterSpec:
    """Return the specification of a config's adapters."""
    keys = {field.name for field in fields(AdapterSpec)}
    return AdapterSpec(**section.model_dump(include=keys))


def adapter_specs(model: Any, section: LoraSection, starts: Mapping[str, LayerStart] | None = None) -> Specs:
    """Return the specification of each layer that a config adapts, by its name.

    Args:
        model: A base, or its skeleton.
        section: LoRA section of the config.
        starts: Starts of the layers, whose ranks may differ from the config's.

    Raises:
        ModelError: A target or pattern matches nothing.
    """
    experts = expert_specs(model, section)
    names = match_targets(model, _targets(section))
    if not names and not experts:
        raise ModelError(
            "lora.targets selects only experts, which lora.expert_rank: 0 leaves as they are; set a rank, or others."
        )
    specs = adapter_spec(section).by_layer(names, others=experts)
    check_ranks(model, specs)
    ranks = _given_ranks(starts)
    return {name: spec.with_rank(ranks.get(name, spec.rank)) for name, spec in specs.items()}


def expert_specs(model: Any, section: LoraSection, starts: Mapping[str, LayerStart] | None = None) -> Specs:
    """Return the specification of each stack of experts that a config adapts, by its name.

    Args:
        model: A base, or its skeleton.
        section: LoRA section of the config.
        starts: Starts of the stacks, whose ranks may differ from the config's.

    Raises:
        ModelError: See :func:`adapter_specs`; or the config has keys that are for linear layers alone.
    """
    ranks = _given_ranks(starts)
    found = specs_of_experts(model, adapter_spec(section), _targets(section), section.expert_rank, ranks)
    if found and section.final_rank is not None:
        raise ModelError(
            f"lora.final_rank: {section.final_rank} is for linear layers; remove it, or set lora.expert_rank: 0."
        )
    return found


def _given_ranks(starts: Mapping[str, LayerStart] | None) -> dict[str, int]:
    """Return the ranks of layers and stacks that start from factors."""
    return {name: start.rank for name, start in (starts or {}).items() if start.rank is not None}


def _targets(section: LoraSection) -> Targets:
    layers = None if section.layers is None else layer_indices(section.layers)
    return Targets(section.targets, section.exclude, layers)


def adapt(
    model: Any,
    section: LoraSection,
    seed: int,
    new_ids: range = range(0),
    starts: Mapping[str, LayerStart] | None = None,
) -> list[str]:
    """Add a config's adapters to a model, and make rows of its embedding and head trainable.

    Args:
        model: A frozen base.
        section: LoRA section of the config.
        seed: Seed of the run.
        new_ids: Ids of the tokens that the config adds.
        starts: Starts of layers that don't follow from the seed, by their names.

    Returns:
        The names of the adapted layers and stacks of experts.
    """
    specs = adapter_specs(model, section, starts)
    experts = expert_specs(model, section, starts)
    wrap_linears(model, specs, seed)
    wrap_experts(model, experts)
    reset_experts(model, seed)
    train_rows(model, section.modules_to_save, new_ids, adapter_spec(section).dtype)
    apply_starts(model, starts or {})
    return [*specs, *experts]


def optimizer_from_section(model: Any, section: TrainSection) -> FlatOptimizer:
    """Move the trained parameters of a model into a flat buffer, and make a config's optimizer.

    Args:
        model: Model with adapters.
        section: Training section of the config, with a number as learning rate. A key of `learning_rates` is a group
            of parameters: trained rows, a head of scores, or those of adapters by the last part of their names.
    """
    flat = flat_parameters(model, section)
    flat.set_rates(group_rates(section))
    return make_optimizer(
        section.optimizer,
        flat,
        betas=section.betas,
        weight_decay=section.weight_decay,
        rounding=section.rounding,
        seed=section.seed,
    )


def flat_parameters(model: Any, section: TrainSection) -> FlatParameters:
    """Move the trained parameters of a model into a flat buffer, in the groups of a config's `learning_rates`."""
    score = output_head(model) if scores_documents(model) else None
    rows = {id(each.weight): "embeddings" for _, each in trained_rows(model)}
    if isinstance(score, TrainedHead):
        rows |= {id(parameter): "score" for parameter in score.rows.trained}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def group_of(name: str) -> str:
        group = rows.get(id(trained[name]), name.rpartition(".")[2])
        return group if group in section.learning_rates else ""

    return FlatParameters(trained.items(), group_of)


def group_rates(section: TrainSection) -> dict[str, float]:
    """Return a config's factors on the learning rate by group of parameters; the learning rate is a number."""
    return {group: rate_factor(rate, section.peak) for group, rate in section.learning_rates.items()}


def set_tokens(section: DataSection, tokenizer: Any) -> range:
    """Add the tokens that a config adds to the base's tokenizer, and set its special tokens.

    Returns:
        The ids of the added tokens.

    Raises:
        ConfigError: The base reads images and the config texts, or the other way round.
        DataError: The tokenizer already has a token to add, or lacks a special token.
    """
    check_documents(section, tokenizer)
    if section.has_images:
        return range(0)
    new_ids = add_new_tokens(tokenizer, section.new_tokens)
    set_special_tokens(tokenizer, section.special_tokens)
    return new_ids


def check_documents(section: DataSection, tokenizer: Any) -> None:
    """Check that a config has the kind of documents that its base reads.

    Raises:
        ConfigError: The base reads images and the config texts, or the other way round.
    """
    if section.has_images and not isinstance(tokenizer, ImageProcessor):
        raise ConfigError(
            "data.format: images needs a base that classifies images, such as ViT, DeiT, DINOv2 or Swin; set "
            "model.base to one, or another data.format."
        )
    if isinstance(tokenizer, ImageProcessor) and not section.has_images:
        raise ConfigError(
            "model.base is a model of images, which learns to classify them; set data.format: images and "
            "train.objective: classify."
        )


def with_images(loss: Loss, section: DataSection, processor: Any) -> Loss:
    """Return a loss that also names what it reads of images, if a config has any.

    Args:
        loss: The loss.
        section: Data section of the config.
        processor: Image processor of the base, or its tokenizer.

    Raises:
        ConfigError: The base reads images and the config texts, or the other way round.
    """
    check_documents(section, processor)
    return replace(loss, columns={**loss.columns, **processor.made_up()}) if section.has_images else loss


def datasets_from_section(
    section: DataSection,
    tokenizer: Any,
    seed: int,
    own_template: bool = False,
    new_ids: range = range(0),
    labels: Labels | None = None,
) -> Datasets:
    """Build a config's training, held-out and retained examples.

    Args:
        section: Data section of the config.
        tokenizer: Tokenizer; the chat template is set in it.
        seed: Seed of the run.
        own_template: Whether the tokenizer is a run's and has its chat template already, whose file may be gone.
        new_ids: Ids of added tokens; those that are in no training example are noted in the first report.
        labels: Labels of texts or images, see :func:`qlora.model.labels_from_config`.
    """
    check_documents(section, tokenizer)
    datasets = build_datasets(
        tokenizer,
        training_sources(section),
        {
            name: [_source(section, source) for source in held] if isinstance(held, list) else held
            for name, held in section.eval_sets.items()
        },
        EncodeOptions(section.loss_on, section.max_seq_len, section.overlong, section.on_bad_row, labels),
        chat_template="auto" if own_template else section.chat_template,
        cache_dir=section.cache_dir,
        seed=seed,
        deduplicate=section.deduplicate,
        retain=[_source(section, source) for source in section.retain or ()],
    )
    counts = datasets.train.count_ids(new_ids) if new_ids else []
    ids = [id_ for id_, count in zip(new_ids, counts, strict=True) if not count]
    if ids:
        absent = map(repr, tokenizer.convert_ids_to_tokens(ids))
        note = f"new tokens that are in no training example, so their use is not trained: {', '.join(absent)}"
        datasets.reports[0].notes.append(note)
    return datasets


def training_sources(section: DataSection) -> list[Source]:
    """Return the sources of a config's training rows."""
    return [_source(section, source) for source in section.train]


def _source(section: DataSection, source: SourceSection) -> Source:
    """Return a source, with the values that it does not set taken from the section."""
    shared = {key: getattr(section, key) for key in ("format", "columns", "roles", "max_rows")}
    return Source(**shared | source.model_dump(exclude_none=True))
