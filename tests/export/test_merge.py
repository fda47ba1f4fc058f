"""Merged folders: they load in transformers without qlora, and equal base + scaling · B A in every bit."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.hrm_text import HrmTextConfig

import qlora
from qlora.config import load_config
from qlora.errors import CheckpointError, ConfigError, ExportError, ModelError
from qlora.export import Judge, merge
from qlora.export.folder import cast_checked
from qlora.files.stored import BLOCK_NUMEL
from qlora.lora import lora_layers
from qlora.model import SUPERVISED, StepLoss, load_base, load_run
from qlora.proof import verify
from qlora.training import train
from tests.tiny import make_base, make_tokenizer, run_config

pytestmark = pytest.mark.slow

GPT2 = {"config_class": GPT2Config, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
WEIGHTS = "model.safetensors"
DTYPES = ["float16", "bfloat16", "float32"]
# Largest difference over largest logit: one rounding of every weight and of every activation in two layers, by
# 2^-11, 2^-8 and 2^-24, which the attention of a random model makes larger.
TOLERANCE = {"float16": 0.02, "bfloat16": 0.1, "float32": 1e-4}

# Prints the peak memory of merges beyond that of the imported libraries, in bytes. (A process starts with its parent's
# ru_maxrss, but not with its VmHWM.)
PEAK = """
import sys
import bitsandbytes, transformers.models.llama.modeling_llama
from qlora.export import merge
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
for onto in ("dequantized", "original"):
    merge(sys.argv[1], sys.argv[2] + onto, onto=onto)
print(peak() - before)
"""


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
    """A run whose adapter computes in fp32, so that only the merge's rounding makes a difference."""
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
    """Return scaling · B A by weight name, from the adapter's files."""
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
    """Return the base's weights as training uses them, by weight name."""
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


