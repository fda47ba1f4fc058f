"""Verification of an adapter without a merge: a run's own adapter passes, and every mismatch is reported."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers.models.hrm_text import HrmTextConfig

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import CheckpointError, QLoRAError
from qlora.export import merge
from qlora.export.held_out import held_out_examples
from qlora.files import BaseFiles
from qlora.model import load_run, open_source
from qlora.proof import verify
from qlora.proof.adapter import check_layers
from qlora.proof.expected import ExpectedWeights
from qlora.training import assemble, train
from tests.cli import run as run_command
from tests.tiny import make_base, run_config

pytestmark = pytest.mark.slow

UP = "model.layers.{}.mlp.up_proj"


def change_config(folder, **values):
    path = folder / "run" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def loaded(folder):
    """Return a run's model, its weights computed a second time, and its held-out examples."""
    run = RunDirectory.open(folder)
    config = load_config(run.config)
    model, tokenizer = load_run(folder, "cpu")
    expected = ExpectedWeights(open_source(folder), BaseFiles.resolve(config.model.base), "dequantized", model.device)
    return model, expected, held_out_examples(run, tokenizer)


def test_the_adapter_of_a_run_is_verified(merged):
    report = verify(merged / "run")
    assert report.problems == []
    assert (report.layers_checked, report.tensors_checked, report.onto) == (14, None, None)
    assert 0 < report.max_layer_difference < 0.02
    lines = [json.loads(line) for line in (merged / "run" / "metrics.jsonl").read_text().splitlines()]
    assert report.adapter_loss == pytest.approx(lines[-1]["eval_loss"], abs=2e-3)
    assert report.clients["peft"].loads


def test_in_fp32_the_layers_differ_only_by_the_rounding_of_sums(tiny_base, alpaca_file, tmp_path):
    config = run_config(
        tiny_base, alpaca_file, tmp_path / "run", model__compute_dtype="float32", lora__dtype="float32",
        lora__rslora=True, train__max_steps=2,
    )  # fmt: skip
    train(load_config(config))
    report = verify(tmp_path / "run")
    assert report.problems == []
    assert report.max_layer_difference < 1e-5


def test_layers_whose_weights_are_parts_of_other_tensors_are_reported(alpaca_file, tmp_path, seed, monkeypatch):
    monkeypatch.setattr(assemble, "check_mergeable", lambda *_: None)  # as before version 0.2
    base = make_base(tmp_path / "base", seed, HrmTextConfig, num_hidden_layers=1, L_cycles=1, H_cycles=1)
    train(load_config(run_config(base, alpaca_file, tmp_path / "run", train__max_steps=1)))
    report = verify(tmp_path / "run")
    assert report.layers_checked
    assert len(report.problems) == 12
    assert all("its weight is not a tensor of its own" in problem for problem in report.problems)


def test_the_command_exits_with_1_on_a_changed_adapter(own):
    done = run_command("verify", own / "run", "--json")
    assert done.code == 0
    assert json.loads(done.out)["layers_checked"] == 14
    change_config(own, lora_alpha=16)
    done = run_command("verify", own / "run")
    assert done.code == 1
    assert done.out.startswith("The adapter is NOT what")
    assert "has a scaling of 4, the run trained with 2" in done.out


@pytest.mark.parametrize("values", [{"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "lora_ga"}])
@pytest.mark.parametrize("use", [load_run, verify, lambda run: merge(run, run.with_name("other"))])
def test_an_adapter_that_is_not_plain_lora_is_refused(use, values, own):
    change_config(own, **values)
    with pytest.raises(CheckpointError, match="init_lora_weights: .*plain LoRA"):
        use(own / "run")


def test_an_adapter_with_another_scaling_than_its_run_is_not_used(own):
    change_config(own, lora_alpha=16)
    for use in (load_run, lambda run: merge(run, run.with_name("other"))):
        with pytest.raises(QLoRAError, match="has a scaling of 4, the run trained with 2"):
            use(own / "run")


def test_an_adapter_with_another_rank_than_its_config_says_is_refused(own):
    change_config(own, rank_pattern={"up_proj": 3})
    for use in (load_run, lambda run: merge(run, run.with_name("other")), verify):
        with pytest.raises(CheckpointError, match=r"up_proj has factors of rank 4, adapter_config\.json says 3"):
            use(own / "run")


def test_an_adapter_with_another_scaling_in_some_layers_is_refused_with_their_names(own):
    change_config(own, alpha_pattern={"up_proj": 3})
    for use in (load_run, lambda run: merge(run, run.with_name("other"))):
        with pytest.raises(QLoRAError, match=r"up_proj has a scaling of .*, the run trained with 2"):
            use(own / "run")
    report = verify(own / "run")
    assert not report.matches
    assert any(f"in 2 layers: {UP.format(0)}, {UP.format(1)}" in problem for problem in report.problems)


def test_a_value_changed_since_the_last_step_is_reported(own, seed):
    path = own / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[seed % len(tensors)]
    flat = tensors[name].view(-1)
    flat[seed % len(flat)] += 1
    save_file(tensors, path)
    assert verify(own / "run").problems == [f"{path.parent}: {name} differs from the checkpoint of the last step"]


def test_a_damaged_checkpoint_is_reported_and_the_rest_is_compared(own):
    path = sorted((own / "run" / "checkpoints").iterdir())[-1] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    for damage in ("truncated", "is missing"):
        report = verify(own / "run")
        (problem,) = report.problems
        assert problem.startswith("the adapter can't be compared with the last checkpoint")
        assert damage in problem
        assert str(path.parent) in problem
        assert report.layers_checked == 14
        path.unlink(missing_ok=True)


def test_an_adapter_that_lacks_a_layer_is_reported_and_does_not_load(own):
    path = own / "run" / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if UP.format(1) not in name}, path)
    lacks, not_compared = verify(own / "run").problems
    assert lacks == f"{path.parent} lacks the factors of {UP.format(1)}"
    assert "its outputs were not compared: " in not_compared
    assert "differ in 1 modules" in not_compared
    with pytest.raises(CheckpointError, match="differ in 1 modules"):
        load_run(own / "run")


@pytest.mark.parametrize("times", [0.0, 0.5, 2.0])
def test_a_layer_with_another_scaling_is_reported(times, merged):
    model, expected, examples = loaded(merged / "run")
    model.get_submodule(UP.format(1)).lora_B.data.mul_(times)
    assert check_layers(model, expected, examples).problems == [
        f"{UP.format(1)} computes with {times:g} times its update"
    ]


def test_swapped_layers_of_a_loaded_adapter_are_reported(merged):
    model, expected, examples = loaded(merged / "run")
    one, other = (model.get_submodule(UP.format(layer)) for layer in (0, 1))
    one.base, other.base = other.base, one.base
    check = check_layers(model, expected, examples)
    assert [problem.partition(" computes other outputs")[0] for problem in check.problems] == [
        UP.format(layer) for layer in (0, 1)
    ]
    assert check.max_difference > 0.5
