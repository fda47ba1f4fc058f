"""4-bit folders: transformers and training load them with the bits of quantizing while loading."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, Qwen2Config

from qlora.config import load_config
from qlora.errors import ExportError
from qlora.export import merge
from qlora.export.quantize import quantize_model
from qlora.model import load_base
from qlora.nf4 import NF4Linear, dequantize, is_bitsandbytes_linear
from qlora.training import train
from tests.tiny import make_base, make_tokenizer, run_config

BASES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "qwen2": {"config_class": Qwen2Config},
    "gpt2": {"config_class": GPT2Config, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def weights_of(model):
    """Return the dequantized weights of the layers in 4 bits, by name."""
    return {
        name: module.dequantize(torch.float32)
        for name, module in model.named_modules()
        if isinstance(module, NF4Linear)
    }


def tensors_of(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", BASES)
def test_the_folder_loads_with_the_bits_of_quantizing_while_loading(
    family, dtype, double_quant, tmp_path, seed, generator
):
    base = make_base(tmp_path / "base", seed, dtype=getattr(torch, dtype), **BASES[family])
    report = quantize_model(str(base), tmp_path / "4bit", double_quant)
    expected, _ = load_base(str(base), double_quant=double_quant, compute_dtype=dtype)
    found, _ = load_base(str(tmp_path / "4bit"), compute_dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit", dtype=getattr(torch, dtype))

    theirs = {name: module for name, module in plain.named_modules() if is_bitsandbytes_linear(module)}
    ours, weights = weights_of(found), weights_of(expected)
    assert ours.keys() == weights.keys() == theirs.keys()
    assert report.quantized == len(weights) > 0
    for name, weight in weights.items():
        assert torch.equal(ours[name], weight), name
        packed = theirs[name].weight
        assert torch.equal(dequantize(packed.data, packed.quant_state, torch.float32), weight), name
    rest = {name: value for name, value in expected.named_parameters() if value.is_floating_point()}
    for model in (found, plain):
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], value) for name, value in rest.items())
    ids = torch.randint(256, (2, 20), generator=generator)
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_the_files_are_those_that_transformers_writes(tiny_base, tmp_path):
    report = quantize_model(str(tiny_base), tmp_path / "4bit")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    packed = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16, quantization_config=settings)
    packed.save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors_of(tmp_path / "4bit"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert report.tensors == len(ours)
    assert report.num_bytes == sum(value.nbytes for value in ours.values())
    for name, value in ours.items():
        if "quant_state" in name:
            assert json.loads(bytes(value.tolist())) == json.loads(bytes(theirs[name].tolist()))
        else:
            assert torch.equal(value, theirs[name]), name
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("4bit", "theirs")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_an_fp32_model_is_cast_first_as_loading_does(tmp_path, seed):
    base = make_base(tmp_path / "base", seed, dtype=torch.float32)
    quantize_model(str(base), tmp_path / "4bit", dtype="bfloat16")
    found = weights_of(load_base(str(tmp_path / "4bit"), compute_dtype="bfloat16")[0])
    expected = weights_of(load_base(str(base), compute_dtype="bfloat16")[0])
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert tensors_of(tmp_path / "4bit")["model.norm.weight"].dtype == torch.bfloat16


def test_several_files_contain_the_same_tensors_as_one(tiny_base, tmp_path):
    quantize_model(str(tiny_base), tmp_path / "one")
    quantize_model(str(tiny_base), tmp_path / "several", max_shard_size="40KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    one, several = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "several")
    assert one.keys() == several.keys()
    assert all(torch.equal(value, several[name]) for name, value in one.items())
    load_base(str(tmp_path / "several"))


def test_tokenizer_template_and_generation_config_are_copied(tmp_path, seed):
    base = make_base(tmp_path / "base", seed)
    make_tokenizer(chat_template="{{ messages[0].content }}").save_pretrained(base)
    (base / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    (base / "LICENSE").write_text("free")
    (base / "merge_report.json").write_text('{"of": "other weights"}')
    quantize_model(str(base), tmp_path / "4bit")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (tmp_path / "4bit" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "4bit" / "merge_report.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "4bit").chat_template == "{{ messages[0].content }}"


def test_all_templates_are_copied(tmp_path, seed):
    base, templates = make_base(tmp_path / "base", seed), {"default": "{{ bos_token }}", "tool_use": "{{ tools }}"}
    make_tokenizer(chat_template=templates).save_pretrained(base)
    quantize_model(str(base), tmp_path / "4bit")
    assert AutoTokenizer.from_pretrained(tmp_path / "4bit").chat_template == templates


def test_a_run_on_the_4_bit_folder_equals_one_on_the_16_bit_model(tiny_base, alpaca_file, tmp_path):
    quantize_model(str(tiny_base), tmp_path / "4bit")
    losses = []
    for name, base in (("wide", tiny_base), ("narrow", tmp_path / "4bit")):
        config = run_config(
            base, alpaca_file, tmp_path / name, train__max_steps=2, data__eval=None, model__compute_dtype="bfloat16"
        )
        train(load_config(config))
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()])
        merge(tmp_path / name, tmp_path / f"{name}-merged", "float32")
    assert losses[0] == losses[1]
    wide, narrow = tensors_of(tmp_path / "wide-merged"), tensors_of(tmp_path / "narrow-merged")
    assert all(torch.equal(value, narrow[name]) for name, value in wide.items())


def test_a_quantized_model_is_refused(tiny_base, tmp_path):
    quantize_model(str(tiny_base), tmp_path / "4bit")
    with pytest.raises(ExportError, match="quantized already; quantize the 16-bit model"):
        quantize_model(str(tmp_path / "4bit"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_model_whose_config_disables_quantization_is_quantized(tmp_path, seed):
    base = make_base(tmp_path / "base", seed)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert quantize_model(str(base), tmp_path / "4bit").quantized == 14
    load_base(str(tmp_path / "4bit"))


def test_nothing_is_overwritten(tiny_base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="already exists"):
        quantize_model(str(tiny_base), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_value_that_does_not_fit_is_reported_and_nothing_is_left(tmp_path, seed):
    base = make_base(tmp_path / "base", seed, dtype=torch.float32)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.up_proj\.weight: a value does not fit float16"):
        quantize_model(str(base), tmp_path / "4bit", dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("license", ["apache-2.0", None])
def test_the_card_names_the_original_model_without_paths_of_this_machine(license, tmp_path):
    base = make_base(tmp_path / "my-base", 1)
    if license:
        (base / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    report = quantize_model(str(base), tmp_path / "my-4bit")
    card = (tmp_path / "my-4bit" / "README.md").read_text()
    assert "# my-4bit\n\nmy-base in bitsandbytes' 4-bit format" in card
    assert f"| layers in 4 bits | {report.quantized} |" in card
    assert (f"license: {license}" in card) == (license is not None)
    assert "base_model" not in card  # only for models on the hub
    assert str(tmp_path) not in card


def without_dtype(base, **changes):
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype", None)
    (base / "config.json").write_text(json.dumps(config | changes))


def test_without_a_dtype_in_the_config_the_first_floating_point_tensor_decides(tmp_path, seed):
    base = make_base(tmp_path / "base", seed, dtype=torch.bfloat16)
    without_dtype(base)
    tensors = {"model.a_buffer": torch.arange(4), **load_file(base / "model.safetensors")}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert quantize_model(str(base), tmp_path / "4bit").dtype == "bfloat16"


@pytest.mark.parametrize("named", ["int8", "float64", "float99"])
def test_a_dtype_that_weights_can_not_have_is_refused(named, tmp_path, seed):
    base = make_base(tmp_path / "base", seed)
    without_dtype(base, dtype=named)
    with pytest.raises(ExportError, match=f"'{named}', which is not available; give --dtype"):
        quantize_model(str(base), tmp_path / "4bit")


def test_a_shard_size_that_is_none_is_refused_before_anything_is_written(tiny_base, tmp_path):
    with pytest.raises(ExportError, match="max_shard_size: 'lots' should be a size"):
        quantize_model(str(tiny_base), tmp_path / "4bit", max_shard_size="lots")
    assert list(tmp_path.iterdir()) == []
