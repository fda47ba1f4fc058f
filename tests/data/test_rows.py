"""Rows of files, folders and datasets: what is read, and what is refused with its line."""

import csv
import gzip
import io
import json
import random
import re
import sys

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data import rows as rows_module
from qlora.data.rows import BadRow, Row, read_rows
from qlora.data.sources import Source, find_files
from qlora.data.tables import HeaderRule
from qlora.errors import ConfigError, DataError
from tests.tiny import write_jsonl

# Names of columns that nothing knows are a table's header here.
RULE = HeaderRule(header=True, mapped=[])

ALPHABET = 'abc \t"\\/é漢🙂\u2028\u2029\x85\x0b\x0c\x1c\r\n'


@pytest.fixture
def rng(seed):
    return random.Random(seed)


@pytest.fixture
def rows(rng):
    """Rows of random columns and values, with characters that are easily lost."""
    return [
        {"a": "".join(rng.choices(ALPHABET, k=rng.randrange(40))), "b": rng.randrange(99), "c": [{"d": None}]}
        for _ in range(rng.randrange(1, 30))
    ]


def read(path, **how):
    """All rows of a file."""
    source = Source(str(path), **how)
    return list(read_rows(source, RULE))


def values(path, **how):
    return [row.values for row in read(path, **how)]


def refusal(path, **how):
    with pytest.raises(DataError) as caught:
        read(path, **how)
    return str(caught.value)


def write(path, content, encoding="utf-8"):
    """Write text or bytes, compressed if the suffix is .gz."""
    content = content if isinstance(content, bytes) else content.encode(encoding)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def table(rows, delimiter=",", lineterminator="\r\n"):
    text = io.StringIO()
    # A writer that ends lines with \n puts no quotes around a lone \r.
    quoting = csv.QUOTE_ALL if lineterminator == "\n" else csv.QUOTE_MINIMAL
    writer = csv.writer(text, delimiter=delimiter, lineterminator=lineterminator, quoting=quoting)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


# Lines and arrays.


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz"])
def test_json_lines_give_back_what_was_written(tmp_path, rows, suffix, mark, newline, ensure_ascii):
    text = mark + "".join(json.dumps(row, ensure_ascii=ensure_ascii) + newline for row in rows)
    assert values(write(tmp_path / f"rows{suffix}", text)) == rows


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_json_array_gives_back_what_was_written(tmp_path, rows, suffix, indent, mark, ensure_ascii):
    text = mark + "\n" + json.dumps(rows, indent=indent, ensure_ascii=ensure_ascii)
    assert values(write(tmp_path / f"rows{suffix}", text)) == rows


def test_a_json_file_may_hold_one_object(tmp_path):
    assert values(write(tmp_path / "row.json", json.dumps({"a": [1, 2]}, indent=2))) == [{"a": [1, 2]}]


def test_blank_lines_and_a_missing_last_newline_do_not_matter(tmp_path):
    assert values(write(tmp_path / "rows.jsonl", '\n{"a": 1}\n\n  \n{"a": 2}')) == [{"a": 1}, {"a": 2}]


def test_line_separators_inside_strings_end_no_line(tmp_path):
    text = "one\u2028two\u2029three\x85four"
    assert values(write(tmp_path / "rows.jsonl", json.dumps({"text": text}, ensure_ascii=False))) == [{"text": text}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_strings_are_rows_of_text(tmp_path, name):
    assert values(write(tmp_path / name, '"one"\n"two"\n')) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "lines", "origins"),
    [
        ("rows.jsonl", '{"a": 1}\n\n{"a": 2}\n', ["rows.jsonl:1", "rows.jsonl:3"]),
        ("rows.json", '[{"a": 1},\n\n{"a": 2}]', ["rows.json row 1", "rows.json row 2"]),
        ("rows.csv", 'a\n"1\n\n"\n\n2\n', ["rows.csv:2", "rows.csv:6"]),
        ("rows.tsv", "a\n1\n2\n", ["rows.tsv:2", "rows.tsv:3"]),
        ("book.txt", "1\n2\n", ["book.txt"]),
    ],
)
def test_a_row_knows_where_it_came_from(tmp_path, name, lines, origins):
    found = [row.origin for row in read(write(tmp_path / name, lines))]
    assert found == [f"{tmp_path}/{origin}" for origin in origins]


