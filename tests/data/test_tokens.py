"""A document in tokens: its weights, its parts, and its supervised bytes."""

import random

import numpy as np
import pytest

from qlora.data.examples import Conversation
from qlora.data.tokens import make_example, supervised_bytes
from tests.data.chats import encode, encoder, turns, words
from tests.tiny import only


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def test_the_first_token_is_never_supervised(rng):
    length = rng.randrange(1, 9)
    example = make_example(range(length), [True] * length)
    assert example.num_supervised == length - 1
    assert not example.loss_mask[0]


def test_weights_say_what_is_supervised_and_how_much(rng):
    weights = [rng.choice([0.0, 0.25, 1.0, 2.0]) for _ in range(50)]
    example = make_example(range(50), weights)
    assert (example.input_ids.dtype, example.weights.dtype) == (np.int32, np.float16)
    assert example.weights.tolist() == [0.0, *weights[1:]]
    assert example.loss_mask.tolist() == [False, *(weight > 0 for weight in weights[1:])]
    assert example.num_supervised == sum(weight > 0 for weight in weights[1:])
    assert example.total_weight == sum(weights[1:])


def test_the_total_weight_of_a_long_document_is_exact():
    assert make_example(range(5001), [1.0] * 5001).total_weight == 5000.0  # in float16 it would stop at 2048


def test_making_an_example_leaves_the_weights_it_was_given_alone():
    weights = np.ones(4, dtype=np.float16)
    assert make_example(range(4), weights).weights[0] == 0
    assert weights.tolist() == [1.0] * 4


def test_a_part_of_an_example_is_an_example_of_its_own(rng):
    whole = make_example(range(20), [rng.choice([0.0, 0.5, 1.0]) for _ in range(20)])
    before = whole.weights.tolist()
    start = rng.randrange(1, 15)
    part = whole[start : start + 5]
    assert part.input_ids.tolist() == list(range(start, start + 5))
    assert part.weights.tolist() == [0.0, *before[start + 1 : start + 5]]
    assert whole.weights.tolist() == before


def test_supervised_bytes_are_those_of_the_answers(rng):
    chatml = encoder("chatml")
    contents = [words(rng) for _ in range(6)]
    conversations = [Conversation(turns(*contents[start : start + 2])) for start in (0, 2, 4)]
    examples = [only(encode(chatml, conversation).documents) for conversation in conversations]
    assert supervised_bytes(chatml.tokenizer, examples) == sum(len(answer.encode()) for answer in contents[1::2])
