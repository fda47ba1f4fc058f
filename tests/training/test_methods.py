"""Every kind of adapter and initial value: trained, stopped and continued, merged and verified."""

import json

import pytest
import torch

from qlora.config import load_config
from qlora.errors import ConfigError
from qlora.export import merge
from qlora.export.quantize import quantize_model
from qlora.lora import adapters_off, lora_layers
from qlora.model import load_base, load_for_training, load_run
from qlora.nf4 import NF4Linear
from qlora.proof import verify
from qlora.training import train
from tests.tiny import run_config, write_jsonl
from tests.training.same_run import assert_same_run

METHODS = {
    "dora": {"lora__kind": "dora"},
    "rows": {"lora__kind": "rows", "lora__alpha": 32},
    "B alone": {"lora__train": "B", "lora__init": "orthogonal"},
    "eva": {"lora__init": "eva"},
    "pissa": {"lora__init": "pissa"},
    "reconstruct": {"lora__init": "reconstruct"},
    "final rank": {"lora__rank": 6, "lora__final_rank": 3},
    "dora + eva + final rank + master": {
        "lora__kind": "dora", "lora__init": "eva", "lora__final_rank": 2, "train__rounding": "master",
    },
    "dora + reconstruct + ranks": {
        "lora__kind": "dora", "lora__init": "reconstruct", "lora__rank_pattern": {"v_proj": 2, "layers.1.mlp.*": 7},
    },
    "rows + dropout + layers": {"lora__kind": "rows", "lora__alpha": 32, "lora__dropout": 0.1, "lora__layers": [1]},
    "null space": {"train__keep": {"null_space": "OLD ROWS"}},
    "dora + null space": {"lora__kind": "dora", "train__keep": {"null_space": "OLD ROWS", "kl": 0.1}},
    "eva + B alone + exclude": {"lora__init": "eva", "lora__train": "B", "lora__exclude": ["down_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module", params=METHODS, ids=lambda name: name.replace(" ", "-"))
def trained(request, tiny_base, alpaca_file, tmp_path_factory):
    """The settings and folder of a finished run of a method."""
    folder = tmp_path_factory.mktemp("methods") / "run"
    old_rows = write_jsonl(folder.with_name("old.jsonl"), [{"text": f"{word} and {word}"} for word in ("ash", "elm")])
    settings = json.loads(json.dumps(METHODS[request.param]).replace("OLD ROWS", str(old_rows)))
    train(load_config(run_config(tiny_base, alpaca_file, folder, **settings)))
    return settings, folder


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_a_continued_run_is_the_whole_run(trained, tiny_base, alpaca_file, tmp_path):
    settings, whole = trained
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings))
    train(config, stop_at=3)
    train(config)
    assert_same_run(tmp_path / "run", whole)


def test_the_adapter_and_its_merge_are_verified(trained, tmp_path):
    _, run = trained
    report = verify(run)
    assert report.matches, report.problems
    for onto in ("dequantized", "original"):
        merge(run, tmp_path / onto, dtype="float32", onto=onto)
        report = verify(run, tmp_path / onto)
        # A base of random weights has a loss that may rise by more than verify allows on its original weights.
        assert not [problem for problem in report.problems if "is worse than the adapter's" not in problem]
        assert report.tensors_checked > 0


def test_merged_logits_are_the_runs(trained, tmp_path, generator):
    _, run = trained
    merge(run, tmp_path / "merged", dtype="float32")
    merged, _ = load_base(str(tmp_path / "merged"), quantization="none", compute_dtype="float32")
    adapted, _ = load_run(run)
    ids = torch.randint(259, (1, 40), generator=generator)
    wanted, found = logits(adapted, ids), logits(merged, ids)
    base, _ = load_base(json.loads((run / "run.json").read_text())["base"]["name"])
    changed = (wanted - logits(base, ids)).norm()
    assert (found - wanted).norm() < 0.1 * changed


def test_peft_loads_the_adapter_with_the_same_logits(trained, tmp_path, generator):
    peft = pytest.importorskip("peft")
    _, run = trained
    merge(run, tmp_path / "merged", dtype="float32", onto="dequantized")
    # A base in fp32 with the weights that the run trained on: the merge without its update.
    adapted, _ = load_run(run)
    plain, _ = load_base(json.loads((run / "run.json").read_text())["base"]["name"], "none", compute_dtype="float32")
    for name, layer in adapted.named_modules():
        if isinstance(layer, NF4Linear):
            weight = plain.get_submodule(name.removesuffix(".base")).weight
            weight.data.copy_(layer.dequantize(adapted.dtype))
    other = peft.PeftModel.from_pretrained(plain, run / "adapter").eval()
    merged, _ = load_base(str(tmp_path / "merged"), quantization="none", compute_dtype="float32")
    ids = torch.randint(259, (1, 40), generator=generator)
    assert (logits(other, ids) - logits(merged, ids)).norm() < 1e-4 * logits(merged, ids).norm()


