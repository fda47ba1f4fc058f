"""JSON of any layout, read value by value, for any position of the block borders."""

import io
import json
import random
from itertools import islice
from pathlib import Path

import pytest

from qlora.data import json_rows
from qlora.data.json_rows import json_lines, json_values, starts_lines
from qlora.errors import DataError
from qlora.files.json_values import MAX_DEPTH, parse_value

ALPHABET = 'ab \t"\\/,:[]{}é漢🙂\u2028\x85\x0b\x1c\r\n\ud83d'
FILE = Path("rows.json")
BLOCKS = [1, 2, 3, 5, 17, 1 << 20]


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def random_text(rng):
    return "".join(rng.choices(ALPHABET, k=rng.randrange(12)))


def random_value(rng, depth=4):
    kind = rng.randrange(8 if depth else 6)
    if kind == 7:
        return {random_text(rng): random_value(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind == 6:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    number = rng.uniform(-1, 1) * 10.0 ** rng.randrange(-30, 30)
    return [None, True, rng.randrange(-(10**12), 10**12), number, random_text(rng), random_text(rng)][kind]


def random_values(rng):
    return [random_value(rng) for _ in range(rng.randrange(1, 9))]


def read(text):
    return list(json_values(io.StringIO(text, newline=""), FILE))


def refusal(text):
    with pytest.raises(DataError) as caught:
        read(text)
    return str(caught.value)


class CountingStream(io.StringIO):
    """A stream that counts the characters read."""

    characters = 0

    def read(self, size=-1):
        part = super().read(size)
        self.characters += len(part)
        return part

    def readline(self, size=-1):
        part = super().readline(size)
        self.characters += len(part)
        return part


@pytest.fixture(params=BLOCKS)
def block(request, monkeypatch):
    monkeypatch.setattr(json_rows, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("around", ["", "\n \r\n\t"])
def test_an_array_gives_back_what_was_written(block, rng, around, indent, ensure_ascii):
    values = random_values(rng)
    assert read(around + json.dumps(values, indent=indent, ensure_ascii=ensure_ascii) + around) == values


@pytest.mark.parametrize("between", ["\n", ",", " , \r\n", "\n\n"])
def test_values_that_follow_one_another_are_read(block, rng, between):
    objects = [{"a": value} for value in random_values(rng)]
    assert read(between.join(json.dumps(value, indent=1) for value in objects)) == objects


@pytest.mark.parametrize("number", ["12345", "-1.5", "1e5", "1.25e+10", "1E-7", "-Infinity", "true", "null"])
def test_a_number_is_not_cut_where_a_block_ends(block, number):
    assert read(f"[{number}, {number}]") == [json.loads(number)] * 2
    assert read(number) == [json.loads(number)]


@pytest.mark.parametrize("text", ["", " \n ", "[]", "\n[ \n]\n"])
def test_nothing_is_no_value(block, text):
    assert read(text) == []


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', 3, "Expecting value"),
        ('[\n{"a": 1},\n{"a": "x\n"}]', 3, "Invalid control character"),
        ('[\n{"a": 1},\n\n{"a": "x', 4, "Unterminated string"),
        ('[\n{"a": 1}\n', 3, "the array does not end"),
        ('[{"a": 1}]\n\n{"a": 2}', 3, "something follows the end of the array"),
        ('[{"a": 1}]]', 1, "something follows the end of the array"),
        ("{'a': 1}", 1, "property name"),
        ('\n\n{"a": 1', 3, "Expecting ',' delimiter"),
        ('{"a": 1}\n]', 2, "Expecting value"),
    ],
)
def test_broken_json_is_reported_with_its_line(block, text, line, problem):
    message = refusal(text)
    assert message.startswith(f"rows.json:{line}: broken JSON: ")
    assert problem in message


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a":' * 100_000, "[" * 200 + "]" * 200, "1" * 10_000])
def test_values_that_break_what_walks_through_them_are_refused(value):
    assert "rows.json:2: broken JSON" in refusal(f'[\n{{"a": {value}}}]')
    ((number, _, problem),) = json_lines(io.StringIO(f'{{"a": {value}}}'), FILE)
    assert number == 1
    assert "nested too deeply" in problem or "too many digits" in problem


def test_many_brackets_are_not_deep():
    wide = [[{}] for _ in range(3 * MAX_DEPTH)]
    deep = json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_value(json.dumps(wide)) == wide
    assert parse_value(json.dumps(deep)) == deep
    assert read(json.dumps([wide, deep[0]])) == [wide, deep[0]]


@pytest.mark.parametrize("text", ["1 2", "{} x", "", " ", "[1", "\x0b1", "{}\u2028"])
def test_one_value_is_one_value(text):
    with pytest.raises(json.JSONDecodeError):
        parse_value(text)
    assert parse_value(' \t\r\n{"a": [1]} \n') == {"a": [1]}


@pytest.mark.parametrize("indent", [None, 1])
def test_a_large_array_is_not_read_whole_before_its_first_value(monkeypatch, indent):
    monkeypatch.setattr(json_rows, "BLOCK", 1000)
    text = json.dumps([{"a": number} for number in range(20_000)], indent=indent)
    stream = CountingStream(text)
    assert not starts_lines(stream)
    assert stream.characters <= 1000
    stream = CountingStream(text)
    values = json_values(stream, FILE)
    assert list(islice(values, 10)) == [{"a": number} for number in range(10)]
    assert stream.characters <= 1000


def test_a_mistake_early_in_a_large_array_is_reported_without_reading_the_rest(monkeypatch):
    monkeypatch.setattr(json_rows, "BLOCK", 1000)
    stream = CountingStream('[\n{"a" 1},\n' + '{"b": "c"},\n' * 10_000 + "]")
    with pytest.raises(DataError, match=r"rows\.json:2: broken JSON: Expecting ':' delimiter"):
        list(json_values(stream, FILE))
    assert stream.characters <= 1000


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"a": 1}\n{"a": 2}\n', True),
        ('\n \n{"a": 1}\r\n', True),
        ('{"a": 1}', True),
        ('"words"\n', True),
        ('{"a": 1,}\n{"a": 2}\n', True),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}\n{}", True),
        ('{"a": ' + "1" * 5000 + "}\n{}", True),
        ("[\n", False),
        (" \n [1]\n", False),
        ("{\n", False),
        ('{"a":\n1}', False),
        ("", False),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_on_each_line_is_distinguished_from_other_layouts(block, text, answer):
    assert starts_lines(io.StringIO(text, newline="")) is answer


def test_lines_are_read_each_for_itself(rng):
    values = [{"a": value} for value in random_values(rng)]
    lines = [json.dumps(value) for value in values]
    broken = rng.randrange(len(lines))
    text = "\n\n".join([*lines[:broken], "{oops}", *lines[broken:]])
    found = list(json_lines(io.StringIO(text), FILE))
    assert [value for _, value, problem in found if not problem] == values
    assert [number for number, _, _ in found] == list(range(1, 2 * len(found), 2))
    assert found[broken] == (
        2 * broken + 1,
        None,
        "broken JSON: Expecting property name enclosed in double quotes (column 2).",
    )
