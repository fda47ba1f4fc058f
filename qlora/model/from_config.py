"""The base, adapters and data that a config asks for."""

from typing import Any

import torch

from qlora.config import DataSection, LoraSection, ModelSection, SourceSection
from qlora.data import Datasets, EncodeOptions, Source, build_datasets
from qlora.lora import AdapterSpec, train_rows, wrap_linears
from qlora.model.base import load_base


def base_from_section(section: ModelSection, device: str | torch.device = "auto") -> tuple[Any, Any]:
    """Loads the base that a config asks for."""
    return load_base(device=device, **section.model_dump(exclude={"recompute", "weight_cache"}))


def adapter_spec(section: LoraSection) -> AdapterSpec:
    """The adapters that a config asks for."""
    return AdapterSpec(**section.model_dump(exclude={"targets", "modules_to_save"}))


def adapt(model: Any, section: LoraSection, seed: int, new_ids: range = range(0)) -> list[str]:
    """Adds the adapters that a config asks for, and rows to train of embedding and head.

    Args:
        model: A frozen base.
        section: Of the config.
        seed: Of the run.
        new_ids: Of the tokens that the config adds.

    Returns:
        The names of the adapted layers.
    """
    spec = adapter_spec(section)
    names = wrap_linears(model, spec, section.targets, seed)
    train_rows(model, section.modules_to_save, new_ids, spec.dtype)
    return names


def datasets_from_section(
    section: DataSection, tokenizer: Any, seed: int, own_template: bool = False, new_ids: range = range(0)
) -> Datasets:
    """Builds the data that a config asks for.

    Args:
        section: Of the config.
        tokenizer: Gets the chat template.
        seed: Of the run.
        own_template: The tokenizer is a run's and has the template that it was trained with, whose file may be gone.
        new_ids: Of tokens that were added; of those that are in no training example the first report tells.
    """
    datasets = build_datasets(
        tokenizer,
        [_source(section, source) for source in section.train],
        [_source(section, source) for source in section.eval]
        if isinstance(section.eval, list)
        else section.eval or 0.0,
        EncodeOptions(section.loss_on, section.max_seq_len, section.overlong, section.on_bad_row),
        "auto" if own_template else section.chat_template,
        section.cache_dir,
        seed,
        section.deduplicate,
    )
    counts = datasets.train.count_ids(new_ids) if new_ids else []
    ids = [id_ for id_, count in zip(new_ids, counts, strict=True) if not count]
    if ids:
        absent = map(repr, tokenizer.convert_ids_to_tokens(ids))
        told = f"new tokens that are in no training example, so nothing is learnt of their use: {', '.join(absent)}"
        datasets.reports[0].notes.append(told)
    return datasets


def _source(section: DataSection, source: SourceSection) -> Source:
    """A source with what it leaves open filled in from the section."""
    shared = {key: getattr(section, key) for key in ("format", "columns", "roles", "max_rows")}
    return Source(**shared | source.model_dump(exclude_none=True))
