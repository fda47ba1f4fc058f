"""Merged folders: they load with transformers alone, and hold base + scaling · B A in every bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, GPT2Config

from qlora.config import load_config
from qlora.errors import CheckpointError, ExportError
from qlora.export import merge, verify
from qlora.lora import lora_layers
from qlora.model import load_base, load_run
from qlora.training import train
from tests.tiny import make_base, make_tokenizer, run_config

GPT2 = {"config_class": GPT2Config, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
WEIGHTS = "model.safetensors"
DTYPES = ["float16", "bfloat16", "float32"]
# Largest difference over largest logit: one rounding of every weight and of every activation in two layers, by
# 2^-11, 2^-8 and 2^-24, which the attention of a random model makes larger.
TOLERANCE = {"float16": 0.02, "bfloat16": 0.1, "float32": 1e-4}


def train_on(base, data, folder, **settings):
    settings = {"train__max_steps": 3, "data__eval": None, "model__compute_dtype": "bfloat16", **settings}
    train(load_config(run_config(base, data, folder, **settings)))
    return folder


@pytest.fixture(scope="module")
def run(tiny_base, alpaca_file, tmp_path_factory):
    """A trained run; not to be changed."""
    return train_on(tiny_base, alpaca_file, tmp_path_factory.mktemp("merge") / "run")


@pytest.fixture(scope="module")
def exact_run(tiny_base, alpaca_file, tmp_path_factory):
    """One whose adapter computes in fp32, so that what differs after a merge is the merge's rounding."""
    folder = tmp_path_factory.mktemp("merge") / "exact"
    return train_on(tiny_base, alpaca_file, folder, model__compute_dtype="float32")


@pytest.fixture
def own_run(run, tiny_base, tmp_path):
    """A run and its base that a test may change."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    copy = shutil.copytree(run, tmp_path / "run")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(str(tiny_base), str(base)))
    return base, copy


def tensors_of(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def deltas_of(run):
    """scaling · B A by weight name, from the adapter's files alone."""
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    factors = load_file(run / "adapter" / "adapter_model.safetensors")
    deltas = {}
    for key, A in factors.items():
        if key.endswith("lora_A.weight"):
            B = factors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            deltas[f"{name}.weight"] = (B.float() @ A.float()) * (config["lora_alpha"] / config["r"])
    return deltas


def dequantized_of(base, compute_dtype="bfloat16"):
    """Weights of the base as they are trained on, by weight name."""
    model, _ = load_base(str(base), compute_dtype=compute_dtype)
    return {
        f"{name}.weight": module.dequantize(model.dtype).float()
        for name, module in model.named_modules()
        if hasattr(module, "quant_state")
    }


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids).logits.float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_is_base_plus_update_in_fp32_rounded_once(dtype, run, tiny_base, tmp_path):
    report = merge(run, tmp_path / "out", dtype)
    merged, source = tensors_of(tmp_path / "out"), load_file(tiny_base / "model.safetensors")
    dequantized, deltas = dequantized_of(tiny_base), deltas_of(run)
    assert merged.keys() == source.keys()
    assert report.merged == len(deltas) == len(dequantized) == 14
    for name, value in merged.items():
        expected = dequantized[name] + deltas[name] if name in deltas else source[name].float()
        assert torch.equal(value, expected.to(getattr(torch, dtype))), name
    assert all(delta.abs().max() > 0 for delta in deltas.values())
    assert report.tensors == len(merged)
    assert report.num_bytes == sum(value.nbytes for value in merged.values())


