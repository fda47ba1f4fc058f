"""Runs whose head scores whole texts: what they start from, what loads their releases, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    Qwen2Config,
)

from qlora.config import load_config
from qlora.errors import ConfigError, DataError, ExportError, ModelError
from qlora.export import merge
from qlora.export.quantize import quantize_model
from qlora.lora import ScoreHead
from qlora.model import generate, load_base, load_for_training, load_model, load_run
from qlora.proof import verify
from qlora.training import evaluate, train
from tests.cli import run as cli
from tests.tiny import SIZES, make_base, make_tokenizer, run_config
from tests.training.same_run import lines_of

pytestmark = pytest.mark.slow

TEXTS = ["Repeat tin", "a longer text that is padded less", "x"]
REWARD = {"train__objective": "reward"}


@pytest.fixture(scope="module")
def run(tiny_base, pairs_file, tmp_path_factory):
    """A finished run of a reward model in fp32, and its merge; the config of the base has the key of another head."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    base = shutil.copytree(tiny_base, folder.with_name("base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"problem_type": "regression"}))
    settings = {"train__max_steps": 12, "model__compute_dtype": "float32", "lora__dtype": "float32"}
    train(load_config(run_config(base, pairs_file, folder, **REWARD, **settings)))
    merge(folder, folder.with_name("merged"), dtype="float32")
    return folder


def scores_of(model, tokenizer, **padding):
    with torch.no_grad():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt", **padding)).logits


def test_it_learns_which_answers_are_preferred(run):
    before, after = lines_of(run)[0], lines_of(run)[-1]
    assert after["eval_reward_accuracy"] > max(0.9, before["eval_reward_accuracy"])
    assert after["eval_loss"] < before["eval_loss"]
    assert "eval_perplexity" not in after
    report = evaluate(run)
    assert report.loss == pytest.approx(after["eval_loss"], rel=1e-3)
    assert report.metrics["reward_accuracy"] == after["eval_reward_accuracy"]
    assert report.perplexity is None


def test_transformers_alone_gives_padded_texts_the_runs_scores(run, tiny_base):
    merged = AutoModelForSequenceClassification.from_pretrained(run.with_name("merged"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.with_name("merged"))
    own, _ = load_run(run)
    expected = scores_of(own, tokenizer)
    for side in ("right", "left"):
        found = scores_of(merged, tokenizer, padding_side=side)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert verify(run, run.with_name("merged")).problems == []
    written, base = (load_file(folder / "model.safetensors") for folder in (run.with_name("merged"), tiny_base))
    assert written.keys() == base.keys() - {"lm_head.weight"} | {"score.weight"}


def test_peft_loads_the_adapter_with_its_head(run, tiny_base):
    peft = pytest.importorskip("peft")
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        run / "adapter", num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
    ).eval()
    merge(run, run.with_name("original"), dtype="float32", onto="original")
    ours = AutoModelForSequenceClassification.from_pretrained(run.with_name("original"))
    found, expected = scores_of(theirs, tokenizer), scores_of(ours, tokenizer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", ["head", "labels", "padding"])
def test_a_damaged_release_is_reported(damage, run, tmp_path):
    folder = tmp_path / "merged"
    shutil.copytree(run.with_name("merged"), folder)
    config = json.loads((folder / "config.json").read_text())
    if damage == "head":
        tensors = load_file(folder / "model.safetensors")
        tensors["score.weight"] *= 1.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif damage == "labels":
        config["id2label"] = {"0": "bad", "1": "good"}
    else:
        config["pad_token_id"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    report = verify(run, folder)
    assert not report.matches
    expected = {
        "head": "tensor score.weight is not",
        "labels": "config.json has id2label",
        "padding": "has pad_token_id: 5",
    }
    assert any(expected[damage] in problem for problem in report.problems), report.problems


def test_a_release_in_4_bits_keeps_its_head(run, tmp_path):
    quantize_model(str(run.with_name("merged")), tmp_path / "nf4", dtype="float32")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    model, tokenizer = load_model(str(tmp_path / "nf4"))
    merged = AutoModelForSequenceClassification.from_pretrained(run.with_name("merged"))
    assert torch.equal(model.score.weight.float(), merged.score.weight.to(model.dtype).float())
    found, expected = scores_of(model, tokenizer).float(), scores_of(merged, tokenizer)
    assert (found - expected).norm() < 0.5 * expected.norm()


def test_a_reward_model_is_trained_further_and_from_an_sft_run(run, tiny_base, alpaca_file, pairs_file, tmp_path):
    settings = {"model__compute_dtype": "float32", "lora__dtype": "float32"}
    base = run.with_name("base")
    config = load_config(
        run_config(base, pairs_file, tmp_path / "further", lora__start_from=str(run), **REWARD, **settings)
    )
    started, _ = load_for_training(config, "cpu", head=ScoreHead(1))
    own, tokenizer = load_run(run)
    started.config.pad_token_id = tokenizer.pad_token_id
    torch.testing.assert_close(scores_of(started, tokenizer), scores_of(own, tokenizer), rtol=1e-4, atol=1e-4)
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "sft", **settings)))
    first = run_config(tiny_base, pairs_file, tmp_path / "reward", lora__start_from=str(tmp_path / "sft"), **REWARD)
    assert train(load_config(first)).status == "finished"
    back = run_config(base, alpaca_file, tmp_path / "back", lora__start_from=str(run))
    with pytest.raises(ConfigError, match=r"it gives texts 1 score, unlike train.objective: sft here"):
        train(load_config(back))


