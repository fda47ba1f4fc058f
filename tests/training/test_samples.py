"""Samples while training: greedy answers to a few prompts, at intervals, without changing the run."""

import json
import re

import pytest

from qlora.config import load_config
from qlora.errors import ConfigError, DataError
from qlora.model import generate
from qlora.training import plan_run, train
from qlora.training.preview import preview
from tests.tiny import write_jsonl
from tests.training.ranks import needs_fork, train_in_two
from tests.training.same_run import assert_same_run

SAMPLES = {"prompts": 3, "every": 3, "max_new_tokens": 5}


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": "Repeat oak"}, {"messages": [{"role": "system", "content": "Be brief."},
                                                    {"role": "user", "content": "Name a plant."}]}]  # fmt: skip
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


def samples_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_samples_are_taken_at_intervals_and_the_run_is_the_same(configure, tmp_path, capsys):
    train(configure("plain"))
    train(configure(train__samples=SAMPLES), show_progress=True)
    assert_same_run(tmp_path / "run", tmp_path / "plain")
    lines = samples_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert all(len(line["samples"]) == 3 for line in lines)
    assert {"prompt", "answer", "reference"} == lines[0]["samples"][0].keys()
    assert len({json.dumps([sample["prompt"] for sample in line["samples"]]) for line in lines}) == 1
    assert "step 3/6  sample: 'Repeat " in capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text()
    (values,) = json.loads(page.split('id="values">')[1].split("</script>")[0])["runs"]
    assert values["samples"]["steps"] == [0, 3, 6]
    first = values["samples"]["prompts"][0]
    assert first["answers"] == [line["samples"][0]["answer"] for line in lines]


@pytest.mark.slow
def test_a_resumed_run_has_the_samples_of_an_uninterrupted_one(configure, interrupt_after, tmp_path, monkeypatch):
    settings = {"train__samples": SAMPLES, "train__save_every": 2}
    train(configure("whole", **settings))
    interrupt_after(5)
    train(configure(**settings))
    monkeypatch.undo()
    # As a killed process leaves it: samples after the last checkpoint, and a line that is cut off.
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 99, "samples": []}) + "\n" + '{"step": 100, "sam')
    assert train(configure(**settings)).steps == 6
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_a_run_stopped_before_its_samples_takes_them_when_it_continues(configure, tmp_path):
    train(configure("whole", train__samples=SAMPLES))
    train(configure(train__samples=SAMPLES), stop_at=3)
    assert [line["step"] for line in samples_of(tmp_path / "run")] == [0]
    train(configure(train__samples=SAMPLES))
    assert samples_of(tmp_path / "run") == samples_of(tmp_path / "whole")


@pytest.mark.slow
def test_samples_can_be_added_to_a_run_and_changed(configure, prompts, tmp_path):
    train(configure(), stop_at=2)
    train(configure(train__samples={"prompts": str(prompts), "every": None}), stop_at=4)
    train(configure(train__samples={"prompts": 1, "every": 5}))
    lines = samples_of(tmp_path / "run")
    assert [(line["step"], len(line["samples"])) for line in lines] == [(5, 1), (6, 1)]


@pytest.mark.slow
def test_the_answers_are_those_of_generate(configure, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(configure(train__samples={"prompts": prompts.name, "max_new_tokens": 6}))
    assert load_config(tmp_path / "run" / "config.yaml").train.samples.prompts == str(prompts)
    last = samples_of(tmp_path / "run")[-1]
    assert [sample["prompt"] for sample in last["samples"]] == ["Repeat oak", "system: Be brief.\nuser: Name a plant."]
    assert "reference" not in last["samples"][0]
    answer = generate(str(tmp_path / "run"), "Repeat oak", max_new_tokens=6)
    assert last["samples"][0]["answer"] == answer


@needs_fork
@pytest.mark.slow
def test_two_processes_share_the_prompts_and_the_first_writes(configure, tmp_path):
    train(configure("one", train__samples=SAMPLES, train__gradient_accumulation_steps=2))
    configure(train__samples=SAMPLES, train__gradient_accumulation_steps=1)
    train_in_two(tmp_path / "run.yaml")
    alone, shared = samples_of(tmp_path / "one"), samples_of(tmp_path / "run")
    assert [line["step"] for line in shared] == [0, 3, 6]
    assert shared[0]["samples"] == alone[0]["samples"]


def test_what_can_not_be_asked_is_refused_before_anything_is_loaded(configure, tmp_path):
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "oak " * 300}])
    for settings, message in (
        ({"train__samples": {"prompts": str(tmp_path / "absent.jsonl")}}, "train.samples.prompts: there is no file"),
        ({"train__samples": {"prompts": str(long)}}, r"long.jsonl:1 has [\d,]+ tokens, more than data.max_seq_len"),
        ({"train__samples": {"prompts": str(write_jsonl(tmp_path / "none.jsonl", []))}}, "has no rows"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            plan_run(configure(**settings))
        assert [re.search(message, problem) is not None for problem in preview(configure(**settings), 0).problems] == [
            True
        ]
    for settings, message in (
        ({"train__samples": SAMPLES, "data__eval": 0}, "none are held out"),
        ({"train__samples": SAMPLES, "train__objective": "reward"}, "trains a head of scores"),
        ({"train__samples": {"prompts": 0}}, "prompts"),
        ({"train__samples": {"every": 1.5}}, "number of steps, or a share"),
    ):
        with pytest.raises(ConfigError, match=message):
            configure(**settings)
