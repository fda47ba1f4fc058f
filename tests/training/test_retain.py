"""Rows of an older task: evaluated with every evaluation, never trained on, and reported wherever a run is."""

import json

import pytest

from qlora import Callback
from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.data import eval_batches
from qlora.errors import ConfigError, DataError
from qlora.export.card import write_card
from qlora.model import datasets_from_section, load_run
from qlora.model import evaluate as evaluate_batches
from qlora.training import evaluate, plan_run, preview, train
from tests.cli import run as run_cli
from tests.tiny import write_jsonl
from tests.training.same_run import lines_of

pytestmark = pytest.mark.slow


@pytest.fixture
def old_rows(tmp_path):
    rows = [{"instruction": f"Old {number}", "output": "the answer of old " * (1 + number % 3)} for number in range(7)]
    return write_jsonl(tmp_path / "old.jsonl", rows)


def own_lines(folder):
    """Return the lines without what evaluations of retained rows add, and without lines of these alone."""
    lines = [{key: value for key, value in line.items() if not key.startswith("retain_")} for line in lines_of(folder)]
    return [line for line in lines if len(line) > 2]


@pytest.mark.parametrize("packing", [True, False])
def test_its_loss_is_measured_and_the_steps_are_the_same(packing, configure, old_rows, tmp_path):
    plain = train(configure("plain", data__packing=packing))
    seen = []

    class Seen(Callback):
        def on_retain_evaluation(self, step, evaluation):
            seen.append((step, evaluation.loss))

    config = configure(data__packing=packing, data__retain=str(old_rows))
    result = train(config, callbacks=[Seen()])
    assert list(result.retain_losses) == [0, 2, 4, 6]
    assert plain.retain_losses == {}
    assert dict(seen) == result.retain_losses
    assert own_lines(tmp_path / "run") == lines_of(tmp_path / "plain")
    model, tokenizer = load_run(result.run_dir)
    datasets = datasets_from_section(config.data, tokenizer, 0, own_template=True)
    assert len(datasets.retain) == 7
    capacity = config.data.max_seq_len if packing else None
    expected = evaluate_batches(model, eval_batches(datasets.retain, 2, capacity)).loss
    assert result.retain_losses[6] == pytest.approx(expected, rel=1e-3)
    assert evaluate(result.run_dir).retain_loss == pytest.approx(expected, rel=1e-2)
    assert evaluate(result.run_dir).as_dict()["retain_loss"] is not None
    assert evaluate(result.run_dir, data=old_rows).retain_loss is None


def test_without_held_out_rows_it_is_measured_too(configure, old_rows):
    result = train(configure(data__eval=None, data__retain={"path": str(old_rows), "max_rows": 3}))
    assert list(result.retain_losses) == [0, 2, 4, 6]
    assert result.eval_losses == {}


def test_it_may_change_within_a_run(configure, old_rows, tmp_path):
    train(configure(), stop_at=3)
    result = train(configure(data__retain=str(old_rows)))
    assert result.status == "finished"
    assert list(result.retain_losses) == [4, 6]
    train(configure("whole"))
    assert own_lines(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_it_is_in_the_record_the_plan_the_preview_and_the_card(configure, old_rows, tmp_path):
    config = configure(data__retain=str(old_rows))
    assert len(plan_run(config).datasets.retain) == 7
    result = preview(config)
    assert (result.retain_examples, len(result.reports)) == (7, 2)
    trained = train(config)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (report,) = record["retain"]
    assert (report["source"], report["examples"]) == (str(old_rows), 7)
    assert [each["source"] for each in record["data"]] != [str(old_rows)]
    run = RunDirectory(tmp_path / "run")
    write_card(tmp_path, "release", run, tmp_path, {"dtype": "float16"})
    card = (tmp_path / "README.md").read_text()
    assert "7 of an older task (old.jsonl) only to measure what is retained" in card
    for step in (0, 6):
        assert f"| {step} | {trained.retain_losses[step]:.4f} on retained rows |" in card


def test_the_command_prints_it(configure, old_rows, tmp_path):
    configure(data__retain=str(old_rows))
    config = tmp_path / "run.yaml"
    result = run_cli("train", config)
    assert result.code == 0
    assert "retained loss" in result.out
    assert run_cli("train", config, "data.retain=absent.jsonl", f"train.output_dir={tmp_path / 'other'}").code == 2


@pytest.mark.parametrize(("value", "error", "message"), [
    ("absent.jsonl", ConfigError, "Data file not found: absent.jsonl"),
    ("empty.jsonl", DataError, "empty.jsonl"),
])  # fmt: skip
def test_rows_that_cant_be_read_are_reported_before_training(value, error, message, configure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(error, match=message):
        train(configure(data__retain=value))
    assert not (tmp_path / "run").exists()


def test_a_path_is_made_absolute(configure, old_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(old_rows.parent)
    train(configure(data__retain="old.jsonl"), stop_at=1)
    assert load_config(tmp_path / "run" / "config.yaml").data.retain[0].path == str(old_rows)
