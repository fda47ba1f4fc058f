"""Runs that classify: on any number of processes and batches, merged, and predicted by transformers alone."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora
from qlora.config import load_config
from qlora.errors import CheckpointError, ConfigError, DataError, ModelError
from qlora.export import merge
from qlora.model import predict
from qlora.training import evaluate, preview, train
from qlora.training.replay import replay
from tests.cli import run as command
from tests.tiny import POISON, run_config, write_jsonl
from tests.training.ranks import needs_fork, train_in_two
from tests.training.same_run import lines_of

pytestmark = pytest.mark.slow

LABELS = {"tin": "metal", "oak": "tree", "elm": "tree", "rust": "metal", "moss": "plant"}
ROWS = [
    {"id": f"row-{number}", "text": f"{word} and {number}" + " more" * (number % 7), "label": label}
    for number, (word, label) in enumerate([*LABELS.items()] * 8)
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def trained(tiny_base, rows, tmp_path_factory):
    """A finished run and its merge in fp32."""
    folder = tmp_path_factory.mktemp("classify") / "run"
    settings = {"train__objective": "classify", "train__max_steps": 12, "data__eval": 0.25}
    result = train(load_config(run_config(tiny_base, rows, folder, **settings)))
    assert result.eval_losses[12] < 0.8 * result.eval_losses[0]
    assert result.eval_metrics.keys() == {"accuracy", "macro_f1"}
    merge(folder, folder.with_name("merged"), dtype="float32")
    return folder, folder.with_name("merged")


@pytest.mark.parametrize("settings", [
    {"train__micro_batch_size": 1, "train__gradient_accumulation_steps": 4}, {"data__packing": False},
], ids=str)  # fmt: skip
def test_loss_and_metrics_do_not_depend_on_how_texts_are_batched(settings, tiny_base, rows, tmp_path):
    """In one step with all texts, and in the evaluations around it."""
    found = []
    for name, own in (("one", {}), ("other", settings)):
        keys = {"train__micro_batch_size": 40, "train__gradient_accumulation_steps": 1, "data__max_seq_len": 256}
        keys |= {"train__objective": "classify", "train__class_weights": "balanced", "train__max_steps": 1} | own
        if "data__packing" not in own and name == "other":
            keys["train__gradient_accumulation_steps"] = 40
        train(load_config(run_config(tiny_base, rows, tmp_path / name, **keys)))
        found.append(lines_of(tmp_path / name))
    for mine, other in zip(*found, strict=True):
        for key in mine.keys() & {"loss", "accuracy", "eval_loss", "eval_accuracy", "eval_macro_f1", "grad_norm"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key
        assert mine.get("eval_confusion") == other.get("eval_confusion")


@needs_fork
def test_two_processes_count_what_one_does(tiny_base, rows, tmp_path):
    keys = {"train__objective": "classify", "data__eval": 0.25, "train__max_steps": 4}
    one, two = (
        run_config(tiny_base, rows, tmp_path / name, train__gradient_accumulation_steps=steps, **keys)
        for name, steps in (("one", 2), ("two", 1))
    )
    train(load_config(one))
    train_in_two(two)
    for mine, other in zip(*(lines_of(tmp_path / name) for name in ("one", "two")), strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() & {"loss", "eval_loss", "accuracy"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-3)
        if "eval_confusion" in mine:
            assert sum(map(sum, mine["eval_confusion"])) == sum(map(sum, other["eval_confusion"])) == 10


def test_predictions_of_run_merge_and_transformers_alone_agree(trained, rows, tmp_path):
    run, merged = trained
    of_run, of_merge = predict(run, rows, tmp_path / "run.jsonl"), predict(merged, rows, batch_size=3)
    tokenizer, model = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged)
    labels = json.loads((merged / "labels.json").read_text())["labels"]
    words = [tokenizer(each["word"], add_special_tokens=False).input_ids[0] for each in labels]
    for row, own, other in zip(ROWS, of_run, of_merge, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["text"]}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            wanted = model(prompt).logits[0, -1, words].softmax(-1)
        assert list(other.probabilities.values()) == pytest.approx(wanted.tolist(), abs=0.02)  # in bf16 and fp32
        first, second = wanted.sort(descending=True)[0][:2]
        assert other.label == labels[int(wanted.argmax())]["name"] or first - second < 0.04
        assert (own.row, own.id) == (other.row, other.id)
        assert own.id == row["id"]
        assert own.probabilities == pytest.approx(other.probabilities, abs=0.05)
        assert sum(own.probabilities.values()) == pytest.approx(1)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, len(ROWS) + 1))
    assert [line["label"] for line in lines] == [each.label for each in of_run]


def test_evaluations_are_those_of_the_run(trained, rows):
    run, _ = trained
    last = [line for line in lines_of(run) if "eval_loss" in line][-1]
    report = evaluate(run)
    assert report.loss == pytest.approx(last["eval_loss"], rel=1e-3)
    assert report.metrics == pytest.approx({key: last[f"eval_{key}"] for key in ("accuracy", "macro_f1")})
    assert report.confusion == last["eval_confusion"]
    assert [each["label"] for each in report.labels] == ["metal", "plant", "tree"]
    predictions = predict(run, rows)
    of_file = evaluate(run, rows)
    right = sum(each.label == row["label"] for each, row in zip(predictions, ROWS, strict=True))
    assert of_file.metrics["accuracy"] == pytest.approx(right / len(ROWS))
    shown = command("eval", run, "--data", rows)
    assert "predicted, by label:" in shown.out
    assert f"{of_file.labels[0]['recall']:.1%}" in shown.out


def test_the_confusion_matrix_is_drawn(trained):
    pytest.importorskip("matplotlib")
    assert (trained[0] / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_the_verb_writes_what_the_function_does(trained, rows, tmp_path):
    run, _ = trained
    outcome = command("predict", run, "--data", rows, "-o", tmp_path / "out.jsonl", "--json")
    assert outcome.code == 0, outcome
    assert outcome.json()["rows"] == len(ROWS)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [each.label for each in qlora.predict(run, rows)]
    assert command("predict", run, "--data", rows, "-o", tmp_path / "out.jsonl").code == 2


def test_texts_are_given_as_they_are_or_in_a_column(trained, tmp_path):
    run, _ = trained
    texts = [row["text"] for row in ROWS[:5]]
    wanted = [each.probabilities for each in predict(run, texts)]
    columns = predict(run, [{"question": each, "text": "x"} for each in texts], text="question")
    assert [each.probabilities for each in columns] == wanted
    long = predict(run, ["tin " * 200])
    assert long[0].label in ("metal", "tree", "plant")


@pytest.mark.parametrize(("data", "error", "message"), [
    (["a", {"words": "b"}, {"text": 3}], DataError, r"(?s)2 rows can't be classified:.*column 'text' should be text"),
    ("nothing.jsonl", DataError, "There is no file nothing.jsonl"),
])  # fmt: skip
def test_rows_without_text_are_refused(data, error, message, trained, tmp_path):
    with pytest.raises(error, match=message):
        predict(trained[0], data, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_that_does_not_classify_is_refused(whole, tiny_base, trained, tmp_path):
    for model in (whole, tiny_base):
        with pytest.raises(ConfigError, match=r"has no labels.json, so it does not classify texts. Give a run with"):
            predict(model, ["a"])
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "labels.json").write_text('{"labels": []}')
    with pytest.raises(CheckpointError, match=r"labels.json is damaged"):
        predict(folder, ["a"])
    with pytest.raises(ConfigError, match="batch_size: 0"):
        predict(trained[0], ["a"], batch_size=0)


def test_a_preview_shows_the_answers(tiny_base, rows, tmp_path):
    result = preview(run_config(tiny_base, rows, tmp_path / "run", train__objective="classify"))
    assert not result.problems
    texts = ["".join(piece.text for piece in sample.pieces if piece.weight) for sample in result.samples]
    assert all(text.removesuffix("</s>") in LABELS.values() for text in texts)


def test_a_failed_step_keeps_its_labels(poisoned_base, tmp_path):
    labelled = [{"text": f"{POISON if number == 7 else number}", "label": "ab"[number % 2]} for number in range(8)]
    data = write_jsonl(tmp_path / "rows.jsonl", labelled)
    keys = {"train__objective": "classify", "data__eval": None, "train__class_weights": "balanced"}
    config = load_config(run_config(poisoned_base, data, tmp_path / "run", **keys))
    with pytest.raises(ModelError, match="is not finite|nan|inf"):
        train(config)
    (saved,) = (tmp_path / "run" / "replay").iterdir()
    assert not replay(config, saved).is_finite
