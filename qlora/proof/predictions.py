"""What two models predict, one in memory at a time: logits, losses, and greedy answers to fixed prompts."""

from dataclasses import dataclass
from typing import Any

import torch

from qlora.data import ExampleSet, eval_batches
from qlora.model import end_token_ids, evaluate

# Positions whose whole distributions are compared; 512 of a 128k vocabulary are 256 MiB.
NUM_POSITIONS = 512
PROMPTS = ("Once upon a time", "The capital of France is", "Question: What is 17 + 25?\nAnswer:", "def fibonacci(n):\n")
NUM_NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Predictions:
    """Of one model.

    Attributes:
        logits: Of the first positions, (positions, vocabulary) each, fp32 on the CPU.
        loss: On all examples.
        answers: Ids that greedy generation puts after each prompt.
    """

    logits: list[torch.Tensor]
    loss: float
    answers: list[list[int]]


@dataclass(frozen=True, slots=True)
class Distance:
    """Between the predictions of two models, p and q.

    Attributes:
        positions: Compared.
        max_logit_difference: Over all positions and tokens.
        mean_logit_difference: Over the same.
        mean_kl: KL(p ‖ q), nats per position.
        top1_agreement: Share of positions with the same likeliest token.
        greedy_agreement: Share of the tokens that both put after the prompts, until the first that differs.
    """

    positions: int
    max_logit_difference: float
    mean_logit_difference: float
    mean_kl: float
    top1_agreement: float
    greedy_agreement: float


@torch.no_grad()
def predict(model: Any, tokenizer: Any, examples: ExampleSet) -> Predictions:
    """Runs a model over the first positions, all examples, and the prompts."""
    logits: list[torch.Tensor] = []
    missing = NUM_POSITIONS
    for example in examples:
        if missing <= 0:
            break
        ids = torch.from_numpy(example.input_ids[:missing]).long()[None].to(model.device)
        logits.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
        missing -= ids.shape[1]
    loss = evaluate(model, eval_batches(examples, 1)).loss
    return Predictions(logits, loss, [_answer(model, tokenizer, prompt) for prompt in PROMPTS])


def compare(one: Predictions, other: Predictions) -> Distance:
    """Holds two models' predictions against each other, an example at a time."""
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
    return Distance(positions, largest, total / positions, kl / positions, agreeing / positions, greedy)


def _shared(one: list[int], other: list[int]) -> int:
    """How many ids two answers begin with in common."""
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
