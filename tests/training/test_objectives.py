"""Runs of every objective: continued, in two processes, replayed, merged and verified like those of fine-tuning."""

import json

import pytest

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import ModelError
from qlora.proof import verify
from qlora.training import evaluate, merge, train
from qlora.training.replay import replay
from tests.tiny import POISON, run_config, write_jsonl
from tests.training.ranks import needs_fork, train_in_two
from tests.training.same_run import assert_same_run, lines_of

pytestmark = pytest.mark.slow


def pair_rows(mark=""):
    """Return preferences, of which one has a mark."""
    return [
        {"prompt": f"Q{number}?" + mark * (number == 5), "chosen": "yes, " * (1 + number % 5), "rejected": "no " * 3}
        for number in range(16)
    ]


def rated_rows(mark=""):
    """Return rated answers, of which one has a mark."""
    return [
        {
            "prompt": f"Q{number}?" + mark * (number == 5),
            "completion": "so " * (1 + number % 5),
            "label": number % 3 > 0,
        }
        for number in range(20)
    ]


# Rows and settings of an objective.
OBJECTIVES = {
    "dpo": (pair_rows, {"train__preference": {"sft_weight": 0.1}, "lora__dropout": 0.1}),
    "orpo": (pair_rows, {"lora__kind": "dora", "data__packing": False}),
    "reward": (pair_rows, {"train__reward": {"center": 0.01}}),
    "kto": (rated_rows, {"train__preference": {"beta": 0.5}, "train__neftune_alpha": 5}),
}


@pytest.fixture(params=OBJECTIVES)
def configure(request, tiny_base, tmp_path):
    """Build a config of a run of an objective."""
    rows, settings = OBJECTIVES[request.param]

    def build(name, base=tiny_base, mark="", **more):
        data = write_jsonl(tmp_path / f"{name}.jsonl" if mark else tmp_path / "rows.jsonl", rows(mark))
        every = {"train__objective": request.param, "train__learning_rate": 2e-3, "train__eval_every": 2}
        return load_config(run_config(base, data, tmp_path / name, **every | settings | more))

    return build


def test_a_continued_run_is_the_whole_one_and_its_merge_is_verified(configure, tmp_path):
    whole = train(configure("whole"))
    train(configure("run"), stop_at=3)
    train(configure("run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    first, *_, trained = whole.eval_losses.values()
    assert trained < first
    merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    for folder in (None, tmp_path / "merged"):
        report = verify(tmp_path / "run", folder)
        assert report.matches, report.problems
    found = evaluate(tmp_path / "run")
    last = [line for line in lines_of(tmp_path / "run") if "eval_loss" in line][-1]
    # Padded batches take torch's attention, which rounds differently in bf16 than that of documents.
    assert found.loss == pytest.approx(last["eval_loss"], rel=2e-2)
    assert found.metrics == pytest.approx({name: last[f"eval_{name}"] for name in found.metrics}, rel=0.02, abs=0.02)
    assert found.perplexity is None


@pytest.mark.parametrize("configure", ["kto"], indirect=True)
def test_merges_are_compared_by_a_loss_that_needs_no_reference(configure, tmp_path):
    train(configure("run", train__max_steps=2))
    report = merge(tmp_path / "run", tmp_path / "merged", dtype="float32", onto="best")
    assert any("those of the preferred answers' tokens" in note for note in report.notes)
    assert report.losses.keys() == {"dequantized", "original"}
    assert not any("is worse than" in problem for problem in verify(tmp_path / "run", tmp_path / "merged").problems)


@needs_fork
def test_two_processes_train_what_one_trains_with_twice_the_batch(configure, tmp_path):
    exact = {
        "train__max_steps": 3, "model__compute_dtype": "float32", "train__optimizer": "adamw_32bit",
        "lora__dropout": 0.0, "lora__dtype": "float32", "train__micro_batch_size": 2,
    }  # fmt: skip
    one = train(configure("one", **exact))
    configure("two", **exact | {"train__micro_batch_size": 1})
    two = train_in_two(tmp_path / "two.yaml")
    assert two["losses"] == pytest.approx(one.losses, rel=1e-3)
    assert list(two["eval_losses"].values()) == pytest.approx(list(one.eval_losses.values()), rel=1e-3)


def test_a_step_that_is_not_finite_names_its_rows_and_is_replayed(configure, poisoned_base, tmp_path):
    config = configure("run", poisoned_base, POISON, data__eval=None)
    with pytest.raises(ModelError, match="--replay"):
        train(config)
    (saved,) = RunDirectory(tmp_path / "run").path.glob("**/*.safetensors")
    report = replay(config, saved)
    assert not report.is_finite
    assert 6 in next(iter(report.rows.values()))
    assert json.dumps(report.as_dict())
