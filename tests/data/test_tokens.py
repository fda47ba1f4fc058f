"""Which tokens are learnt: answers with their end tokens, and nothing else."""

import random

import numpy as np
import pytest

from qlora.data.formats import Completion, Conversation
from qlora.data.template import apply_template, encode_prompt
from qlora.data.tokens import ExampleEncoder, make_example, supervised_bytes
from qlora.errors import DataError
from tests.tiny import make_tokenizer, only

EOS, END_OF_TURN = 257, 258
TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
PROMPT = "{% if add_generation_prompt %}[assistant]{% endif %}"
WITHOUT_END = TURN + "{% endfor %}" + PROMPT
SURPRISING = TURN + "{{ eos_token }}{% endfor %}" + PROMPT.replace("assistant", "model")
REWRITING = (
    TURN.replace("m.content", "'<gone>' if m.role == 'assistant' and not loop.last else m.content")
    + "{{ eos_token }}{% endfor %}"
    + PROMPT
)


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def words(rng):
    return "".join(rng.choices("abc XYZ.\né漢🙂", k=rng.randrange(1, 30)))


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def encoder(template="alpaca", loss_on="assistant", add_bos=True):
    tokenizer = make_tokenizer(add_bos)
    if template in ("alpaca", "chatml"):
        apply_template(tokenizer, template)
    else:
        tokenizer.chat_template = template
    return ExampleEncoder(tokenizer, loss_on)


def runs(encoder, example):
    """The supervised stretches of an example, decoded."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], example.loss_mask.astype(int), [0]))))
    stretches = zip(edges[::2], edges[1::2], strict=True)
    return [encoder.tokenizer.decode(example.input_ids[start:end]) for start, end in stretches]


@pytest.mark.parametrize(("template", "end"), [("alpaca", "</s>"), ("chatml", "<|im_end|>")])
@pytest.mark.parametrize("add_bos", [True, False])
def test_the_answer_and_its_end_token_are_supervised_and_nothing_else(rng, template, end, add_bos):
    with_bos = encoder(template, add_bos=add_bos)
    answer = words(rng)
    example = only(with_bos.encode(Conversation(turns(words(rng), answer))))
    assert runs(with_bos, example) == [answer + end]
    assert example.loss_mask[-1]


def test_the_prompt_is_everything_before_the_answer(rng):
    alpaca, messages = encoder(), turns(words(rng), words(rng))
    example = only(alpaca.encode(Conversation(messages)))
    prompt = encode_prompt(alpaca.tokenizer, messages[:1])
    assert example.input_ids[~example.loss_mask].tolist() == prompt


@pytest.mark.parametrize(("template", "end"), [("alpaca", "</s>"), ("chatml", "<|im_end|>")])
def test_every_answer_of_a_conversation_is_supervised(rng, template, end):
    several = encoder(template)
    contents = [words(rng) for _ in range(2 * rng.randrange(2, 6))]
    example = only(several.encode(Conversation(turns(*contents))))
    assert runs(several, example) == [answer + end for answer in contents[1::2]]


def test_an_answer_to_nothing_is_refused(rng):
    with pytest.raises(DataError, match="refuses this conversation: .*empty"):
        only(encoder("chatml").encode(Conversation(turns(words(rng), words(rng), first="assistant"))))


def test_a_trailing_question_is_not_supervised(rng):
    alpaca = encoder()
    question, answer, another = (words(rng) for _ in range(3))
    assert runs(alpaca, only(alpaca.encode(Conversation(turns(question, answer, another))))) == [answer + "</s>"]


def test_nothing_behind_an_end_token_is_supervised(rng):
    newline_after_each = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chatml = encoder(newline_after_each)
    contents = [words(rng) for _ in range(4)]
    example = only(chatml.encode(Conversation(turns(*contents))))
    assert chatml.tokenizer.decode(example.input_ids).endswith("<|im_end|>\n")
    assert runs(chatml, example) == [contents[1] + "<|im_end|>", contents[3] + "<|im_end|>"]


def test_loss_on_all_supervises_everything_but_the_first_token(rng):
    for template in ("alpaca", "chatml"):
        everything = encoder(template, loss_on="all")
        example = only(everything.encode(Conversation(turns(words(rng), words(rng), words(rng)))))
        assert example.loss_mask[1:].all()
        assert not example.loss_mask[0]


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"], ids=["no-bos", "bos"])
def test_an_end_token_is_appended_where_the_template_has_none(rng, bos, loss_on):
    endless = encoder(bos + WITHOUT_END, loss_on)
    question, answer = words(rng), words(rng)
    example = only(endless.encode(Conversation(turns(question, answer))))
    assert example.input_ids.tolist().count(EOS) == 1
    assert example.input_ids[-1] == EOS
    assert runs(endless, example)[-1].endswith(answer + "</s>")


def test_an_end_token_is_never_learnt_behind_a_question(rng):
    endless = encoder(WITHOUT_END)
    example = only(endless.encode(Conversation(turns(words(rng), words(rng), words(rng)))))
    position = example.input_ids.tolist().index(EOS) if EOS in example.input_ids else 0
    assert not example.loss_mask[position] or example.loss_mask[position - 1]


@pytest.mark.parametrize("template", ["alpaca", "chatml"])
def test_no_end_token_is_added_where_the_template_writes_one(rng, template):
    example = only(encoder(template).encode(Conversation(turns(words(rng), words(rng)))))
    assert example.input_ids.tolist().count(EOS) == (template == "alpaca")
    assert example.input_ids[-1] == (EOS if template == "alpaca" else END_OF_TURN)


def test_an_empty_answer_is_to_stop_at_once(rng):
    alpaca = encoder()
    assert runs(alpaca, only(alpaca.encode(Conversation(turns(words(rng), ""))))) == ["</s>"]


def test_a_conversation_without_an_answer_has_nothing_to_learn(rng):
    example = only(encoder().encode(Conversation(turns(words(rng)))))
    assert example.num_supervised == 0


def test_each_answer_is_a_document_where_the_template_rewrites_what_was_said(rng):
    rewriting = encoder(REWRITING)
    contents = [words(rng) for _ in range(5)]  # ends with a question that no one answers
    examples = rewriting.encode(Conversation(turns(*contents)))
    assert [runs(rewriting, example) for example in examples] == [[contents[1] + "</s>"], [contents[3] + "</s>"]]
    for example, asked in zip(examples, (1, 3), strict=True):
        prompt = encode_prompt(rewriting.tokenizer, turns(*contents[:asked]))
        assert example.input_ids[: len(prompt)].tolist() == prompt


def test_a_template_whose_prompt_is_not_how_answers_begin_is_refused(rng):
    with pytest.raises(DataError, match="set data.chat_template to chatml"):
        encoder(SURPRISING).encode(Conversation(turns(*(words(rng) for _ in range(2)))))


def test_all_can_be_learnt_through_a_template_that_rewrites(rng):
    """Where every token is supervised no answer's place is needed."""
    example = only(encoder(REWRITING, loss_on="all").encode(Conversation(turns(*(words(rng) for _ in range(4))))))
    assert example.loss_mask[1:].all()


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_completion_is_supervised_from_where_the_prompt_ends(rng, add_bos):
    raw = encoder(add_bos=add_bos)
    prompt, completion = words(rng), words(rng)
    example = only(raw.encode(Completion(prompt, completion)))
    assert runs(raw, example) == [completion + "</s>"]
    assert raw.tokenizer.decode(example.input_ids) == "<s>" * add_bos + prompt + completion + "</s>"


