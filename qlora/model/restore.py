"""Models from disk: a run (its base with its adapters), or a plain folder."""

from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import PeftAdapter, RunDirectory, wrap_adapter
from qlora.config import RunConfig, load_config
from qlora.data import ImageProcessor, apply_template, set_special_tokens
from qlora.errors import ModelError
from qlora.files import BaseFiles, find_adapter
from qlora.layers.placement import placed_weights
from qlora.lora import ScoreHead, apply_first, embedding_and_head, keep_starts, stored_head, trained_rows
from qlora.lora.host_rows import keep_rows_on_host
from qlora.lora.rows import first_rows
from qlora.model.base import load_base, load_frozen
from qlora.model.device import resolve_device
from qlora.model.formats import BITSANDBYTES_4BIT, weight_format
from qlora.model.from_config import adapter_spec, adapter_specs, set_tokens
from qlora.model.processor import load_processor
from qlora.model.run_adapter import check_experts_as_trained
from qlora.model.skeleton import build_skeleton
from qlora.model.source import AdapterSource, open_source
from qlora.model.starts import Starts, load_started_base

TEMPLATE_FILE = "chat_template.jinja"


def load_run_tokenizer(run: RunDirectory) -> Any:
    """Load the tokenizer that a run trains with, with its chat template and new tokens; or its image processor.

    The final adapter has it; before that it is made from the base's, as in training.

    Raises:
        ModelError: The base's tokenizer can't be loaded.
        DataError: The chat template's file is gone.
    """
    config = load_config(run.config)
    section = config.model
    if run.final_adapter.is_dir():
        return load_processor(run.final_adapter, section.trust_remote_code)
    files = BaseFiles.resolve(section.base, section.revision, section.trust_remote_code)
    tokenizer = load_processor(files.folder, section.trust_remote_code)
    set_tokens(config.data, tokenizer)
    _set_template(tokenizer, config.data.chat_template)
    head = run.read_record().head
    if head is not None and head.pad_token is not None:
        set_special_tokens(tokenizer, {"pad_token": head.pad_token})
    return tokenizer


def load_run(run_dir: str | Path, device: str | torch.device = "auto", is_reference: bool = False) -> tuple[Any, Any]:
    """Load a run's base with its trained adapters, ready to generate.

    Args:
        run_dir: The output_dir of a finished training run, or one of a run's checkpoints.
        device: `auto` takes a GPU if there is one.
        is_reference: Whether the model is also needed as it was at step 0, as what a preference loss compares with.

    Returns:
        The model, in evaluation mode, and its tokenizer with the run's chat template.

    Raises:
        CheckpointError: The folder holds no run, or no whole adapter.
        ModelError: The base can't be loaded.
    """
    run = RunDirectory.open(run_dir)
    return load_adapted(open_source(run.adapter), device, is_reference=is_reference)


def load_adapted(
    source: AdapterSource,
    device: str | torch.device = "auto",
    quantization: str = "nf4",
    is_reference: bool = False,
) -> tuple[Any, Any]:
    """Load an adapter's base with the adapter on it, ready to generate.

    Args:
        source: The adapter; a run's base is loaded as in training.
        device: `auto` takes a GPU if there is one.
        quantization: How to load the base of an adapter made elsewhere, `nf4` or `none`.
        is_reference: Whether a run's model is also needed as it was at step 0, see
            :func:`qlora.lora.adapters_at_start`.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: The adapter is damaged, or does not fit the base.
        ModelError: The base can't be loaded.
    """
    adapter = source.read()
    tokenizer = load_adapter_tokenizer(source)
    if source.run is None:
        model = load_frozen(source.base, quantization, device=device, head=source.head, allow_unquantized=True)
        wrap_adapter(model, adapter)
    else:
        config = load_config(source.run.config)
        files = source.base_files()
        skeleton = build_skeleton(files, config.model.trust_remote_code, source.head)
        check_experts_as_trained(source.run, files, skeleton)
        starts = source.starts()
        # As it was trained; one process alone has weights on its host that several had split.
        weights = source.run.read_record().in_use.weights
        section = config.model.model_copy(update={"allow_unquantized": True, "weights": weights})
        if any(start.subtracted for start in starts.values()):
            # The dtype that the base was quantized from; auto may be another one here.
            dtype = str(source.compute_dtype(resolve_device(device)))
            section = section.model_copy(update={"compute_dtype": dtype.removeprefix("torch.")})
        model = load_started_base(section, starts, device, source.head)
        if is_reference:
            specs, rows = adapter_specs(model, config.lora, starts), _first_rows(model, config, adapter, starts)
        wrap_adapter(model, adapter, config.lora.form)
        apply_first(model, starts)
        if is_reference:
            keep_starts(model, starts, specs)
            for name, own in trained_rows(model):
                own.kept = rows[name].to(own.weight)
    if placed_weights(model) is not None:
        keep_rows_on_host(model)
    if source.head is not None and not source.head.of_images:
        # To score several texts at a time, which transformers pads with it.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _first_rows(model: Any, config: RunConfig, adapter: PeftAdapter, starts: Starts) -> dict[str, torch.Tensor]:
    """Return the rows of embedding and head that a run's training started from, by module."""
    files = BaseFiles.resolve(config.model.base, config.model.revision, config.model.trust_remote_code)
    new_ids = set_tokens(config.data, load_processor(files.folder, config.model.trust_remote_code))
    dtype, found = adapter_spec(config.lora).dtype, {}
    shared = next(iter(adapter.rows.values()), None)
    for name, layer in embedding_and_head(model).items():
        stored = adapter.rows.get(name, shared)
        if stored is not None:
            given = starts[name].rows if name in starts else None
            found[name] = first_rows(layer.weight, stored.ids, new_ids, dtype) if given is None else given
    return found


