"""Turns in every dialect, read to the form of chat templates."""

import json
import random

import pytest

from qlora.data.rows import Row
from qlora.data.turns import ROLES, TurnReader, parse_json, read_tools
from qlora.errors import DataError

ROW = Row({}, "rows.jsonl:7")
HALF = "a\ud83d"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [None, "é"]}}}
FLAT = CALL["function"]


def read_all(turns, columns={}, roles={}):  # noqa: B006 (never changed)
    return TurnReader(columns, roles).read_all(ROW, "messages", turns)


def read(turn, **mappings):
    return read_all([turn], **mappings)[0][0]


def refusal(turns, **mappings):
    with pytest.raises(DataError) as caught:
        read_all(turns, **mappings)
    message = str(caught.value)
    assert message.startswith("rows.jsonl:7: ")
    assert len(message.encode()) < 500  # it can be printed, and does not fill the screen
    return message


def assistant(**keys):
    return {"role": "assistant", **keys}


# Speakers and what they say.


@pytest.mark.parametrize(("role_key", "content_key"), [("role", "content"), ("from", "value"), ("role", "text")])
@pytest.mark.parametrize(
    ("name", "role"), [(name, role) for role, names in ROLES.items() for name in names if not name.endswith("_call")]
)
def test_every_name_of_a_speaker_is_known_in_every_dialect(name, role, role_key, content_key):
    assert read({role_key: name, content_key: "Hi"}) == {"role": role, "content": "Hi"}


def test_turns_keep_their_order(seed):
    rng = random.Random(seed)
    turns = [{"role": rng.choice(list(ROLES)), "content": f"turn {n}"} for n in range(9)]
    assert read_all(turns) == (turns, None)


@pytest.mark.parametrize("form", [json.dumps, lambda turns: json.dumps(turns, indent=1)])
def test_a_table_holds_turns_as_json(form):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert read_all(form(turns)) == (turns, None)


def test_a_turn_alone_is_a_list_of_one():
    assert read_all({"from": "gpt", "value": "Ho"}) == ([{"role": "assistant", "content": "Ho"}], None)


def test_keys_and_roles_can_be_mapped():
    turn = {"speaker": "Ann", "says": "Hi", "role": "nobody", "content": "nothing"}
    mapped = read(turn, columns={"role": "speaker", "content": "says"}, roles={"Ann": "user"})
    assert mapped == {"role": "user", "content": "Hi"}
    assert read({"role": "model", "content": "Hi"}, roles={"model": "system"})["role"] == "system"


@pytest.mark.parametrize(
    "role", ["Human", "narrator", "", None, 3, ["user"], {"a": 1}, HALF, "x" * 1000], ids=lambda role: repr(role)[:9]
)
def test_an_unknown_role_is_named_with_the_known_ones(role):
    message = refusal([{"role": role, "content": "Hi"}])
    assert f"role {role!r:.80} is unknown; map it with data.roles to one of assistant, bot, " in message
    assert "data.roles" in message


def test_a_turn_without_its_mapped_role_is_refused():
    turn = {"role": "user", "content": "Hi"}
    assert f"a turn has no 'speaker': {turn}; map its keys" in refusal([turn], columns={"role": "speaker"})
    assert "a turn has no 'role' or 'from': {'content': 'Hi'}; map its keys" in refusal([{"content": "Hi"}])


@pytest.mark.parametrize("turns", [[], {}, None, 3, True, "3", "null", "[]"], ids=repr)
def test_what_is_no_list_of_turns_is_refused(turns):
    assert "turn" in refusal(turns)


@pytest.mark.parametrize("text", ["Hi", "", "[{]", "[" * 5000], ids=["words", "nothing", "broken", "deep"])
def test_text_that_is_no_json_is_reported(text):
    assert refusal(text).startswith("rows.jsonl:7: 'messages' should be JSON, not ")
    with pytest.raises(DataError, match="'history' should be JSON"):
        parse_json(ROW, "history", text)


