"""Tokens added to a tokenizer with their ids, and the tokens that it ends and pads texts with."""

import json
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal

from qlora.errors import DataError


def add_new_tokens(tokenizer: Any, tokens: Sequence[str]) -> range:
    """Add tokens after all others; each occurrence of one in a text becomes this token.

    They are not special tokens, which decoding may skip, because programs look for such tokens in answers.

    Args:
        tokenizer: A tokenizer of transformers; changed in place.
        tokens: The tokens' texts.

    Returns:
        The ids of the tokens.

    Raises:
        DataError: The tokenizer already has one, or decodes one to another text.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab() if tokens else {}
    there = [f"{token!r} (id {known[token]})" for token in tokens if token in known]
    if there:
        raise DataError(
            f"data.new_tokens: the base's tokenizer already has {', '.join(there)}; remove these, or train all rows of "
            "the embedding with lora.modules_to_save."
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids = new_token_ids(tokenizer, tokens)
    for token, id_ in zip(tokens, ids, strict=True):
        written = tokenizer.decode([id_])
        if written.strip() != token.strip():  # byte-level decoders take letters such as å for a byte
            raise DataError(f"data.new_tokens: the tokenizer decodes {token!r} to {written!r}; use ASCII letters.")
    return ids


def new_token_ids(tokenizer: Any, tokens: Sequence[str]) -> range:
    """Return the ids of added tokens, which are consecutive.

    Raises:
        DataError: They aren't consecutive, or the tokenizer lacks some of them.
    """
    if not tokens:
        return range(0)
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in tokens if token not in vocabulary]
    if absent:
        raise DataError(
            f"data.new_tokens: the tokenizer has no {', '.join(map(repr, absent))}; use the run's own tokenizer."
        )
    ids = [vocabulary[token] for token in tokens]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise DataError(f"data.new_tokens: the tokenizer gave them the ids {ids}, which are not consecutive.")
    return range(ids[0], ids[-1] + 1)


def choose_pad_token(tokenizer: Any, last_ids: Set[int], is_given: bool = False) -> str:
    """Choose a padding token that no document ends with, and set it.

    Transformers reads the scores of a document at the last token that is not the padding token.

    Args:
        tokenizer: A tokenizer of transformers; changed in place.
        last_ids: Ids of the tokens that documents end with.
        is_given: Whether the config sets the tokenizer's own padding token, so that no other may be taken.

    Returns:
        The tokenizer's own padding token if it can be used, else its unknown, begin or end token.

    Raises:
        DataError: Documents end with each of them.
    """
    names = ["pad_token"] if is_given else ["pad_token", "unk_token", "bos_token", "eos_token"]
    found = [token for name in names if (token := getattr(tokenizer, name)) is not None]
    free = [token for token in found if tokenizer.convert_tokens_to_ids(token) not in last_ids]
    if not free:
        raise DataError(
            "A document is scored at its last token before the padding, but documents end with the padding token "
            f"{', '.join(map(repr, found)) or 'that the tokenizer lacks'}; set data.special_tokens: {{pad_token: …}} "
            "to a token that ends none of them."
        )
    set_special_tokens(tokenizer, {"pad_token": free[0]})
    return free[0]


def set_special_tokens(tokenizer: Any, tokens: Mapping[Literal["eos_token", "pad_token"], str]) -> None:
    """Set the tokens that a tokenizer ends or pads texts with; they are saved with it.

    Args:
        tokenizer: A tokenizer of transformers; changed in place.
        tokens: The token of each key, `eos_token` or `pad_token`.

    Raises:
        DataError: The tokenizer does not have one of them.
    """
    known = tokenizer.get_vocab() if tokens else {}
    for key, token in tokens.items():
        if token not in known:
            raise DataError(
                f"data.special_tokens: {key} is {token!r}, which the tokenizer does not have; name one of its tokens, "
                f"or add it with data.new_tokens: [{json.dumps(token)}]."
            )
    if tokens:
        tokenizer.add_special_tokens(dict(tokens))
