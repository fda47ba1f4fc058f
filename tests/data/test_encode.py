"""Supervised tokens: answers with their end tokens, and nothing else, after prompts as a server feeds them."""

import random

import pytest

from qlora.data.encode import ExampleEncoder, answer_end_id
from qlora.data.examples import Completion, Conversation, Labelled, Preference, Rated, Tokens
from qlora.data.template import apply_template, encode_prompt, render
from qlora.errors import DataError
from tests.data.chats import (
    CALL,
    PROMPT,
    REWRITING,
    TOOLS,
    TURN,
    WITHOUT_END,
    encode,
    encoder,
    phrase,
    real_tokenizer,
    stretches,
    supervised_texts,
    trimming_gpt2,
    turns,
    words,
)
from tests.reference import served
from tests.tiny import make_tokenizer, only

EOS, END_OF_TURN = 257, 258
SURPRISING = TURN + "{{ eos_token }}{% endfor %}" + PROMPT.replace("assistant", "model")
NEWLINE_BEHIND = TURN + "<|im_end|>\n{% endfor %}" + PROMPT
TAGGED = (
    TURN.replace("m.content", "m.content if m.role == 'user' else '<|im_end|>' + m.content") + "{% endfor %}" + PROMPT
)
ENDS = [("alpaca", "</s>"), ("chatml", "<|im_end|>"), (NEWLINE_BEHIND, "<|im_end|>")]
# Blanks, newlines and signs, which tokenizers join in runs.
RUNS = "a \n\n\t.(é1"


@pytest.fixture
def rng(seed):
    return random.Random(seed)


@pytest.fixture(params=["bytes", "minimind", "gpt2", "gpt2, trimming", "qwen3"])
def byte_level(request, realdata):
    """Tokenizers that put nothing before a text."""
    if request.param == "bytes":
        return make_tokenizer(add_bos=False)
    if request.param == "gpt2, trimming":
        return trimming_gpt2(realdata)
    return real_tokenizer(realdata, request.param)


def same(one, other):
    """The ids and weights of two documents are equal."""
    return one.input_ids.tolist() == other.input_ids.tolist() and one.weights.tolist() == other.weights.tolist()


def documents(encoder, example):
    return encode(encoder, example).documents


def weights_of(encoder, document):
    """Each supervised stretch with its weights."""
    return [
        (text, set(document.weights[begin:end].tolist()))
        for text, (begin, end) in zip(supervised_texts(encoder, document), stretches(document), strict=True)
    ]


