"""Adapters on disk: PEFT reads them and computes the same, and mismatches are refused by name."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.pytorch_utils import Conv1D

from qlora.checkpoint import load_adapter, read_adapter, read_adapter_config, save_adapter
from qlora.checkpoint.adapter import _as_patterns
from qlora.errors import CheckpointError
from qlora.lora import add_lora, lora_layers
from qlora.lora.spec import by_pattern
from qlora.model import load_base
from qlora.nf4 import NF4Linear
from tests.tiny import make_base

GPT2 = {"config_class": GPT2Config, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
# Largest difference over largest logit. fp32: sums in another order. bf16: PEFT rounds the update and the base's
# product separately, each by 2^-9, in each of 14 layers.
TOLERANCE = {"float32": 1e-5, "bfloat16": 14 * 2**-8}


FOREIGN = {"rank_pattern": {"up_proj": 6}, "alpha_pattern": {r"layers\.1\..*": 5}}


def adapted_model(base, generator, compute_dtype="float32", **settings):
    """Return a model as in the middle of training: B is not zero."""
    model, _ = load_base(str(base), compute_dtype=compute_dtype)
    add_lora(model, **{"rank": 4, "alpha": 8, **settings})
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return model


def save(model, folder):
    folder.mkdir()
    save_adapter(model, folder, "someone/base")
    return folder


def load_with_peft(base, adapter, model):
    """Load an adapter with PEFT onto a plain model whose linear layers have the dequantized weights of `model`."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=model.dtype)
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            target = plain.get_submodule(name.removesuffix(".base"))
            weight = module.dequantize(model.dtype)
            target.weight.data.copy_(weight.T if isinstance(target, Conv1D) else weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        return PeftModel.from_pretrained(plain, adapter).eval()


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids).logits.float()


def adapted_by_peft(model):
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_peft_computes_the_same(compute_dtype, rslora, tiny_base, tmp_path, generator):
    model = adapted_model(tiny_base, generator, compute_dtype, rslora=rslora)
    adapter = save(model, tmp_path / "adapter")
    ids = torch.randint(256, (2, 20), generator=generator)
    found, expected = logits_of(load_with_peft(tiny_base, adapter, model), ids), logits_of(model, ids)
    bare = logits_of(load_base(str(tiny_base), compute_dtype=compute_dtype)[0], ids)
    limit = TOLERANCE[compute_dtype] * expected.abs().max()
    assert (found - expected).abs().max() < limit
    assert (bare - expected).abs().max() > 4 * limit  # a missing adapter would be detected


@pytest.mark.parametrize("rank", [4, 3])
def test_an_rslora_scaling_is_saved_as_alpha_over_rank(rank, tiny_base, tmp_path, generator):
    """llama.cpp reads no other scaling, and a run's own loader gets the same update."""
    model = adapted_model(tiny_base, generator, rank=rank, rslora=True)
    adapter = save(model, tmp_path / "adapter")
    config, factors = read_adapter_config(adapter), read_adapter(adapter).layers
    assert not config["use_rslora"]
    other = adapted_model(tiny_base, generator, rank=rank, rslora=True)
    load_adapter(other, adapter)
    loaded = dict(lora_layers(other))
    for name, layer in lora_layers(model):
        served = (factors[name].B.float() @ factors[name].A.float()) * (config["lora_alpha"] / config["r"])
        # Factors on a product round differently before and after it.
        torch.testing.assert_close(served, layer.delta_weight(), rtol=1e-5, atol=1e-7)
        assert torch.equal(loaded[name].delta_weight(), layer.delta_weight())


