"""A search for a learning rate: its trials are those of separate runs, and it leaves nothing behind."""

import math
import random
import sys

import pytest

import qlora
from qlora.errors import ConfigError, ModelError
from qlora.training.tune import ROUNDS, plan_rounds
from tests.tiny import POISON, make_poisoned_base, run_config, write_jsonl

SETTINGS = {"lora__dropout": 0.1, "train__max_steps": 9, "train__learning_rate": 3e-3, "train__warmup_steps": 3}


@pytest.fixture
def configure(tiny_base, alpaca_file, tmp_path):
    def build(name="run", base=tiny_base, data=alpaca_file, **settings):
        return qlora.load_config(run_config(base, data, tmp_path / name, **(SETTINGS | settings)))

    return build


def cost(rounds, num_rates):
    """Return the steps that all rates are trained for."""
    steps, before = 0, 0
    for end in rounds:
        steps += num_rates * (end - before)
        before, num_rates = end, math.ceil(num_rates / 2)
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_the_rounds_use_the_budget_and_no_more(seed):
    rng = random.Random(seed)
    num_rates, step, evaluation = rng.randrange(1, 9), rng.uniform(0.1, 3), rng.uniform(0, 9)
    evaluations = sum(math.ceil(num_rates / 2**place) for place in range(ROUNDS)) * evaluation
    first = rng.randrange(1, 50)
    budget = cost([first, 2 * first, 4 * first], num_rates) * step + evaluations
    assert plan_rounds(num_rates, budget * 1.0001, step, evaluation, 10_000) == [first, 2 * first, 4 * first]
    assert plan_rounds(num_rates, budget * 1e9, step, evaluation, 100) == [25, 50, 100]
    least = cost([1, 2, 4], num_rates) * step + evaluations
    with pytest.raises(ConfigError, match=f"an evaluation .* s, so {math.ceil(least)}s is the least"):
        plan_rounds(num_rates, least * 0.999, step, evaluation, 10_000)


@pytest.mark.parametrize(("total", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [1, 2, 4])])
def test_a_run_of_few_steps_has_no_round_beyond_its_end(total, expected):
    assert plan_rounds(5, 1e9, 1.0, 1.0, total) == expected


def test_each_rate_has_the_losses_of_a_run_of_its_own(configure, tmp_path):
    """Rates are continued from where they were, in one process: bit for bit, also with groups and dropout."""
    shared = {"train__learning_rates": {"lora_A": 1e-3, "lora_B": "2x"}}
    report = qlora.tune(configure(**shared), "1h")
    assert report.rounds == [2, 4, 8]
    assert [trial.learning_rate for trial in report.trials] == [3.33e-4, 1e-3, 3e-3, 9e-3, 2.7e-2]
    assert sorted(len(trial.losses) for trial in report.trials) == [1, 1, 2, 3, 3]
    for trial in (trial for trial in report.trials if len(trial.losses) > 1):
        settings = {"train__max_steps": 8, "train__eval_every": 2, "train__learning_rate": trial.learning_rate}
        warmup = {"train__warmup_steps": None, "train__warmup_ratio": 3 / 9}
        result = qlora.train(configure(f"alone-{trial.learning_rate}", **(shared | settings | warmup)))
        assert trial.losses == {step: result.eval_losses[step] for step in trial.losses}
        assert report.first_loss == result.eval_losses[0]
    assert not (tmp_path / "run").exists()


def test_the_better_half_goes_on_and_the_best_of_the_last_round_wins(configure):
    report = qlora.tune(configure(), "1h")
    for place, steps in enumerate(report.rounds[:-1]):
        compared = {trial.learning_rate: trial.losses[steps] for trial in report.trials if steps in trial.losses}
        kept = {trial.learning_rate for trial in report.trials if report.rounds[place + 1] in trial.losses}
        assert kept == set(sorted(compared, key=compared.__getitem__)[: math.ceil(len(compared) / 2)])
    last = {trial.learning_rate: trial.losses.get(report.rounds[-1], math.inf) for trial in report.trials}
    assert report.learning_rate == min(last, key=last.__getitem__)
    assert f"learning rate {report.learning_rate:g}" in repr(report)


def test_a_rate_that_other_keys_do_not_allow_loses_and_is_reported(configure):
    report = qlora.tune(configure(train__learning_rate=0.2, train__max_steps=1, train__warmup_steps=0), "1h")
    assert report.trials[-1].failure == "train.learning_rate should be less than 1"
    assert report.notes[0] == "Learning rate 1.8 failed: train.learning_rate should be less than 1."
    assert report.learning_rate != 1.8


def test_auto_is_the_middle(configure):
    config = configure(train__learning_rate="auto", train__max_steps=1, train__warmup_steps=0)
    assert qlora.tune(config, "1h").trials[2].learning_rate > 1e-3


def test_rates_whose_numbers_are_not_finite_lose(tmp_path, configure):
    base = make_poisoned_base(tmp_path / "poisoned", seed=0)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"a row of many plain words {POISON}"}] * 20)
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [{"text": "whole"}])
    config = configure(
        base=base,
        data=data,
        data__eval=str(held_out),
        train__max_steps=1,
        train__warmup_steps=0,
        data__deduplicate=False,
    )
    with pytest.raises(ModelError, match=r"No learning rate has a finite loss\. Learning rate 0.000333 failed: step 1"):
        qlora.tune(config, "1h")


@pytest.mark.parametrize(("settings", "budget", "message"), [
    ({"data__eval": None}, "10m", "data.eval holds out no example"),
    ({"data__eval": 1e-6}, "10m", "data.eval holds out no example"),
    ({}, "10", "budget: '10' should be a duration such as 90s, 10m or 2h"),
    ({}, 600, "budget: 600 should be a duration"),
    ({}, "0s", "budget: '0s' should be a duration"),
    ({}, "0.001s", "budget: 0.001s is too short: a step takes"),
])  # fmt: skip
def test_what_can_not_be_compared_is_refused(configure, settings, budget, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        qlora.tune(configure(**settings), budget)
    assert not (tmp_path / "run").exists()


def test_no_metric_of_answers_is_loaded(configure, tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("raise SystemExit('the file was run')")
    seen = []
    monkeypatch.setattr(
        sys.modules["qlora.training.tune"], "_search", lambda assembly, *_: seen.append(assembly.scorer.names)
    )
    keys = {"eval__metrics": [f"{path}:wer"], "data__eval": 0.3, "train__early_stopping": {"metric": "eval_wer"}}
    qlora.tune(configure(**keys), "1m")
    assert seen == [[]]