def load_adapter_tokenizer(source: AdapterSource) -> Any:
    """Load the tokenizer or image processor of an adapter: a run's, the one in the adapter's folder, or the base's.

    Raises:
        ModelError: It can't be loaded.
        DataError: A run's chat template is gone.
    """
    if source.run is not None:
        return load_run_tokenizer(source.run)
    folder = source.base_files().folder
    has_own = any((source.folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    tokenizer = load_processor(source.folder if has_own else folder)
    template = source.folder / TEMPLATE_FILE
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    elif has_own and tokenizer.chat_template is None:
        tokenizer.chat_template = load_processor(folder).chat_template
    return tokenizer


def find_foreign(path: str, base: str | None = None) -> AdapterSource | None:
    """Return the adapter made elsewhere that a path names; None for a run or a model.

    Raises:
        ModelError: A base is given for something that is no adapter, or there is no such folder.
        ConfigError: A run is given a base, or the adapter's base is not known.
    """
    if RunDirectory.find(path) is not None:
        open_source(path, base)
        return None
    if find_adapter(path) is not None:
        return open_source(path, base)
    if base is not None:
        raise ModelError(f"--base {base}: {path} has no adapter_config.json, so it is no adapter; omit --base (base=).")
    return None


def head_of(path: str, base: str | None = None) -> ScoreHead | None:
    """Return the head of scores of a run, an adapter or a model; None for one that predicts tokens.

    Args:
        path: See :func:`load_model`.
        base: See :func:`load_model`.
    """
    if (foreign := find_foreign(path, base)) is not None:
        return foreign.head
    run = RunDirectory.find(path)
    return stored_head(BaseFiles.resolve(path).config) if run is None else run.read_record().head


def load_model_tokenizer(path: str, base: str | None = None) -> Any:
    """Load the tokenizer that :func:`load_model` returns, without the model; it raises the same errors."""
    if (foreign := find_foreign(path, base)) is not None:
        tokenizer = load_adapter_tokenizer(foreign)
    elif RunDirectory.find(path) is not None:
        return load_adapter_tokenizer(open_source(RunDirectory.open(path).adapter))
    else:
        tokenizer = load_processor(BaseFiles.resolve(path).folder)
    _set_template(tokenizer, "auto")
    return tokenizer


def load_model(path: str, device: str | torch.device = "auto", base: str | None = None) -> tuple[Any, Any]:
    """Load a run, one of its checkpoints, an adapter made elsewhere, or a model as it is stored, with a chat template.

    Args:
        path: A run or one of its checkpoints; a folder or hub id of a PEFT adapter, whose base is loaded in NF4; or a
            folder or hub id of a model.
        device: `auto` takes a GPU if there is one.
        base: Base of an adapter made elsewhere; None for the one that its config names.

    Raises:
        CheckpointError: A run or an adapter is damaged.
        ConfigError: A run is given a base, or the adapter's base is not known.
        ModelError: There is no such model.
    """
    if (foreign := find_foreign(path, base)) is not None:
        model, tokenizer = load_adapted(foreign, device)
    elif RunDirectory.find(path) is not None:
        return load_run(path, device)
    else:
        files = BaseFiles.resolve(path)
        quantization = "nf4" if weight_format(files) == BITSANDBYTES_4BIT else "none"
        model, tokenizer = load_base(
            path, quantization=quantization, device=device, head=stored_head(files.config), allow_unquantized=True
        )
    _set_template(tokenizer, "auto")
    return model, tokenizer


def _set_template(tokenizer: Any, name: str) -> None:
    """Set the chat template of a tokenizer; an image processor has none."""
    if not isinstance(tokenizer, ImageProcessor):
        apply_template(tokenizer, name)
