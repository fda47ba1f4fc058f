"""Experts in 4 bits, family by family, against transformers' own eager code on the dequantized weights."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma4TextConfig, JetMoeConfig

from qlora.checkpoint import RunDirectory, read_adapter, wrap_adapter
from qlora.checkpoint.adapter import save_adapter
from qlora.config import load_config
from qlora.data import collate
from qlora.errors import CheckpointError, ModelError
from qlora.export import merge
from qlora.export.quantize import quantize_model
from qlora.files import BaseFiles
from qlora.layers import apply_recompute, cache_weights
from qlora.layers.recompute import recompute_levels
from qlora.lora import Targets, adapters_off, add_lora, lora_experts, lora_layers, match_targets
from qlora.lora.experts import describe_dead_experts, specs_with_rank
from qlora.lora.inject import match_experts
from qlora.lora.mixture import expert_layers, expert_stacks, experts_per_token, routers, undeclared_experts
from qlora.lora.spec import AdapterSpec
from qlora.model import build_skeleton, load_base, open_source, supervised_loss, take_inventory
from qlora.model.from_config import adapter_spec
from qlora.model.run_adapter import check_experts_as_trained, read_run_adapter
from qlora.nf4 import NF4Experts, NF4Linear
from qlora.proof import verify
from qlora.proof.clients import check_clients
from qlora.proof.expected import ExpectedWeights, _scaling_of_experts
from qlora.proof.tensors import WrittenFolder, check_tensors
from qlora.training import train
from scripts.dev.bench.dense_experts import adapt_experts, copy_dequantized
from tests.interpreted import load_interpreted, use_on_cpu
from tests.layers.test_packed import random_documents
from tests.moe import FAMILIES, make_moe
from tests.tiny import make_base, run_config


@pytest.fixture
def base(family, tmp_path, seed):
    return make_moe(tmp_path / "base", family, seed)


def load(base, quantization="nf4"):
    return load_base(str(base), quantization, compute_dtype="float32", device="cpu")[0]


def adapted(model, generator, **settings):
    """Add adapters with values drawn from the generator; return their factors by the names of layers and stacks."""
    names = add_lora(model, rank=4, dtype=torch.float32, **settings)
    assert not {*names} & routers(model)
    layers = dict(lora_layers(model)) | dict(lora_experts(model))
    for layer in layers.values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}


def gradients(model, factors, batch):
    loss = supervised_loss(model, batch)
    found = torch.autograd.grad(loss, [factor for pair in factors.values() for factor in pair])
    return loss.item(), dict(zip(factors, zip(found[::2], found[1::2], strict=True), strict=True))


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        for one, other in zip(found[name], expected[name], strict=True):
            assert (one - other).norm() <= 2e-5 * other.norm() + 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_in_4_bits_and_computes_what_transformers_does(family, base, generator):
    model, plain = load(base), load(base, "none")
    copy_dequantized(model, plain)
    inventory, stacks = take_inventory(model), expert_stacks(plain)
    assert stacks.keys() <= {*inventory.quantized}
    assert sum(isinstance(module, NF4Experts) for module in model.modules()) == 2 * len([*expert_layers(model)])
    matrices = sum(each.numel() for name, each in plain.named_parameters() if each.dim() > 1 and "embed" not in name)
    in_4bit = inventory.quantized_share * inventory.num_parameters
    others = plain.get_output_embeddings().weight.numel()
    assert in_4bit >= 0.95 * (matrices - others)

    documents = random_documents(generator, lengths=(17, 9))
    state = generator.get_state()
    trained = adapted(model, generator)
    assert stacks.keys() <= trained.keys()
    generator.set_state(state)
    dense = adapted(plain, generator, expert_rank=0)
    dense |= adapt_experts(plain, lora_experts(model))
    expected_loss, expected = gradients(plain, dense, collate(documents))
    loss, found = gradients(model, trained, collate(documents))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(found, expected)

    model.train()
    for level in recompute_levels(model)[1:] if family != "phimoe" else []:  # which draws experts at random in training
        apply_recompute(model, level)
        assert_close(gradients(model, trained, collate(documents))[1], expected)
    if family not in ("phimoe", "gpt_oss"):  # whose own attention with sinks mixes documents
        assert_close(gradients(model, trained, collate(documents, packed=True))[1], expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_has_the_layout_of_the_files_and_is_verified(family, base, tmp_path, generator):
    model = load_base(str(base), device="cpu")[0]  # in the dtype that is assumed for an adapter made elsewhere
    adapted(model, generator)
    save_adapter(model, tmp_path / "adapter", str(base))
    merge(tmp_path / "adapter", tmp_path / "out", dtype="float32", onto="dequantized")
    source, files = open_source(tmp_path / "adapter"), BaseFiles.resolve(str(tmp_path / "out"))
    expected = ExpectedWeights(source, source.base_files(), "dequantized", model.device)
    assert check_tensors(expected, WrittenFolder(files, torch.float32)).problems == []
    merged = load(tmp_path / "out", "none")
    for name, layer in lora_experts(model):
        stored = layer.stored()
        for expert in range(layer.shape[0]):
            delta = stored.delta(expert).T if layer.is_transposed else stored.delta(expert)
            trained = delta.fold(layer.base.dequantize(expert, model.dtype).float())
            assert torch.allclose(merged.get_parameter(name)[expert], trained, rtol=0, atol=1e-6)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {name: each.shape for name, each in after.items()} == {name: each.shape for name, each in before.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same(family, base, tmp_path, generator):
    peft = pytest.importorskip("peft")
    model = load(base, "none")
    adapted(model, generator, rank_pattern={"o_proj": 2, "experts.down_proj": 3}, alpha_pattern={"o_proj": 8})
    save_adapter(model, tmp_path / "adapter", str(base))
    ids = torch.randint(5, 250, (2, 24), generator=generator)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        before = plain(ids).logits
        found = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(ids).logits
        expected = model(ids).logits
        again = load(base, "none")
        wrap_adapter(again, read_adapter(tmp_path / "adapter"))
        assert torch.equal(again(ids).logits, expected)
    assert (found - expected).abs().max() < 1e-4 < (before - expected).abs().max() / 100


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_a_run_is_recorded_with_its_experts_and_swapped_ones_are_found(family, base, alpaca_file, tmp_path):
    settings = {"model__compute_dtype": "float32", "train__max_steps": 2}
    config = load_config(run_config(base, alpaca_file, tmp_path / "run", **settings))
    train(config)
    record = RunDirectory.open(tmp_path / "run").read_record()
    assert "model.layers.0.mlp.experts.gate_up_proj" in record.parameters.quantized
    assert record.in_use.experts == "loop over experts: the grouped kernels are for CUDA"
    merge(tmp_path / "run", tmp_path / "out", dtype="float32")
    report = verify(tmp_path / "run", tmp_path / "out")
    assert report.problems == []
    assert report.mean_kl < 1e-6
    assert verify(tmp_path / "run").matches
    run = RunDirectory.open(tmp_path / "run")
    adapter_config = run.adapter / "adapter_config.json"
    written = adapter_config.read_text()
    adapter_config.write_text(json.dumps(json.loads(written) | {"lora_alpha": 1}))
    with pytest.raises(CheckpointError, match=r"has a scaling of .* the run trained with"):
        read_run_adapter(run)
    patterns = json.loads(written).get("alpha_pattern", {}) | {"experts.down_proj": 1}
    adapter_config.write_text(json.dumps(json.loads(written) | {"alpha_pattern": patterns}))
    with pytest.raises(CheckpointError, match=r"experts\.down_proj has a scaling of .* and 1 other layers"):
        read_run_adapter(run)
    adapter_config.write_text(written)
    files = BaseFiles.resolve(str(base))
    skeleton = build_skeleton(files)
    check_experts_as_trained(run, files, skeleton)
    layers = [name for name in record.parameters.quantized if "experts." not in name]
    old = replace(record, parameters=replace(record.parameters, quantized=layers))
    run.write_record(old)
    with pytest.raises(CheckpointError, match=r"experts in 16 bits .* merge it with this one"):
        check_experts_as_trained(run, files, skeleton)
    run.write_record(record)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    one, other = (f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (2, 3))
    save_file(tensors | {one: tensors[other], other: tensors[one]}, path, metadata={"format": "pt"})
    assert any(f"it contains {other}" in problem for problem in verify(tmp_path / "run", tmp_path / "out").problems)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_a_family_computes_with_the_kernels_what_it_does_in_a_loop(family, base, generator, monkeypatch):
    kernels = {name: load_interpreted(f"qlora.kernels.{name}") for name in ("grouped_triton", "dequantize_triton")}
    model, batch = load(base), collate(random_documents(generator, lengths=(17, 9)))
    trained = adapted(model, generator)
    expected_loss, expected = gradients(model, trained, batch)
    use_on_cpu(monkeypatch, kernels)
    loss, found = gradients(model, trained, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(found, expected)
    apply_recompute(model.train(), recompute_levels(model)[-1])
    assert_close(gradients(model, trained, batch)[1], expected)


@pytest.mark.parametrize("family", ["mixtral"])
def test_cached_experts_give_the_same_bits(family, base, generator):
    model, batch = load(base), collate(random_documents(generator, lengths=(17, 9)))
    trained = adapted(model, generator)
    loss, expected = gradients(model, trained, batch)
    layers = [module for module in model.modules() if isinstance(module, NF4Experts | NF4Linear)]
    num_bytes = sum(layer.numel * model.dtype.itemsize for layer in layers)
    assert cache_weights(model, num_bytes - 1) == len(layers) - 1
    assert cache_weights(model, num_bytes) == len(layers)
    again, found = gradients(model, trained, batch)
    assert again == loss
    assert all(
        torch.equal(one, other) for name in found for one, other in zip(found[name], expected[name], strict=True)
    )


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_generation_dequantizes_the_experts_of_its_token_alone(family, base, monkeypatch):
    model, asked = load(base), []
    own = NF4Experts.dequantize

    def dequantize(experts, expert, *rest):
        asked.append(expert)
        return own(experts, expert, *rest)

    monkeypatch.setattr(NF4Experts, "dequantize", dequantize)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    assert len(asked) == 2 * 2 * model.config.num_hidden_layers  # two weights of two experts in each layer


@pytest.mark.parametrize("family", ["olmoe"])
def test_fresh_adapters_and_adapters_off_change_nothing(family, base, generator):
    model, ids = load(base), torch.randint(5, 250, (2, 24), generator=generator)
    with torch.no_grad():
        before = model(ids).logits
        add_lora(model, rank=8)
        assert {layer.spec.rank for _, layer in lora_experts(model)} == {4}  # two experts for each token
        assert len({layer.spec.scaling for _, layer in [*lora_experts(model), *lora_layers(model)]}) == 1
        assert torch.equal(model(ids).logits, before)
        for _, layer in lora_experts(model):
            layer.lora_B.normal_(generator=generator)
        assert not torch.equal(model(ids).logits, before)
        with adapters_off(model):
            assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", ["qwen2_moe"])
def test_what_experts_cannot_have_is_refused_and_targets_choose_them(family, base):
    model = load(base)
    for wrong in ({"kind": "dora"}, {"dropout": 0.1}):
        with pytest.raises(ModelError, match=r"experts take plain LoRA:\n  lora\..* set lora\.expert_rank: 0"):
            add_lora(model, **wrong)
    assert not any("experts." in name for name in match_targets(model, "all-linear"))
    assert match_experts(model, ["q_proj"]) == []
    assert len(match_experts(model, "all-linear")) == 4
    only = Targets(["q_proj", "experts.down_proj"], layers=[1])
    assert match_experts(model, only) == ["model.layers.1.mlp.experts.down_proj"]
    names = add_lora(model, targets=["experts.down_proj"], expert_rank=3)
    assert names == [f"model.layers.{index}.mlp.experts.down_proj" for index in (0, 1)]


@pytest.mark.parametrize("family", ["mixtral"])
def test_inputs_are_hidden_from_no_expert(family, base, alpaca_file, tmp_path):
    settings = {"train__keep": {"null_space": str(alpaca_file)}}
    with pytest.raises(ModelError, match=r"keep\.null_space .* 4 stacks of experts .*; set lora\.expert_rank: 0"):
        train(load_config(run_config(base, alpaca_file, tmp_path / "run", **settings)))


@pytest.mark.parametrize("family", ["mixtral"])
def test_an_expert_without_tokens_and_a_second_backward_are_no_error(family, base, generator):
    model = load(base)
    trained = adapted(model, generator)
    batch = collate(random_documents(generator, lengths=(2,)))
    found = gradients(model, trained, batch)[1]
    assert_close(gradients(model, trained, batch)[1], found)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    hit = found[name][1].flatten(1).any(1)
    assert hit.any()
    adapters = dict(lora_experts(model))
    with torch.no_grad():
        for stack, layer in adapters.items():
            layer.lora_B.copy_(found[stack][1])
    assert adapters[name].dead() == (~hit).nonzero().flatten().tolist()


def test_experts_that_transformers_computes_itself_are_refused(tmp_path, seed):
    sizes = {"num_local_experts": 4, "kv_channels": 16, "num_experts_per_tok": 2}
    base = make_base(tmp_path / "base", seed, JetMoeConfig, **sizes)
    with pytest.raises(ModelError, match=r"holds experts in JetMoeParallelExperts .* model\.allow_unquantized: true"):
        load(base)
    report = quantize_model(str(base), tmp_path / "4bit")
    assert "qlora train refuses the folder, as it does the base: " in " ".join(report.notes)
    load(base, "none")
    names = ["q_proj"]
    with pytest.raises(ModelError, match=r"lora\.expert_rank: 4 has no effect, as JetMoeForCausalLM has no experts"):
        add_lora(load(base, "none"), targets=names, expert_rank=4)
    with pytest.raises(ModelError, match=r"lora\.expert_rank: 'banana' should be"):
        add_lora(load(base, "none"), targets=names, expert_rank="banana")


def test_a_large_weight_of_three_dimensions_is_taken_for_experts():
    model = nn.ModuleDict({"mixer": nn.Conv1d(64, 64, 3), "scales": nn.Module(), "mixture": nn.Module()})
    model["scales"].register_parameter("weight", nn.Parameter(torch.zeros(1, 64, 64)))
    model["mixture"].register_parameter("weight", nn.Parameter(torch.zeros(4, 64, 64)))
    assert undeclared_experts(model) == ["mixture"]


def test_keys_and_values_beside_experts_are_no_routers(tmp_path, seed):
    sizes = {
        "enable_moe_block": True, "num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 36, "head_dim": 16,
        "num_key_value_heads": 1, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
    }  # fmt: skip
    model = load(make_base(tmp_path / "base", seed, Gemma4TextConfig, **sizes))
    assert routers(model) == {f"model.layers.{index}.router.proj" for index in (0, 1)}
    assert experts_per_token(model) == 4
    names = add_lora(model, rank=8)
    assert {f"model.layers.0.self_attn.{each}_proj" for each in "qkvo"} <= {*names}
    assert {layer.spec.rank for _, layer in lora_experts(model)} == {2}


@pytest.mark.parametrize("family", ["mixtral"])
def test_a_higher_rank_to_start_from_changes_no_scaling_of_experts(family, base, alpaca_file, tmp_path):
    settings = {"model__compute_dtype": "float32", "train__max_steps": 1, "lora__targets": ["experts.down_proj"]}
    settings["lora__alpha_pattern"] = {"experts.down_proj": 16}
    train(load_config(run_config(base, alpaca_file, tmp_path / "first", lora__rank=8, **settings)))
    first = open_source(tmp_path / "first").read().experts
    settings["lora__start_from"] = str(tmp_path / "first")
    train(load_config(run_config(base, alpaca_file, tmp_path / "then", lora__rank=4, **settings)))
    then = open_source(tmp_path / "then").read().experts
    assert {(own.A.shape[1], own.scaling) for own in first.values()} == {(4, 4.0)}
    assert {(own.A.shape[1], own.scaling) for own in then.values()} == {(4, 8.0)}
    merge(tmp_path / "then", tmp_path / "out", dtype="float32")
    assert verify(tmp_path / "then", tmp_path / "out").problems == []


def test_the_rank_and_alpha_of_experts_follow_patterns_as_those_of_linear_layers_do():
    stacks = ["0.experts.gate_up_proj", "0.experts.down_proj"]
    spec = AdapterSpec(
        rank=16, alpha=32, rslora=True, rank_pattern={"down_proj": 4}, alpha_pattern={"1.experts.down_proj": 6.0}
    )
    specs = specs_with_rank(spec, [*stacks, "1.experts.down_proj"], 2)
    dense = spec.by_layer([*stacks, "1.experts.down_proj"])
    assert {name: own.rank for name, own in specs.items()} == dict(zip(specs, (2, 4, 4), strict=True))
    assert {name: own.scaling for name, own in specs.items()} == pytest.approx(
        {name: own.scaling for name, own in dense.items()}
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_verify_scales_experts_as_training_does(rslora, tmp_path):
    higher = 16  # that of an adapter that they start from, which changes no scaling
    patterns = {"lora__rank_pattern": {"1.experts.*": 8}, "lora__alpha_pattern": {"experts.down_proj": 6.0}}
    path = run_config("none", "none.jsonl", tmp_path / "run", lora__rslora=rslora, **patterns)
    stacks = [f"{index}.experts.{part}" for index in (0, 1) for part in ("gate_up_proj", "down_proj")]
    specs = specs_with_rank(adapter_spec(load_config(path).lora), stacks, 2, dict.fromkeys(stacks, higher))
    text = SimpleNamespace(num_experts_per_tok=2)
    skeleton = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    found = _scaling_of_experts(SimpleNamespace(run=SimpleNamespace(config=path)), skeleton, None)
    assert {own.rank for own in specs.values()} == {higher}
    assert {name: found(name) for name in stacks} == pytest.approx({name: own.scaling for name, own in specs.items()})
    assert len({own.scaling for own in specs.values()}) == 4


@pytest.mark.parametrize("family", ["phimoe"])
def test_transformers_loads_a_quantized_mixture_whose_routers_are_linear_layers(family, base, tmp_path):
    quantize_model(str(base), tmp_path / "out", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    stored = load_file(base / "model.safetensors")
    router = model.model.layers[1].mlp.router
    assert torch.equal(
        router.weight,
        next(
            each.float()
            for name, each in stored.items()
            if "layers.1" in name and name.endswith(("gate.weight", "router.weight"))
        ),
    )
    assert type(model.model.layers[1].self_attn.q_proj).__name__ == "Linear4bit"
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("family", ["qwen3_moe"])
@pytest.mark.parametrize("targets", ["all-linear", ["experts.gate_up_proj"]], ids=str)
def test_experts_without_a_token_are_those_whose_every_update_is_zero(targets, family, base):
    model = load(base)
    add_lora(model, targets=targets)
    for number, (_, layer) in enumerate(lora_experts(model)):
        layer.lora_B.data[number % 2 :] = 1.0
    total = 12
    (line,) = describe_dead_experts(model) or [""]
    assert (f" of {total} experts" in line) == (targets != "all-linear"), line


@pytest.mark.parametrize("family", ["mixtral"])
def test_an_adapter_of_peft_that_names_parameters_alone_is_read(family, base, tmp_path, generator):
    peft = pytest.importorskip("peft")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    adapted_by_peft = peft.get_peft_model(plain, config).eval()
    for name, parameter in adapted_by_peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    adapted_by_peft.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert len(adapter.layers) == 2
    assert len(adapter.experts) == 4
    model, ids = load(base, "none"), torch.randint(5, 250, (2, 24), generator=generator)
    wrap_adapter(model, adapter)
    with torch.no_grad():
        assert (model(ids).logits - adapted_by_peft(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["mixtral"])
def test_only_tools_that_read_experts_load_them(family, base, tmp_path, generator):
    model = load(base)
    adapted(model, generator)
    save_adapter(model, tmp_path / "adapter", str(base))
    skeleton = build_skeleton(BaseFiles.resolve(str(base)))
    verdicts = check_clients(tmp_path / "adapter", skeleton)
    assert [client for client, verdict in verdicts.items() if verdict.loads] == ["peft", "vllm"]
    assert "(vLLM 0.24 or newer with --enable-mixed-moe-lora-format" in str(verdicts["vllm"])
    assert "reads factors of numbered experts" in str(verdicts["llama.cpp"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"alpha_pattern": {"experts.down_proj": 1}})
    )
    assert "would silently scale model.layers.0" in str(check_clients(tmp_path / "adapter", skeleton)["vllm"])
    single = load(base)
    add_lora(single, targets=["q_proj", "experts.down_proj"])
    save_adapter(single, tmp_path / "single", str(base))
    assert "has them alone" in str(check_clients(tmp_path / "single", skeleton)["vllm"])
    other = build_skeleton(BaseFiles.resolve(str(make_moe(tmp_path / "other", family, 0, num_local_experts=8))))
    assert "factors for (4," in str(check_clients(tmp_path / "adapter", other)["peft"])
