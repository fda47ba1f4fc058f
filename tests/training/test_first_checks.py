"""A model is given its own modules back if those in their place compute something else; errors of the checks."""

from types import SimpleNamespace

import pytest
import torch

from qlora.config import load_config
from qlora.data import collate, make_example
from qlora.errors import ModelError
from qlora.layers import rebuild_activations
from qlora.lora import add_lora
from qlora.model import load_base, supervised_loss
from qlora.processes import Processes
from qlora.training import assemble, first_checks
from tests.tiny import run_config


class Wrong(torch.nn.Module):
    """Computes what another module does, with a gradient or values twice as large, or fails."""

    def __init__(self, own, kind):
        super().__init__()
        self.own, self.kind = own, kind

    def forward(self, x):
        if self.kind == "error":
            raise IndexError("no such row")
        out = self.own(x)
        return 2 * out - out.detach() if self.kind == "gradient" else 2 * out


@pytest.mark.parametrize("kind", ["values", "gradient", "error", None])
def test_modules_that_change_the_loss_are_taken_back(kind, monkeypatch, tiny_base, generator):
    model = load_base(str(tiny_base), compute_dtype="bfloat16")[0]
    add_lora(model, rank=4)
    ids = torch.randint(256, (16,), generator=generator).numpy()
    example = make_example(ids, [True] * len(ids))
    loss = supervised_loss(model.eval(), collate([example])).item()
    own = [type(module) for module in model.modules()]

    def rebuild(model):
        report = rebuild_activations(model)
        if kind is not None:
            model.model.layers[1].mlp = Wrong(model.model.layers[1].mlp, kind)
        return report

    monkeypatch.setattr(first_checks, "rebuild_activations", rebuild)
    report = first_checks.rebuild_checked(model, example)
    assert supervised_loss(model, collate([example])).item() == pytest.approx(loss, rel=1e-3)
    if kind is None:
        assert report == "plain torch: the fused kernels are for CUDA"
        assert [type(module) for module in model.modules()] != own
    else:
        reason = "IndexError: no such row" if kind == "error" else "loss and gradient norm of a few tokens go from "
        assert report.startswith(f"the model's own modules: with faster ones, {reason}")
        assert [type(module) for module in model.modules()] == own


def test_memory_that_runs_out_before_the_first_step_is_reported_with_a_remedy(tmp_path, monkeypatch):
    def check_loaded(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    config = load_config(run_config(tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "run"))
    monkeypatch.setattr(assemble, "load_for_training", lambda *_, **_options: (torch.nn.Identity(), {}))
    monkeypatch.setattr(assemble, "check_loaded", check_loaded)
    with pytest.raises(ModelError, match=r"^Memory ran out before the first step, .*smaller base\. CUDA out of memory"):
        assemble._load_checked(config, Processes(), SimpleNamespace(train=[]), range(0), None, None, None, False)
