"""The ids that a server feeds, in the slow and obvious way: each text is tokenized separately."""

from typing import Any


def completion(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    """Return the ids of a prompt, of a model's text after it and of EOS, and which of them are supervised.

    Only for tokenizers that put nothing before a text, such as byte-level ones.
    """
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    written = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    learnt = [False] * len(asked) + [True] * len(written)
    return asked + written, [False, *learnt[1:]]


def prompt(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> list[int]:
    """Return the ids of a server's prompt for some turns; options are the template's, such as `enable_thinking`."""
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False).input_ids