@pytest.mark.parametrize("turn", ["Hi", 3, None, ["user", "Hi"]], ids=repr)
def test_a_turn_that_is_no_object_is_refused(turn):
    assert f"a turn should have 'role' and 'content', not {turn!r}" in refusal([{"role": "user", "content": "A"}, turn])


@pytest.mark.parametrize("content", [3, True, {"text": "Hi"}, 1.5], ids=repr)
def test_content_that_is_no_text_is_refused(content):
    assert f"should be text or parts, not {content!r}" in refusal([{"role": "user", "content": content}])


@pytest.mark.parametrize("keys", [{}, {"content": None}, {"content": None, "tool_calls": []}], ids=str)
def test_a_turn_that_says_and_calls_nothing_is_refused(keys):
    assert "a text 'content'" in refusal([assistant(**keys)])


# Parts.


@pytest.mark.parametrize(
    ("parts", "content"),
    [
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([{"type": "text", "value": "one"}, "two", {"text": "three"}], "one\ntwo\nthree"),
        ([{"type": "text", "text": ""}], ""),
        ([], ""),
    ],
)
def test_parts_of_text_are_joined_by_lines(parts, content):
    assert read({"role": "user", "content": parts}) == {"role": "user", "content": content}


@pytest.mark.parametrize("kind", ["reasoning", "thinking"])
@pytest.mark.parametrize("key", ["text", "value", None])
def test_parts_of_reasoning_are_kept_apart(kind, key):
    parts = [{"type": kind, key or kind: "Hm."}, {"type": "text", "text": "4"}, {"type": kind, key or kind: "Yes."}]
    assert read(assistant(content=parts)) == assistant(content="4", reasoning_content="Hm.\nYes.")


@pytest.mark.parametrize("form", [dict, json.dumps], ids=["object", "json"])
@pytest.mark.parametrize("key", ["value", "tool_call"])
def test_parts_may_be_calls(form, key):
    parts = [{"type": "text", "value": "Let me see."}, {"type": "tool_call", key: form(FLAT)}]
    assert read(assistant(content=parts)) == assistant(content="Let me see.", tool_calls=[CALL])


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", None, 3, [], {}, HALF], ids=repr)
def test_parts_that_are_no_text_are_refused(kind):
    message = refusal([{"role": "user", "content": [{"type": kind, "image_url": "x.png"}]}])
    assert f"a part of a turn is of type {kind!r}; only text is supported" in message


@pytest.mark.parametrize("part", [3, None, ["text"], True], ids=repr)
def test_a_part_that_is_neither_text_nor_an_object_is_refused(part):
    assert f"should be text or an object, not {part!r}" in refusal([{"role": "user", "content": [part]}])


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": 3}, {"type": "reasoning"}], ids=str)
def test_a_part_without_its_text_is_refused(part):
    assert "should be text" in refusal([{"role": "user", "content": [part]}])


# Calls.


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        FLAT,
        {"function": FLAT},
        {"name": "add", "parameters": FLAT["arguments"]},
        {"name": "add", "arguments": json.dumps(FLAT["arguments"])},
        {"type": "function", "function": {"name": "add", "arguments": json.dumps(FLAT["arguments"])}},
    ],
    ids=["openai", "flat", "untyped", "parameters", "flat json", "openai json"],
)
@pytest.mark.parametrize(
    "turn",
    [
        lambda call: assistant(content=None, tool_calls=[call]),
        lambda call: assistant(tool_calls=call),
        lambda call: assistant(content="", function_call=call),
        lambda call: {"from": "function_call", "value": json.dumps(call)},
        lambda call: {"from": "tool_call", "value": json.dumps([call])},
        lambda call: {"from": "function_call", "value": call},
        lambda call: {"role": "gpt", "content": [{"type": "tool_call", "value": call}]},
    ],
    ids=["tool_calls", "one", "function_call", "sharegpt", "sharegpt list", "sharegpt object", "part"],
)
def test_every_dialect_of_a_call_means_the_same(turn, call):
    assert read(turn(call)) == assistant(content="", tool_calls=[CALL])


