"""Every kind of adapter and initial value: trained, stopped and continued, merged and verified."""

import json

import pytest
import torch

from qlora.config import load_config
from qlora.export import merge
from qlora.model import load_base, load_run
from qlora.nf4 import NF4Linear
from qlora.proof import verify
from qlora.training import train
from tests.tiny import run_config
from tests.training.same_run import assert_same_run

METHODS = {
    "dora": {"lora__kind": "dora"},
    "rows": {"lora__kind": "rows", "lora__alpha": 32},
    "B alone": {"lora__train": "B", "lora__init": "orthogonal"},
    "eva": {"lora__init": "eva"},
    "pissa": {"lora__init": "pissa"},
    "reconstruct": {"lora__init": "reconstruct"},
    "final rank": {"lora__rank": 6, "lora__final_rank": 3},
    "dora + eva + final rank + master": {
        "lora__kind": "dora", "lora__init": "eva", "lora__final_rank": 2, "train__rounding": "master",
    },
    "dora + reconstruct + ranks": {
        "lora__kind": "dora", "lora__init": "reconstruct", "lora__rank_pattern": {"v_proj": 2, "layers.1.mlp.*": 7},
    },
    "rows + dropout + layers": {"lora__kind": "rows", "lora__alpha": 32, "lora__dropout": 0.1, "lora__layers": [1]},
    "eva + B alone + exclude": {"lora__init": "eva", "lora__train": "B", "lora__exclude": ["down_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module", params=METHODS, ids=lambda name: name.replace(" ", "-"))
def trained(request, tiny_base, alpaca_file, tmp_path_factory):
    """The settings and folder of a finished run of a method."""
    folder = tmp_path_factory.mktemp("methods") / "run"
    settings = METHODS[request.param]
    train(load_config(run_config(tiny_base, alpaca_file, folder, **settings)))
    return settings, folder


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_a_continued_run_is_the_whole_run(trained, tiny_base, alpaca_file, tmp_path):
    settings, whole = trained
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings))
    train(config, stop_at=3)
    train(config)
    assert_same_run(tmp_path / "run", whole)


def test_the_adapter_and_its_merge_are_verified(trained, tmp_path):
    _, run = trained
    report = verify(run)
    assert report.matches, report.problems
    for onto in ("dequantized", "original"):
        merge(run, tmp_path / onto, dtype="float32", onto=onto)
        report = verify(run, tmp_path / onto)
        # A base of random weights has a loss that may rise by more than verify allows on its original weights.
        assert not [problem for problem in report.problems if "is worse than the adapter's" not in problem]
        assert report.tensors_checked > 0


def test_merged_logits_are_the_runs(trained, tmp_path, generator):
    _, run = trained
    merge(run, tmp_path / "merged", dtype="float32")
    merged, _ = load_base(str(tmp_path / "merged"), quantization="none", compute_dtype="float32")
    adapted, _ = load_run(run)
    ids = torch.randint(259, (1, 40), generator=generator)
    wanted, found = logits(adapted, ids), logits(merged, ids)
    base, _ = load_base(json.loads((run / "run.json").read_text())["base"]["name"])
    changed = (wanted - logits(base, ids)).norm()
    assert (found - wanted).norm() < 0.1 * changed


def test_peft_loads_the_adapter_with_the_same_logits(trained, tmp_path, generator):
    peft = pytest.importorskip("peft")
    _, run = trained
    merge(run, tmp_path / "merged", dtype="float32", onto="dequantized")
    # A base in fp32 with the weights that the run trained on: the merge without its update.
    adapted, _ = load_run(run)
    plain, _ = load_base(json.loads((run / "run.json").read_text())["base"]["name"], "none", compute_dtype="float32")
    for name, layer in adapted.named_modules():
        if isinstance(layer, NF4Linear):
            weight = plain.get_submodule(name.removesuffix(".base")).weight
            weight.data.copy_(layer.dequantize(adapted.dtype))
    other = peft.PeftModel.from_pretrained(plain, run / "adapter").eval()
    merged, _ = load_base(str(tmp_path / "merged"), quantization="none", compute_dtype="float32")
    ids = torch.randint(259, (1, 40), generator=generator)
    assert (logits(other, ids) - logits(merged, ids)).norm() < 1e-4 * logits(merged, ids).norm()