def test_a_reconstructed_runs_adapter_fits_the_base_that_quantize_writes(tiny_base, alpaca_file, tmp_path, generator):
    peft = pytest.importorskip("peft")
    run = tmp_path / "run"
    train(load_config(run_config(tiny_base, alpaca_file, run, lora__init="reconstruct", lora__calibrate=True)))
    report = verify(run)
    assert all("does not fit the published base" in " ".join(each.reasons) for each in report.clients.values())
    quantize_model(str(run), tmp_path / "base")
    theirs, _ = load_base(str(tmp_path / "base"))
    ours, _ = load_run(run)
    ids = torch.randint(259, (1, 40), generator=generator)
    with_adapter = peft.PeftModel.from_pretrained(theirs, run / "adapter").eval()
    assert (logits(with_adapter, ids) - logits(ours, ids)).norm() < 0.01 * logits(ours, ids).norm()


def test_reconstruct_starts_closer_to_the_original_than_the_quantized_base(tiny_base, alpaca_file, tmp_path, generator):
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", lora__init="reconstruct"))
    model, starts = load_for_training(config, "cpu")
    original, _ = load_base(str(tiny_base), "none")
    plain, _ = load_base(str(tiny_base))
    ids = torch.randint(259, (1, 60), generator=generator)
    wanted = logits(original, ids)
    with adapters_off(model):
        off = logits(model, ids)
    assert torch.equal(off, logits(model, ids))  # the initial values are part of the base
    assert (off - wanted).norm() < 0.8 * (logits(plain, ids) - wanted).norm()
    assert starts


# What a run that starts from the adapter of another one sets.
CONTINUATIONS = {
    "as it is": ({}, {}),
    "more components": ({}, {"lora__rank": 7, "lora__alpha": 14}),
    "another scaling": ({}, {"lora__alpha": 16}),
    "stacked": ({}, {"lora__stack": True, "lora__rank": 3}),
    "rows on top": ({}, {"lora__stack": True, "lora__kind": "rows", "lora__alpha": 32}),
    "from reconstruct": ({"lora__init": "reconstruct"}, {}),
    "stacked on reconstruct": ({"lora__init": "reconstruct"}, {"lora__stack": True}),
    "dora on lora": ({}, {"lora__kind": "dora"}),
    "dora": ({"lora__kind": "dora"}, {"lora__kind": "dora"}),
    "rows": ({"lora__kind": "rows", "lora__alpha": 32}, {"lora__kind": "rows", "lora__alpha": 32}),
    "from pissa": ({"lora__init": "pissa"}, {}),
    "trained embeddings": ({"lora__modules_to_save": ["embed_tokens"]}, {"lora__modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.parametrize("name", CONTINUATIONS)
def test_a_run_starts_from_an_adapter_with_the_same_outputs(name, tiny_base, alpaca_file, tmp_path, generator):
    first, then = CONTINUATIONS[name]
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "first", **first)))
    settings = then | {"lora__start_from": str(tmp_path / "first")}
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings))
    earlier, _ = load_run(tmp_path / "first")
    ids = torch.randint(259, (1, 40), generator=generator)
    started, _ = load_for_training(config, "cpu")
    change = logits(started, ids) - logits(earlier, ids)
    assert change.norm() < 1e-2 * logits(earlier, ids).norm()
    result = train(config)
    assert result.eval_losses[6] < result.eval_losses[0]
    report = verify(tmp_path / "run")
    assert report.matches, report.problems
    merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    report = verify(tmp_path / "run", tmp_path / "merged")
    assert report.matches, report.problems


def test_a_run_starts_from_an_adapter_of_peft(tiny_base, alpaca_file, tmp_path, generator):
    peft = pytest.importorskip("peft")
    base, _ = load_base(str(tiny_base), "none", compute_dtype="float32")
    settings = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "up_proj"], use_rslora=True)
    theirs = peft.get_peft_model(base, settings)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    theirs.save_pretrained(tmp_path / "peft")
    settings = {"lora__start_from": str(tmp_path / "peft"), "lora__dtype": "float32"}
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings))
    started, _ = load_for_training(config, "cpu")
    for name, layer in lora_layers(started):
        if name.endswith(("q_proj", "up_proj")):
            wanted = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
            assert (layer.delta_weight() - wanted).norm() < 1e-5 * wanted.norm()
        else:
            assert not layer.delta_weight().any()


@pytest.mark.parametrize(("first", "then", "message"), [
    ({"lora__kind": "dora"}, {}, "it is a DoRA adapter; set lora.kind: dora"),
    ({"lora__kind": "dora"}, {"lora__stack": True}, "can't be kept below another adapter"),
    ({}, {"lora__targets": ["q_proj"]}, r"it adapts 12 layers that lora.targets, lora.layers and lora.exclude leave"),
    ({}, {"lora__kind": "rows", "lora__alpha": 32}, "it was not trained with lora.kind: rows"),
])  # fmt: skip
def test_an_adapter_that_the_config_can_not_continue_is_refused(first, then, message, tiny_base, alpaca_file, tmp_path):
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "first", train__max_steps=1, **first)))
    settings = then | {"lora__start_from": str(tmp_path / "first")}
    with pytest.raises(ConfigError, match=message):
        load_for_training(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)), "cpu")
