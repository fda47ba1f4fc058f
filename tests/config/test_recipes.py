"""Every recipe loads, can be listed, and adapts the architecture that it is for."""

import re
from pathlib import Path

import pytest

from qlora.config import RunConfig, load_config

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# A base's name and a folder of realdata/configs with the same architecture.
ARCHITECTURES = {
    r"meta-llama/.*Llama-3": "executorch_llama3-8B-instruct",
    r"meta-llama/.*Llama-2|huggyllama/llama": "Llama-2-7b-hf",
    r"mistralai/Mistral-7B": "Mistral-7B-v0.1",
    r"Qwen/Qwen3-\d+B$": "Qwen3-1.7B",
}

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def test_there_are_recipes():
    assert RECIPES


@each_recipe
def test_a_recipe_loads(recipe):
    assert isinstance(load_config(recipe), RunConfig)


@each_recipe
def test_a_recipe_begins_with_a_line_to_list_it_by(recipe):
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# \S.{9,}", first)


def test_no_two_recipes_train_into_the_same_directory():
    output_dirs = [load_config(recipe).train.output_dir for recipe in RECIPES]
    assert len(set(output_dirs)) == len(output_dirs)


@each_recipe
def test_a_recipes_targets_are_linears_of_its_base(recipe, realdata):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora.lora import match_targets

    config = load_config(recipe)
    folder = next((folder for name, folder in ARCHITECTURES.items() if re.match(name, config.model.base)), None)
    if folder is None:
        pytest.skip(f"no config like that of {config.model.base} in {realdata / 'configs'}")
    architecture = AutoConfig.from_pretrained(realdata / "configs" / folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    names = match_targets(model, config.lora.targets)
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in names)
    if config.lora.targets == "all-linear":
        assert len(names) == 7 * architecture.num_hidden_layers
    else:
        assert len(names) >= architecture.num_hidden_layers
