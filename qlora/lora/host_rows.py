"""A frozen embedding and output head whose rows stay on the host, for models whose layers are not on the device.

An embedding looks up its rows there, and only those go to the device. A head goes to the device as a whole whenever it
is used, and its memory is free again afterwards.

The host reads the ids of an embedding, so it waits for the GPU at the beginning of each forward pass: the ids are
copied to the GPU in the order of its work. A copy of them on the host would have to come with the batch.
"""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qlora.kernels import free_scratch
from qlora.lora.head import embedding_and_head, input_embedding, output_head

# The head is pinned in pieces of this size, because torch rounds memory that is pinned up to a power of two.
PIECE_BYTES = 1 << 23


class _HostRows(nn.Module):
    """A layer without its weight.

    Args:
        base: The frozen layer; an empty weight keeps its dtype and device.

    Attributes:
        pieces: The weight on the host in blocks of consecutive rows, (rows, features) each.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        weight = base.weight.data
        self.num_rows, self.num_features = weight.shape
        self.pieces = [weight.cpu() if weight.is_cuda else weight]
        base.weight = nn.Parameter(weight.new_empty(0, self.num_features), requires_grad=False)
        self.base = base

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.num_rows}, {self.num_features}, on the host"


class HostEmbedding(_HostRows):
    """An embedding whose class processes the rows like its own, such as by scaling them."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base)
        base.padding_idx = None  # it gets tables with other rows at that index

    @property
    def num_embeddings(self) -> int:
        """Number of ids that have rows."""
        return self.num_rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map (...) to (..., features)."""
        (rows,) = self.pieces
        table = F.embedding(ids.flatten().cpu(), rows).to(self.base.weight.device)
        in_table = torch.arange(ids.numel(), device=table.device).view(ids.shape)
        return torch.func.functional_call(self.base, {"weight": table}, (in_table,))


class HostHead(_HostRows):
    """An output head over the vocabulary.

    Args:
        base: The frozen layer.
        piece_bytes: Bytes of the pieces that the weight is kept in; None for one piece, unless it is pinned.

    Attributes:
        num_copied: Number of times that the weight came to the device.
    """

    def __init__(self, base: Any, piece_bytes: int | None = None) -> None:
        super().__init__(base)
        is_pinned = self.base.weight.is_cuda
        if is_pinned or piece_bytes is not None:
            (weight,) = self.pieces
            most = max(1, (piece_bytes or PIECE_BYTES) // weight[0].nbytes)
            self.pieces = [torch.empty_like(own, pin_memory=is_pinned).copy_(own) for own in weight.split(most)]
        self.num_copied = 0
        self._copy: weakref.ref[torch.Tensor] | None = None

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias, (rows,), on the device."""
        return self.base.bias

    def blocks(self) -> tuple[torch.Tensor, ...]:
        """Return the weight, (rows, features), as a single block on the device, after freeing scratch memory there.

        It is not copied while an earlier copy is in use, as in a loss that compares predictions with the base's.
        """
        weight = None if self._copy is None else self._copy()
        if weight is None:
            weight = self._on_device()
            self._copy = weakref.ref(weight)
            self.num_copied += 1
        return (weight,)

    def _on_device(self) -> torch.Tensor:
        """Return the weight on the device, as a tensor that is in use by itself where that is the host."""
        device = self.base.weight.device
        if device.type != "cpu":  # where it is copied
            free_scratch(device)
        if len(self.pieces) == 1:
            return self.pieces[0].to(device, non_blocking=True).view(self.num_rows, self.num_features)
        weight = torch.empty(self.num_rows, self.num_features, dtype=self.base.weight.dtype, device=device)
        for own, piece in zip(weight.split([len(piece) for piece in self.pieces]), self.pieces, strict=True):
            own.copy_(piece, non_blocking=True)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., features) to (..., rows)."""
        (weight,) = self.blocks()
        return F.linear(x, weight, self.bias)


def rows_for_host(model: Any) -> dict[str, Any]:
    """Return the embedding and the head of a model that can be on the host, by their names.

    They are those that are not trained, not even some rows of them, and share no weight.
    """
    layers = embedding_and_head(model)
    is_tied = len({id(getattr(layer, "weight", layer)) for layer in layers.values()}) < len(layers)
    plain = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.Embedding | nn.Linear) and not layer.weight.requires_grad
    }
    return {} if is_tied else plain


def keep_rows_on_host(model: Any) -> None:
    """Move the weights of :func:`rows_for_host` to the host, in place."""
    embedding, head = input_embedding(model), output_head(model)
    for name, layer in rows_for_host(model).items():
        if layer is embedding:
            model.set_submodule(name, HostEmbedding(layer).train(model.training))
        elif layer is head:
            model.set_submodule(name, HostHead(layer).train(model.training))


def host_rows(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return the weights of a model that are on the host by :func:`keep_rows_on_host`, in pieces, by layers' names."""
    return {name: module.pieces for name, module in model.named_modules() if isinstance(module, _HostRows)}
