"""Changes to a transformers model: attention, recomputation, offload and cached weights."""

from qlora.layers.attention import use_document_attention
from qlora.layers.rebuild import rebuild_activations
from qlora.layers.recompute import apply_recompute, recompute_levels
from qlora.layers.rotary import use_document_rotary
from qlora.layers.states import use_document_states
from qlora.layers.weight_cache import cache_weights

__all__ = [
    "apply_recompute",
    "cache_weights",
    "rebuild_activations",
    "recompute_levels",
    "use_document_attention",
    "use_document_rotary",
    "use_document_states",
]
