"""The base class of all sections: frozen, without unknown keys, without secrets."""

import re

from pydantic import BaseModel, ConfigDict, field_validator

from qlora.errors import find_secrets

# NUL and lone surrogates, which no file name can contain.
UNUSABLE = re.compile("[\0\ud800-\udfff]")


class Section(BaseModel):
    """A frozen group of keys. Unknown keys are errors, and so are secrets, because a config is saved with its run.

    Every field carries a description and an example: `docs/config.md`, `qlora explain`, `qlora init --all` and the
    JSON Schema are generated from them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_texts(cls, value: object) -> object:
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        texts = [text for text in values if isinstance(text, str)]
        if any(map(UNUSABLE.search, texts)):
            raise ValueError("holds a character that no name and no text can have")
        kinds = [kind for text in texts for kind in find_secrets(text)]
        if kinds:
            raise ValueError(f"holds {kinds[0]}, which would be kept with the run; log in with hf auth login instead")
        return value
