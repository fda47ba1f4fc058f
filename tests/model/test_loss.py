"""The supervised loss: cross-entropy of the model's own logits, for every architecture."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
)

from qlora.data import IGNORE_INDEX, collate
from qlora.data.tokens import make_example
from qlora.errors import ModelError
from qlora.lora import add_lora
from qlora.model import check_loss, load_base, supervised_loss
from qlora.model.loss import logit_transform
from tests.tiny import make_base

ARCHITECTURES = {
    "llama": {},
    "gemma2 with a low cap": {"config_class": Gemma2Config, "final_logit_softcapping": 2.0},
    "cohere": {"config_class": CohereConfig, "logit_scale": 0.3},
    "granite": {"config_class": GraniteConfig, "logits_scaling": 3.0},
    "gpt2": {"config_class": GPT2Config, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def random_batch(generator, lengths=(17, 5, 11)):
    """Return rows of different lengths, so that there is padding, with different shares supervised."""
    return collate([
        make_example(
            torch.randint(256, (length,), generator=generator).numpy(),
            (torch.rand(length, generator=generator) < 0.6).numpy() | ([False] * (length - 1) + [True]),
        )
        for length in lengths
    ])  # fmt: skip


def reference_loss(model, batch):
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("sizes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_it_is_the_cross_entropy_of_the_models_logits(sizes, tmp_path, seed, generator):
    model, _ = load_base(str(make_base(tmp_path / "base", seed, **sizes)), compute_dtype="float32")
    batch = random_batch(generator)
    assert (batch.attention_mask == 0).any()
    loss = supervised_loss(model, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_loss(model, batch).item(), rel=1e-5)


@pytest.mark.parametrize("sizes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_its_gradient_is_that_of_the_models_logits(sizes, tmp_path, seed, generator):
    model, _ = load_base(str(make_base(tmp_path / "base", seed, **sizes)), compute_dtype="float32")
    embeddings = model.get_input_embeddings()
    batch = random_batch(generator)
    gradients = []
    for loss_of in (supervised_loss, reference_loss):
        seen = []

        def keep(_module, _inputs, output, seen=seen):
            seen.append(output.detach().requires_grad_())
            return seen[0]

        handle = embeddings.register_forward_hook(keep)
        loss_of(model, batch).backward()
        handle.remove()
        gradients.append(seen[0].grad)
    assert gradients[1].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * gradients[1].abs().max().item())


def test_a_batch_costs_what_its_rows_cost_alone(tiny_base, generator):
    model, _ = load_base(str(tiny_base), compute_dtype="float32")
    rows = [
        make_example(torch.randint(256, (length,), generator=generator).numpy(), [True] * length)
        for length in (4, 19, 9)
    ]
    together = supervised_loss(model, collate(rows)).item()
    assert together == pytest.approx(sum(supervised_loss(model, collate([row])).item() for row in rows), rel=1e-5)


def test_a_batch_without_supervised_positions_costs_nothing(tiny_base):
    model, _ = load_base(str(tiny_base), compute_dtype="float32")
    assert supervised_loss(model, collate([make_example([1, 2, 3], [False] * 3)])).item() == 0


def test_the_factor_and_the_cap_are_read_off_the_config():
    assert logit_transform(LlamaConfig()) == (1.0, None)
    assert logit_transform(CohereConfig(logit_scale=0.25)) == (0.25, None)
    assert logit_transform(GraniteConfig(logits_scaling=8.0)) == (0.125, None)
    assert logit_transform(FalconH1Config(lm_head_multiplier=0.25)) == (0.25, None)
    assert logit_transform(Gemma2Config(final_logit_softcapping=30.0)) == (1.0, 30.0)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_check_passes_where_the_loss_is_right(sizes, compute_dtype, tmp_path, seed, generator):
    model, _ = load_base(str(make_base(tmp_path / "base", seed, **sizes)), compute_dtype=compute_dtype)
    add_lora(model, rank=4)
    check_loss(model, random_batch(generator, [16]))


def test_logits_that_are_scaled_in_an_unknown_way_are_reported(tmp_path, seed, generator, monkeypatch):
    sizes = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
    sizes["initializer_range"] = 0.5  # logits large enough that a factor shows, as a trained model's are
    base = make_base(tmp_path / "base", seed, FalconH1Config, lm_head_multiplier=0.25, **sizes)
    model, _ = load_base(str(base), compute_dtype="float32")
    check_loss(model, random_batch(generator, [16]))
    monkeypatch.setattr("qlora.model.loss.logit_transform", lambda _config: (1.0, None))
    with pytest.raises(ModelError, match="FalconH1ForCausalLM computes its logits .* in an unsupported way"):
        check_loss(model, random_batch(generator, [16]))


def test_a_model_that_uses_a_layers_weight_directly_is_reported(tiny_base, generator):
    """In a way that its source does not show."""
    model, _ = load_base(str(tiny_base), compute_dtype="float32")
    add_lora(model, rank=4)
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, _inputs: module.weight and None)
    with pytest.raises(ModelError, match="LlamaForCausalLM can't be run .*no attribute 'weight'"):
        check_loss(model, random_batch(generator, [16]))
