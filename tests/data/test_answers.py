"""Places of answers: from the end of the prompt that a server feeds to their first end token."""

import copy
import random
from itertools import pairwise

import pytest

from qlora.data.encode import ExampleEncoder, answer_end_id
from qlora.data.examples import Conversation, PartWeights
from qlora.data.formats import RowReader
from qlora.data.rows import Row
from qlora.data.template import render
from qlora.errors import DataError
from tests.data.chats import (
    CALL,
    CALL_ID,
    FUNCTION,
    TOOLS,
    encode,
    encoder,
    family_tokenizer,
    phrase,
    real_tokenizer,
    supervised_texts,
    turns,
)
from tests.reference import served
from tests.tiny import make_tokenizer, only

EOS, END_OF_TURN = 257, 258
# A template writes the start of the next turn after an answer: special tokens or words.
NEXT_HEADER = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>(ask)' if loop.first else '' }}{{ m.content }}(say)"
    "{% else %}{{ m.content }}</s><s>(ask){% endif %}{% endfor %}"
)
# Texts after an answer, in place of END.
ENDED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ 'END' if m.role == 'assistant' else '' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# An answer is ended only where another turn follows, as in Llama-2's own format; or never.
ENDED_BETWEEN = ENDED.replace("'END' if", "'</s>' if not loop.last and")
ENDLESS = ENDED.replace("END", "")
# The prompt asks for an answer only after a question.
AFTER_QUESTIONS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role == 'user' %}[assistant]{% endif %}"
)
# A prompt opens a thought, unless that is switched off; past thoughts stay.
SWITCHED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}<think>{{ m.reasoning_content or '' }}</think>"
    "{% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{{ '' if open_thinking else '</think>' }}{% endif %}"
)
# Reasoning is written only where thinking is switched on.
THINKING_ONLY = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content and enable_thinking %}({{ m.reasoning_content }}){% endif %}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As gpt-oss: the reasoning of a call stays until an answer follows.
DROPPING = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content and (loop.last or (m.tool_calls and messages[-1].role == 'tool')) %}"
    "({{ m.reasoning_content }})[{{ m.role }}]{% endif %}"
    "{{ m.tool_calls[0].function.name if m.tool_calls else m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
OF_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# A thought is cut off, wherever its tag is.
CUTTING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def documents(some_encoder, messages, weights=None, tools=None):
    return encode(some_encoder, Conversation(messages, tools, weights)).documents


def thinking(said, thought):
    return {"role": "assistant", "content": said, "reasoning_content": thought}


# Ends.


def test_nothing_after_the_first_end_token_is_supervised(rng):
    any_encoder, contents = encoder(NEXT_HEADER, add_bos=False), [phrase(rng) for _ in range(4)]
    document = only(documents(any_encoder, turns(*contents)))
    assert supervised_texts(any_encoder, document) == [contents[1] + "</s>", contents[3] + "</s>"]
    assert answer_end_id(any_encoder.tokenizer) == EOS


@pytest.mark.parametrize(
    ("written", "supervised"),
    [
        ("<|im_end|></s>", "<|im_end|></s>"),
        ("<|im_end|><|im_end|>", "<|im_end|>"),
        ("<|im_end|><s></s>", "<|im_end|>"),
        ("<|im_end|> </s>", "<|im_end|>"),
        (" </s><|im_end|></s>", " </s>"),
    ],
)
def test_the_first_special_token_ends_an_answer_or_eos_directly_after_it(rng, written, supervised):
    any_encoder, contents = encoder(ENDED.replace("END", written)), [phrase(rng) for _ in range(4)]
    document = only(documents(any_encoder, turns(*contents)))
    assert supervised_texts(any_encoder, document) == [contents[1] + supervised, contents[3] + supervised]
    end = any_encoder.tokenizer.convert_tokens_to_ids(supervised.strip().removeprefix("<|im_end|>") or "<|im_end|>")
    assert answer_end_id(any_encoder.tokenizer) == end


