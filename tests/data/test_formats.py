"""Formats: how columns are read, and how unknown ones are reported."""

import json
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data import formats
from qlora.data.examples import Completion, Conversation, Labelled, Preference, Rated, Tokens
from qlora.data.formats import FORMATS, RowReader, detect_format
from qlora.data.rows import Row, read_rows
from qlora.data.sources import Source
from qlora.data.tables import HeaderRule
from qlora.data.turns import CONTENT_KEYS, MEDIA_KEYS, REASONING_KEYS, ROLE_KEYS, ROLE_OF, WEIGHT_KEYS
from qlora.errors import ConfigError, DataError

HALF = "a\ud83d"


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


HI, HO, HM = user("Hi"), assistant("Ho"), assistant("Hm")
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
TOOL = {"name": "add", "parameters": {}}
WRAPPED = {"type": "function", "function": TOOL}


def read(format="auto", columns={}, roles={}, **values):  # noqa: B006 (never changed)
    return RowReader(format, columns, roles).read(Row(values, "rows.jsonl:7"))


def refusal(format="auto", **values):
    with pytest.raises(DataError) as caught:
        read(format, **values)
    message = str(caught.value)
    assert message.startswith("rows.jsonl:7: ")
    message.encode()  # it can be printed
    return message


def detected(values):
    return detect_format(values, "rows.jsonl:7")


# Telling formats apart.


@pytest.mark.parametrize(
    ("values", "format"),
    [
        ({"instruction": "x", "output": "x"}, "alpaca"),
        ({"instruction": "x", "input": "x", "output": "x", "text": "x"}, "alpaca"),
        ({"instruction": "x", "response": "x", "context": "x"}, "alpaca"),
        ({"instruction": "x", "output": "x", "label": "x"}, "alpaca"),
        ({"conversations": SHAREGPT}, "sharegpt"),
        ({"conversation": SHAREGPT, "id": "x"}, "sharegpt"),
        ({"messages": SHAREGPT}, "sharegpt"),
        ({"messages": [HI, HO]}, "messages"),
        ({"messages": [HI, HO], "text": "x", "instruction": "x", "output": "x", "prompt": "x"}, "messages"),
        ({"conversations": [HI, HO]}, "messages"),
        ({"messages": "[]"}, "messages"),
        ({"messages": None, "instruction": "x", "output": "x"}, "alpaca"),
        ({"prompt": "x", "completion": "x"}, "completion"),
        ({"prompt": [HI], "completion": [HO]}, "completion"),
        ({"prompt": "x", "text": "x"}, "text"),
        ({"text": "x", "meta": "x"}, "text"),
        ({"input_ids": [1], "labels": [1], "text": "x"}, "tokenized"),
        ({"chosen": "x", "rejected": "x"}, "preference"),
        ({"chosen": [HO], "rejected": [HM], "messages": [HI]}, "preference"),
        ({"chosen_messages": [HI, HO], "rejected_messages": [HI, HM]}, "preference"),
        ({"messages": [HI, HO], "label": True}, "kto"),
        ({"prompt": "x", "completion": "x", "label": 0}, "kto"),
        ({"prompt": "x", "completion": "x", "label": "False"}, "kto"),
        ({"instruction": "x", "output": "x", "label": 1}, "kto"),
        ({"messages": [HI, HO], "label": 3}, "messages"),
        ({"text": "x", "label": 1}, "classification"),
        ({"text": "x", "label": "joy"}, "classification"),
        ({"message_tree_id": "x", "prompt": {}}, "oasst"),
        ({"message_id": "x", "replies": [], "text": "x", "role": "prompter"}, "oasst"),
    ],
    ids=str,
)
def test_the_format_is_detected_from_the_columns(values, format):
    assert detected(values) == format


@pytest.mark.parametrize(
    "columns", [{"instruction"}, {"prompt"}, {"completion"}, {"question", "answer"}, {"label"}, {"chosen"}, set()]
)
def test_unknown_columns_are_reported_with_the_formats(columns):
    with pytest.raises(DataError) as caught:
        detected(dict.fromkeys(columns, "x"))
    message = str(caught.value)
    assert message.startswith(f"rows.jsonl:7: no format has the columns {sorted(columns)}")
    assert "data.columns" in message
    assert [form for form in FORMATS.values() if form not in message] == []


def test_the_first_row_decides_the_format():
    reader = RowReader()
    assert reader.read(Row({"text": "x"}, "a:1")) == Completion("", "x")
    assert reader.format == "text"
    with pytest.raises(DataError, match=r"^a:2: column 'text' should be text, not None"):
        reader.read(Row({"instruction": "x", "output": "x"}, "a:2"))


