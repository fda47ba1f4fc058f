"""Several processes under a launcher are one run."""

import json
import os
import re
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import ConfigError, QLoRAError
from qlora.export import merge
from qlora.proof import verify
from qlora.training import first_checks, train
from tests.cli import run
from tests.tiny import POISON, make_base, run_config, write_jsonl
from tests.training.ranks import call_in_two, needs_fork, train_in_two
from tests.training.same_run import assert_same_run, rewrite

pytestmark = [needs_fork, pytest.mark.slow]


def outcomes(cases):
    """Train every case of this process in order; a case's error ends it on all processes, and the next one starts."""
    rank, found = int(os.environ["RANK"]), {}
    for name, (configs, stop_at) in cases.items():
        try:
            result = train(load_config(configs[rank]), stop_at=stop_at)
            found[name] = [result.status, result.steps]
        except QLoRAError as error:
            found[name] = [type(error).__name__, str(error)]
    return found


def test_processes_start_where_the_first_one_does_or_all_stop(tiny_base, alpaca_file, tmp_path):
    """Each process has its own config, as on machines that were set up one by one."""
    other_base = make_base(tmp_path / "other" / tiny_base.name, seed=9)
    other_rows = tmp_path / "other" / alpaca_file.name
    other_rows.write_text("".join(alpaca_file.read_text().splitlines(keepends=True)[:-1]))

    def config(name, base=tiny_base, rows=alpaca_file, **settings):
        return str(run_config(base, rows, tmp_path / name, data__cache_dir=str(tmp_path / "cache"), **settings))

    first, elsewhere = config("first"), config("elsewhere")
    damaged = config("damaged")
    train(load_config(damaged), stop_at=2)
    metrics = tmp_path / "damaged" / "metrics.jsonl"
    metrics.write_text("no JSON\n" + metrics.read_text())
    record = json.loads((tmp_path / "damaged" / "run.json").read_text())
    record["in_use"] |= {"processes": 2, "micro_batches": 4}
    (tmp_path / "damaged" / "run.json").write_text(json.dumps(record))
    rewrite(tmp_path / "damaged" / "checkpoints" / "step-000002", "origin.json", in_use=record["in_use"])
    cases = {
        "stopped": ([first, elsewhere], 2),
        "continued": ([first, elsewhere], None),
        "whole": ([config("whole"), config("whole-too")], None),
        "rate": ([config("a"), config("b", train__learning_rate=1e-3)], None),
        "steps": ([config("c"), config("d", train__max_steps=7)], None),
        "base": ([config("e"), config("f", other_base)], None),
        "rows": ([config("g"), config("h", rows=other_rows)], None),
        "absent": ([config("i"), config("j", rows=tmp_path / "absent" / alpaca_file.name)], None),
        "bad": ([config("k", rows=tmp_path / "absent" / alpaca_file.name), config("l")], None),
        "damaged": ([damaged, config("m")], None),
    }
    found, other = call_in_two(outcomes, cases)
    assert found == other
    assert found["stopped"] == ["interrupted", 2]
    assert found["continued"] == found["whole"] == ["finished", 6]
    assert_same_run(tmp_path / "first", tmp_path / "whole")
    assert not (tmp_path / "elsewhere").exists()
    for name, difference in {
        "rate": "train.learning_rate: 0.01 → 0.001",
        "steps": "train.max_steps: 6 → 7",
        "base": "contents of model.safetensors (model.base): ",
        "rows": f"examples of {other_rows.name} (source 1): ",
    }.items():
        kind, message = found[name]
        assert kind == "ConfigError"
        assert "Process 1 of 2 has other inputs than process 0" in message
        assert f"\n  {difference}" in message
    assert found["absent"][0] == found["bad"][0] == "ConfigError"
    assert found["absent"][1].startswith("Process 1 of 2: ")
    assert not found["bad"][1].startswith("Process ")
    assert found["damaged"][0] == "CheckpointError"  # which only the first process meets, when it starts to write
    assert "metrics.jsonl:1 is damaged" in found["damaged"][1]
    assert {path.name for path in tmp_path.iterdir() if (path / "run.json").exists()} == {"damaged", "first", "whole"}


def test_doctor_tries_the_processes():
    first, second = call_in_two(run, "doctor", "--json")
    assert (first.code, second.code, second.out) == (0, 0, "")
    assert re.fullmatch(r"2: sums are right, at \d+\.\d GB/s", first.json()["in_use"]["processes"])


def train_where_only_the_second_mixes(config):
    """Train where documents mix on the second process alone, as other kernels may make them, and return the error."""
    own = first_checks.keep_apart
    if os.environ["RANK"] == "1":
        first_checks.keep_apart = lambda *args, **kwargs: replace(own(*args, **kwargs), mixed_reason="they mix here")
    with pytest.raises(ConfigError) as error:
        train(load_config(config))
    return str(error.value)


def test_processes_that_pack_otherwise_all_stop(tiny_base, alpaca_file, tmp_path):
    config = str(run_config(tiny_base, alpaca_file, tmp_path / "run"))
    found, other = call_in_two(train_where_only_the_second_mixes, config)
    assert found == other
    assert "\n  documents are packed: true → false\n" in found
    assert not (tmp_path / "run").exists()


def test_two_processes_train_what_one_trains_with_twice_the_batch(any_base, alpaca_file, tmp_path):
    """Packed; test_loop tests the summed gradient of both processes, packed and not."""
    settings = {"train__max_steps": 3, "model__compute_dtype": "float32", "train__optimizer": "adamw_32bit"}
    one = train(load_config(run_config(any_base, alpaca_file, tmp_path / "one", **settings)))
    config = run_config(any_base, alpaca_file, tmp_path / "two", train__micro_batch_size=1, **settings)
    two = train_in_two(config)
    assert two["losses"] == pytest.approx(one.losses, rel=1e-4)
    assert list(two["eval_losses"].values()) == pytest.approx(list(one.eval_losses.values()), rel=1e-3)
    # transformers multiplies experts in 16 bits only where their sizes are multiples of 8.
    merge(tmp_path / "two", tmp_path / "merged", dtype="float32")
    assert verify(tmp_path / "two", tmp_path / "merged").matches


def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(poisoned_base, tmp_path):
    """Only one of two processes has the row; both must skip the step, or their adapters would differ."""
    rows = [{"text": f"row {row} of the book{POISON * (row == 17)} ends"} for row in range(1, 25)]
    settings = {
        "data__eval": None, "data__packing": False, "train__micro_batch_size": 2, "train__on_nonfinite": "skip",
        "train__gradient_accumulation_steps": 1,
    }  # fmt: skip
    config = run_config(poisoned_base, write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "run", **settings)
    assert train_in_two(config)["status"] == "finished"
    lines = RunDirectory(tmp_path / "run").read_metrics()
    (skipped,) = (line for line in lines if "skipped" in line)
    assert 17 in next(iter(skipped["rows"].values()))
    assert len([line for line in lines if "loss" in line]) == 5
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
