"""model.rope_scaling: trained on longer sequences than the base takes, and written to the release."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora.config import load_config
from qlora.errors import DataError, ModelError
from qlora.export import merge
from qlora.memory.estimate import estimate
from qlora.model import SUPERVISED, load_base, load_run
from qlora.proof.verify import verify
from qlora.training import plan_run, preview, train
from tests.tiny import make_base, run_config, write_jsonl


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_a_run_on_longer_sequences_is_released_with_its_scaling(kind, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, max_position_embeddings=64)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{number} " * 35} for number in range(10, 22)])
    settings = {"data__packing": False, "train__max_steps": 2, "train__micro_batch_size": 1}
    settings["model__compute_dtype"] = "float32"
    plain = load_config(run_config(base, rows, tmp_path / "run", **settings))
    with pytest.raises(DataError, match=r"positions for 64; .* extend the context with model\.rope_scaling"):
        plan_run(plain)
    assert preview(plain).problems
    scaling = {"type": kind, "factor": 4.0}
    config = load_config(run_config(base, rows, tmp_path / "run", model__rope_scaling=scaling, **settings))
    assert not preview(config).problems
    assert estimate(config, SUPERVISED, "cpu").footprint.positions == 256
    train(config)
    merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    report = verify(tmp_path / "run", tmp_path / "merged")
    assert report.matches, report.problems
    assert all(f"model.rope_scaling (type {kind}, factor 4)" in str(each) for each in report.clients.values())
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["rope_parameters"]["rope_type"] == kind
    ids = torch.arange(150)[None] % 256
    model, _ = load_run(tmp_path / "run", "cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=model.dtype)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=0, atol=1e-4)
    assert merged.config.max_position_embeddings == (64 if kind == "dynamic" else 256)


def test_a_base_without_rotary_embeddings_is_refused(tmp_path, seed):
    from transformers import OPTConfig

    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 1}
    base = make_base(tmp_path / "base", seed, OPTConfig, **sizes)
    with pytest.raises(ModelError, match=r"opt has no rotary embeddings that can be scaled; omit model\.rope_scaling"):
        load_base(str(base), rope_scaling={"type": "yarn", "factor": 2.0})
