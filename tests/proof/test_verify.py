"""Verification of merged folders: the run's own merge passes, and every mismatch is reported."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config

from qlora.config import load_config
from qlora.errors import ExportError
from qlora.export import merge
from qlora.export.weights import MergedWeights
from qlora.model import load_base
from qlora.proof import verify
from qlora.training import train
from tests.cli import run
from tests.export import change_tensors, forget_adapter
from tests.tiny import make_base, make_tokenizer, run_config

pytestmark = pytest.mark.slow

UP = "model.layers.{}.mlp.up_proj.weight"
HEAD = "lm_head.weight"
NOT_MERGED = "is not base + scaling·B·A"


@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_merged_model_is_verified(dtype, onto, merged, tmp_path):
    merge(merged / "run", tmp_path / "out", dtype, onto=onto)
    report = verify(merged / "run", tmp_path / "out")
    assert report.tensors_checked == 21
    assert report.positions == 512
    if onto == "original":
        # With random weights, a change of the base can raise the loss, but nothing else may differ.
        assert all("is worse than the adapter's" in problem for problem in report.problems)
    else:
        assert report.problems == []
        assert report.matches
        assert report.mean_kl < 1e-3
        assert report.top1_agreement > 0.95
        assert report.adapter_loss == pytest.approx(report.merged_loss, abs=5e-3)
        assert 0 < report.mean_logit_difference < report.max_logit_difference < 0.2
    assert report.max_weight_difference < {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-7}[dtype]
    assert {client: verdict.loads for client, verdict in report.clients.items()} == {
        "peft": True, "vllm": True, "llama.cpp": True,
    }  # fmt: skip


def test_the_adapters_loss_is_the_last_loss_of_the_run(merged):
    lines = [json.loads(line) for line in (merged / "run" / "metrics.jsonl").read_text().splitlines()]
    report = verify(merged / "run", merged / "out")
    assert report.adapter_loss == pytest.approx(lines[-1]["eval_loss"], abs=2e-3)


def test_a_gpt2_is_verified(alpaca_file, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, GPT2Config, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    train(load_config(run_config(base, alpaca_file, tmp_path / "run", train__max_steps=2)))
    merge(tmp_path / "run", tmp_path / "out", max_shard_size="60KB")
    report = verify(tmp_path / "run", tmp_path / "out")
    assert report.problems == []
    assert report.tensors_checked == 28


def test_an_rslora_run_is_verified(tiny_base, alpaca_file, tmp_path):
    config = run_config(tiny_base, alpaca_file, tmp_path / "run", lora__rslora=True, train__max_steps=2)
    train(load_config(config))
    merge(tmp_path / "run", tmp_path / "out")
    assert verify(tmp_path / "run", tmp_path / "out").problems == []


def test_a_run_on_a_4_bit_base_is_verified(tiny_base, alpaca_file, tmp_path):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    packed = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16, quantization_config=settings)
    packed.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    train(load_config(run_config(tmp_path / "base", alpaca_file, tmp_path / "run", train__max_steps=2)))
    merge(tmp_path / "run", tmp_path / "out")
    report = verify(tmp_path / "run", tmp_path / "out")
    assert report.problems == []
    assert report.tensors_checked == 21


def test_swapped_layers_are_reported(own):
    def swap(tensors):
        tensors[UP.format(0)], tensors[UP.format(1)] = tensors[UP.format(1)], tensors[UP.format(0)]

    change_tensors(own, swap)
    report = verify(own / "run", own / "out")
    assert not report.matches
    for layer in (0, 1):
        assert f"tensor {UP.format(layer)} {NOT_MERGED}: it contains {UP.format(1 - layer)}" in report.problems
    assert any("KL" in problem for problem in report.problems)


def test_a_layer_without_its_update_is_reported(own, tiny_base):
    model, _ = load_base(str(tiny_base))
    bare = model.get_submodule(UP.format(1).removesuffix(".weight")).dequantize(model.dtype)
    change_tensors(own, lambda tensors: tensors.update({UP.format(1): bare.to(tensors[UP.format(1)].dtype)}))
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert report.problems[0] == f"tensor {UP.format(1)} {NOT_MERGED}: its update is missing"


def test_a_merge_without_updates_is_reported_by_its_predictions(own, tiny_base):
    source = load_file(tiny_base / "model.safetensors")
    change_tensors(own, lambda tensors: tensors.update({name: value.half() for name, value in source.items()}))
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert any("KL" in problem for problem in report.problems)
    assert any("losses" in problem for problem in report.problems)
    assert sum(problem.startswith("tensor ") for problem in report.problems) == 14
    assert report.merged_loss > report.adapter_loss + 0.5


def test_a_single_changed_value_is_reported(own, seed):
    def nudge(tensors):
        flat = tensors["model.norm.weight"]
        flat[seed % len(flat)] *= 1.01

    change_tensors(own, nudge)
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert report.problems[0].startswith("tensor model.norm.weight is not the base's: values differ by up to ")


def test_a_wrong_scaling_is_reported_for_every_tensor(own):
    run_dir, kept = own / "run", shutil.copytree(own / "run", own / "kept")
    adapter, settings = run_dir / "adapter" / "adapter_config.json", run_dir / "config.yaml"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"lora_alpha": 24}))
    config = yaml.safe_load(settings.read_text())
    config["lora"]["alpha"] = 24
    settings.write_text(yaml.safe_dump(config))
    merge(run_dir, own / "wrong", "bfloat16")
    shutil.rmtree(run_dir)
    kept.rename(run_dir)
    report = verify(own / "run", own / "wrong")
    assert not report.matches
    assert (
        sum(problem.endswith(f"{NOT_MERGED}: its update is 3 times what it should be") for problem in report.problems)
        == 14
    )


def test_an_adapter_whose_config_has_another_scaling_than_the_run_is_reported(own):
    path = own / "run" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16}))
    report = verify(own / "run", own / "out")
    reported, not_compared = report.problems
    assert reported.startswith(f"{path.parent} has a scaling of 4, the run trained with 2, in 14 layers: model.layers.")
    assert not_compared.startswith(f"its predictions were not compared: {path.parent} is not the adapter that its run")
    assert report.tensors_checked == 21


def test_missing_data_prevent_only_the_comparison_of_predictions(own):
    path = own / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"]["train"][0]["path"] = str(own / "gone.json")
    path.write_text(yaml.safe_dump(config))
    for folder in (own / "out", None):
        report = verify(own / "run", folder)
        (problem,) = report.problems
        assert "were not compared: " in problem
        assert "gone.json" in problem
    assert verify(own / "run", own / "out").tensors_checked == 21


def test_a_mistake_of_merge_itself_is_reported(merged, tmp_path, monkeypatch):
    """Verification computes the tensors by other code than merge."""
    blocks = MergedWeights.blocks
    monkeypatch.setattr(MergedWeights, "blocks", lambda *given: (block * 1.01 for block in blocks(*given)))
    merge(merged / "run", tmp_path / "out")
    report = verify(merged / "run", tmp_path / "out")
    assert sum(problem.startswith("tensor ") for problem in report.problems) == 21


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_value_off_by_two_units_in_the_last_place_is_reported(dtype, merged, tmp_path, seed):
    merge(merged / "run", tmp_path / "out", dtype)

    def nudge(tensors):
        bits = tensors[UP.format(0)].view(-1).view(torch.int16)
        bits[seed % len(bits)] ^= 2

    change_tensors(tmp_path, nudge)
    (problem,) = verify(merged / "run", tmp_path / "out").problems
    assert problem.startswith(f"tensor {UP.format(0)} {NOT_MERGED}: values differ by up to ")


def test_a_merge_into_another_base_is_reported(own, alpaca_file, tmp_path, seed):
    make_base(tmp_path / "other", seed)
    path = own / "run" / "config.yaml"
    right = path.read_text()
    path.write_text(
        right.replace(json.loads((own / "run" / "run.json").read_text())["base"]["name"], str(tmp_path / "other"))
    )
    merge(own / "run", own / "wrong", force=True)
    report = verify(own / "run", own / "wrong")
    assert report.problems == []  # the merge was forced
    assert report.base_differs == ["model.safetensors"]
    assert (
        "a base other than the one used in training: model.safetensors" in run("verify", own / "run", own / "wrong").out
    )
    path.write_text(right)
    (problem,) = verify(own / "run", own / "wrong").problems  # instead of one for each tensor
    assert problem.startswith("it was merged onto a base other than the one used in training (model.safetensors diff")


def test_a_base_changed_since_training_is_reported(own, tiny_base):
    base = shutil.copytree(tiny_base, own / "base")
    tensors = load_file(base / "model.safetensors")
    tensors[UP.format(0)][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    path = own / "run" / "config.yaml"
    path.write_text(path.read_text().replace(str(tiny_base), str(base)))
    report = verify(own / "run", own / "out")
    assert report.problems[0] == f"{base} is not the base used in training: model.safetensors differ"
    assert report.problems[1].startswith(f"tensor {UP.format(0)} {NOT_MERGED}")
    assert report.base_differs == ["model.safetensors"]


def test_an_extra_tensor_is_reported(own):
    change_tensors(own, lambda tensors: tensors.update({"extra.weight": tensors["model.norm.weight"].clone()}))
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert "tensor extra.weight is not in the base" in report.problems


@pytest.mark.parametrize("name", ["model.norm.weight", UP.format(1)])
def test_a_missing_tensor_is_reported(name, own):
    change_tensors(own, lambda tensors: tensors.pop(name))
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert report.problems[0] == f"tensor {name} is missing"
    assert report.merged_loss is None


def test_a_truncated_file_is_reported(own):
    path = own / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert "model.safetensors has " in report.problems[0]
    assert report.tensors_checked is None


def test_a_tensor_of_another_shape_is_reported(own):
    change_tensors(own, lambda tensors: tensors.update({UP.format(0): tensors[UP.format(0)][:-1]}))
    report = verify(own / "run", own / "out")
    assert report.problems[0] == f"tensor {UP.format(0)} has the shape (171, 64), not (172, 64)"


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_a_merge_of_an_absent_device_is_reported_if_it_needs_the_device(onto, merged, tmp_path):
    merge(merged / "run", tmp_path / "out", onto=onto)
    path = tmp_path / "out" / "merge_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "nowhere"}))
    if onto == "original":
        assert verify(merged / "run", tmp_path / "out").tensors_checked == 21
    else:
        with pytest.raises(ExportError, match="out was merged on nowhere, .*; verify it there"):
            verify(merged / "run", tmp_path / "out")


def test_a_file_instead_of_its_folder_is_reported(merged):
    with pytest.raises(ExportError, match="is a file; give the folder"):
        verify(merged / "run", merged / "out" / "model.safetensors")


def test_a_folder_that_merge_did_not_write_is_refused(merged, tiny_base):
    with pytest.raises(ExportError, match=r"no merge_report\.json; give a folder that qlora merge wrote"):
        verify(merged / "run", tiny_base)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"dtype": "float16"}',
        '{"onto": "original"}',
        "\xff",
        '{"dtype": "float16", "onto": "original", "base_differs": [1]}',
    ],
)
def test_a_damaged_report_of_the_merge_is_reported(text, merged, tmp_path):
    (tmp_path / "merge_report.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ExportError, match=r"merge_report\.json is damaged"):
        verify(merged / "run", tmp_path)


def test_a_tensor_stored_in_another_dtype_is_reported(own):
    """The values are equal, but a tool that loads tensors in the file's dtype gets another model."""
    name = "model.norm.weight"
    change_tensors(own, lambda tensors: tensors.update({name: tensors[name].float()}))
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert report.problems == [f"tensor {name} is in float32, not float16"]


def test_a_run_other_than_the_merged_one_is_reported(own, tiny_base, alpaca_file, tmp_path):
    other = tmp_path / "other"
    train(load_config(run_config(tiny_base, alpaca_file, other, train__seed=1)))
    report = verify(other, own / "out")
    assert not report.matches
    assert report.problems == [
        f"it was merged from an adapter other than {other / 'adapter'}: from another run, or from this run before it "
        "was started again. Merge again."
    ]
    forget_adapter(own / "out")
    report = verify(other, own / "out")
    assert not report.matches
    assert sum("is not base + scaling·B·A" in problem for problem in report.problems) == 14


def test_a_real_model_is_verified_and_its_base_is_not(realdata, tmp_path):
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
