"""Tokenized documents on disk: read as they were written, in columns that describe themselves."""

import hashlib
import json
import random

import numpy as np
import pytest

from qlora.data import ExampleSet, make_example
from qlora.data.store import HEADER, Column, ExampleStore, ExampleWriter, find_repeats, read_header
from tests.tiny import only


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def random_examples(rng, count):
    """Ids up to the largest, and weights that fp16 holds."""
    return [
        make_example(
            [rng.randrange(2**31 - 1) for _ in range(length)],
            [rng.choice([0, 0.25, 0.5, 1, 3]) for _ in range(length)],
        )
        for length in (rng.randrange(1, 30) for _ in range(count))
    ]


def write(folder, examples, rows=None, group_size=1, columns=(), values=None):
    """Write examples in groups, `values` giving those of the additional columns for each; return the digest."""
    folder.mkdir(exist_ok=True)
    writer = ExampleWriter(folder, columns)
    for number in range(len(examples) // group_size):
        documents = examples[number * group_size : (number + 1) * group_size]
        writer.append(documents, number if rows is None else rows[number], values and values[number])
    return writer.close()


def same(one, other):
    return np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.weights, other.weights)


def test_examples_are_read_as_they_were_written(tmp_path, rng):
    examples = random_examples(rng, rng.randrange(1, 40))
    rows = sorted(rng.randrange(99) for _ in examples)
    digest = write(tmp_path / "store", examples, rows)
    read = ExampleStore(tmp_path / "store")
    assert len(read) == len(examples)
    assert all(same(read[index], example) for index, example in enumerate(examples))
    assert read.lengths.tolist() == list(map(len, examples))
    assert read.rows.tolist() == rows
    assert read.largest_id() == max(int(example.input_ids.max()) for example in examples)
    content = ((one.input_ids.tobytes(), one.weights.tobytes(), len(one).to_bytes(8, "little")) for one in examples)
    assert digest == hashlib.sha256(b"".join(part for parts in content for part in parts)).hexdigest()  # as in 0.1.0


@pytest.mark.parametrize(("change", "differs"), [
    ("nothing", False), ("row", False), ("id", True), ("weight", True), ("border", True), ("order", True),
])  # fmt: skip
def test_the_digest_depends_on_ids_weights_and_borders(tmp_path, rng, change, differs):
    examples = [make_example([number, 2, 3], [0, 1, 1]) for number in range(rng.randrange(2, 9))]
    rows = list(range(len(examples)))
    before = write(tmp_path / "one", examples, rows)
    first = examples[0]
    if change == "row":
        rows[-1] += 1
    elif change == "id":
        examples[0] = make_example([0, 2, 4], first.weights)
    elif change == "weight":
        examples[0] = make_example(first.input_ids, [0, 1, 0.5])
    elif change == "border":
        examples[:2] = [make_example([0, 2, 3, 1], [0, 1, 1, 0]), make_example([2, 3], [0, 1])]
    elif change == "order":
        examples.reverse()
    assert (write(tmp_path / "other", examples, rows) != before) == differs


def test_a_set_reads_what_was_chosen_in_its_order(tmp_path, rng):
    groups = [random_examples(rng, 9) for _ in range(3)]
    for number, examples in enumerate(groups):
        write(tmp_path / str(number), examples)
    stores = [ExampleStore(tmp_path / str(number)) for number in range(3)]
    places = np.array([(rng.randrange(3), rng.randrange(9)) for _ in range(50)])  # some several times
    chosen = ExampleSet(stores, places)
    assert len(chosen) == 50
    assert all(same(found, groups[group][index]) for found, (group, index) in zip(chosen, places, strict=True))
    assert chosen.lengths.tolist() == list(map(len, chosen))
    assert same(chosen[-1], chosen[49])
    assert [len(example) for example in chosen[5:9]] == chosen.lengths[5:9].tolist()
    with pytest.raises(IndexError):
        chosen[50]


def test_a_set_of_groups_has_the_rows_of_its_groups_and_parts_none(tmp_path, rng):
    examples = random_examples(rng, 12)
    write(tmp_path / "store", examples, rows=[3, 5, 5, 8, 9, 11], group_size=2)
    read = ExampleStore(tmp_path / "store")
    assert (read.group_size, read.num_groups, len(read)) == (2, 6, 12)
    places = np.array([[0, place] for group in (4, 1, 4) for place in (2 * group, 2 * group + 1)])
    chosen = ExampleSet([read], places, group_size=2)
    assert all(same(found, examples[place]) for found, (_, place) in zip(chosen, places, strict=True))
    assert chosen.rows_of([1, 2]) == {0: [6, 10]}
    assert chosen.values("rows").tolist() == [9, 5, 9]
    assert [len(one) for one in chosen[2:6]] == chosen.lengths[2:6].tolist()
    assert chosen[2:4].rows_of([0]) == {0: [6]}
    for parted in (slice(1, 3), slice(0, 3), slice(0, 4, 2)):
        with pytest.raises(ValueError, match="parts a group of 2"):
            chosen[parted]


