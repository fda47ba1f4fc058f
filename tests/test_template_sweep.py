"""A few templates of the sweep, and a check that its reference finds faults; see scripts.dev.bench.templates."""

import pytest

from qlora.data.encode import ExampleEncoder
from qlora.data.formats import RowReader
from qlora.data.rows import Row
from qlora.data.template import apply_template
from scripts.dev.bench import templates as sweep
from tests.tiny import make_tokenizer, only

# Chat templates of four kinds: past thoughts dropped, thinking switched, each call a message of its own, no end token.
TEMPLATES = ("llama_cpp/Qwen-Qwen3-0.6B", "trl/nemotron_3_nano", "llama_cpp/openai-gpt-oss-120b", "llama_cpp/GLM-4.6")


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_of_conversations_is_right_or_refused(realdata, monkeypatch, name):
    monkeypatch.setattr(sweep, "REALDATA", realdata)
    text = (realdata / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    for tokenizer_name in ("tinyllama_chat_hf", sweep.FAMILY):
        tokenizer = sweep.make_tokenizer(tokenizer_name, text)
        encoder = ExampleEncoder(tokenizer)
        rows = sweep.conversations(tokenizer.eos_token)
        found = {case: sweep.try_case(encoder, row, tokenizer_name in sweep.EXACT) for case, row in rows.items()}
        assert len(rows) >= 25
        assert {case: each for case, each in found.items() if each[0] not in ("right", "refused")} == {}
        assert found["three answers"][0] == "right"


# The beginning of the next turn is written after an answer.
NEXT_HEADER = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' if loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s><s>[INST] {% endif %}{% endfor %}"
)


def encoded(case, template):
    """Return a tokenizer, a conversation, and its supervised tokens, to be changed."""
    tokenizer = make_tokenizer(chat_template=template)
    if template is None:
        apply_template(tokenizer, "chatml")
    row = sweep.conversations("<|im_end|>")[case]
    (result,) = ExampleEncoder(tokenizer).encode([RowReader().read(Row(row, "row"))])
    document = only(result.documents)
    return tokenizer, row, (document.input_ids.tolist(), document.loss_mask.tolist())


def change(at, learned):
    """Flip the supervision of a token, counted from the first supervised one or the first unsupervised one after it."""

    def changed(ids, mask):
        first = mask.index(True)
        place = mask.index(False, first) if at == "behind" else first + at
        return ids, [*mask[:place], learned, *mask[place + 1 :]]

    return changed


def unmask(ids, mask):
    """Supervise a masked part too, which is before the supervised text."""
    first = mask.index(True)
    return ids, [place > first - 6 for place in range(len(ids))]


def learn_next_header(ids, mask):
    """Supervise the beginning of the next turn, and EOS after it."""
    ends = [place for place, index in enumerate(ids) if mask[place] and index == 257]
    learned = [any(end <= place < end + 9 for end in ends) or mask[place] for place in range(len(ids))]
    return [*ids, 257], [*learned, True]


def learn_end_in_call(ids, mask):
    """Supervise everything from the first to the last supervised token."""
    return ids, [True in mask[: place + 1] and True in mask[place:] for place in range(len(ids))]


def mask_reasoning(ids, mask):
    """Mask a word of the reasoning, and supervise the same word of the content."""
    word = make_tokenizer()("m1x", add_special_tokens=False).input_ids
    thought, said, *_ = (place for place in range(len(ids)) if ids[place : place + 3] == word)
    changed = {thought + step: False for step in range(3)} | {said + step: True for step in range(3)}
    return ids, [changed.get(place, learned) for place, learned in enumerate(mask)]


FAULTS = {
    "end token not learned": ("three answers", lambda ids, mask: (ids, [*mask[:-1], False])),
    "first token not learned": ("three answers", change(0, False)),
    "token of a prompt learned": ("three answers", change(-1, True)),
    "line end behind an end token learned": ("three answers", change("behind", True)),
    "word not learned": ("one answer", change(3, False)),
    "masked part learned": ("masked part in front", unmask),
    "words of a prompt lost": ("system", lambda ids, mask: (ids[:12] + ids[20:], mask[:12] + mask[20:])),
    "next header learned": ("three answers", learn_next_header),
    "end token in a call learned": ("end token in a call", learn_end_in_call),
    "reasoning masked instead of the content": ("masked part, its words in the reasoning, call", mask_reasoning),
    "another token": ("one answer", lambda ids, mask: ([*ids[:-3], 5, *ids[-2:]], mask)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_reference_finds_faults(fault):
    case, damage = FAULTS[fault]
    tokenizer, row, document = encoded(case, NEXT_HEADER if damage is learn_next_header else None)
    sweep.check(tokenizer, row, [document], exact=True)
    with pytest.raises(sweep.WrongError):
        sweep.check(tokenizer, row, [damage(*document)], exact=True)
