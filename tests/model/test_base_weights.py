"""The reader of a base's weights: the same names, shapes and values in every supported format."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.model import BaseWeights
from qlora.model.quantization import nf4_settings
from qlora.nf4 import QUANT_STATE, dequantize, quantize
from tests.tiny import make_tokenizer

CPU = torch.device("cpu")
WEIGHT = "model.layers.1.mlp.down_proj.weight"
STATE = f"{WEIGHT}{QUANT_STATE}nf4"


def save_in_4bit(base, folder, double_quant=True):
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=nf4_settings(double_quant, torch.bfloat16)
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def open_base(folder):
    return BaseWeights(BaseFiles.resolve(str(folder)))


@pytest.fixture(scope="module")
def base_in_4bit(tiny_base, tmp_path_factory):
    return save_in_4bit(tiny_base, tmp_path_factory.mktemp("base") / "4bit")


def test_plain_tensors_are_read_as_stored(tiny_base):
    stored, weights = load_file(tiny_base / "model.safetensors"), open_base(tiny_base)
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert weights.num_parameters == sum(tensor.numel() for tensor in stored.values())
    for name, tensor in stored.items():
        assert not weights.is_4bit(name)
        assert weights.is_floating_point(name)
        assert weights.dtype(name) == tensor.dtype
        assert torch.equal(weights.read(name), tensor), name
        assert torch.equal(weights.read(name, slice(1, 3)), tensor[1:3]), name


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_base_in_4_bits_has_the_weights_of_the_one_it_was_made_from(double_quant, tiny_base, tmp_path):
    plain, packed = open_base(tiny_base), open_base(save_in_4bit(tiny_base, tmp_path / "4bit", double_quant))
    assert packed.shapes == plain.shapes
    assert packed.num_parameters == plain.num_parameters
    in_4bit = [name for name in packed.shapes if packed.is_4bit(name)]
    assert len(in_4bit) == 14
    for name in plain.shapes:
        assert packed.is_floating_point(name)
        if name in in_4bit:
            codes, state = packed.read_4bit(name, CPU)
            assert state.nested == double_quant
            expected = dequantize(*quantize(plain.read(name), double_quant), torch.float32)
            assert torch.equal(dequantize(codes, state, torch.float32), expected), name
        else:
            assert torch.equal(packed.read(name), plain.read(name)), name


def damage(folder, target, change):
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def set_state(text):
    return lambda tensors: tensors.update({STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(STATE),
        set_state("{"),
        set_state(json.dumps({})),
        set_state(json.dumps({"shape": 3})),
        set_state(json.dumps({"shape": [64, "172"]})),
        set_state(json.dumps({"shape": [-64, -172]})),
        set_state(json.dumps({"shape": [64, 10**9]})),
    ],
)
def test_a_damaged_state_is_refused_with_its_weight(change, base_in_4bit, tmp_path):
    folder = damage(base_in_4bit, tmp_path / "damaged", change)
    with pytest.raises(ModelError, match=rf"damaged: the 4-bit state of {WEIGHT} is damaged .*; download it again"):
        open_base(folder)
