"""The parts of a run, made from a config's sections."""

import pytest

from qlora.config import load_config
from qlora.errors import ConfigError
from qlora.lora import trained_rows
from qlora.model import adapt, base_from_section, optimizer_from_section
from tests.tiny import run_config


def rows_config(base, folder, modules=("embed_tokens",), **keys):
    keys = {f"train__{key}": value for key, value in ({"learning_rate": 1e-2} | keys).items()}
    return run_config(base, folder / "rows.jsonl", folder / "run", lora__modules_to_save=list(modules), **keys)


def test_rows_are_trained_at_the_embedding_learning_rate(tiny_base, tmp_path):
    """The first AdamW step moves every element by its rate, regardless of its gradient."""
    config = load_config(rows_config(tiny_base, tmp_path, embedding_learning_rate=1e-3))
    model, _ = base_from_section(config.model, "cpu")
    adapt(model, config.lora, 0)
    rows = {each.weight for _, each in trained_rows(model)}
    optimizer = optimizer_from_section(model, config.train.model_copy(update={"rounding": "master"}))
    assert sorted(group.rate for group in optimizer.flat.groups) == [pytest.approx(0.1), 1.0]
    before = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    optimizer.flat.grad.fill_(1.0)
    optimizer.step(1e-2)
    assert rows
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moved = (before[name].float() - parameter.float()).mean().item()
            assert moved == pytest.approx(1e-3 if parameter in rows else 1e-2, rel=0.1), name


def test_without_a_rate_of_its_own_everything_is_one_group(tiny_base, tmp_path):
    config = load_config(rows_config(tiny_base, tmp_path))
    model, _ = base_from_section(config.model, "cpu")
    adapt(model, config.lora, 0)
    (group,) = optimizer_from_section(model, config.train).flat.groups
    assert group.rate == 1.0


def test_an_embedding_learning_rate_without_trained_rows_is_refused(tiny_base, tmp_path):
    path = rows_config(tiny_base, tmp_path, modules=(), embedding_learning_rate=1e-3)
    with pytest.raises(ConfigError, match="no embedding or head is trained; set lora.modules_to_save or data.new_"):
        load_config(path)