def test_a_first_row_of_no_format_leaves_the_choice_to_the_next():
    reader = RowReader()
    with pytest.raises(DataError, match="no format has the columns"):
        reader.read(Row({"words": "x"}, "a:1"))
    assert reader.read(Row({"text": "x"}, "a:2")) == Completion("", "x")


# Questions and answers.


@pytest.mark.parametrize("answer", ["output", "response"])
def test_alpaca_is_a_question_and_an_answer(answer):
    assert read(instruction="Add 2 and 3.", **{answer: "5"}) == Conversation([user("Add 2 and 3."), assistant("5")])


@pytest.mark.parametrize("nothing", ["", None])
def test_an_empty_alpaca_input_or_system_adds_nothing(nothing):
    extra = dict.fromkeys(["input", "system", "history", "tools"], nothing)
    assert read(instruction="A", output="B", **extra) == read(instruction="A", output="B")


@pytest.mark.parametrize("form", [list, json.dumps], ids=["list", "json"])
def test_alpaca_puts_system_and_history_first_and_input_after_the_instruction(form):
    history = form([["Hi", "Ho"], ["How?", "So."]])
    example = read(instruction="Add.", input="2 3", output="5", system="Be short.", history=history, tools=[TOOL])
    turns = [system("Be short."), HI, HO, user("How?"), assistant("So."), user("Add.\n\n2 3"), assistant("5")]
    assert example == Conversation(turns, [WRAPPED])


@pytest.mark.parametrize("history", [3, {"a": 1}, "3", ["Hi"], [["Hi"]], [["Hi", 3]], [["Hi", "Ho", "Hm"]]], ids=str)
def test_a_history_that_is_no_pairs_is_refused(history):
    assert "'history' should have pairs" in refusal(instruction="A", output="B", history=history)


# Turns.


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("turns", [SHAREGPT, [HI, HO], json.dumps(SHAREGPT)], ids=["sharegpt", "messages", "json"])
def test_turns_are_read_from_every_column_and_dialect(column, turns):
    example = read(**{column: turns}, system="Be short.", tools=json.dumps([TOOL]))
    assert example == Conversation([system("Be short."), HI, HO], [WRAPPED])


def test_sharegpt_turns_may_call_and_observe():
    turns = [
        SHAREGPT[0],
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "5"},
        SHAREGPT[1],
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    called = {**assistant(""), "tool_calls": [call]}
    assert read(conversations=turns).messages == [HI, called, {"role": "tool", "content": "5"}, HO]


def test_weights_belong_to_their_turns():
    turns = [HI, {**HO, "weight": 0}, HI, {**HM, "weight": 2}]
    assert read(messages=turns) == Conversation([HI, HO, HI, HM], weights=[1.0, 0.0, 1.0, 2.0])
    assert read(messages=turns, system="S").weights == [1.0, 1.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("turns", [[], 3, {"a": 1}, "[3]", None], ids=str)
@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_turns_that_are_none_are_refused(format, turns):
    assert "turn" in refusal(format, messages=turns)


# Texts and tokens.


def test_prompt_and_completion_are_raw_text():
    assert read(prompt="One, ", completion="two") == Completion("One, ", "two")


def test_prompt_and_completion_of_turns_are_a_conversation():
    assert read(prompt=[HI], completion=[HO], tools=[TOOL]) == Conversation([HI, HO], [WRAPPED])
    assert read(prompt=[HI], completion=[{**HO, "weight": 0.5}]).weights == [1.0, 0.5]


@pytest.mark.parametrize(
    ("prompt", "completion", "problem"),
    [
        ([HI], None, "'completion' should be turns, as 'prompt' is, not None"),
        ([HI], 3, "'completion' should be turns, as 'prompt' is, not 3"),
        ("Hi", [HO], f"column 'completion' should be text, not {[HO]}"),
        ([3], [HO], "a turn should have 'role' and 'content', not 3"),
        ([], [], "'prompt' should be a list of turns, not []"),
    ],
    ids=str,
)
@pytest.mark.parametrize("label", [{}, {"label": True}], ids=["completion", "kto"])
def test_a_prompt_and_a_completion_of_two_kinds_are_refused(prompt, completion, problem, label):
    assert problem in refusal(prompt=prompt, completion=completion, **label)


def test_a_prompt_of_turns_needs_a_completion_of_turns():
    assert "'completion' should be turns, as 'prompt' is, not 'Ho'" in refusal(prompt=[HI], completion="Ho")


def test_text_is_a_completion_of_nothing():
    assert read(text="Some words.") == Completion("", "Some words.")


@pytest.mark.parametrize(
    ("columns", "weights"),
    [
        ({}, [1.0, 1.0, 1.0]),
        ({"labels": [-100, 6, 7]}, [0.0, 1.0, 1.0]),
        ({"loss_mask": [0, 1, 0.5]}, [0, 1, 0.5]),
        ({"loss_mask": [False, True, True], "labels": [-100, -100, -100]}, [0, 1, 1]),
        ({"labels": None, "loss_mask": None, "attention_mask": None}, [1.0, 1.0, 1.0]),
    ],
)
def test_tokens_are_taken_with_their_weights(columns, weights):
    assert read(input_ids=[5, 6, 7], **columns) == Tokens([5, 6, 7], weights)


def test_padding_is_left_out():
    example = read(input_ids=[0, 5, 6, 0], attention_mask=[0, 1, 1, 0], labels=[-100, -100, 6, -100])
    assert example == Tokens([5, 6], [0.0, 1.0])


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"input_ids": []}, "'input_ids' is empty"),
        ({"input_ids": "5 6"}, "'input_ids' should be a list of numbers, not '5 6'"),
        ({"input_ids": [5, "6"]}, "'input_ids' should be a list of numbers"),
        ({"labels": [6, 7, -100]}, "label 0 is 6, neither input id 5 nor -100; labels should be the ids themselves"),
        ({"labels": [5]}, "'labels' has 1 entries, but there are 3 input_ids"),
        ({"labels": [[5, 6, 7]]}, "'labels' should be a list of numbers"),
        ({"loss_mask": [1, 1]}, "'loss_mask' has 2 entries"),
        ({"loss_mask": [1, -1, 1]}, "a weight should be 0, or a number from 0.001 to 1000, not -1"),
        ({"loss_mask": [1, float("nan"), 1]}, "a weight should be 0, or a number from 0.001 to 1000, not nan"),
        ({"attention_mask": [1, 1, 1, 1]}, "'attention_mask' has 4 entries"),
    ],
    ids=str,
)
def test_tokens_that_do_not_fit_are_refused(columns, problem):
    assert problem in refusal(**{"input_ids": [5, 6, 7], **columns})


