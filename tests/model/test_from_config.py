"""The parts of a run, made from a config's sections."""

import re

import pytest
import torch

from qlora.config import load_config
from qlora.errors import ConfigError
from qlora.lora import trained_rows
from qlora.model import adapt, base_from_section, optimizer_from_section
from tests.reference.adamw import AdamW
from tests.tiny import run_config


def rows_config(base, folder, modules=("embed_tokens",), **keys):
    keys = {key if "__" in key else f"train__{key}": value for key, value in ({"learning_rate": 1e-2} | keys).items()}
    return run_config(base, folder / "rows.jsonl", folder / "run", lora__modules_to_save=list(modules), **keys)


RATES = {"lora_A": 3e-3, "lora_B": "16x", "embeddings": "0.1x"}


def adapted(config):
    model = base_from_section(config.model, "cpu")
    adapt(model, config.lora, 0)
    return model


def group_of(name, rows, parameter):
    return "embeddings" if parameter in rows else name.rpartition(".")[2]


@pytest.mark.parametrize("groups", [["lora_B"], ["embeddings"], ["lora_A", "embeddings"], list(RATES)])
def test_each_group_moves_as_by_a_reference_adamw_at_its_own_rate(tiny_base, tmp_path, generator, groups):
    rates = {group: RATES[group] for group in groups}
    config = load_config(
        rows_config(tiny_base, tmp_path, learning_rates=rates, optimizer="adamw_32bit", lora__dtype="float32")
    )
    model = adapted(config)
    rows = {each.weight for _, each in trained_rows(model)}
    optimizer = optimizer_from_section(model, config.train)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    expected = {name: each.detach().clone() for name, each in trained.items()}
    references = {name: AdamW(value) for name, value in expected.items()}
    for step_rate in (1e-2, 4e-3):
        optimizer.flat.zero_grad()
        for name, parameter in trained.items():
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
            rate = rates.get(group_of(name, rows, parameter), "1x")
            factor = float(rate[:-1]) if isinstance(rate, str) else rate / 1e-2
            references[name].step(parameter.grad, step_rate * factor)
        optimizer.step(step_rate)
    assert rows
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_the_order_of_the_buffer_depends_on_the_groups_and_not_on_their_rates(tiny_base, tmp_path):
    def names(**keys):
        config = load_config(rows_config(tiny_base, tmp_path, **keys))
        return optimizer_from_section(adapted(config), config.train).flat.names

    rates = {"lora_B": 1e-2, "embeddings": "1x"}
    assert names(learning_rates=rates, learning_rate=1e-2) == names(learning_rates=rates, learning_rate=1e-3)
    assert names(learning_rates=rates) != names()


def test_a_rate_without_a_dot_which_yaml_reads_as_text_is_a_number(tiny_base, tmp_path):
    path = rows_config(tiny_base, tmp_path)
    config = load_config(path, ["train.learning_rates={lora_A: 5e-5, lora_B: 1e1x}"])
    assert config.train.learning_rates == {"lora_A": 5e-5, "lora_B": "1e1x"}


def test_without_a_rate_of_its_own_everything_is_one_group(tiny_base, tmp_path):
    config = load_config(rows_config(tiny_base, tmp_path))
    (group,) = optimizer_from_section(adapted(config), config.train).flat.groups
    assert group.rate == 1.0


@pytest.mark.parametrize(("rates", "message"), [
    ({"embeddings": 1e-3}, "has a rate of embeddings, but no embedding or head is trained; set lora.modules_to_save"),
    ({"magnitude": "2x"}, "has a rate of magnitude, but adapters of lora.kind lora have no magnitude"),
    ({"lora_C": 1e-3}, "has no group 'lora_C'; the groups are lora_A, lora_B, embeddings, magnitude"),
    ({"lora_B": "16 x 2"}, "lora_B: '16 x 2' should be a learning rate, or a factor such as 16x"),
    ({"lora_B": "16"}, "lora_B: a learning rate of 16 should be above 0 and below 1; a factor is written as 16x"),
    ({"lora_B": "100x"}, "has a wrong value of lora_B: a learning rate of 1 should be above 0 and below 1"),
    ({"lora_B": "0x"}, "a learning rate of 0 should be above 0"),
    ({"lora_A": 1.5}, "a learning rate of 1.5 should be above 0 and below 1"),
])  # fmt: skip
def test_a_rate_that_can_not_be_used_is_refused(tiny_base, tmp_path, rates, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(rows_config(tiny_base, tmp_path, modules=(), learning_rates=rates))
