"""`qlora tune`: its table, JSON, image and config."""

import pytest

from qlora.config import load_config
from tests.cli import run
from tests.tiny import run_config


@pytest.fixture
def config(tiny_base, alpaca_file, tmp_path):
    return run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=4)


def test_it_prints_a_table_and_writes_the_config_with_the_best_rate(config, tmp_path):
    best, image = tmp_path / "best.yaml", tmp_path / "rates.png"
    arguments = ("train.min_learning_rate=1e-3", "--budget", "1h", "-o", best, "--plot", image)
    outcome = run("tune", config, *arguments)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[1].split() == ["learning", "rate", "step", "1", "step", "2", "step", "4"]
    assert len([line for line in lines[2:7] if line.split()]) == 5
    rate = float(lines[-1].removeprefix("Best: train.learning_rate="))
    assert image.read_bytes()[:4] == b"\x89PNG"
    assert best.read_text().startswith("# train.learning_rate: the best of 0.00111, 0.00333, 0.01")
    expected = load_config(config).model_dump()
    expected["train"] |= {"learning_rate": rate, "min_learning_rate": 1e-3}
    assert load_config(best).model_dump() == expected
    assert not (tmp_path / "run").exists()


def test_its_json_has_every_trial(config):
    report = run("tune", config, "train.max_steps=1", "--json").json()
    assert [trial["learning_rate"] for trial in report["trials"]] == [0.00111, 0.00333, 0.01, 0.03, 0.09]
    assert report["rounds"] == [1]


@pytest.mark.parametrize(("arguments", "message"), [
    (["-o", "{config}"], "already exists; name another file with -o"),
    (["-o", "{config}/no/best.yaml"], "can't be written: its folder does not exist"),
    (["--plot", "{config}/no/rates.png"], "can't be written: its folder does not exist"),
    (["data.eval=null"], "data.eval holds out no example"),
])  # fmt: skip
def test_wrong_use_is_one_message(config, arguments, message):
    outcome = run("tune", config, *(each.format(config=config) for each in arguments))
    assert outcome.code == 2
    assert message in outcome.error()


def test_a_wrong_budget_is_refused(config):
    outcome = run("tune", config, "--budget", "soon")
    assert outcome.code == 2
    assert "--budget soon: should be a duration such as 90s, 10m or 2h" in " ".join(outcome.err.split())
