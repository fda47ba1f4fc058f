"""Tables with and without a header: how this is decided, reported, and refused if ambiguous."""

import itertools

import pytest

from qlora.data import EncodeOptions, Source, build_datasets
from qlora.data.formats import COLUMNS
from qlora.data.rows import BadRow, read_rows
from qlora.data.tables import HeaderRule
from qlora.errors import DataError
from tests.tiny import make_tokenizer, write_jsonl

PAIRS = [("Where do otters sleep?", "Afloat."), ("How many legs has a wasp?", "Six, like any insect.")]
BY_NUMBER = {"instruction": "0", "output": "1"}
BY_NAME = {"instruction": "ask", "output": "tell"}


def write_table(path, header, rows=PAIRS):
    """A table of the kind that the name says, every field quoted."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    lines = [delimiter.join(f'"{field}"' for field in row) for row in ([header] if header else []) + list(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def build(*sources):
    built = build_datasets(make_tokenizer(), sources, options=EncodeOptions(max_seq_len=500))
    decode = make_tokenizer().decode
    return built, [decode(example.input_ids) for example in built.train]


def refusal(path, **how):
    with pytest.raises(DataError) as caught:
        build(Source(str(path), **how))
    return str(caught.value)


@pytest.fixture(params=["pairs.csv", "pairs.tsv"])
def path(request, tmp_path):
    return tmp_path / request.param


@pytest.mark.parametrize(("header", "columns", "setting", "note"), [
    (("instruction", "output"), {}, "auto", "a header, because it names instruction, output"),
    (("id", "output"), {"instruction": "id"}, "auto", "a header, because it names id, output"),
    (("ask", "tell"), BY_NAME, "auto", "a header, because it names ask, tell"),
    (None, BY_NUMBER, "auto", "data, because columns are mapped by number"),
    (("ask", "tell"), BY_NAME, True, None),
    (("1", "0"), {"instruction": "1", "output": "0"}, True, None),
    (("1", "0"), {"instruction": "1", "output": "0"}, "auto", "a header, because it names 1, 0"),
    (None, BY_NUMBER, False, None),
])  # fmt: skip
def test_no_row_is_lost_and_no_header_is_trained_on(path, header, columns, setting, note):
    built, texts = build(Source(str(write_table(path, header)), columns=columns, header=setting))
    assert len(texts) == len(PAIRS)
    for text, (question, answer) in zip(texts, PAIRS, strict=True):
        assert question in text
        assert text.endswith(f"{answer}</s>")
    report = built.reports[0]
    assert (report.rows, report.bad_rows, report.format) == (2, 0, "alpaca")
    assert report.notes == ([] if note is None else [f"header: auto: the first line is {note}"])


@pytest.mark.parametrize("header", [None, ("ask", "tell")])
def test_a_first_line_that_names_nothing_is_refused_with_both_remedies(path, header):
    message = refusal(write_table(path, header))
    first = header or PAIRS[0]
    assert f"{path}:1: the first line has no column name that is read, so it may be a header or a row" in message
    assert repr(list(first)) in message
    assert "header: true and map the names with columns" in message
    assert "header: false and map the columns by number, as {instruction: 0, output: 1}" in message


def test_a_first_line_that_contradicts_the_mapping_is_refused(path):
    message = refusal(write_table(path, ("instruction", "output")), columns=BY_NUMBER)
    assert message == (
        f"{path}:1: the first line names instruction, output, but columns maps by number (0, 1); set header: true or "
        "header: false for this source."
    )


def test_a_header_may_be_read_as_a_row_if_requested(path):
    _, texts = build(Source(str(write_table(path, ("text", "label"))), columns=BY_NUMBER, header=False))
    assert len(texts) == 3
    assert texts[0].endswith("label</s>")


def test_rows_of_another_width_than_the_first_are_reported(path):
    write_table(path, None, [*PAIRS, ("alone",), PAIRS[0]])
    rows = list(read_rows(Source(str(path), header=False), HeaderRule(False, ())))
    assert rows[2] == BadRow(f"{path}:3", "1 fields, but the first row has 2.")
    assert [list(row.values) for row in rows if not isinstance(row, BadRow)] == [["0", "1"]] * 3


def test_each_file_of_a_folder_decides_for_itself(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, header in (("a.csv", ("instruction", "output")), ("b.csv", ("output", "instruction", "id"))):
        write_table(folder / name, header, [row + ("7",) * (len(header) - 2) for row in PAIRS])
    built, texts = build(Source(str(folder)))
    assert len(texts) == 4
    assert built.reports[0].notes == [
        "files read: a.csv, b.csv",
        "header: auto: the first line is a header, because it names instruction, output (1 file)",
        "header: auto: the first line is a header, because it names output, instruction (1 file)",
    ]


def test_a_header_is_not_for_other_kinds_of_file(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert (
        refusal(path, header=False) == f"{path}: header applies to CSV and TSV files, and it has none; remove header."
    )


@pytest.mark.parametrize("setting", ["auto", True, False])
@pytest.mark.parametrize(("fields", "mapped"), itertools.product(
    [["text", "x"], ["x", "y"], ["0", "text"], ["0", "1"], [""]], [[], ["0"], ["x"], ["x", "1"]]
))  # fmt: skip
def test_auto_decides_by_names_and_numbers_alone(fields, mapped, setting):
    """The rule, written out a second time: names speak for a header, numbers that are no names for a row."""
    rule = HeaderRule(setting, mapped, COLUMNS)
    named = any(field in (*mapped, "text") for field in fields)
    numbered = any(name.isdecimal() and name not in fields for name in mapped)
    if setting != "auto":
        assert rule.is_header(fields, "t:1") is setting
        assert rule.notes() == []
    elif named == numbered:
        with pytest.raises(DataError, match="^t:1: the first line "):
            rule.is_header(fields, "t:1")
    else:
        assert rule.is_header(fields, "t:1") is named
        assert len(rule.notes()) == 1


def test_a_real_table_is_read_with_its_header_and_without(realdata, tmp_path):
    real = realdata / "data" / "banking77" / "test.csv"
    built, texts = build(Source(str(real)))
    cut = tmp_path / "cut.csv"
    cut.write_bytes(real.read_bytes().partition(b"\n")[2])
    by_number, cut_texts = build(Source(str(cut), columns={"text": "0"}))
    assert len(texts) == 3080
    assert cut_texts == texts
    assert "a header, because it names text" in built.reports[0].notes[0]
    assert "data, because columns are mapped by number" in by_number.reports[0].notes[0]
    assert "it may be a header or a row" in refusal(cut)
