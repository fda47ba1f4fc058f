"""Answers from a model, through the chat template that it was trained with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora.data import answer_end_id, apply_template, encode_prompt
from qlora.data.examples import Conversation
from qlora.data.prompts import check_prompt
from qlora.data.serving import TemplateFacts
from qlora.errors import ConfigError, ModelError
from qlora.layers.weight_cache import temporarily_cached_linears
from qlora.lora import scores_documents
from qlora.model.host_memory import free_host_bytes
from qlora.model.restore import head_of, load_model

# Error for a model without a head over the vocabulary.
NO_ANSWERS = "{} scores texts, and has no head that answers could come from; use a model that predicts tokens."


def generate(
    model: str | Path | tuple[Any, Any],
    prompts: str | Sequence[Any],
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    base: str | None = None,
) -> str | list[str]:
    """Answer a prompt or several through the chat template that a model was trained with.

    Args:
        model: A run, one of its checkpoints, a PEFT adapter made elsewhere, a model folder or hub id; or a loaded
            model and its tokenizer, as :func:`qlora.load_run` returns them.
        prompts: A message of the user, or a conversation as a list of turns (`{"role": …, "content": …}`); or a list of
            either.
        system: The system message of prompts that are a single message.
        max_new_tokens: Largest number of tokens in an answer.
        temperature: 0 takes the most likely token each time.
        top_p: Sample from the most likely tokens that add up to this probability; needs a temperature above 0.
        seed: Seed of the sampling. Prompt number i is answered with seed + i, regardless of the other prompts.
        device: Device for a model that is not loaded yet; `auto` takes a GPU if there is one.
        base: Base of an adapter made elsewhere, see :func:`qlora.model.load_model`.

    Returns:
        The answer's text without special tokens; for a list of prompts, a list of answers.

    Raises:
        ConfigError: A setting is out of range.
        ModelError: There is no such model.
        DataError: The chat template would leave out or change part of a prompt.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    if not isinstance(model, tuple):
        check_generates(str(model), base)
    loaded, tokenizer = model if isinstance(model, tuple) else load_model(str(model), device, base)
    if scores_documents(loaded):
        raise ModelError(NO_ANSWERS.format(type(loaded).__name__))
    if getattr(tokenizer, "chat_template", None) is None:
        apply_template(tokenizer, "auto")  # as for a model that is given by its path
    is_single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
    given: Sequence[Any] = [prompts] if is_single else prompts
    system_turn = [{"role": "system", "content": system}] if system else []
    conversations = [
        [*system_turn, {"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        for prompt in given
    ]
    facts = TemplateFacts(tokenizer)
    for messages in conversations:
        check_prompt(tokenizer, facts, Conversation(messages))
    answers = []
    with ready_to_answer(loaded):
        for number, messages in enumerate(conversations):
            torch.manual_seed(seed + number)
            answers.append(answer(loaded, tokenizer, messages, max_new_tokens, temperature, top_p=top_p))
    return answers[0] if is_single else answers


@contextmanager
def ready_to_answer(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode, with dequantized weights kept in half of the free memory of a CPU.

    The next token of an answer multiplies every weight by one row, which takes less time than to dequantize it. On a
    GPU, the memory is left to keys and values.

    Args:
        model: A causal language model; its mode is restored afterwards.
    """
    was_training = model.training
    model.eval()
    try:
        with temporarily_cached_linears(model, free_host_bytes() / 2 if model.device.type == "cpu" else 0):
            yield
    finally:
        model.train(was_training)


def check_generates(path: str, base: str | None = None) -> None:
    """Check that a run, an adapter or a model predicts tokens, before it is loaded.

    Args:
        path: See :func:`qlora.model.load_model`.
        base: See :func:`qlora.model.load_model`.

    Raises:
        ModelError: It scores documents.
    """
    if head_of(path, base) is not None:
        raise ModelError(NO_ANSWERS.format(path))


def check_sampling(max_new_tokens: int, temperature: float, top_p: float | None) -> None:
    """Check the settings of a generation.

    Raises:
        ConfigError: A setting is out of range, or top_p is given without sampling; all problems at once.
    """
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens: {max_new_tokens} should be 1 or more.")
    if temperature < 0:
        problems.append(f"temperature: {temperature} should be 0 or more.")
    if top_p is not None and not 0 <= top_p <= 1:
        problems.append(f"top_p: {top_p} should be between 0 and 1.")
    if top_p is not None and not temperature:
        problems.append("top_p needs a temperature above 0: at 0 nothing is sampled.")
    if problems:
        raise ConfigError("\n".join(problems))


@torch.no_grad()
def answer(
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
        model: A causal language model, with or without adapters, within :func:`ready_to_answer`.
        tokenizer: Its tokenizer, with a chat template.
        messages: The conversation so far.
        max_new_tokens: Largest number of tokens in the answer.
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
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=end_token_ids(model.generation_config, tokenizer),
        pad_token_id=tokenizer.eos_token_id,
        streamer=streamer,
        **sampling,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def end_token_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """Return every id that ends an answer: the chat template's, EOS, and those of the model's generation config."""
    configured = generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({answer_end_id(tokenizer), tokenizer.eos_token_id, *ids} - {None})
