"""Words that stand for labels in answers, chosen so that a single token decides between them."""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os.path import commonprefix

from qlora.data.labels import Labels, describe_names
from qlora.errors import ConfigError

# Returns the token ids of an answer.
Encode = Callable[[str], tuple[int, ...]]
# What stands for labels all of whose words begin like others'.
CODES = string.ascii_uppercase + string.ascii_lowercase + string.digits
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+")


def with_answers(labels: Labels, encode: Encode) -> Labels:
    """Return labels with the words that stand for them and the tokens of these.

    By default a label's word is its name. If the names of two labels begin with the same token, each label gets that
    word of its name, or its name, whose first token no other label has; if there is none, a letter or digit.

    Args:
        labels: Labels, with or without words.
        encode: Returns the token ids of an answer after a prompt, up to the end of the turn.

    Raises:
        ConfigError: The tokens of given words can't be told apart, or there are not enough of them for all labels.
    """
    words = labels.names if labels.words is None else labels.words
    found = replace(labels, words=words, answers=tuple(map(encode, words)))
    if len(set(found.answers)) == len(words) and len(set(found.deciding)) == len(words):
        return found
    if labels.words is not None:
        raise ConfigError(
            f"data.labels: {_clashes(found)} begin with the same token of the tokenizer, and one token has to decide; "
            "give them words that begin differently."
        )
    chosen = choose_words(labels.names, encode)
    if lacking := [name for name, word in chosen.items() if word is None]:
        raise ConfigError(
            f"train.classify_by: tokens decides by one token, but every word for {describe_names(lacking)} begins with "
            "the token of another label; give all labels words that begin differently, as data.labels: {name: word}, "
            "or set train.classify_by: head."
        )
    words = tuple(str(word) for word in chosen.values())
    return replace(labels, words=words, answers=tuple(map(encode, words)))


def choose_words(names: Sequence[str], encode: Encode) -> dict[str, str | None]:
    """Choose a word of each name, the name itself, or else a letter or digit, so that their deciding tokens differ.

    It is the largest such choice, found by augmenting paths (Kuhn's algorithm). The name and its words are preferred to
    the same words in capitals, and these to single letters.

    Returns:
        The word by name; None for names that are left without one.
    """
    candidates = {name: _candidates(name) for name in names}
    answers = {word: encode(word) for words in candidates.values() for word in words}
    offset = len(commonprefix([list(answer) for answer in answers.values()]))
    tokens = {word: answer[offset] for word, answer in answers.items() if len(answer) > offset + 1}
    owners: dict[int, tuple[str, str]] = {}

    def assign(name: str, tried: set[int]) -> bool:
        for word in candidates[name]:
            token = tokens.get(word)
            if token is None or token in tried:
                continue
            tried.add(token)
            if token not in owners or assign(owners[token][0], tried):
                owners[token] = name, word
                return True
        return False

    for name in names:
        assign(name, set())
    chosen: Mapping[str, str] = dict(owners.values())
    return {name: chosen.get(name) for name in names}


def words_note(labels: Labels | None) -> str | None:
    """Return a line on labels that are answered by another word than their name; None if there are none."""
    pairs = zip(labels.names, labels.words or labels.names, strict=True) if labels is not None else ()
    others = [f"{name} → {word}" for name, word in pairs if name != word]
    if not others:
        return None
    return f"labels are answered by a word of their own: {describe_names(others)}"


def _candidates(name: str) -> list[str]:
    words = [name, *WORD.findall(name)]
    return list(dict.fromkeys([*words, *map(str.capitalize, words), *map(str.upper, words), *CODES]))


def _clashes(labels: Labels) -> str:
    words = labels.words or ()
    by_token: dict[int, list[str]] = {}
    for word, token in zip(words, labels.deciding, strict=True):
        by_token.setdefault(token, []).append(word)
    return "; ".join(" and ".join(map(repr, same)) for same in by_token.values() if len(same) > 1)
