"""Questions: the prompts that a server feeds, with the answers of the same rows."""

import pytest

from qlora.data import Source, build_datasets, encode_prompt, read_questions
from tests.tiny import make_tokenizer, write_jsonl


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


@pytest.fixture
def ask(tmp_path):
    """Return the questions of rows that are held out, with the tokenizer."""

    def build(rows, count=100, max_length=200, options=None, **source):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        train = write_jsonl(tmp_path / "train.jsonl", [{"text": "some text"}])
        tokenizer = make_tokenizer()
        held_out = [Source(str(path), **source)]
        settings = {"options": options, "cache_dir": str(tmp_path / "cache"), "chat_template": "chatml"}
        datasets = build_datasets(tokenizer, [Source(str(train))], held_out, **settings)
        return tokenizer, *read_questions(tokenizer, datasets, datasets.eval, count, max_length)

    return build


def test_a_conversation_asks_for_its_last_supervised_answer(ask):
    rows = [
        {"messages": [user("Say oak"), assistant("oak")]},
        {"messages": [user("Say tin"), assistant("tin"), user("And fern"), assistant(" fern\n")]},
        {"messages": [user("1"), assistant("one"), user("2"), assistant("two", weight=0)]},
        {"messages": [user("1"), assistant("one"), user("thanks")]},
    ]
    tokenizer, questions, left_out = ask(rows)
    assert left_out == {}
    assert [question.reference for question in questions] == ["oak", " fern\n", "one", "one"]
    turns = [row["messages"] for row in rows]
    prompts = [turns[0][:1], turns[1][:3], [user("1")], [user("1")]]
    assert [question.prompt for question in questions] == [encode_prompt(tokenizer, prompt) for prompt in prompts]


def test_other_formats_with_an_answer(ask):
    tokenizer, (alpaca,), _ = ask([{"instruction": "Add", "input": "1 and 2", "output": "3"}])
    assert alpaca.prompt == encode_prompt(tokenizer, [user("Add\n\n1 and 2")])
    assert alpaca.reference == "3"
    tokenizer, (completion,), _ = ask([{"prompt": "1 + 2 =", "completion": " 3"}])
    assert completion.prompt == tokenizer("1 + 2 =").input_ids  # with BOS, as in training
    assert completion.reference == " 3"
    mapped = {"format": "alpaca", "columns": {"instruction": "q", "output": "a"}}
    _, (renamed,), _ = ask([{"q": "Add", "a": "3"}], **mapped)
    assert renamed.reference == "3"


def test_rows_without_an_answer_in_text_are_left_out(ask):
    rows = [
        {"messages": [user("Say oak"), assistant("oak")]},
        {"messages": [user("x" * 300), assistant("long")]},
        {"messages": [user("Say tin"), assistant("<think>tin, or pewter?</think>")]},
        {"messages": [user("Say fern"), assistant("<think>fern?</think>\n\nfern")]},
    ]
    _, questions, left_out = ask(rows)
    assert [question.reference for question in questions] == ["oak", "\n\nfern"]
    assert left_out == {"a prompt longer than data.max_seq_len": 1, "no answer in text": 1}
    assert ask([{"text": "some text"}])[1:] == ([], {})


def test_rows_are_spread_evenly_and_each_is_asked_once(ask):
    rows = [{"instruction": f"Q{number}", "output": f"A{number}"} for number in range(11)]
    _, questions, _ = ask(rows, count=3)
    assert [question.reference for question in questions] == ["A0", "A5", "A10"]


def test_a_share_of_the_rows_asks_for_those_that_are_held_out(tmp_path):
    rows = [{"instruction": f"Q{number}", "output": f"A{number}"} for number in range(20)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = make_tokenizer()
    datasets = build_datasets(tokenizer, [Source(str(path))], 0.3, cache_dir=str(tmp_path / "cache"))
    questions, _ = read_questions(tokenizer, datasets, datasets.eval, 100, 200)
    held_out = [tokenizer.decode(example.input_ids) for example in datasets.eval]
    assert len(questions) == 6
    for question, text in zip(questions, held_out, strict=True):
        assert text.startswith(tokenizer.decode(question.prompt))
        assert question.reference in text
