"""A run with ranks and alphas by layer: continued, merged, written as GGUF and verified."""

import json

import pytest

from qlora.config import load_config
from qlora.errors import ModelError
from qlora.export import merge
from qlora.memory.estimate import estimate
from qlora.model import SUPERVISED, load_run
from qlora.proof import verify
from qlora.training import train
from tests.tiny import run_config
from tests.training.same_run import assert_same_run

PATTERNS = {
    "lora__rank_pattern": {"up_proj": 6, r"layers\.1\.self_attn\.(q|k)_proj": 2},
    "lora__alpha_pattern": {r"0\.mlp\..*": 3, "k_proj": 12.5},
}


@pytest.fixture(scope="module", params=[False, True], ids=["alpha / rank", "rslora"])
def run(request, tiny_base, alpaca_file, tmp_path_factory):
    """A finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("patterns") / "run"
    train(load_config(run_config(tiny_base, alpaca_file, folder, lora__rslora=request.param, **PATTERNS)))
    return folder


def test_adapter_and_merged_weights_are_verified(run, tmp_path):
    report = verify(run)
    assert report.problems == []
    assert report.layers_checked == 14
    assert {client: verdict.loads for client, verdict in report.clients.items()} == {
        "peft": True, "vllm": False, "llama.cpp": False,
    }  # fmt: skip
    model, _ = load_run(run)
    layers = [model.get_submodule(f"model.layers.1.{name}") for name in ("mlp.up_proj", "self_attn.k_proj")]
    assert [layer.spec.rank for layer in layers] == [6, 2]
    assert all(layer.lora_B.abs().max() > 0 for layer in layers)
    merge(run, tmp_path / "out", "float32")
    report = verify(run, tmp_path / "out")
    assert report.problems == []
    assert report.tensors_checked == 21
    assert "; ranks by layer: {'up_proj': 6, " in (tmp_path / "out" / "README.md").read_text()


def test_the_gguf_file_is_verified(run, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    merge(run, tmp_path / "out", format="gguf")
    report = verify(run, tmp_path / "out")
    assert report.problems == []
    assert report.tensors_checked == 21


def test_a_continued_run_equals_the_uninterrupted_one(run, tiny_base, alpaca_file, tmp_path):
    rslora = "rslora: true" in (run / "config.yaml").read_text()
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", lora__rslora=rslora, **PATTERNS))
    train(config, stop_at=4)
    train(config)
    assert_same_run(tmp_path / "run", run)


def test_a_pattern_that_matches_nothing_is_refused_before_step_1(tiny_base, alpaca_file, tmp_path):
    path = run_config(tiny_base, alpaca_file, tmp_path / "run", lora__rank_pattern={"up_porj": 3})
    for use in (train, lambda config: estimate(config, SUPERVISED)):
        with pytest.raises(ModelError, match=r"lora\.rank_pattern: 'up_porj' matches no adapted layer"):
            use(load_config(path))


def test_the_run_is_saved_with_its_patterns(run):
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {
        "model.layers.0.mlp.up_proj": 6,
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.1.self_attn.k_proj": 2,
        "model.layers.1.mlp.up_proj": 6,
    }
