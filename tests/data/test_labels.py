"""Labels of classification: found in rows, answered by words, kept with their texts."""

import random
import string

import numpy as np
import pytest

from qlora.data import LABEL, EncodeOptions, Labels, Source, build_datasets, find_labels, labels_from_dict
from qlora.data.label_words import choose_words, with_answers
from qlora.errors import ConfigError, DataError
from tests.tiny import make_tokenizer, only, write_jsonl

MAX = 120


@pytest.fixture
def rng(seed):
    return random.Random(seed)


@pytest.fixture
def source(tmp_path):
    def write(labels, name="rows", **keys):
        rows = [{"text": f"text {number}", "label": label, **keys} for number, label in enumerate(labels)]
        return Source(str(write_jsonl(tmp_path / f"{name}.jsonl", rows)))

    return write


@pytest.fixture
def build(tmp_path):
    def build(sources, by="tokens", eval=0.0, names=None, template="chatml", **options):
        labels = find_labels(sources, by, names)
        options = EncodeOptions(**{"max_seq_len": MAX, **options}, labels=labels)
        return build_datasets(make_tokenizer(), sources, eval, options, template, cache_dir=str(tmp_path / "cache"))

    return build


def letters(word):
    """Tokens of a word after a marker, as some tokenizers write it, with an end."""
    return (0, *map(ord, word), 1)


@pytest.mark.parametrize(("labels", "names"), [
    (["oak", "ash", "oak"], ("ash", "oak")),
    ([10, 9, -1, 9.0], ("-1", "9", "10")),
    (["b", 2, "10"], ("2", "10", "b")),
    (["ham ", "ham", " eggs"], ("eggs", "ham")),
])  # fmt: skip
def test_labels_are_those_of_all_sources_sorted(labels, names, source):
    sources = [source(labels[:1], "one"), source(labels[1:], "two")]
    assert find_labels(sources, "tokens").names == names


def test_labels_can_be_given_in_an_order_and_with_words(source):
    sources = [source(["a", "b"])]
    assert find_labels(sources, "head", ["b", "c", "a"]).names == ("b", "c", "a")
    found = find_labels(sources, "tokens", {"b": "bad", "a": "good"})
    assert (found.names, found.words) == (("b", "a"), ("bad", "good"))


@pytest.mark.parametrize(("labels", "by", "names", "message"), [
    (["a", "a"], "tokens", None, "needs two labels or more, but there is 'a' alone"),
    ([["a", "b"], ["a"]], "tokens", None, "the rows have lists of labels; set train.classify_by: head"),
    (["a", "b"], "head", ["a", "b", "a"], "the label 'a' occurs twice"),
    (["a", "b"], "tokens", {"a": "x", "b": "x"}, "the word 'x' occurs twice"),
])  # fmt: skip
def test_labels_that_can_not_be_told_apart_are_refused(labels, by, names, message, source):
    with pytest.raises(ConfigError, match=message):
        find_labels([source(labels)], by, names)


def test_rows_without_labels_are_refused_with_the_columns(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match="No row has a label to learn.*data.columns maps others"):
        find_labels([Source(str(path))], "head")


def test_a_label_that_training_rows_lack_is_reported(source, build):
    with pytest.raises(DataError, match=r"(?s)1 of 2 rows.*its label 'elm' is none of those to learn, ash, oak"):
        build([source(["ash", "oak"])], eval=[source(["oak", "elm"], "eval")])


@pytest.mark.parametrize("by", ["tokens", "head"])
def test_documents_keep_their_label_and_by_tokens_end_with_its_word(by, source, build, rng):
    labels = [rng.choice(("ash", "oak", "elm")) for _ in range(20)] + ["ash", "oak"]
    datasets = build([source(labels)], by)
    tokenizer = make_tokenizer()
    numbers = [int(example.values[LABEL]) for example in datasets.train]
    assert [datasets.labels.names[number] for number in numbers] == labels
    assert datasets.train.values(LABEL).tolist() == numbers
    for number, (label, example) in enumerate(zip(labels, datasets.train, strict=True)):
        if by == "head":
            assert example.input_ids.tolist() == tokenizer(f"text {number}").input_ids
            assert not example.num_supervised
        else:
            answer = tokenizer.decode(example.input_ids[example.loss_mask])
            assert answer == f"{label}<|im_end|>"


def test_texts_with_several_labels_have_a_flag_for_each(source, build):
    datasets = build([source([["b"], [], ["c", "a", "c"], "a"])], by="head")
    assert datasets.labels.names == ("a", "b", "c")
    assert datasets.train.values(LABEL).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("by", ["tokens", "head"])
def test_an_overlong_text_is_truncated_and_keeps_prompt_and_answer(by, tmp_path, build, rng):
    text = "".join(rng.choices("abcde \n", k=300)) + "."
    rows = [{"text": text, "label": "oak"}, {"text": "short", "label": "ash"}]
    sources = [Source(str(write_jsonl(tmp_path / "long.jsonl", rows)))]
    datasets = build(sources, by, overlong="truncate")
    long, short = datasets.train
    whole = build(sources, by, overlong="drop", max_seq_len=1000).train[0]
    assert len(long) == MAX
    assert long.values[LABEL] == whole.values[LABEL]
    assert short.num_supervised == (len("ash") + 1 if by == "tokens" else 0)
    tail = long.num_supervised + (len("<|im_end|>\n<|im_start|>assistant\n") if by == "tokens" else 0)
    same = 0
    while long.input_ids[same] == whole.input_ids[same]:
        same += 1
        if same == MAX:
            break
    assert same >= MAX - tail
    assert (
        long.input_ids[MAX - long.num_supervised :].tolist()
        == whole.input_ids[len(whole) - long.num_supervised :].tolist()
    )
    assert datasets.reports[0].overlong == {"truncated": 1}