# Preferences.

TEXTS = {"chosen": "Ho", "rejected": "Hm"}
TURNS = {"chosen": [HO], "rejected": [HM]}
WHOLE = {"chosen": [HI, HO], "rejected": [HI, HM]}
PAIR = Preference(Conversation([HI, HO]), Conversation([HI, HM]))


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Hi", **TEXTS},
        {"prompt": [HI], **TEXTS},
        {"instruction": "Hi", "input": "", "output": "Ho", **TEXTS},
        {"conversations": SHAREGPT[:1], **TEXTS},
        {"prompt": "Hi", **TURNS},
        {"prompt": [HI], **TURNS},
        {"instruction": "Hi", **TURNS},
        {"messages": [HI], **TURNS},
        {"messages": json.dumps([HI]), **TURNS},
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "Hm"}},
        WHOLE,
        {"chosen_messages": WHOLE["chosen"], "rejected_messages": WHOLE["rejected"]},
        {"prompt": "Hi", **WHOLE},
        {"prompt": "Hi", "messages": [HI, HO], **WHOLE},
    ],
    ids=str,
)
def test_a_preference_is_a_prompt_and_two_answers(values):
    assert read(**values) == PAIR


@pytest.mark.parametrize("values", [{"prompt": "Hi", **TEXTS}, {"prompt": [HI], **TURNS}, WHOLE], ids=str)
def test_a_preference_may_have_a_system_prompt_and_tools(values):
    example = read(**values, system="S", tools=[TOOL])
    assert example.chosen == Conversation([system("S"), HI, HO], [WRAPPED])
    assert example.rejected == Conversation([system("S"), HI, HM], [WRAPPED])


def test_a_whole_conversation_keeps_its_own_system_prompt():
    turns = {"chosen": [system("mine"), HI, HO], "rejected": [system("mine"), HI, HM]}
    assert read(system="S", **turns).chosen.messages == turns["chosen"]


def test_a_preference_goes_on_from_a_history():
    example = read(instruction="Hi", history=[["A", "B"]], **TEXTS)
    assert example.rejected.messages == [user("A"), assistant("B"), HI, HM]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (TEXTS, "there is nothing before the answer; put its prompt into one of prompt, instruction, messages"),
        (TURNS, "there is nothing before the answer"),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": None}, "'rejected' should be a list of turns, not None"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "Hm"}, "'chosen' should be a list of turns, not 3"),
        ({"prompt": 3, **TEXTS}, "column 'prompt' should be text, not 3"),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": HALF}, "half a surrogate pair"),
    ],
)
def test_a_preference_that_lacks_a_side_is_refused(values, problem):
    assert problem in refusal(**values)


# Verdicts.


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [HI, HO]},
        {"conversations": SHAREGPT},
        {"prompt": "Hi", "completion": "Ho"},
        {"prompt": [HI], "completion": "Ho"},
        {"prompt": [HI], "completion": [HO]},
        {"instruction": "Hi", "output": "Ho"},
        {"instruction": "Hi", "response": "Ho"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("label", "is_good"), [(True, True), (0, False), ("true", True), ("False", False)])
