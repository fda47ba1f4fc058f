"""Adapters in GGUF files: they change weights as the trained adapter does, and every mismatch is reported."""

import pytest
import torch
from transformers import Qwen3Config

from qlora.checkpoint import read_adapter
from qlora.config import load_config
from qlora.errors import ExportError
from qlora.export import merge
from qlora.proof import verify
from qlora.training import train
from tests.cli import run as run_command
from tests.tiny import make_base, only, run_config

pytestmark = pytest.mark.slow

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

KINDS = {
    "llama": ({}, {}),
    "llama, rsLoRA and ranks of layers": ({}, {"lora__rslora": True, "lora__rank_pattern": {"q_proj": 8}}),
    "qwen3": ({"config_class": Qwen3Config, "vocab_size": 264, "head_dim": 32}, {}),
}


@pytest.fixture(scope="module", params=KINDS)
def run(request, alpaca_file, tmp_path_factory):
    """A trained run; not to be changed."""
    folder, (sizes, settings) = tmp_path_factory.mktemp("adapter"), KINDS[request.param]
    base = make_base(folder / "base", seed=3, **sizes)
    train(load_config(run_config(base, alpaca_file, folder / "run", train__max_steps=3, **settings)))
    return folder / "run"


def test_the_file_holds_the_adapter_and_is_verified(run, tmp_path):
    done = run_command("merge", run, "-o", tmp_path / "mine", "--format", "lora-gguf", "--json").json()
    layers = read_adapter(run / "adapter").layers
    assert (done["merged"], done["tensors"], done["format"]) == (len(layers), 2 * len(layers), "lora-gguf")
    reader = gguf.GGUFReader(tmp_path / "mine" / "mine-lora.gguf")
    assert reader.fields["adapter.type"].contents() == "lora"
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    A, B = (tensors[f"blk.1.ffn_down.weight.lora_{factor}"] for factor in "ab")
    layer = layers["model.layers.1.mlp.down_proj"]
    expected = layer.scaling * layer.B.float() @ layer.A.float()
    torch.testing.assert_close(alpha / len(A) * B @ A, expected, rtol=1e-5, atol=1e-7)
    report = run_command("verify", run, tmp_path / "mine", "--json").json()
    assert (report["matches"], report["tensors_checked"]) == (True, 2 * len(layers))
    again = run_command("merge", run, "-o", tmp_path / "mine", "--format", "lora-gguf", "--update")
    assert "already holds this merge" in again.out


@pytest.mark.parametrize("change", ["alpha", "factor", "rows", "shape", "missing"])
def test_another_adapter_is_reported(change, run, tmp_path):
    merge(run, tmp_path / "mine", format="lora-gguf")
    path = only(list((tmp_path / "mine").glob("*.gguf")))
    if change == "missing":
        content = path.read_bytes().replace(b"blk.0.ffn_up.weight.lora_b", b"blk.9.ffn_up.weight.lora_b")
        path.write_bytes(content)
    else:
        reader = gguf.GGUFReader(path, "r+")
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        if change == "alpha":
            reader.fields["adapter.lora.alpha"].parts[-1][0] *= 1.01
        elif change == "shape":
            (tensor,) = (each for each in reader.tensors if each.name == "blk.0.attn_v.weight.lora_b")
            sizes = tensor.field.parts[3]
            sizes[:] = sizes[::-1].copy()
            del tensor, sizes
        elif change == "factor":
            tensors["blk.0.attn_v.weight.lora_b"][0] += 1
        else:
            rows = tensors["blk.0.attn_q.weight.lora_b"]
            rows[:] = rows[::-1].copy()
        del reader, tensors
    problems = verify(run, tmp_path / "mine").problems
    expected = {
        "alpha": "is not scaling·B·A",
        "factor": "v_proj is not",
        "rows": "q_proj is not",
        "shape": "v_proj: its factors have the shapes",
        "missing": "up_proj",
    }
    assert any(expected[change] in problem for problem in problems)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora__kind": "dora"}, r"no magnitudes \(DoRA\)"),
        ({"lora__modules_to_save": ["lm_head"]}, "no rows of embedding and head"),
        ({"lora__init": "reconstruct"}, "fits a base of its own"),
        ({"model__rope_scaling": {"type": "yarn", "factor": 2}}, r"model\.rope_scaling extends a context"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(settings, message, tiny_base, alpaca_file, tmp_path):
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=1, **settings)))
    with pytest.raises(ExportError, match=message):
        merge(tmp_path / "run", tmp_path / "mine", format="lora-gguf")
    assert not (tmp_path / "mine").exists()


def test_options_of_a_merge_are_refused(tmp_path):
    for option in (["--dtype", "q8_0"], ["--onto", "original"], ["--force"], ["--max-shard-size", "1GB"]):
        done = run_command("merge", tmp_path, "-o", tmp_path / "x", "--format", "lora-gguf", *option)
        assert done.code == 2
        assert f"{option[0]} does not apply to --format lora-gguf" in " ".join(done.err.replace("│", "").split())
