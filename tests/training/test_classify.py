"""Runs that classify: on any number of processes and batches, merged, and predicted by transformers alone."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import qlora
from qlora.config import load_config
from qlora.errors import CheckpointError, ConfigError, DataError, ModelError
from qlora.export import merge
from qlora.model import predict
from qlora.model.label_scores import predicted_labels
from qlora.processes import Processes
from qlora.training import evaluate, preview, train
from qlora.training.assemble import assemble
from qlora.training.replay import replay, save_step
from tests.cli import run as command
from tests.tiny import POISON, run_config, write_jsonl
from tests.training.ranks import needs_fork, train_in_two
from tests.training.same_run import lines_of

pytestmark = pytest.mark.slow

NAMES = ("metal", "plant", "tree")


@pytest.fixture(scope="module")
def texts(labelled_file):
    return [json.loads(line) for line in labelled_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(labelled_file):
    return labelled_file


@pytest.fixture(scope="module", params=["tokens", "head"])
def trained(request, tiny_base, rows, tmp_path_factory):
    """A finished run and its merge in fp32."""
    folder = tmp_path_factory.mktemp("classify") / "run"
    settings = {"train__objective": "classify", "train__classify_by": request.param, "train__max_steps": 12}
    result = train(load_config(run_config(tiny_base, rows, folder, data__eval=0.25, **settings)))
    assert result.status == "finished"
    assert result.eval_losses[12] < 0.9 * result.eval_losses[0]
    assert result.eval_metrics.keys() == {"accuracy", "macro_f1"}
    merge(folder, folder.with_name("merged"), dtype="float32")
    return folder, folder.with_name("merged")


def by_transformers(merged, texts):
    """Return the probabilities of labels by transformers alone, (texts, labels)."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    labels = json.loads((merged / "labels.json").read_text())
    with torch.no_grad():
        if labels["by"] == "head":
            model = AutoModelForSequenceClassification.from_pretrained(merged)
            assert [*model.config.id2label.values()] == [each["name"] for each in labels["labels"]]
            inputs = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
            return torch.cat([model(ids).logits for ids in inputs]).softmax(-1)
        model = AutoModelForCausalLM.from_pretrained(merged)
        words = [tokenizer(each["word"], add_special_tokens=False).input_ids[0] for each in labels["labels"]]
        turns = [[{"role": "user", "content": text}] for text in texts]
        inputs = [
            tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            for turn in turns
        ]
        return torch.stack([model(ids).logits[0, -1, words] for ids in inputs]).softmax(-1)


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


def test_predictions_of_run_merge_and_transformers_alone_agree(trained, rows, texts, tmp_path):
    run, merged = trained
    of_run, of_merge = predict(run, rows, tmp_path / "run.jsonl"), predict(merged, rows, batch_size=3)
    wanted = by_transformers(merged, [row["text"] for row in texts])
    for row, own, other, probabilities in zip(texts, of_run, of_merge, wanted, strict=True):
        assert [*other.probabilities] == [*NAMES]
        assert [*other.probabilities.values()] == pytest.approx(probabilities.tolist(), abs=0.02)  # in bf16 and fp32
        first, second = probabilities.sort(descending=True)[0][:2]
        assert other.label == NAMES[int(probabilities.argmax())] or first - second < 0.04
        assert (own.row, own.id) == (other.row, other.id)
        assert own.id == row["id"]
        assert own.probabilities == pytest.approx(other.probabilities, abs=0.05)
        assert sum(own.probabilities.values()) == pytest.approx(1)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, len(texts) + 1))
    assert [line["label"] for line in lines] == [each.label for each in of_run]