PATTERNS = {
    "rank_pattern": {"up_proj": 6, r"layers\.1\.self_attn\.(q|k)_proj": 2, "o_proj": 4},
    "alpha_pattern": {r"0\.mlp\..*": 3, "k_proj": 12.5},
}


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_the_same_with_ranks_and_alphas_by_layer(rslora, tiny_base, tmp_path, generator):
    model = adapted_model(tiny_base, generator, rslora=rslora, **PATTERNS)
    adapter = save(model, tmp_path / "adapter")
    config = read_adapter_config(adapter)
    assert (config["r"], config["rank_pattern"]["model.layers.1.mlp.up_proj"]) == (4, 6)
    assert not {"model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"} & {*config["rank_pattern"]}
    ids = torch.randint(256, (2, 20), generator=generator)
    found, expected = logits_of(load_with_peft(tiny_base, adapter, model), ids), logits_of(model, ids)
    assert (found - expected).abs().max() < TOLERANCE["float32"] * expected.abs().max()
    other = adapted_model(tiny_base, generator, rslora=rslora, **PATTERNS)
    load_adapter(other, adapter)
    assert torch.equal(logits_of(other, ids), expected)


def test_an_adapter_that_peft_saved_with_patterns_loads_and_computes_the_same(tiny_base, tmp_path, generator):
    model = adapted_model(tiny_base, generator, targets=["q_proj", "up_proj"], **FOREIGN)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(**settings, **FOREIGN))
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    ids = torch.randint(256, (2, 20), generator=generator)
    found = logits_of(load_with_peft(tiny_base, tmp_path / "theirs", model), ids)
    assert (found - logits_of(model, ids)).abs().max() < TOLERANCE["float32"] * found.abs().max()
    with pytest.raises(CheckpointError, match=r"up_proj has factors .* \(4,|up_proj has factors \(6, 64\)"):
        load_adapter(adapted_model(tiny_base, generator, targets=["q_proj", "up_proj"]), tmp_path / "theirs")


def test_a_name_that_ends_another_one_is_saved_as_a_pattern_for_itself_only():
    ranks = {"layers.0.up": 2, "vision.layers.0.up": 4, "vision.layers.1.up": 4, "layers.1.up": 3}
    common, patterns = _as_patterns(ranks)
    assert {name: by_pattern(patterns, name, common) for name in ranks} == ranks
    assert common == 4


def test_peft_computes_the_same_for_gpt2s_transposed_layers(tmp_path, generator, seed):
    base = make_base(tmp_path / "base", seed, **GPT2)
    model = adapted_model(base, generator)
    adapter = save(model, tmp_path / "adapter")
    ids = torch.randint(256, (2, 20), generator=generator)
    found, expected = logits_of(load_with_peft(base, adapter, model), ids), logits_of(model, ids)
    assert (found - expected).abs().max() < TOLERANCE["float32"] * expected.abs().max()


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ["q_proj", "v_proj"],
        r"model\.layers\.1\..*",
        r".*\.(gate|up)_proj",
        ["model.layers.0.mlp.up_proj", "o_proj"],
    ],
    ids=str,
)
def test_peft_adapts_exactly_the_layers_that_were_trained(targets, tiny_base, tmp_path, generator):
    model = adapted_model(tiny_base, generator, targets=targets)
    adapter = save(model, tmp_path / "adapter")
    assert adapted_by_peft(load_with_peft(tiny_base, adapter, model)) == {name for name, _ in lora_layers(model)}


def test_targets_are_short_names_if_those_are_unambiguous(tiny_base, tmp_path, generator):
    short = save(adapted_model(tiny_base, generator, targets=r".*self_attn\.[qk]_proj"), tmp_path / "short")
    assert read_adapter_config(short)["target_modules"] == ["k_proj", "q_proj"]
    full = save(adapted_model(tiny_base, generator, targets=["model.layers.0.mlp.up_proj"]), tmp_path / "full")
    assert read_adapter_config(full)["target_modules"] == ["model.layers.0.mlp.up_proj"]


def test_the_config_has_only_the_keys_that_servers_read(tiny_base, tmp_path, generator):
    config = read_adapter_config(save(adapted_model(tiny_base, generator, dropout=0.1), tmp_path / "adapter"))
    assert config.pop("target_modules") == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/base",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def test_factors_are_stored_by_pefts_names_shapes_and_dtype(tiny_base, tmp_path, generator):
    adapter = save(adapted_model(tiny_base, generator, targets=["up_proj"]), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        name.format(layer, factor): shape for layer in (0, 1) for factor, shape in (("A", (4, 64)), ("B", (172, 4)))
    }
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}


