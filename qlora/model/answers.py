"""Greedy answers to many prompts at a time."""

from collections.abc import Sequence
from typing import Any

import torch

from qlora.data.questions import after_reasoning
from qlora.model.generate import end_token_ids, ready_to_answer


@torch.no_grad()
def answer_all(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, max_tokens: int
) -> list[str]:
    """Answer prompts, each time with the most likely token; no random numbers are drawn.

    The longest prompts are answered first, so that a batch too large for the memory fails at once. A batch ends when
    all of its answers have ended.

    Args:
        model: A causal language model, with or without adapters; its mode is restored afterwards.
        tokenizer: Its tokenizer.
        prompts: Ids of each prompt.
        max_new_tokens: Largest number of tokens in an answer; fewer if the model has no positions for them.
        max_tokens: Largest number of tokens in a batch, answers and padding included; a single prompt may have more.

    Returns:
        The answers' texts without special tokens and without reasoning, in the order of the prompts.
    """
    ends = end_token_ids(model.generation_config, tokenizer)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 62
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    answers = [""] * len(prompts)
    with ready_to_answer(model):
        while order:
            longest = len(prompts[order[0]])
            count = max(1, max_tokens // (longest + max_new_tokens))
            batch, order = order[:count], order[count:]
            # Padded on the left: every answer begins where its prompt ends.
            pads = [longest - len(prompts[number]) for number in batch]
            rows = [
                [tokenizer.eos_token_id] * pad + list(prompts[number]) for pad, number in zip(pads, batch, strict=True)
            ]
            masks = [[0] * pad + [1] * (longest - pad) for pad in pads]
            output = model.generate(
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(masks, device=model.device),
                max_new_tokens=max(1, min(max_new_tokens, positions - longest)),
                eos_token_id=ends,
                pad_token_id=tokenizer.eos_token_id,
                do_sample=False,
            )
            texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            for number, text in zip(batch, texts, strict=True):
                answers[number] = after_reasoning(text)
    return answers
