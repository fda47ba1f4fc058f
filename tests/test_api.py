"""The names that `import qlora` offers."""

import runpy
import subprocess
import sys

import pytest
import torch

import qlora
from qlora import processes
from tests.tiny import run_config


def test_dir_lists_what_can_be_used():
    names = dir(qlora)
    assert names == sorted(names)
    assert all(getattr(qlora, name) is not None for name in names)
    verbs = {"train", "evaluate", "generate", "preview", "merge", "verify", "quantize"}
    assert verbs | {"load_config", "load_base", "add_lora", "load_run", "__version__"} <= set(names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        qlora.tarin  # noqa: B018 (the access is what fails)


@pytest.mark.parametrize(("call", "message"), [
    (lambda config: qlora.estimate(config, 24), "gpu: 24 should be a size such as 24GB"),
    (lambda config: qlora.preview(config, -1), "num_samples: -1 should be 0 or more"),
    (lambda config: qlora.train({"data": "x.jsonl"}, rows=[{"text": "a"}]), "data: 'x.jsonl' should be a section"),
    (lambda config: qlora.load_base(config.model.base, compute_dtype="float64"), "float64' should be one of bfloat16"),
])  # fmt: skip
def test_a_wrong_argument_is_one_error_that_names_it(call, message, tiny_base, tmp_path):
    config = qlora.load_config(run_config(tiny_base, tmp_path / "rows.jsonl", tmp_path / "run"))
    with pytest.raises(qlora.QLoRAError, match=message):
        call(config)


def test_importing_it_loads_no_torch():
    code = "import sys, qlora; dir(qlora); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_torch_without_collectives_is_enough_for_one_process(monkeypatch):
    for name in ("all_gather_single", "all_gather_into_tensor"):
        monkeypatch.delattr(torch.distributed, name, raising=False)
    loaded = runpy.run_path(processes.__file__)
    alone = loaded["Processes"](device=torch.device("cpu"))
    assert (alone.world_size, alone.is_first, alone.max(3.0)) == (1, True, 3.0)
