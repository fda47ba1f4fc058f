"""Rotary embeddings whose frequencies depend on the length of the sequence, computed for each document by itself.

transformers' dynamic and longrope embeddings choose frequencies by the largest position of a whole batch, and dynamic
ones keep those of the longest batch so far. A document would then be computed differently next to a longer one, or
after one. Here each document gets the frequencies of its own length, packed, padded or alone.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


class RotaryByDocument(nn.Module):
    """A rotary embedding of transformers, computed once for each length of a document.

    Args:
        own: The embedding.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the embedding returns, for positions (..., tokens) that restart at each document."""
        lengths, result = document_lengths(position_ids), None
        for length in lengths.unique().tolist():
            self.own(x, torch.zeros_like(position_ids), *args, **kwargs)  # forgets a longer sequence
            found = self.own(x, position_ids.clamp(max=length - 1), *args, **kwargs)
            here = (lengths == length)[..., None]
            result = found if result is None else tree_map(partial(torch.where, here), found, result)
        return result


def document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the length of the document of each token, by positions (..., tokens) that grow by one in a document."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[..., 1:] = position_ids[..., 1:] != position_ids[..., :-1] + 1
    numbers, flat = begins.flatten().cumsum(0) - 1, position_ids.flatten()
    lengths = torch.zeros_like(flat).scatter_reduce(0, numbers, flat + 1, "amax")
    return lengths[numbers].view_as(position_ids)


def use_document_rotary(model: nn.Module) -> None:
    """Replace rotary embeddings whose frequencies depend on the length of the sequence; others stay."""
    for name, module in list(model.named_modules()):
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        depends = any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)
        if depends and any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
            model.set_submodule(name, RotaryByDocument(module))
