"""Examples decoded into pieces of text."""

import random

import pytest
from transformers import AutoTokenizer

from qlora.data import make_example, pieces
from tests.tiny import make_tokenizer


def test_pieces_are_cut_where_the_weight_changes_and_around_control_tokens():
    tokenizer = make_tokenizer()
    ids = [256, *tokenizer("ab cd", add_special_tokens=False).input_ids, 258, 257]
    example = make_example(ids, [0, 0, 0, 1, 1, 0.5, 1, 1])
    assert [(piece.text, piece.weight, piece.is_special) for piece in pieces(tokenizer, example)] == [
        ("<s>", 0, True),
        ("ab", 0, False),
        (" c", 1, False),
        ("d", 0.5, False),
        ("<|im_end|>", 1, True),
        ("</s>", 1, True),
    ]


@pytest.mark.parametrize("name", ["minimind", "qwen3", "tinyllama_chat_hf"])
def test_pieces_join_to_the_whole_text_with_its_spaces(realdata, seed, name):
    tokenizer, generator = AutoTokenizer.from_pretrained(realdata / "tokenizers" / name), random.Random(seed)
    text = " ".join(generator.choice(["word", "naïve", "日本", "x = 1", "\n", "  two"]) for _ in range(30))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    weights = [generator.choice([0, 1]) for _ in ids]
    cut = pieces(tokenizer, make_example(ids, weights))
    assert "".join(piece.text for piece in cut) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
