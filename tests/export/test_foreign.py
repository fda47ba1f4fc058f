"""Adapters that PEFT made load, merge and verify as PEFT computes them, and what can't be computed is refused."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.checkpoint import RunDirectory, wrap_adapter
from qlora.errors import CheckpointError, ConfigError, QLoRAError
from qlora.export import merge, quantize
from qlora.model import load_base, load_model, open_source
from qlora.proof import verify
from qlora.training import evaluate
from tests.cli import run as run_command
from tests.tiny import SIZES, make_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROWS = SIZES["vocab_size"]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
CASES = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up_proj": 6}, "alpha_pattern": {r"layers\.1\..*": 5}},
    "DoRA": {"use_dora": True, "rank_pattern": {"up_proj": 6}},
    "one layer": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "both in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the head in full": {"modules_to_save": ["lm_head"]},
    "some rows": {"trainable_token_indices": {"embed_tokens": [5, 6, 7]}},
    "some rows of the embedding": {"trainable_token_indices": [ROWS - 2, ROWS - 1]},
}


def make_adapter(base, folder, generator, dtype=torch.float32, **settings):
    """Save an adapter with PEFT whose every trained value differs from its first one."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        model.to(dtype).save_pretrained(folder)
    return folder


def peft_model(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids).logits.float()


def edit(folder, **values):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def in_fp32(folder, base):
    """Return an adapter on its base in fp32, also on processors where that is not the compute dtype."""
    model, _ = load_base(str(base), "none", compute_dtype="float32")
    wrap_adapter(model, open_source(folder, str(base)).read())
    return model.float().eval()


@pytest.fixture
def base(tmp_path, seed):
    return make_base(tmp_path / "base", seed, dtype=torch.float32)


@pytest.fixture
def plain(base, tmp_path, generator):
    return make_adapter(base, tmp_path / "adapter", generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_merged_weights_are_pefts(case, dtype, base, tmp_path, generator):
    folder = make_adapter(base, tmp_path / "adapter", generator, dtype, **CASES[case])
    ids = torch.randint(ROWS, (2, 24), generator=generator)
    theirs = peft_model(base, folder)
    expected = logits_of(theirs, ids)
    model = in_fp32(folder, base)
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name} <= {torch.float32}

    report = merge(folder, tmp_path / "out", "float32", base=str(base))
    assert (report.onto, report.step) == ("original", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = theirs.merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=str)
