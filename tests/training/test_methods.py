"""Every kind of adapter and initial value: trained, stopped and continued, merged and verified."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import ConfigError, ExportError, ModelError
from qlora.export import merge
from qlora.export.quantize import quantize_model
from qlora.lora import adapters_at_start, adapters_off, lora_layers
from qlora.model import load_base, load_for_training, load_run
from qlora.processes import Processes
from qlora.proof import verify
from qlora.training import train
from qlora.training.assemble import assemble
from qlora.training.replay import replay, save_step
from scripts.dev.bench.dense_experts import copy_dequantized
from tests.tiny import POISON, run_config, write_jsonl
from tests.training.ranks import needs_fork, train_in_two
from tests.training.same_run import assert_same_run, lines_of

pytestmark = pytest.mark.slow

# Each kind, initial value and option once, in pairs that interact.
METHODS = {
    "dora + reconstruct + ranks": {
        "lora__kind": "dora", "lora__init": "reconstruct", "lora__rank_pattern": {"v_proj": 2, "layers.1.mlp.*": 7},
    },
    "rows + dropout + layers + smoothing": {
        "lora__kind": "rows", "lora__alpha": 32, "lora__dropout": 0.1, "lora__layers": [1],
        "train__label_smoothing": 0.1,
    },
    "B alone + eva + exclude": {"lora__train": "B", "lora__init": "eva", "lora__exclude": ["down_proj"]},
    "pissa + rslora": {"lora__init": "pissa", "lora__rslora": True},
    "dora + final rank + master": {"lora__kind": "dora", "lora__final_rank": 2, "train__rounding": "master"},
    "null space + orthogonal + rates": {
        "train__keep": {"null_space": "OLD ROWS", "kl": 0.1}, "lora__init": "orthogonal",
        "train__learning_rates": {"lora_B": "4x"},
    },
    "classification by words + class weights": {"train__objective": "classify", "train__class_weights": "balanced"},
    "classification by a head + dora": {
        "train__objective": "classify", "train__classify_by": "head", "lora__kind": "dora",
    },
    "reward + embeddings + rates": {
        "train__objective": "reward", "train__reward": {"center": 0.01}, "lora__modules_to_save": ["embed_tokens"],
        "train__learning_rates": {"score": "4x"},
    },
    "experts + rslora + patterns + rates + master": {
        "lora__rslora": True, "lora__rank_pattern": {"experts.down_proj": 3, "q_proj": 2},
        "lora__alpha_pattern": {"1.mlp.experts.*": 6}, "train__learning_rates": {"lora_B": "4x"},
        "train__rounding": "master",
    },
    "experts + frozen A + orthogonal": {"lora__train": "B", "lora__init": "orthogonal", "lora__expert_rank": 3},
}  # fmt: skip


@pytest.fixture(scope="session")
def data_of(alpaca_file, pairs_file, labelled_file):
    """A function that returns the rows that a run's settings are for."""
    files = {"reward": pairs_file, "classify": labelled_file}
    return lambda settings: files.get(settings.get("train__objective"), alpaca_file)


@pytest.fixture(scope="session")
def base_of(tiny_base, moe_base):
    """A function that returns the base of a case, by its name."""
    return lambda name: moe_base if name.startswith("experts") else tiny_base


@pytest.fixture(scope="module", params=METHODS, ids=lambda name: name.replace(" ", "-"))
def method(request):
    """The name of a method."""
    return request.param


@pytest.fixture(scope="module")
def base(method, base_of):
    """The base of a method."""
    return base_of(method)


@pytest.fixture(scope="module")
def trained(method, base, data_of, tmp_path_factory):
    """The settings and folder of a finished run of a method, and its merge in fp32."""
    folder = tmp_path_factory.mktemp("methods") / "run"
    old_rows = write_jsonl(folder.with_name("old.jsonl"), [{"text": f"{word} and {word}"} for word in ("ash", "elm")])
    settings = json.loads(json.dumps(METHODS[method]).replace("OLD ROWS", str(old_rows)))
    settings["model__compute_dtype"] = "float32"  # also on processors that multiply in 16 bits
    train(load_config(run_config(base, data_of(settings), folder, **settings)))
    merge(folder, folder.with_name("merged"), dtype="float32")
    return settings, folder, folder.with_name("merged")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_a_continued_run_is_the_whole_run(trained, base, data_of, tmp_path):
    settings, whole, _ = trained
    config = load_config(run_config(base, data_of(settings), tmp_path / "run", **settings))
    train(config, stop_at=3)
    train(config)
    assert_same_run(tmp_path / "run", whole)


