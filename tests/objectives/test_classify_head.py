"""Classification by a head: loss and gradients against transformers' own, however texts are batched."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qlora.data import collate, make_example
from qlora.lora import add_lora, train_rows
from qlora.memory.estimate import estimate
from qlora.model import evaluate, load_base
from qlora.objectives.classify_head import head_loss
from tests.memory.test_estimate import CPU, settings
from tests.reference.reward import scores_one_by_one

NAMES = ("ash", "elm", "fir")


@pytest.fixture(params=[False, True], ids=["one label", "several labels"])
def is_multiple(request):
    return request.param


@pytest.fixture
def texts(is_multiple, generator):
    """Seven texts of different lengths with labels."""
    shape = (7, 3) if is_multiple else (7,)
    labels = torch.randint(2 if is_multiple else 3, shape, generator=generator).numpy()
    lengths = torch.randint(2, 30, (7,), generator=generator).tolist()
    return [
        make_example(
            torch.randint(256, (length,), generator=generator).tolist(),
            [True] * length,
            {"label": label.astype(np.uint8) if is_multiple else np.int32(label)},
        )
        for length, label in zip(lengths, labels, strict=True)
    ]


@pytest.fixture
def classifier(tiny_base, is_multiple, generator):
    model, _ = load_base(str(tiny_base), compute_dtype="float32", head=head_loss(NAMES, is_multiple).head)
    add_lora(model, rank=2, dtype=torch.float32)
    train_rows(model, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator).mul_(0.05)
    return model


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_loss_and_gradients_are_those_of_transformers(packed, is_multiple, texts, classifier):
    loss = head_loss(NAMES, is_multiple)
    batch = collate(texts, packed=packed)
    step = loss.compute(classifier, batch)
    total = 0
    for text in texts:  # the architecture's own class, with the problem type of the config
        given = torch.from_numpy(np.array(text.values["label"]))[None]
        ids = torch.from_numpy(text.input_ids).long()[None]
        total = total + classifier(input_ids=ids, labels=given.float() if is_multiple else given.long()).loss
    assert step.total.item() == pytest.approx(total.item(), rel=1e-5)
    found, expected = gradients(classifier, step.total), gradients(classifier, total)
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm().clamp_min(1e-6), name
    scores = scores_one_by_one(classifier, texts)
    labels = torch.stack([torch.from_numpy(np.array(text.values["label"])) for text in texts])
    right = ((scores > 0) == labels).all(1) if is_multiple else scores.argmax(1) == labels
    assert step.metrics["accuracy"].item() == right.sum().item()
    assert loss.units(batch) == sum(map(loss.units, texts)) == 7


def test_weights_of_labels(is_multiple, texts, classifier):
    weights = [0.5, 1.0, 3.0]
    loss = head_loss(NAMES, is_multiple, weights)
    result = evaluate(classifier, [collate(texts[:3]), collate(texts[3:], packed=True)], loss=loss)
    scores = scores_one_by_one(classifier, texts)
    labels = torch.stack([torch.from_numpy(np.array(text.values["label"])) for text in texts]).long()
    own = torch.tensor(weights)
    if is_multiple:
        losses = -(F.logsigmoid(scores) * labels + F.logsigmoid(-scores) * (1 - labels)) * own
        expected = losses.mean().item()
    else:
        expected = F.cross_entropy(scores, labels, weight=own).item()
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert loss.units(collate(texts)) == pytest.approx(sum(map(loss.units, texts)))


def test_its_memory_is_estimated(is_multiple, tiny_base, tmp_path):
    config = settings(tiny_base, tmp_path)
    predicted = estimate(config, head_loss(NAMES, is_multiple), CPU)
    assert predicted.footprint.vocabulary is None
    assert predicted.total_bytes("none", predicted.tokens) > predicted.footprint.weights
