"""What columns mean, and what is said of those that mean nothing."""

import random

import pytest

from qlora.data.formats import FORMATS, Completion, Conversation, detect_format, to_example
from qlora.data.rows import Row, read_rows
from qlora.errors import DataError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def row(**values):
    return Row(values, "rows.jsonl:7")


def read(format="auto", **values):
    one = row(**values)
    return to_example(one, detect_format([one]) if format == "auto" else format)


def refusal(format, **values):
    with pytest.raises(DataError) as caught:
        to_example(row(**values), format)
    return str(caught.value)


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ({"messages"}, "messages"),
        ({"messages", "text", "instruction", "output"}, "messages"),
        ({"instruction", "output"}, "alpaca"),
        ({"instruction", "input", "output", "text"}, "alpaca"),
        ({"instruction", "response", "context"}, "alpaca"),
        ({"prompt", "completion"}, "completion"),
        ({"prompt", "text"}, "text"),
        ({"text", "meta"}, "text"),
    ],
)
def test_a_format_is_told_by_its_columns(columns, format):
    assert detect_format([row(**dict.fromkeys(columns, "x"))]) == format


@pytest.mark.parametrize("columns", [{"instruction"}, {"prompt"}, {"completion"}, {"question", "answer"}, set()])
def test_unknown_columns_are_told_with_the_formats(columns):
    with pytest.raises(DataError) as caught:
        detect_format([row(**dict.fromkeys(columns, "x"))])
    message = str(caught.value)
    assert message.startswith("rows.jsonl:7")
    assert str(sorted(columns)) in message
    assert [form for form in FORMATS.values() if form not in message] == []


@pytest.mark.parametrize("answer", ["output", "response"])
def test_alpaca_is_a_question_and_an_answer(answer):
    example = read(instruction="Add 2 and 3.", **{answer: "5"})
    assert example == Conversation([{"role": "user", "content": "Add 2 and 3."}, {"role": "assistant", "content": "5"}])


@pytest.mark.parametrize("nothing", ["", None])
def test_an_empty_alpaca_input_or_system_adds_nothing(nothing):
    assert read(instruction="A", output="B", input=nothing, system=nothing) == read(instruction="A", output="B")


def test_alpaca_input_follows_the_instruction_and_system_comes_first():
    example = read(instruction="Add.", input="2 3", output="5", system="Be short.")
    assert example.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Add.\n\n2 3"},
        {"role": "assistant", "content": "5"},
    ]


def test_messages_keep_their_turns_and_order(seed):
    rng = random.Random(seed)
    turns = [{"role": rng.choice(["system", "user", "assistant"]), "content": f"turn {n}"} for n in range(9)]
    assert read(messages=turns) == Conversation(turns)


def test_other_keys_of_a_turn_are_left_out():
    assert read(messages=[{**TURNS[0], "name": "Ann", "weight": 0}]).messages == [TURNS[0]]


def test_prompt_and_completion_are_raw_text():
    assert read(prompt="One, ", completion="two") == Completion("One, ", "two")


def test_prompt_and_completion_of_turns_are_a_conversation():
    assert read(prompt=[TURNS[0]], completion=[TURNS[1]]) == Conversation(TURNS)


def test_text_is_a_completion_of_nothing():
    assert read(text="Some words.") == Completion("", "Some words.")


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
        ("text", {"text": "A"}, "text"),
    ],
)
@pytest.mark.parametrize("value", [3, {"a": 1}, True], ids=str)
def test_a_column_of_the_wrong_type_is_named_with_its_row(format, good, column, value):
    message = refusal(format, **{**good, column: value})
    assert message.startswith("rows.jsonl:7")
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
    ],
)
def test_an_absent_column_is_named_with_its_row(format, values, column):
    message = refusal(format, **values)
    assert message.startswith("rows.jsonl:7")
    assert f"'{column}'" in message


@pytest.mark.parametrize("messages", [[], "Hi", {"role": "user", "content": "Hi"}, None, 3], ids=str)
def test_messages_that_are_no_turns_are_named(messages):
    message = refusal("messages", messages=messages)
    assert message.startswith("rows.jsonl:7")
    assert "list of turns" in message


@pytest.mark.parametrize(
    "turn",
    ["Hi", {"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": [{"type": "text"}]}],
    ids=str,
)
def test_a_turn_without_text_is_named(turn):
    message = refusal("messages", messages=[*TURNS, turn])
    assert message.startswith("rows.jsonl:7")
    assert "'content'" in message


@pytest.mark.parametrize("role", ["human", "gpt", "tool", "User", "", None])
def test_an_unknown_role_is_named_with_the_known_ones(role):
    message = refusal("messages", messages=[{"role": role, "content": "Hi"}])
    assert message.startswith("rows.jsonl:7")
    assert f"role {role!r}" in message
    assert "system, user, assistant" in message


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [([TURNS[0]], "Ho"), ([TURNS[0]], None), ([TURNS[0]], 3), ("Hi", [TURNS[1]]), ([3], [TURNS[1]])],
    ids=str,
)
def test_a_prompt_and_a_completion_of_two_kinds_are_refused(prompt, completion):
    message = refusal("completion", prompt=prompt, completion=completion)
    assert message.startswith("rows.jsonl:7")
    assert repr(completion) in message or repr(prompt[0]) in message


@pytest.mark.parametrize(
    ("format", "values"),
    [
        ("text", {"text": "a\ud83d"}),
        ("completion", {"prompt": "ok", "completion": "a\ud83d"}),
        ("alpaca", {"instruction": "a\ud83d", "output": "ok"}),
        ("messages", {"messages": [{"role": "user", "content": "a\ud83d"}]}),
    ],
)
def test_half_a_surrogate_pair_is_told_with_its_row(format, values):
    message = refusal(format, **values)
    assert message.startswith("rows.jsonl:7: character 1 of ")
    assert "half a surrogate pair" in message
    message.encode()  # and can be printed
    assert read(text="a\U0001f642") == Completion("", "a🙂")


@pytest.mark.parametrize(
    ("file", "format", "count"),
    [
        ("llama_factory_demo/alpaca_en_demo.json", "alpaca", 999),
        ("llama_factory_demo/identity.json", "alpaca", 91),
        ("mlx_wikisql_lora/train.jsonl", "text", 1000),
    ],
)
def test_real_rows_are_understood(realdata, file, format, count):
    rows = read_rows(str(realdata / "data" / file))
    assert detect_format(rows) == format
    assert len([to_example(one, format) for one in rows]) == count
