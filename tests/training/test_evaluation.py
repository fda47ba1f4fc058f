"""qlora.evaluate: the same loss from a run, its config and Python, on held-out rows or another file."""

import math
from dataclasses import replace

import pytest

import qlora
from qlora.config import load_config
from qlora.errors import ConfigError
from tests.tiny import write_jsonl


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_base, alpaca_file):
    from tests.tiny import run_config

    folder = tmp_path_factory.mktemp("evaluated")
    qlora.train(load_config(run_config(tiny_base, alpaca_file, folder / "run")))
    return folder / "run"


def test_a_run_is_evaluated_as_its_training_did(run_dir):
    report = qlora.evaluate(run_dir, device="cpu")
    lines = qlora.train(load_config(run_dir / "config.yaml")).eval_losses
    # Padded batches take torch's attention, which rounds differently in bf16 than that of documents.
    assert report.loss == pytest.approx(lines[max(lines)], rel=5e-4)
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    assert report.as_dict().keys() >= {"loss", "perplexity", "bits_per_byte", "examples", "supervised_tokens"}


def test_a_config_is_evaluated_by_its_base(run_dir):
    base = qlora.evaluate(load_config(run_dir / "config.yaml"), device="cpu")
    assert base.loss > qlora.evaluate(run_dir, device="cpu").loss
    assert "adapter" not in base.model


def test_every_row_of_another_file_counts(run_dir, tmp_path):
    rows = [{"instruction": f"Say {word}", "output": word} for word in ("oak", "fern", "tin")]
    report = qlora.evaluate(run_dir, data=write_jsonl(tmp_path / "other.jsonl", rows), device="cpu")
    assert report.examples == 3


def test_bad_arguments_are_refused(run_dir):
    with pytest.raises(ConfigError, match=r"--data nope\.jsonl \(data= in Python\): Data file not found: nope\.jsonl"):
        qlora.evaluate(run_dir, data="nope.jsonl", device="cpu")
    with pytest.raises(ConfigError, match="batch_size: 0 should be 1 or more"):
        qlora.evaluate(run_dir, batch_size=0)
    config = load_config(run_dir / "config.yaml", ["data.eval=null"])
    with pytest.raises(ConfigError, match="holds out no example; name a file with --data"):
        qlora.evaluate(config, device="cpu")


def test_rows_that_the_objective_can_not_learn_from_are_refused(run_dir, tmp_path):
    pairs = [{"prompt": "Say oak", "chosen": "oak", "rejected": "tin"}] * 3
    with pytest.raises(ConfigError, match="sft can't learn from the preference rows"):
        qlora.evaluate(run_dir, data=write_jsonl(tmp_path / "pairs.jsonl", pairs), device="cpu")


@pytest.mark.parametrize(("metrics", "rows", "message"), [
    (["absent.py:score"], [{"instruction": "Say oak", "output": "oak"}], "there is no file .*absent"),
    (["nothing"], [{"instruction": "Say oak", "output": "oak"}], "'nothing' is unknown"),
    (["f1"], [{"text": "oak"}], "no held-out row has an answer in text"),
])  # fmt: skip
def test_what_can_not_be_scored_is_reported_before_the_model_is_loaded(metrics, rows, message, run_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qlora.model.restore.load_started_base", None)
        with pytest.raises(ConfigError, match=message):
            qlora.evaluate(run_dir, data=data, device="cpu", metrics=metrics)


def test_a_loss_that_is_none_of_tokens_names_no_tokens(run_dir):
    report = qlora.evaluate(run_dir, device="cpu")
    assert f"over {report.supervised_tokens:,} tokens" in repr(report)
    assert f"over {report.examples:,} examples" in repr(replace(report, perplexity=None))