@pytest.mark.parametrize("overlong", ["split", "error"])
def test_an_overlong_text_is_never_split(overlong, tmp_path, build):
    rows = [{"text": "a" * 300, "label": "oak"}, {"text": "short", "label": "ash"}]
    with pytest.raises(DataError, match="drop or truncate, as a text with a label can't be split"):
        build([Source(str(write_jsonl(tmp_path / "long.jsonl", rows)))], overlong=overlong)


def test_a_prompt_that_leaves_no_room_for_text_is_reported(tmp_path, build):
    rows = [{"text": "a" * 300, "label": "oak"}, {"text": "b" * 300, "label": "ash"}]
    with pytest.raises(DataError, match="nothing is left of the text with data.max_seq_len 20; raise it"):
        build([Source(str(write_jsonl(tmp_path / "long.jsonl", rows)))], overlong="truncate", max_seq_len=20)


def test_words_are_the_names_if_their_first_different_tokens_differ():
    labels = with_answers(Labels(("ABBR", "DESC", "NUM"), "tokens"), letters)
    assert labels.words == labels.names
    assert (labels.offset, labels.deciding) == (1, tuple(map(ord, "ADN")))


def test_a_name_that_begins_another_is_told_apart_by_its_end():
    labels = with_answers(Labels(("not", "not spam"), "tokens"), letters)
    assert labels.words == labels.names
    assert labels.deciding == (1, ord(" "))


def test_names_that_begin_alike_get_words_of_their_own():
    names = ("card_arrival", "card_linking", "card_about_to_expire", "linked_card_fee")
    labels = with_answers(Labels(names, "tokens"), letters)
    assert len(set(labels.deciding)) == len(names)
    assert all(word.lower() in name for name, word in zip(names, labels.words, strict=True))


def test_as_many_names_as_possible_get_words(rng):
    """Against every choice of first letters, with a few of them for all words in capitals and for codes."""
    for _ in range(50):
        names = list({"_".join(rng.choices("abcd", k=rng.randrange(1, 4))) for _ in range(6)})

        def encode(word):
            return (0, max(ord("`"), min(ord(word[0].lower()), ord("e"))), 1)

        chosen = choose_words(names, encode)
        assert chosen.keys() == set(names)
        tokens = [encode(word)[1] for word in chosen.values() if word is not None]
        assert len(tokens) == len(set(tokens)) == min(len(names), 6)


def test_a_name_whose_words_all_begin_like_others_gets_a_letter():
    labels = with_answers(Labels(("ab", "ac", "b_c", "c"), "tokens"), lambda word: (ord(word[0].upper()), 1))
    assert len(set(labels.deciding)) == 4
    assert any(word in string.ascii_letters + string.digits for word in labels.words)


def test_words_that_can_not_be_told_apart_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="every word for .* begins with the token of another"):
        with_answers(Labels(("a", "ab", "abc"), "tokens"), lambda word: (ord(word[0]) % 2, 7, 1))
    with pytest.raises(ConfigError, match="'good' and 'great' begin with the same token.*begin differently"):
        with_answers(Labels(("a", "b", "c"), "tokens", ("good", "bad", "great")), letters)


def test_replaced_words_are_noted(source, build):
    datasets = build([source(["card_arrival", "card_linking", "age_limit"])])
    (note,) = [note for note in datasets.reports[0].notes if "word of their own" in note]
    assert "card_arrival → arrival" in note


def test_other_labels_are_tokenized_again(source, build):
    sources = [source(["0", "1"])]
    plain, named = (build(sources, names=names).train for names in (None, {"0": "bad", "1": "good"}))
    assert only(list({len(each) for each in plain})) != only(list({len(each) for each in named if each.values[LABEL]}))
    assert np.array_equal(plain.values(LABEL), named.values(LABEL))


@pytest.mark.parametrize("labels", [
    Labels(("a", "b"), "tokens", ("x", "y")), Labels(("a", "b"), "head"), Labels(("a",), "head", is_multiple=True),
], ids=str)  # fmt: skip
def test_labels_are_read_back(labels):
    assert labels_from_dict(labels.as_dict()) == labels


@pytest.mark.parametrize("values", [{}, {"labels": []}, {"labels": [{"name": 1}], "by": "head", "is_multiple": False}])
def test_damaged_labels_are_refused(values):
    with pytest.raises(ValueError, match="labels"):
        labels_from_dict(values)


@pytest.mark.parametrize("label", [True, " ", ["a", False]])
def test_a_label_that_is_no_name_is_refused_with_its_row(label, build, source):
    with pytest.raises(DataError, match="'label' should be a name or a whole number"):
        build([source(["a", "b", label])], by="head")
