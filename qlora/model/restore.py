"""Models from disk: a run (its base with its adapters), or a plain folder."""

from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import BaseFiles, RunDirectory, load_adapter
from qlora.config import DataSection, LoraSection, ModelSection, SourceSection, load_config
from qlora.data import Datasets, Source, Treatment, apply_template, build_datasets
from qlora.lora import add_lora
from qlora.model.base import load_base


def base_from_section(section: ModelSection, device: str | torch.device = "auto") -> tuple[Any, Any]:
    """Loads the base that a config asks for."""
    return load_base(device=device, **section.model_dump(exclude={"recompute", "weight_cache"}))


def adapt(model: Any, section: LoraSection, seed: int) -> list[str]:
    """Adds the adapters that a config asks for."""
    settings = section.model_dump(exclude={"dtype"})
    return add_lora(model, dtype=getattr(torch, section.dtype), seed=seed, **settings)


def datasets_from_section(section: DataSection, tokenizer: Any, seed: int, own_template: bool = False) -> Datasets:
    """Builds the data that a config asks for.

    Args:
        section: Of the config.
        tokenizer: Gets the chat template.
        seed: Of the run.
        own_template: The tokenizer is a run's and has the template that it was trained with, whose file may be gone.
    """
    return build_datasets(
        tokenizer,
        [_source(section, source) for source in section.train],
        [_source(section, source) for source in section.eval]
        if isinstance(section.eval, list)
        else section.eval or 0.0,
        Treatment(section.loss_on, section.max_seq_len, section.overlong, section.on_bad_row),
        "auto" if own_template else section.chat_template,
        section.cache_dir,
        seed,
    )


def _source(section: DataSection, source: SourceSection) -> Source:
    """A source with what it leaves open filled in from the section."""
    shared = {key: getattr(section, key) for key in ("format", "columns", "roles")}
    return Source(**shared | source.model_dump(exclude_none=True))


def load_run(run_dir: str | Path, device: str | torch.device = "auto") -> tuple[Any, Any]:
    """Loads a run's base with its trained adapters, ready to generate.

    Args:
        run_dir: The output_dir of a training run.
        device: `auto` takes a GPU if there is one.

    Returns:
        The model, in evaluation mode, and its tokenizer with the run's chat template.

    Raises:
        CheckpointError: The folder holds no run, or no whole adapter.
        ModelError: The base can't be loaded.
    """
    from transformers import AutoTokenizer

    run = RunDirectory.open(run_dir)
    config = load_config(run.config)
    model, _ = base_from_section(config.model, device)
    adapt(model, config.lora, config.train.seed)
    load_adapter(model, run.adapter)
    return model.eval(), AutoTokenizer.from_pretrained(run.adapter)


def load_model(path: str, device: str | torch.device = "auto") -> tuple[Any, Any]:
    """Loads a run, or any model folder or hub id as it is stored, with a chat template in place.

    Raises:
        CheckpointError: A run is damaged.
        ModelError: There is no such model.
    """
    if RunDirectory(path).exists():
        return load_run(path, device)
    quantization = "nf4" if BaseFiles.resolve(path).is_bitsandbytes_4bit else "none"
    model, tokenizer = load_base(path, quantization=quantization, device=device)
    apply_template(tokenizer, "auto")
    return model, tokenizer
