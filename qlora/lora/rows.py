"""Rows of an embedding or an output head that are trained in full: all of them, or those of new tokens.

A head that scores documents is always trained, and all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qlora.errors import ModelError
from qlora.lora.head import embedding_and_head, input_embedding, output_head, scores_documents
from qlora.lora.host_rows import HostHead
from qlora.lora.match import other_part


class EmbeddingRows(nn.Module):
    """Consecutive rows of a weight that are trained, some or all of them.

    Args:
        values: Initial values, (rows, features).
        ids: Ids of the rows.
        num_frozen: Number of rows of the base's weight.
        bias: Initial bias of a head of scores that has one, (rows,); None if none is trained.

    Attributes:
        is_off: Whether the base's rows are used instead, see :func:`qlora.lora.adapters_off`.
        is_at_start: Whether the rows of :attr:`kept` are used instead, see :func:`qlora.lora.adapters_at_start`.
        kept: The initial values, if they are needed as a reference; or None.
    """

    kept: torch.Tensor | None

    def __init__(self, values: torch.Tensor, ids: range, num_frozen: int, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.ids, self.num_frozen = ids, num_frozen
        self.is_off = self.is_at_start = False
        self.register_buffer("kept", None)

    @property
    def is_whole(self) -> bool:
        """Whether every row is trained."""
        return self.ids.start == 0 and self.ids.stop >= self.num_frozen

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """The trained parameters: the weight, and the bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def num_rows(self) -> int:
        """Number of rows of base and new tokens together."""
        return max(self.num_frozen, self.ids.stop)

    @property
    def used_ids(self) -> range:
        """Ids whose rows are not taken from the base's weight: all trained ones; if off, those that the base lacks."""
        if not self.is_off:
            return self.ids
        return range(max(self.ids.start, self.num_frozen), max(self.ids.stop, self.num_frozen))

    def used_rows(self, frozen: torch.Tensor) -> torch.Tensor:
        """Return the rows of :attr:`used_ids`: their trained values, or if off or at the start their initial values.

        Args:
            frozen: The base's weight, (rows, features).
        """
        if not self.is_off:
            if not self.is_at_start:
                return self.weight
            if self.kept is None:
                raise ModelError("The initial rows of embedding or head were not kept; load with is_reference=True.")
            return self.kept
        # Not a view: products of other layouts may round differently.
        return _mean_row(frozen, self.ids).to(self.weight.dtype).repeat(len(self.used_ids), 1)

    def release(self, base: Any) -> None:
        """Free a base's weight if all its rows are trained; an empty weight keeps its dtype and device."""
        if self.is_whole:
            base.weight = nn.Parameter(base.weight.new_empty(0, self.weight.shape[1]), requires_grad=False)

    def extra_repr(self) -> str:
        """Return ids and number of rows."""
        return f"{self.ids.start} to {self.ids.stop - 1} of {self.num_rows}"


class TrainedEmbedding(nn.Module):
    """An embedding with trained rows, which its class processes like its own, such as by scaling them.

    Args:
        base: The frozen embedding.
        rows: Trained rows, used instead of the base's.
    """

    def __init__(self, base: nn.Embedding, rows: EmbeddingRows) -> None:
        super().__init__()
        self.base = base  # before the rows, because the model's dtype is read from the first weight
        self.rows = rows
        rows.release(base)
        padding = -1 if base.padding_idx is None else base.padding_idx
        self._padding = padding - rows.ids.start if padding in rows.ids else -1
        base.padding_idx = None  # it gets tables with other rows at that index

    @property
    def num_embeddings(self) -> int:
        """Number of ids that have rows."""
        return self.rows.num_rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map (...) to (..., features), in the base's dtype."""
        flat, frozen = ids.flatten(), self.base.weight
        own_ids = self.rows.used_ids
        if not own_ids:
            return self.base(ids)
        # If all rows are trained, no id lies outside; otherwise the rows of clamped ids are not used.
        places = (flat - own_ids.start).clamp(0, len(own_ids) - 1) if not self.rows.is_whole else flat
        table = _LookUp.apply(self.rows.used_rows(frozen), places, self._padding, frozen.dtype)
        if not self.rows.is_whole:
            is_own = (flat >= own_ids.start) & (flat < own_ids.stop)
            others = F.embedding(flat.masked_fill(is_own, 0), frozen)  # the frozen weight may have no row for own ids
            table = torch.where(is_own[:, None], table, others)
        # Its class may do more than look rows up: Gemma 3 scales them, in the dtype of its weight.
        in_table = torch.arange(len(flat), device=flat.device).view(ids.shape)
        return torch.func.functional_call(self.base, {"weight": table}, (in_table,))


