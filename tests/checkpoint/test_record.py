"""A run's record: it is read as it was written, and invalid values are refused by their keys."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora.checkpoint import RunDirectory
from qlora.errors import CheckpointError

# A finished run, written by qlora 0.1.0.
OLDER = json.loads((Path(__file__).parents[1] / "runs_of_0_1_0" / "finished" / "run.json").read_text())


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    return run


def write(run, **changes):
    run.record.write_text(json.dumps(OLDER | changes))


def test_a_record_of_an_older_version_is_read(run):
    write(run)
    record = run.read_record()
    assert (record.is_finished, record.steps, record.in_use.memory.measured) == (True, 4, None)
    new = ("learning_rate", "learning_rate_why", "unpacked_why", "attention_why", "states", "states_why", "experts")
    new += ("optimizer_state_why",)
    memory = OLDER["in_use"]["memory"] | {"by_kind": None}
    new += ("micro_batches", "dequantize_why", "loss", "loss_why")
    in_use = OLDER["in_use"] | dict.fromkeys(new) | {"memory": memory, "weights": "device", "weights_why": None}
    added = {
        "started_from": None,
        "final_step": None,
        "retain": [],
        "held_out": {},
        "head": None,
        "best": None,
        "stopped_early": None,
    }
    parameters = OLDER["parameters"] | {"adapted_experts": {}, "read_directly": []}
    own = {"in_use": in_use, "parameters": parameters, "quantization": OLDER["quantization"] | {"experts": None}}
    assert record.as_dict() == OLDER | added | own


@pytest.mark.parametrize("steps", [None, 0, 7])
def test_a_record_is_read_as_it_was_written(steps, run):
    write(run)
    record = replace(run.read_record(), status="interrupted", steps=steps, started_from="other")
    run.write_record(record)
    assert run.read_record() == record
    assert ("steps" in json.loads(run.record.read_text())) == (steps is not None)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"status": "finished"}', "[" * 9999, "", '{"status": 1'])
def test_a_record_of_something_else_is_refused(text, run):
    run.record.write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json (lacks .*base|is damaged).*not written by qlora train"):
        run.read_record()


@pytest.mark.parametrize("key", sorted(OLDER.keys() - {"steps"}))
def test_a_missing_key_is_named(key, run):
    run.record.write_text(json.dumps({name: value for name, value in OLDER.items() if name != key}))
    with pytest.raises(CheckpointError, match=rf"run\.json lacks {key};"):
        run.read_record()


@pytest.mark.parametrize("section", ["base", "quantization", "in_use", "parameters", "examples"])
def test_a_missing_key_of_a_section_is_named(section, run):
    for key in OLDER[section]:
        write(run, **{section: {name: value for name, value in OLDER[section].items() if name != key}})
        with pytest.raises(CheckpointError, match=rf"run\.json lacks {section}\.{key};"):
            run.read_record()


@pytest.mark.parametrize("key", OLDER)
@pytest.mark.parametrize("value", [True, [3]])
def test_a_wrong_value_is_named(key, value, run):
    write(run, **{key: value})
    with pytest.raises(
        CheckpointError, match=rf"run\.json(: invalid value of| lacks) {key}\b.* not written by qlora train"
    ):
        run.read_record()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"data": [{"source": "rows.jsonl"}]}, "data"),
        ({"data": [{"source": "rows.jsonl", "digest": 3}]}, "data"),
        ({"quantization": OLDER["quantization"] | {"block_size": None}}, "quantization.block_size"),
        ({"in_use": OLDER["in_use"] | {"compute_dtype": "load"}}, "in_use.compute_dtype"),
        ({"parameters": OLDER["parameters"] | {"trained_rows": {"lm_head": [1]}}}, "parameters.trained_rows.lm_head"),
        ({"status": "done"}, "status"),
        ({"steps": None}, "steps"),
        ({"steps": -1}, "steps"),
        ({"total_steps": 0}, "total_steps"),
        ({"final_step": 1 << 63}, "final_step"),
    ],
)
def test_values_that_contradict_each_other_are_refused(changes, key, run):
    write(run, **changes)
    with pytest.raises(CheckpointError, match=rf"run\.json: invalid value of {key}"):
        run.read_record()
