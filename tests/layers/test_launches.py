"""Launches of a decoder layer and micro-batch on a GPU, counted on a CPU.

A model without values runs through the code that a GPU runs, with kernels that are only counted. The launches of one
layer are those that a model of three layers has more than one of two.
"""

from collections import Counter

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from qlora.layers import apply_recompute, attention, rebuild_activations, use_document_attention
from qlora.lora import add_lora
from qlora.model import load_base
from qlora.optim import FlatParameters
from scripts.dev.bench.counts import with_kernels
from tests.interpreted import Launches, counted_kernel, needs_triton
from tests.tiny import make_base

TOKENS = 600


@pytest.fixture
def on_gpu(monkeypatch):
    """Have tensors of the meta device computed as those of a GPU, by kernels that are only counted."""
    monkeypatch.setattr(attention, "_takes_blocks", lambda *_: False)
    monkeypatch.setattr(attention, "_takes_varlen", lambda *_: True)
    with with_kernels(counted_kernel):
        yield


def count(folder, config_class, num_layers, level, form) -> tuple[Counter[str], Counter[str]]:
    """Return the launches of a model's decoder, forward and backward, by name."""
    base = make_base(folder, 0, config_class, num_hidden_layers=num_layers)
    model = load_base(str(base), compute_dtype="bfloat16")[0].to("meta")
    add_lora(model, rank=4, form=form)
    use_document_attention(model)
    forward, backward = Launches(), Launches()
    with Launches():  # which kernels are used is tried by using them
        assert rebuild_activations(model) == "fused kernels"
    apply_recompute(model, level)
    model.train()
    FlatParameters([(name, each) for name, each in model.named_parameters() if each.requires_grad])
    ids = torch.empty(1, TOKENS, dtype=torch.long, device="meta")
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    arguments = attention.mask_arguments(model, None, bounds, [TOKENS // 2] * 2)
    with forward:
        hidden = model.model(input_ids=ids, position_ids=ids, use_cache=False, **arguments).last_hidden_state
    grad = torch.ones_like(hidden)
    with backward:
        hidden.backward(grad)
    return forward.counts, backward.counts


# At most so many, forward and backward, without and with recomputation.
@needs_triton
@pytest.mark.parametrize(
    ("config_class", "level", "form", "most"),
    [
        (LlamaConfig, "none", "folded", (25, 80)),
        (LlamaConfig, "full", "folded", (25, 95)),
        (LlamaConfig, "full", "separate", (40, 125)),
        (Qwen3Config, "full", "folded", (30, 105)),
        (Gemma3TextConfig, "full", "folded", (30, 105)),
    ],
)
def test_a_layer_launches_few_kernels(config_class, level, form, most, on_gpu, tmp_path):
    few, many = (count(tmp_path / str(layers), config_class, layers, level, form) for layers in (2, 3))
    own = [more - less for more, less in zip(many, few, strict=True)]
    print(f"{config_class.__name__}, {level}, {form}: {own[0].total()} forward, {own[1].total()} backward")
    for one in own:
        print("  " + ", ".join(f"{name.rpartition('::')[2]} {number}" for name, number in one.most_common()))
    assert own[0]["dequantize"] == own[1]["dequantize"] == 7
    assert own[0].total() <= most[0]
    assert own[1].total() <= most[1]
