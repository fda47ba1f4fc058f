"""What rounding merged weights does to an adapter's update."""

import re

import pytest
import torch
from safetensors.torch import load_file

from qlora.config import load_config
from qlora.export import merge
from qlora.export.rounding import UpdateRounding
from qlora.training import train
from tests.tiny import run_config


@pytest.mark.parametrize(
    ("scale", "noted"), [(1e-1, []), (1e-2, [torch.bfloat16]), (1e-4, [torch.bfloat16, torch.float16])]
)
def test_a_small_update_is_noted_by_the_dtypes_that_lose_it(scale, noted):
    base = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    merged = base + scale * torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounding = UpdateRounding(dtype)
        rounding.keep(base)
        assert rounding.counted(merged) is merged
        expected = (merged.to(dtype) - merged).norm() / (merged - base).norm()
        assert rounding.share == pytest.approx(expected.item(), rel=1e-3)
        assert len(rounding.notes) == (dtype in noted)


def test_without_an_update_nothing_is_lost():
    rounding = UpdateRounding(torch.bfloat16)
    rounding.counted(torch.randn(4, 8))  # a weight without an adapter
    rounding.keep(torch.ones(4, 8))
    rounding.counted(torch.ones(4, 8))
    assert (rounding.share, rounding.notes) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merge_reports_the_loss_of_all_rows_closely(tiny_base, alpaca_file, tmp_path, kind):
    settings = {"train__max_steps": 3, "train__learning_rate": 1e-3, "data__eval": None, "lora__kind": kind}
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)))
    notes = {
        dtype: merge(tmp_path / "run", tmp_path / dtype, dtype, onto="original").notes
        for dtype in ("bfloat16", "float32")
    }
    exact, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    base = load_file(f"{tiny_base}/model.safetensors")
    adapted = [name for name in exact if "proj" in name]
    update, error = (
        torch.cat([(left[name].float() - right[name].float()).flatten() for name in adapted]).norm()
        for left, right in ((exact, base), (rounded, exact))
    )
    (note,) = notes["bfloat16"]
    assert int(re.search(r"changes the weights by (\d+)% of the update", note)[1]) == pytest.approx(
        100 * (error / update).item(), rel=0.2
    )
    assert "--dtype float16" in note
    assert notes["float32"] == []
