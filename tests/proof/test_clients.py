"""The check of adapters for other tools, against PEFT itself and each rule of vLLM and llama.cpp."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from qlora.checkpoint import save_adapter
from qlora.checkpoint.peft_folder import config_scaling
from qlora.errors import CheckpointError
from qlora.files import BaseFiles
from qlora.lora import add_lora
from qlora.model import build_skeleton, load_base
from qlora.proof.clients import _check_vllm, _renamed_by_peft, check_clients
from scripts.dev.support.sizes import tiny_config
from tests.tiny import make_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UP = "model.layers.0.mlp.up_proj"
TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}


@pytest.fixture(scope="module")
def skeleton(tiny_base):
    """The architecture that the adapters are for."""
    return build_skeleton(BaseFiles.resolve(str(tiny_base)))


@pytest.fixture
def own(tiny_base, tmp_path):
    """An adapter as a run saves it, which a test may change."""
    model, _ = load_base(str(tiny_base))
    add_lora(model, rank=4, alpha=8)
    (tmp_path / "own").mkdir()
    save_adapter(model, tmp_path / "own", str(tiny_base))
    return tmp_path / "own"


def save_with_peft(base, folder, generator, **settings):
    """Save an adapter with PEFT, and return its folder."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=generator)
        model.save_pretrained(folder)
    return folder


def change(folder, config=(), tensors=lambda _: None):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    values = load_file(folder / WEIGHTS)
    tensors(values)
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})