def test_texts_with_several_labels_are_predicted_by_a_head(tiny_base, texts, tmp_path):
    rows = [row | {"label": [row["label"], *(["long"] if len(row["text"]) > 25 else [])]} for row in texts]
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"text": "none", "label": []}])
    settings = {"train__objective": "classify", "train__classify_by": "head", "train__class_weights": "balanced"}
    result = train(load_config(run_config(tiny_base, data, tmp_path / "run", data__eval=str(data), **settings)))
    last = [line for line in lines_of(tmp_path / "run") if "eval_loss" in line][-1]
    counts = np.array(last["eval_confusion"])
    assert counts.shape == (4, 2, 2)
    assert (counts.sum(axis=(1, 2)) == len(rows) + 1).all()
    predictions = predict(tmp_path / "run", data)
    assert result.eval_metrics["accuracy"] == pytest.approx(
        sum(sorted(each.label) == sorted(row["label"]) for each, row in zip(predictions, rows, strict=False)) / 41
        + (predictions[-1].label == []) / 41,
        abs=0.03,
    )
    for each in predictions:
        assert each.label == [name for name, value in each.probabilities.items() if value > 0.5]
    merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.problem_type == "multi_label_classification"
    report = evaluate(tmp_path / "run")
    assert [each["label"] for each in report.labels] == ["long", "metal", "plant", "tree"]


def test_evaluations_are_those_of_the_run(trained, rows, texts):
    run, _ = trained
    last = [line for line in lines_of(run) if "eval_loss" in line][-1]
    report = evaluate(run)
    assert report.loss == pytest.approx(last["eval_loss"], rel=1e-3, abs=5e-4)  # bf16 rounds logits, not a small loss
    assert report.metrics == pytest.approx({key: last[f"eval_{key}"] for key in ("accuracy", "macro_f1")})
    assert report.confusion == last["eval_confusion"]
    assert [each["label"] for each in report.labels] == ["metal", "plant", "tree"]
    predictions = predict(run, rows)
    of_file = evaluate(run, rows)
    right = sum(each.label == row["label"] for each, row in zip(predictions, texts, strict=True))
    assert of_file.metrics["accuracy"] == pytest.approx(right / len(texts))
    shown = command("eval", run, "--data", rows)
    assert "predicted, by label:" in shown.out
    assert f"{of_file.labels[0]['recall']:.1%}" in shown.out


