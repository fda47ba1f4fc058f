"""Self-attention is replaced only where its replacement computes the same, whatever the angles and the device."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    NemotronConfig,
    OlmoConfig,
    SeedOssConfig,
)

from qlora.data import collate, make_example
from qlora.kernels import rotate
from qlora.layers import rebuild_activations, self_attention, use_document_attention
from qlora.layers.rebuild import GatedMLP
from qlora.layers.self_attention import SelfAttention
from qlora.lora import add_lora, lora_layers
from qlora.model import load_base, supervised_loss
from tests.layers.test_packed import loss_and_gradients
from tests.tiny import SIZES, make_base

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}


def load(base, compute_dtype="bfloat16"):
    model = load_base(str(base), compute_dtype=compute_dtype)[0]
    use_document_attention(model)
    return model


def replaced(model):
    rebuild_activations(model)
    return [isinstance(layer.self_attn, SelfAttention) for layer in model.model.layers]


@pytest.mark.parametrize(
    ("config_class", "sizes", "rotates"),
    [
        (LlamaConfig, {}, True),
        (NemotronConfig, {"partial_rotary_factor": 0.5}, False),
        (Glm4MoeConfig, EXPERTS, False),
        (OlmoConfig, {}, False),
        (OlmoConfig, {"clip_qkv": 0.5}, False),
        (GraniteMoeHybridConfig, {"layer_types": ["attention"] * 2, "position_embedding_type": None}, False),
    ],
)
def test_only_whole_rotations_in_the_dtype_of_the_model_are_computed_in_bf16(
    config_class, sizes, rotates, monkeypatch, tmp_path, seed, generator
):
    model = load(make_base(tmp_path / "base", seed, config_class, **sizes))
    add_lora(model, rank=4)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    ids = torch.randint(256, (30,), generator=generator).numpy()
    batch = collate([make_example(ids, [True] * len(ids))])
    loss, gradients = loss_and_gradients(model.eval(), [batch])
    rebuild_activations(model)
    calls = []

    def counted(*args):
        calls.append(args)
        return rotate(*args)

    monkeypatch.setattr(self_attention, "rotate", counted)
    again, found = loss_and_gradients(model, [batch])
    assert bool(calls) == rotates
    assert again == pytest.approx(loss, rel=1e-3)
    assert all((one - other).norm() <= 0.05 * other.norm() for one, other in zip(found, gradients, strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("change", ["doubled", "clipped", "error"])
def test_a_layer_that_does_more_is_left_alone_with_and_without_values(change, device, tiny_base):
    model = load(tiny_base).to(device)
    own = model.model.layers[0].self_attn

    class Other(type(own)):
        def forward(self, *args, **kwargs):
            if change == "error":
                raise AssertionError("a kernel of its own")
            layer = self._modules["v_proj"]
            if change == "clipped":
                self._modules["v_proj"] = lambda x: layer(x).clamp(-50, 50)
            attended, weights = super().forward(*args, **kwargs)
            self._modules["v_proj"] = layer
            return attended * (2 if change == "doubled" else 1), weights

    own.__class__ = Other
    assert replaced(model) == [False, True]


def test_memory_that_runs_out_in_a_trial_is_no_reason_against_a_layer(tiny_base):
    model = load(tiny_base)
    own = model.model.layers[0].self_attn

    class Full(type(own)):
        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError("no memory left")

    own.__class__ = Full
    with pytest.raises(torch.OutOfMemoryError):
        rebuild_activations(model)


@pytest.mark.parametrize(("share", "is_replaced"), [(0.0, True), (0.1, False)])
def test_layers_that_drop_values_in_training_are_left_alone(share, is_replaced):
    config = SeedOssConfig(**SIZES, residual_dropout=share, attention_dropout=0.0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    use_document_attention(model)
    assert replaced(model) == [is_replaced] * 2
    assert [isinstance(layer.mlp, GatedMLP) for layer in model.model.layers] == [is_replaced] * 2


@pytest.mark.parametrize("name", ["self_attn", "mlp", "mlp.act_fn", "input_layernorm"])
def test_a_module_with_hooks_is_left_alone_and_its_hooks_are_called_once(name, tiny_base):
    model = load(tiny_base)
    replaced_name = name.removesuffix(".act_fn")
    hooked, own = (model.model.layers[0].get_submodule(each) for each in (name, replaced_name))
    calls = []
    hooked.register_forward_hook(lambda module, inputs, output: calls.append(module))
    chosen = rebuild_activations(model)
    assert chosen == f"plain torch; {type(own).__name__} with hooks not replaced: the fused kernels are for CUDA"
    assert calls == []
    with torch.no_grad():
        supervised_loss(model.eval(), collate([make_example(list(range(8)), [True] * 8)]))
    assert calls == [hooked]
    others = [layer.get_submodule(replaced_name) for layer in model.model.layers[1:]]
    assert all(type(other) is not type(own) for other in others)
