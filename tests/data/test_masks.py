"""Masks and weights of turns and parts as other trainers write them, and keys that are not read."""

import random

import pytest

from qlora.data.examples import PartWeights
from qlora.data.formats import RowReader
from qlora.data.masks import FLAGS, NUMBERS, read_weight
from qlora.data.rows import Row
from qlora.data.turns import TurnReader
from qlora.errors import DataError
from tests.data.chats import encode, encoder, supervised_texts

ROW = Row({}, "rows.jsonl:7")


def weights(*turns):
    return TurnReader({}, {}).read_all(ROW, "messages", list(turns))[1]


def content(*turns):
    return TurnReader({}, {}).read_all(ROW, "messages", list(turns))[0][0]["content"]


def answer(said="Ho", **keys):
    return {"role": "assistant", "content": said, **keys}


def text(said, **keys):
    return {"type": "text", "text": said, **keys}


@pytest.mark.parametrize("key", [*NUMBERS, *FLAGS])
@pytest.mark.parametrize(("value", "weight"), [(False, 0.0), (0, 0.0), (True, 1.0), (1, 1.0)])
def test_every_trainers_mask_of_a_turn_is_read(key, value, weight):
    assert weights(answer(**{key: value}), answer()) == [weight, 1.0]


@pytest.mark.parametrize("value", [True, 1])
def test_a_masked_turn_is_not_supervised(value):
    assert weights(answer(masked=value), answer()) == [0.0, 1.0]


@pytest.mark.parametrize("value", [False, 0, None])
def test_a_turn_that_is_not_masked_has_no_weight(value):
    turns = [{"role": "user", "content": "Hi", "masked": value}, answer(masked=value)]
    assert weights(*turns) is None


@pytest.mark.parametrize("key", [*FLAGS, "masked"])
@pytest.mark.parametrize("value", ["no", 2, 0.5, [], float("nan")], ids=repr)
def test_a_flag_that_is_neither_true_nor_false_is_refused(key, value):
    with pytest.raises(DataError, match=f"rows.jsonl:7: '{key}' should be true or false, or 1 or 0"):
        weights(answer(**{key: value}))


def test_keys_that_disagree_are_refused_and_those_that_agree_are_not():
    with pytest.raises(DataError, match="'train': True and 'masked': True disagree"):
        weights(answer(train=True, masked=True))
    assert read_weight(ROW, {"weight": 0, "train": False, "masked": True}) == 0


@pytest.mark.parametrize("role", ["system", "user", "tool"])
@pytest.mark.parametrize("key", ["loss", "trainable", "loss_scale"])
def test_a_mask_does_not_make_a_prompt_supervised(role, key):
    with pytest.raises(DataError, match=f"a {role} turn has weight 1.0; only assistant turns can be trained on"):
        weights({"role": role, "content": "Hi", key: 1})


# Parts.


def test_parts_with_masks_are_stretches_of_one_text(seed):
    rng = random.Random(seed)
    said = ["".join(rng.choices("ab \n", k=rng.randrange(1, 9))) for _ in range(4)]
    turn = answer([text(said[0], train=False), text(said[1]), text(said[2], weight=0.5), said[3]])
    (found,) = weights(turn)
    assert content(turn) == "".join(said)
    assert found.rest == 1.0
    assert [(content(turn)[begin:end], weight) for _, begin, end, weight in found.parts] == list(
        zip(said, [0.0, 1.0, 0.5, 1.0], strict=True)
    )


def test_parts_without_masks_are_joined_by_lines():
    assert content(answer([text("one"), text("two")])) == "one\ntwo"


def test_reasoning_may_be_masked_by_itself():
    turn = answer([{"type": "reasoning", "text": "Hm.", "loss": 0}, text("4")])
    assert weights(turn) == [PartWeights([("content", 0, 1, 1.0), ("reasoning_content", 0, 3, 0.0)])]


def test_a_turns_weight_is_that_of_its_parts_without_one():
    turn = answer([text("a", weight=1), text("b")], weight=0.5)
    assert weights(turn) == [PartWeights([("content", 0, 1, 1.0), ("content", 1, 2, 0.5)], 0.5)]


def test_parts_that_are_all_masked_mask_the_turn():
    assert weights(answer([text("a", train=False), text("b", masked=True)])) == [0.0]


