"""A deterministic run gives the same bytes twice, and stops at an operation that is not."""

import json

import pytest
import torch

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import ModelError
from qlora.training import train
from qlora.training.determinism import deterministic_algorithms
from tests.tiny import run_config

pytestmark = pytest.mark.slow

# Values of the clock, and of the process's other memory.
MEASURED = {"tokens_per_second", "peak_memory"}


@pytest.mark.parametrize("packing", [True, False])
def test_two_runs_give_the_same_bytes(packing, tiny_base, alpaca_file, tmp_path):
    found = []
    for name in ("one", "other"):
        settings = {"train__deterministic": True, "data__packing": packing, "lora__dropout": 0.1}
        train(load_config(run_config(tiny_base, alpaca_file, tmp_path / name, **settings)))
        run = RunDirectory(tmp_path / name)
        lines = [{key: value for key, value in line.items() if key not in MEASURED} for line in run.read_metrics()]
        adapter = {path.name: path.read_bytes() for path in run.adapter.iterdir()}
        found.append((lines, adapter))
        assert run.read_record().in_use.deterministic == "torch uses deterministic algorithms only"
    assert found[0] == found[1]
    assert "adapter_model.safetensors" in found[0][1]
    assert json.dumps(found[0][0])
    assert not torch.are_deterministic_algorithms_enabled()  # the process's settings are restored


def test_an_operation_without_a_deterministic_algorithm_is_reported():
    with pytest.raises(ModelError, match=r"train\.deterministic: .*put_"), deterministic_algorithms(True):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_and_other_runs_are_left_alone():
    with pytest.raises(RuntimeError, match="size"), deterministic_algorithms(True):
        torch.zeros(3) + torch.zeros(4)
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
