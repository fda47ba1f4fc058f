"""Tokens added to a tokenizer with their ids, and the tokens that it ends and pads texts with."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qlora.errors import DataError


def add_new_tokens(tokenizer: Any, tokens: Sequence[str]) -> range:
    """Add tokens with ids after all others.

    They are not special tokens: decoding keeps them, because programs that read answers look for them.

    Args:
        tokenizer: A tokenizer of transformers; changed in place.
        tokens: The tokens as text.

    Returns:
        The ids of the tokens.

    Raises:
        DataError: The tokenizer already has one, or can't decode one to its text.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab() if tokens else {}
    there = [f"{token!r} (id {known[token]})" for token in tokens if token in known]
    if there:
        raise DataError(
            f"data.new_tokens: the base's tokenizer has {', '.join(there)} already; remove these, or train all rows "
            "with lora.modules_to_save."
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids = new_token_ids(tokenizer, tokens)
    for token, id_ in zip(tokens, ids, strict=True):
        written = tokenizer.decode([id_])
        if written.strip() != token.strip():  # decoders over bytes take letters such as å for one
            raise DataError(
                f"data.new_tokens: the tokenizer writes {token!r} as {written!r}; name it in ASCII letters."
            )
    return ids


def new_token_ids(tokenizer: Any, tokens: Sequence[str]) -> range:
    """Return the ids of added tokens.

    Raises:
        DataError: The tokenizer lacks one of them, or their ids are not consecutive.
    """
    if not tokens:
        return range(0)
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in tokens if token not in vocabulary]
    if absent:
        raise DataError(f"data.new_tokens: the tokenizer has no {', '.join(map(repr, absent))}; take the run's own.")
    ids = [vocabulary[token] for token in tokens]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise DataError(f"data.new_tokens: the tokenizer gave them the ids {ids}, which are not consecutive.")
    return range(ids[0], ids[-1] + 1)


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
