"""Predictions of two models, one in memory at a time: logits, losses, and greedy answers to fixed prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora.data import eval_batches
from qlora.data.tokens import TokenizedExample, make_example
from qlora.model import SUPERVISED, Loss, end_token_ids, evaluate

# Number of positions whose whole distributions are compared; with a vocabulary of 128k their logits take 256 MiB.
NUM_POSITIONS = 512
PROMPTS = ("Once upon a time", "The capital of France is", "Question: What is 17 + 25?\nAnswer:", "def fibonacci(n):\n")
NUM_NEW_TOKENS = 32
# Mean KL divergence, in nats per token, above which two models don't match. On tiny models 16-bit arithmetic causes up
# to 5e-5; on SmolLM2-135M with a small update, of which bf16 loses a part, up to 0.008.
MAX_KL = 0.01


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions of one model.

    Attributes:
        logits: Logits of the first positions, by example: (positions, vocabulary), fp32 on the CPU.
        loss: Mean loss on all examples; by default in nats per supervised token.
        answers: Ids of the greedy answer to each prompt.
    """

    logits: list[torch.Tensor]
    loss: float
    answers: list[list[int]]


@dataclass(frozen=True, slots=True)
class Distance:
    """Distance between the predictions of two models, p and q.

    Attributes:
        positions: Number of positions compared.
        max_logit_difference: Largest difference over all positions and tokens.
        mean_logit_difference: Mean difference over the same.
        mean_kl: KL(p ‖ q), in nats per position.
        top1_agreement: Share of positions with the same most likely token.
        greedy_agreement: Share of greedy tokens after the prompts that are equal, up to the first that differs.
    """

    positions: int
    max_logit_difference: float
    mean_logit_difference: float
    mean_kl: float
    top1_agreement: float
    greedy_agreement: float


def fixed_examples(tokenizer: Any, texts: Sequence[str]) -> list[TokenizedExample]:
    """Return texts as examples whose every token counts, for an adapter whose data are not known."""
    ids = [tokenizer(text).input_ids for text in texts]
    return [make_example(each, [True] * len(each)) for each in ids if len(each) > 1]


@torch.no_grad()
def predict(model: Any, tokenizer: Any, examples: Sequence[TokenizedExample], loss: Loss = SUPERVISED) -> Predictions:
    """Return a model's logits at the first positions, loss on all examples, and answers to the prompts."""
    logits: list[torch.Tensor] = []
    remaining = NUM_POSITIONS
    for example in examples:
        if remaining <= 0:
            break
        ids = torch.from_numpy(example.input_ids[:remaining]).long()[None].to(model.device)
        logits.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
        remaining -= ids.shape[1]
    mean = evaluate(model, eval_batches(examples, 1), loss=loss).loss
    return Predictions(logits, mean, [_answer(model, tokenizer, prompt) for prompt in PROMPTS])


def compare(one: Predictions, other: Predictions) -> Distance:
    """Return the distance between the predictions of two models."""
    largest, total, kl, agreeing = 0.0, 0.0, 0.0, 0
    for p, q in zip(one.logits, other.logits, strict=True):
        difference = (p - q).abs()
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        largest = max(largest, difference.max().item())
        total += difference.mean(-1).double().sum().item()
        kl += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
    positions = sum(map(len, one.logits))
    answers = list(zip(one.answers, other.answers, strict=True))
    greedy = sum(_shared(p, q) for p, q in answers) / sum(max(len(p), len(q)) for p, q in answers)
    return Distance(
        positions=positions,
        max_logit_difference=largest,
        mean_logit_difference=total / positions,
        mean_kl=kl / positions,
        top1_agreement=agreeing / positions,
        greedy_agreement=greedy,
    )


def loss_noise(mean_kl: float) -> float:
    """Return how far rounding may move the mean loss of a model with this KL divergence from another, in nats.

    The log-probabilities that two close models give a token differ by about √(2 KL). Rounding errors may be alike in
    all tokens, as in texts that resemble each other, so they don't average out. A divergence above :data:`MAX_KL` has
    other causes and allows no more.

    Args:
        mean_kl: KL divergence of the models' predictions, in nats per token.
    """
    return 2 * math.sqrt(min(max(0.0, mean_kl), MAX_KL))


def _shared(one: list[int], other: list[int]) -> int:
    """Return the number of equal ids at the start of two answers."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)


def _answer(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    ids = torch.tensor([tokenizer(prompt).input_ids], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        eos_token_id=end_token_ids(model.generation_config, tokenizer),
        pad_token_id=tokenizer.eos_token_id,
    )
    return output[0, ids.shape[1] :].tolist()