def test_a_verdict_may_be_on_any_conversation(values, label, is_good):
    if values.get("prompt") == [HI] and values["completion"] == "Ho":
        values = {**values, "tools": [TOOL]}
    tools = [WRAPPED] if "tools" in values else None
    assert read(**values, label=label) == Rated(Conversation([HI, HO], tools), is_good)


@pytest.mark.parametrize("label", [None, 2, "good", "1", [], 1.0], ids=repr)
def test_a_label_that_is_no_verdict_is_refused(label):
    message = refusal("kto", messages=[HI, HO], label=label)
    assert f"'label' should be true or false, not {label!r}" in message


# Classes.


@pytest.mark.parametrize(("label", "name"), [("joy", "joy"), (3, "3"), (3.0, "3"), (" joy ", "joy")])
def test_a_text_may_have_a_class(label, name):
    assert read(text="Some words.", label=label) == Labelled("Some words.", (name,))


@pytest.mark.parametrize(("labels", "names"), [([], ()), (["joy", 3, "joy"], ("joy", "3"))])
def test_a_text_may_have_several_classes(labels, names):
    assert read(text="Some words.", label=labels) == Labelled("Some words.", names, is_list=True)


@pytest.mark.parametrize("label", [None, {"a": 1}, 1.5, "", " ", True], ids=repr)
def test_a_class_that_is_no_name_is_refused(label):
    for value in (label, ["joy", label]):
        message = refusal("classification", text="x", label=value)
        assert f"'label' should be a name or a whole number, or a list of them, not {label!r}" in message


# Trees.


def node(text, role="prompter", *replies, **keys):
    return {"message_id": text, "text": text, "role": role, "replies": list(replies), **keys}


def tree(*replies):
    return {"message_tree_id": "x", "prompt": node("Hi", "prompter", *replies)}


@pytest.mark.parametrize(
    ("replies", "answers"),
    [
        ([node("Ho", "assistant")], ["Ho"]),
        ([node("Hm", "assistant", rank=1), node("Ho", "assistant", rank=0)], ["Ho"]),
        ([node("Hm", "assistant", rank=None), node("Ho", "assistant", rank=2)], ["Ho"]),
        ([node("Ho", "assistant"), node("Hm", "assistant")], ["Ho"]),
        ([node("Hm", "assistant", rank=0, deleted=True), node("Ho", "assistant", rank=1)], ["Ho"]),
        ([node("Hm", "assistant", rank=0, review_result=False), node("Ho", "assistant", rank=1)], ["Ho"]),
        ([node("Ho", "assistant", node("And?"))], ["Ho"]),
        ([node("Ho", "assistant", node("And?", "prompter", node("So.", "assistant")))], ["Ho", "And?", "So."]),
    ],
)
def test_the_best_path_through_a_tree_ends_with_an_answer(replies, answers):
    example = read(**tree(*replies))
    assert [turn["content"] for turn in example.messages] == ["Hi", *answers]
    assert [turn["role"] for turn in example.messages] == ["user", "assistant", "user", "assistant"][: len(answers) + 1]
    assert read(**tree(*replies)["prompt"]) == example


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (tree(), "no message of this tree has an answer"),
        ({"message_tree_id": "x", "prompt": None}, "no message of this tree has an answer"),
        ({"message_tree_id": "x", "prompt": "Hi"}, "should be an object, not 'Hi'"),
        (tree("Ho"), "should be an object, not 'Ho'"),
        (node("Hi") | {"replies": 3}, "'replies' should be a list of messages, not 3"),
        (node("Hi") | {"replies": {"a": 1}}, "'replies' should be a list of messages, not {'a': 1}"),
        (node("Hi", "narrator"), "role 'narrator' is unknown"),
        (node(HALF), "half a surrogate pair"),
    ],
)
def test_a_tree_that_is_none_is_refused(values, problem):
    assert problem in refusal(**values)


# Columns of the wrong type, or none.