def skipped_by_peft(base, folder):
    """Return the factors that PEFT does not load, and those that it lacks values for."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.load_adapter(folder, "default")
    return [key for key in (*result.missing_keys, *result.unexpected_keys) if "lora_" in key]


def test_vllm_says_that_experts_without_a_gate_were_not_checked():
    stacks = ["model.layers.0.mlp.experts.up_proj", "model.layers.0.mlp.experts.down_proj"]
    verdict = str(_check_vllm({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}, {}, [], stacks))
    assert f"not checked for experts without a gate, as those of {stacks[0]}" in verdict
    assert "has them alone" not in verdict


def loads(verdicts):
    return [client for client, verdict in verdicts.items() if verdict.loads]


ALL = ["peft", "vllm", "llama.cpp"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"rank": 3}, {"targets": [f"{UP}", "o_proj"]}, {"targets": r".*layers\.1\..*"}],
    ids=str,
)
def test_the_adapter_of_a_run_loads_everywhere(settings, tiny_base, skeleton, tmp_path):
    model, _ = load_base(str(tiny_base))
    add_lora(model, **settings)
    save_adapter(model, tmp_path, "someone/base")
    verdicts = check_clients(tmp_path, skeleton)
    assert loads(verdicts) == ALL, verdicts
    assert str(verdicts["peft"]) == "loads it"
    assert skipped_by_peft(tiny_base, tmp_path) == []


@pytest.mark.parametrize("name", ["inkling2_text", "laguna", "gpt_oss"])
def test_layers_that_peft_renames_are_reported(name, tmp_path, generator):
    """PEFT looks for them under names by transformers' table for the published files."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(tiny_config(transformers.CONFIG_MAPPING[name], 300, TOKENS))
    layers = [name for name, module in base.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"]
    keys = {name: f"base_model.model.{name}.lora_A.weight" for name in layers}
    tensors = {key: torch.empty(4, 4) for key in keys.values()}
    converted = convert_peft_adapter_state_dict_for_transformers(base, LoraConfig(), tensors)
    expected = {name for name, key in keys.items() if key not in converted}
    assert {*_renamed_by_peft(base, layers)} == expected
    assert bool(expected) == (name != "gpt_oss")


@pytest.mark.parametrize(
    ("settings", "served"),
    [
        ({}, ALL),
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": r".*\.1\.mlp\..*_proj"}, ALL),
        ({"use_rslora": True}, ["peft", "vllm"]),
        ({"alpha_pattern": {"up_proj": 3}}, ["peft"]),
        ({"rank_pattern": {"layers.1.mlp.up_proj": 6}}, ["peft", "llama.cpp"]),
        ({"init_lora_weights": "eva"}, ALL),  # does not change the base's weights
        ({"rank_pattern": {"up_proj": 6}, "alpha_pattern": {"up_proj": 12}}, ["peft", "vllm"]),
        ({"use_dora": True}, ["peft"]),
        ({"modules_to_save": ["lm_head"]}, ["peft"]),
        ({"bias": "lora_only", "target_modules": ["c_attn"]}, ["peft"]),
    ],
    ids=str,
)
def test_an_adapter_of_peft_is_refused_by_tools_that_would_compute_it_wrongly(
    settings, served, tiny_base, skeleton, tmp_path, generator, seed
):
    base = tiny_base
    if "c_attn" in settings.get("target_modules", ()):
        base = make_base(tmp_path / "base", seed, GPT2Config, n_embd=64, n_layer=2, n_head=4, n_positions=256)
        skeleton = build_skeleton(BaseFiles.resolve(str(base)))
    verdicts = check_clients(save_with_peft(base, tmp_path / "adapter", generator, **settings), skeleton)
    assert loads(verdicts) == served, verdicts
    assert all(verdict.loads != bool(verdict.reasons) for verdict in verdicts.values())


@pytest.mark.parametrize(
    ("settings", "served"),
    [
        ({"rank_pattern": {"up_proj": 2}}, ["peft", "llama.cpp"]),  # vLLM: one scaling for all
        ({"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 4}}, ["peft", "vllm"]),  # llama.cpp: one alpha
        ({"rank_pattern": {"up_proj": 2}, "rslora": True}, ["peft"]),
        ({"alpha_pattern": {".*_proj": 4}}, ALL),  # the pattern matches all layers
    ],
    ids=str,
)
def test_ranks_by_layer_load_in_tools_that_scale_them_correctly(settings, served, tiny_base, skeleton, tmp_path):
    model, _ = load_base(str(tiny_base))
    add_lora(model, rank=4, alpha=8, **settings)
    save_adapter(model, tmp_path, "someone/base")
    verdicts = check_clients(tmp_path, skeleton)
    assert loads(verdicts) == served, verdicts
    assert skipped_by_peft(tiny_base, tmp_path) == []


def test_scalings_equal_those_save_with_peft(tiny_base, tmp_path, generator):
    patterns = {
        "rank_pattern": {"up_proj": 2, "layers.1.self_attn.q_proj": 8, "proj": 7},
        "alpha_pattern": {"layers.0.mlp.up_proj": 5, r"layers\.\d\.self_attn\.q_proj": 3},
    }
    for rslora in (False, True):
        folder = save_with_peft(tiny_base, tmp_path / str(rslora), generator, use_rslora=rslora, **patterns)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
        config = json.loads((folder / CONFIG).read_text())
        scalings = {
            name.removeprefix("base_model.model."): module.scaling["default"]
            for name, module in model.named_modules()
            if isinstance(getattr(module, "scaling", None), dict)
        }
        assert len({*scalings.values()}) == 4
        for module, scaling in scalings.items():
            assert config_scaling(config, module) == pytest.approx(scaling, rel=1e-12), module


def test_the_reason_names_layer_scale_and_key(tiny_base, skeleton, tmp_path, generator):
    verdicts = check_clients(save_with_peft(tiny_base, tmp_path, generator, use_rslora=True), skeleton)
    (reason,) = verdicts["llama.cpp"].reasons
    assert reason == f"it would silently scale {UP} by 2 instead of 4, as it does not read use_rslora"
    assert "--max-lora-rank" not in str(verdicts["vllm"])


@pytest.mark.parametrize(
    ("rank", "message"),
    [(16, None), (17, "--max-lora-rank 32"), (300, "--max-lora-rank 320"), (513, "rank 513 is above 512")],
)
def test_the_rank_option_that_vllm_needs_is_reported(rank, message, tiny_base, skeleton, tmp_path, generator):
    folder = save_with_peft(tiny_base, tmp_path, generator, r=rank, target_modules=["q_proj"])
    verdict = check_clients(folder, skeleton)["vllm"]
    assert verdict.loads == (rank <= 512)
    assert ("rank" in str(verdict)) == (message is not None)
    assert message is None or message in str(verdict)


def test_a_head_that_shares_its_weight_is_refused_only_by_llama_cpp(tiny_base, tmp_path, generator, seed):
    tied = make_base(tmp_path / "tied", seed, tie_word_embeddings=True)
    for base, served in ((tied, ["peft", "vllm"]), (tiny_base, ALL)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = save_with_peft(base, tmp_path / "adapter", generator, target_modules=["lm_head"])
        assert loads(check_clients(folder, build_skeleton(BaseFiles.resolve(str(base))))) == served
        shutil.rmtree(folder)


def test_gpt2s_transposed_layers_are_refused_only_by_llama_cpp(tmp_path, generator, seed):
    base = make_base(tmp_path / "base", seed, GPT2Config, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    model, _ = load_base(str(base))
    add_lora(model)
    save_adapter(model, tmp_path, str(base))
    assert loads(check_clients(tmp_path, build_skeleton(BaseFiles.resolve(str(base))))) == ["peft", "vllm"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": None},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "OLoRA"},
        {"init_lora_weights": "lora_ga"},
        {"trainable_token_indices": [3]},
    ],
    ids=str,
)
def test_a_config_that_vllm_refuses_is_reported_with_its_key(config, own, skeleton):
    change(own, config)
    verdict = check_clients(own, skeleton)["vllm"]
    assert not verdict.loads
    assert any(next(iter(config)) in reason for reason in verdict.reasons)


def test_layers_that_peft_would_skip_are_reported(own, skeleton, tiny_base):
    change(own, {"target_modules": ["q_proj"]})
    verdict = check_clients(own, skeleton)["peft"]
    assert verdict.reasons == ["target_modules and the tensors differ in model.layers.0.mlp.down_proj"]
    assert len(skipped_by_peft(tiny_base, own)) == 2 * 2 * 6  # factors, layers, linears except one


def test_tensors_with_other_names_are_reported(own, skeleton):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("base_model.")] = tensors.pop(name)

    change(own, tensors=rename)
    verdicts = check_clients(own, skeleton)
    assert "whose name does not begin with base_model.model." in str(verdicts["peft"])
    assert "lora_A" in str(verdicts["llama.cpp"])


def test_layers_that_the_base_lacks_are_reported(own, skeleton):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("layers.1", "layers.9")] = tensors.pop(name)

    change(own, tensors=rename)
    assert (
        str(check_clients(own, skeleton)["peft"])
        == "does not load it: the base has no layer model.layers.9.mlp.down_proj"
    )


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_without_an_adapter_is_refused(name, own, skeleton):
    (own / name).unlink()
    with pytest.raises(CheckpointError, match=rf"has no adapter: {name} is missing"):
        check_clients(own, skeleton)


def test_a_rank_that_contradicts_the_config_is_reported(own, skeleton):
    change(own, {"r": 8, "lora_alpha": 16})
    verdicts = check_clients(own, skeleton)
    assert "has rank 4, the config says 8" in str(verdicts["peft"])
    assert not verdicts["llama.cpp"].loads  # by the tensors' rank its scale is 4 instead of 2


def test_a_foreign_adapters_update_has_the_reported_scale(tiny_base, tmp_path, generator):
    """Compare llama.cpp's update, scaled by alpha / rank with the tensors' own rank, with that of PEFT's merge."""
    folder = save_with_peft(tiny_base, tmp_path, generator, use_rslora=True, target_modules=["up_proj"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
    update = model.get_submodule(f"base_model.model.{UP}").get_delta_weight("default").float()
    factors = {name.rsplit(".lora_")[1][0]: value for name, value in load_file(folder / WEIGHTS).items() if UP in name}
    served = factors["B"].float() @ factors["A"].float() * 8 / 4
    scale = config_scaling(json.loads((folder / CONFIG).read_text()), UP)
    assert torch.allclose(served * scale / 2, update, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(served, update, rtol=1e-1, atol=1e-1)
