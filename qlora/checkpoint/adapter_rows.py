"""Rows of embedding and head trained in full, as PEFT stores them in an adapter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.errors import CheckpointError
from qlora.lora import EmbeddingRows, trained_rows

PREFIX = "base_model.model."
# PEFT's config keys for modules trained in full and for rows trained by id, and its name for the tensor of such rows.
WHOLE_KEY, IDS_KEY = "modules_to_save", "trainable_token_indices"
DELTA = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a module in an adapter's file.

    Attributes:
        tensor: Name of the tensor in the file.
        ids: Token ids of the rows.
    """

    tensor: str
    ids: range


def rows_config(model: nn.Module) -> dict[str, Any]:
    """Return the keys of PEFT's config that list the trained rows; empty if there are none."""
    trained = dict(_with_tensors(model))
    whole = [name for name, rows in trained.items() if rows.is_whole]
    ids = {name: list(rows.ids) for name, rows in trained.items() if not rows.is_whole}
    return ({WHOLE_KEY: whole} if whole else {}) | ({IDS_KEY: ids} if ids else {})


def rows_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the trained rows by PEFT's names; PEFT stores those of a tied embedding and head twice."""
    tensors = {}
    for name, rows in _with_tensors(model):
        tensors[_tensor_name(name, rows.is_whole)] = rows.weight.detach().cpu().clone()
        bias = getattr(model.get_submodule(name), "bias", None)
        if rows.is_whole and bias is not None:
            tensors[f"{PREFIX}{name}.bias"] = bias.detach().cpu().clone()  # PEFT saves whole modules
    return tensors


def check_rows_config(config: Mapping[str, Any], path: Path) -> None:
    """Check that a config's keys for trained rows have names and ids.

    Raises:
        CheckpointError: They do not.
    """
    whole, by_ids = config.get(WHOLE_KEY) or [], config.get(IDS_KEY) or {}
    lists = list(by_ids.values()) if isinstance(by_ids, dict) else [by_ids]
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        raise CheckpointError(f"{path}: {WHOLE_KEY} should be a list of names.")
    if not all(isinstance(ids, list) and all(type(id_) is int and id_ >= 0 for id_ in ids) for ids in lists):
        raise CheckpointError(f"{path}: {IDS_KEY} should map modules to lists of ids.")


def read_rows(config: Mapping[str, Any], header: Mapping[str, Any]) -> dict[str, StoredRows]:
    """Return the trained rows of each module.

    Args:
        config: Config of the adapter.
        header: Header of the adapter's tensors file.

    Raises:
        CheckpointError: The file lacks rows that the config lists, or their ids are not consecutive.
    """
    whole, by_ids = config.get(WHOLE_KEY) or [], config.get(IDS_KEY) or {}
    if isinstance(by_ids, list):
        raise CheckpointError(f"The adapter's {IDS_KEY} names no modules; save it again with the ids by module.")
    names = {name: _tensor_name(name, is_whole=True) for name in whole}
    names |= {name: _tensor_name(name, is_whole=False) for name in by_ids}
    rows = {}
    for name, tensor in names.items():
        shape = header[tensor]["shape"] if tensor in header else []
        if len(shape) != 2:
            raise CheckpointError(f"The adapter's config names trained rows of {name}, but its file has no {tensor}.")
        start = min(by_ids.get(name, []), default=0)
        ids = range(start, start + shape[0])
        if name in by_ids and list(ids) != by_ids[name]:
            raise CheckpointError(f"The adapter's {IDS_KEY} of {name} should be {shape[0]} consecutive ids.")
        rows[name] = StoredRows(tensor, ids)
    return rows


@torch.no_grad()
def load_rows(model: nn.Module, rows: Mapping[str, StoredRows], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy an adapter's rows into a model that trains the same rows.

    Raises:
        CheckpointError: The model trains other rows, or ties embedding and head while the adapter's differ.
    """
    trained = dict(_with_tensors(model))
    for name in sorted({*trained} | {*rows}):
        own, stored = (part[name].ids if name in part else range(0) for part in (trained, rows))
        if own != stored:
            raise CheckpointError(f"The adapter has rows of {name} for {_show(stored)}, the model for {_show(own)}.")
    for name, own_rows in trained.items():
        own_rows.weight.copy_(tensors[rows[name].tensor])
    for name, own_rows in trained.items():
        if not torch.equal(own_rows.weight, tensors[rows[name].tensor].to(own_rows.weight)):
            raise CheckpointError(
                f"The adapter has different rows for {name}, which shares its weight with another module."
            )


def _with_tensors(model: nn.Module) -> Iterator[tuple[str, EmbeddingRows]]:
    """Yield the modules whose rows are in the file; PEFT stores new tokens' rows of a tied weight once."""
    seen: set[EmbeddingRows] = set()
    for name, rows in trained_rows(model):
        if rows.is_whole or rows not in seen:
            yield name, rows
        seen.add(rows)


def _tensor_name(module: str, is_whole: bool) -> str:
    return f"{PREFIX}{module}.{'weight' if is_whole else DELTA}"


def _show(ids: range) -> str:
    return f"the ids {ids.start} to {ids.stop - 1}" if ids else "no ids"