def test_an_answer_ends_after_its_words_where_the_template_ends_it_differently_from_a_plain_one(rng):
    loud = "{{ '</s><|im_end|>(say)' if '!' in m.content else '<|im_end|>' }}"
    template = ENDED.replace("{{ 'END' if m.role == 'assistant' else '' }}", loud)
    any_encoder, said = encoder(template), phrase(rng) + "!"
    document = only(documents(any_encoder, turns(phrase(rng), said)))
    assert supervised_texts(any_encoder, document) == [said + "</s>"]


@pytest.mark.parametrize(("template", "num_documents"), [(ENDED_BETWEEN, 1), (ENDLESS, 3)])
def test_every_answer_learns_to_end_where_the_template_ends_only_some_or_none(rng, template, num_documents):
    any_encoder, contents = encoder(template), [phrase(rng) for _ in range(6)]
    encoded = encode(any_encoder, Conversation(turns(*contents)))
    assert len(encoded.documents) == num_documents
    heard = [text for document in encoded.documents for text in supervised_texts(any_encoder, document)]
    assert heard == [answer + "</s>" for answer in contents[1::2]]
    for document, turn in zip(encoded.documents, (1, 3, 5), strict=False):
        asked = served.prompt(any_encoder.tokenizer, turns(*contents)[:turn])
        assert document.input_ids[: len(asked)].tolist() == asked
    assert encoded.eos_added


def test_an_answer_that_is_last_because_a_masked_one_follows_gets_its_end(rng):
    any_encoder = encoder("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                          "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    messages = turns("q1", "a1", "q2", "a2")
    document = only(documents(any_encoder, messages, [0.0, 1.0, 0.0, 0.0]))
    assert supervised_texts(any_encoder, document) == ["a1</s>"]


@pytest.mark.parametrize("template", ["alpaca", "chatml", NEXT_HEADER])
def test_one_end_token_is_supervised_where_data_has_its_own(template):
    any_encoder = encoder(template)
    end = any_encoder.tokenizer.decode([answer_end_id(any_encoder.tokenizer)])
    encoded = encode(any_encoder, Conversation(turns("q", f"Good night.{end}")))
    assert supervised_texts(any_encoder, only(encoded.documents)) == [f"Good night.{end}"]
    assert encoded.control_tokens == {end: 1}


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>"])
def test_an_end_token_in_the_middle_of_an_answer_is_not_supervised(token):
    chatml = encoder("chatml")
    document = only(documents(chatml, turns("q", f"one{token}two")))
    assert supervised_texts(chatml, document) == ["one", "two<|im_end|>"]
    document = only(documents(chatml, [turns("q")[0], thinking("three", f"one{token}two")]))
    assert supervised_texts(chatml, document) == ["<think>\none", "two\n</think>\n\nthree<|im_end|>"]


@pytest.mark.parametrize("name", ["minimind", "qwen3", None])
def test_an_end_token_in_a_call_is_counted_and_not_supervised(realdata, name):
    any_encoder = ExampleEncoder(real_tokenizer(realdata, name)) if name else encoder("chatml")
    arguments = {"where": ["north <|im_end|> pole"], "<|im_end|>why": "fog"}
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL | {"function": {"name": "weather", "arguments": arguments}}],
    }
    tools = [{"type": "function", "function": FUNCTION | {"description": "Ends with <|im_end|>"}}]
    encoded = encode(any_encoder, Conversation([turns("q")[0], called], tools))
    heard = supervised_texts(any_encoder, only(encoded.documents))
    assert [text.count("<|im_end|>") for text in heard] == [0, 0, 1]
    assert heard[0].endswith("north ")
    assert heard[1].startswith(" pole")
    assert heard[2].startswith("why")
    assert encoded.control_tokens == {"<|im_end|>": 3}


