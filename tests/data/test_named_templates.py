"""Chat templates by name, against the official ones of their families."""

import copy
import random

import pytest
from transformers import AutoTokenizer

from qlora.data.encode import ExampleEncoder, answer_end_id
from qlora.data.formats import Conversation
from qlora.data.named_templates import read_named, template_names
from qlora.data.new_tokens import add_new_tokens, set_special_tokens
from qlora.data.serving import TemplateFacts
from qlora.data.template import apply_template, render, template_name
from qlora.errors import DataError
from tests.data.chats import (
    CALL,
    CALL_ID,
    TOOLS,
    encode,
    family_tokenizer,
    phrase,
    real_tokenizer,
    supervised_texts,
    tokenizer_for,
)
from tests.reference import families
from tests.tiny import make_tokenizer, only

LLAMA_CPP, TRL = "llama_cpp", "trl"
# The official template of each family, in realdata/chat_templates.
OFFICIAL = {
    "command-r": (TRL, "cohere"),
    "gemma": (TRL, "gemma"),
    "gemma3": (TRL, "gemma3"),
    "lfm2": (TRL, "lfm2"),
    "llama3": (TRL, "llama3"),
    "llama3.1": (LLAMA_CPP, "meta-llama-Llama-3.1-8B-Instruct"),
    "llama3.2": (LLAMA_CPP, "meta-llama-Llama-3.2-3B-Instruct"),
    "llama3.3": (LLAMA_CPP, "meta-llama-Llama-3.3-70B-Instruct"),
    "mistral-nemo": (LLAMA_CPP, "mistralai-Mistral-Nemo-Instruct-2407"),
    "phi3": (TRL, "phi3"),
    "phi3.5": (LLAMA_CPP, "microsoft-Phi-3.5-mini-instruct"),
    "qwen2.5": (LLAMA_CPP, "Qwen-Qwen2.5-7B-Instruct"),
    "qwen3": (LLAMA_CPP, "Qwen-Qwen3-0.6B"),
    "qwen3-instruct": (TRL, "qwen3_instruct_2507"),
}
# Families without a template there, by the description of their format.
DESCRIBED = {"chatml": families.chatml, "llama2": families.llama2, "mistral": families.mistral, "phi4": families.phi4}
# The real tokenizers of families; the others' control tokens are added to another real one.
TOKENIZERS = {
    "chatml": "qwen3",
    "llama2": "tinyllama_chat_hf",
    "mistral": "mistral7b_v01_hf",
    "qwen2.5": "qwen3",
    "qwen3": "qwen3",
    "qwen3-instruct": "qwen3",
}
WITHOUT_SYSTEM = ("gemma",)
WITH_TOOLS = ("llama3.1", "llama3.2", "llama3.3", "mistral", "mistral-nemo", "qwen2.5", "qwen3", "qwen3-instruct")
NUM_CONVERSATIONS = 25


def said(rng):
    """Something to say: plain, blank, with blanks around it, in other scripts, or long."""
    return rng.choice(
        [
            phrase(rng),
            "",
            " \n",
            f"  {phrase(rng)}\n\n",
            f"{phrase(rng)}\n\n{phrase(rng)}",
            "漢字かな\u200b é́ 🙂🏽 \u202e",
            '{"a": ["<b>", "c&d"]}',
            " ".join(phrase(rng) for _ in range(200)),
        ]
    )


def calling(rng):
    """Turns that call a tool, get its result and go on."""
    result = {"role": "tool", "name": "weather", "tool_call_id": CALL_ID, "content": phrase(rng)}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    return [{"role": "user", "content": said(rng)}, called, result, {"role": "assistant", "content": said(rng)}]


def conversation(rng, name, number, is_prompt):
    """Messages and tools; as a prompt they end with a question."""
    has_system = number % 2 and name not in WITHOUT_SYSTEM
    has_tools = name in (*WITH_TOOLS, "lfm2") and number % 3 == 0
    messages = [{"role": "system", "content": said(rng)}] if has_system else []
    for _ in range(rng.randrange(1, 5)):
        messages += [{"role": "user", "content": said(rng)}, {"role": "assistant", "content": said(rng)}]
    if has_tools and name != "lfm2":  # which writes tools and results, but no calls
        messages += calling(rng)
    if name.startswith("qwen3") and "instruct" not in name and number % 5 == 0:
        messages[-1] |= {"reasoning_content": phrase(rng)}
    question = [{"role": "user", "content": said(rng)}] if is_prompt else []
    return [*messages, *question], TOOLS if has_tools else None


def official_path(realdata, name):
    folder, file = OFFICIAL[name]
    return realdata / "chat_templates" / folder / f"{file}.jinja"