def test_calls_keep_their_order_ids_and_words():
    calls = [{**CALL, "id": "call_1"}, {**CALL, "id": "call_2"}, {**CALL, "id": None}]
    found = read(assistant(content="Both.", tool_calls=calls))
    assert found == assistant(content="Both.", tool_calls=[calls[0], calls[1], CALL])


@pytest.mark.parametrize("arguments", [{}, "", "{}", None, "null"], ids=repr)
def test_a_call_may_have_no_arguments(arguments):
    found = read(assistant(tool_calls=[{"name": "now", "arguments": arguments}]))
    assert found["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("add", "should have 'name' and 'arguments', not 'add'"),
        ({"arguments": {}}, "should have 'name' and 'arguments'"),
        ({"name": 3}, "should have 'name' and 'arguments'"),
        ({"function": "add"}, "should have 'name' and 'arguments'"),
        ({"name": "add", "arguments": "a=2"}, "'arguments' should be JSON, not 'a=2'"),
        ({"name": "add", "arguments": "[2, 3]"}, "arguments should be an object, not [2, 3]"),
        ({"name": "add", "arguments": 2}, "arguments should be an object, not 2"),
    ],
)
def test_what_is_no_call_is_refused(call, problem):
    assert problem in refusal([assistant(tool_calls=[call])])


@pytest.mark.parametrize("value", ["add(2, 3)", "", "null", "[]"])
def test_a_calling_turn_that_calls_nothing_is_refused(value):
    message = refusal([{"from": "function_call", "value": value}])
    assert "'function_call turn' should be JSON" in message or "should have 'role' and a text 'content'" in message


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython"])
def test_an_answer_of_a_tool_keeps_its_name_and_call(role):
    found = read({"role": role, "content": "5", "name": "add", "tool_call_id": "call_1", "cost": 3})
    assert found == {"role": "tool", "content": "5", "name": "add", "tool_call_id": "call_1"}


def test_other_keys_of_a_turn_are_left_out():
    assert read({"role": "user", "content": "Hi", "name": "Ann", "id": 3}) == {"role": "user", "content": "Hi"}


# Reasoning.


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_the_name_that_templates_read(key):
    assert read(assistant(content="4", **{key: "2 + 2."})) == assistant(content="4", reasoning_content="2 + 2.")


@pytest.mark.parametrize("nothing", ["", None, []])
def test_no_reasoning_adds_no_key(nothing):
    assert read(assistant(content="4", reasoning=nothing)) == assistant(content="4")


# Keys that mean the same.


SAME = [
    ({"content": "a"}, {"value": "b"}, "content and value"),
    ({"value": "a"}, {"text": "b"}, "value and text"),
    ({"content": "a", "reasoning": "b"}, {"thinking": "c"}, "reasoning and thinking"),
    (
        {"content": [{"type": "thinking", "thinking": "b"}, "a"]},
        {"reasoning_content": "c"},
        "reasoning_content and a part of reasoning",
    ),
    ({"tool_calls": [CALL]}, {"function_call": FLAT | {"name": "multiply"}}, "tool_calls and function_call"),
    (
        {"content": [{"type": "tool_call", "value": CALL}]},
        {"tool_calls": [CALL, CALL]},
        "tool_calls and a part that is a call",
    ),
]


@pytest.mark.parametrize(("turn", "more", "keys"), SAME, ids=[keys for *_, keys in SAME])
def test_keys_of_one_meaning_that_differ_are_refused(turn, more, keys):
    assert refusal([assistant(**turn, **more)]) == f"rows.jsonl:7: {keys} of a turn differ; keep one of them."
    assert read(assistant(**turn, **dict.fromkeys(more))) == read(assistant(**turn))