def test_a_tied_base_computes_as_with_peft(settings, tmp_path, generator, seed):
    base = make_base(tmp_path / "base", seed, dtype=torch.float32, tie_word_embeddings=True)
    settings = settings or {"trainable_token_indices": {"embed_tokens": [5, 6, 7]}}
    folder = make_adapter(base, tmp_path / "adapter", generator, **settings)
    ids = torch.randint(ROWS, (2, 24), generator=generator)
    expected = logits_of(peft_model(base, folder), ids)
    model = in_fp32(folder, base)
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_a_merge_is_verified_and_continued_by_update(onto, base, plain, tmp_path):
    done = run_command(
        "merge", plain, "--base", base, "-o", tmp_path / "out", "--onto", onto, "--dtype", "fp32", "--json"
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["onto"] == onto
    assert any("not known" in note for note in report["notes"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "made elsewhere" in card
    assert ("4 bits again" in card) == (onto == "dequantized")
    found = verify(plain, tmp_path / "out", base=str(base))
    assert found.matches, found.problems
    assert found.tensors_checked == report["tensors"]
    assert "no held-out data" in found.notes[0]
    again = run_command(
        "merge", plain, "--base", base, "-o", tmp_path / "out", "--onto", onto, "--dtype", "fp32", "--update"
    )
    assert "nothing was written" in again.out
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    assert run_command("verify", plain, tmp_path / "out", "--base", base).code == 1


def test_an_adapter_alone_is_verified(base, plain):
    report = verify(plain, base=str(base))
    assert report.matches, report.problems
    assert report.layers_checked == 2 * len(TARGETS)


def test_it_merges_into_gguf_with_a_warning_for_4_bits(base, plain, tmp_path):
    report = merge(plain, tmp_path / "out", "float16", "dequantized", format="gguf", base=str(base))
    assert any("4 bits again" in note for note in report.notes)
    assert verify(plain, tmp_path / "out", base=str(base)).matches
    other = merge(plain, tmp_path / "q8", "q8_0", "dequantized", format="gguf", base=str(base))
    assert not any("4 bits again" in note for note in other.notes)


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_quantizing_a_merge_again_is_warned_about(onto, base, plain, tmp_path):
    merge(plain, tmp_path / "out", onto=onto, base=str(base))
    report = quantize(str(tmp_path / "out"), tmp_path / "4bit")
    assert any("--onto original" in note for note in report.notes) == (onto == "dequantized")
    assert quantize(str(base), tmp_path / "of base").notes == []


def test_every_verb_takes_it(base, plain, alpaca_file, tmp_path):
    done = run_command("generate", plain, "--base", base, "--prompt", "Hello", "--max-new-tokens", "3")
    assert done.code == 0, done.err
    assert "loaded in 4 bits" in done.err
    done = run_command("eval", plain, "--base", base, "--data", alpaca_file, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["model"].endswith(f"with the adapter of {plain}")
    with pytest.raises(ConfigError, match="--data"):
        evaluate(plain, base=str(base))


def test_the_loss_is_that_of_the_adapter(base, plain, alpaca_file, tmp_path):
    theirs = evaluate(plain, alpaca_file, base=str(base)).loss
    tensors = load_file(plain / WEIGHTS)
    save_file({name: value * (".lora_B" not in name) for name, value in tensors.items()}, plain / WEIGHTS)
    assert abs(evaluate(plain, alpaca_file, base=str(base)).loss - theirs) > 0.01


def test_the_base_is_the_one_that_the_config_names(base, plain, tmp_path):
    report = merge(plain, tmp_path / "out")
    assert any("the base base is the one that adapter_config.json names" in note for note in report.notes)
    edit(plain, base_model_name_or_path="/home/of/others/base")
    with pytest.raises(ConfigError, match="/home/of/others/base.*--base"):
        load_model(str(plain))
    file = tmp_path / "base.gguf"
    edit(plain, base_model_name_or_path=str(file))
    with pytest.raises(ConfigError, match=r"base\.gguf, a folder or file that does not exist"):
        open_source(plain)
    file.touch()
    assert open_source(plain).base == str(file)
    edit(plain, base_model_name_or_path=None)
    with pytest.raises(ConfigError, match="names no base"):
        merge(plain, tmp_path / "other")


def test_tokenizer_and_template_are_the_adapters_if_it_has_them(base, plain, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    merge(plain, tmp_path / "of base", base=str(base))
    assert AutoTokenizer.from_pretrained(tmp_path / "of base").chat_template == tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(plain)
    merge(plain, tmp_path / "own", base=str(base))
    assert AutoTokenizer.from_pretrained(tmp_path / "own").chat_template == tokenizer.chat_template
    assert verify(plain, tmp_path / "own", base=str(base)).matches


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: 'LOHA'"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
        ({"rank_pattern": {"up_proj": 7}}, "up_proj has factors of rank 4, adapter_config.json says 7"),
        ({"lora_bias": True, "layer_replication": [[0, 2]]}, "lora_bias.*\n.*layer_replication"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head"),
    ],
    ids=str,
)
def test_what_is_not_lora_is_refused_by_every_verb(values, message, base, plain, tmp_path):
    edit(plain, **values)
    for use in (
        lambda: load_model(str(plain), base=str(base)),
        lambda: merge(plain, tmp_path / "out", base=str(base)),
        lambda: verify(plain, base=str(base)),
    ):
        with pytest.raises(CheckpointError, match=message):
            use()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]], ids=str)
def test_lora_on_embedding_and_head_is_refused(targets, base, tmp_path, generator):
    folder = make_adapter(base, tmp_path / "adapter", generator, target_modules=targets)
    for use in (lambda: load_model(str(folder)), lambda: merge(folder, tmp_path / "out")):
        with pytest.raises(QLoRAError, match=rf"LoRA on the .* (model\.)?{targets[0]} is not supported"):
            use()


def test_an_adapter_of_another_base_is_refused_with_all_problems(plain, tmp_path, seed):
    other = make_base(tmp_path / "other", seed, intermediate_size=96, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"lacks 4 of its layers \(model\.layers\.1") as error:
        load_model(str(plain), base=str(other))
    assert "up_proj has factors for a weight of (172, 64), the base's is (96, 64)" in str(error.value)
    assert "down_proj has factors for a weight of (64, 172)" in str(error.value)
    with pytest.raises(QLoRAError, match=r"model\.layers\.1"):
        merge(plain, tmp_path / "out", base=str(other))


def test_a_base_is_refused_where_there_is_one_already(base, tmp_path, merged):
    for verb in (["merge", "-o", tmp_path / "out"], ["verify"], ["generate", "--prompt", "x"]):
        done = run_command(verb[0], merged / "run", "--base", base, *verb[1:])
        assert done.code != 0
        assert "is a run, which has a base of its own" in done.err
    done = run_command("generate", base, "--base", base, "--prompt", "x")
    assert "is no adapter" in done.err


def test_a_runs_adapter_elsewhere_is_one_made_elsewhere(base, merged, tmp_path):
    folder = shutil.copytree(RunDirectory.open(merged / "run").adapter, tmp_path / "copy")
    ids = torch.arange(20)[None]
    assert torch.equal(logits_of(load_model(str(folder))[0], ids), logits_of(load_model(str(merged / "run"))[0], ids))
