"""Rows of embedding and head trained in full, as PEFT stores them in an adapter."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.errors import CheckpointError
from qlora.lora import EmbeddingRows, embedding_and_head, scores_documents, trained_rows, wrap_rows
from qlora.lora.rows import has_trained_bias

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
        bias: Name of the tensor with the module's bias, which PEFT saves with whole modules; None without one.
    """

    tensor: str
    ids: range
    bias: str | None = None


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


def read_rows(config: Mapping[str, Any], header: Mapping[str, Any]) -> tuple[dict[str, StoredRows], list[str]]:
    """Find the trained rows of each module in an adapter's file.

    PEFT's configs may name a module by the end of its name, and its files may hold whole embeddings that no config
    names, after the vocabulary was extended; so the file decides which modules have rows.

    Args:
        config: Config of the adapter.
        header: Header of the adapter's tensors file.

    Returns:
        The rows by module, and a line for each mismatch of config and file.
    """
    problems = []
    names = [key.removeprefix(PREFIX) for key in header if key.startswith(PREFIX)]
    whole = [
        name.removesuffix(".weight")
        for name in names
        if name.endswith(".weight") and ".lora_" not in name and ".base_layer." not in name
    ]
    deltas = [name.removesuffix(f".{DELTA}") for name in names if name.endswith(f".{DELTA}")]
    given = config.get(IDS_KEY) or {}
    by_ids = given if isinstance(given, dict) else dict.fromkeys(deltas, given)
    for key, asked, found in ((WHOLE_KEY, config.get(WHOLE_KEY) or [], whole), (IDS_KEY, by_ids, deltas)):
        problems += [f"{key} names {name}, but the file has no rows of it" for name in asked if not _ends(found, name)]
    rows = {}
    for name in [*whole, *deltas]:
        tensor = _tensor_name(name, name in whole)
        shape = header[tensor]["shape"]
        listed = [ids for asked, ids in by_ids.items() if name in _ends(deltas, asked)]
        start = min(listed[0], default=0) if listed and name in deltas else 0
        if len(shape) != 2:
            problems.append(f"{name} was trained in full, which is only supported for embedding and output head")
        elif name in deltas and [*range(start, start + shape[0])] != (listed or [None])[0]:
            problems.append(f"{IDS_KEY} of {name} should be {shape[0]} consecutive ids in ascending order")
        else:
            bias = f"{PREFIX}{name}.bias" if name in whole and f"{PREFIX}{name}.bias" in header else None
            rows[name] = StoredRows(tensor, range(start, start + shape[0]), bias)
    return rows, problems


def _ends(names: Iterable[str], end: str) -> list[str]:
    """Return the names that are, or from a dot on end in, another."""
    return [name for name in names if f".{name}".endswith(f".{end}")]


@torch.no_grad()
def load_rows(
    model: nn.Module,
    rows: Mapping[str, StoredRows],
    tensors: Mapping[str, torch.Tensor],
    optional: Collection[str] = (),
) -> None:
    """Copy an adapter's rows into a model that trains the same rows.

    Args:
        model: Model with trained rows.
        rows: Stored rows by module.
        tensors: Tensors of the adapter's file.
        optional: Modules that keep the model's own rows if the adapter has none of them.

    Raises:
        CheckpointError: The model trains other rows, or ties embedding and head while the adapter's differ.
    """
    trained = {name: own for name, own in _with_tensors(model) if name in rows or name not in optional}
    for name in sorted({*trained} | {*rows}):
        own, stored = (part[name].ids if name in part else range(0) for part in (trained, rows))
        if own != stored:
            raise CheckpointError(f"The adapter has rows of {name} for {_show(stored)}, the model for {_show(own)}.")
    for name, own_rows in trained.items():
        bias = rows[name].bias
        if (own_rows.bias is None) != (bias is None) and scores_documents(model):
            raise CheckpointError(f"The adapter's head {name} has {'no' if bias is None else 'a'} trained bias.")
        own_rows.weight.copy_(tensors[rows[name].tensor])
        if own_rows.bias is not None and bias is not None:
            own_rows.bias.copy_(tensors[bias])
    for name, own_rows in trained.items():
        if not torch.equal(own_rows.weight, tensors[rows[name].tensor].to(own_rows.weight)):
            raise CheckpointError(
                f"The adapter has different rows for {name}, which shares its weight with another module."
            )


def rows_problems(model: Any, rows: Mapping[str, StoredRows], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return a line for each module whose stored rows a base can't take."""
    layers = embedding_and_head(model)
    problems = []
    for name, stored in rows.items():
        if name not in layers:
            problems.append(f"{name} was trained in full, but only {' and '.join(layers)} of this base can be")
            continue
        layer = layers[name]
        (size, features), given = layer.weight.shape, tensors[stored.tensor].shape[1]
        is_too_short = stored.tensor == _tensor_name(name, is_whole=True) and len(stored.ids) < size
        if given != features or stored.ids.start > size or is_too_short:
            problems.append(
                f"{name} has rows {stored.ids.start} to {stored.ids.stop - 1} of {given} features, the base's has "
                f"{size} rows of {features}"
            )
        if has_trained_bias(model, layer):
            if stored.bias is None:
                problems.append(f"{name} has no trained bias, as it has in this base's class")
        elif stored.bias and not torch.equal(tensors[stored.bias].to(layer.bias), layer.bias.cpu().to(layer.bias)):
            problems.append(f"{name} has a trained bias, which is not supported")
    # An embedding may have more rows than the head from the start, so only what the adapter adds is compared.
    own = {name: len(layer.weight) for name, layer in layers.items()}
    stops = {name: rows[name].ids.stop for name in layers if name in rows}
    added = [stop for name, stop in stops.items() if stop > own[name]]
    is_added_to_all = all(max(size, stops.get(name, 0)) >= max(added, default=0) for name, size in own.items())
    if not is_added_to_all and not (problems or scores_documents(model) or are_shared(model, rows, tensors)):
        problems.append(f"it adds rows to only one of {' and '.join(layers)}")
    return problems


def wrap_stored_rows(
    model: Any, rows: Mapping[str, StoredRows], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Give a model's embedding and head the rows that an adapter stores, in place.

    Args:
        model: A frozen model that :func:`rows_problems` has no complaints about.
        rows: Stored rows by module.
        tensors: Tensors of the adapter's file.
        dtype: Dtype of the rows.
    """
    layers = embedding_and_head(model)
    own = {}
    for name, stored in rows.items():
        layer = layers[name]
        device = layer.weight.device
        bias = tensors[str(stored.bias)].to(device, dtype, copy=True) if has_trained_bias(model, layer) else None
        values = tensors[stored.tensor].to(device, dtype, copy=True)
        own[name] = EmbeddingRows(values, stored.ids, len(layer.weight), bias)
    if own and are_shared(model, rows, tensors):
        own = dict.fromkeys(layers, next(iter(own.values())))
    wrap_rows(model, own)


def are_shared(model: Any, rows: Mapping[str, StoredRows], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether embedding and head share the stored rows: PEFT stores rows by ids of a tied weight once."""
    layers = [*embedding_and_head(model).values()]
    if len(layers) < 2 or layers[0].weight is not layers[1].weight or not rows:
        return False
    first, *others = rows.items()
    if not others:
        return first[1].tensor == _tensor_name(first[0], is_whole=False)
    other = others[0][1]
    return first[1].ids == other.ids and torch.equal(tensors[first[1].tensor], tensors[other.tensor])


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
