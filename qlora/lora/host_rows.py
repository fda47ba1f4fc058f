"""A frozen embedding and output head whose rows stay on the host, for models whose layers are not on the device.

An embedding looks up its rows there, and only those go to the device. A head goes to the device as a whole whenever it
is used, and its memory is free again afterwards.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qlora.kernels import free_scratch
from qlora.lora.head import embedding_and_head, input_embedding, output_head


class _HostRows(nn.Module):
    """A layer without its weight.

    Args:
        base: The frozen layer; an empty weight keeps its dtype and device.

    Attributes:
        rows: The weight on the host, (rows, features).
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        weight = base.weight.data
        self.rows = weight.cpu().pin_memory() if weight.is_cuda else weight
        base.weight = nn.Parameter(weight.new_empty(0, weight.shape[1]), requires_grad=False)
        self.base = base

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.rows.shape[0]}, {self.rows.shape[1]}, on the host"


class HostEmbedding(_HostRows):
    """An embedding whose class processes the rows like its own, such as by scaling them."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base)
        base.padding_idx = None  # it gets tables with other rows at that index

    @property
    def num_embeddings(self) -> int:
        """Number of ids that have rows."""
        return len(self.rows)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map (...) to (..., features)."""
        table = F.embedding(ids.flatten().cpu(), self.rows).to(self.base.weight.device)
        in_table = torch.arange(ids.numel(), device=table.device).view(ids.shape)
        return torch.func.functional_call(self.base, {"weight": table}, (in_table,))


class HostHead(_HostRows):
    """An output head over the vocabulary."""

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias, (rows,), on the device."""
        return self.base.bias

    def blocks(self) -> tuple[torch.Tensor, ...]:
        """Return the weight, (rows, features), as one block on the device, for which dequantized weights make room."""
        device = self.base.weight.device
        if device.type != "cpu":  # where it is copied
            free_scratch(device)
        return (self.rows.to(device, non_blocking=True),)

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


def host_rows(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a model that are on the host by :func:`keep_rows_on_host`, by their layers' names."""
    return {name: module.rows for name, module in model.named_modules() if isinstance(module, _HostRows)}
