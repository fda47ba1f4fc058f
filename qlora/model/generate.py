"""Answers from a model, through the template that it was trained with."""

from typing import Any

import torch

from qlora.data import answer_end_id, encode_prompt


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    messages: list[dict[str, str]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    streamer: Any = None,
) -> str:
    """The model's next turn in a conversation.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: With a chat template.
        messages: The conversation so far.
        max_new_tokens: At most.
        temperature: 0 takes the likeliest token each time.
        streamer: Of transformers, to show tokens as they come.

    Returns:
        The answer's text, without special tokens.
    """
    ids = torch.tensor([encode_prompt(tokenizer, messages)], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    was_training = model.training
    model.eval()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=end_token_ids(model.generation_config, tokenizer),
        pad_token_id=tokenizer.eos_token_id,
        streamer=streamer,
        **sampling,
    )
    model.train(was_training)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def end_token_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """Every id that ends an answer: what training teaches through the chat template, EOS, and the model's own."""
    configured = generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({answer_end_id(tokenizer), tokenizer.eos_token_id, *ids} - {None})