def tokenizer_of(realdata, name):
    """A family's tokenizer, with the official template where there is one."""
    if name in TOKENIZERS:
        tokenizer = real_tokenizer(realdata, TOKENIZERS[name])
        if name in OFFICIAL:
            tokenizer.chat_template = official_path(realdata, name).read_text(encoding="utf-8")
        return tokenizer
    if name in OFFICIAL:
        return family_tokenizer(realdata, official_path(realdata, name))
    return tokenizer_for(realdata, read_named(name).text)


def ids_of(tokenizer, messages, tools, is_prompt):
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=is_prompt, tokenize=True, return_dict=False
    )


@pytest.mark.parametrize("is_prompt", [True, False])
@pytest.mark.parametrize("name", OFFICIAL)
def test_ids_are_those_of_the_official_template(realdata, name, is_prompt, seed):
    rng, tokenizer = random.Random(seed), tokenizer_of(realdata, name)
    chats = [conversation(rng, name, number, is_prompt) for number in range(NUM_CONVERSATIONS)]
    if name == "mistral-nemo" and not is_prompt:  # the official one writes no system message without a last question
        chats = [(messages[messages[0]["role"] == "system" :], tools) for messages, tools in chats]
    wanted = [ids_of(tokenizer, *chat, is_prompt) for chat in chats]
    apply_template(tokenizer, name)
    assert [ids_of(tokenizer, *chat, is_prompt) for chat in chats] == wanted