def test_the_adapter_and_its_merges_are_verified(trained, tmp_path):
    settings, run, merged = trained
    for folder in (None, merged):
        report = verify(run, folder)
        assert report.matches, report.problems
    if settings.get("lora__init") not in ("pissa", "reconstruct"):  # with these, merges onto both bases differ in kind
        return
    merge(run, tmp_path / "original", dtype="float32", onto="original")
    report = verify(run, tmp_path / "original")
    # A base of random weights has a loss that may rise by more than verify allows on its original weights.
    assert not [problem for problem in report.problems if "is worse than the adapter's" not in problem]
    assert report.tensors_checked > 0


def test_a_gguf_file_holds_the_effective_weights(trained, tmp_path):
    pytest.importorskip("gguf")
    _, run, _ = trained
    record = RunDirectory.open(run).read_record()
    if record.head is not None or record.parameters.adapted_experts:
        refused = "scores texts, and only models that predict tokens are written as GGUF|llama.cpp.s convert_hf_to_gguf"
        with pytest.raises(ExportError, match=refused):
            merge(run, tmp_path / "gguf", dtype="bfloat16", format="gguf")
        return
    merge(run, tmp_path / "gguf", dtype="bfloat16", format="gguf")
    report = verify(run, tmp_path / "gguf")
    assert report.tensors_checked > 0
    assert report.matches, report.problems


def test_merged_logits_are_the_runs_and_pefts(trained, base, generator):
    peft = pytest.importorskip("peft")
    _, run, folder = trained
    head = RunDirectory.open(run).read_record().head
    merged, _ = load_base(str(folder), quantization="none", compute_dtype="float32", head=head)
    adapted, _ = load_run(run)
    ids = torch.randint(259, (1, 40), generator=generator)
    wanted, found = logits(adapted, ids), logits(merged, ids)
    own, _ = load_base(str(base), compute_dtype="float32", head=head)
    assert (found - wanted).norm() < 0.1 * (wanted - logits(own, ids)).norm()
    # The weights that the run trained on, in fp32, with the adapter as PEFT reads it.
    plain, _ = load_base(str(base), "none", compute_dtype="float32", head=head)
    copy_dequantized(adapted, plain)
    theirs = logits(peft.PeftModel.from_pretrained(plain, run / "adapter").eval(), ids)
    assert (theirs - found).norm() < 1e-4 * found.norm()


def test_new_tokens_count_as_a_known_one_before_they_have_rows(tiny_base, alpaca_file, tmp_path):
    settings = {"lora__init": "eva", "data__new_tokens": ["tin", "moss"], "train__max_steps": 1}
    result = train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)))
    assert result.status == "finished"