def test_onto_the_original_every_bit_is_the_weight_plus_the_update(run, tiny_base, tmp_path):
    merge(run, tmp_path / "out", "float32", onto="original")
    source, deltas = load_file(tiny_base / "model.safetensors"), deltas_of(run)
    for name, value in tensors_of(tmp_path / "out").items():
        assert torch.equal(value, source[name].float() + deltas.get(name, 0)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_folder_loads_in_transformers_and_predicts_like_the_adapter(dtype, exact_run, tmp_path, generator):
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
        layer.lora_B.data.zero_()
    assert (logits_of(adapted, ids) - expected).abs().max() > 0.1 * largest
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert own.chat_template == tokenizer.chat_template
    assert own("a b").input_ids == tokenizer("a b").input_ids


def test_an_rslora_scaling_is_merged(tiny_base, alpaca_file, tmp_path):
    run = train_on(tiny_base, alpaca_file, tmp_path / "run", lora__rslora=True)
    merge(run, tmp_path / "out", "float32")
    name, factors = "model.layers.0.mlp.up_proj", load_file(run / "adapter" / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{name}.lora_{factor}.weight"].float() for factor in "AB")
    weight, merged = dequantized_of(tiny_base)[f"{name}.weight"], tensors_of(tmp_path / "out")[f"{name}.weight"]
    assert torch.allclose(merged, weight + 4 * (B @ A), rtol=0, atol=1e-7)  # 8/√4
    assert not torch.allclose(merged, weight + 2 * (B @ A), rtol=0, atol=1e-4)  # and not 8/4


def test_layers_without_an_adapter_are_dequantized(tiny_base, alpaca_file, tmp_path):
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
    with pytest.raises(ExportError, match="only 4-bit weights"):
        merge(run, tmp_path / "other", onto="original")


@pytest.mark.parametrize(
    ("settings", "embedding"), [({}, "model.embed_tokens.weight"), (GPT2, "transformer.wte.weight")]
)
@pytest.mark.parametrize("repeats", [True, False])
def test_the_config_is_tied_if_the_files_head_is_the_embedding(
    repeats, settings, embedding, alpaca_file, tmp_path, seed, generator
):
    base = make_base(tmp_path / "base", seed, tie_word_embeddings=True, **settings)
    tensors = load_file(base / WEIGHTS)
    other = torch.randn(tensors[embedding].shape, generator=generator).bfloat16()
    tensors["lm_head.weight"] = tensors[embedding].clone() if repeats else other
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    merge(train_on(base, alpaca_file, tmp_path / "run"), tmp_path / "out", "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == repeats
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(merged.lm_head.weight, tensors["lm_head.weight"])


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


def test_generation_settings_that_transformers_refuses_to_save_are_kept(own_run, tmp_path):
    base, run = own_run
    published = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "eos_token_id": 258}
    (base / "generation_config.json").write_text(json.dumps(published))
    merge(run, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert published | {"eos_token_id": [257, 258]} == {key: written[key] for key in published}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_bases_licence_and_notice_are_copied(own_run, tmp_path):
    base, run = own_run
    for name in ("LICENSE", "NOTICE.txt"):
        (base / name).write_text(name)
    (base / "LICENSES").mkdir()
    merge(run, tmp_path / "out")
    assert [(tmp_path / "out" / name).read_text() for name in ("LICENSE", "NOTICE.txt")] == ["LICENSE", "NOTICE.txt"]


def test_a_base_with_custom_code_is_released_with_the_code(alpaca_file, tmp_path, seed):
    base = make_base(tmp_path / "base", seed)
    (base / "own_config.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (base / "own_model.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .own_config import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps(config))
    run = train_on(base, alpaca_file, tmp_path / "run", model__trust_remote_code=True)
    merge(run, tmp_path / "out", "bfloat16", onto="best")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert verify(run, tmp_path / "out").merged_loss is not None


def test_the_report_is_in_the_folder(run, tmp_path):
    report = merge(run, tmp_path / "out", "bfloat16", onto="original")
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written == report.as_dict() | {"out_dir": "out", "run_dir": run.name}  # and no path of this machine
    assert (written["dtype"], written["onto"]) == ("bfloat16", "original")
    assert not any((tmp_path / "out" / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors"))


def test_a_value_that_does_not_fit_is_reported_and_nothing_is_left(own_run, tmp_path):
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
def test_the_largest_values_fit_and_a_larger_one_does_not(dtype, generator):
    kind = getattr(torch, dtype)
    largest = torch.finfo(kind).max
    values = torch.full((1000,), largest)
    assert torch.equal(cast_checked("weight", values, kind), values.to(kind))
    for beyond in (float("inf"), float("-inf"), float("nan"), *([1e5] if dtype == "float16" else [])):
        values = torch.randn(1000, generator=generator)
        values[torch.randint(1000, (), generator=generator)] = beyond
        remedy = "merge with --dtype bfloat16 or float32" if math.isfinite(beyond) else "base or adapter is damaged"
        with pytest.raises(ExportError, match=f"weight: a value of .* does not fit {dtype} .*; {remedy}"):
            cast_checked("weight", values, kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_is_reported_with_its_tensor(dtype, own_run, tmp_path):
    _, run = own_run
    path = run / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    factors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    save_file(factors, path)
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        merge(run, tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_base_other_than_the_one_used_in_training_is_refused(name, own_run, tmp_path):
    base, run = own_run
    merge(run, tmp_path / "before")
    if name == "config.json":
        (base / name).write_text((base / name).read_text() + " ")
    else:
        tensors = load_file(base / name)
        tensors["model.norm.weight"][3] += 1
        save_file(tensors, base / name, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"not the base used in training: {name}".replace(".", r"\.")):
        merge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_never_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ExportError, match="already exists"):
        merge(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ExportError, match="already exists"):
        merge(run, tmp_path / "file")
    for name, leads_to in (("dangling", "nowhere"), ("link", "empty")):
        (tmp_path / name).symlink_to(tmp_path / leads_to)
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ExportError, match="already exists"):
            merge(run, tmp_path / name)
    merge(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def contents(folder):
    named_after_it = ("merge_report.json", "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in named_after_it}


class Interruption:
    """Progress callback that stops a merge as Ctrl-C does, once a number of bytes is written."""

    def __init__(self, num_bytes):
        self.num_bytes, self.calls = num_bytes, []

    def __call__(self, done, total):
        self.calls.append((done, total))
        if done >= self.num_bytes:
            raise KeyboardInterrupt


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_an_interrupted_merge_resumes_where_it_stopped(max_shard_size, run, tmp_path):
    merge(run, tmp_path / "whole", max_shard_size=max_shard_size)
    for stop_at in (1, 100_000, 200_000):
        with pytest.raises(KeyboardInterrupt):
            merge(run, tmp_path / "out", max_shard_size=max_shard_size, on_progress=Interruption(stop_at))
        assert not (tmp_path / "out").exists()
    steps = Interruption(10**12)
    report = merge(run, tmp_path / "out", max_shard_size=max_shard_size, on_progress=steps)
    assert report.continued_bytes >= 200_000
    assert steps.calls[0] == (report.continued_bytes, report.num_bytes)
    assert steps.calls[-1] == (report.num_bytes, report.num_bytes)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_files_of_another_merge_are_refused_and_not_touched(run, exact_run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        merge(run, tmp_path / "out", on_progress=Interruption(100_000))
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for other, settings in ((run, {"dtype": "bfloat16"}), (run, {"onto": "original"}), (exact_run, {})):
        with pytest.raises(ExportError, match="with other settings or of another run"):
            merge(other, tmp_path / "out", **settings)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == left
    assert merge(run, tmp_path / "out").continued_bytes > 0


def test_a_second_merge_into_the_same_folder_is_refused_while_one_writes(run, tmp_path):
    refused = []

    def merge_meanwhile(done, total):
        with pytest.raises(ExportError, match="being written by another qlora merge") as raised:
            merge(run, tmp_path / "out")
        refused.append(raised)

    merge(run, tmp_path / "out", on_progress=merge_meanwhile)
    assert refused
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_merges_onto_another_base_and_the_report_names_the_differing_files(own_run, tmp_path):
    base, run = own_run
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(base / WEIGHTS)
    tensors[name] += 1
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="merge anyway with --force"):
        merge(run, tmp_path / "out")
    report = merge(run, tmp_path / "out", "float32", onto="original", force=True)
    assert report.base_differs == [WEIGHTS]
    assert torch.equal(tensors_of(tmp_path / "out")[name], tensors[name].float() + deltas_of(run)[name])


def test_an_adapter_of_another_shape_is_refused_before_anything_is_written(own_run, tmp_path):
    base, run = own_run
    shutil.rmtree(base)
    make_base(base, 0, intermediate_size=180)
    with pytest.raises(
        ExportError, match=r"down_proj.*: the adapter is for a shape of \(64, 172\), the base has \(64, 180\)"
    ):
        merge(run, tmp_path / "out", force=True)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("held_out", [0.2, None])
def test_onto_best_writes_the_base_with_the_lower_loss(held_out, tiny_base, alpaca_file, tmp_path):
    run = train_on(tiny_base, alpaca_file, tmp_path / "run", data__eval=held_out)
    report = merge(run, tmp_path / "out", "float32", onto="best")
    losses = {}
    for onto in ("dequantized", "original"):
        merge(run, tmp_path / onto, "float32", onto=onto)
        losses[onto] = verify(run, tmp_path / onto).merged_loss
    assert report.losses == pytest.approx(losses, rel=1e-5)
    assert report.onto == min(losses, key=losses.get)
    assert contents(tmp_path / "out") == contents(tmp_path / report.onto)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["losses"] == report.losses


def test_onto_best_compares_by_the_loss_that_is_passed_in(run, tmp_path):
    """The public function passes that of the run's objective."""
    seen = []

    def judge_of(run):
        seen.append(run.path.name)
        negated = replace(SUPERVISED, compute=lambda model, batch: StepLoss(-SUPERVISED.compute(model, batch).total))
        return Judge(negated, "the losses by base are negated")

    usual = qlora.merge(run, tmp_path / "usual", "float32", onto="best")
    report = merge(run, tmp_path / "out", "float32", onto="best", judge_of=judge_of)
    assert seen == [Path(run).name]
    assert report.losses == {base: -loss for base, loss in usual.losses.items()}
    assert {report.onto, usual.onto} == {"dequantized", "original"}
    assert "the losses by base are negated" in report.notes


def test_an_interrupted_merge_onto_best_resumes(run, tmp_path):
    whole = merge(run, tmp_path / "whole", onto="best")
    with pytest.raises(KeyboardInterrupt):
        merge(run, tmp_path / "out", onto="best", on_progress=Interruption(int(whole.num_bytes * 1.5)))
    report = merge(run, tmp_path / "out", onto="best")
    assert report.continued_bytes > whole.num_bytes
    assert (report.onto, report.losses) == (whole.onto, whole.losses)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_merge_with_several_templates_resumes(own_run, tmp_path):
    _, run = own_run
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    templates = {"default": turns, "tool_use": "{{ tools }}" + turns}
    make_tokenizer(chat_template=templates).save_pretrained(run / "adapter")
    whole = merge(run, tmp_path / "whole", onto="best")
    with pytest.raises(KeyboardInterrupt):
        merge(run, tmp_path / "out", onto="best", on_progress=Interruption(int(whole.num_bytes * 1.5)))
    assert merge(run, tmp_path / "out", onto="best").continued_bytes > whole.num_bytes
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates


def test_weights_of_many_blocks_are_exact(alpaca_file, tmp_path, seed):
    sizes = {"hidden_size": 384, "intermediate_size": 3000, "num_hidden_layers": 1, "vocab_size": 1000}
    base = make_base(tmp_path / "base", seed, **sizes)
    run = train_on(base, alpaca_file, tmp_path / "run", train__max_steps=1)
    merge(run, tmp_path / "out", "float32")
    source, dequantized, deltas = load_file(base / WEIGHTS), dequantized_of(base), deltas_of(run)
    for name, value in tensors_of(tmp_path / "out").items():
        assert torch.equal(value, dequantized[name] + deltas[name] if name in deltas else source[name].float()), name
    assert max(value.numel() for value in source.values()) > BLOCK_NUMEL


@pytest.mark.parametrize(
    ("config_class", "sizes"),
    [
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "intermediate_size": 93}),
        (MistralConfig, {"intermediate_size": 130, "tie_word_embeddings": True}),
        (Qwen2Config, {}),  # has biases
        (Qwen3Config, {"tie_word_embeddings": True, "hidden_size": 60}),
        (Gemma2Config, {}),  # tied by default, with a norm of 1 + w
        (Gemma3TextConfig, {"tie_word_embeddings": False}),
    ],
)
def test_families_and_odd_sizes_are_exact(config_class, sizes, alpaca_file, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, config_class, **sizes)
    run = train_on(base, alpaca_file, tmp_path / "run", train__max_steps=1)
    source, deltas = load_file(base / WEIGHTS), deltas_of(run)
    expected = {"dequantized": source | dequantized_of(base), "original": source}
    for onto, weights in expected.items():
        assert merge(run, tmp_path / onto, "float32", onto=onto).merged == len(deltas) == 14
        merged = tensors_of(tmp_path / onto)
        assert merged.keys() == source.keys()
        for name, value in merged.items():
            assert torch.equal(value, weights[name].float() + deltas.get(name, 0)), name
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / onto, output_loading_info=True)
        assert not info["missing_keys"] | info["unexpected_keys"]


def test_report_and_card_note_losses_that_are_not_held_out(run, own_run, tmp_path):
    merge(run, tmp_path / "out", onto="best")
    (note,) = json.loads((tmp_path / "out" / "merge_report.json").read_text())["notes"]
    assert note.startswith("the run has no held-out examples")
    assert note in (tmp_path / "out" / "README.md").read_text()
    path = own_run[1] / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"examples": {"train": 32, "eval": 8}}))
    assert merge(own_run[1], tmp_path / "other", onto="best").notes == []
    assert merge(run, tmp_path / "third").notes == []


def test_missing_data_are_reported_before_anything_is_written(own_run, tmp_path):
    _, run = own_run
    path = run / "config.yaml"
    path.write_text(re.sub(r"path: .*rows.jsonl", "path: /gone/rows.jsonl", path.read_text()))
    with pytest.raises(ConfigError, match="/gone/rows.jsonl"):
        merge(run, tmp_path / "out", onto="best")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("device", "onto", "is_noted"),
    [("cuda:0", "dequantized", True), ("cuda:0", "original", False), ("cpu", "dequantized", False)],
)
def test_quantizing_with_other_kernels_than_in_training_is_noted(device, onto, is_noted, own_run, tmp_path):
    path = own_run[1] / "run.json"
    record = json.loads(path.read_text())
    record["in_use"]["device"] = device
    path.write_text(json.dumps(record))
    notes = merge(own_run[1], tmp_path / "out", onto=onto).notes
    assert [note.partition(":")[0] for note in notes] == (
        ["quantized a second time on cpu, but the run was trained on cuda"] if is_noted else []
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bf17"}, "'bf17'"),
        ({"dtype": "float64"}, "'float64'"),
        ({"onto": "orignal"}, "onto: 'orignal' should be one of dequantized, original"),
        ({"onto": "Best"}, "onto: 'Best' should be one of"),
        ({"max_shard_size": "big"}, "'big' should be a size"),
        ({"max_shard_size": 5}, "5 should be a size"),
    ],
)
def test_unknown_settings_are_refused(settings, message, run, tmp_path):
    with pytest.raises(ExportError, match=message):
        merge(run, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_the_working_directory_can_be_the_target(run, tmp_path, monkeypatch):
    for name, given in (("mine", "."), ("other", "nowhere/..")):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert merge(run, given).out_dir == str(folder)
        assert json.loads((folder / "merge_report.json").read_text())["out_dir"] == name
        assert f"# {name}\n" in (folder / "README.md").read_text()


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(run, tmp_path, monkeypatch):
    num_bytes = merge(run, tmp_path / "whole").num_bytes
    with pytest.raises(KeyboardInterrupt):
        merge(run, tmp_path / "out", on_progress=Interruption(100_000))
    monkeypatch.setattr("qlora.files.resumable.free_bytes", lambda target: num_bytes - 100_000)
    written = []
    with pytest.raises(
        ExportError, match=rf"new can't be written: .*No space left.* It takes {num_bytes / 1e6:.1f} MB"
    ):
        merge(run, tmp_path / "new", on_progress=lambda *progress: written.append(progress))
    assert not written
    assert merge(run, tmp_path / "out").continued_bytes >= 100_000  # bytes written earlier need no space


def test_nothing_is_written_if_neither_base_has_a_finite_loss(own_run, tmp_path):
    base, run = own_run
    tensors = load_file(base / WEIGHTS)
    for name in ("model.norm.weight", "lm_head.weight"):
        tensors[name] *= 1e30  # each fits bf16, but their product does not
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="Neither base has a finite loss in bfloat16"):
        merge(run, tmp_path / "out", "bfloat16", onto="best", force=True)
    assert not list(tmp_path.glob("*out*"))


