"""A run merged into GGUF equals the run merged into safetensors, up to the rounding of the format."""

import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.config import load_config
from qlora.errors import ExportError
from qlora.export import merge
from qlora.export.gguf.k_quants import K_QUANTS
from qlora.proof import verify
from qlora.training import train
from tests.cli import run as run_command
from tests.tiny import make_base, run_config

pytestmark = pytest.mark.slow

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")


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


def test_a_file_in_bf16_reports_what_rounding_loses_as_a_folder_does(run, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora.export.rounding.NOTED_SHARE", 0)
    (note,) = merge(run, tmp_path / "folder", "bfloat16").notes
    assert note in merge(run, tmp_path / "file", "bfloat16", format="gguf").notes


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


@pytest.fixture
def wide(alpaca_file, tmp_path):
    """A run whose base has rows of 256 values and more, as K-quants have in a block."""
    base = make_base(tmp_path / "base", 4, hidden_size=256, intermediate_size=512, head_dim=64)
    train(load_config(run_config(base, alpaca_file, tmp_path / "run", train__learning_rate=0.02)))
    return tmp_path / "run"


@pytest.mark.parametrize("dtype", K_QUANTS)
def test_a_k_quant_by_llama_cpps_library_is_verified_and_damage_is_reported(dtype, wide, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    report = merge(wide, tmp_path / "out", dtype, "original", format="gguf")
    file = tmp_path / "out" / f"out-{dtype}.gguf"
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == [file.name]
    weights = load_file(wide.parent / "base" / "model.safetensors").values()
    assert report.num_bytes == file.stat().st_size < 0.55 * 2 * sum(weight.numel() for weight in weights)
    assert any("llama.cpp chose the types of the matrices" in note for note in report.notes)
    assert verify(wide, tmp_path / "out").matches
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file, "r+").tensors}
    rows = tensors["blk.1.ffn_up.weight"]
    rows[:] = rows[::-1].copy()
    del rows, tensors
    (problem,) = verify(wide, tmp_path / "out").problems
    assert "up_proj.weight is not base + scaling·B·A" in problem


@pytest.mark.parametrize("dtype", ["q4_0", "q4_k_m"])
def test_a_missing_update_is_reported_in_few_bits(dtype, wide, tmp_path):
    if dtype in K_QUANTS:
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    merge(wide, tmp_path / "out", dtype, "original", format="gguf")
    adapter = wide / "adapter" / "adapter_model.safetensors"
    tensors = load_file(adapter)
    shutil.copytree(wide, tmp_path / "none")
    save_file(
        {name: value * ("lora_B" not in name) for name, value in tensors.items()},
        tmp_path / "none" / "adapter" / adapter.name,
        metadata={"format": "pt"},
    )
    plain = merge(tmp_path / "none", tmp_path / "plain", dtype, "original", format="gguf")
    (tmp_path / "out" / f"out-{dtype}.gguf").write_bytes((tmp_path / "plain" / f"plain-{dtype}.gguf").read_bytes())
    assert plain.merged == 14
    problems = verify(wide, tmp_path / "out").problems
    assert len(problems) >= 12
    assert all("is not base + scaling·B·A" in problem for problem in problems)


def test_llama_quantize_on_the_path_is_run_and_its_failure_reported(run, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$3" > "$0.asked"\necho "no such type" >&2\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with pytest.raises(ExportError, match="llama-quantize failed with exit code 3: no such type"):
        merge(run, tmp_path / "out", "q5_k_m", "original", format="gguf")
    assert (program.parent / "llama-quantize.asked").read_text() == "Q5_K_M\n"
    assert not (tmp_path / "out").exists()


def test_without_a_quantizer_nothing_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr("qlora.export.gguf.merge.MergedWeights", lambda *_: pytest.fail("read"))
    with pytest.raises(ExportError, match="pip install llama-cpp-python; or use q8_0"):
        merge(run, tmp_path / "out", "q4_k_m", format="gguf")
