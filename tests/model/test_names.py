"""Names in files: the tensor found for a parameter is the one that transformers loads into it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, NemotronHConfig, Qwen3Config
from transformers.models.hrm_text import HrmTextConfig

from qlora.files import BaseFiles
from qlora.model import build_skeleton
from qlora.model.names import names_in_files
from tests.tiny import make_base

NEMOTRON = {"layers_block_type": ["attention", "mlp"]}


def names_of(folder):
    files = BaseFiles.resolve(str(folder))
    return names_in_files(build_skeleton(files), files.tensors)


@pytest.mark.parametrize(
    ("config_class", "sizes", "num_renamed", "num_converted"),
    [
        (LlamaConfig, {}, 0, 0),
        (Qwen3Config, {"tie_word_embeddings": True}, 0, 0),
        (NemotronHConfig, NEMOTRON, 10, 0),  # all but the head: `backbone.` is `model.`
        (MixtralConfig, {"num_local_experts": 2}, 2, 4),  # experts are separate in the files
        (HrmTextConfig, {}, 4, 24),  # queries, keys and values are one tensor
    ],
)
def test_the_tensor_found_is_the_one_that_is_loaded(config_class, sizes, num_renamed, num_converted, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, config_class, **sizes)
    one_to_one, converted = names_of(base)
    stored = load_file(base / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    tied = {"lm_head.weight"} if sizes.get("tie_word_embeddings") else set()
    assert {*one_to_one, *converted} == set(loaded) - tied
    for parameter, name in one_to_one.items():
        assert torch.equal(loaded[parameter], stored[name]), parameter
    for parameter, names in converted.items():
        assert all(loaded[parameter].numel() != stored[name].numel() for name in names), parameter
    assert sum(parameter != name for parameter, name in one_to_one.items()) == num_renamed
    assert len(converted) == num_converted


def test_files_of_the_inner_model_alone_lack_its_prefix(tiny_base, tmp_path):
    stored = load_file(tiny_base / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_base / "config.json").read_text())
    one_to_one, converted = names_of(tmp_path)
    assert one_to_one == {name: name.removeprefix("model.") for name in stored}
    assert not converted