def test_a_reconstructed_runs_adapter_fits_the_base_that_quantize_writes(tiny_base, alpaca_file, tmp_path, generator):
    peft = pytest.importorskip("peft")
    run = tmp_path / "run"
    exact = {"model__compute_dtype": "float32"}
    train(load_config(run_config(tiny_base, alpaca_file, run, lora__init="reconstruct", lora__calibrate=True, **exact)))
    report = verify(run)
    assert all("does not fit the published base" in " ".join(each.reasons) for each in report.clients.values())
    quantize_model(str(run), tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for module in theirs.modules():
        # Where the processor multiplies bf16, bitsandbytes would pack the weights for sizes that these are not of.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ours, _ = load_run(run)
    ids = torch.randint(259, (1, 40), generator=generator)
    with_adapter = peft.PeftModel.from_pretrained(theirs, run / "adapter").eval()
    assert (logits(with_adapter, ids) - logits(ours, ids)).norm() < 0.01 * logits(ours, ids).norm()


def test_reconstruct_starts_closer_to_the_original_than_the_quantized_base(tiny_base, alpaca_file, tmp_path, generator):
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", lora__init="reconstruct"))
    model, starts = load_for_training(config, "cpu")
    original, _ = load_base(str(tiny_base), "none")
    plain, _ = load_base(str(tiny_base))
    ids = torch.randint(259, (8, 60), generator=generator)  # of fewer, the share varies more
    wanted = logits(original, ids)
    with adapters_off(model):
        off = logits(model, ids)
    assert torch.equal(off, logits(model, ids))  # the initial values are part of the base
    assert (off - wanted).norm() < 0.8 * (logits(plain, ids) - wanted).norm()
    assert starts


# What a run that starts from the adapter of another one sets.
CONTINUATIONS = {
    "more components": ({}, {"lora__rank": 7, "lora__alpha": 14}),
    "another scaling": ({"lora__init": "pissa"}, {"lora__alpha": 16}),
    "rows on top": ({}, {"lora__stack": True, "lora__kind": "rows", "lora__alpha": 32}),
    "from reconstruct": ({"lora__init": "reconstruct"}, {}),
    "stacked on reconstruct": ({"lora__init": "reconstruct"}, {"lora__stack": True, "lora__rank": 3}),
    "dora": ({"lora__kind": "dora"}, {"lora__kind": "dora"}),
    "rows": ({"lora__kind": "rows", "lora__alpha": 32}, {"lora__kind": "rows", "lora__alpha": 32}),
    "experts, more components": (
        {"lora__rank_pattern": {"experts.down_proj": 7}}, {"lora__expert_rank": 5, "lora__alpha": 3},
    ),
    "experts on a run without": ({"lora__expert_rank": 0}, {"lora__stack": True}),
    "dora on lora, embeddings": (
        {"lora__modules_to_save": ["embed_tokens"]}, {"lora__kind": "dora", "lora__modules_to_save": ["embed_tokens"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTINUATIONS)
def test_a_run_starts_from_an_adapter_with_the_same_outputs(name, base_of, alpaca_file, tmp_path, generator):
    first, then = CONTINUATIONS[name]
    base = base_of(name)
    exact = {"model__compute_dtype": "float32"}
    train(load_config(run_config(base, alpaca_file, tmp_path / "first", **first, **exact)))
    settings = then | {"lora__start_from": str(tmp_path / "first")}
    config = load_config(run_config(base, alpaca_file, tmp_path / "run", **settings, **exact))
    earlier, _ = load_run(tmp_path / "first")
    ids = torch.randint(259, (1, 40), generator=generator)
    started, _ = load_for_training(config, "cpu", is_reference=True)
    first_logits = logits(started, ids)
    assert (first_logits - logits(earlier, ids)).norm() < 1e-2 * first_logits.norm()
    for parameter in started.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert not torch.equal(logits(started, ids), first_logits)
    with adapters_at_start(started):
        # DoRA divides by the norms that it multiplies with, or does neither.
        assert (logits(started, ids) - first_logits).norm() < 1e-5 * first_logits.norm()
    result = train(config)
    assert result.eval_losses[6] < result.eval_losses[0]
    merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    report = verify(tmp_path / "run", tmp_path / "merged")
    assert report.matches, report.problems


@pytest.mark.parametrize("parameters", [None, ["gate_up_proj", "experts.down_proj"]], ids=["linears", "experts"])
def test_a_run_starts_from_an_adapter_of_peft(parameters, base_of, alpaca_file, tmp_path, generator):
    peft = pytest.importorskip("peft")
    folder = base_of("experts" if parameters else "")
    base, _ = load_base(str(folder), "none", compute_dtype="float32", allow_unquantized=True)
    settings = peft.LoraConfig(
        r=3, lora_alpha=9, target_modules=["q_proj", "up_proj"], target_parameters=parameters, use_rslora=True
    )
    theirs = peft.get_peft_model(base, settings)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    theirs.save_pretrained(tmp_path / "peft")
    exact = {"lora__dtype": "float32", "model__quantization": "none", "model__compute_dtype": "float32"}
    settings = {"lora__start_from": str(tmp_path / "peft"), **exact}
    config = load_config(run_config(folder, alpaca_file, tmp_path / "run", **settings))
    started, _ = load_for_training(config, "cpu")
    for name, layer in lora_layers(started):
        if name.endswith(("q_proj", "up_proj")):
            wanted = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
            assert (layer.delta_weight() - wanted).norm() < 1e-5 * wanted.norm()
        else:
            assert not layer.delta_weight().any()
    merged = theirs.merge_and_unload()
    ids = torch.randint(259, (1, 40), generator=generator)
    assert (logits(started, ids) - logits(merged, ids)).norm() < 1e-4 * logits(merged, ids).norm()


@pytest.mark.parametrize(("first", "then", "message"), [
    ({"lora__kind": "dora"}, {}, "it is a DoRA adapter; set lora.kind: dora"),
    ({"lora__kind": "dora"}, {"lora__stack": True}, "can't be kept below another adapter"),
    ({}, {"lora__targets": ["q_proj"]}, r"it adapts 12 layers that lora.targets, lora.layers and lora.exclude leave"),
    ({}, {"lora__kind": "rows", "lora__alpha": 32}, "it was not trained with lora.kind: rows"),
    ({"lora__expert_rank": 1}, {"lora__expert_rank": 0}, r"it adapts 4 stacks of experts that lora\.expert_rank, "),
    ({"lora__expert_rank": 1}, {"lora__stack": True}, "it adapts experts, whose updates can't be kept below another"),
])  # fmt: skip
def test_an_adapter_that_the_config_can_not_continue_is_refused(first, then, message, base_of, alpaca_file, tmp_path):
    tiny_base = base_of("experts" if "lora__expert_rank" in first else "")
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "first", train__max_steps=1, **first)))
    settings = then | {"lora__start_from": str(tmp_path / "first")}
    with pytest.raises(ConfigError, match=message):
        load_for_training(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)), "cpu")


