"""Which layers are quantized: plain linear layers of any class, none that the config keeps, and at least half."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, Llama4TextConfig, PhimoeConfig

from qlora.config import load_config
from qlora.errors import ModelError
from qlora.export import merge
from qlora.files import BaseFiles
from qlora.lora import add_lora, is_linear
from qlora.memory.estimate import estimate
from qlora.model import SUPERVISED, build_skeleton, load_base, take_inventory
from qlora.model.quantization import nf4_settings, quantized_names
from qlora.nf4 import NF4Linear, quantize
from qlora.proof.verify import verify
from qlora.training import plan_run, train
from tests.tiny import make_base, run_config

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def falcon(head_dim, **sizes):
    """Return a config of Falcon, which computes the size of its heads."""
    return FalconConfig(**sizes)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.bias


class Renamed(nn.Linear):
    pass


def test_subclasses_are_linear_if_they_compute_the_same():
    assert is_linear(nn.Linear(4, 3))
    assert is_linear(Renamed(4, 3, bias=False))
    assert not is_linear(Doubled(4, 3))
    assert not is_linear(nn.Bilinear(4, 3, 2))
    assert is_linear(Renamed(4, 3, device="meta"))
    layer = Renamed(4, 3)
    weight = layer.weight.clone()
    is_linear(layer)
    assert torch.equal(layer.weight, weight)
    assert (layer.in_features, layer.out_features) == (4, 3)


@pytest.mark.parametrize(
    ("config_class", "settings", "num_quantized"),
    [
        (falcon, {}, 8),
        (Llama4TextConfig, EXPERTS | {"intermediate_size_mlp": 176}, 14),
        (PhimoeConfig, EXPERTS, 8),
        (GPT2Config, {}, 8),
    ],
    ids=["falcon", "llama4", "phimoe", "gpt2"],
)
def test_the_layers_named_before_loading_are_those_that_are_quantized(
    config_class, settings, num_quantized, tmp_path, seed
):
    base = make_base(tmp_path / "base", seed, config_class, **settings)
    skeleton = build_skeleton(BaseFiles.resolve(str(base)))
    names = quantized_names(skeleton, nf4_settings(True, torch.float32))
    model, _ = load_base(str(base), compute_dtype="float32", allow_unquantized=True)
    assert names == [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    assert len(names) == num_quantized


def test_falcons_own_linear_is_quantized_adapted_and_merged(alpaca_file, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, falcon)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model, _ = load_base(str(base), compute_dtype="float32")
    name = "transformer.h.1.mlp.dense_4h_to_h"
    assert torch.equal(model.get_submodule(name).weight, quantize(plain.get_submodule(name).weight.data, True)[0])
    train(load_config(run_config(base, alpaca_file, tmp_path / "run", train__max_steps=2)))
    merge(tmp_path / "run", tmp_path / "merged")
    assert verify(tmp_path / "run", tmp_path / "merged").matches


def test_a_router_of_its_own_class_is_left_alone(tmp_path, seed):
    base = make_base(tmp_path / "base", seed, Llama4TextConfig, **EXPERTS, intermediate_size_mlp=176)
    model, _ = load_base(str(base), allow_unquantized=True)
    router = "model.layers.0.feed_forward.router"
    assert f"{router}.weight" in take_inventory(model).unquantized
    assert router not in add_lora(model, rank=4)
    with pytest.raises(ModelError, match=f"'router' is {router}, a Llama4Router; only linear layers can be adapted"):
        add_lora(load_base(str(base), allow_unquantized=True)[0], rank=4, targets="router")


def test_a_base_that_stays_in_16_bits_is_refused_before_data_and_weights_are_read(tmp_path, seed):
    base, kept = make_base(tmp_path / "base", seed), ["gate_proj", "up_proj", "down_proj"]
    settings = {"train__max_steps": 1, "model__keep_16bit": kept}
    config = load_config(run_config(base, tmp_path / "absent.jsonl", tmp_path / "run", **settings))
    calls = {
        "load": lambda: load_base(str(base), keep_16bit=kept),
        "train": lambda: train(config),
        "train --dry-run": lambda: plan_run(config),
        "estimate": lambda: estimate(config, SUPERVISED, "cpu"),
    }
    for call in calls.values():
        with pytest.raises(ModelError) as caught:
            call()
        assert "In 16 bits: gate_proj, up_proj, down_proj, " in str(caught.value)


def test_a_base_that_is_mostly_embedding_is_accepted(tmp_path, seed):
    model, _ = load_base(str(make_base(tmp_path / "base", seed, vocab_size=20_000)))
    assert take_inventory(model).quantized_share == 1


def test_kept_layers_are_in_16_bits_adapted_and_merged(tiny_base, alpaca_file, tmp_path):
    kept = {"model__keep_16bit": ["down_proj", r"model\.layers\.0\.self_attn\.[qk]_proj"], "train__max_steps": 2}
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **kept))
    estimate(config, SUPERVISED, "cpu")
    train(config)
    merge(tmp_path / "run", tmp_path / "merged")
    report = verify(tmp_path / "run", tmp_path / "merged")
    assert report.matches, report.problems
    inventory = take_inventory(load_base(str(tiny_base), keep_16bit=kept["model__keep_16bit"])[0])
    in_16bit = [name for name in inventory.unquantized if name.endswith("_proj.weight")]
    assert in_16bit == [
        f"model.layers.{name}.weight"
        for name in ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.mlp.down_proj", "1.mlp.down_proj")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"keep_16bit": ["dwn_proj"]},
            "model.keep_16bit: 'dwn_proj' matches no linear layer. Did you mean 'down_proj'",
        ),
        ({"keep_16bit": ["mlp"]}, "model.keep_16bit: 'mlp' is model.layers.0.mlp, a LlamaMLP; only linear layers can"),
        ({"keep_16bit": ["up_proj"], "quantization": "none"}, "model.keep_16bit has no effect"),
    ],
)
def test_kept_layers_have_to_be_there_and_to_matter(arguments, message, tiny_base):
    with pytest.raises(ModelError, match=message):
        load_base(str(tiny_base), **arguments)
