"""Verification: it passes what merge wrote, and tells every way in which a folder is something else."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from qlora.config import load_config
from qlora.errors import ExportError, ModelError
from qlora.export import merge, verify
from qlora.model import load_base
from qlora.training import train
from tests.tiny import make_base, run_config

UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def merged(tiny_base, alpaca_file, tmp_path_factory):
    """A run and what merge made of it; not to be changed."""
    folder = tmp_path_factory.mktemp("verify")
    train(load_config(run_config(tiny_base, alpaca_file, folder / "run")))
    merge(folder / "run", folder / "out")
    return folder


@pytest.fixture
def own(merged, tmp_path):
    """The same, to be spoilt."""
    for name in ("run", "out"):
        shutil.copytree(merged / name, tmp_path / name)
    return tmp_path


def change_tensors(folder, change):
    path = folder / "out" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_merge_wrote_passes(dtype, onto, merged, tmp_path):
    merge(merged / "run", tmp_path / "out", dtype, onto=onto)
    report = verify(merged / "run", tmp_path / "out")
    if onto == "original" and not report.matches:
        # Random weights lose by the change of base what they would lose by any; only the loss may be apart.
        assert all(problem.startswith("loss ") for problem in report.problems)
        return
    assert report.problems == []
    assert report.matches
    assert report.tensors_checked == 21
    assert report.positions == 512
    if onto == "dequantized":
        assert report.mean_kl < 1e-3
        assert report.top1_agreement > 0.95
        assert report.adapter_loss == pytest.approx(report.merged_loss, abs=5e-3)


def test_the_adapters_loss_is_the_last_one_of_the_run(merged):
    lines = [json.loads(line) for line in (merged / "run" / "metrics.jsonl").read_text().splitlines()]
    report = verify(merged / "run", merged / "out")
    assert report.adapter_loss == pytest.approx(lines[-1]["eval_loss"], abs=2e-3)


def test_a_gpt2_passes(alpaca_file, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, GPT2Config, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    train(load_config(run_config(base, alpaca_file, tmp_path / "run", train__max_steps=2)))
    merge(tmp_path / "run", tmp_path / "out", max_shard_size="60KB")
    report = verify(tmp_path / "run", tmp_path / "out")
    assert report.problems == []
    assert report.tensors_checked == 28


def test_swapped_layers_are_told(own):
    def swap(tensors):
        tensors[UP.format(0)], tensors[UP.format(1)] = tensors[UP.format(1)], tensors[UP.format(0)]

    change_tensors(own, swap)
    report = verify(own / "run", own / "out")
    assert not report.matches
    for layer in (0, 1):
        assert f"tensor {UP.format(layer)} is not base + scaling·B·A" in report.problems
    assert any("KL" in problem for problem in report.problems)


def test_a_layer_without_its_update_is_told(own, tiny_base):
    model, _ = load_base(str(tiny_base))
    bare = model.get_submodule(UP.format(1).removesuffix(".weight")).dequantize(model.dtype)
    change_tensors(own, lambda tensors: tensors.update({UP.format(1): bare.to(tensors[UP.format(1)].dtype)}))
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert f"tensor {UP.format(1)} is not base + scaling·B·A" in report.problems


def test_a_merge_that_did_nothing_is_told_by_what_it_predicts(own, tiny_base):
    source = load_file(tiny_base / "model.safetensors")
    change_tensors(own, lambda tensors: tensors.update({name: value.half() for name, value in source.items()}))
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert any("KL" in problem for problem in report.problems)
    assert any("losses" in problem for problem in report.problems)
    assert sum(problem.startswith("tensor ") for problem in report.problems) == 14
    assert report.merged_loss > report.adapter_loss + 0.5


def test_a_single_changed_value_is_told(own, seed):
    def nudge(tensors):
        flat = tensors["model.norm.weight"]
        flat[seed % len(flat)] *= 1.01

    change_tensors(own, nudge)
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert report.problems[0] == "tensor model.norm.weight is not base + scaling·B·A"


def test_a_wrong_scaling_is_told(own):
    path = own / "run" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16}))
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert sum("is not base + scaling·B·A" in problem for problem in report.problems) == 14


def test_another_chat_template_is_told(own):
    path = own / "out" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert report.problems == ["the chat template is another"]


def test_a_tensor_too_many_is_told(own):
    change_tensors(own, lambda tensors: tensors.update({"extra.weight": tensors["model.norm.weight"].clone()}))
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert "tensor extra.weight is in only one of the two" in report.problems


def test_a_tensor_too_few_is_an_error_that_names_it(own):
    change_tensors(own, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        verify(own / "run", own / "out")


def test_a_file_that_is_cut_short_is_an_error_that_names_it(own):
    path = own / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors has \d+ bytes"):
        verify(own / "run", own / "out")


def test_a_folder_that_merge_did_not_write_is_refused(merged, tiny_base):
    with pytest.raises(ExportError, match="not written by qlora merge"):
        verify(merged / "run", tiny_base)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"dtype": "float16"}', '{"onto": "original"}', "\xff"])
def test_a_damaged_report_of_the_merge_is_told(text, merged, tmp_path):
    (tmp_path / "merge_report.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ExportError, match=r"merge_report\.json is damaged"):
        verify(merged / "run", tmp_path)


def test_a_tensor_stored_in_another_dtype_is_told(own):
    """Its values are the same; but whoever loads it by its file gets another model."""
    name = "model.norm.weight"
    change_tensors(own, lambda tensors: tensors.update({name: tensors[name].float()}))
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert report.problems == [f"tensor {name} is not base + scaling·B·A"]


def test_another_run_than_the_one_merged_is_told(merged, tiny_base, alpaca_file, tmp_path):
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__seed=1)))
    report = verify(tmp_path / "run", merged / "out")
    assert not report.matches
    assert sum("is not base + scaling·B·A" in problem for problem in report.problems) == 14


@pytest.mark.slow
def test_a_real_model_passes_and_its_base_does_not(realdata, tmp_path):
    base = realdata / "models" / "stories260K-hf"
    data = tmp_path / "plays.txt"
    data.write_text((realdata / "data/tinyshakespeare/input.txt").read_text(encoding="utf-8")[:40_000])
    config = run_config(
        base, data, tmp_path / "run", data__format="text", data__overlong="split", data__max_seq_len=256,
        data__eval=0.1, train__max_steps=8, train__save_every=8, train__eval_every=8,
    )  # fmt: skip
    train(load_config(config))
    merge(tmp_path / "run", tmp_path / "out")
    report = verify(tmp_path / "run", tmp_path / "out")
    assert report.problems == []
    shutil.copy(base / "model.safetensors", tmp_path / "out" / "model.safetensors")
    assert not verify(tmp_path / "run", tmp_path / "out").matches