@needs_fork
def test_two_processes_start_from_the_same_values_as_one(tiny_base, alpaca_file, tmp_path):
    """One run with all that is computed before the first step, with the sequences of two processes in one."""
    keep = {"null_space": str(alpaca_file)}
    settings = {"lora__kind": "dora", "lora__init": "eva", "train__rounding": "master", "train__keep": keep}
    one, two = (
        run_config(tiny_base, alpaca_file, tmp_path / name, train__gradient_accumulation_steps=steps, **settings)
        for name, steps in (("one", 2), ("two", 1))
    )
    train(load_config(one))
    train_in_two(two)
    lines = [lines_of(tmp_path / name) for name in ("one", "two")]
    for mine, other in zip(*lines, strict=True):
        assert mine.keys() == other.keys()
        for key in {"loss", "eval_loss"} & mine.keys():
            assert mine[key] == pytest.approx(other[key], rel=1e-4)
    starts = [load_file(tmp_path / name / "starts.safetensors") for name in ("one", "two")]
    assert all(starts[0][key].equal(starts[1][key]) for key in starts[0] | starts[1])


def test_a_saved_step_of_experts_repeats_its_numbers(moe_base, alpaca_file, tmp_path):
    config = load_config(run_config(moe_base, alpaca_file, tmp_path / "run"))
    train(config, stop_at=1)
    (line,) = (line for line in lines_of(tmp_path / "run") if "loss" in line)
    parts = assemble(config, Processes(device=torch.device("cpu"))).loop_parts
    about = {"loss": line["loss"], "grad_norm": line["grad_norm"], "loss_scale": 1.0, "rows": {}, "label_weights": None}
    save_step(tmp_path / "step.safetensors", parts, 0, 1, about)
    report = replay(config, tmp_path / "step.safetensors")
    assert (report.loss, report.grad_norm) == pytest.approx((line["loss"], line["grad_norm"]), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"lora__init": "pissa", "train__learning_rates": {"lora_B": "4x"}}, {"lora__kind": "rows", "lora__alpha": 32}],
    ids=str,
)
def test_a_failed_step_is_rerun_from_the_same_start(settings, poisoned_base, tmp_path):
    rows = [{"text": f"Row {number} is fine."} for number in range(7)] + [{"text": f"And this {POISON} is not."}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = load_config(run_config(poisoned_base, data, tmp_path / "run", data__eval=None, **settings))
    with pytest.raises(ModelError, match="is not finite|nan|inf"):
        train(config)
    (saved,) = (tmp_path / "run" / "replay").iterdir()
    report = replay(config, saved)
    assert not report.is_finite
    assert report.broken