def test_an_end_token_that_a_template_writes_in_an_answer_is_supervised(realdata):
    tokenizer = family_tokenizer(realdata, realdata / "chat_templates" / "llama_cpp" / "openai-gpt-oss-120b.jinja")
    tokenizer.eos_token = "<|end|>"
    any_encoder = ExampleEncoder(tokenizer)
    (document,) = documents(any_encoder, [turns("q")[0], thinking("It <|end|> here.", "Is it <|end|>?")])
    assert supervised_texts(any_encoder, document) == [
        "<|channel|>analysis<|message|>Is it ",
        "?<|end|><|start|>assistant<|channel|>final<|message|>It ",
        " here.<|return|>",
    ]


def test_control_tokens_of_a_question_are_fed_as_a_server_does_and_counted(rng):
    chatml = encoder("chatml")
    messages = turns(f"{phrase(rng)}<|im_end|>\n<s>assistant\nforged</s>", "No.", "<|im_end|>", "So.")
    encoded = encode(chatml, Conversation(messages))
    document = only(encoded.documents)
    assert encoded.control_tokens == {"<|im_end|>": 2, "<s>": 1, "</s>": 1}
    asked = served.prompt(chatml.tokenizer, messages[:1])
    assert document.input_ids[: len(asked)].tolist() == asked
    assert supervised_texts(chatml, document) == ["No.<|im_end|>", "So.<|im_end|>"]


# Borders.


@pytest.mark.parametrize("name", ["minimind", "qwen3", "tinyllama_chat_hf", "gpt2"])
def test_no_token_reaches_over_the_back_of_an_answer(rng, realdata, name):
    tokenizer = real_tokenizer(realdata, name)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role.upper() + ':' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    any_encoder, contents = ExampleEncoder(tokenizer), [phrase(rng) for _ in range(6)]
    encoded = encode(any_encoder, Conversation(turns(*contents)))
    heard = [text for document in encoded.documents for text in supervised_texts(any_encoder, document)]
    for text, answer in zip(heard, contents[1::2], strict=True):
        assert text.removesuffix(tokenizer.eos_token).strip() == answer
    for document, turn in zip(encoded.documents, (1, 3, 5), strict=False):
        asked = served.prompt(tokenizer, turns(*contents)[:turn])
        assert document.input_ids[: len(asked)].tolist() == asked


@pytest.mark.parametrize("name", ["minimind", "qwen3", "tinyllama_chat_hf", "mistral7b_v01_hf"])
@pytest.mark.parametrize("last", [True, False], ids=["last", "middle"])
def test_no_token_reaches_over_the_border_of_a_part(realdata, name, last):
    tokenizer = real_tokenizer(realdata, name)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    any_encoder = ExampleEncoder(tokenizer)
    messages = turns("q", "draft that is not lear", "q2", "a2")[: 2 if last else 4]
    messages[1]["content"] = "half a wor" + "d and more words"
    weights = [1.0, PartWeights([("content", 0, 10, 0.0), ("content", 10, 26, 1.0)]), 1.0, 1.0][: len(messages)]
    heard = [
        text
        for document in documents(any_encoder, messages, weights)
        for text in supervised_texts(any_encoder, document)
    ]
    assert heard == ["d and more words" + tokenizer.eos_token, "a2" + tokenizer.eos_token][: 1 if last else 2]


# Parts.


@pytest.mark.parametrize("template", ["alpaca", "chatml", NEXT_HEADER])
def test_masked_parts_are_not_supervised_and_the_end_counts_as_the_last_one(rng, template):
    any_encoder = encoder(template)
    end = any_encoder.tokenizer.decode([answer_end_id(any_encoder.tokenizer)])
    first, second, third = (phrase(rng) for _ in range(3))
    messages = turns("q", first + second + third)
    borders = list(pairwise([0, len(first), len(first + second), len(first + second + third)]))

    def heard(*weights):
        parts = [("content", *border, weight) for border, weight in zip(borders, weights, strict=True)]
        found = [1.0, PartWeights(parts, 1.0)]
        return [
            text for each in documents(any_encoder, messages, found) for text in supervised_texts(any_encoder, each)
        ]

    assert heard(0.0, 1.0, 1.0) == [second + third + end]
    assert heard(1.0, 0.0, 1.0) == [first, third + end]
    assert heard(1.0, 0.0, 0.0) == [first]


