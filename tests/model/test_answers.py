"""Batched greedy answers: those of each prompt alone, within a number of tokens, without random numbers."""

import pytest
import torch

from qlora.layers import use_document_attention
from qlora.model import answer_all, load_base

TEXTS = ["Once", "A tin oak", "Repeat fern 3 times, and then once more", "x", "moss moss"]


@pytest.fixture(scope="module", params=["sdpa", "documents"])
def loaded(request, tiny_base):
    model, tokenizer = load_base(str(tiny_base), "none", compute_dtype="float32", device="cpu")
    if request.param == "documents":  # as while training
        use_document_attention(model)
    return model.train(), tokenizer


def alone(model, tokenizer, ids, count):
    """Answer without padding or batches, a token at a time."""
    model.eval()
    new = []
    while len(new) < count:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    model.train()
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_each_answer_is_that_of_the_prompt_alone(max_tokens, loaded):
    model, tokenizer = loaded
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    answers = answer_all(model, tokenizer, prompts, 9, max_tokens)
    assert answers == [alone(model, tokenizer, ids, 9) for ids in prompts]
    assert model.training


def test_no_batch_has_more_tokens_than_asked_for(loaded, monkeypatch):
    model, tokenizer = loaded
    shapes = []
    original = model.generate

    def generate(ids, **options):
        shapes.append((ids.shape[0], ids.shape[1] + options["max_new_tokens"]))
        return original(ids, **options)

    monkeypatch.setattr(model, "generate", generate)
    answer_all(model, tokenizer, [[65] * length for length in (3, 9, 30, 9, 4)], 5, 40)
    assert shapes == [(1, 35), (2, 14), (2, 9)]
    assert all(rows == 1 or rows * tokens <= 40 for rows, tokens in shapes)
    shapes.clear()
    answer_all(model, tokenizer, [[65] * 250], 128, 40)
    assert shapes == [(1, 256)]  # the model has no more positions


def test_no_random_numbers_are_drawn(loaded):
    model, tokenizer = loaded
    torch.manual_seed(7)
    before = torch.get_rng_state()
    answer_all(model, tokenizer, [[65, 66], [67]], 5, 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_is_what_follows_the_reasoning(loaded, monkeypatch):
    model, tokenizer = loaded
    text = "Let me think.</think>42"

    def generate(ids, **options):
        return torch.tensor([ids[0].tolist() + tokenizer(text, add_special_tokens=False).input_ids])

    monkeypatch.setattr(model, "generate", generate)
    assert answer_all(model, tokenizer, [[65]], 5, 100) == ["42"]
