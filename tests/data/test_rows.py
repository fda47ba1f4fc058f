"""Files to rows: what is read, and what is refused with the line that is wrong."""

import json
import random
import sys
from types import SimpleNamespace

import pytest

from qlora.data.rows import read_rows
from qlora.errors import DataError
from tests.tiny import write_jsonl


@pytest.fixture
def rows(seed):
    """Rows of random columns and values, with characters that are easily lost."""
    rng = random.Random(seed)
    alphabet = 'abc \t"\\/é漢🙂\u2028\u2029\x85\x0b\x0c\x1c\r\n'
    return [
        {"a": "".join(rng.choices(alphabet, k=rng.randrange(40))), "b": rng.randrange(99), "c": [{"d": None}]}
        for _ in range(rng.randrange(1, 30))
    ]


def values(source):
    return [row.values for row in read_rows(str(source))]


def refusal(source):
    with pytest.raises(DataError) as caught:
        read_rows(str(source))
    return str(caught.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_lines_give_back_what_was_written(tmp_path, rows, suffix, mark, newline, ensure_ascii):
    text = mark + "".join(json.dumps(row, ensure_ascii=ensure_ascii) + newline for row in rows)
    assert values(write(tmp_path / f"rows{suffix}", text)) == rows


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_gives_back_what_was_written(tmp_path, rows, indent, mark, ensure_ascii):
    text = mark + "\n" + json.dumps(rows, indent=indent, ensure_ascii=ensure_ascii)
    assert values(write(tmp_path / "rows.json", text)) == rows


def test_blank_lines_and_a_missing_last_newline_do_not_matter(tmp_path):
    assert values(write(tmp_path / "rows.jsonl", '\n{"a": 1}\n\n  \n{"a": 2}')) == [{"a": 1}, {"a": 2}]


def test_line_separators_inside_strings_end_no_line(tmp_path):
    text = "one\u2028two\u2029three\x85four"
    assert values(write(tmp_path / "rows.jsonl", json.dumps({"text": text}, ensure_ascii=False))) == [{"text": text}]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
def test_a_text_file_is_one_row(tmp_path, mark, newline):
    text = "Some words.\n\nMore.\n"
    assert values(write(tmp_path / "book.txt", mark + text.replace("\n", newline))) == [{"text": text}]


@pytest.mark.parametrize(
    ("name", "lines", "origins"),
    [
        ("rows.jsonl", '{"a": 1}\n\n{"a": 2}\n', ["rows.jsonl:1", "rows.jsonl:3"]),
        ("rows.json", '[{"a": 1},\n\n{"a": 2}]', ["rows.json row 1", "rows.json row 2"]),
    ],
)
def test_a_row_knows_where_it_came_from(tmp_path, name, lines, origins):
    rows = read_rows(str(write(tmp_path / name, lines)))
    assert [row.origin for row in rows] == [f"{tmp_path}/{origin}" for origin in origins]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    assert values("~/rows.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "book.txt"])
@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"], ids=["empty", "blank", "bom"])
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    message = refusal(write(tmp_path / name, content))
    assert f"{tmp_path / name} holds no rows" in message


def test_an_empty_array_is_refused(tmp_path):
    assert "holds no rows" in refusal(write(tmp_path / "rows.json", "[]"))


def test_a_half_broken_file_is_refused_with_the_line(tmp_path, seed):
    rng = random.Random(seed)
    lines = [json.dumps({"a": number}) for number in range(20)]
    broken = rng.randrange(20)
    lines[broken] = lines[broken][: rng.randrange(1, 5)]
    path = write(tmp_path / "rows.jsonl", "\n".join(lines))
    assert f"{path}:{broken + 1}: broken JSON" in refusal(path)


def test_a_broken_array_is_refused_with_the_line(tmp_path):
    path = write(tmp_path / "rows.json", '[\n{"a": 1},\n{"a": }\n]')
    assert f"{path}:3: broken JSON" in refusal(path)


@pytest.mark.parametrize("value", ["[1, 2]", '"words"', "3", "null"])
def test_a_row_that_is_no_object_is_refused(tmp_path, value):
    message = refusal(write(tmp_path / "rows.jsonl", f'{{"a": 1}}\n{value}\n'))
    assert f"{tmp_path}/rows.jsonl:2" in message
    assert "object" in message


def test_an_array_row_that_is_no_object_is_refused(tmp_path):
    assert f"{tmp_path}/rows.json row 2" in refusal(write(tmp_path / "rows.json", '[{"a": 1}, "words"]'))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["rows.jsonl", "book.txt"])
def test_a_file_that_is_not_utf8_is_refused(tmp_path, name, encoding):
    message = refusal(write(tmp_path / name, '{"text": "größer"}'.encode(encoding)))
    assert f"{tmp_path / name} is not UTF-8" in message
    assert "convert" in message


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows", "rows.JSONL.gz"])
def test_a_file_of_an_unknown_kind_is_refused_with_the_known_ones(tmp_path, name):
    message = refusal(write(tmp_path / name, "a,b\n1,2\n"))
    assert str(tmp_path / name) in message
    assert ".json, .jsonl, .txt" in message


@pytest.mark.parametrize("source", ["none.jsonl", "data/none.json", "./none", "../none", "/none/rows.csv", "~/none"])
def test_a_missing_file_is_named_without_asking_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # the import fails
    assert f"Data file not found: {source}" in refusal(source)


def test_a_folder_is_no_data_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    ("source", "asked"), [("owner/name", ("owner/name", "train")), ("o/n:test[:5%]", ("o/n", "test[:5%]"))]
)
def test_another_name_is_a_data_set_on_the_hub(tmp_path, monkeypatch, source, asked):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = [(row.values["text"], row.origin) for row in read_rows(source)]
    assert found == [("one", f"{source} row 1"), ("two", f"{source} row 2")]
    assert calls == [asked]


def test_what_the_hub_refuses_is_told(tmp_path, monkeypatch):
    def load_dataset(name, split):
        raise RuntimeError(f"no {name} for you")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert "no owner/name for you" in refusal("owner/name")


def test_real_files_are_read_whole(realdata):
    folder = realdata / "data"
    assert len(read_rows(str(folder / "llama_factory_demo" / "alpaca_zh_demo.json"))) == 1000
    assert len(read_rows(str(folder / "llama_factory_demo" / "c4_demo.jsonl"))) == 300
    assert len(read_rows(str(folder / "llama_factory_demo" / "wiki_demo.txt"))) == 1
