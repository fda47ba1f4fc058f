"""Bases in formats that are decoded as they are read: loaded, trained, merged and verified like the decoded model."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import CheckpointError, ModelError
from qlora.export import merge
from qlora.export.gguf.model import write_gguf
from qlora.export.quantize import quantize_model
from qlora.files import BaseFiles
from qlora.files.shards import TensorLayout
from qlora.memory.estimate import estimate
from qlora.model import SUPERVISED, load_base, load_generation_config, load_tokenizer, open_source
from qlora.model.restore import load_adapted
from qlora.nf4 import NF4Experts, NF4Linear, quantize
from qlora.proof.verify import verify
from qlora.training import plan_run, train
from tests.reference.encodings import from_fp8, from_mxfp4, to_fp8
from tests.tiny import make_base, run_config

BLOCK = (128, 128)


def save(folder, tensors, settings):
    """Save tensors in one file without an index, and the quantization_config."""
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "weights.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def in_fp8_blocks(folder, seed):
    base = make_base(folder, seed)
    stored, decoded = load_file(base / "model.safetensors"), {}
    tensors = dict(stored)
    for name in (name for name in stored if name.endswith("_proj.weight")):
        tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(stored[name], BLOCK)
        decoded[name] = from_fp8(tensors[name], tensors[f"{name}_scale_inv"], BLOCK)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [*BLOCK]}
    return save(base, tensors, settings), {**stored, **decoded}


def in_fp8_per_tensor(folder, seed):
    base = make_base(folder, seed)
    stored, decoded = load_file(base / "model.safetensors"), {}
    tensors = dict(stored)
    for name in (name for name in stored if name.endswith("_proj.weight")):
        scale = stored[name].float().abs().max() / 448
        tensors[name] = (stored[name].float() / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{name}_scale": scale, f"{name.removesuffix('weight')}input_scale": torch.ones(())}
        decoded[name] = tensors[name].float() * scale
    return save(base, tensors, {"quant_method": "fp8", "activation_scheme": "static"}), {**stored, **decoded}


def in_mxfp4(folder, seed):
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 32, "sliding_window": 64}
    base = make_base(folder, seed, GptOssConfig, **sizes)
    stored, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(seed)
    tensors, decoded = dict(stored), {}
    for name in (name for name in stored if name.endswith(("gate_up_proj", "down_proj"))):
        experts, width, out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, width // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 124, (experts, out, width // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded[name] = from_mxfp4(blocks, scales)
    return save(base, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}), {**stored, **decoded}


def in_gguf(folder, seed, **sizes):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    base, stored = make_base(folder, seed, attention_bias=True, mlp_bias=True, **sizes), {}
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = {token: id_ for token, id_ in tokenizer["model"]["vocab"].items() if id_ != 255}
    tokenizer["model"] |= {"vocab": vocabulary | {"th": 255}, "merges": [["t", "h"]]}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))  # transformers reads no vocabulary without merges
    layout = []
    for name, tensor in load_file(base / "model.safetensors").items():
        layout.append(TensorLayout(name, tuple(tensor.shape), torch.float32))
        stored[name] = tensor.float()
    write_gguf(base, layout, stored.__getitem__, folder.with_suffix(".gguf"), "q8_0")
    kinds, decoded = gguf.GGMLQuantizationType, {}
    for name, tensor in stored.items():
        kind = kinds.F32 if tensor.dim() == 1 else kinds.F16 if tensor.shape[-1] % 32 else kinds.Q8_0
        values = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
        decoded[name] = torch.from_numpy(values.astype("float32"))
    return folder.with_suffix(".gguf"), decoded


FORMATS = {
    "FP8 in blocks": in_fp8_blocks,
    "FP8 per tensor": in_fp8_per_tensor,
    "MXFP4": in_mxfp4,
    "GGUF": in_gguf,
}


@pytest.fixture(scope="module", params=FORMATS)
def encoded(request, tmp_path_factory):
    """A base in one of the formats, and its weights decoded by the slow reference."""
    return FORMATS[request.param](tmp_path_factory.mktemp("encoded") / "base", seed=1)


def test_the_model_has_the_decoded_weights_in_4_or_16_bits(encoded):
    base, expected = encoded
    plain, _ = load_base(str(base), quantization="none", compute_dtype="float32")
    in_4bit, _ = load_base(str(base), compute_dtype="float32", allow_unquantized=True)
    assert not hasattr(plain.config, "quantization_config")
    found = plain.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.float()), name
    layers = {name: module for name, module in in_4bit.named_modules() if isinstance(module, NF4Linear)}
    assert len(layers) >= 8
    for name, layer in layers.items():
        assert torch.equal(layer.weight, quantize(expected[f"{name}.weight"].float(), True)[0]), name
    for name, module in in_4bit.named_modules():
        if isinstance(module, NF4Experts):  # which keep what was published in MXFP4
            held = torch.stack([module.dequantize(expert, torch.float32) for expert in range(module.num_experts)])
            assert torch.equal(held.mT if module.is_flipped else held, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_run_is_merged_onto_what_was_decoded_and_verified(quantization, encoded, alpaca_file, tmp_path):
    base, expected = encoded
    settings = {"model__quantization": quantization, "model__allow_unquantized": True}
    config = load_config(run_config(base, alpaca_file, tmp_path / "run", train__max_steps=2, **settings))
    estimate(config, SUPERVISED, "cpu")
    expert_type = "mxfp4" if quantization == "nf4" and any(".experts." in name for name in expected) else None
    noted = "keep the values that they are stored with in MXFP4" if expert_type else "are decoded from"
    assert any(noted in note for note in plan_run(config).notes)
    train(config)
    assert RunDirectory.open(tmp_path / "run").read_record().quantization.experts == expert_type
    for onto in ("dequantized", "original"):
        merge(tmp_path / "run", tmp_path / onto, onto=onto, dtype="float32")
        report = verify(tmp_path / "run", tmp_path / onto)
        assert [problem for problem in report.problems if "is worse than the adapter's" not in problem] == []
    assert "quantization_config" not in json.loads((tmp_path / "original" / "config.json").read_text())
    with safe_open(tmp_path / "original" / "model.safetensors", "pt") as written:
        assert {*written.keys()} == {*expected}
        for name in expected:
            difference = (written.get_tensor(name) - expected[name].float()).abs().max()
            assert (0 < difference < 0.1) if name.endswith(("_proj.weight", "_proj")) else difference == 0, name


def test_experts_in_16_bits_beside_others_in_mxfp4_are_refused_by_name(tmp_path):
    base, decoded = in_mxfp4(tmp_path / "base", seed=1)
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(base / "weights.safetensors")
    del tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    tensors[name] = torch.randn(decoded[name].shape).bfloat16()
    save_file(tensors, base / "weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"can't be loaded: {name}: some values are none .*; use another base"):
        load_base(str(base), device="cpu", allow_unquantized=True)


def test_a_run_whose_experts_had_other_codes_is_refused_everywhere(alpaca_file, tmp_path):
    base, _ = in_mxfp4(tmp_path / "base", seed=1)
    settings = {"train__max_steps": 1, "model__allow_unquantized": True, "train__save_every": 1}
    config = load_config(run_config(base, alpaca_file, tmp_path / "run", **settings))
    train(config)
    run = RunDirectory.open(tmp_path / "run")
    record = run.read_record()
    run.write_record(replace(record, quantization=replace(record.quantization, experts=None)))
    refused = r"with experts in nf4 \(model\.layers\.0\.mlp\.experts\.gate_up_proj\), which are in mxfp4 now"
    with pytest.raises(CheckpointError, match=refused):
        merge(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match=refused):
        load_adapted(open_source(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=refused):
        verify(tmp_path / "run")


def test_a_base_in_fp8_is_quantized_to_a_4_bit_folder(tmp_path, seed):
    base, expected = in_fp8_blocks(tmp_path / "base", seed)
    quantize_model(str(base), tmp_path / "4bit", dtype="float32")
    model, _ = load_base(str(tmp_path / "4bit"), compute_dtype="float32")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(model.get_submodule(name).weight, quantize(expected[f"{name}.weight"], True)[0])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_gguf_file_says_what_a_config_does(rope, tmp_path, seed):
    rope = {"rope_theta": 500_000.0, **rope}
    path, _ = in_gguf(tmp_path / "base", seed, rope_parameters=rope, num_hidden_layers=1)
    files = BaseFiles.resolve(str(path))
    found, expected = files.config, BaseFiles.resolve(str(tmp_path / "base")).config
    assert found["rope_parameters"] == expected["rope_parameters"]
    for key in ("architectures", "hidden_size", "head_dim", "attention_bias", "mlp_bias", "eos_token_id", "vocab_size"):
        assert found[key] == expected[key], key
    assert load_generation_config(files.folder).eos_token_id == [257]
    own, theirs = (load_tokenizer(folder) for folder in (files.folder, tmp_path / "base"))
    assert own("the oak, 3 tins</s>").input_ids == theirs("the oak, 3 tins</s>").input_ids


def test_parts_without_an_index_are_one_model(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        save_file(part, base / f"model-{number + 1:05d}-of-00002.safetensors", metadata={"format": "pt"})
    shutil.copy(tiny_base / "model.safetensors", base / "consolidated.safetensors")  # the same in another layout
    found = load_base(str(base), quantization="none", compute_dtype="float32")[0].state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())