def test_weights_that_transformers_renames_are_merged(alpaca_file, tmp_path, seed, generator):
    base = make_base(tmp_path / "base", seed, NemotronHConfig, layers_block_type=["attention", "mlp"])
    run = train_on(base, alpaca_file, tmp_path / "run", model__compute_dtype="float32")
    report = merge(run, tmp_path / "out", "float32")
    merged, source = tensors_of(tmp_path / "out"), load_file(base / WEIGHTS)
    assert report.merged == 6
    assert merged.keys() == source.keys()
    assert "backbone.layers.0.mixer.q_proj.weight" in merged
    ids = torch.randint(256, (2, 30), generator=generator)
    expected = logits_of(load_run(run)[0], ids)
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), ids)
    assert (found - expected).abs().max() < TOLERANCE["float32"] * expected.abs().max()
    assert verify(run, tmp_path / "out").matches


def test_weights_that_are_parts_of_other_tensors_are_refused_by_name(alpaca_file, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, HrmTextConfig, num_hidden_layers=1, L_cycles=1, H_cycles=1)
    refused = r"12 layers are not tensors of their own .*made of .*gqkv_proj.*leave them out of lora\.targets"
    with pytest.raises(ModelError, match=refused):  # before it is trained
        train_on(base, alpaca_file, tmp_path / "run", train__max_steps=1)
    assert not (tmp_path / "run").exists()
    run = train_on(base, alpaca_file, tmp_path / "own", train__max_steps=1, lora__targets=["o_proj"])
    with pytest.raises(ModelError, match=refused):  # they are quantized
        merge(run, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    assert merge(run, tmp_path / "out", onto="original").merged == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_memory_is_bounded_by_the_largest_tensor(alpaca_file, tmp_path, seed):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 20}
    base = make_base(tmp_path / "base", seed, **sizes)
    bound = 4 * 4 * 512 * 2048 + 60e6
    assert bound < 0.6 * (base / WEIGHTS).stat().st_size
    once = {"train__max_steps": 1, "train__gradient_accumulation_steps": 1, "train__micro_batch_size": 1}
    run = train_on(base, alpaca_file, tmp_path / "run", **once)
    arguments = [sys.executable, "-c", PEAK, str(run), str(tmp_path / "out-")]
    assert int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines()[-1]) < bound


