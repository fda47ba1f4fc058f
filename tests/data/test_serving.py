"""Templates and tokenizers that drop text, or make a server feed other ids, are refused or reported."""

import random

import pytest
from tokenizers import normalizers, processors
from transformers import AutoTokenizer

from qlora.data.encode import ExampleEncoder
from qlora.data.examples import Conversation
from qlora.data.serving import TemplateFacts, tokenizer_notes
from qlora.data.template import apply_template
from qlora.errors import ConfigError, DataError
from tests.data.chats import CALL, CALL_ID, TOOLS, TURN, encode, phrase, turns
from tests.tiny import make_tokenizer

PLAIN = TURN + "{{ eos_token }}{% endfor %}"
WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}" + PLAIN.removeprefix("{% for m in messages %}")
WITHOUT_RESULTS = "{% for m in messages if m.role != 'tool' %}" + PLAIN.removeprefix("{% for m in messages %}")
OF_PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{{ eos_token }}{% endfor %}"
REFUSING = "{% if messages[0].role == 'system' or tools %}{{ raise_exception('no such thing') }}{% endif %}" + PLAIN

QUESTION, ANSWER = turns("Rain?", "No.")
SYSTEM = {"role": "system", "content": "Be kind."}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": CALL_ID, "content": "none"}
THINKING = ANSWER | {"reasoning_content": "Hm."}


def facts(template, add_bos=True):
    tokenizer = make_tokenizer(add_bos)
    if template in ("alpaca", "chatml"):
        apply_template(tokenizer, template)
    else:
        tokenizer.chat_template = template
    return TemplateFacts(tokenizer)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "lost"),
    [
        (PLAIN, [QUESTION, ANSWER], TOOLS, "tools"),
        (PLAIN, [QUESTION, CALLING], None, "tool calls"),
        (PLAIN, [QUESTION, THINKING], None, "reasoning"),
        (PLAIN, [QUESTION, CALLING, RESULT, THINKING], TOOLS, "tools and tool calls and reasoning"),
        (WITHOUT_SYSTEM, [SYSTEM, QUESTION, ANSWER], None, "system turn"),
        (WITHOUT_RESULTS, [QUESTION, RESULT, ANSWER], None, "tool results"),
        ("alpaca", [QUESTION, ANSWER], TOOLS, "tools"),
        ("alpaca", [QUESTION, THINKING], None, "reasoning"),
    ],
)
def test_what_the_template_leaves_out_is_refused_and_named(template, messages, tools, lost):
    with pytest.raises(DataError, match=f"leaves out this conversation's {lost}; set data.chat_template"):
        facts(template).check(messages, tools)


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.image }}{% endfor %}", "{{ bos_token }}"])
def test_a_template_that_writes_no_plain_text_is_refused(template):
    with pytest.raises(DataError, match="doesn't write plain text.*set data.chat_template to chatml"):
        facts(template).check([QUESTION, ANSWER], None)


def test_a_template_that_reads_content_as_parts_gets_it_so():
    assert facts(OF_PARTS).check([SYSTEM, QUESTION, ANSWER], None) is None


def test_the_built_in_chatml_writes_all_that_a_conversation_may_have(seed):
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    apply_template(tokenizer, "chatml")
    said = [phrase(rng) for _ in range(5)]
    messages = [
        {"role": "system", "content": said[0]},
        {"role": "user", "content": said[1]},
        CALLING | {"reasoning_content": said[2]},
        RESULT | {"content": said[3]},
        {"role": "assistant", "content": said[4]},
    ]
    (document,) = encode(ExampleEncoder(tokenizer), Conversation(messages, TOOLS)).documents
    text = tokenizer.decode(document.input_ids)
    assert [part for part in (*said, "weather", "Tells it.", "Oslo") if part not in text] == []


@pytest.mark.parametrize(("messages", "tools"), [([SYSTEM, QUESTION, ANSWER], None), ([QUESTION, ANSWER], TOOLS)])
def test_a_template_that_refuses_gives_its_own_reason(messages, tools):
    tokenizer = make_tokenizer(chat_template=REFUSING)
    with pytest.raises(DataError, match="refuses this conversation: no such thing"):
        encode(ExampleEncoder(tokenizer), Conversation(messages, tools))


@pytest.mark.parametrize("template", [PLAIN, WITHOUT_SYSTEM, WITHOUT_RESULTS, "alpaca", "chatml", REFUSING])
def test_a_plain_conversation_passes_any_template_of_text(template):
    assert facts(template).check([QUESTION, ANSWER], None) is None