def test_onto_the_original_every_bit_is_its_weight_plus_the_update(run, tiny_base, tmp_path):
    merge(run, tmp_path / "out", "float32", onto="original")
    source, deltas = load_file(tiny_base / "model.safetensors"), deltas_of(run)
    for name, value in tensors_of(tmp_path / "out").items():
        assert torch.equal(value, source[name].float() + deltas.get(name, 0)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_loads_with_transformers_alone_and_predicts_what_the_adapter_does(dtype, exact_run, tmp_path, generator):
    merge(exact_run, tmp_path / "out", dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert {value.dtype for value in merged.parameters()} == {getattr(torch, dtype)}
    adapted, tokenizer = load_run(exact_run)
    ids = torch.randint(256, (2, 30), generator=generator)
    expected = logits_of(adapted, ids)
    largest = expected.abs().max()
    assert (logits_of(merged, ids) - expected).abs().max() < TOLERANCE[dtype] * largest
    for _, layer in lora_layers(adapted):
        layer.scaling = 0
    assert (logits_of(adapted, ids) - expected).abs().max() > 0.1 * largest
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert own.chat_template == tokenizer.chat_template
    assert own("a b").input_ids == tokenizer("a b").input_ids


def test_a_scaling_by_the_root_of_the_rank_is_merged_as_such(tiny_base, alpaca_file, tmp_path):
    run = train_on(tiny_base, alpaca_file, tmp_path / "run", lora__rslora=True)
    merge(run, tmp_path / "out", "float32")
    name, merged = "model.layers.0.mlp.up_proj.weight", tensors_of(tmp_path / "out")
    expected = dequantized_of(tiny_base)[name] + deltas_of(run)[name] * 2  # 8/√4 and not 8/4
    assert torch.allclose(merged[name], expected, rtol=0, atol=1e-7)
    assert not torch.allclose(merged[name], expected - deltas_of(run)[name], rtol=0, atol=1e-4)


def test_layers_without_an_adapter_are_the_dequantized_ones(tiny_base, alpaca_file, tmp_path):
    run = train_on(tiny_base, alpaca_file, tmp_path / "run", lora__targets=["q_proj"])
    report = merge(run, tmp_path / "out", "float32")
    assert report.merged == 2
    merged, dequantized = tensors_of(tmp_path / "out"), dequantized_of(tiny_base)
    for name, weight in dequantized.items():
        assert torch.equal(merged[name], weight) == ("q_proj" not in name), name


def test_an_unquantized_base_is_merged_onto_its_own_weights(tiny_base, alpaca_file, tmp_path):
    run = train_on(tiny_base, alpaca_file, tmp_path / "run", model__quantization="none")
    merge(run, tmp_path / "out", "float32")
    source, deltas = load_file(tiny_base / "model.safetensors"), deltas_of(run)
    for name, value in tensors_of(tmp_path / "out").items():
        assert torch.equal(value, source[name].float() + deltas.get(name, 0)), name


def test_gpt2s_transposed_weights_get_a_transposed_update(alpaca_file, tmp_path, seed, generator):
    base = make_base(tmp_path / "base", seed, **GPT2)
    run = train_on(base, alpaca_file, tmp_path / "run", model__compute_dtype="float32")
    merge(run, tmp_path / "out", "float32")
    name = "transformer.h.1.attn.c_attn.weight"
    assert tensors_of(tmp_path / "out")[name].shape == (64, 192)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    adapted = load_run(run)[0]
    ids = torch.randint(256, (2, 30), generator=generator)
    expected = logits_of(adapted, ids)
    assert (logits_of(merged, ids) - expected).abs().max() < TOLERANCE["float32"] * expected.abs().max()
    assert torch.equal(
        tensors_of(tmp_path / "out")[name].T, dequantized_of(base, "float32")[name] + deltas_of(run)[name]
    )


def test_a_base_in_bitsandbytes_4bit_is_merged(tiny_base, alpaca_file, tmp_path):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    packed = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16, quantization_config=settings)
    packed.save_pretrained(tmp_path / "4bit")
    make_tokenizer().save_pretrained(tmp_path / "4bit")
    run = train_on(tmp_path / "4bit", alpaca_file, tmp_path / "run")
    merge(run, tmp_path / "out", "float32")
    merged, dequantized, deltas = tensors_of(tmp_path / "out"), dequantized_of(tiny_base), deltas_of(run)
    assert merged.keys() == load_file(tiny_base / "model.safetensors").keys()
    for name, weight in dequantized.items():
        assert torch.equal(merged[name], weight + deltas[name]), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(ExportError, match="4-bit weights alone"):
        merge(run, tmp_path / "other", onto="original")


def test_a_tied_head_stays_tied(alpaca_file, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, tie_word_embeddings=True)
    run = train_on(base, alpaca_file, tmp_path / "run")
    merge(run, tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    embeddings = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(merged.lm_head.weight, embeddings.half())


def test_end_tokens_are_those_of_the_base_and_of_the_tokenizer(own_run, tmp_path):
    base, run = own_run
    GenerationConfig(eos_token_id=258, temperature=0.7, do_sample=True).save_pretrained(base)
    merge(run, tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [257, 258]
    assert generation.temperature == 0.7
    (base / "generation_config.json").unlink()
    merge(run, tmp_path / "other")
    assert GenerationConfig.from_pretrained(tmp_path / "other").eos_token_id == [257]


def test_the_report_is_in_the_folder(run, tmp_path):
    report = merge(run, tmp_path / "out", "bfloat16", onto="original")
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written == report.as_dict()
    assert (written["dtype"], written["onto"], written["run_dir"]) == ("bfloat16", "original", str(run))
    assert not any((tmp_path / "out" / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors"))


def test_a_value_that_does_not_fit_is_named_and_nothing_is_left(own_run, tmp_path):
    _, run = own_run
    path = run / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    prefix = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    factors[f"{prefix}A.weight"].fill_(300)
    factors[f"{prefix}B.weight"].fill_(100)
    save_file(factors, path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: a value of .*--dtype bfloat16"):
        merge(run, tmp_path / "out", "float16")
    assert sorted(tmp_path.iterdir()) == before
    assert merge(run, tmp_path / "out", "bfloat16").merged == 14


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_no_number_is_named(dtype, own_run, tmp_path):
    _, run = own_run
    path = run / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    factors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    save_file(factors, path)
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        merge(run, tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_another_base_than_the_one_trained_on_is_refused(name, own_run, tmp_path):
    base, run = own_run
    merge(run, tmp_path / "before")
    if name == "config.json":
        (base / name).write_text((base / name).read_text() + " ")
    else:
        tensors = load_file(base / name)
        tensors["model.norm.weight"][3] += 1
        save_file(tensors, base / name, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"not the base that was trained on: {name}".replace(".", r"\.")):
        merge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_never_written_over(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ExportError, match="exists already"):
        merge(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ExportError, match="exists already"):
        merge(run, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    merge(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_an_unfinished_run_or_none_is_refused(own_run, tmp_path):
    with pytest.raises(CheckpointError, match="no run directory"):
        merge(tmp_path, tmp_path / "out")
    shutil.rmtree(own_run[1] / "adapter")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        merge(own_run[1], tmp_path / "out")


@pytest.mark.parametrize("status", ["interrupted", "running"])
def test_a_run_that_has_not_finished_is_refused(status, own_run, tmp_path):
    path = own_run[1] / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": status}))
    with pytest.raises(ExportError, match=f"{own_run[1]} is {status}, not finished; qlora train continues it"):
        merge(own_run[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_layers_that_the_base_lacks_is_refused_by_name(own_run, tmp_path):
    _, run = own_run
    path = run / "adapter" / "adapter_model.safetensors"
    factors = {key.replace("layers.1.mlp", "layers.7.mlp"): value for key, value in load_file(path).items()}
    save_file(factors, path)
    with pytest.raises(ExportError, match=r"3 layers are not in the files .*model\.layers\.7\.mlp"):
        merge(run, tmp_path / "out")


def test_a_merged_folder_can_be_trained_and_merged_again(run, alpaca_file, tmp_path):
    merge(run, tmp_path / "out", "bfloat16")
    first = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    again = train_on(tmp_path / "out", alpaca_file, tmp_path / "again")
    losses = [json.loads(line)["loss"] for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] < first[0]["loss"] - 0.3  # it starts where the first run led
    assert merge(again, tmp_path / "twice").merged == 14
    assert not torch.equal(
        tensors_of(tmp_path / "twice")["model.layers.0.mlp.up_proj.weight"].float(),
        tensors_of(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].float(),
    )


def test_a_tensor_that_is_no_floating_point_number_is_kept_as_it_is(tiny_base, alpaca_file, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    counts = torch.tensor([2**40 + 1, -3])
    save_file(load_file(base / WEIGHTS) | {"model.counts": counts}, base / WEIGHTS, metadata={"format": "pt"})
    train(load_config(run_config(base, alpaca_file, tmp_path / "run", train__max_steps=1)))
    merge(tmp_path / "run", tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged" / WEIGHTS)["model.counts"], counts)
    assert verify(tmp_path / "run", tmp_path / "merged").matches