def test_what_needs_a_vocabulary_is_refused(run, tmp_path):
    with pytest.raises(ModelError, match="scores texts, and has no head that answers could come from"):
        generate(run, "Hello")
    with pytest.raises(ModelError, match="scores texts, and has no head that answers could come from"):
        generate(run.with_name("merged"), "Hello")
    with pytest.raises(ExportError, match="'best' needs the loss of the run's objective"):
        merge(run, tmp_path / "best", onto="best")


def test_the_better_base_is_the_one_with_the_lower_reward_loss(run, tmp_path):
    outcome = cli("merge", run, "-o", tmp_path / "best", "--onto", "best", "--dtype", "float32", "--json")
    assert outcome.code == 0, outcome.err
    losses = outcome.json()["losses"]
    assert losses["dequantized"] == pytest.approx(evaluate(run).loss, rel=0.02)
    assert outcome.json()["onto"] == min(losses, key=losses.get)
    assert verify(run, tmp_path / "best").matches


@pytest.mark.parametrize(("settings", "message"), [
    (REWARD | {"train__keep": {"kl": 0.1}}, r"keep.kl compares predictions of whole answers"),
    ({"train__learning_rates": {"score": "2x"}}, r"train.objective: sft trains no head of scores"),
    ({"train__reward": {"center": 0.1}}, r"has options of reward models, but train.objective is sft"),
])  # fmt: skip
def test_settings_without_an_effect_are_refused(settings, message, tiny_base, pairs_file, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(run_config(tiny_base, pairs_file, tmp_path / "run", **settings))


def test_texts_are_padded_with_a_token_that_ends_none(tiny_base, pairs_file, tmp_path):
    """The tokenizer has no padding token; one that documents end with would hide their last token."""
    config = run_config(
        tiny_base, pairs_file, tmp_path / "run", data__special_tokens={"pad_token": "<|im_end|>"}, **REWARD
    )
    train(load_config(config))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").pad_token == "<|im_end|>"
    config = run_config(tiny_base, pairs_file, tmp_path / "other", data__special_tokens={"pad_token": "</s>"}, **REWARD)
    with pytest.raises(DataError, match="The tokenizer has '</s>', with which documents end"):
        train(load_config(config))


def test_rows_without_pairs_are_refused_with_what_would_do(tiny_base, alpaca_file, tmp_path):
    with pytest.raises(
        ConfigError, match=r"train.objective: reward can't learn from the alpaca rows .* preference rows"
    ):
        train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **REWARD)))


def test_a_published_reward_model_is_trained_further(run, pairs_file, tmp_path):
    """Its head is taken as it is, and its files hold no other one."""
    base = run.with_name("merged")
    config = load_config(run_config(base, pairs_file, tmp_path / "run", **REWARD))
    train(config)
    first = lines_of(tmp_path / "run")[0]
    assert first["eval_reward_accuracy"] > 0.9
    merge(tmp_path / "run", tmp_path / "merged", dtype="bfloat16")
    report = verify(tmp_path / "run", tmp_path / "merged")
    assert report.matches, report.problems
    stored, _ = load_base(str(tmp_path / "merged"), "none", head=ScoreHead(1))
    assert not torch.equal(stored.score.weight.float(), load_file(base / "model.safetensors")["score.weight"])


def without_prefix(folder, seed):
    """A base whose files name the decoder's tensors alone."""
    base = make_base(folder, seed, GPT2Config)
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    return base


def with_a_token_too_many(folder, seed):
    """A base whose tokenizer gets a padding token that the model does not embed."""
    return make_base(folder, seed, Qwen2Config, tie_word_embeddings=False)


def with_images(folder, seed):
    """A base with images, whose config has a section on text."""
    torch.manual_seed(seed)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma3Config(
        text_config=SIZES | {"layer_types": ["full_attention"] * 2},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [without_prefix, with_a_token_too_many, with_images], ids=lambda make: make.__name__)
def test_bases_of_other_layouts_are_merged(make, pairs_file, seed, tmp_path):
    targets = {"lora__targets": r".*language_model.*proj"} if make is with_images else {}
    settings = REWARD | targets | {"train__max_steps": 2}
    train(load_config(run_config(make(tmp_path / "base", seed), pairs_file, tmp_path / "run", **settings)))
    merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    report = verify(tmp_path / "run", tmp_path / "merged")
    assert report.matches, report.problems
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