@pytest.mark.parametrize("content", ["4", "<think>4</think>4", "4 <b>"])
def test_reasoning_may_be_the_same_as_the_answer(content):
    messages = [QUESTION, {"role": "assistant", "content": content, "reasoning_content": content[:1]}]
    tokenizer = make_tokenizer()
    apply_template(tokenizer, "chatml")
    (document,) = encode(ExampleEncoder(tokenizer), Conversation(messages)).documents
    assert f"<think>\n{content[:1]}\n</think>\n\n{content}" in tokenizer.decode(document.input_ids)


@pytest.mark.parametrize("text", ["<think></think><think>4</think>4", "<think>4</think>"])
def test_a_thought_after_one_that_was_closed_and_an_answer_that_is_lost_are_still_missed(text):
    with pytest.raises(DataError, match="the assistant turn's text, '4'"):
        facts("chatml").check_written([ANSWER | {"content": "4", "reasoning_content": "4"}], text)


def plain_if(condition):
    """The plain template, which writes only some turns."""
    turn = PLAIN.removeprefix("{% for m in messages %}").removesuffix("{% endfor %}")
    return f"{{% for m in messages %}}{{% if loop.first or {condition} %}}{turn}{{% endif %}}{{% endfor %}}"


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        (["yes", "Sure?", "yes", "Good."], "yes"),
        (["Is it Paris? Or Rome?", "Hm.", "Paris?", "Yes."], "Paris?"),
        (["Or Rome?", "Hm.", "Paris?", "Yes."], None),
    ],
)
def test_a_turn_that_another_contains_is_missed_if_the_template_drops_it(said, lost):
    tokenizer = make_tokenizer(chat_template=plain_if("m.content not in messages[0].content"))
    (result,) = ExampleEncoder(tokenizer).encode([Conversation(turns(*said))])
    assert isinstance(result, DataError) == (lost is not None)
    if lost:
        assert f"leaves out or changes the user turn's text, {lost!r}; set data.chat_template" in str(result)


def test_a_second_system_turn_of_the_same_words_is_missed():
    tokenizer = make_tokenizer(chat_template=plain_if("m.role != 'system'"))
    (result,) = ExampleEncoder(tokenizer).encode([Conversation([SYSTEM, QUESTION, SYSTEM, ANSWER])])
    assert "the system turn's text, 'Be kind.'" in str(result)


def test_turns_that_repeat_or_contain_each_other_pass_where_they_are_written(seed):
    said = [random.Random(seed).choice(["a", "aa", "a a", "aaa", " a"]) for _ in range(8)]
    assert facts(PLAIN).check_written(turns(*said), "|".join(said)) is None


def test_bos_twice_is_refused():
    tokenizer = make_tokenizer(chat_template="{{ bos_token }}{{ bos_token }}" + PLAIN)
    with pytest.raises(ConfigError, match="data.chat_template: .*BOS twice"):
        ExampleEncoder(tokenizer).encode([Conversation([QUESTION, ANSWER])])


@pytest.mark.parametrize(
    ("template", "add_bos", "noted"),
    [
        (PLAIN, True, True),
        ("{{ bos_token }}" + PLAIN, True, False),
        (PLAIN, False, False),
        ("alpaca", True, False),
        ("chatml", True, False),
        ("{{ raise_exception('never') }}", True, False),
    ],
    ids=["none", "written", "not-the-tokenizers-way", "alpaca", "chatml", "refuses-all"],
)
def test_a_template_without_the_bos_that_texts_get_is_reported(template, add_bos, noted):
    notes = facts(template, add_bos).notes()
    assert [note for note in notes if "writes no BOS" in note] == notes[:1] * noted


def test_a_tokenizer_that_transformers_reads_as_its_file_says_has_no_note(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_notes(AutoTokenizer.from_pretrained(tmp_path)) == []
    assert tokenizer_notes(make_tokenizer()) == []  # of no file


def test_a_tokenizer_that_transformers_reads_differently_from_its_file_is_reported(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.backend_tokenizer.normalizer = normalizers.Strip()
    (note,) = tokenizer_notes(loaded)
    assert "don't begin completions or answers with a space" in note
    assert "' Hello'" in note


def test_marks_that_a_tokenizer_puts_around_texts_are_no_difference(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 257)]
    )
    assert tokenizer_notes(loaded) == []
