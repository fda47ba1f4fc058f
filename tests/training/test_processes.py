"""Several processes under a launcher are one run."""

import json
import os
import subprocess
import sys

import pytest

from qlora.config import load_config
from qlora.export import merge, verify
from qlora.training import train
from tests.tiny import run_config


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_two_processes_train_what_one_trains_with_twice_the_batch(packing, tiny_base, alpaca_file, tmp_path):
    settings = {"train__max_steps": 3, "model__compute_dtype": "float32", "train__optimizer": "adamw_32bit"}
    settings["data__packing"] = packing
    one = train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "one", **settings)))
    config = run_config(tiny_base, alpaca_file, tmp_path / "two", train__micro_batch_size=1, **settings)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "qlora"]
    command = [sys.executable, *launcher, "train", str(config), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment).stdout
    two = json.loads(output)  # one report, not two
    assert two["losses"] == pytest.approx(one.losses, rel=1e-4)
    assert list(two["eval_losses"].values()) == pytest.approx(list(one.eval_losses.values()), rel=1e-3)
    merge(tmp_path / "two", tmp_path / "merged")
    assert verify(tmp_path / "two", tmp_path / "merged").matches