@pytest.mark.parametrize(
    "more",
    [{"value": "4", "text": ""}, {"thinking": "Hm.", "reasoning": "Hm."}, {"function_call": FLAT}],
    ids=["content", "reasoning", "calls"],
)
def test_keys_of_one_meaning_that_agree_are_read_once(more):
    turn = assistant(content="4", reasoning_content="Hm.", tool_calls=[CALL])
    assert read(turn | more) == turn


def test_an_empty_key_gives_way_to_one_of_the_same_meaning():
    assert read({"from": "gpt", "content": "", "value": "Ho"}) == assistant(content="Ho")
    assert read({"from": "gpt", "content": None, "value": ""}) == assistant(content="")


# Weights.


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "training"])
@pytest.mark.parametrize(("weight", "read_as"), [(0, 0.0), (0.5, 0.5), (2, 2.0), (False, 0.0), (True, 1.0)])
def test_a_turn_may_have_a_weight(key, weight, read_as):
    turns = [{"role": "user", "content": "Hi"}, assistant(content="Ho", **{key: weight}), assistant(content="Hm")]
    assert read_all(turns)[1] == [1.0, read_as, 1.0]


@pytest.mark.parametrize("weight", [None, 0, 0.0, False])
def test_a_prompt_has_no_weight(weight):
    turns = [{"role": "user", "content": "Hi", "weight": weight}, assistant(content="Ho", weight=None)]
    assert read_all(turns)[1] in (None, [0.0, 1.0])


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_prompt_that_should_be_supervised_is_refused(role):
    assert f"a {role} turn has weight 1.0" in refusal([{"role": role, "content": "Hi", "weight": 1}])


@pytest.mark.parametrize(
    "weight", [-1, 1001, "1", [], float("nan"), float("inf"), 10**400, [1] * 1000], ids=lambda weight: repr(weight)[:9]
)
def test_a_weight_that_is_none_is_refused(weight):
    assert "weight should be 0, or a number from 0.001 to 1000, not " in refusal(
        [assistant(content="Ho", weight=weight)]
    )


# Tools.

TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("form", [list, json.dumps], ids=["list", "json"])
def test_tools_are_described_as_templates_read_them(form):
    wrapped = {"type": "function", "function": TOOL}
    assert read_tools(ROW, form([TOOL, wrapped])) == [wrapped, wrapped]


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"], ids=repr)
def test_no_tools_are_none(tools):
    assert read_tools(ROW, tools) is None


@pytest.mark.parametrize("tools", ["add", "{}x", 3, {"name": "add"}, ["add"], '["add"]', [None], " "], ids=repr)
def test_what_describes_no_tools_is_refused(tools):
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: 'tools' should be "):
        read_tools(ROW, tools)


# Characters.


@pytest.mark.parametrize(
    "turn",
    [
        assistant(content=HALF),
        assistant(content=[HALF]),
        assistant(content=[{"type": "text", "text": HALF}]),
        assistant(content=[{"type": "reasoning", "text": HALF}]),
        assistant(content="ok", reasoning=HALF),
        assistant(tool_calls=[{"name": HALF}]),
        assistant(tool_calls=[{"name": "add", "id": HALF}]),
        assistant(tool_calls=[{"name": "add", "arguments": {"a": [{HALF: 1}]}}]),
        assistant(tool_calls=[{"name": "add", "arguments": json.dumps({"a": HALF})}]),
        {"role": "tool", "content": "ok", "name": HALF},
        {"role": "tool", "content": "ok", "tool_call_id": HALF},
    ],
    ids=str,
)
def test_half_a_surrogate_pair_is_reported_wherever_it_is(turn):
    assert "half a surrogate pair" in refusal([turn])


@pytest.mark.parametrize("form", [list, json.dumps], ids=["list", "json"])
def test_half_a_surrogate_pair_in_a_tool_is_reported(form):
    with pytest.raises(DataError, match="half a surrogate pair"):
        read_tools(ROW, form([{**TOOL, "description": HALF}]))
