"""Bases in unsupported formats: refused with the same sentence in every verb, before anything is loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.config import load_config
from qlora.errors import ModelError
from qlora.export import merge
from qlora.export.quantize import quantize_model
from qlora.files import BaseFiles
from qlora.memory.estimate import estimate
from qlora.model import BITSANDBYTES_4BIT, SUPERVISED, load_base, load_model, weight_format
from qlora.model.formats import PLAIN
from qlora.proof.verify import verify
from qlora.training import plan_run, train
from tests.tiny import run_config

LAYER = "model.layers.0.mlp.up_proj"
REMEDY = "which is not supported; use the same model in 16-bit safetensors."

DECLARED = {
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "AWQ": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "bitsandbytes 8-bit": {"load_in_8bit": True, "load_in_4bit": False},
    "None": {"bits": 3},
}
# Tensors instead of a layer's weight, whose config does not declare them.
UNDECLARED = {
    "GPTQ or AWQ": lambda weight: {".qweight": torch.zeros(8, 8).int(), ".scales": torch.ones(8)},
    "compressed-tensors": lambda weight: {".weight_packed": torch.zeros(8, 8).int(), ".weight_scale": torch.ones(8)},
    "bitsandbytes 8-bit": lambda weight: {".weight": weight.to(torch.int8), ".SCB": torch.ones(172)},
}


@pytest.fixture
def base(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


def declare(base, settings):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def replace_layer(base, make):
    tensors = load_file(base / "model.safetensors")
    tensors |= {f"{LAYER}{suffix}": tensor for suffix, tensor in make(tensors.pop(f"{LAYER}.weight")).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def verbs(base, tmp_path):
    """Return calls of every verb on a base; the data does not exist, so that reading it would be another error."""
    config = load_config(run_config(base, tmp_path / "missing.jsonl", tmp_path / "run"))
    return {
        "load": lambda: load_base(str(base)),
        "load in 16 bits": lambda: load_base(str(base), quantization="none"),
        "talk to": lambda: load_model(str(base)),
        "train": lambda: train(config),
        "train --dry-run": lambda: plan_run(config),
        "estimate": lambda: estimate(config, SUPERVISED, "cpu"),
        "quantize": lambda: quantize_model(str(base), tmp_path / "out"),
    }


def assert_refused(base, tmp_path, stored_in):
    for name, call in verbs(base, tmp_path).items():
        with pytest.raises(ModelError) as caught:
            call()
        assert str(caught.value) == f"{base} is stored in {stored_in}, {REMEDY}", name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stored_in", DECLARED)
def test_a_declared_format_is_refused_in_every_verb(stored_in, base, tmp_path):
    declare(base, DECLARED[stored_in])
    assert_refused(base, tmp_path, stored_in)


@pytest.mark.parametrize("stored_in", UNDECLARED)
def test_a_format_that_only_the_tensors_show_is_refused_in_every_verb(stored_in, base, tmp_path):
    replace_layer(base, UNDECLARED[stored_in])
    assert_refused(base, tmp_path, stored_in)


def test_a_config_alone_is_enough_to_refuse(base, tmp_path):
    (base / "model.safetensors").unlink()
    declare(base, DECLARED["GPTQ"])
    with pytest.raises(ModelError, match="is stored in GPTQ"):
        verbs(base, tmp_path)["estimate"]()


def test_a_run_whose_base_was_replaced_is_not_merged_or_verified(base, alpaca_file, tmp_path):
    train(load_config(run_config(base, alpaca_file, tmp_path / "run", train__max_steps=1)))
    declare(base, DECLARED["AWQ"])
    for call in (lambda: merge(tmp_path / "run", tmp_path / "out", force=True), lambda: verify(tmp_path / "run")):
        with pytest.raises(ModelError, match=f"^{base} is stored in AWQ, {REMEDY}"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [None, {}])
def test_nothing_declared_is_plain(settings, base):
    declare(base, settings)
    assert weight_format(BaseFiles.resolve(str(base))) == PLAIN
    load_base(str(base))


@pytest.mark.parametrize("settings", ["fp8", [1]])
def test_a_declaration_that_is_no_object_is_refused(settings, base):
    declare(base, settings)
    with pytest.raises(ModelError, match=r"config\.json has quantization_config: .* not an object; download it again"):
        load_base(str(base))


def test_an_adapter_made_elsewhere_is_not_merged_into_an_unsupported_base(base, alpaca_file, tmp_path):
    train(load_config(run_config(base, alpaca_file, tmp_path / "run", train__max_steps=1)))
    declare(base, DECLARED["GPTQ"])
    adapter = shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "adapter")
    with pytest.raises(ModelError, match=f"^{base} is stored in GPTQ, {REMEDY}"):
        merge(adapter, tmp_path / "out", base=str(base), onto="original")


def test_tensors_and_declaration_have_to_agree(tiny_base, base, tmp_path):
    quantize_model(str(tiny_base), tmp_path / "4bit")
    assert weight_format(BaseFiles.resolve(str(tmp_path / "4bit"))) == BITSANDBYTES_4BIT
    declare(base, json.loads((tmp_path / "4bit" / "config.json").read_text())["quantization_config"])
    declare(tmp_path / "4bit", None)
    fp8 = shutil.copytree(tiny_base, tmp_path / "fp8")
    replace_layer(
        fp8, lambda weight: {".weight": weight.to(torch.float8_e4m3fn), ".weight_scale_inv": torch.ones(2, 1)}
    )
    plain = "16 or 32 bits"
    for folder, declared in ((base, "bitsandbytes 4-bit"), (tmp_path / "4bit", plain), (fp8, plain)):
        with pytest.raises(
            ModelError, match=rf"declares weights in {declared}, but .* correct its quantization_config"
        ):
            load_base(str(folder))
