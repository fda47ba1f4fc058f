"""The learning rate of `auto`: the rule, its adjustments, and a run that uses it."""

import json

import pytest
from transformers import GPT2Config, LlamaConfig

from qlora.config import load_config
from qlora.errors import ConfigError
from qlora.training import plan_run, train
from qlora.training.auto_rate import auto_rate, resolve_rate
from tests.tiny import run_config, write_jsonl


def lora(model_type="llama", hidden=4096, rank=16, alpha=32.0, rslora=False):
    return auto_rate(model_type, hidden, rank, alpha / (rank**0.5 if rslora else rank)).value


@pytest.mark.parametrize(("model_type", "hidden", "expected"), [
    ("llama", 4096, 2.9e-4),  # Llama 3.1 8B, as "LoRA Without Regret" gives it
    ("qwen3", 4096, 4.7e-4),  # Qwen3 8B
    ("llama", 2000, 5e-4),
    ("qwen3_moe", 2000, 5e-4),
])  # fmt: skip
def test_the_rule_is_the_published_one(model_type, hidden, expected):
    assert lora(model_type, hidden) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("hidden", [576, 3072, 8192])
def test_another_family_takes_the_geometric_middle(hidden):
    assert lora("mistral", hidden) == pytest.approx((lora("llama", hidden) * lora("qwen2", hidden)) ** 0.5, rel=5e-3)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("alpha", [8, 32, 100])
def test_rate_times_scaling_is_that_of_the_rule(rank, alpha, rslora):
    """The first updates of the weight are proportional to the product."""
    scaling = alpha / (rank**0.5 if rslora else rank)
    assert lora(rank=rank, alpha=alpha, rslora=rslora) * scaling == pytest.approx(lora() * 32 / rank, rel=5e-3)


def test_a_tiny_alpha_does_not_lead_to_a_rate_above_a_tenth():
    found = auto_rate("llama", 64, 4, 1e-6)
    assert found.value == 0.1
    assert found.why.endswith("at most 0.1")


@pytest.fixture
def config(tiny_base, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {i} of the garden"} for i in range(20)])

    def make(**keys):
        return load_config(run_config(tiny_base, data, tmp_path / "run", **{"train__learning_rate": "auto"} | keys))

    return make


def test_a_run_uses_and_records_it_and_continues_with_it(config, tmp_path):
    settings = config()
    plan = plan_run(settings)
    rate, why = plan.in_use.learning_rate, plan.in_use.learning_rate_why
    assert rate == auto_rate("llama", 64, 4, 2.0).value
    assert f"learning rate {rate:g} (auto: 0.0005 · (2000 / 64)^0.781 for llama" in plan.summary()
    train(settings, stop_at=3)
    assert train(settings).status == "finished"
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line["learning_rate"] for line in lines if "loss" in line) == rate
    in_use = json.loads((tmp_path / "run/run.json").read_text())["in_use"]
    assert (in_use["learning_rate"], in_use["learning_rate_why"]) == (rate, why)
    assert "learning_rate: auto" in (tmp_path / "run/config.yaml").read_text()


def test_the_same_number_in_the_config_trains_the_same(config, tmp_path):
    rate = plan_run(config()).in_use.learning_rate
    auto = train(config())
    given = train(config(train__learning_rate=rate, train__output_dir=str(tmp_path / "given")))
    assert auto.losses == given.losses
    assert json.loads((tmp_path / "given/run.json").read_text())["in_use"]["learning_rate_why"] is None


def test_an_extended_run_announces_the_jump_of_its_rate(config):
    train(config(train__lr_scheduler="constant"))
    plan = plan_run(config(train__lr_scheduler="constant", train__max_steps=8))
    assert plan.notes == []  # both are short
    plan = plan_run(config(train__lr_scheduler="constant", train__max_steps=1000))
    assert "The learning rate jumps from" in plan.notes[0]


def test_groups_and_a_floor_are_checked_against_the_computed_rate(config):
    with pytest.raises(ConfigError, match=r"train.learning_rate is .* \(auto: .*, but train.min_learning_rate is"):
        resolve_rate(config(train__min_learning_rate=0.09), LlamaConfig(hidden_size=64))
    with pytest.raises(ConfigError, match=r"but train.learning_rates has a wrong value of lora_B: a learning rate of"):
        resolve_rate(config(train__learning_rates={"lora_B": "100x"}), LlamaConfig(hidden_size=64))


def test_a_base_that_names_its_width_otherwise_is_known(config):
    section, why = resolve_rate(config(), GPT2Config(n_embd=768))
    assert section.learning_rate == auto_rate("gpt2", 768, 4, 2.0).value
    assert "for gpt2, a middle" in why