@pytest.mark.parametrize(("template", "end"), ENDS, ids=["alpaca", "chatml", "newline-after"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_every_answer_and_its_end_token_are_supervised_and_nothing_else(rng, template, end, add_bos):
    several = encoder(template, add_bos=add_bos)
    contents = [words(rng) for _ in range(2 * rng.randrange(1, 6))]
    document = only(documents(several, Conversation(turns(*contents))))
    assert supervised_texts(several, document) == [answer + end for answer in contents[1::2]]
    assert several.tokenizer.decode(document.input_ids) == render(several.tokenizer, turns(*contents))


@pytest.mark.parametrize("template", ["alpaca", "chatml", REWRITING, WITHOUT_END])
def test_what_is_before_an_answer_is_what_a_server_feeds(rng, template):
    any_encoder, messages = encoder(template), turns(*(words(rng) for _ in range(6)))
    group = documents(any_encoder, Conversation(messages))
    begins = [(document, begin) for document in group for begin, _ in stretches(document)]
    for (document, begin), turn in zip(begins, (1, 3, 5), strict=True):
        assert document.input_ids[:begin].tolist() == served.prompt(any_encoder.tokenizer, messages[:turn])


def test_loss_on_last_supervises_the_last_answer_alone(rng):
    last = encoder("chatml", loss_on="last")
    contents = [words(rng) for _ in range(5)]  # a question that no one answers is at the end
    document = only(documents(last, Conversation(turns(*contents))))
    assert supervised_texts(last, document) == [contents[3] + "<|im_end|>"]


@pytest.mark.parametrize("template", ["alpaca", "chatml", REWRITING])
def test_loss_on_all_supervises_everything_but_the_first_token(rng, template):
    everything = encoder(template, loss_on="all")
    messages = turns(*(words(rng) for _ in range(4)))
    document = only(documents(everything, Conversation(messages)))
    assert document.loss_mask.tolist() == [False] + [True] * (len(document) - 1)
    assert everything.tokenizer.decode(document.input_ids) == render(everything.tokenizer, messages)


@pytest.mark.parametrize("template", ["alpaca", REWRITING], ids=["whole", "per-answer"])
def test_each_turn_has_the_weight_it_was_given(rng, template):
    weighted, contents = encoder(template), [words(rng) for _ in range(6)]
    conversation = Conversation(turns(*contents), None, [0.0, 0.5, 0.0, 0.0, 0.0, 2.0])
    group = documents(weighted, conversation)
    found = [stretch for document in group for stretch in weights_of(weighted, document)]
    assert found == [(contents[1] + "</s>", {0.5}), (contents[5] + "</s>", {2.0})]


def test_a_weight_counts_under_loss_on_all_too(rng):
    everything, contents = encoder(loss_on="all", add_bos=False), [words(rng) for _ in range(4)]
    document = only(documents(everything, Conversation(turns(*contents), None, [1.0, 0.0, 1.0, 0.25])))
    values = document.weights.tolist()
    start = len(encode_prompt(everything.tokenizer, turns(*contents[:3])))
    assert set(values[start:]) == {0.25}
    assert values[:start].count(0.0) == 1 + len((contents[1] + ".").encode())  # the first token; the answer and its end


def test_an_added_end_token_has_the_weight_of_its_answer(rng):
    endless = encoder(WITHOUT_END)
    document = only(documents(endless, Conversation(turns(words(rng), words(rng)), None, [0.0, 0.5])))
    assert document.input_ids[-1] == EOS
    assert document.weights[-1] == 0.5


def test_a_trailing_question_is_not_supervised(rng):
    alpaca, contents = encoder(), [words(rng) for _ in range(3)]
    assert supervised_texts(alpaca, only(documents(alpaca, Conversation(turns(*contents))))) == [contents[1] + "</s>"]


def test_an_empty_answer_is_to_stop_at_once(rng):
    alpaca = encoder()
    assert supervised_texts(alpaca, only(documents(alpaca, Conversation(turns(words(rng), ""))))) == ["</s>"]


def test_a_conversation_without_an_answer_has_nothing_to_train_on(rng):
    assert only(documents(encoder(), Conversation(turns(words(rng))))).num_supervised == 0


@pytest.mark.parametrize("template", ["alpaca", "chatml"])
def test_an_answer_to_nothing_is_refused(rng, template):
    messages = [{"role": "assistant", "content": words(rng)}, *turns(words(rng), words(rng))]
    with pytest.raises(DataError, match="begins with an answer, which has no prompt; remove that turn"):
        encode(encoder(template), Conversation(messages))


def test_an_answer_to_nothing_may_stay_if_it_is_not_supervised(rng):
    chatml, contents = encoder("chatml"), [words(rng) for _ in range(3)]
    messages = [{"role": "assistant", "content": contents[0]}, *turns(*contents[1:])]
    document = only(documents(chatml, Conversation(messages, None, [0.0, 0.0, 1.0])))
    assert supervised_texts(chatml, document) == [contents[2] + "<|im_end|>"]


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"], ids=["no-bos", "bos"])
def test_an_end_token_is_appended_where_the_template_has_none(rng, bos, loss_on):
    endless, answer = encoder(bos + WITHOUT_END, loss_on), words(rng)
    encoded = encode(endless, Conversation(turns(words(rng), answer)))
    document = only(encoded.documents)
    assert encoded.eos_added
    assert document.input_ids.tolist().count(EOS) == 1
    assert supervised_texts(endless, document)[-1].endswith(answer + "</s>")


def test_an_end_token_is_appended_where_only_a_tag_of_the_answer_is_special(rng):
    tagged, answer = encoder(TAGGED), phrase(rng)
    encoded = encode(tagged, Conversation(turns(words(rng), answer)))
    assert encoded.eos_added
    assert supervised_texts(tagged, only(encoded.documents)) == ["<|im_end|>" + answer + "</s>"]


def test_an_end_token_is_appended_under_loss_on_all_where_only_questions_end_with_one(rng):
    template = REWRITING.replace("{{ eos_token }}", "{{ '<|im_end|>' if m.role == 'user' else '' }}")
    everything = encoder(template, loss_on="all")
    encoded = encode(everything, Conversation(turns(*(words(rng) for _ in range(4)))))
    assert encoded.eos_added
    assert only(encoded.documents).input_ids[-1] == EOS


@pytest.mark.parametrize("template", [WITHOUT_END, "alpaca", "chatml"])
def test_what_follows_the_last_supervised_answer_is_left_out_so_that_it_ends(rng, template):
    messages = turns(words(rng), words(rng), words(rng))
    asked, answered = encoder(template), Conversation(messages[:2])
    encoded, expected = encode(asked, Conversation(messages)), encode(asked, answered)
    assert same(only(encoded.documents), only(expected.documents))
    assert encoded.eos_added == expected.eos_added == (template == WITHOUT_END)


@pytest.mark.parametrize("template", ["alpaca", "chatml"])
def test_under_loss_on_all_what_follows_the_last_answer_is_supervised_too(rng, template):
    messages = turns(words(rng), words(rng), "and then?")
    asked = encoder(template, "all")
    document = only(encode(asked, Conversation(messages)).documents)
    assert "and then?" in asked.tokenizer.decode(document.input_ids[document.loss_mask])


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_text_that_has_its_marks_gets_no_others(loss_on):
    marked = encoder(loss_on=loss_on)
    plain, with_marks = Completion("ask ", "answer"), Completion("<s>ask ", "answer</s>")
    assert same(only(encode(marked, plain).documents), only(encode(marked, with_marks).documents))


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_what_a_template_leaves_out_of_a_turn_is_refused(role):
    forgetful = encoder(
        "{% for m in messages %}{% if m.role != '" + role + "' %}{{ m.content }}|{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "s1"}, *turns("q1", "a1", "q2", "a2")]
    with pytest.raises(DataError, match=f"leaves out .*{role}|doesn't write plain text"):
        encode(forgetful, Conversation(messages))


def test_text_beside_a_call_that_a_template_leaves_out_is_refused():
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    question, answer = turns("q", "Let me see.")
    assert only(
        encode(encoder(template), Conversation([question, answer | {"content": "", "tool_calls": [call]}])).documents
    )
    with pytest.raises(DataError, match="leaves out or changes .*Let me see"):
        encode(encoder(template), Conversation([question, answer | {"tool_calls": [call]}]))
    with pytest.raises(DataError, match="second call of a turn"):
        encode(encoder(template), Conversation([question, answer | {"content": "", "tool_calls": [call, call]}]))


@pytest.mark.parametrize("template", ["alpaca", "chatml"])
def test_no_end_token_is_added_where_the_template_writes_one(rng, template):
    encoded = encode(encoder(template), Conversation(turns(words(rng), words(rng))))
    document = only(encoded.documents)
    assert not encoded.eos_added
    assert document.input_ids.tolist().count(EOS) == (template == "alpaca")
    assert document.input_ids[-1] == (EOS if template == "alpaca" else END_OF_TURN)


def test_each_answer_is_a_document_where_the_template_rewrites_what_was_said(rng):
    rewriting, contents = encoder(REWRITING), [words(rng) for _ in range(5)]
    encoded = encode(rewriting, Conversation(turns(*contents)))
    assert encoded.per_answer
    assert [supervised_texts(rewriting, document) for document in encoded.documents] == [
        [contents[1] + "</s>"],
        [contents[3] + "</s>"],
    ]


def test_only_supervised_answers_become_documents_where_the_template_rewrites(rng):
    rewriting, contents = encoder(REWRITING), [words(rng) for _ in range(6)]
    group = documents(rewriting, Conversation(turns(*contents), None, [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]))
    assert supervised_texts(rewriting, only(group)) == [contents[3] + "</s>"]


def test_a_template_whose_prompt_is_not_how_answers_begin_is_refused(rng):
    with pytest.raises(DataError, match="set data.chat_template to chatml"):
        encode(encoder(SURPRISING), Conversation(turns(words(rng), words(rng))))


def test_each_answer_is_a_document_where_a_token_would_join_an_earlier_one_to_its_prompt(rng, realdata):
    tokenizer = real_tokenizer(realdata, "qwen3")
    apply_template(tokenizer, "chatml")
    joined, messages = ExampleEncoder(tokenizer), turns(phrase(rng), "\n" + phrase(rng), phrase(rng), phrase(rng))
    encoded = encode(joined, Conversation(messages))
    assert encoded.per_answer
    for document, turn in zip(encoded.documents, (1, 3), strict=True):
        prompt = served.prompt(tokenizer, messages[:turn])
        assert document.input_ids[: len(prompt)].tolist() == prompt
        assert supervised_texts(joined, document) == [messages[turn]["content"] + "<|im_end|>"]


@pytest.mark.parametrize("template", ["chatml", WITHOUT_END], ids=["chatml", "no-end"])
def test_prompts_are_fed_as_a_server_does_whatever_blanks_answers_begin_and_end_with(rng, byte_level, template):
    tokenizer = byte_level
    if template == "chatml":
        apply_template(tokenizer, "chatml")
    else:
        tokenizer.chat_template = template
    any_encoder = ExampleEncoder(tokenizer)
    for _ in range(5):
        messages = turns(*(words(rng, RUNS) for _ in range(6)))
        group = documents(any_encoder, Conversation(messages))
        begins = [(document, begin) for document in group for begin, _ in stretches(document)]
        for (document, begin), turn in zip(begins, (1, 3, 5), strict=True):
            assert document.input_ids[:begin].tolist() == served.prompt(tokenizer, messages[:turn])
            if template == "chatml":
                answer = tokenizer.decode(document.input_ids[begin:])
                assert answer.startswith(messages[turn]["content"] + "<|im_end|>")


def test_a_completion_is_what_its_parts_are_by_themselves(rng, byte_level):
    raw = ExampleEncoder(byte_level)
    pairs = [(words(rng, RUNS), words(rng, RUNS)) for _ in range(40)]
    for prompt, completion in [*pairs, ("a (" + " " * 3, "("), ("a" + " " * 5, "b")]:
        document = only(documents(raw, Completion(prompt, completion)))
        wanted = served.completion(byte_level, prompt, completion)
        assert (document.input_ids.tolist(), document.loss_mask.tolist()) == wanted


@pytest.mark.parametrize("name", ["tinyllama_chat_hf", "mistral7b_v01_hf"])
def test_a_completions_prompt_keeps_its_tokens_where_texts_get_a_mark_in_front(rng, realdata, name):
    tokenizer = real_tokenizer(realdata, name)
    raw = ExampleEncoder(tokenizer)
    for _ in range(20):
        prompt, completion = "a" + words(rng, RUNS), words(rng, RUNS)
        document = only(documents(raw, Completion(prompt, completion)))
        begin, end = only(stretches(document))
        assert document.input_ids[:begin].tolist() == tokenizer(prompt).input_ids
        assert end == len(document)
        whole = tokenizer.decode(document.input_ids, skip_special_tokens=True)
        assert whole.strip() == (prompt + completion).strip()


def test_an_end_token_in_a_text_that_is_no_conversation_ends_nothing(rng):
    raw = encoder()
    document = only(documents(raw, Completion("a", "b<|im_end|>\nc")))
    assert supervised_texts(raw, document) == ["b<|im_end|>\nc</s>"]


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_text_is_supervised_whole_and_ends_with_eos(rng, add_bos, loss_on):
    raw, text = encoder(loss_on=loss_on, add_bos=add_bos), words(rng)
    document = only(documents(raw, Completion("", text)))
    assert raw.tokenizer.decode(document.input_ids) == "<s>" * add_bos + text + "</s>"
    assert document.loss_mask.tolist() == [False] + [True] * (len(document) - 1)


def test_loss_on_all_supervises_a_completions_prompt_too(rng):
    document = only(documents(encoder(loss_on="all"), Completion(words(rng), words(rng))))
    assert document.loss_mask.tolist() == [False] + [True] * (len(document) - 1)


def test_a_labelled_text_is_its_tokens_and_teaches_none(rng):
    labelled, text = encoder(), words(rng)
    document = only(documents(labelled, Labelled(text, ("animal",))))
    assert document.input_ids.tolist() == labelled.tokenizer(text).input_ids
    assert document.num_supervised == 0


def test_ids_that_are_tokens_already_are_taken_as_they_are(rng):
    ids, weights = rng.choices(range(300), k=20), rng.choices([0.0, 0.5, 1.0], k=20)
    document = only(documents(encoder(loss_on="all"), Tokens(ids, weights)))
    assert document.input_ids.tolist() == ids
    assert document.weights.tolist() == [0.0, *weights[1:]]


@pytest.mark.parametrize("ids", [[1, -1], [1, 2.5], [-100], [2**40]])
def test_what_is_no_id_is_refused(ids):
    with pytest.raises(DataError, match="input_ids should be token ids, integers from 0"):
        encode(encoder(), Tokens(ids, [1.0] * len(ids)))


@pytest.mark.parametrize("template", ["chatml", REWRITING], ids=["whole", "rewriting"])
@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_only_the_last_answers_of_a_preference_are_supervised(rng, loss_on, template):
    judging, asked = encoder(template, loss_on), turns(*(words(rng) for _ in range(3)))
    good, bad = ({"role": "assistant", "content": words(rng)} for _ in range(2))
    encoded = encode(judging, Preference(Conversation([*asked, good]), Conversation([*asked, bad])))
    prompt = served.prompt(judging.tokenizer, asked)
    assert not encoded.per_answer
    for document, answer in zip(encoded.documents, (good, bad), strict=True):
        assert document.input_ids[: len(prompt)].tolist() == prompt
        assert stretches(document) == [(len(prompt), len(document))]
        assert only(supervised_texts(judging, document)).startswith(answer["content"])


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_only_the_last_answer_of_a_rated_conversation_is_supervised(rng, loss_on):
    judging, contents = encoder(loss_on=loss_on), [words(rng) for _ in range(4)]
    document = only(documents(judging, Rated(Conversation(turns(*contents)), True)))
    assert supervised_texts(judging, document) == [contents[3] + "</s>"]


def test_a_verdict_on_no_answer_is_refused(rng):
    open_end = Conversation(turns(words(rng), words(rng), words(rng)))
    with pytest.raises(DataError, match="end with the answer that was rated, not with a user turn"):
        encode(encoder(), Preference(open_end, open_end))


def test_many_at_once_are_what_each_is_alone(rng):
    rewriting = encoder(REWRITING)
    chats = [Conversation(turns(*(words(rng) for _ in range(rng.randrange(1, 7))))) for _ in range(8)]
    bad = [Conversation([{"role": "assistant", "content": "a"}]), Tokens([-1], [1.0])]
    texts = [Completion(words(rng), words(rng)), Labelled(words(rng), ("a",)), Tokens([1, 2], [1.0, 1.0])]
    pairs = [Preference(chat, chat) for chat in chats if len(chat.messages) % 2 == 0]
    examples = [*chats, *bad, *texts, *pairs]
    rng.shuffle(examples)
    for together, example in zip(rewriting.encode(examples), examples, strict=True):
        alone = only(rewriting.encode([example]))
        if isinstance(alone, DataError):
            assert str(together) == str(alone)
            continue
        assert (together.per_answer, together.eos_added) == (alone.per_answer, alone.eos_added)
        assert [(part.input_ids.tolist(), part.weights.tolist()) for part in together.documents] == [
            (part.input_ids.tolist(), part.weights.tolist()) for part in alone.documents
        ]


def test_nothing_becomes_nothing():
    assert encoder().encode([]) == []


def test_tool_calls_and_reasoning_are_supervised_as_hermes_writes_them(rng):
    chatml, thought, result, answer = encoder("chatml", add_bos=False), words(rng), words(rng), words(rng)
    messages = [
        *turns("Rain?"),
        {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [CALL, CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": CALL["id"], "content": result},
        {"role": "assistant", "content": answer},
    ]
    document = only(documents(chatml, Conversation(messages, TOOLS)))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert supervised_texts(chatml, document) == [
        f"<think>\n{thought}\n</think>\n\n{call}\n{call}<|im_end|>",
        f"{answer}<|im_end|>",
    ]
    whole = chatml.tokenizer.decode(document.input_ids)
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in whole
    assert f"<|im_start|>user\n<tool_response>\n{result}\n</tool_response><|im_end|>\n" in whole


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token.*set its eos_token"):
        ExampleEncoder(tokenizer)


@pytest.mark.parametrize(
    ("template", "end"),
    [("alpaca", EOS), ("chatml", END_OF_TURN), (NEWLINE_BEHIND, END_OF_TURN), (WITHOUT_END, EOS), (SURPRISING, EOS)],
    ids=["alpaca", "chatml", "newline-after", "no-end", "refused"],
)
def test_the_id_that_ends_answers_is_the_one_that_training_teaches(template, end):
    assert answer_end_id(encoder(template).tokenizer) == end