@pytest.mark.parametrize("name", DESCRIBED)
def test_ids_are_those_of_the_described_format(realdata, name, seed):
    rng, tokenizer = random.Random(seed), tokenizer_of(realdata, name)
    apply_template(tokenizer, name)
    for number in range(NUM_CONVERSATIONS):
        is_prompt = bool(number % 2)
        messages, tools = conversation(rng, name, number // 2, is_prompt)
        text = DESCRIBED[name](messages, tools, is_prompt)
        wanted = tokenizer(text, add_special_tokens=False).input_ids
        assert ids_of(tokenizer, messages, tools, is_prompt) == wanted


def test_every_name_is_compared():
    assert {*OFFICIAL, *DESCRIBED, "alpaca"} == {*template_names()}


@pytest.mark.parametrize("name", [name for name in template_names() if name not in ("chatml", *WITH_TOOLS)])
def test_tools_are_refused_by_a_template_that_writes_none(name):
    tokenizer = make_tokenizer()
    apply_template(tokenizer, name)
    messages = calling(random.Random(0))
    with pytest.raises(DataError, match="leaves out this conversation's .*tool|refuses this conversation"):
        encode(ExampleEncoder(tokenizer), Conversation(messages, TOOLS))


@pytest.mark.parametrize("name", [*OFFICIAL, *DESCRIBED])
def test_an_answer_ends_with_the_end_of_its_turn(realdata, name):
    tokenizer = tokenizer_of(realdata, name)
    apply_template(tokenizer, name)
    encoder = ExampleEncoder(tokenizer)
    found = encode(
        encoder, Conversation([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
    )
    (text,) = supervised_texts(encoder, only(found.documents))
    ends = {token for token in read_named(name).control_tokens if "end" in token.lower() or token == "<|eot_id|>"}
    end = tokenizer.convert_ids_to_tokens(answer_end_id(tokenizer))
    assert end in (ends or {tokenizer.eos_token})
    assert text.endswith(f"So.{end}") or text.endswith(f"So. {end}")
    assert not found.eos_added


QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize("name", ["gemma", "gemma3", "llama2", "mistral", "mistral-nemo", "command-r"])
def test_turns_that_do_not_alternate_are_refused_as_by_the_official_template(name):
    tokenizer = make_tokenizer()
    apply_template(tokenizer, name)
    for messages in ([QUESTION, QUESTION, ANSWER], [ANSWER, QUESTION]):
        with pytest.raises(DataError, match="turns of user and assistant in alternation"):
            render(tokenizer, messages)


@pytest.mark.parametrize("name", ["mistral", "mistral-nemo"])
def test_a_system_message_is_in_the_last_question_before_each_answer(name):
    tokenizer = make_tokenizer()
    apply_template(tokenizer, name)
    system = {"role": "system", "content": "Be short."}
    found = encode(ExampleEncoder(tokenizer), Conversation([system, QUESTION, ANSWER, QUESTION, ANSWER]))
    gap = " " if name == "mistral" else ""
    first, second = (tokenizer.decode(document.input_ids) for document in found.documents)
    assert first == f"<s>[INST]{gap}Be short.\n\nWhy?[/INST]{gap}So.</s>"
    assert second == f"<s>[INST]{gap}Why?[/INST]{gap}So.</s>[INST]{gap}Be short.\n\nWhy?[/INST]{gap}So.</s>"


def test_gemma_refuses_a_system_message():
    tokenizer = make_tokenizer()
    apply_template(tokenizer, "gemma")
    with pytest.raises(DataError, match="none of 'system'"):
        render(tokenizer, [{"role": "system", "content": "Be short."}, QUESTION])


@pytest.mark.parametrize("name", template_names())
def test_a_saved_template_needs_no_other_file(name):
    text = read_named(name).text
    assert [mark for mark in ("include", "{#", "#}") if mark in text] == []


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("qwen_25", "qwen2.5"),
        ("phi_35", "phi3.5"),
        ("Llama-3", "llama3"),
        ("ChatML", "chatml"),
        ("llama3.4", "llama3.1"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_closest_and_all_names(name, near):
    with pytest.raises(DataError) as caught:
        apply_template(make_tokenizer(), name)
    message = str(caught.value)
    hint = message[message.index("did you mean") : message.index("Names:")]
    assert near in hint
    assert f"data.chat_template: {name!r}" in message
    assert message.endswith(f"Names: {', '.join(['auto', *template_names()])}.")


def test_a_file_never_stands_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama3.1").write_text("mine", encoding="utf-8")
    tokenizer = make_tokenizer()
    assert apply_template(tokenizer, "llama3.1") == "llama3.1 (by name)"
    assert tokenizer.chat_template != "mine"
    assert apply_template(tokenizer, str(tmp_path / "llama3.1")) == str(tmp_path / "llama3.1")


@pytest.mark.parametrize("name", [name for name in template_names() if name != "llama3.3"])
def test_a_template_is_known_by_its_text(name):
    tokenizer = make_tokenizer()
    apply_template(tokenizer, name)
    assert template_name(tokenizer) == name


def test_another_template_has_no_name():
    assert template_name(make_tokenizer(chat_template="mine")) is None


CHATML = ["<|im_start|>", "<|im_end|>"]


def bare_tokenizer(realdata):
    """A Llama tokenizer without ChatML's tokens."""
    return copy.deepcopy(real_tokenizer(realdata, "tinyllama_chat_hf"))


def test_missing_control_tokens_are_reported_with_the_remedy(realdata):
    tokenizer = bare_tokenizer(realdata)
    apply_template(tokenizer, "chatml")
    (note,) = TemplateFacts(tokenizer).notes()
    assert note == (
        "the tokenizer has no <|im_start|>, <|im_end|>: the chat template chatml writes them as ordinary text, and "
        'answers end with the text <|im_end|> and EOS; to train them as tokens, set data.new_tokens: ["<|im_start|>", '
        '"<|im_end|>"]'
    )
    encoder = ExampleEncoder(tokenizer)
    found = encode(encoder, Conversation([QUESTION, ANSWER]))
    assert supervised_texts(encoder, only(found.documents)) == ["So.<|im_end|></s>"]


def test_missing_control_tokens_that_are_added_end_answers(realdata, tmp_path):
    tokenizer = bare_tokenizer(realdata)
    new = add_new_tokens(tokenizer, CHATML)
    apply_template(tokenizer, "chatml")
    assert TemplateFacts(tokenizer).notes() == []
    encoder = ExampleEncoder(tokenizer)
    found = encode(encoder, Conversation([QUESTION, ANSWER, QUESTION, ANSWER]))
    document = only(found.documents)
    assert supervised_texts(encoder, document) == ["So.<|im_end|>"] * 2
    assert not found.eos_added
    assert {*document.input_ids.tolist()} >= {*new}
    assert answer_end_id(tokenizer) == new[1]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert answer_end_id(loaded) == new[1]
    assert loaded.decode([*document.input_ids], skip_special_tokens=True).count("<|im") == 0


def test_special_tokens_are_set_and_saved(realdata, tmp_path):
    tokenizer = bare_tokenizer(realdata)
    ids = add_new_tokens(tokenizer, ["<|im_end|>", "<pad>"])
    set_special_tokens(tokenizer, {"eos_token": "<|im_end|>", "pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [(each.eos_token_id, each.pad_token_id) for each in (tokenizer, loaded)] == [tuple(ids)] * 2
    assert loaded.decode([*ids], skip_special_tokens=True) == ""


def test_a_special_token_that_is_not_there_is_an_error_with_the_remedy():
    tokenizer = make_tokenizer()
    message = "eos_token is '<end>', which the tokenizer does not have; .* data.new_tokens: \\[\"<end>\"\\]"
    with pytest.raises(DataError, match=message):
        set_special_tokens(tokenizer, {"pad_token": "<s>", "eos_token": "<end>"})
    assert (tokenizer.pad_token, tokenizer.eos_token) == (None, "</s>")
