"""A run from Python: callbacks, rows in memory, results, and no output unless requested."""

import json
import re

import datasets
import pytest

import qlora
from qlora.config import load_config
from qlora.errors import ConfigError, DataError
from tests.tiny import run_config
from tests.training.same_run import assert_same_run, lines_of

ROWS = [{"instruction": f"Say {word}", "output": word} for word in ("tin", "oak", "fern", "moss", "clay", "reed")]


class Recorder(qlora.Callback):
    def __init__(self):
        self.calls = []

    def on_step(self, step, report):
        self.calls.append(("step", step, report.loss))

    def on_evaluation(self, step, evaluation):
        self.calls.append(("evaluation", step, evaluation.loss))

    def on_save(self, step, folder):
        assert (folder / "adapter_model.safetensors").is_file()
        self.calls.append(("save", step, folder.name))


class Failing(qlora.Callback):
    def __init__(self, method, step):
        self.method, self.step = method, step

    def fail(self, step, _):
        if step == self.step:
            raise ZeroDivisionError("in a callback")

    def __getattribute__(self, name):
        failing = object.__getattribute__(self, "method") == name
        return object.__getattribute__(self, "fail" if failing else name)


def test_callbacks_see_every_step_evaluation_and_save(configure, tmp_path):
    recorder = Recorder()
    qlora.train(configure(train__save_every=4), callbacks=[recorder])
    lines = lines_of(tmp_path / "run")
    steps = [("step", line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluations = [("evaluation", line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert [call for call in recorder.calls if call[0] == "step"] == steps
    assert [call for call in recorder.calls if call[0] == "evaluation"] == evaluations
    assert [call for call in recorder.calls if call[0] == "save"] == [
        ("save", step, f"step-{step:06}") for step in (4, 6)
    ]


@pytest.mark.parametrize(("method", "step"), [("on_step", 3), ("on_evaluation", 4), ("on_save", 2)])
def test_an_exception_in_a_callback_is_raised_as_it_is_with_the_state_saved(method, step, configure, whole, tmp_path):
    with pytest.raises(ZeroDivisionError) as error:
        qlora.train(configure(train__save_every=2), callbacks=[Failing(method, step)])
    assert str(error.value) == "in a callback"
    result = qlora.train(configure(train__save_every=2))
    assert result.trained_steps == 6 - step
    assert_same_run(tmp_path / "run", whole)


class Stopping(qlora.Callback):
    def __init__(self, method, step):
        self.method, self.step = method, step

    def on_step(self, step, report):
        self.stop("on_step", step)

    def on_evaluation(self, step, evaluation):
        self.stop("on_evaluation", step)

    def stop(self, method, step):
        if (method, step) == (self.method, self.step):
            raise qlora.StopTraining


@pytest.mark.parametrize(("method", "step"), [("on_step", 3), ("on_evaluation", 4)])
def test_a_callback_can_stop_the_run_which_continues_equal(method, step, configure, whole, tmp_path):
    result = qlora.train(configure(), callbacks=[Stopping(method, step)])
    assert (result.status, result.steps, result.signal) == ("interrupted", step, None)
    assert qlora.train(configure()).trained_steps == 6 - step
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("callbacks", [Recorder(), [Recorder], [print]], ids=["object", "class", "function"])
def test_callbacks_of_another_kind_are_refused_before_anything_is_loaded(callbacks, tmp_path):
    with pytest.raises(ConfigError, match="callbacks: .* should be a list of objects of subclasses of qlora.Callback"):
        qlora.train(tmp_path / "none.yaml", callbacks=callbacks)


def test_an_exception_before_the_first_step_leaves_nothing_to_continue(configure, whole, tmp_path):
    with pytest.raises(ZeroDivisionError):
        qlora.train(configure(), callbacks=[Failing("on_evaluation", 0)])
    assert qlora.train(configure()).trained_steps == 6
    assert_same_run(tmp_path / "run", whole)


def test_nothing_is_printed_unless_asked(configure, capfd):
    result = qlora.train(configure())
    assert capfd.readouterr() == ("", "")
    assert repr(result).startswith("<RunResult: finished at step 6, loss ")
    assert "\n" not in repr(result)


def test_without_a_terminal_every_logged_step_is_a_timestamped_line(configure, tmp_path, capfd):
    qlora.train(configure(train__log_every=2), show_progress=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "  epoch " in line]
    last = next(line for line in reversed(lines_of(tmp_path / "run")) if "loss" in line)
    assert len(lines) == 3
    assert f"step 6/6  epoch {last['epoch']:.2f}  loss {last['loss']:.4f}  lr {last['learning_rate']:.2e}" in lines[-1]
    assert re.search(r"  process peak \d+\.\d\d GiB  0:00:00 left$", lines[-1])  # on a CPU
    assert lines[0][:4].isdigit()


@pytest.mark.parametrize("kind", ["dicts", "dataset", "file"])
def test_rows_in_memory_are_trained_on_like_a_file(kind, tiny_base, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = run_config(tiny_base, path, tmp_path / kind, data__eval=None, train__max_steps=3)
    rows = {"dicts": ROWS, "dataset": datasets.Dataset.from_list(ROWS), "file": None}[kind]
    stopped = qlora.train(config, rows=rows, stop_at=2)
    assert stopped.status == "interrupted"
    assert qlora.train(config, rows=rows).trained_steps == 1
    if kind == "file":
        return
    qlora.train(run_config(tiny_base, path, tmp_path / "expected", data__eval=None, train__max_steps=3))
    assert lines_of(tmp_path / kind) == lines_of(tmp_path / "expected")
    assert qlora.evaluate(tmp_path / kind, data=path, device="cpu").examples == len(ROWS)


def test_a_dict_with_rows_needs_no_data_train(tiny_base, tmp_path):
    sections = {
        "model": {"base": str(tiny_base)},
        "lora": {"rank": 4},
        "data": {"max_seq_len": 128},
        "train": {"output_dir": str(tmp_path / "run"), "max_steps": 1},
    }
    assert qlora.train(sections, rows=ROWS).steps == 1
    assert load_config(sections | {"data": {"train": "rows.jsonl"}}, ["lora.rank=8"]).lora.rank == 8


@pytest.mark.parametrize(("rows", "message"), [
    ([], "no rows to train on"),
    (["text"], "Row 0 is 'text'; rows should be dicts"),
    ([{"text": "a"}, {"text": object()}], "Row 1 has a value that JSON has not"),
    ([{"text": float("nan")}], "Row 0 has a value that JSON has not"),
])  # fmt: skip
def test_rows_that_can_not_be_stored_are_refused(rows, message, tiny_base, tmp_path):
    config = run_config(tiny_base, tmp_path / "none.jsonl", tmp_path / "run")
    with pytest.raises(DataError, match=message):
        qlora.train(config, rows=rows)
    assert not (tmp_path / "run").exists()