def test_broken_lines_are_reported_and_the_others_are_read(tmp_path, rng):
    lines = [json.dumps({"a": number}) for number in range(20)]
    broken = set(rng.sample(range(1, 20), k=5))
    for number in broken:
        lines[number] = lines[number][: rng.randrange(1, 7)]
    path = write(tmp_path / "rows.jsonl", "\n".join(lines))
    found = read(path)
    assert {n for n, row in enumerate(found) if isinstance(row, BadRow)} == broken
    assert [row.values["a"] for row in found if isinstance(row, Row)] == sorted(set(range(20)) - broken)
    for number in broken:
        assert found[number].origin == f"{path}:{number + 1}"
        assert found[number].problem.startswith("broken JSON: ")


@pytest.mark.parametrize("value", ["[1, 2]", "3", "null", "true", "1.5"])
@pytest.mark.parametrize(
    ("name", "form", "origin"),
    [("rows.jsonl", '{{"a": 1}}\n{}\n', "rows.jsonl:2"), ("rows.json", '[{{"a": 1}}, {}]', "rows.json row 2")],
)
def test_a_row_that_is_no_object_is_reported(tmp_path, value, name, form, origin):
    good, bad = read(write(tmp_path / name, form.format(value)))
    assert good.values == {"a": 1}
    assert bad.origin == f"{tmp_path}/{origin}"
    assert bad.problem.endswith(f"not {json.loads(value)!r}.")


@pytest.mark.parametrize(("text", "line"), [('[\n{"a": 1},\n{"a": }\n]', 3), ('[\n{"a": 1},\n', 3), ("[{}]\nx", 2)])
def test_a_broken_array_is_refused_with_the_line(tmp_path, text, line):
    path = write(tmp_path / "rows.json", text)
    assert refusal(path).startswith(f"{path}:{line}: broken JSON")


# Tables.


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".tsv.gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
def test_a_table_gives_back_what_was_written(tmp_path, rng, suffix, mark, lineterminator):
    rows = [
        {name: "".join(rng.choices(ALPHABET + ",", k=rng.randrange(20))) for name in ("text", 'a "b"')}
        for _ in range(rng.randrange(1, 30))
    ]
    text = mark + table(rows, "\t" if "tsv" in suffix else ",", lineterminator)
    assert values(write(tmp_path / f"rows{suffix}", text)) == rows


def test_a_field_may_be_long(tmp_path):
    rows = [{"text": "long " * 100_000}]
    assert values(write(tmp_path / "rows.csv", table(rows))) == rows


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1", "1 fields, but the header names 2."),
        ("1,2,3", "3 fields, but the header names 2."),
        ('"1"x,2', "broken CSV: ',' expected after '\"'."),
    ],
)
def test_a_broken_line_of_a_table_is_reported_and_the_others_are_read(tmp_path, line, problem):
    path = write(tmp_path / "rows.csv", f"a,b\n1,2\n{line}\n\n3,4\n")
    assert read(path) == [
        Row({"a": "1", "b": "2"}, f"{path}:2"),
        BadRow(f"{path}:3", problem),
        Row({"a": "3", "b": "4"}, f"{path}:5"),
    ]


def test_a_quote_that_is_not_closed_is_reported_where_it_begins(tmp_path):
    path = write(tmp_path / "rows.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n')
    assert read(path)[1:] == [BadRow(f"{path}:3", "broken CSV: unexpected end of data.")]


@pytest.mark.parametrize(
    ("header", "problem"), [("a,b,a", "names a column twice: a, b, a"), ('"a"b,c', "broken CSV header")]
)
def test_a_header_that_cannot_be_used_is_refused(tmp_path, header, problem):
    message = refusal(write(tmp_path / "rows.csv", f"\n{header}\n1,2,3\n"))
    assert message.startswith(f"{tmp_path}/rows.csv:2")
    assert problem in message


# Text.


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_a_text_file_is_one_row(tmp_path, name, mark, newline):
    text = "Some words.\n\nMore.\n"
    assert values(write(tmp_path / name, mark + text.replace("\n", newline))) == [{"text": text}]


def test_a_text_too_large_for_one_document_is_refused_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_CHARACTERS", 100)
    assert values(write(tmp_path / "book.txt", "x" * 100)) == [{"text": "x" * 100}]
    message = refusal(write(tmp_path / "book.txt", "x" * 101))
    assert str(tmp_path / "book.txt") in message
    assert "type: lines" in message


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["corpus.txt", "corpus.all", "corpus.gz"])
def test_lines_may_be_rows_of_text(tmp_path, name, newline):
    path = write(tmp_path / name, newline.join(["one ", "", " two\u2028", "\t", "three"]))
    assert read(path, type="lines") == [
        Row({"text": "one "}, f"{path}:1"),
        Row({"text": " two\u2028"}, f"{path}:3"),
        Row({"text": "three"}, f"{path}:5"),
    ]