@pytest.mark.parametrize(
    ("format", "good", "column"),
    [
        ("alpaca", {"instruction": "A", "output": "B"}, "instruction"),
        ("alpaca", {"instruction": "A", "output": "B"}, "output"),
        ("alpaca", {"instruction": "A", "input": "C", "output": "B"}, "input"),
        ("alpaca", {"instruction": "A", "system": "C", "output": "B"}, "system"),
        ("alpaca", {"instruction": "A", "response": "B"}, "response"),
        ("completion", {"prompt": "A", "completion": "B"}, "prompt"),
        ("completion", {"prompt": "A", "completion": "B"}, "completion"),
        ("messages", {"messages": [HI, HO], "system": "C"}, "system"),
        ("messages", {"messages": [HI, HO]}, "tools"),
        ("preference", {"prompt": "Hi", **TEXTS}, "prompt"),
        ("classification", {"text": "A", "label": "B"}, "text"),
        ("text", {"text": "A"}, "text"),
    ],
)
@pytest.mark.parametrize("value", [3, {"a": 1}, True], ids=str)
def test_a_column_of_the_wrong_type_is_named_with_its_row(format, good, column, value):
    message = refusal(format, **{**good, column: value})
    assert f"'{column}'" in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("format", "values", "column"),
    [
        ("alpaca", {"output": "B"}, "instruction"),
        ("alpaca", {"instruction": "A"}, "response"),
        ("alpaca", {"instruction": "A", "output": None, "response": "B"}, "output"),
        ("completion", {"completion": "B"}, "prompt"),
        ("completion", {"prompt": "A"}, "completion"),
        ("text", {"texts": "A"}, "text"),
        ("messages", {"text": "A"}, "messages"),
        ("sharegpt", {"text": "A"}, "messages"),
        ("tokenized", {"text": "A"}, "input_ids"),
        ("preference", {"prompt": "A", "chosen": "B"}, "rejected"),
        ("kto", {"messages": [HI, HO]}, "label"),
        ("classification", {"text": "A"}, "label"),
    ],
)
def test_an_absent_column_is_named_with_its_row(format, values, column):
    assert f"'{column}'" in refusal(format, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"text": HALF},
        {"prompt": "ok", "completion": HALF},
        {"instruction": HALF, "output": "ok"},
        {"instruction": "ok", "output": "ok", "history": [[HALF, "ok"]]},
        {"messages": [user(HALF)]},
        {"messages": [HI, HO], "system": HALF},
        {"messages": [HI, HO], "tools": [{"name": HALF}]},
        {"text": HALF, "label": "ok"},
        {"text": "ok", "label": HALF},
    ],
    ids=str,
)
def test_half_a_surrogate_pair_is_reported_with_its_row(values):
    assert "half a surrogate pair" in refusal(**values)
    assert read(text="a\U0001f642") == Completion("", "a🙂")


@pytest.mark.parametrize("column", MEDIA_KEYS)
def test_media_are_refused(column):
    assert f"it has {column}; only text" in refusal(messages=[HI, HO], **{column: ["a.png"]})
    assert read(messages=[HI, HO], **{column: []}) == Conversation([HI, HO])


def test_masks_in_a_prompt_and_a_chosen_answer_are_kept():
    draft, final = assistant("Ho") | {"train": False}, assistant("Hm") | {"weight": 0.5}
    example = read("chosen", system="Be kind", messages=[HI, draft, HI], chosen=[final], rejected="x")
    assert example.messages == [system("Be kind"), HI, HO, HI, assistant("Hm")]
    assert example.weights == [1.0, 1.0, 0.0, 1.0, 0.5]


# HH-RLHF's text form.

TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Where is\n\nhome?\n\nAssistant:"


def test_transcripts_of_humans_and_assistants_are_turns():
    example = read(chosen=TRANSCRIPT + " Here. ", rejected=TRANSCRIPT + " There.\n")
    prompt = [user("Hi"), assistant("Ho"), user("Where is\n\nhome?")]
    assert example == Preference(
        Conversation([*prompt, assistant("Here.")]), Conversation([*prompt, assistant("There.")])
    )


@pytest.mark.parametrize("answer", [" Here.", "Here.", " Here.\n\n"])
def test_a_prompt_may_be_a_transcript(answer):
    messages = [user("Hi"), assistant("Ho"), user("Where is\n\nhome?"), assistant("Here.")]
    assert read("chosen", prompt=TRANSCRIPT, chosen=answer, rejected="x").messages == messages
    assert read("kto", prompt=TRANSCRIPT, completion=answer, label=True).conversation.messages == messages


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (" def f():\n    pass\n", "def f():\n    pass"),
        ("\n    if x:\n        y()\n\n", "    if x:\n        y()"),
        (" \n\n\tx = 1", "\tx = 1"),
        ("     return x  ", "    return x"),
        ("No.", "No."),
        ("  ", ""),
    ],
)
def test_an_indented_first_line_of_a_transcript_stays_indented(written, said):
    whole = read("chosen", chosen=f"\n\nHuman:{written}\n\nAssistant: x", rejected="x").messages
    assert whole == [user(said), assistant("x")]
    assert (
        read("chosen", prompt="\n\nHuman: a\n\nAssistant:", chosen=written, rejected="x").messages[1]["content"] == said
    )


