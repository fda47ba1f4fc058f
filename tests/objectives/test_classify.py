"""Classification by words against a slow reference, and its metrics by counting."""

import random

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, GraniteConfig, LlamaConfig

from qlora.config import TrainSection
from qlora.data import LABEL, EncodeOptions, Labels, Source, build_datasets, collate, eval_batches
from qlora.errors import ConfigError
from qlora.lora import add_lora
from qlora.lora.rows import train_rows
from qlora.model import evaluate, load_base
from qlora.model.predict import score_labels
from qlora.objectives import by_label, objective_for_data
from tests.reference import classification as reference
from tests.tiny import make_base, write_jsonl

NAMES = ("ash", "oak", "pine", "elm")
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "gemma2, soft cap": (Gemma2Config, {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
    "granite, scale": (GraniteConfig, {"logits_scaling": 4.0}),
}


@pytest.fixture
def rng(seed):
    return random.Random(seed)


@pytest.fixture
def datasets(tmp_path, rng):
    """Texts of different lengths with labels in different numbers."""
    labels = [*NAMES[:3], *rng.choices(NAMES[:3], (5, 2, 1), k=12)]  # the last label has no text
    rows = [{"text": " ".join(rng.choices("abcdef", k=rng.randrange(1, 20))), "label": label} for label in labels]
    source = Source(str(write_jsonl(tmp_path / "rows.jsonl", rows)))

    def build(tokenizer):
        options = EncodeOptions(labels=Labels(NAMES, "tokens"))
        return build_datasets(tokenizer, [source], options=options, cache_dir=str(tmp_path / "cache"))

    return build


@pytest.fixture(params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def model(request, tmp_path, seed):
    config_class, sizes = FAMILIES[request.param]
    return load_base(str(make_base(tmp_path / "base", seed, config_class, **sizes)), "none", compute_dtype="float32")


def section(tmp_path, **keys):
    return TrainSection(objective="classify", output_dir=str(tmp_path), **keys)


@pytest.mark.parametrize("packed", [True, False])
def test_loss_predictions_and_metrics_are_the_references(packed, model, datasets, tmp_path):
    model, tokenizer = model
    data = datasets(tokenizer)
    loss = objective_for_data(section(tmp_path), data).loss
    wanted = reference.answer_losses(model, data.train)
    result = evaluate(model, eval_batches(data.train, 4, 200 if packed else None), loss=loss)
    assert result.total_weight == len(data.train)
    assert result.loss == pytest.approx(wanted.mean().item(), rel=1e-4)
    own, predicted = data.train.values(LABEL).tolist(), []
    found = score_labels(model, data.train, data.labels, 4).softmax(dim=1)
    for example, probabilities in zip(data.train, found, strict=True):
        prompt = example.input_ids[: -example.num_supervised]
        expected = reference.label_probabilities(model, prompt, data.labels.answers)
        torch.testing.assert_close(probabilities, expected, rtol=1e-3, atol=1e-5)
        predicted.append(int(probabilities.argmax()))
    accuracy = sum(map(int.__eq__, own, predicted)) / len(own)
    assert result.metrics == pytest.approx({"accuracy": accuracy, "macro_f1": reference.macro_f1(own, predicted)})
    matrix = np.array(result.counts)
    for label, other in {*zip(own, predicted, strict=True)}:
        assert matrix[label, other] == list(zip(own, predicted, strict=True)).count((label, other))
    assert matrix.sum() == len(own)
    assert [each.texts for each in by_label(matrix)] == [own.count(number) for number in range(len(NAMES))]


@pytest.mark.parametrize("weights", ["balanced", {"oak": 3.0, "ash": 0.5}], ids=str)
def test_class_weights_weigh_texts_while_training_only(weights, model, datasets, tmp_path):
    model, tokenizer = model
    data = datasets(tokenizer)
    objective = objective_for_data(section(tmp_path, class_weights=weights), data)
    own = data.train.values(LABEL).tolist()
    if weights == "balanced":
        of_texts = [1 / own.count(number) for number in own]
        of_texts = [weight * len(own) / sum(of_texts) for weight in of_texts]
    else:
        of_texts = [weights.get(NAMES[number], 1.0) for number in own]
    batch = collate(list(data.train))
    wanted = reference.answer_losses(model, data.train)
    trained = objective.trained
    assert trained.units(batch) == pytest.approx(sum(of_texts))
    assert sum(map(trained.units, data.train)) == pytest.approx(sum(of_texts))
    step = trained.compute(model, batch)
    assert step.total.item() == pytest.approx((wanted * torch.tensor(of_texts)).sum().item(), rel=1e-4)
    assert objective.loss.compute(model, batch).total.item() == pytest.approx(wanted.sum().item(), rel=1e-4)


def test_a_weight_of_no_label_is_refused(model, datasets, tmp_path):
    data = datasets(model[1])
    with pytest.raises(ConfigError, match="train.class_weights: elmo is no label; the labels are ash, oak"):
        objective_for_data(section(tmp_path, class_weights={"elmo": 2.0}), data)


def test_words_with_trained_rows_of_the_head_are_scored_with_them(tiny_base, datasets, generator):
    model, tokenizer = load_base(str(tiny_base), compute_dtype="float32")
    data = datasets(tokenizer)
    add_lora(model, 2, 4)
    train_rows(model, [], range(data.labels.deciding[0], data.labels.deciding[0] + 3), torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1, generator=generator)
    found = score_labels(model, data.train, data.labels, 4).softmax(dim=1)
    for example, probabilities in zip(data.train, found, strict=True):
        prompt = example.input_ids[: -example.num_supervised]
        with torch.no_grad():
            expected = reference.label_probabilities(model, prompt, data.labels.answers)
        torch.testing.assert_close(probabilities, expected, rtol=1e-3, atol=1e-5)
