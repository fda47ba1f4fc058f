"""Names in files: the tensor found for a parameter is the one that transformers loads into it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, NemotronHConfig, Qwen3Config
from transformers.models.hrm_text import HrmTextConfig

from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.model import build_skeleton
from qlora.model.names import names_in_files, tensors_of_layers
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


def test_layers_without_a_tensor_of_their_own_are_named_with_what_they_are_made_of(tmp_path, tiny_base, seed):
    files = BaseFiles.resolve(str(make_base(tmp_path / "base", seed, HrmTextConfig)))
    layers = [f"model.L_module.layers.0.self_attn.{name}" for name in ("o_proj", "q_proj")]
    skeleton = build_skeleton(files)
    found = tensors_of_layers(skeleton, files.tensors, layers[:1], "base", "no.")
    assert found == {layers[0]: "model.L_module.layers.0.attn.o_proj.weight"}
    with pytest.raises(ModelError, match=r"^1 layers .*q_proj …; the first is made of .*gqkv_proj\.weight\), no\.$"):
        tensors_of_layers(skeleton, files.tensors, layers, "base", "no.")
    files = BaseFiles.resolve(str(tiny_base))
    with pytest.raises(
        ModelError, match=r"lack .*mlp\.up_prog\.weight …; the nearest name there is model\.layers\.0\.mlp\.up_proj"
    ):
        tensors_of_layers(build_skeleton(files), files.tensors, ["model.layers.0.mlp.up_prog"], "base", "no.")