def test_the_blanks_of_an_answer_to_a_plain_prompt_are_kept():
    assert read("chosen", prompt="Hi", chosen=" Ho ", rejected="x").messages == [HI, assistant(" Ho ")]
    assert read("chosen", messages=[HI], prompt=TRANSCRIPT, chosen=" Ho ", rejected="x").messages == [
        HI,
        assistant(" Ho "),
    ]


def test_a_transcript_without_blank_lines_in_front_is_one_where_no_prompt_is():
    said = "Human: Hi\n\nAssistant: Ho"
    assert read("chosen", chosen=said, rejected="x").messages == [HI, HO]
    assert read("chosen", prompt="Write a dialogue.", chosen=said, rejected="x").messages == [
        user("Write a dialogue."),
        assistant(said),
    ]


@pytest.mark.parametrize(
    "said",
    [
        "Assistant: Ho",
        "I, Human: Hi",
        "\n\nAssistant: Ho\n\nHuman: Hi",
        "Humans: Hi",
        "\r\n\r\nHuman: Hi\r\n\r\nAssistant: Ho",
        "\n\nHUMAN: Hi\n\nASSISTANT: Ho",
        "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: Ho",
        "\nHuman: Hi\n\nAssistant: Ho",
    ],
)
def test_what_is_no_transcript_is_an_answer_that_nothing_asks_for(said):
    problem = refusal(chosen=said, rejected=said)
    assert "there is nothing before the answer" in problem
    assert r"HH-RLHF's form, '\n\nHuman: …\n\nAssistant: …' with these marks and LF line ends" in problem


def test_a_text_that_is_a_transcript_is_text_and_noted():
    reader = RowReader()
    assert reader.read(Row({"text": TRANSCRIPT}, "a:1")) == Completion("", TRANSCRIPT)
    (note,) = reader.notes
    assert "format: chosen and columns: {chosen: text}" in note
    assert RowReader("chosen", {"chosen": "text"}).read(Row({"text": TRANSCRIPT + " Here."}, "a:1")).messages[-1] == (
        assistant("Here.")
    )


# Mappings.


def test_columns_are_mapped_before_the_format_is_detected():
    columns = {"instruction": "question", "output": "answer"}
    assert read(columns=columns, question="Hi", answer="Ho") == Conversation([HI, HO])
    assert read(columns={"label": "category"}, text="x", category="joy") == Labelled("x", ("joy",))


def test_a_mapped_column_comes_before_one_of_its_name():
    assert read(columns={"text": "body"}, text="wrong", body="right") == Completion("", "right")


def test_keys_and_roles_of_turns_can_be_mapped():
    columns = {"messages": "dialog", "role": "speaker", "content": "says"}
    turns = [{"speaker": "Ann", "says": "Hi"}, {"speaker": "Bob", "says": "Ho"}]
    assert read(columns=columns, roles={"Ann": "user", "Bob": "assistant"}, dialog=turns) == Conversation([HI, HO])


def test_a_mapping_is_no_unread_column():
    reader = RowReader(columns={"text": "body"})
    reader.read(Row({"body": "x", "id": 3, "text": "y"}, "a:1"))
    reader.read(Row({"body": "x", "url": "z"}, "a:2"))
    assert reader.unread == {"id", "url", "text"}  # their own `text` gave way to what was mapped to it


TREE = {"role": "prompter", "text": "a", "message_id": "y", "replies": [{"role": "assistant", "text": "b"}]}


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"instruction": "a", "output": "b", "input": "", "system": "", "history": [], "tools": ""}, set()),
        ({"instruction": "a", "output": "b", "response": "c"}, {"response"}),
        ({"prompt": "a", "completion": "b", "tools": "[]"}, {"tools"}),
        ({"prompt": [HI], "completion": [HO], "tools": "[]"}, set()),
        ({"messages": [HI, HO], "conversations": [HI, HO]}, {"conversations"}),
        ({"text": "a", "meta": {}}, {"meta"}),
        (TREE | {"message_tree_id": "x", "message_id": "y", "rank": 0, "deleted": False, "lang": "en"}, {"lang"}),
        ({"message_tree_id": "x", "review_result": True, "prompt": TREE, "tree_state": "ready"}, {"tree_state"}),
        ({"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [1, 2]}, set()),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}, {"score"}),
    ],
    ids=str,
)
def test_a_column_that_is_not_read_is_known(row, unread):
    reader = RowReader()
    reader.read(Row(row, "a:1"))
    assert reader.unread == unread


def test_a_key_of_a_turn_that_is_not_read_is_known():
    reader = RowReader()
    reader.read(Row({"messages": [HI | {"lang": "en"}, HO]}, "a:1"))
    assert (reader.unread, reader.unread_keys) == (set(), {"lang"})