def test_the_confusion_matrix_is_drawn(trained):
    pytest.importorskip("matplotlib")
    assert (trained[0] / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_the_verb_writes_what_the_function_does(trained, rows, texts, tmp_path):
    run, _ = trained
    outcome = command("predict", run, "--data", rows, "-o", tmp_path / "out.jsonl", "--json")
    assert outcome.code == 0, outcome
    assert outcome.json()["rows"] == len(texts)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [each.label for each in qlora.predict(run, rows)]
    assert command("predict", run, "--data", rows, "-o", tmp_path / "out.jsonl").code == 2


def test_texts_are_given_as_they_are_or_in_a_column(trained, texts, tmp_path):
    run, _ = trained
    given = [row["text"] for row in texts[:5]]
    wanted = [each.probabilities for each in predict(run, given)]
    columns = predict(run, [{"question": each, "text": "x"} for each in given], text="question")
    assert [each.probabilities for each in columns] == wanted
    long = predict(run, ["tin " * 200])
    assert long[0].label in NAMES


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
        with pytest.raises(ConfigError, match=r"has no labels.json, so it does not classify\. Give a run with"):
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
    answers = ["".join(piece.text for piece in sample.pieces if piece.weight) for sample in result.samples]
    assert all(text.removesuffix("</s>") in NAMES for text in answers)


def test_a_failed_step_keeps_its_labels(poisoned_base, tmp_path):
    labelled = [{"text": f"{POISON if number == 7 else number}", "label": "ab"[number % 2]} for number in range(8)]
    data = write_jsonl(tmp_path / "rows.jsonl", labelled)
    keys = {"train__objective": "classify", "data__eval": None, "train__class_weights": "balanced"}
    config = load_config(run_config(poisoned_base, data, tmp_path / "run", **keys))
    with pytest.raises(ModelError, match="is not finite|nan|inf"):
        train(config)
    (saved,) = (tmp_path / "run" / "replay").iterdir()
    assert not replay(config, saved).is_finite


@pytest.mark.parametrize("class_weights", [None, "balanced", {"tree": 3.0}], ids=str)
@pytest.mark.parametrize("by", ["head", "tokens", "several"])
def test_a_replayed_step_repeats_the_loss_of_its_labels(by, class_weights, texts, rows, tiny_base, tmp_path):
    if by == "several":
        rows = write_jsonl(tmp_path / "rows.jsonl", [each | {"label": [each["label"]]} for each in texts[:9]])
    keys = {"train__objective": "classify", "data__eval": None, "train__class_weights": class_weights}
    keys["train__classify_by"] = "tokens" if by == "tokens" else "head"
    config = load_config(run_config(tiny_base, rows, tmp_path / "run", **keys))
    train(config, stop_at=1)
    (line,) = (line for line in lines_of(tmp_path / "run") if "loss" in line)
    assembly = assemble(config, Processes(device=torch.device("cpu")))
    about = {"loss": line["loss"], "grad_norm": line["grad_norm"], "loss_scale": 1.0, "rows": {}}
    about["label_weights"] = assembly.objective.label_weights
    saved = tmp_path / "run" / "replay" / "step.safetensors"
    save_step(saved, assembly.loop_parts, 0, 1, about)
    report = replay(config, saved)
    assert report.loss == pytest.approx(report.recorded_loss, rel=1e-5)
    assert report.grad_norm == pytest.approx(report.recorded_grad_norm, rel=1e-4)
    (labels,) = (tmp_path / "run").glob("labels.json")
    labels.write_text(labels.read_text().replace("metal", "a").replace('"name": "plant"', '"name": "b"'))
    values = json.loads(labels.read_text())
    labels.write_text(json.dumps(values | {"labels": values["labels"][:2]}))
    with pytest.raises(CheckpointError, match="has other labels than its run"):
        replay(config, saved)


def test_a_continued_run_reads_no_training_row_for_its_labels(rows, tiny_base, tmp_path, monkeypatch):
    config = load_config(run_config(tiny_base, rows, tmp_path / "run", train__objective="classify"))
    train(config, stop_at=1)
    monkeypatch.setattr("qlora.model.labels.find_labels", lambda *_: pytest.fail("the rows were read"))
    assert train(config).status == "finished"


def test_the_command_chooses_the_best_checkpoint_unless_another_is_named(tiny_base, rows, tmp_path):
    keys = {"train__objective": "classify", "data__eval": 0.25, "train__max_steps": 4, "train__eval_every": 2}
    keys |= {"train__keep_best": True, "train__learning_rate": 0.5, "train__save_every": 1}
    keys |= {"train__keep_checkpoints": 4}
    result = train(load_config(run_config(tiny_base, rows, tmp_path / "run", **keys)))
    other = ["--checkpoint", "1"]
    found = []
    for number, options in enumerate(([], ["--checkpoint", "best"], other)):
        output = tmp_path / f"{number}.jsonl"
        told = command("predict", tmp_path / "run", "--data", rows, "-o", output, *options)
        assert told.code == 0, told.err
        taken = result.best.step != 4 and not options
        assert ("taking its best checkpoint" in told.err) == taken
        found.append(output.read_text())
    assert found[0] == found[1] != found[2]


def test_rows_that_can_not_be_classified_are_reported_before_the_model_is_loaded(trained, monkeypatch):
    monkeypatch.setattr(sys.modules["qlora.model.predict"], "load_model", None)
    with pytest.raises(DataError, match="1 row can't be classified"):
        predict(trained[0], [{"other": "a"}])


def test_labels_of_other_names_are_named_when_training_goes_on(tiny_base, rows, texts, tmp_path):
    keys = {"train__objective": "classify", "train__classify_by": "head", "train__max_steps": 1}
    train(load_config(run_config(tiny_base, rows, tmp_path / "run", **keys)))
    renamed = [each | {"label": each["label"].replace("metal", "ore")} for each in texts]
    keys["lora__start_from"] = str(tmp_path / "run")
    other = write_jsonl(tmp_path / "renamed.jsonl", renamed)
    with pytest.raises(ConfigError, match="it scores the labels metal, where this config has ore; rename"):
        train(load_config(run_config(tiny_base, other, tmp_path / "renamed", **keys)))
    turned = run_config(tiny_base, rows, tmp_path / "turned", data__labels=["tree", "plant", "metal"], **keys)
    with pytest.raises(ConfigError, match="it has the labels metal, plant, tree in this order; set data.labels to it"):
        train(load_config(turned))


@pytest.mark.parametrize("score", [1e-9, -1e-9, 2.0])
def test_a_label_is_predicted_as_in_training_however_small_its_score(score):
    assert predicted_labels(torch.tensor([[score, -score]]), is_multiple=True).tolist() == [[score > 0, score < 0]]