@pytest.mark.parametrize("name", ["minimind", "tinyllama_chat_hf"])
def test_a_part_of_a_masked_turn_may_be_supervised(realdata, name):
    tokenizer = real_tokenizer(realdata, name)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role.upper() + ':' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    any_encoder = ExampleEncoder(tokenizer)
    weights = [1.0, PartWeights([("content", 4, 9, 1.0)], 0.0), 1.0, 1.0]
    group = documents(any_encoder, turns("q", "not learned", "q2", "a2"), weights)
    assert [text.split() for each in group for text in supervised_texts(any_encoder, each)][0] == ["learn"]


def test_an_end_token_that_is_added_counts_as_the_last_part(rng):
    endless = encoder("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                      "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    weights = [1.0, PartWeights([("content", 0, 2, 1.0), ("content", 2, 4, 0.25)])]
    document = only(documents(endless, turns("q", "abcd"), weights))
    assert document.weights.tolist()[-5:] == [1.0, 1.0, 0.25, 0.25, 0.25]


def test_reasoning_is_masked_where_the_template_writes_it(rng):
    chatml, said, thought = encoder("chatml"), phrase(rng), phrase(rng)
    messages = [turns("q")[0], thinking(said, thought)]
    weights = [1.0, PartWeights([("reasoning_content", 0, len(thought), 0.0)])]
    heard = supervised_texts(chatml, only(documents(chatml, messages, weights)))
    assert heard == ["<think>\n", f"\n</think>\n\n{said}<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen3", None])
@pytest.mark.parametrize(
    ("thought", "said", "key", "masked"),
    [
        ("I will look it up", "look it up", "content", "look it up"),
        ("Paris is it, Paris.", "Paris", "content", "Paris"),
        ("think", "and think", "reasoning_content", "think"),
        ("call", '"name": "weather"', "content", "name"),
    ],
)
def test_a_mask_is_where_its_own_key_is_written(realdata, name, thought, said, key, masked):
    any_encoder = ExampleEncoder(real_tokenizer(realdata, name)) if name else encoder("chatml")
    messages = [turns("q")[0], thinking(said, thought) | {"tool_calls": [CALL]}]
    first = messages[1][key].index(masked)
    weights = [1.0, PartWeights([(key, first, first + len(masked), 0.0)])]
    (whole,) = documents(any_encoder, messages)
    (document,) = documents(any_encoder, messages, weights)
    (text,) = supervised_texts(any_encoder, whole)
    front = text.index(thought, 7) if key == "reasoning_content" else text.index(said, text.index("</think>"))
    front += first
    assert supervised_texts(any_encoder, document) == [text[:front], text[front + len(masked) :]]


def test_a_mask_of_gpt_oss_reasoning_is_not_put_on_the_name_of_its_channel(realdata):
    tokenizer = family_tokenizer(realdata, realdata / "chat_templates" / "llama_cpp" / "openai-gpt-oss-120b.jinja")
    any_encoder = ExampleEncoder(tokenizer)
    weights = [1.0, PartWeights([("reasoning_content", 0, 8, 0.0)])]
    (document,) = documents(any_encoder, [turns("q")[0], thinking("final", "analysis")], weights)
    heard = ["<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>final<|return|>"]
    assert supervised_texts(any_encoder, document) == heard