def test_a_completions_prompt_keeps_its_own_tokens(realdata):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "qwen3")
    example = only(ExampleEncoder(tokenizer).encode(Completion("A line\n", "\nnext")))  # '\n\n' is one token
    prompt = tokenizer("A line\n", add_special_tokens=False).input_ids
    assert tokenizer("A line\n\nnext", add_special_tokens=False).input_ids[: len(prompt)] != prompt
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(example.input_ids[example.loss_mask]) == "\nnext" + tokenizer.eos_token


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_text_is_supervised_whole_and_ends_with_eos(rng, add_bos, loss_on):
    raw = encoder(loss_on=loss_on, add_bos=add_bos)
    text = words(rng)
    example = only(raw.encode(Completion("", text)))
    assert raw.tokenizer.decode(example.input_ids) == "<s>" * add_bos + text + "</s>"
    assert example.loss_mask.tolist() == [False] + [True] * (len(example) - 1)


def test_loss_on_all_supervises_a_completions_prompt_too(rng):
    example = only(encoder(loss_on="all").encode(Completion(words(rng), words(rng))))
    assert example.loss_mask.tolist() == [False] + [True] * (len(example) - 1)


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token.*set its eos_token"):
        ExampleEncoder(tokenizer)


def test_the_first_token_is_never_supervised(rng):
    length = rng.randrange(1, 9)
    example = make_example(range(length), [True] * length)
    assert example.num_supervised == length - 1
    assert not example.loss_mask[0]


def test_a_part_of_an_example_is_an_example_of_its_own(rng):
    whole = make_example(range(20), [rng.random() < 0.5 for _ in range(20)])
    before = whole.loss_mask.copy()
    start = rng.randrange(1, 15)
    part = whole[start : start + 5]
    assert part.input_ids.tolist() == list(range(start, start + 5))
    assert part.loss_mask.tolist() == [False, *before[start + 1 : start + 5]]
    assert whole.loss_mask.tolist() == before.tolist()


def test_supervised_bytes_are_those_of_the_answers(rng):
    chatml = encoder("chatml")
    contents = [words(rng) for _ in range(6)]
    examples = [only(chatml.encode(Conversation(turns(*contents[start : start + 2])))) for start in (0, 2, 4)]
    wanted = sum(len(answer.encode()) for answer in contents[1::2])
    assert supervised_bytes(chatml.tokenizer, examples) == wanted
