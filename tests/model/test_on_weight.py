"""Weights replaced while a base is loaded: passed as stored, quantized as returned, one at a time."""

import gc

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, NemotronHConfig
from transformers.models.hrm_text import HrmTextConfig

from qlora.errors import ModelError
from qlora.export.quantize import quantize_model
from qlora.model import load_base
from qlora.nf4 import NF4Linear, quantize
from tests.tiny import make_base

GPT2 = {"config_class": GPT2Config, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
NEMOTRON = {"config_class": NemotronHConfig, "layers_block_type": ["attention", "mlp"]}  # stored under other names
BASES = {
    "llama": {},
    "llama, tied, with biases": {"tie_word_embeddings": True, "attention_bias": True},
    "gpt2": GPT2,
    "nemotron": NEMOTRON,
}


@pytest.fixture(params=BASES.values(), ids=BASES)
def base(request, tmp_path, seed):
    return make_base(tmp_path / "base", seed, **request.param)


def quantized_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def assert_same(model, other):
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_each_quantized_layer_is_seen_once_as_stored(base):
    seen = []

    def on_weight(name, weight):
        seen.append((name, weight.clone()))
        return weight

    model, _ = load_base(str(base), compute_dtype="float16", on_weight=on_weight)
    layers, stored = quantized_layers(model), load_file(base / "model.safetensors")
    assert sorted(name for name, _ in seen) == sorted(layers)
    for name, weight in seen:
        assert weight.dtype == torch.bfloat16
        assert tuple(weight.shape) == (layers[name].out_features, layers[name].in_features), name
        in_file = f"{name.replace('model.', 'backbone.', 1)}.weight"
        tensor = stored[in_file if in_file in stored else f"{name}.weight"]
        assert torch.equal(weight, tensor.T if name.startswith("transformer.h.") else tensor), name


def test_weights_returned_as_they_are_change_nothing(base):
    plain, _ = load_base(str(base), compute_dtype="bfloat16")
    model, _ = load_base(str(base), compute_dtype="bfloat16", on_weight=lambda name, weight: weight.float())
    assert_same(model, plain)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_weight_returned_is_quantized_in_the_compute_dtype(compute_dtype, double_quant, base, generator):
    returned = {}

    def on_weight(name, weight):
        returned[name] = torch.randn(weight.shape, generator=generator, requires_grad=True)
        return returned[name] * 2

    options = {"compute_dtype": compute_dtype, "double_quant": double_quant}
    plain, _ = load_base(str(base), **options)
    model, _ = load_base(str(base), **options, on_weight=on_weight)
    for name, layer in quantized_layers(model).items():
        weight = (returned[name].detach() * 2).to(model.dtype)
        expected = NF4Linear(*quantize(weight, double_quant), layer.bias)
        assert_same(layer, expected)
    quantized = {f"{name}.weight" for name in returned}
    unquantized = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert name in quantized or torch.equal(parameter, unquantized[name]), name


def test_one_weight_is_in_memory_at_a_time(base):
    """Counted rather than timed: the floating-point matrices of layers that are alive at each call."""
    counts = []

    def alive():
        return [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]

    def on_weight(name, weight):
        matrices = {
            each.untyped_storage().data_ptr()
            for each in alive()
            if id(each) not in known
            and each.device.type == "cpu"
            and each.dim() == 2
            and each.is_floating_point()
            and each.shape[0] > 1
            and each.numel() == weight.numel()
        }
        counts.append(len(matrices))
        return weight.float() + 1

    others = alive()  # of other tests; kept, so that no new tensor gets the identity of one
    known = set(map(id, others))

    load_base(str(base), compute_dtype="bfloat16", on_weight=on_weight)
    assert len(counts) > 1
    assert set(counts) == {1}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weight: None, "returned None for {name}; return the tensor of shape {shape}"),
        (lambda weight: weight[1:], r"returned a tensor of shape \(171, 64\) for {name}; return one of {shape}"),
        (lambda weight: weight.T, r"returned a tensor of shape \(64, 172\) for {name}"),
        (lambda weight: weight.to(torch.int8), r"returned a tensor in torch\.int8 for {name}; return one in 16 or"),
        (lambda weight: weight.double(), r"returned a tensor in torch\.float64 for {name}"),
        (lambda weight: weight / 0, "returned values that are not finite for {name}"),
        (lambda weight: weight @ weight, "failed for {name}: RuntimeError: "),
        (lambda weight: {}["rank"], "failed for {name}: KeyError: 'rank'"),
    ],
)
def test_a_return_value_that_cannot_be_quantized_is_refused_with_the_layer(change, problem, tiny_base):
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(ModelError, match="^on_weight " + problem.format(name=name, shape=r"\(172, 64\)")):
        load_base(str(tiny_base), on_weight=lambda layer, weight: change(weight) if layer == name else weight)


def never(name, weight):
    raise AssertionError(f"{name} was read")


def test_weights_that_are_not_quantized_while_loading_are_refused(tiny_base, tmp_path):
    with pytest.raises(ModelError, match=r"no weight of .* is quantized; set quantization: nf4\."):
        load_base(str(tiny_base), quantization="none", on_weight=never)
    quantize_model(str(tiny_base), tmp_path / "4bit")
    with pytest.raises(
        ModelError, match=r"no weight of .*4bit is quantized; use the 16-bit model that it was made from\."
    ):
        load_base(str(tmp_path / "4bit"), on_weight=never)


def test_layers_that_are_stored_together_are_refused_by_name(tmp_path, seed):
    base = make_base(tmp_path / "base", seed, HrmTextConfig)
    with pytest.raises(ModelError, match=r"layers are not tensors of their own .*q_proj.* one at a time; use another"):
        load_base(str(base), on_weight=never)
