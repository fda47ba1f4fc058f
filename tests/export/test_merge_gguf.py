"""A run merged into GGUF equals the run merged into safetensors, up to the rounding of the format."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.errors import ExportError
from qlora.export import merge
from tests.cli import run as run_command

pytestmark = pytest.mark.slow

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")


@pytest.fixture
def run(merged):
    """A trained run; not to be changed."""
    return merged / "run"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_every_value_is_the_merged_value_rounded_once(dtype, onto, run, tmp_path):
    seen = []
    report = merge(run, tmp_path / "out", dtype, onto, on_progress=lambda *steps: seen.append(steps), format="gguf")
    merge(run, tmp_path / "exact", "float32", onto)
    file = {"float16": "out-f16.gguf", "bfloat16": "out-bf16.gguf"}[dtype]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file, dtype=torch.float32).state_dict()
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32).state_dict()
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        expected = value if value.dim() == 1 else value.to(getattr(torch, dtype)).float()
        assert torch.equal(found[name], expected), name
    assert (report.merged, report.tensors) == (14, len(exact))
    assert seen[-1][0] == seen[-1][1] == 4 * sum(value.numel() for value in exact.values())
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert own("a b").input_ids == AutoTokenizer.from_pretrained(tmp_path / "exact")("a b").input_ids


def test_progress_ends_at_the_total_if_a_tied_model_has_its_weight_twice(tied, tmp_path):
    copy, base = (shutil.copytree(tied / name, tmp_path / name) for name in ("run", "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(tied / "base"), str(base)))
    seen = []
    merge(copy, tmp_path / "out", force=True, on_progress=lambda *steps: seen.append(steps), format="gguf")
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(("dtype", "onto"), [("float32", "dequantized"), ("float16", "best")])
def test_a_dtype_or_base_that_gguf_does_not_support_is_refused(dtype, onto, run, tmp_path):
    with pytest.raises(ExportError, match=f"can't be written in {dtype} onto {onto}"):
        merge(run, tmp_path / "out", dtype, onto, format="gguf")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_file_and_card_and_a_dry_run_lists_the_upload(run, tmp_path):
    out = tmp_path / "mine"
    report = run_command(
        "merge",
        run,
        "-o",
        out,
        "--format",
        "gguf",
        "--dtype",
        "q8_0",
        "--push-to-hub",
        "me/mine",
        "--dry-run",
        "--json",
    ).json()
    assert report["pushed"]["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
    assert {"mine-q8_0.gguf", "README.md", "config.json"} <= report["pushed"]["files"].keys()
    assert report["num_bytes"] == (out / "mine-q8_0.gguf").stat().st_size
    card = (out / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "| weights | q8_0 |" in card


def test_a_release_in_safetensors_can_be_uploaded(run, tmp_path):
    out = tmp_path / "mine"
    options = ["--max-shard-size", "200000", "--push-to-hub", "me/mine", "--dry-run", "--json"]
    report = run_command("merge", run, "-o", out, *options).json()
    names = {"model.safetensors.index.json", "README.md", "merge_report.json"}
    assert names <= report["pushed"]["files"].keys()
    assert str(tmp_path) not in (out / "merge_report.json").read_text()


@pytest.mark.parametrize(
    "options", [["--dtype", "q8_0"], ["--dry-run"], ["--public"], ["--push-to-hub", "a/b/c"]], ids=" ".join
)
def test_conflicting_options_are_refused_before_anything_is_written(options, run, tmp_path):
    done = run_command("merge", run, "-o", tmp_path / "out", *options)
    assert done.code in (1, 2)
    assert not (tmp_path / "out").exists()
