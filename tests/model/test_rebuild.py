"""A model whose norms and gated products are built again: the same to the last bit, and smaller."""

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, MixtralConfig, Phi3Config, Qwen3Config

from qlora.data import collate, make_example
from qlora.lora import add_lora, lora_layers
from qlora.model import apply_recompute, load_base, rebuild_activations, supervised_loss, use_document_attention
from qlora.model.rebuild import GatedMLP, RebuiltNorm
from tests.model.test_packed import loss_and_gradients
from tests.tiny import make_base

# Norms and gated MLPs that are replaced in two layers.
FAMILIES = {
    "llama": (LlamaConfig, {}, (5, 2)),
    "qwen3": (Qwen3Config, {}, (9, 2)),
    "gemma2": (Gemma2Config, {}, (9, 2)),
    "gemma3": (Gemma3TextConfig, {}, (13, 2)),
    "phi3, gate and up in one": (Phi3Config, {}, (5, 0)),
    "mixtral, with experts": (MixtralConfig, {"num_local_experts": 4}, (5, 0)),
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, (5, 0)),
}


def batch(generator, packed):
    documents = [
        make_example(torch.randint(256, (length,), generator=generator).numpy(), [True] * length) for length in (9, 30)
    ]
    return collate(documents, packed)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("config_class", "sizes", "expected"), FAMILIES.values(), ids=FAMILIES)
def test_it_computes_the_same(config_class, sizes, expected, recompute, tmp_path, seed, generator):
    base = make_base(tmp_path / "base", seed, config_class, **sizes)
    model = load_base(str(base), compute_dtype="float32")[0]
    add_lora(model, rank=4, dtype=torch.float32)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    apply_recompute(model, recompute)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    one = batch(generator, packed=True)
    names = [name for name, _ in model.named_parameters()]
    loss, gradients = loss_and_gradients(model, [one])
    assert rebuild_activations(model) == sum(expected)
    assert tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in (RebuiltNorm, GatedMLP)) == expected
    assert [name for name, _ in model.named_parameters()] == names
    again, found = loss_and_gradients(model, [one])
    assert again == pytest.approx(loss, rel=1e-6)
    assert all((one - other).norm() <= 1e-5 * other.norm() for one, other in zip(found, gradients, strict=True))
    with torch.no_grad():
        assert supervised_loss(model.eval(), one).item() == pytest.approx(loss, rel=1e-6)


def test_an_mlp_of_the_same_names_that_does_more_is_left_alone(tiny_base):
    model, _ = load_base(str(tiny_base))
    mlp = model.model.layers[0].mlp

    class Doubled(type(mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp.__class__ = Doubled
    rebuild_activations(model)
    assert type(model.model.layers[0].mlp) is Doubled
    assert isinstance(model.model.layers[1].mlp, GatedMLP)


def test_a_norm_that_is_trained_is_left_alone(tiny_base):
    model, _ = load_base(str(tiny_base))
    model.model.norm.weight.requires_grad_(True)
    rebuild_activations(model)
    assert not isinstance(model.model.norm, RebuiltNorm)


def held_bytes_per_token(model, one):
    """Bytes of what lives between forward and backward for its sake, parameters left out, per token."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = (storage.nbytes(), torch.multiprocessing.reductions.StorageWeakRef(storage))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = supervised_loss(model, one)
    alive = sum(nbytes for nbytes, reference in held.values() if not reference.expired())
    assert loss.requires_grad
    return alive / one.input_ids.numel()


@pytest.mark.parametrize(("recompute", "limit"), [("none", 100_000), ("full", 9_500)])
def test_little_is_held_between_forward_and_backward(recompute, limit, tmp_path, generator):
    sizes = {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    base = make_base(tmp_path / "base", 0, LlamaConfig, **sizes)
    model = load_base(str(base), compute_dtype="bfloat16")[0]
    add_lora(model, rank=16)
    use_document_attention(model)
    rebuild_activations(model)
    apply_recompute(model, recompute)
    model.train()
    documents = [make_example(torch.randint(256, (128,), generator=generator).numpy(), [True] * 128) for _ in range(2)]
    assert held_bytes_per_token(model, collate(documents, packed=True)) <= limit