def test_of_a_preference_the_chosen_answer_alone_can_be_read():
    reader = RowReader("chosen")
    example = reader.read(Row({"prompt": "a", "chosen": "b", "rejected": "c"}, "a:1"))
    assert example == Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert reader.unread == {"rejected"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"format": "chatml"}, "data.format: 'chatml' is unknown; use one of auto, alpaca"),
        ({"columns": {"question": "instruction"}}, "data.columns: no format has a column 'question'; use one of "),
        ({"roles": {"Ann": "human"}}, "data.roles: Ann: 'human' should be system, user, assistant or tool"),
    ],
)
def test_a_mapping_to_what_does_not_exist_is_refused(settings, named):
    with pytest.raises(ConfigError) as caught:
        RowReader(**settings)
    assert named in str(caught.value)


# Anything.

WORDS = [*ROLE_OF, *FORMATS, "", "x", HALF, "é🙂", "tool_use", "image_url", "true", "null", "[]", "{}", "[3]", "{"]
TURNS_AS_JSON = [json.dumps([HI, HO]), json.dumps([TOOL]), json.dumps({"name": "add", "arguments": "{}"})]
KEYS = [*ROLE_KEYS, *CONTENT_KEYS, *REASONING_KEYS, *WEIGHT_KEYS, "tool_calls", "function_call", "function", "name"]
KEYS += ["arguments", "parameters", "type", "tool_call", "tool_call_id", "id", "replies", "rank", "deleted", HALF]
COLUMNS = sorted({*MEDIA_KEYS, "other", HALF, *formats.COLUMNS})
texts = st.sampled_from([*WORDS, *TURNS_AS_JSON]) | st.text(max_size=3)
numbers = st.integers(-2, 2) | st.floats() | st.sampled_from([10**30, -100, 2**63])
leaves = st.deferred(lambda: st.none() | st.booleans() | numbers | texts)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(sorted(ROLE_OF)), "content": texts | st.none()},
    optional={key: leaves | st.lists(leaves, max_size=2) for key in KEYS if key not in ("role", "content")},
)
values = st.recursive(
    leaves | turns | st.just(HI) | st.just(HO),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
# Columns that belong together, so that rows get beyond the telling of their format.
GROUPS = [
    ["instruction", "input", "output", "response", "system", "history", "tools", "label"],
    ["messages", "conversations", "conversation", "system", "tools", "label", "chosen", "rejected"],
    ["prompt", "completion", "tools", "label", "chosen", "rejected"],
    ["text", "label"],
    ["input_ids", "labels", "loss_mask", "attention_mask"],
    ["chosen_messages", "rejected_messages", "prompt", "instruction", "input"],
    ["message_tree_id", "prompt", "message_id", "text", "role", "replies"],
    COLUMNS,
]
forms = st.sampled_from(GROUPS)
any_row = forms.flatmap(lambda names: st.dictionaries(st.sampled_from(names), values, max_size=6))


@settings(max_examples=400, deadline=None)
@given(row=any_row, format=st.sampled_from(["auto", *FORMATS]))
def test_whatever_a_row_holds_it_is_read_or_refused(row, format):
    reader = RowReader(format)
    try:
        shown = "rows.jsonl:7: " + json.dumps(asdict(reader.read(Row(row, "rows.jsonl:7"))), ensure_ascii=False)
    except DataError as error:
        shown = str(error)
    assert shown.encode().startswith(b"rows.jsonl:7: ")
    assert reader.format in ("auto", *FORMATS)


# Real files.

REAL_FILES = {
    "axolotl_fixtures/alpaca.json": ("alpaca", 2),
    "axolotl_fixtures/conversation.json": ("sharegpt", 1),
    "axolotl_fixtures/conversation.missingturns.json": ("sharegpt", 1),
    "axolotl_fixtures/conversation.tokenized.json": ("tokenized", 1),
    "axolotl_fixtures/conversation.tokenized_llama2chat.json": ("tokenized", 1),
    "banking77/categories.json": ("text", 77),
    "banking77/test.csv": ("classification", 3080),
    "banking77/train.csv": ("classification", 10003),
    "fastchat/data/dummy_conversation.json": ("sharegpt", 500),
    "llama_factory_demo/alpaca_en_demo.json": ("alpaca", 999),
    "llama_factory_demo/alpaca_zh_demo.json": ("alpaca", 1000),
    "llama_factory_demo/c4_demo.jsonl": ("text", 300),
    "llama_factory_demo/dpo_en_demo.json": ("preference", 300),
    "llama_factory_demo/dpo_zh_demo.json": ("preference", 300),
    "llama_factory_demo/glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "llama_factory_demo/glaive_toolcall_zh_demo.json": ("sharegpt", 300),
    "llama_factory_demo/identity.json": ("alpaca", 91),
    "llama_factory_demo/kto_en_demo.json": ("kto", 300),
    "llama_factory_demo/reason_tool_use_demo_50.jsonl": ("messages", 50),
    "llama_factory_demo/v1_dpo_demo.jsonl": ("preference", 10),
    "llama_factory_demo/v1_sft_demo.jsonl": ("messages", 500),
    "llms_from_scratch/instruction-data-with-preference.json": ("preference", 1100),
    "llms_from_scratch/instruction-data.json": ("alpaca", 1100),
    "mlx_wikisql_lora/test.jsonl": ("text", 100),
    "mlx_wikisql_lora/train.jsonl": ("text", 1000),
    "mlx_wikisql_lora/valid.jsonl": ("text", 100),
    "mlx_wwdc25_completions/train.jsonl": ("completion", 1800),
    "mlx_wwdc25_completions/valid.jsonl": ("completion", 144),
    "oasst_samples/en_100_message.jsonl": ("oasst", 100),
    "oasst_samples/en_100_text.jsonl": ("text", 100),
    "oasst_samples/en_100_tree.jsonl": ("oasst", 100),
    "oasst_samples/prompt_lottery_en_250_text.jsonl": ("text", 250),
    "torchtune_tiny/alpaca_tiny.json": ("alpaca", 100),
    "torchtune_tiny/chat_tiny.json": ("sharegpt", 1),
    "torchtune_tiny/hh_rlhf_tiny.json": ("preference", 1),
    "torchtune_tiny/instruct_tiny.json": ("alpaca", 2),
    "humaneval/HumanEval.jsonl.gz": ("completion", 164),
    "humaneval/example_problem.jsonl": ("completion", 1),
    "torchtune_tiny/stack_exchange_paired_tiny.json": ("preference", 25),
}
MAPPINGS = {
    "banking77/test.csv": {"label": "category"},
    "banking77/train.csv": {"label": "category"},
    "humaneval/HumanEval.jsonl.gz": {"completion": "canonical_solution"},
    "humaneval/example_problem.jsonl": {"completion": "canonical_solution"},
    "torchtune_tiny/stack_exchange_paired_tiny.json": {
        "prompt": "question",
        "chosen": "response_j",
        "rejected": "response_k",
    },
}
# What is no training data, or none of text.
OTHER_FILES = {
    "fastchat/fastchat/llm_judge/data/judge_prompts.jsonl": "no format has the columns",
    "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl": "no format has the columns",
    "fastchat/fastchat/llm_judge/data/mt_bench/reference_answer/gpt-4.jsonl": "no format has the columns",
    "fastchat/fastchat/llm_judge/data/vicuna_bench/question.jsonl": "no format has the columns",
    "fastchat/fastchat/llm_judge/data/vicuna_bench/reference_answer/gpt-4.jsonl": "no format has the columns",
    "humaneval/example_samples.jsonl": "no format has the columns",
    "llama_factory_demo/dataset_info.json": "no format has the columns",
    "llama_factory_demo/mllm_demo.json": "it has images",
    "torchtune_tiny/vqa_tiny.json": "no format has the columns",
}


@pytest.mark.parametrize(("file", "format", "count"), [(name, *expected) for name, expected in REAL_FILES.items()])
def test_real_rows_are_understood(realdata, file, format, count):
    mapping = MAPPINGS.get(file, {})
    reader = RowReader(columns=mapping)
    rule = HeaderRule("auto", mapping.values(), formats.COLUMNS)
    found = list(read_rows(Source(str(realdata / "data" / file)), rule))
    assert Counter(map(type, found)) == {Row: count}
    examples = [reader.read(row) for row in found]
    assert reader.format == format
    assert len({type(example) for example in examples}) == 1


@pytest.mark.parametrize(("file", "problem"), OTHER_FILES.items())
def test_real_rows_that_are_no_texts_are_refused(realdata, file, problem):
    row = next(read_rows(Source(str(realdata / "data" / file)), HeaderRule("auto", (), formats.COLUMNS)))
    with pytest.raises(DataError, match=problem):
        RowReader().read(row)


def test_every_real_file_is_expected(realdata):
    folder = realdata / "data"
    there = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".csv", ".gz")
    }
    assert there - {*REAL_FILES, *OTHER_FILES} == set()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_real_calls_are_objects_with_the_tools_that_they_call(realdata, language):
    path = realdata / "data" / "llama_factory_demo" / f"glaive_toolcall_{language}_demo.json"
    reader = RowReader()
    calls = [
        (call["function"], {tool["function"]["name"] for tool in example.tools or []})
        for example in map(reader.read, read_rows(Source(str(path)), HeaderRule("auto", ())))
        for turn in example.messages
        for call in turn.get("tool_calls", [])
    ]
    assert len(calls) > 100
    assert all(isinstance(function["arguments"], dict) for function, _ in calls)
    assert sum(function["name"] in known for function, known in calls) > 0.9 * len(calls)