def test_a_call_beside_masked_parts_is_supervised():
    call = {"type": "tool_call", "value": {"name": "f", "arguments": {}}}
    assert weights(answer([text("a", train=False), call])) == [PartWeights([("content", 0, 1, 0.0)], 1.0)]


def test_a_call_that_is_masked_by_itself_is_refused():
    call = {"type": "tool_call", "value": {"name": "f", "arguments": {}}, "train": False}
    with pytest.raises(DataError, match="a part that is a call has a weight; set the weight of the whole turn instead"):
        weights(answer([text("a"), call]))


def test_a_part_of_a_question_may_not_be_supervised():
    with pytest.raises(DataError, match="a user turn has weight 1.0"):
        weights({"role": "user", "content": [text("a", train=True), text("b", train=False)]})


@pytest.mark.parametrize("key", ["train_detail", "training_detail"])
def test_stretches_of_characters_are_read_with_their_last_one(key):
    details = [
        {"begin_offset": 0, "end_offset": 3, "train": False},
        {"begin_offset": 5, "end_offset": 5, "train": True},
    ]
    assert weights(answer("draft: x", **{key: details})) == [
        PartWeights([("content", 0, 4, 0.0), ("content", 5, 6, 1.0)])
    ]


@pytest.mark.parametrize(
    ("detail", "problem"),
    [
        ({"begin_offset": 0, "end_offset": 4, "train": False}, "has characters 0 to 4, but the content has 4"),
        ({"begin_offset": 3, "end_offset": 1, "train": False}, "has characters 3 to 1"),
        ({"begin_offset": 0, "end_offset": 1}, "should have begin_offset, end_offset and train"),
        ({"begin_offset": "0", "end_offset": 1, "train": True}, "should have begin_offset"),
        ("all", "should have begin_offset"),
    ],
)
def test_stretches_that_are_none_are_refused(detail, problem):
    with pytest.raises(DataError, match=f"rows.jsonl:7: 'train_detail' {problem}"):
        weights(answer("four", train_detail=[detail]))


def stretch(begin, end, train):
    return {"begin_offset": begin, "end_offset": end, "train": train}


@pytest.mark.parametrize(
    ("said", "stretches", "where"),
    [
        ([text("hello", train=False)], [stretch(0, 3, True)], "characters 0 to 3 of its content"),
        ([text("a"), text("bcd", loss=1)], [stretch(3, 3, 0.5)], "characters 3 to 3 of its content"),
        ("hello there", [stretch(0, 9, True), stretch(2, 3, True), stretch(5, 6, False)], "characters 5 to 6"),
        ("hello there", [stretch(4, 8, 0.5), stretch(0, 4, False)], "characters 4 to 4"),
    ],
    ids=["part", "part after", "inside", "edge"],
)
def test_masks_of_one_stretch_that_disagree_are_refused(said, stretches, where):
    with pytest.raises(DataError, match=f"rows.jsonl:7: two masks of one turn disagree on {where}"):
        weights(answer(said, train_detail=stretches[:1], training_detail=stretches[1:]))


def test_masks_of_one_stretch_may_agree():
    said = [text("hello", train=False), text(" there")]
    (found,) = weights(answer(said, train_detail=[stretch(0, 4, False), stretch(3, 4, 0), stretch(5, 6, True)]))
    masked = {place for _, begin, end, weight in found.parts if not weight for place in range(begin, end)}
    assert masked == set(range(5))


@pytest.mark.parametrize("role", ["system", "user", "tool"])
@pytest.mark.parametrize(
    "keys",
    [
        {"content": [text("a", train=True), text("b")]},
        {"train_detail": {"begin_offset": 0, "end_offset": 0, "loss": 1}},
    ],
    ids=["part", "stretch"],
)
def test_no_stretch_of_a_prompt_may_be_supervised(role, keys):
    with pytest.raises(DataError, match=f"a {role} turn has weight 1.0; only assistant turns can be trained on"):
        weights({"role": role, "content": "Hi", **keys})


def test_a_masked_part_of_a_question_may_be_next_to_one_without_a_mask():
    assert weights({"role": "user", "content": [text("a", train=False), text("b")]}, answer(loss=0))[1] == 0.0