def test_a_folder_without_a_finished_run_is_refused(own_run, tmp_path):
    with pytest.raises(CheckpointError, match="is not a run"):
        merge(tmp_path, tmp_path / "out")
    shutil.rmtree(own_run[1] / "adapter")
    with pytest.raises(CheckpointError, match="has no adapter"):
        merge(own_run[1], tmp_path / "out")


@pytest.mark.parametrize("status", ["interrupted", "running"])
def test_a_run_that_has_not_finished_is_refused(status, own_run, tmp_path):
    path = own_run[1] / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": status}))
    with pytest.raises(CheckpointError, match=f"{own_run[1]} has not finished.* name the adapter to use: .*/step-0"):
        merge(own_run[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_lacks_a_layer_of_the_run_is_refused_by_name(own_run, tmp_path):
    path = own_run[1] / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "layers.1.mlp.up_proj" not in name}, path)
    with pytest.raises(CheckpointError, match=r"differ in 1 modules: model\.layers\.1\.mlp\.up_proj"):
        merge(own_run[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_folder_can_be_trained_and_merged_again(run, alpaca_file, tmp_path):
    merge(run, tmp_path / "out", "bfloat16")
    first = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    again = train_on(tmp_path / "out", alpaca_file, tmp_path / "again")
    losses = [json.loads(line)["loss"] for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] < first[0]["loss"] - 0.3  # it starts from the result of the first run
    assert merge(again, tmp_path / "twice").merged == 14
    assert not torch.equal(
        tensors_of(tmp_path / "twice")["model.layers.0.mlp.up_proj.weight"].float(),
        tensors_of(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].float(),
    )


def test_an_integer_tensor_is_unchanged(tiny_base, alpaca_file, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    counts = torch.tensor([2**40 + 1, -3])
    save_file(load_file(base / WEIGHTS) | {"model.counts": counts}, base / WEIGHTS, metadata={"format": "pt"})
    train(load_config(run_config(base, alpaca_file, tmp_path / "run", train__max_steps=1)))
    merge(tmp_path / "run", tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged" / WEIGHTS)["model.counts"], counts)
    assert verify(tmp_path / "run", tmp_path / "merged").matches