def test_a_loaded_adapter_equals_the_saved_one(tiny_base, tmp_path, generator):
    model = adapted_model(tiny_base, generator)
    adapter = save(model, tmp_path / "adapter")
    other = adapted_model(tiny_base, generator, seed=5)
    load_adapter(other, adapter)
    loaded = dict(lora_layers(other))
    for name, layer in lora_layers(model):
        assert torch.equal(loaded[name].lora_A, layer.lora_A)
        assert torch.equal(loaded[name].lora_B, layer.lora_B)


def test_an_adapter_of_other_layers_is_refused_by_their_names(tiny_base, tmp_path, generator):
    adapter = save(adapted_model(tiny_base, generator, targets=["up_proj"]), tmp_path / "adapter")
    for targets in (["up_proj", "k_proj"], ["model.layers.0.mlp.up_proj"]):
        model = adapted_model(tiny_base, generator, targets=targets)
        with pytest.raises(CheckpointError, match=r"differ in \d modules: model\.layers\.[01]\."):
            load_adapter(model, adapter)


def test_an_adapter_of_another_rank_is_refused_with_the_shapes(tiny_base, tmp_path, generator):
    adapter = save(adapted_model(tiny_base, generator, rank=4), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"factors \(4, \d+\) .*the model \(8, \d+\)"):
        load_adapter(adapted_model(tiny_base, generator, rank=8), adapter)


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(size, tiny_base, tmp_path, generator):
    model = adapted_model(tiny_base, generator)
    path = save(model, tmp_path / "adapter") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        load_adapter(model, path.parent)


def test_a_factor_without_its_partner_is_named(tiny_base, tmp_path, generator):
    model = adapted_model(tiny_base, generator, targets=["up_proj"])
    path = save(model, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[1]
    del tensors[lost]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=lost.replace(".", r"\.")):
        read_adapter(path.parent)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name, tiny_base, tmp_path, generator):
    adapter = save(adapted_model(tiny_base, generator), tmp_path / "adapter")
    (adapter / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        (read_adapter_config if name.endswith("json") else read_adapter)(adapter)


def test_a_damaged_config_is_reported(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4})[:-2])
    with pytest.raises(CheckpointError, match="damaged"):
        read_adapter_config(tmp_path)


@pytest.mark.slow
def test_peft_reads_an_adapter_of_a_real_model_after_training(realdata, tmp_path):
    from qlora.config import load_config
    from qlora.model import load_run
    from qlora.training import train
    from tests.tiny import run_config

    base = realdata / "models" / "stories260K-hf"
    data = tmp_path / "plays.txt"
    data.write_text((realdata / "data/tinyshakespeare/input.txt").read_text(encoding="utf-8")[:40_000])
    config = run_config(
        base, data, tmp_path / "run", model__compute_dtype="float32",
        data__format="text", data__overlong="split", data__max_seq_len=256, data__eval=0.1,
        train__max_steps=10, train__save_every=10, train__eval_every=10,
    )  # fmt: skip
    result = train(load_config(config))
    assert result.eval_losses[10] < result.eval_losses[0] - 0.3
    model, tokenizer = load_run(tmp_path / "run")
    ids = torch.tensor([tokenizer("ROMEO: I would not for the world they saw thee here.").input_ids])
    peft_model = load_with_peft(base, tmp_path / "run" / "adapter", model)
    found, expected = logits_of(peft_model, ids), logits_of(model, ids)
    assert (found - expected).abs().max() < TOLERANCE["float32"] * expected.abs().max()
    with peft_model.disable_adapter():
        assert (logits_of(peft_model, ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("lost", ["lora_alpha", "r"])
def test_an_adapter_config_without_its_scaling_is_refused(lost, tiny_base, tmp_path, generator):
    folder = save(adapted_model(tiny_base, generator), tmp_path / "adapter")
    config = read_adapter_config(folder)
    del config[lost]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json has no valid r and lora_alpha"):
        read_adapter_config(folder)
