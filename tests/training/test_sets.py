"""Further sets to evaluate on, such as rows of an older task: measured, never trained on, and reported."""

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
        def on_other_evaluation(self, step, name, evaluation):
            assert name == "retain"
            seen.append((step, evaluation.loss))

    config = configure(data__packing=packing, data__retain=str(old_rows))
    result = train(config, callbacks=[Seen()])
    assert list(result.evaluations["retain_loss"]) == [0, 2, 4, 6]
    assert plain.evaluations.keys() == {"eval_loss"}
    assert dict(seen) == result.evaluations["retain_loss"]
    assert own_lines(tmp_path / "run") == lines_of(tmp_path / "plain")
    model, tokenizer = load_run(result.run_dir)
    datasets = datasets_from_section(config.data, tokenizer, 0, own_template=True)
    assert len(datasets.held_out["retain"]) == 7
    capacity = config.data.max_seq_len if packing else None
    expected = evaluate_batches(model, eval_batches(datasets.held_out["retain"], 2, capacity)).loss
    assert result.evaluations["retain_loss"][6] == pytest.approx(expected, rel=1e-3)
    assert evaluate(result.run_dir).others["retain_loss"] == pytest.approx(expected, rel=1e-2)
    assert evaluate(result.run_dir).as_dict()["retain_loss"] is not None
    assert evaluate(result.run_dir, data=old_rows).others == {}


def test_several_named_sets_are_each_evaluated(configure, old_rows, alpaca_file, tmp_path):
    plain = train(configure("plain"))
    sets = {"main": 0.2, "old": str(old_rows), "both": [{"path": str(old_rows), "max_rows": 2}, str(alpaca_file)]}
    config = configure(data__eval=sets, data__retain=str(old_rows))
    result = train(config)
    names = {"eval_loss", "eval_old_loss", "eval_both_loss", "retain_loss"}
    assert result.evaluations.keys() == names
    assert result.eval_losses == plain.eval_losses  # further sets leave the first one and the steps as they are
    assert result.losses == plain.losses
    assert result.evaluations["eval_old_loss"] == result.evaluations["retain_loss"]
    record = RunDirectory(tmp_path / "run").read_record()
    assert record.held_out == {"eval": 8, "eval_old": 7, "eval_both": 42, "retain": 7}
    assert record.examples.eval == 8
    report = evaluate(result.run_dir)
    assert report.as_dict().keys() >= {"loss", "eval_old_loss", "eval_both_loss", "retain_loss"}
    assert report.others["eval_old_loss"] == pytest.approx(result.evaluations["eval_old_loss"][6], rel=1e-2)
    write_card(tmp_path, "release", RunDirectory(tmp_path / "run"), tmp_path, {"dtype": "float16"})
    card = (tmp_path / "README.md").read_text()
    assert "8 held out, 7 as eval_old, 42 as eval_both, 7 of an older task" in card
    assert f"| 6 | {result.evaluations['eval_old_loss'][6]:.4f} old loss |" in card
    assert "old loss" in run_cli("eval", tmp_path / "run").out
    # Paths in sets are made absolute, and may be moved.
    assert load_config(tmp_path / "run" / "config.yaml").data.eval["old"][0].path == str(old_rows)
    (tmp_path / "new").mkdir()
    moved = old_rows.rename(tmp_path / "new" / "old.jsonl")
    again = {"main": 0.2, "old": str(moved), "both": [{"path": str(moved), "max_rows": 2}, str(alpaca_file)]}
    assert "Already finished" in train(configure(data__eval=again, data__retain=str(moved))).notes[0]
    with pytest.raises(ConfigError, match=r"data\.eval\.old\[0\]\.path"):
        train(configure(data__eval=again | {"old": str(alpaca_file)}))


def test_held_out_rows_of_every_set_are_left_out_of_training(configure, alpaca_file, old_rows):
    """With data.deduplicate, but not rows of data.retain."""
    half = {"path": str(alpaca_file), "max_rows": 20}
    config = configure(data__eval={"a": str(old_rows), "b": half}, data__deduplicate=True)
    assert len(plan_run(config).datasets.train) == 20
    config = configure(data__eval=str(old_rows), data__retain=half, data__deduplicate=True)
    assert len(plan_run(config).datasets.train) == 40


@pytest.mark.parametrize(("value", "message"), [
    ({"a": 0.1, "b": 0.2}, "has a share of the rows in a and b; only one set can have one"),
    ({"two words": 0.1}, "has a set named 'two words'; a name has letters"),
    ({"a": 0.1, "b": None}, "has nothing in the set b"),
    ({"a": {"b": "rows.jsonl"}}, "has nothing in the set a"),
    ({}, "should name a set at least"),
])  # fmt: skip
def test_impossible_sets_are_refused(value, message, configure):
    with pytest.raises(ConfigError, match=message):
        configure(data__eval=value)


def test_without_held_out_rows_it_is_measured_too(configure, old_rows):
    result = train(configure(data__eval=None, data__retain={"path": str(old_rows), "max_rows": 3}))
    assert list(result.evaluations["retain_loss"]) == [0, 2, 4, 6]
    assert result.eval_losses == {}


def test_it_may_change_within_a_run(configure, old_rows, tmp_path):
    train(configure(), stop_at=3)
    result = train(configure(data__retain=str(old_rows)))
    assert result.status == "finished"
    assert list(result.evaluations["retain_loss"]) == [4, 6]
    train(configure("whole"))
    assert own_lines(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_it_is_in_the_record_the_plan_the_preview_and_the_card(configure, old_rows, tmp_path):
    config = configure(data__retain=str(old_rows))
    assert len(plan_run(config).datasets.held_out["retain"]) == 7
    result = preview(config)
    assert (result.held_out["retain"], len(result.reports)) == (7, 2)
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
        assert f"| {step} | {trained.evaluations['retain_loss'][step]:.4f} retained loss |" in card


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
