"""What a server feeds, by the slow and obvious way: each text is tokenized by itself."""

from typing import Any


def completion(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    """Ids of a prompt, of what a model wrote behind it and of EOS, and which of them are learnt.

    Only for tokenizers that put nothing before a text, as byte-level ones.
    """
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    written = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    learnt = [False] * len(asked) + [True] * len(written)
    return asked + written, [False, *learnt[1:]]


def prompt(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> list[int]:
    """Ids of what a server makes of turns that it is to answer; options are the template's, as `enable_thinking`."""
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False).input_ids