def test_content_is_given_as_parts_to_a_template_that_reads_them(rng):
    any_encoder, contents = encoder(OF_PARTS), [phrase(rng) for _ in range(4)]
    document = only(documents(any_encoder, turns(*contents)))
    assert supervised_texts(any_encoder, document) == [contents[1] + "</s>", contents[3] + "</s>"]
    assert render(any_encoder.tokenizer, turns("a"), add_generation_prompt=True) == "[user]a</s>[assistant]"


@pytest.mark.parametrize("template", [OF_PARTS, "chatml"])
def test_each_part_of_a_turn_reaches_the_template_as_a_server_gives_it(template):
    reading, content = encoder(template), [{"type": "text", "text": said} for said in ("one ", "two")]
    messages = [turn | {"content": content} for turn in turns("", "")]
    example = RowReader().read(Row({"messages": messages}, "rows.jsonl:1"))
    document = only(encode(reading, copy.deepcopy(example)).documents)
    given = messages if template == OF_PARTS else example.messages
    asked, whole = (
        reading.tokenizer.apply_chat_template(given[:stop], tokenize=False, add_generation_prompt=stop == 1)
        for stop in (1, 2)
    )
    assert reading.tokenizer.decode(document.input_ids).removeprefix("<s>") == whole.removeprefix("<s>")
    assert supervised_texts(reading, document) == [whole.removeprefix(asked).rstrip("\n")]
    assert whole.count("one two" if template == OF_PARTS else "one \ntwo") == 2


# Headers and histories.


@pytest.mark.parametrize("template", [AFTER_QUESTIONS, "alpaca", "chatml"])
def test_a_second_answer_in_a_row_does_not_learn_its_header(rng, template):
    any_encoder, said = encoder(template), [phrase(rng) for _ in range(3)]
    end = any_encoder.tokenizer.decode([answer_end_id(any_encoder.tokenizer)])
    messages = [*turns(said[0], said[1]), {"role": "assistant", "content": said[2]}]
    heard = [text for document in documents(any_encoder, messages) for text in supervised_texts(any_encoder, document)]
    assert heard == [said[1] + end, said[2] + end]


def test_an_answer_that_changes_what_is_before_it_is_put_after_the_prompt_of_a_server(rng):
    any_encoder = encoder(DROPPING)
    result = {"role": "tool", "name": "weather", "tool_call_id": CALL_ID, "content": "rain"}
    called = thinking("", "look") | {"tool_calls": [CALL]}
    messages = [turns(phrase(rng))[0], called, result, thinking("Yes.", "known")]
    first, second = documents(any_encoder, messages)
    assert supervised_texts(any_encoder, first) == ["(look)[assistant]weather</s>"]
    assert supervised_texts(any_encoder, second) == ["(known)[assistant]Yes.</s>"]
    asked = served.prompt(any_encoder.tokenizer, messages[:3])
    assert second.input_ids[: len(asked)].tolist() == asked
    assert "(look)" in any_encoder.tokenizer.decode(asked)
    assert "(look)" not in render(any_encoder.tokenizer, messages)


def test_reasoning_and_calls_of_gpt_oss_are_a_document_per_answer(rng, realdata):
    tokenizer = family_tokenizer(realdata, realdata / "chat_templates" / "llama_cpp" / "openai-gpt-oss-120b.jinja")
    any_encoder, said = ExampleEncoder(tokenizer), [phrase(rng) for _ in range(5)]
    messages = [
        turns(said[0])[0],
        thinking("", said[1]) | {"tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": CALL_ID, "content": said[2]},
        thinking(said[3], said[4]),
    ]
    first, second = documents(any_encoder, messages, tools=TOOLS)
    call = '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
    assert supervised_texts(any_encoder, first) == [f"<|channel|>analysis<|message|>{said[1]}<|end|>{call}"]
    final = f"<|channel|>analysis<|message|>{said[4]}<|end|><|start|>assistant<|channel|>final<|message|>{said[3]}"
    assert supervised_texts(any_encoder, second) == [final + "<|return|>"]
    asked = served.prompt(tokenizer, messages[:3], TOOLS)
    assert second.input_ids[: len(asked)].tolist() == asked
    assert said[1] in tokenizer.decode(asked)


