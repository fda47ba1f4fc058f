"""NEFTune: the noise's distribution, where it is added, and that it belongs to a document, not to a batch."""

import numpy as np
import pytest
import torch
from transformers import GemmaConfig

from qlora.data import collate
from qlora.data.tokens import make_example
from qlora.lora import add_lora, train_rows
from qlora.model import SUPERVISED, evaluate, load_base
from qlora.objectives.neftune import document_noise, with_noise
from tests.tiny import make_base

ALPHA = 5.0


def documents(generator, lengths):
    rows = [torch.randint(256, (length,), generator=generator).numpy() for length in lengths]
    return [make_example(row, np.arange(len(row)) > 0) for row in rows]


@pytest.mark.parametrize("packed", [True, False])
def test_each_document_has_uniform_noise_scaled_by_its_own_length(packed, generator):
    lengths, features = (400, 7, 100), 512
    batch = collate(
        documents(generator, lengths), packed, seeds=torch.randint(2**40, (3,), generator=generator).tolist()
    )
    noise = document_noise(batch, torch.empty(*batch.input_ids.shape, features), ALPHA)
    spans = noise[0].split(lengths) if packed else [row[:length] for row, length in zip(noise, lengths, strict=True)]
    for span in spans:
        bound, count = ALPHA / span.numel() ** 0.5, span.numel()
        assert span.abs().max() <= bound
        # The variance of U(-b, b) is b²/3, and that of its squares 4b⁴/45.
        assert abs(span.square().mean() - bound**2 / 3) < 5 * (4 * bound**4 / 45 / count) ** 0.5
        assert abs(span.mean()) < 5 * (bound**2 / 3 / count) ** 0.5
        counts = torch.histc(span, 8, -bound, bound)
        assert (counts - count / 8).abs().max() < 6 * (count / 8) ** 0.5
    if not packed:
        assert all(row[length:].count_nonzero() == 0 for row, length in zip(noise, lengths, strict=True))


def test_a_documents_noise_is_the_same_in_every_batch(generator):
    rows, seeds = documents(generator, (9, 4, 6)), [3, -(2**63), 2**63 - 1]

    def noise(chosen, packed):
        batch = collate([rows[index] for index in chosen], packed, [seeds[index] for index in chosen])
        drawn = document_noise(batch, torch.empty(*batch.input_ids.shape, 16), ALPHA)
        spans = drawn[0].split(batch.lengths) if packed else drawn
        return {index: span[: len(rows[index])] for index, span in zip(chosen, spans, strict=True)}

    whole = noise([0, 1, 2], True)
    for other in (noise([2, 0, 1], True), noise([0, 1, 2], False), noise([1], False)):
        assert all(torch.equal(span, whole[index]) for index, span in other.items())
    assert not torch.equal(whole[0][:4], whole[1])


def forward_and_noise(model, loss, batch):
    """Return the loss's total, and what the first layer got beyond the embeddings."""
    seen = []
    handle = model.base_model.layers[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    step = loss.compute(model, batch)
    handle.remove()
    (hidden,) = seen
    with torch.no_grad():
        return step.total, hidden.detach() - model.get_input_embeddings()(batch.input_ids)


@pytest.fixture(scope="module", params=["llama", "gemma", "trained rows"])
def model(request, tiny_base, tmp_path_factory):
    base = tiny_base
    if request.param == "gemma":  # its embedding scales
        base = make_base(tmp_path_factory.mktemp("gemma") / "base", 3, GemmaConfig)
    model, _ = load_base(str(base), compute_dtype="float32")
    add_lora(model, rank=4, alpha=8)
    if request.param == "trained rows":
        train_rows(model, ["embed_tokens"], dtype=torch.float32)
    return model.train()


def test_a_forward_that_is_trained_gets_the_noise_and_an_evaluation_none(model, generator):
    batch = collate(documents(generator, (12, 20)), packed=True, seeds=[1, 2])
    loss = with_noise(SUPERVISED, ALPHA)
    total, added = forward_and_noise(model, loss, batch)
    expected = document_noise(batch, added, ALPHA)
    assert torch.allclose(added, expected, atol=1e-5 * added.abs().max().item() + 1e-6)
    assert total.item() != SUPERVISED.compute(model, batch).total.item()
    with torch.no_grad():
        total, added = forward_and_noise(model, loss, batch)
        assert added.count_nonzero() == 0
        assert total.item() == SUPERVISED.compute(model, batch).total.item()
    evaluated = [evaluate(model, [batch], loss=each).loss for each in (loss, SUPERVISED)]
    assert evaluated[0] == evaluated[1]


def test_without_seeds_torchs_generator_draws(generator):
    batch = collate(documents(generator, (6, 5)), packed=True)
    embedded = torch.empty(1, 11, 8)
    torch.manual_seed(3)
    first = document_noise(batch, embedded, ALPHA)
    assert not torch.equal(document_noise(batch, embedded, ALPHA), first)
    torch.manual_seed(3)
    assert torch.equal(document_noise(batch, embedded, ALPHA), first)