class TrainedHead(nn.Module):
    """An output head with trained rows.

    Args:
        base: The frozen head.
        rows: Trained rows, used instead of the base's.
    """

    def __init__(self, base: nn.Linear, rows: EmbeddingRows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        rows.release(base)

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias, (rows,): the trained one, or the base's."""
        return self.base.bias if self.rows.bias is None else self.rows.bias

    def blocks(self) -> tuple[torch.Tensor, ...]:
        """Return the weight as consecutive blocks of its rows, trained and frozen."""
        if self.rows.is_whole:
            return (self.rows.used_rows(self.base.weight),)
        ids, frozen = self.rows.used_ids, self.base.weight
        if not ids:
            return (frozen,)
        before, after = frozen[: ids.start], frozen[ids.stop :]
        return tuple(block for block in (before, self.rows.used_rows(frozen), after) if len(block))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., features) to (..., rows), in the dtype of `x`."""
        if not self.rows.used_ids:
            return self.base(x)
        logits = torch.cat([F.linear(x, block.to(x.dtype)) for block in self.blocks()], dim=-1)
        return logits if self.bias is None else logits + self.bias.to(x.dtype)


def head_blocks(head: Any) -> tuple[torch.Tensor, ...]:
    """Return the weight of an output head as consecutive blocks of its rows, (rows, features) each."""
    return head.blocks() if isinstance(head, TrainedHead | HostHead) else (head.weight,)


def trained_rows(model: nn.Module) -> Iterator[tuple[str, EmbeddingRows]]:
    """Yield the trained rows of a model's embedding and head with the modules' names; shared rows twice."""
    for name, module in model.named_modules():
        if isinstance(module, TrainedEmbedding | TrainedHead):
            yield name, module.rows


@torch.no_grad()
def train_rows(
    model: Any, modules: Sequence[str] = (), new_ids: range = range(0), dtype: torch.dtype = torch.bfloat16
) -> dict[str, range]:
    """Wrap the embedding and the head of a frozen model so that rows of them are trained, in place.

    Rows of new tokens are initialized to the mean of the rows before them: their logits are the mean of the others, and
    predictions barely change (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").

    Args:
        model: A model of transformers that predicts tokens, or scores documents; then its head is trained too, with its
            bias if it has one.
        modules: Names, or their last parts, of the modules trained in full. If embedding and head share a weight, both
            are.
        new_ids: Ids of tokens added to the vocabulary; their rows are trained, and added if there are none.
        dtype: Dtype of trained rows.

    Returns:
        The ids of the trained rows by the names of the modules.

    Raises:
        ModelError: A name is neither the embedding's nor the head's, or one can't be trained or extended.
    """
    is_scorer = scores_documents(model)
    if not modules and not new_ids and not is_scorer:
        return {}
    head = output_head(model)
    layers = embedding_and_head(model)
    is_tied = len({id(layer.weight) for layer in layers.values()}) < len(layers)
    whole = _match(model, modules, list(layers))
    if is_tied and whole:
        whole = set(layers)
    added = {name: range(0) if is_scorer and layer is head else new_ids for name, layer in layers.items()}
    spans = {
        name: range(max(len(layer.weight), added[name].stop)) if name in whole or is_scorer and layer is head else ids
        for (name, layer), ids in zip(layers.items(), added.values(), strict=True)
    }
    for name, layer in layers.items():
        if spans[name]:
            _check(name, layer, added[name])
    rows: dict[str, EmbeddingRows] = {}
    for name, layer in layers.items():
        if spans[name]:
            if rows and is_tied:
                rows[name] = next(iter(rows.values()))
            else:
                values = first_rows(layer.weight, spans[name], added[name], dtype)
                bias = layer.bias.to(dtype, copy=True) if has_trained_bias(model, layer) else None
                rows[name] = EmbeddingRows(values, spans[name], len(layer.weight), bias)
    wrap_rows(model, rows)
    return {name: span for name, span in spans.items() if span}


def has_trained_bias(model: Any, layer: Any) -> bool:
    """Return whether a layer is a model's head of scores with a bias, which is trained with its weight."""
    return scores_documents(model) and layer is output_head(model) and layer.bias is not None


def wrap_rows(model: Any, rows: Mapping[str, EmbeddingRows]) -> None:
    """Wrap the embedding and the head of a model so that they use rows of their own, in place.

    Args:
        model: A model of transformers.
        rows: Rows by the names of the modules; those of a tied embedding and head are the same object.
    """
    embedding = input_embedding(model)
    for name, own in rows.items():
        layer = model.get_submodule(name)
        wrapped = TrainedEmbedding(layer, own) if layer is embedding else TrainedHead(layer, own)
        model.set_submodule(name, wrapped.train(model.training))


def _match(model: Any, modules: Sequence[str], allowed: list[str]) -> set[str]:
    """Return the layers that are named.

    Raises:
        ModelError: A name is that of no layer.
    """
    matches = {asked: [name for name in allowed if f".{name}".endswith(f".{asked}")] for asked in modules}
    unknown = [asked for asked, found in matches.items() if not found]
    if unknown:
        elsewhere = [f"{asked!r} is in {other}. " for asked in unknown if (other := other_part(model, asked))]
        raise ModelError(
            f"lora.modules_to_save: {''.join(elsewhere)}{', '.join(map(repr, unknown))} can't be trained in full: only "
            f"the input embeddings and the output head can, in {type(model).__name__} {' and '.join(allowed)}. "
            "Linear layers are adapted by lora.targets."
        )
    return {name for found in matches.values() for name in found}


def _check(name: str, layer: Any, new_ids: range) -> None:
    if not isinstance(layer, nn.Embedding | nn.Linear):
        raise ModelError(
            f"{name} is a {type(layer).__name__}, whose rows can't be trained; leave lora.modules_to_save and "
            "data.new_tokens empty."
        )
    size = len(layer.weight)
    if new_ids and new_ids.start > size:
        raise ModelError(
            f"data.new_tokens: their first id is {new_ids.start}, but {name} has {size} rows: the tokenizer has tokens "
            "without rows already. Use the tokenizer that the base was published with."
        )
    if new_ids.stop > size and getattr(layer, "bias", None) is not None:
        raise ModelError(
            f"data.new_tokens: {name} has {size} rows, each with a bias, and can't be extended; resize the base "
            "with transformers' resize_token_embeddings, save it, and train on that."
        )


def first_rows(weight: torch.Tensor, ids: range, new_ids: range, dtype: torch.dtype) -> torch.Tensor:
    """Return the initial values of trained rows: those of the base's weight, and for new tokens the mean before them.

    Args:
        weight: The base's weight, (rows, features).
        ids: Ids of the trained rows.
        new_ids: Ids of new tokens among them.
        dtype: Dtype of trained rows.

    Returns:
        (ids, features).
    """
    values = weight.new_empty(len(ids), weight.shape[1], dtype=dtype)
    stored = weight[ids.start : ids.stop]
    values[: len(stored)] = stored
    if new_ids:
        values[new_ids.start - ids.start : new_ids.stop - ids.start] = _mean_row(weight, new_ids)
    return values


def _mean_row(weight: torch.Tensor, new_ids: range) -> torch.Tensor:
    """Return the mean of the rows before those of new tokens, (features,), fp32."""
    return weight[: new_ids.start].mean(dim=0, dtype=torch.float32)


class _LookUp(torch.autograd.Function):
    """Look up rows by index and cast them; the row at index `padding` gets no gradient.

    The gradients of a row are summed in fp32: those of a frequent token would lose precision in 16 bits.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor, padding: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows, ctx.padding = len(rows), padding
        return F.embedding(places, rows).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        summed = torch.ops.aten.embedding_dense_backward(grad.float(), places, ctx.num_rows, ctx.padding, False)
        return summed, None, None, None
