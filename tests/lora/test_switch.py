"""Adapters switched off: the model is its base bit for bit, and afterwards what it was before."""

import copy

import pytest
import torch
from torch import nn
from transformers import PhiConfig, ViTConfig, ViTForImageClassification

from qlora.errors import ModelError
from qlora.layers import apply_recompute
from qlora.lora import adapters_at_start, adapters_off, add_lora, lora_layers, train_rows, trained_rows
from qlora.model import load_base, supervised_loss
from tests.layers.test_recompute import gradients, make_model, random_batch
from tests.lora.test_rows import BEHIND, ROWS, SPARE
from tests.lora.test_rows import make_model as make_plain_model
from tests.tiny_images import SMALL


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("form", ["separate", "auto"])
def test_the_model_is_its_base_bit_for_bit_while_they_are_off(form, dropout, quantization, tiny_base, generator):
    model, _ = load_base(str(tiny_base), quantization=quantization)
    model.train()
    ids = torch.randint(256, (2, 20), generator=generator)
    base = logits_of(model, ids)
    add_lora(model, rank=4, dropout=dropout, form=form)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    torch.manual_seed(1)
    adapted = logits_of(model, ids)
    assert not torch.equal(adapted, base)
    torch.manual_seed(1)
    with adapters_off(model):
        assert torch.equal(logits_of(model, ids), base)
        with adapters_off(model):
            assert torch.equal(logits_of(model, ids), base)
        assert torch.equal(logits_of(model, ids), base)
    assert torch.equal(logits_of(model, ids), adapted)  # with the same dropout: none was drawn in between


def test_they_are_on_again_after_an_error(tiny_base, generator):
    model, _ = load_base(str(tiny_base))
    add_lora(model, rank=4)

    def fail():
        with adapters_off(model):
            assert all(layer.is_off for _, layer in lora_layers(model))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(layer.is_off for _, layer in lora_layers(model))


@pytest.mark.parametrize(("new_ids", "tied"), [(SPARE, False), (SPARE, True), (BEHIND, False), (BEHIND, True)])
def test_trained_rows_are_off_too_and_new_tokens_are_as_they_began(new_ids, tied, generator, seed):
    model = make_plain_model(seed, tied=tied).requires_grad_(False).eval()
    ids = torch.randint(ROWS, (2, 20), generator=generator)
    base = logits_of(copy.deepcopy(model), ids)
    train_rows(model, [], new_ids, torch.float32)
    new = torch.tensor([list(new_ids)])
    began = logits_of(model, new)
    for rows in {rows for _, rows in trained_rows(model)}:
        nn.init.normal_(rows.weight)
    tuned = logits_of(model, new)
    with adapters_off(model):
        assert torch.equal(logits_of(model, ids)[..., :ROWS], base)
        if new_ids.start >= ROWS:
            assert torch.equal(logits_of(model, new), began)
        else:
            assert logits_of(model, ids).shape == base.shape
    assert not torch.equal(tuned, began)
    assert torch.equal(logits_of(model, new), tuned)


def test_a_heads_biases_are_added_as_the_base_adds_them(generator, seed):
    model = make_plain_model(seed, PhiConfig, partial_rotary_factor=0.5).requires_grad_(False).bfloat16()
    ids = torch.randint(ROWS, (2, 20), generator=generator)
    base = logits_of(model, ids)
    train_rows(model, [], SPARE)
    with adapters_off(model):
        assert torch.equal(logits_of(model, ids), base)


def test_a_base_whose_rows_are_gone_is_refused(seed):
    model = make_plain_model(seed)
    train_rows(model, ["lm_head"])
    add_lora(model.model, rank=4)
    with pytest.raises(ModelError, match=r"trained in full.*lora\.modules_to_save"), adapters_off(model):
        pass
    assert not any(layer.is_off for _, layer in lora_layers(model))


@pytest.mark.parametrize("level", ["none", "mlp", "attention", "full"])
def test_a_reference_in_between_changes_no_gradient_at_any_level_of_recomputation(level, tiny_base, generator, seed):
    model, batch = make_model(tiny_base, generator, dropout=0.3), random_batch(generator)
    apply_recompute(model, level)
    loss, expected = gradients(model, batch, seed)
    plain, _ = load_base(str(tiny_base))
    reference = supervised_loss(plain.train(), batch)

    torch.manual_seed(seed)
    model.zero_grad()
    tuned = supervised_loss(model, batch)
    with adapters_off(model):
        off = supervised_loss(model, batch)
        with torch.no_grad():
            assert torch.equal(supervised_loss(model, batch), off)
    assert not off.requires_grad
    assert (off - reference).abs() <= 2**-7 * reference.abs()  # norms and attention are other kernels
    tuned.backward()
    assert tuned.item() == loss
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name]), name


def test_a_trained_bias_is_not_taken_for_that_of_the_start():
    model = ViTForImageClassification(ViTConfig(**SMALL)).requires_grad_(False)
    train_rows(model)
    with pytest.raises(ModelError, match="its head has a trained bias"), adapters_at_start(model):
        pass