# What a file holds, and in which encoding.


@pytest.mark.parametrize(
    ("type", "text"),
    [("json", '[{"a": "1"}]'), ("jsonl", '{"a": "1"}'), ("csv", "a\n1\n"), ("tsv", "a\n1\n")],
)
def test_a_type_replaces_an_unknown_suffix(tmp_path, type, text):
    assert values(write(tmp_path / "rows.data", text), type=type) == [{"a": "1"}]
    assert values(write(tmp_path / "rows.txt.gz", text), type=type) == [{"a": "1"}]


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.JSONL.zip", "rows.gz"])
def test_a_file_of_an_unknown_kind_is_refused_with_the_known_ones(tmp_path, name):
    message = refusal(write(tmp_path / name, "a,b\n1,2\n"))
    assert message.startswith(str(tmp_path / name))
    assert ".json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .txt" in message
    assert "type to one of arrow, csv, json, jsonl, lines, parquet, text, tsv" in message


def test_an_unknown_type_is_refused_with_the_known_ones(tmp_path):
    message = refusal(write(tmp_path / "rows.json", "[]"), type="excel")
    assert "type 'excel' is unknown" in message
    assert "lines" in message


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "cp1252", "UTF8", "utf_8_sig"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", '{"text": "größer"}\n'),
        ("rows.json", '[{"text": "größer"}]'),
        ("rows.csv", "text\ngrößer\n"),
        ("book.txt", "größer"),
        ("book.txt.gz", "größer"),
    ],
)
def test_an_encoding_can_be_set(tmp_path, name, text, encoding):
    assert values(write(tmp_path / name, text, encoding), encoding=encoding) == [{"text": "größer"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "book.txt", "rows.jsonl.gz"])
def test_bytes_of_another_encoding_are_refused_with_the_line(tmp_path, name):
    path = write(tmp_path / name, '"one"\n"größer"\n', "latin-1")
    message = refusal(path)
    assert message.startswith(f"{path}:2: invalid utf-8 (byte 0xf6 at position 4 of the line)")
    assert "set encoding" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_recognized_by_its_mark(tmp_path, encoding):
    text = "\ufeff" * (encoding != "utf-16") + '{"text": "größer"}'
    message = refusal(write(tmp_path / "rows.jsonl", text, encoding))
    assert message == f"{tmp_path}/rows.jsonl is UTF-16; set encoding: utf-16 for this source."


def test_truncated_utf16_is_not_called_utf16(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"text": "größer"}'.encode("utf-16")[:-1])
    assert refusal(path, encoding="utf-16").startswith(f"{path} is not utf-16; convert it")


@pytest.mark.parametrize("encoding", ["utf-9", "hex", "", "a\0b", "undefined"])
def test_an_unknown_encoding_is_named(tmp_path, encoding):
    path = write(tmp_path / "rows.jsonl", '{"a": 1}')
    assert f"encoding: '{encoding}' is unknown" in refusal(path, encoding=encoding)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-20],
        lambda packed: b"no gzip" + packed,
        lambda packed: packed[:20] + bytes(byte ^ 0xFF for byte in packed[20:]),
    ],
    ids=["truncated", "no gzip", "garbled"],
)
@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz", "rows.txt.gz"])
def test_a_broken_gzip_file_is_named(tmp_path, rows, damage, name):
    path = write(tmp_path / name, "\n".join(map(json.dumps, rows * 50)))
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path}: broken gzip file" in refusal(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "book.txt", "book.txt.gz"])
@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"], ids=["empty", "blank", "bom"])
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    message = refusal(write(tmp_path / name, content if name != "rows.tsv" else "a\tb\n"))
    assert f"{tmp_path / name} has no rows" in message


def test_an_empty_array_is_refused(tmp_path):
    assert "has no rows" in refusal(write(tmp_path / "rows.json", "[]"))