@pytest.mark.parametrize("inner", [True, False])
def test_a_call_with_a_weight_is_refused(inner):
    function = {"name": "f", "arguments": {}}
    call = {"function": function | {"train": False}} if inner else {"function": function, "train": False}
    with pytest.raises(DataError, match="rows.jsonl:7: a call has a weight; set the weight of the whole turn instead"):
        weights(answer("", tool_calls=[call]))


# Supervised tokens of rows.


def read(format="auto", **row):
    return RowReader(format).read(Row(row, "rows.jsonl:7"))


def supervised(example, loss_on="assistant"):
    """The supervised texts of an example, one list for each document."""
    chatml = encoder("chatml", loss_on, add_bos=False)
    return [supervised_texts(chatml, document) for document in encode(chatml, example).documents]


def test_masks_of_a_tree_of_replies_are_read():
    draft = {"role": "assistant", "text": "draft", "train": False}
    again = {"role": "prompter", "text": "Again?", "replies": [{"role": "assistant", "text": "good"}]}
    tree = {"role": "prompter", "text": "Rain?", "replies": [draft | {"replies": [again]}]}
    assert supervised(read(message_tree_id="x", prompt=tree)) == [["good<|im_end|>"]]


PARTS = [text("draft ", train=False), text("good")]


def test_masked_parts_of_judged_answers_are_not_supervised():
    pair = read(prompt="Rain?", chosen=[answer(PARTS)], rejected=[answer("bad")])
    assert supervised(pair) == [["good<|im_end|>"], ["bad<|im_end|>"]]
    rated = read(label=True, prompt=[{"role": "user", "content": "Rain?"}], completion=[answer(PARTS)])
    assert supervised(rated) == [["good<|im_end|>"]]


def test_a_judged_answer_that_is_masked_is_refused():
    asked = [{"role": "user", "content": "Rain?"}]
    rated = read(label=False, messages=[*asked, answer("first"), *asked, answer("No.", train=False)])
    with pytest.raises(DataError, match="the answer that was rated has weight 0.*remove the mask"):
        supervised(rated)


@pytest.mark.parametrize("key", ["train", "loss", "weight"])
def test_masked_questions_are_not_supervised_where_everything_else_is(key):
    system, question = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Rain?"}
    row = read(messages=[system | {key: 0}, question, answer("No."), question | {key: 0}, answer("Yes.", weight=0.5)])
    first, second = supervised(row, "all")[0]
    assert first == "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>"
    assert second == "<|im_start|>assistant\nYes.<|im_end|>"


def test_a_masked_part_of_a_question_is_refused_where_everything_is_supervised():
    row = read(messages=[{"role": "user", "content": [text("a", train=False), text("b")]}, answer()])
    assert supervised(row) == [["Ho<|im_end|>"]]
    with pytest.raises(
        DataError, match="loss_on: all doesn't support masks of parts of a user turn; mask the whole turn"
    ):
        supervised(row, "all")


# Keys that nothing reads.


def test_unknown_keys_of_turns_and_parts_are_noted():
    reader = TurnReader({}, {})
    reader.read_all(
        ROW,
        "messages",
        [
            {"role": "user", "content": "Hi", "name": "Ann", "lang": None},
            answer([text("Ho", cache_control={}), {"type": "text", "text": "Hm", "los": False}], los=0),
            {"role": "tool", "content": "5", "name": "add", "tool_call_id": "c", "cost": 3},
        ],
    )
    assert reader.unread == {"name", "cache_control", "los", "cost"}


def test_unknown_keys_of_calls_and_stretches_are_noted():
    reader = TurnReader({}, {})
    call = {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": {"a": 1}, "strict": True}}
    reader.read_all(ROW, "messages", [answer(tool_calls=[call], train_detail=stretch(0, 0, False) | {"note": "x"})])
    assert reader.unread == {"index", "strict", "note"}


def test_all_that_is_read_is_not_noted():
    reader = TurnReader({"role": "speaker"}, {})
    keys = {"reasoning": "Hm.", "tool_calls": [{"name": "f"}], "weight": 1, "train_detail": None}
    reader.read_all(ROW, "messages", [{"speaker": "gpt", "value": "Ho", **keys}])
    assert reader.unread == set()