COLUMNS = (
    Column("entropy", "float32", "token"),
    Column("label", "int16", "document"),
    Column("image", "(2, 3)uint8", "group"),
    Column("origin", "int32", "group", is_compared=False),
)


def random_values(rng, group):
    return {
        "entropy": [[rng.random() for _ in range(len(document))] for document in group],
        "label": [rng.randrange(9) for _ in group],
        "image": [[rng.randrange(256) for _ in range(3)] for _ in range(2)],
        "origin": rng.randrange(9),
    }


def test_additional_columns_are_read_as_they_were_written(tmp_path, rng):
    examples = random_examples(rng, 10)
    groups = [examples[start : start + 2] for start in range(0, 10, 2)]
    values = [random_values(rng, group) for group in groups]
    write(tmp_path / "store", examples, group_size=2, columns=COLUMNS, values=values)
    read = ExampleStore(tmp_path / "store")
    assert {*COLUMNS} <= {*read.columns.values()}
    assert read.values("entropy") == pytest.approx([each for one in values for each in sum(one["entropy"], [])])
    assert read.values("label").tolist() == [label for one in values for label in one["label"]]
    assert read.values("image").tolist() == [one["image"] for one in values]
    chosen = ExampleSet([read], np.array([[0, 6], [0, 7], [0, 0], [0, 1]]), group_size=2)
    assert chosen.values("label").tolist() == [*values[3]["label"], *values[0]["label"]]
    assert chosen.values("image").tolist() == [values[3]["image"], values[0]["image"]]
    assert same(read[3], examples[3])


@pytest.mark.parametrize(
    ("column", "differs"), [("entropy", True), ("label", True), ("image", True), ("origin", False)]
)
def test_compared_columns_decide_on_digest_and_repeats(tmp_path, rng, column, differs):
    group = random_examples(rng, 2)
    one = random_values(rng, group)
    other = one | {column: {"entropy": [[9.0] * len(document) for document in group], "label": [9, 9]}.get(column, 9)}
    if column == "image":
        other["image"] = [[row[0] ^ 1, *row[1:]] for row in one["image"]]
    digests = {
        write(tmp_path / str(number), group, group_size=2, columns=COLUMNS, values=[values])
        for number, values in enumerate((one, other))
    }
    repeats = find_repeats([ExampleStore(tmp_path / "0"), ExampleStore(tmp_path / "1")])
    assert (len(digests) == 2) == differs
    assert [each.tolist() for each in repeats] == [[False], [not differs]]


@pytest.mark.parametrize("wrong", [{"entropy": [[0.5]]}, {"label": [[1, 2]]}, {"image": [1, 2, 3]}])
def test_an_entry_of_another_shape_than_its_column_is_refused(tmp_path, rng, wrong):
    group = [make_example([1, 2, 3], [0, 1, 1])]
    with pytest.raises(ValueError, match=f"{only(wrong)}: an entry of shape"):
        write(tmp_path / "store", group, columns=COLUMNS, values=[random_values(rng, group) | wrong])


def test_groups_of_different_sizes_are_refused(tmp_path, rng):
    writer = ExampleWriter(tmp_path)
    writer.append(random_examples(rng, 2), 0)
    with pytest.raises(ValueError, match="a group of 1 documents in a store with groups of 2"):
        writer.append(random_examples(rng, 1), 1)


def change(header, **changes):
    return header | changes


DAMAGES = {
    "size": lambda header: change(header, group_size=0),
    "kind": lambda header: change(header, group_size="two"),
    "column": lambda header: change(header, columns=header["columns"][1:]),
    "dtype": lambda header: change(header, columns=[one | {"dtype": "int8"} for one in header["columns"]]),
    "bytes": lambda header: change(header, columns=[one | {"bytes": one["bytes"] + 1} for one in header["columns"]]),
    "unit": lambda header: change(header, columns=[one | {"per": "row"} for one in header["columns"]]),
    "key": lambda header: change(header, columns=[one | {"shade": 1} for one in header["columns"]]),
    "list": lambda header: [header],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_header_is_refused(tmp_path, rng, damage):
    write(tmp_path, random_examples(rng, 3))
    assert read_header(tmp_path)[0] == 1
    header = json.loads((tmp_path / HEADER).read_text())
    (tmp_path / HEADER).write_text(json.dumps(damage(header)))
    with pytest.raises(ValueError, match=r"damaged|other sizes|per 'row' is unknown"):
        read_header(tmp_path)
