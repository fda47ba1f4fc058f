"""The inventory: every parameter counted once, and by its name without adapters."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora.lora import add_lora, train_rows, trained_rows
from qlora.model import frozen_checksum, load_base, take_inventory
from qlora.nf4 import NF4Linear
from tests.tiny import make_base


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path, seed):
    return make_base(tmp_path / "base", seed, tie_word_embeddings=request.param, attention_bias=True)


def test_parameters_are_counted_once_and_shares_are_of_linear_weights(base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    model, _ = load_base(str(base))
    inventory = take_inventory(model)
    assert inventory.num_parameters == plain.num_parameters()
    assert inventory.quantized_share == 1  # embedding and head do not count
    assert inventory.adapted_share == 0
    assert inventory.num_trained == 0


def test_every_parameter_is_named_as_quantized_or_not(base):
    plain = {name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    model, _ = load_base(str(base))
    inventory = take_inventory(model)
    quantized = [f"{name}.weight" for name in inventory.quantized]
    assert len(inventory.quantized) == 14
    assert sorted([*quantized, *inventory.unquantized]) == sorted(plain)


def test_adapters_change_no_name_and_no_count_of_the_base(base):
    model, _ = load_base(str(base))
    before = take_inventory(model)
    add_lora(model, rank=4, targets=["q_proj", "up_proj"])
    after = take_inventory(model)
    assert after.quantized == before.quantized
    assert after.unquantized == before.unquantized
    assert (after.num_parameters, after.base_bytes) == (before.num_parameters, before.base_bytes)
    assert after.num_trained == 2 * 4 * (64 + 64 + 64 + 172)
    linear = 64 * (64 + 32 + 32 + 64 + 3 * 172)
    assert after.quantized_share == 1
    assert after.adapted_share == pytest.approx((64 * 64 + 64 * 172) / linear)


@pytest.mark.parametrize("modules", [[], ["lm_head"]], ids=["new rows", "head in full"])
def test_trained_rows_are_counted_once_and_the_base_as_before(modules, base):
    model, _ = load_base(str(base))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = take_inventory(model)
    size = model.get_input_embeddings().weight.numel()
    train_rows(model, modules, range(257, 262))
    after = take_inventory(model)
    assert after.num_parameters == before.num_parameters
    assert after.quantized_share == before.quantized_share
    whole, new = 262 * 64, 5 * 64
    assert after.num_trained == (new * (2 - tied) if not modules else whole if tied else whole + new)
    assert after.trained_rows == {
        "model.embed_tokens": [0, 262] if modules and tied else [257, 262],
        "lm_head": [0, 262] if modules else [257, 262],
    }
    assert after.shared_rows == tied
    assert after.base_bytes == before.base_bytes - (size * model.dtype.itemsize if modules else 0)
    assert set(before.unquantized) <= set(after.unquantized)


def test_bytes_are_those_of_the_tensors_that_are_held(base):
    model, _ = load_base(str(base), compute_dtype="bfloat16")
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    plain = {id(value): value for value in model.parameters() if value.dtype != torch.uint8}
    expected = sum(value.numel() * 2 for value in plain.values())
    for layer in layers:
        blocks = -(-layer.in_features * layer.out_features // 64)
        # Codes; a byte per block; an fp32 per 256 blocks, and their mean.
        expected += layer.in_features * layer.out_features // 2 + blocks + 4 * -(-blocks // 256) + 4
    assert take_inventory(model).base_bytes == expected


def test_a_model_without_quantization_has_no_quantized_share(tiny_base):
    model, _ = load_base(str(tiny_base), quantization="none")
    assert take_inventory(model).quantized == []
    assert take_inventory(model).quantized_share == 0


def test_the_checksum_sees_a_changed_byte_of_the_base_and_not_the_adapters(base, seed):
    model, _ = load_base(str(base))
    add_lora(model, rank=4)
    before = frozen_checksum(model)
    model.model.layers[1].mlp.up_proj.lora_B.data.fill_(1.0)
    train_rows(model, [], range(255, 259))
    for _, rows in trained_rows(model):
        rows.weight.data.fill_(1.0)
    assert frozen_checksum(model) == before
    base_layer = model.model.layers[seed % 2].mlp.up_proj.base
    state = base_layer.quant_state
    for tensor in (base_layer.weight.data, state.absmax, state.state2.absmax, state.offset):
        changed = tensor.view(-1).view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
        changed[seed % len(changed)] ^= 1
        assert frozen_checksum(model) != before
        changed[seed % len(changed)] ^= 1
