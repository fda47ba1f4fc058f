"""A continued run is the uninterrupted one, bit for bit."""

import json
import os
import random
import shutil
import signal
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import yaml

from qlora.errors import CheckpointError, ConfigError
from qlora.files import hold_lock
from qlora.optim import OPTIMIZERS
from qlora.training import plan_run, train
from qlora.training.metrics import MetricsLog
from scripts.dev import kills
from tests.combinations import pairs
from tests.tiny import write_jsonl
from tests.training.ranks import needs_fork
from tests.training.same_run import assert_same_run, damage, lines_of, rewrite

pytestmark = pytest.mark.slow

# What a config adds to the loss while training.
ADDED = ({}, {"train__neftune_alpha": 5}, {"train__adversarial": {"epsilon": 0.1}}, {"train__keep": {"kl": 0.1}})

# What is evaluated, and whether answers are generated.
EVALUATIONS = (
    {"data__eval": 0.2}, {"data__eval": None},
    {"data__eval": 0.2, "eval__metrics": ["exact_match"], "eval__rows": 3, "eval__max_new_tokens": 4},
)  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "rounding", "packing", "dropout", "evaluation", "added"),
    pairs(tuple(OPTIMIZERS), ("stochastic", "master"), (True, False), (0.0, 0.1), EVALUATIONS, ADDED),
)
def test_a_run_stopped_after_any_step_continues_as_if_it_never_was(
    optimizer, rounding, packing, dropout, evaluation, added, configure, tmp_path, seed
):
    steps = 5
    settings = {"train__optimizer": optimizer, "train__rounding": rounding, "train__max_steps": steps}
    settings |= {"data__packing": packing, "lora__dropout": dropout, **evaluation, **added}
    train(configure("whole", **settings))
    first = 1 + seed % (steps - 1)
    assert train(configure(**settings), stop_at=first).steps == first
    assert train(configure(**settings)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_interrupted_run_continues_as_if_it_never_stopped(configure, interrupt_after, tmp_path, monkeypatch):
    settings = {"train__max_steps": 10}
    train(configure("whole", **settings))
    interrupt_after(3)
    first = train(configure(**settings))
    assert (first.status, first.steps) == ("interrupted", 3)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert not (tmp_path / "run" / "adapter").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    interrupt_after(9)  # the second epoch has begun
    assert train(configure(**settings)).steps == 9
    monkeypatch.undo()
    last = train(configure(**settings))
    assert (last.status, last.steps, len(last.losses)) == ("finished", 10, 10)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_killed_run_continues_from_its_last_checkpoint(configure, tmp_path, monkeypatch):
    """Lines after the checkpoint are written again, not twice."""
    train(configure("whole", train__save_every=2))
    original = MetricsLog.log_step

    def log_step(self, progress, report):
        original(self, progress, report)
        if progress.step == 5:
            raise SystemExit("killed")

    monkeypatch.setattr(MetricsLog, "log_step", log_step)
    with pytest.raises(SystemExit):
        train(configure(train__save_every=2))
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line][-1] == 5
    monkeypatch.undo()
    assert train(configure(train__save_every=2)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_parts_of_micro_batches_are_reported_when_a_run_continues(configure, stopped):
    checkpoint = stopped / "checkpoints" / "step-000002"
    rewrite(checkpoint, "progress.json", num_parts=2)
    train(configure())
    assert json.loads((stopped / "run.json").read_text())["in_use"]["micro_batch_parts"] == 2


@pytest.mark.parametrize("values", [
    {"step": 1.5}, {"step": -1}, {"step": True}, {"num_parts": 0}, {"skipped": 0.5}, {"tokens": None},
    {"loss_scale": 0.0}, {"loss_scale": float("nan")}, {"usual_loss": float("inf")}, {"more": 1},
])  # fmt: skip
def test_impossible_progress_is_refused(values, configure, stopped):
    rewrite(stopped / "checkpoints" / "step-000002", "progress.json", **values)
    with pytest.raises(CheckpointError, match="progress should be numbers"):
        train(configure())


@pytest.mark.parametrize("values", [{"settings": 3}, {"base": []}, {"data": [3]}, {"data": None}, {"in_use": None}])
def test_an_impossible_origin_is_refused(values, configure, stopped):
    rewrite(stopped / "checkpoints" / "step-000002", "origin.json", **values)
    with pytest.raises(CheckpointError, match="does not record what it was trained from"):
        train(configure())


@pytest.fixture
def forget_keys(stopped):
    """Rewrite a stopped run as one of a version without the newest keys."""

    def forget(added=("deduplicate", "max_rows"), added_of_sources=("header", "max_rows")):
        (checkpoint,) = (stopped / "checkpoints").iterdir()
        origin = json.loads((checkpoint / "origin.json").read_text())
        for key in added:
            del origin["settings"][f"data.{key}"]
        for source in origin["settings"]["data.train"]:
            for key in added_of_sources:
                del source[key]
        rewrite(checkpoint, "origin.json", settings=origin["settings"], examples=None)
        config = yaml.safe_load((stopped / "config.yaml").read_text())
        for key in added:
            del config["data"][key]
        (stopped / "config.yaml").write_text(yaml.safe_dump(config))

    return forget


def test_a_run_of_a_version_without_the_newest_keys_continues(configure, forget_keys, stopped, whole):
    forget_keys()
    assert train(configure()).status == "finished"
    assert_same_run(stopped, whole)


@pytest.mark.parametrize(("settings", "line"), [
    ({"data__deduplicate": True}, "data.deduplicate: false → true"),
    ({"data__max_rows": 39}, "data.max_rows: null → 39"),
])  # fmt: skip
@pytest.mark.parametrize("is_old", [False, True])
def test_a_run_does_not_go_on_with_other_rows(settings, line, is_old, configure, stopped, forget_keys):
    if is_old:
        forget_keys()
    with pytest.raises(ConfigError, match=line):
        train(configure(**settings))


def test_a_run_whose_examples_were_chosen_otherwise_does_not_go_on(configure, stopped):
    record = json.loads((stopped / "run.json").read_text())
    train_count = record["examples"]["train"]
    record["examples"]["train"] += 1
    (stopped / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=f"number of examples: .*{train_count + 1}.* → .*{train_count}"):
        train(configure())


def test_a_run_that_leaves_out_duplicates_continues_as_if_it_never_stopped(configure, tmp_path):
    rows = [{"instruction": f"Q{number % 20}", "output": "A"} for number in range(50)]
    settings = {"data__train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "data__deduplicate": True}
    train(configure("whole", **settings))
    assert train(configure(**settings), stop_at=3).steps == 3
    assert train(configure(**settings)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["examples"] == {"train": 16, "eval": 4}
    assert record["data"][0]["deduplicated"] == 30


def test_a_run_killed_before_its_first_checkpoint_starts_over(configure, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(MetricsLog, "log_step", lambda *arguments: sys.exit("killed"))
    with pytest.raises(SystemExit):
        train(configure())
    monkeypatch.undo()
    assert train(configure()).status == "finished"
    assert_same_run(tmp_path / "run", whole)


def test_an_interruption_in_the_last_step_is_the_end(configure, interrupt_after, tmp_path):
    interrupt_after(6)
    assert train(configure()).status == "finished"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_without_a_whole_checkpoint_is_reported_and_nothing_is_lost(configure, tmp_path):
    train(configure(train__save_every=1), stop_at=2)
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        damage(checkpoint)
    before = lines_of(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"No checkpoint .* is whole(.|\n)*step-000002/opt(.|\n)*step-000001/opt"):
        train(configure(train__save_every=1))
    assert lines_of(tmp_path / "run") == before


def test_the_last_whole_checkpoint_is_continued_when_a_newer_one_is_damaged(configure, tmp_path):
    """Log and record are restored with it, and the damaged one does not affect later saves and removals."""
    settings = {"train__save_every": 1, "train__keep_checkpoints": 1}
    train(configure("whole", **settings))
    train(configure(**settings | {"train__keep_checkpoints": 3}), stop_at=4)
    checkpoints = tmp_path / "run" / "checkpoints"
    damage(checkpoints / "step-000004")
    (checkpoints / "step-000003" / "manifest.json").unlink()
    message = "\n".join(train(configure(**settings), stop_at=3).notes)
    assert "step-000004 is skipped, and step-000002 continued: " in message
    assert "optimizer.safetensors is missing or damaged" in message
    assert "step-000003 is skipped" in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["continued_from"] == str(checkpoints / "step-000002")
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"step-000003", "step-000003.damaged", "step-000004.damaged"}
    assert train(configure(**settings)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_kill_at_any_moment_of_a_save_leaves_a_run_that_continues(configure, tmp_path, monkeypatch, seed):
    """Every sync, rename and removal is such a moment."""
    settings = {"train__save_every": 2, "train__keep_checkpoints": 1, "train__max_steps": 4, "data__eval": None}

    class Killed(BaseException):
        pass

    def kill_at(moment):
        moments = count()

        def passing(original):
            def call(*arguments, **keywords):
                if next(moments) >= moment:
                    raise Killed  # nothing is cleaned up: that is among the calls too
                return original(*arguments, **keywords)

            return call

        with monkeypatch.context() as patched:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
                patched.setattr(owner, name, passing(getattr(owner, name)))
            with suppress(Killed):
                train(configure("run" if moment < 1e9 else "whole", **settings))
        return next(moments)

    num_moments = kill_at(1e9)
    assert num_moments > 40
    for moment in random.Random(seed).sample(range(num_moments), 6):
        kill_at(moment)
    assert train(configure(**settings)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_in_use_is_left_alone(configure, tmp_path):
    with hold_lock(tmp_path / "run" / "run.lock"), pytest.raises(CheckpointError, match=f"process {os.getpid()} on"):
        train(configure())
    assert not (tmp_path / "run").exists()
    train(configure(), stop_at=2)
    assert not (tmp_path / "run" / "run.lock").exists()
    with hold_lock(tmp_path / "run" / "run.lock"):
        assert plan_run(configure()).total_steps == 6  # which writes nothing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_is_reported(number, configure, interrupt_after, tmp_path):
    interrupt_after(2, number)
    result = train(configure())
    assert (result.status, result.steps, result.signal) == ("interrupted", 2, number)
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "manifest.json").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


def test_an_unfinished_last_line_is_passed_over(configure, stopped, whole):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    assert train(configure()).status == "finished"
    assert_same_run(stopped, whole)


def test_a_broken_line_in_the_middle_is_named(configure, stopped):
    path = stopped / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2 is damaged"):
        train(configure())
    assert path.read_bytes() == before


def test_a_copy_of_a_checkpoint_is_neither_continued_from_nor_removed(
    configure, interrupt_after, tmp_path, monkeypatch
):
    interrupt_after(2)
    train(configure(train__save_every=1))
    monkeypatch.undo()
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step-000001", folder / "step-000200-backup")
    result = train(configure(train__save_every=1, train__keep_checkpoints=1))
    assert (result.status, result.steps) == ("finished", 6)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["continued_from"].endswith("step-000002")
    assert {path.name for path in folder.iterdir()} == {"step-000006", "step-000200-backup"}


@needs_fork
def test_the_command_stops_at_ctrl_c_with_its_state_saved_and_continues(configure, tmp_path):
    settings = {"train__max_steps": 40, "train__eval_every": 20}
    train(configure("whole", **settings))
    configure(**settings)
    recipe = kills.Recipe("ctrl-c", tmp_path / "run.yaml", save_every=100, warm=True)
    process, log = kills.start(recipe, tmp_path / "run"), kills.log_of(tmp_path / "run")
    assert kills.wait_until(lambda: "step 2/40  epoch" in log.read_text(), process), log.read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(600) == 130, log.read_text()
    assert "interrupted" in log.read_text()
    assert "Traceback" not in log.read_text()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 2 <= int(checkpoint.name.removeprefix("step-")) < 40
    assert (checkpoint / "manifest.json").is_file()

    assert train(configure(**settings)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")
