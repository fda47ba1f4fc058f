"""Which layers `targets` selects, what is refused, and how the model changes."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from qlora.errors import ModelError
from qlora.lora import LoraLinear, add_lora, lora_layers, match_targets
from qlora.nf4 import NF4Linear

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config())


def tiny_config(**kwargs):
    return LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **kwargs,
    )  # fmt: skip


def last_parts(names):
    return {name.rpartition(".")[2] for name in names}


def quantize_linears(model):
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, NF4Linear.from_linear(module))
    return model


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_is_every_linear_but_the_output_head(quantized, tied):
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=tied))
    if quantized:
        quantize_linears(model)
    names = match_targets(model, "all-linear")
    assert last_parts(names) == PROJECTIONS
    assert len(names) == 2 * len(PROJECTIONS)


def test_all_linear_takes_everything_of_a_model_without_an_output_head():
    assert match_targets(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "all-linear") == ["0", "2"]
    assert len(match_targets(LlamaModel(tiny_config()), "all-linear")) == 2 * len(PROJECTIONS)


@pytest.mark.parametrize("targets", ["lm_head", [".*"], ["all-linear", "lm_head"]])
def test_an_adapter_on_the_output_head_is_refused(model, targets):
    with pytest.raises(ModelError, match="head can't be adapted"):
        match_targets(model, targets)


def test_all_linear_in_a_list_means_the_same(model):
    assert match_targets(model, ["all-linear"]) == match_targets(model, "all-linear")


def test_no_target_is_refused(model):
    with pytest.raises(ModelError, match="empty"):
        match_targets(model, [])


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("self_attn.q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        (r".*\.0\.self_attn\.[qk]_proj", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]),
        # In the model's order and once each, regardless of the order of targets.
        (
            ["model.layers.1.mlp.up_proj", r".*\.0\.mlp\.up_proj", "up_proj"],
            ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"],
        ),
    ],
    ids=["last-part", "suffix", "full-name", "regex", "list"],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_targets_match(model, targets, wanted, quantized):
    if quantized:
        quantize_linears(model)
    assert match_targets(model, targets) == wanted


@pytest.mark.parametrize("part", ["proj", "_proj", "q_pro", "layers"])
def test_a_piece_of_a_name_is_no_match(model, part):
    with pytest.raises(ModelError, match=part):
        match_targets(model, part)


def test_a_target_that_matches_nothing_is_reported_with_the_closest_name(model):
    with pytest.raises(ModelError) as caught:
        match_targets(model, ["v_proj", "q_porj"])
    message = str(caught.value)
    assert "'q_porj'" in message
    assert "'q_proj'" in message
    assert "'v_proj'" not in message


def test_all_wrong_targets_are_reported_at_once(model):
    with pytest.raises(ModelError) as caught:
        match_targets(model, ["q_porj", "k_proj", "dense_4h", "("])
    for wrong in ("'q_porj'", "'dense_4h'", "'('"):
        assert wrong in str(caught.value)


@pytest.mark.parametrize("name", ["embed_tokens", "model.embed_tokens", "input_layernorm", "self_attn"])
def test_a_target_that_is_not_a_linear_is_reported_with_its_type(model, name):
    kind = {"embed_tokens": "Embedding", "input_layernorm": "LlamaRMSNorm", "self_attn": "LlamaAttention"}
    with pytest.raises(ModelError, match=kind[name.rpartition(".")[2]]) as caught:
        match_targets(model, [name])
    assert f"'{name}'" in str(caught.value)


def test_a_model_without_linears_is_refused():
    with pytest.raises(ModelError, match="Sequential"):
        match_targets(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), "all-linear")


def test_a_refused_target_leaves_the_model_as_it_was(model):
    with pytest.raises(ModelError):
        add_lora(model, targets=["q_proj", "nothing_like_it"])
    assert not list(lora_layers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("quantized", [False, True])
def test_every_layer_asked_for_is_wrapped_and_no_other(model, quantized):
    if quantized:
        quantize_linears(model)
    bases = {name: model.get_submodule(name) for name in match_targets(model, ["q_proj", "down_proj"])}
    names = add_lora(model, rank=4, alpha=12, dropout=0.25, targets=["q_proj", "down_proj"])
    assert names == list(bases) == [name for name, _ in lora_layers(model)]
    for name, layer in lora_layers(model):
        assert isinstance(layer, LoraLinear)
        assert layer.base is bases[name]
        assert layer.lora_A.shape == (4, bases[name].in_features)
        assert layer.lora_B.shape == (bases[name].out_features, 4)
        assert (layer.spec.scaling, layer.spec.dropout) == (3.0, 0.25)


def test_a_fresh_adapter_changes_no_logit(model, generator):
    quantize_linears(model)
    tokens = torch.randint(61, (2, 7), generator=generator)
    before = model(tokens).logits
    add_lora(model, rank=4)
    assert torch.equal(model(tokens).logits, before)


def test_adding_twice_is_refused(model):
    add_lora(model, targets="q_proj")
    with pytest.raises(ModelError, match="already"):
        add_lora(model, targets="v_proj")
    assert last_parts(name for name, _ in lora_layers(model)) == {"q_proj"}


def test_only_lora_parameters_train(model, generator):
    add_lora(model, rank=4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert last_parts(trained) == {"lora_A", "lora_B"}
    assert len(trained) == 2 * 2 * len(PROJECTIONS)
    model(torch.randint(61, (2, 7), generator=generator)).logits.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_have_the_dtype_asked_for(model, dtype):
    add_lora(model, rank=4, dtype=dtype)
    assert {p.dtype for _, layer in lora_layers(model) for p in (layer.lora_A, layer.lora_B)} == {dtype}


@pytest.mark.parametrize("training", [True, False])
def test_adapters_train_or_evaluate_as_the_model_does(model, training):
    model.train(training)
    add_lora(model, rank=4, dropout=0.5)
    assert {layer.training for _, layer in lora_layers(model)} == {training}


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_same_seed_gives_the_same_values_and_another_seed_others(model, init, seed):
    def values(seed, other=0):
        torch.manual_seed(other)  # The global generator has no influence.
        model = LlamaForCausalLM(tiny_config())
        add_lora(model, rank=4, init=init, seed=seed)
        return torch.cat([layer.lora_A.detach().flatten() for _, layer in lora_layers(model)])

    first = values(seed)
    assert torch.equal(first, values(seed, 1))
    assert not torch.equal(first, values(seed + 1))
    # Layers of one shape differ from each other too.
    one, other = (layer for name, layer in _adapted(model, seed) if name.endswith("q_proj"))
    assert not torch.equal(one.lora_A, other.lora_A)


def _adapted(model, seed):
    add_lora(model, rank=4, seed=seed)
    return list(lora_layers(model))


def test_layers_have_ranks_and_scalings_of_their_own(model, generator):
    add_lora(model, rank=4, alpha=8, rank_pattern={"up_proj": 6, r"0\..*\.q_proj": 2}, alpha_pattern={"up_proj": 3})
    for name, layer in lora_layers(model):
        rank = 6 if "up_proj" in name else 2 if ".0.self_attn.q_proj" in name else 4
        assert layer.lora_A.shape == (rank, layer.in_features), name
        assert layer.lora_B.shape == (layer.out_features, rank), name
        assert layer.spec.scaling == (0.5 if "up_proj" in name else 8 / rank), name
        layer.lora_B.data.normal_(generator=generator)
    model(torch.randint(61, (2, 7), generator=generator)).logits.sum().backward()
    assert all(layer.lora_A.grad.abs().max() > 0 for _, layer in lora_layers(model))


def test_patterns_that_match_no_adapted_layer_are_named_and_leave_the_model_as_it_was(model):
    patterns = {"rank_pattern": {"q_proj": 2, "up_porj": 3}, "alpha_pattern": {"up_proj": 3}}
    with pytest.raises(ModelError) as caught:
        add_lora(model, targets=["q_proj"], **patterns)
    assert "lora.rank_pattern: 'up_porj'" in str(caught.value)
    assert "lora.alpha_pattern: 'up_proj'" in str(caught.value)
    assert "'q_proj'" not in str(caught.value)
    assert not list(lora_layers(model))
