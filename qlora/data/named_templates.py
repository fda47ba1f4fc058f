"""Chat templates by name: each is one jinja file in `templates/`, and its parts are in `templates/parts/`."""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

# What a file may hold besides jinja that is rendered: another file's text, the tokens to look for, and comments.
INCLUDE = re.compile(r'\{%- include "([\w./-]+)" -%\}\n?')
CONTROL_TOKENS = re.compile(r"\{#- control tokens: (.+?) -#\}")
COMMENT = re.compile(r"\{#-.*?-#\}\n?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """A chat template of a model family.

    Attributes:
        text: Jinja without comments and includes: it is saved with a model, where nothing can be included.
        control_tokens: Tokens that begin and end its turns, which the family's tokenizer has as special tokens.
    """

    text: str
    control_tokens: tuple[str, ...]


def template_names() -> list[str]:
    """Return the names of all templates, sorted."""
    names = (path.name for path in files("qlora.data").joinpath("templates").iterdir())
    return sorted(name.removesuffix(".jinja") for name in names if name.endswith(".jinja"))


@cache
def read_named(name: str) -> NamedTemplate:
    """Read a template by its name, one of :func:`template_names`."""
    source = _with_includes(f"{name}.jinja")
    tokens = CONTROL_TOKENS.search(source)
    return NamedTemplate(COMMENT.sub("", source).rstrip("\n"), tuple(tokens[1].split()) if tokens else ())


def mark_control_tokens(tokenizer: Any, name: str) -> None:
    """Make special tokens of those control tokens of a template that the tokenizer has as ordinary ones.

    An answer ends at a special token, and decoding leaves special tokens out. Tokens of `data.new_tokens` are none
    before this call. No id changes.
    """
    from transformers import AddedToken

    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = missing_control_tokens(tokenizer, name)
    ordinary = [token for token in read_named(name).control_tokens if token not in special and token not in missing]
    if ordinary:
        marked = [AddedToken(token, normalized=False, special=True) for token in ordinary]
        tokenizer.add_tokens(marked, special_tokens=True)


def missing_control_tokens(tokenizer: Any, name: str) -> list[str]:
    """Return the control tokens of a template that the tokenizer does not have."""
    unknown = {None, tokenizer.unk_token_id}
    return [token for token in read_named(name).control_tokens if tokenizer.convert_tokens_to_ids(token) in unknown]


def _with_includes(path: str) -> str:
    """Return a file's text with every include replaced by the text of its file."""
    text = files("qlora.data").joinpath("templates", path).read_text(encoding="utf-8")
    return INCLUDE.sub(lambda found: _with_includes(found[1]), text)
