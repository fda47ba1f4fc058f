"""Models from disk: a run (its base with its adapters), or a plain folder."""

from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import RunDirectory, wrap_adapter
from qlora.config import load_config
from qlora.data import apply_template
from qlora.files import BaseFiles
from qlora.model.base import load_base
from qlora.model.formats import BITSANDBYTES_4BIT, weight_format
from qlora.model.from_config import set_tokens
from qlora.model.run_adapter import read_run_adapter
from qlora.model.starts import load_started_base, starts_of
from qlora.model.tokenizer import load_tokenizer


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
    set_tokens(config.data, tokenizer)
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
    adapter = read_run_adapter(run)
    tokenizer = load_run_tokenizer(run)
    model = load_started_base(config.model, starts_of(config, run.adapter), device)
    wrap_adapter(model, adapter, config.lora.form)
    return model.eval(), tokenizer


def load_model(path: str, device: str | torch.device = "auto") -> tuple[Any, Any]:
    """Load a run, one of its checkpoints, or any model folder or hub id as it is stored, with a chat template set.

    Raises:
        CheckpointError: A run is damaged.
        ModelError: There is no such model.
    """
    if RunDirectory.find(path) is not None:
        return load_run(path, device)
    quantization = "nf4" if weight_format(BaseFiles.resolve(path)) == BITSANDBYTES_4BIT else "none"
    model, tokenizer = load_base(path, quantization=quantization, device=device)
    apply_template(tokenizer, "auto")
    return model, tokenizer
