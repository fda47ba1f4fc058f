"""Models from disk: a run (its base with its adapters), or a plain folder."""

from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import BaseFiles, RunDirectory, load_adapter
from qlora.config import DataSection, LoraSection, ModelSection, SourceSection, load_config
from qlora.data import Datasets, Source, Treatment, add_new_tokens, apply_template, build_datasets, new_token_ids
from qlora.lora import add_lora, train_rows
from qlora.model.base import load_base, load_tokenizer


def base_from_section(section: ModelSection, device: str | torch.device = "auto") -> tuple[Any, Any]:
    """Loads the base that a config asks for."""
    return load_base(device=device, **section.model_dump(exclude={"recompute", "weight_cache"}))


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
    settings, dtype = section.model_dump(exclude={"dtype", "modules_to_save"}), getattr(torch, section.dtype)
    names = add_lora(model, dtype=dtype, seed=seed, **settings)
    train_rows(model, section.modules_to_save, new_ids, dtype)
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
        Treatment(section.loss_on, section.max_seq_len, section.overlong, section.on_bad_row),
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


def load_run_tokenizer(run: RunDirectory) -> Any:
    """Load the tokenizer that a run trains with, with its chat template and new tokens.

    The final adapter has it; before that it is made from the base's, as in training.

    Raises:
        ModelError: The base's tokenizer can't be loaded.
        DataError: The chat template's file is gone.
    """
    config = load_config(run.config)
    section = config.model
    if run.final_adapter.is_dir():
        return load_tokenizer(run.final_adapter, section.trust_remote_code)
    files = BaseFiles.resolve(section.base, section.revision, section.trust_remote_code)
    tokenizer = load_tokenizer(files.folder, section.trust_remote_code)
    add_new_tokens(tokenizer, config.data.new_tokens)
    apply_template(tokenizer, config.data.chat_template)
    return tokenizer


def load_run(run_dir: str | Path, device: str | torch.device = "auto") -> tuple[Any, Any]:
    """Load a run's base with its trained adapters, ready to generate.

    Args:
        run_dir: The output_dir of a finished training run, or one of a run's checkpoints.
        device: `auto` takes a GPU if there is one.

    Returns:
        The model, in evaluation mode, and its tokenizer with the run's chat template.

    Raises:
        CheckpointError: The folder holds no run, or no whole adapter.
        ModelError: The base can't be loaded.
    """
    run = RunDirectory.open(run_dir)
    config = load_config(run.config)
    tokenizer = load_run_tokenizer(run)
    model, _ = base_from_section(config.model, device)
    adapt(model, config.lora, config.train.seed, new_token_ids(tokenizer, config.data.new_tokens))
    load_adapter(model, run.adapter)
    return model.eval(), tokenizer


def load_model(path: str, device: str | torch.device = "auto") -> tuple[Any, Any]:
    """Load a run, one of its checkpoints, or any model folder or hub id as it is stored, with a chat template in place.

    Raises:
        CheckpointError: A run is damaged.
        ModelError: There is no such model.
    """
    if RunDirectory.find(path) is not None:
        return load_run(path, device)
    quantization = "nf4" if BaseFiles.resolve(path).is_bitsandbytes_4bit else "none"
    model, tokenizer = load_base(path, quantization=quantization, device=device)
    apply_template(tokenizer, "auto")
    return model, tokenizer