def test_rows_come_before_the_file_is_read_whole(tmp_path):
    path = write(tmp_path / "rows.jsonl", b'{"a": 1}\n' * 100_000 + b"\xff")
    assert next(read_rows(Source(str(path)), RULE)) == Row({"a": 1}, f"{path}:1")
    assert f"{path}:100001" in refusal(path)


# Columns.


@pytest.fixture
def columns():
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"turns": [{"role": "user", "content": "Hi", "weight": None}], "label": None},
            {"turns": [{"role": "assistant", "content": None, "weight": 1.0}], "label": True},
        ]
    )


READ_COLUMNS = [
    {"turns": [{"role": "user", "content": "Hi"}]},
    {"turns": [{"role": "assistant", "weight": 1.0}], "label": True},
]


def test_parquet_is_read_without_the_keys_that_rows_lack(tmp_path, columns):
    path = tmp_path / "rows.parquet"
    columns.to_parquet(path)
    assert read(path) == [Row(values, f"{path} row {n}") for n, values in enumerate(READ_COLUMNS, start=1)]


def test_a_folder_that_datasets_saved_is_read_without_its_descriptions(tmp_path, columns):
    columns.save_to_disk(tmp_path / "saved")
    write(tmp_path / "saved" / "cache-0123.arrow", b"what a map() left")
    assert values(tmp_path / "saved") == READ_COLUMNS


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_broken_file_of_columns_is_named(tmp_path, name):
    path = write(tmp_path / name, b"nothing of the kind")
    assert f"{path} can't be read as {path.suffix[1:]}: " in refusal(path)


# Folders.


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of files of one row, which is the file's name."""

    def make(*names):
        for name in names:
            write(tmp_path / "data" / name, json.dumps({"a": name}))
        return tmp_path / "data"

    return make


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["b.jsonl", "a.json", "c.jsonl.gz"], None, ["a.json", "b.jsonl", "c.jsonl.gz"]),
        (["train.jsonl", "valid.jsonl", "test.jsonl", "more.jsonl"], None, ["train.jsonl"]),
        (["train.jsonl", "valid.jsonl", "test.jsonl"], "validation", ["valid.jsonl"]),
        (["train.jsonl", "valid.jsonl", "test.jsonl"], "valid", ["valid.jsonl"]),
        (["train.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"], "train", None),
        (["en/train/0.jsonl", "en/test/0.jsonl"], "test", ["en/test/0.jsonl"]),
        (["training_de.jsonl", "training_en.jsonl"], "de", ["training_de.jsonl"]),
        (["rows.jsonl", "heldout.jsonl"], None, ["rows.jsonl"]),
        (["trainer.jsonl", "latest.jsonl"], None, ["latest.jsonl", "trainer.jsonl"]),
        (["rows.jsonl", "dataset_info.json", "notes.md", ".cache/x.jsonl", ".hidden.jsonl"], None, ["rows.jsonl"]),
    ],
)
def test_the_files_of_a_split_are_read_in_order(folder, names, split, chosen):
    found = [row["a"] for row in values(folder(*names), split=split)]
    assert found == (chosen or names[:2])


@pytest.mark.parametrize(
    ("names", "split", "there"),
    [
        (["test.jsonl", "valid.jsonl"], None, "'train' (it has test.jsonl, valid.jsonl)"),
        (["a.jsonl"], "test", "'test' (it has a.jsonl)"),
        (["readme.md"], None, "'train' (it has nothing)"),
    ],
)
def test_a_folder_without_the_split_is_refused_with_what_is_there(folder, names, split, there):
    path = folder(*names)
    message = refusal(path, split=split)
    assert message.startswith(f"{path} has no data of the split {there}")
    assert "set split" in message


# Names.


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    assert values("~/rows.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/rows.jsonl", "x" * 5000 + ".jsonl"], ids=["home", "long"])
def test_a_name_that_can_be_none_is_reported(name):
    assert refusal(name).startswith(f"{name} can't be read: ")


