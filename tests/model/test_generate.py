"""Generation: the template's prompt, the likeliest tokens, and an end at any end token."""

import pytest
import torch
from transformers import GenerationConfig

from qlora.data import apply_template, encode_prompt
from qlora.errors import ConfigError
from qlora.layers.weight_cache import cached_weights
from qlora.model import answer, end_token_ids, generate, load_base, load_model
from qlora.nf4 import NF4Linear

MESSAGES = [{"role": "user", "content": "Say moss."}]


@pytest.fixture
def loaded(tiny_base):
    model, tokenizer = load_base(str(tiny_base), compute_dtype="float32")
    apply_template(tokenizer, "auto")
    return model, tokenizer


def greedy(model, prompt, count):
    """Generate one token after another, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_answer_is_the_greedy_continuation_of_the_templates_prompt(loaded):
    model, tokenizer = loaded
    tokens = greedy(model, encode_prompt(tokenizer, MESSAGES), 12)
    assert 257 not in tokens
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer(model, tokenizer, MESSAGES, max_new_tokens=12) == expected


def force_tokens(model, prompt_length, tokens):
    """Make the head's answer one token after another, by position."""

    def choose(_module, _inputs, logits):
        force_tokens.calls += 1
        logits = torch.full_like(logits, -1e4)
        logits[..., tokens[min(force_tokens.calls, len(tokens)) - 1]] = 0
        return logits

    force_tokens.calls = 0
    return model.lm_head.register_forward_hook(choose)


@pytest.mark.parametrize("end", [257, 258])
def test_it_stops_at_the_end_tokens_of_tokenizer_and_model(end, loaded):
    model, tokenizer = loaded
    model.generation_config.eos_token_id = 258  # as in a chat model whose tokenizer has another
    letters = tokenizer("abcdef", add_special_tokens=False).input_ids
    force_tokens(model, 0, [*letters[:3], end, *letters[3:]])
    assert answer(model, tokenizer, MESSAGES, max_new_tokens=20) == "abc"
    assert force_tokens.calls == 4


def test_no_more_tokens_than_asked_for_come(loaded):
    model, tokenizer = loaded
    letters = tokenizer("abcdef", add_special_tokens=False).input_ids
    force_tokens(model, 0, letters)
    assert answer(model, tokenizer, MESSAGES, max_new_tokens=5) == "abcde"


def test_a_temperature_samples(loaded, seed):
    model, tokenizer = loaded
    answers = set()
    for offset in range(3):
        torch.manual_seed(seed + offset)
        answers.add(answer(model, tokenizer, MESSAGES, max_new_tokens=12, temperature=5.0))
    assert len(answers) > 1


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(loaded, training):
    model, tokenizer = loaded
    model.train(training)
    answer(model, tokenizer, MESSAGES, max_new_tokens=2)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize(
    ("configured", "expected"),
    [(None, [257]), (257, [257]), (9, [9, 257]), ([9, 257, 8], [8, 9, 257])],
)
def test_end_tokens_are_those_of_tokenizer_and_model_together(configured, expected, loaded):
    assert end_token_ids(GenerationConfig(eos_token_id=configured), loaded[1]) == expected


def test_weights_are_dequantized_once_for_all_tokens_and_prompts_and_then_dropped(loaded, monkeypatch):
    model, tokenizer = loaded
    linears = [module for module in model.modules() if isinstance(module, NF4Linear)]
    linears[0].cache_weight(model.dtype)
    expected = generate((model, tokenizer), ["Say moss.", "Say tin."], max_new_tokens=6)
    dequantized = []
    dequantize = NF4Linear.dequantize
    monkeypatch.setattr(NF4Linear, "dequantize", lambda own, *given: dequantized.append(own) or dequantize(own, *given))
    assert generate((model, tokenizer), ["Say moss.", "Say tin."], max_new_tokens=6) == expected
    assert dequantized == linears[1:]
    assert [linear.is_cached for linear in linears] == [True] + [False] * (len(linears) - 1)
    size = model.dtype.itemsize * linears[1].numel
    dequantized.clear()
    with cached_weights(model, size):  # as where memory is scarce
        assert dequantized == linears[1:2]
        assert linears[1].is_cached
    assert [linear.is_cached for linear in linears[:2]] == [True, False]


def test_generate_answers_text_a_conversation_or_a_list_of_either(loaded):
    """A prompt's answer depends neither on the other prompts nor on how it is written."""
    model, tokenizer = loaded
    system = [{"role": "system", "content": "Be brief."}]
    expected = [answer(model, tokenizer, each + MESSAGES, max_new_tokens=6) for each in ([], system)]
    assert generate(loaded, "Say moss.", max_new_tokens=6) == expected[0]
    assert generate(loaded, MESSAGES, max_new_tokens=6) == expected[0]
    assert generate(loaded, ["Say moss.", system + MESSAGES], max_new_tokens=6) == expected
    assert generate(loaded, "Say moss.", "Be brief.", max_new_tokens=6) == expected[1]
    sampled = generate(loaded, ["Say moss.", "Say fern."], max_new_tokens=6, temperature=5.0, seed=3)
    assert generate(loaded, "Say fern.", max_new_tokens=6, temperature=5.0, seed=4) == sampled[1]


def test_generate_loads_a_model_by_its_path(tiny_base):
    text = generate(tiny_base, "Say moss.", max_new_tokens=6, device="cpu")
    assert text == generate(load_model(str(tiny_base), "cpu"), "Say moss.", max_new_tokens=6)


def test_settings_out_of_range_are_refused_together(tmp_path):
    with pytest.raises(ConfigError) as error:
        generate(tmp_path, "Say moss.", max_new_tokens=0, temperature=-1, top_p=1.5)
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        "max_new_tokens", "temperature", "top_p"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="top_p needs a temperature above 0"):
        generate(tmp_path, "Say moss.", top_p=0.9)
