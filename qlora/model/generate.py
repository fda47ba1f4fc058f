"""Answers from a model, through the template that it was trained with."""

from typing import Any

import torch

from qlora.data import answer_end_id, encode_prompt


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    messages: list[dict[str, Any]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    streamer: Any = None,
    top_p: float | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Generate the model's next turn in a conversation.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: With a chat template.
        messages: The conversation so far.
        max_new_tokens: The most tokens in the answer.
        temperature: 0 takes the most likely token each time.
        streamer: A streamer of transformers, which shows tokens as they come.
        top_p: Sample from the most likely tokens that add up to this probability; default: the model's own setting.
        tools: Tools that the assistant may call, described as templates read them.

    Returns:
        The answer's text, without special tokens.
    """
    ids = torch.tensor([encode_prompt(tokenizer, messages, tools)], device=model.device)
    sampling: dict[str, Any] = {"do_sample": bool(temperature)}
    if temperature:
        sampling |= {"temperature": temperature} | ({} if top_p is None else {"top_p": top_p})
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
