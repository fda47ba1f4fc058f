"""Loading a model's tokenizer and generation config."""

import re
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.model.skeleton import reason_for_users

GENERATION_FILE = "generation_config.json"
MAX_VOCABULARY = 1 << 24
TEMPLATE_NAME = re.compile(r"\w[\w.-]*")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load a base's tokenizer alone.

    Args:
        folder: The folder that holds it.
        trust_remote_code: Run code that comes with it.

    Raises:
        ModelError: The folder has no tokenizer, or it can't be used, or needs code that may not be run.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file can raise anything
        reason = reason_for_users(error, trust_remote_code)
        raise ModelError(f"{folder}: the tokenizer can't be loaded: {reason}") from error
    _check_tokenizer(folder, tokenizer)
    return tokenizer


def load_generation_config(folder: Path) -> Any:
    """Load a model's generation config; transformers' defaults if its folder has none.

    Raises:
        ModelError: The file is damaged, or its end tokens are not ids.
    """
    from transformers import GenerationConfig

    if not (folder / GENERATION_FILE).is_file():
        return GenerationConfig()
    try:
        config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # a wrong value can raise anything
        raise ModelError(f"{folder / GENERATION_FILE} can't be read: {error}; download it again.") from error
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not all(end is None or type(end) is int for end in ends):
        raise ModelError(
            f"{folder / GENERATION_FILE}: eos_token_id {config.eos_token_id!r:.80} is not an id; download it again."
        )
    return config


def _check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Check that ids are small enough for a model, and that templates' names are file names."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= MAX_VOCABULARY:
        raise ModelError(
            f"{folder}: the tokenizer has the id {largest}, but no model has {MAX_VOCABULARY} tokens; use another one."
        )
    for name in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not TEMPLATE_NAME.fullmatch(name):
            raise ModelError(
                f"{folder}: the tokenizer has a chat template named {name!r:.80}, which is not a file name; rename it."
            )
