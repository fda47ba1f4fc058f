"""Several processes under a launcher are one run."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.export import merge, verify
from qlora.training import train
from tests.tiny import POISON, run_config, write_jsonl


def launch(verb, config):
    """Runs a verb in two processes; its report, of which there is one, not two."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "qlora"]
    command = [sys.executable, *launcher, verb, str(config), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment).stdout
    return json.loads(output)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_two_processes_train_what_one_trains_with_twice_the_batch(packing, tiny_base, alpaca_file, tmp_path):
    settings = {"train__max_steps": 3, "model__compute_dtype": "float32", "train__optimizer": "adamw_32bit"}
    settings["data__packing"] = packing
    one = train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "one", **settings)))
    config = run_config(tiny_base, alpaca_file, tmp_path / "two", train__micro_batch_size=1, **settings)
    two = launch("train", config)
    assert two["losses"] == pytest.approx(one.losses, rel=1e-4)
    assert list(two["eval_losses"].values()) == pytest.approx(list(one.eval_losses.values()), rel=1e-3)
    merge(tmp_path / "two", tmp_path / "merged")
    assert verify(tmp_path / "two", tmp_path / "merged").matches


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(poisoned_base, tmp_path):
    """Only one of two processes has the row; both must leave the step out, or their adapters would drift apart."""
    rows = [{"text": f"row {row} of the book{POISON * (row == 17)} ends"} for row in range(1, 25)]
    settings = {
        "data__eval": None, "data__packing": False, "train__micro_batch_size": 2, "train__on_nonfinite": "skip",
        "train__gradient_accumulation_steps": 1,
    }  # fmt: skip
    config = run_config(poisoned_base, write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "run", **settings)
    assert launch("train", config)["status"] == "finished"
    lines = RunDirectory(tmp_path / "run").read_metrics()
    (skipped,) = (line for line in lines if "skipped" in line)
    assert 17 in next(iter(skipped["rows"].values()))
    assert len([line for line in lines if "loss" in line]) == 5
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