@pytest.mark.parametrize(
    "source", ["none.jsonl", "data/none.json", "./none", "../none", "/none/rows.csv", "~/none", "rows.jsonl.gz", "a.xz"]
)
def test_a_missing_file_is_named_without_asking_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # the import fails
    with pytest.raises(ConfigError, match=re.escape(f"Data file not found: {source}")):
        read(source)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose datasets all have two rows, and the calls that it received."""
    calls = []

    def load_dataset(name, split, revision):
        calls.append((name, split, revision))
        if name == "owner/secret":
            raise RuntimeError(f"no {name} for you")
        rows = [{"text": "one", "turns": [{"a": None, "b": 0}]}, {"text": "two", "turns": None}]
        return Dataset.from_list(rows)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        (Source("owner/name"), ("owner/name", "train", None)),
        (Source("o/n:test[:5%]"), ("o/n", "test[:5%]", None)),
        (Source("o/n", split="test", revision="abc"), ("o/n", "test", "abc")),
    ],
)
def test_another_name_is_a_data_set_on_the_hub(hub, source, asked):
    assert find_files(source).paths == []
    assert list(read_rows(source, RULE)) == [
        Row({"text": "one", "turns": [{"b": 0}]}, f"{source.path} row 1"),
        Row({"text": "two"}, f"{source.path} row 2"),
    ]
    assert hub == [asked]


def test_what_the_hub_refuses_is_reported(hub):
    message = refusal("owner/secret")
    assert message.startswith("owner/secret is not a local file")
    assert "no owner/secret for you" in message


# Anything.

FRAGMENTS = [
    *(bytes([byte]) for byte in b'{}[]",:\\\n\r\t \xff\x00'),
    *(b'{"a": 1}\n', b'{"text": "x"},', b"a,b\n1,2\n", b'"\\ud83d"', b"null", b"NaN", b"true", b"1e"),
    *(b"[" * 3000, b"9" * 5000, b"\xff\xfe", b"\xef\xbb\xbf", "é🙂".encode(), "é".encode("latin-1")),
]
NAMES = ["rows.json", "rows.jsonl", "rows.csv", "rows.tsv", "rows.txt", "rows.all"]


@settings(max_examples=200, deadline=None)
@given(
    content=st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=4), max_size=12).map(b"".join),
    name=st.sampled_from(NAMES),
    packing=st.sampled_from(["", ".gz", "broken"]),
    encoding=st.sampled_from(["utf-8", "latin-1", "utf-16", "utf-7", "idna"]),
)
def test_whatever_bytes_a_file_holds_it_gives_rows_or_a_refusal(tmp_path_factory, content, name, packing, encoding):
    path = tmp_path_factory.getbasetemp() / f"{name}{'.gz' if packing else ''}"
    path.write_bytes(gzip.compress(content, mtime=0)[:-9] if packing == "broken" else content)
    if packing == ".gz":
        write(path, content)
    source = Source(str(path), encoding=encoding, type="lines" if "all" in name else "auto")
    try:
        shown = [row.origin for row in read_rows(source, HeaderRule("auto", ())) if isinstance(row, Row | BadRow)]
    except DataError as error:
        shown = [str(error)]
    assert shown
    assert [origin for origin in shown if not origin.startswith(str(path))] == []


# Real files.


@pytest.mark.parametrize(
    ("file", "how", "count"),
    [
        ("llama_factory_demo/alpaca_zh_demo.json", {}, 1000),
        ("llama_factory_demo/c4_demo.jsonl", {}, 300),
        ("llama_factory_demo/wiki_demo.txt", {}, 1),
        ("humaneval/HumanEval.jsonl.gz", {}, 164),
        ("banking77/train.csv", {}, 10003),
        ("trec/TREC.train.all", {"type": "lines", "encoding": "latin-1"}, 5452),
        ("trec/TREC.test.all", {"type": "lines"}, 500),
        ("mlx_wikisql_lora", {}, 1000),
        ("mlx_wikisql_lora", {"split": "validation"}, 100),
        ("banking77", {"split": "test"}, 3080),
    ],
)
def test_real_files_are_read_whole(realdata, file, how, count):
    found = read(realdata / "data" / file, **how)
    assert [row for row in found if not isinstance(row, Row)] == []
    assert len(found) == count


def test_a_real_file_of_another_encoding_is_reported_with_its_line(realdata):
    path = realdata / "data" / "trec" / "TREC.train.all"
    number = next(n for n, line in enumerate(path.read_bytes().split(b"\n"), start=1) if max(line, default=0) > 127)
    assert refusal(path, type="lines").startswith(f"{path}:{number}: invalid utf-8")