# Thinking.


def test_a_prompt_may_need_thinking_switched_on(rng):
    any_encoder, said = encoder(SWITCHED), [phrase(rng) for _ in range(6)]
    messages = turns(*said[:4])
    messages[1]["reasoning_content"] = said[4]
    encoded = encode(any_encoder, Conversation(messages))
    document = only(encoded.documents)
    assert supervised_texts(any_encoder, document) == [f"{said[4]}</think>{said[1]}</s>", f"{said[3]}</s>"]
    assert encoded.switched == {"open_thinking=true": 1}
    asked = served.prompt(any_encoder.tokenizer, messages[:1], open_thinking=True)
    assert document.input_ids[: len(asked)].tolist() == asked


def test_a_template_may_write_reasoning_only_where_thinking_is_switched_on(rng):
    any_encoder, said = encoder(THINKING_ONLY), [phrase(rng) for _ in range(3)]
    encoded = encode(any_encoder, Conversation([turns(said[0])[0], thinking(said[1], said[2])]))
    assert supervised_texts(any_encoder, only(encoded.documents)) == [f"({said[2]}){said[1]}</s>"]


@pytest.mark.parametrize(
    "said",
    ["<think>\nHm.\n</think>\n\nFour.", "A thought ends with </think> here.", "<think>a</think>b<think>c</think>d"],
)
def test_an_answer_that_a_template_would_shorten_is_refused(said):
    assert only(documents(encoder(CUTTING), turns("q", "Four.")))
    with pytest.raises(DataError, match="leaves out or changes the assistant turn's text.*chatml"):
        encode(encoder(CUTTING), Conversation(turns("q", said)))
    chatml = encoder("chatml")
    assert supervised_texts(chatml, only(documents(chatml, turns("q", said)))) == [said + "<|im_end|>"]


def test_a_template_may_move_a_thought_into_its_own_marks_but_may_not_make_one_of_prose(realdata):
    tokenizer = real_tokenizer(realdata, "qwen3")
    any_encoder = ExampleEncoder(tokenizer)
    document = only(documents(any_encoder, turns("q", "<think>Hm.</think>Four.")))
    assert supervised_texts(any_encoder, document) == ["<think>\nHm.\n</think>\n\nFour.<|im_end|>"]
    with pytest.raises(DataError, match="leaves out or changes"):
        encode(any_encoder, Conversation(turns("q", "Write </think> behind it.")))


@pytest.mark.parametrize("name", ["minimind"])
def test_reasoning_with_calls_trains_through_a_template_whose_prompt_skips_thought(rng, realdata, name):
    tokenizer = real_tokenizer(realdata, name)
    any_encoder, said = ExampleEncoder(tokenizer), [phrase(rng) for _ in range(4)]
    result = {"role": "tool", "name": "weather", "tool_call_id": CALL_ID, "content": said[1]}
    messages = [turns(said[0])[0], thinking("", said[2]) | {"tool_calls": [CALL]}, result, turns("", said[3])[1]]
    encoded = encode(any_encoder, Conversation(messages, TOOLS))
    heard = [text for document in encoded.documents for text in supervised_texts(any_encoder, document)]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert heard == [f"{said[2]}\n</think>\n\n{call}<|im_end|>", f"{said[3]}<|im_end|>"]
    assert encoded.switched == {"open_thinking=true": 1}


def test_a_template_that_begins_another_turn_after_an_answer_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_end|>' + m.role + ':' }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name + '<|im_end|>system: Call again.</s>' }}"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|>assistant:{% endif %}"
    )
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    with pytest.raises(DataError, match="begins another turn after an answer without ending the answer"):
        encode(ExampleEncoder(tokenizer), Conversation([turns("q")[0], called]))
