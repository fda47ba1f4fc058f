"""Documents packed into one sequence: kept apart in a model, and proven to be by gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch

from qlora.data import Batch, TokenizedExample, collate, make_example
from qlora.errors import ModelError
from qlora.layers import use_document_attention, use_document_states
from qlora.layers.attention import OVER_ALL, set_text_attention
from qlora.layers.states import DocumentStates, longest_chunk, state_layers
from qlora.lora import text_model
from qlora.model.embeddings import changed_embeddings
from qlora.model.loss import model_inputs, supervised_loss

# Largest share of a document's gradient in another one; above zero only for backends that mask with a large number.
LEAK = 1e-6
# Largest relative change of a document's states after another one: rounding in 16 bits is below, wrong positions above.
CHANGE = 0.05

# What models raise that can't be run in some way.
UNRUNNABLE = (RuntimeError, TypeError, AttributeError, NotImplementedError)

LossOfLast = Callable[[Any, Batch], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Isolation:
    """How a model keeps packed documents apart.

    Attributes:
        attention: Attention in use.
        attention_why: Why it spans all documents of a row; None if it does not, or the config selects it.
        states: How each class of layers that carry a state computes, see :class:`qlora.layers.states.DocumentStates`;
            None if there are none, or documents are not packed.
        states_why: Why some compute one document at a time; None if none do.
        mixed_reason: Why documents can't be packed; None if they don't change each other, or were not to be packed.
    """

    attention: str
    attention_why: str | None
    states: dict[str, str] | None
    states_why: str | None
    mixed_reason: str | None


def unpackable_reason(model: Any, row: int) -> str | None:
    """Return why an architecture can't keep packed documents apart, as far as that shows without weights.

    Args:
        model: A model, or its skeleton.
        row: Number of tokens of the longest packed sequence.
    """
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if chunk is not None and row > chunk:
        return (
            f"{type(model).__name__} attends in chunks of {chunk} tokens, which are counted from the beginning of the "
            f"sequence, and data.max_seq_len is {row}"
        )
    parameters = signature(type(model.base_model).forward).parameters
    takes_anything = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    if "position_ids" in parameters or takes_anything or state_layers(model):
        return None
    return f"{type(model).__name__} takes no positions, so a document can't begin in the middle of a sequence"


def choose_ways(model: Any, *, any_attention: bool, packed: bool) -> tuple[Isolation, DocumentStates | None]:
    """Have a model compute as a run would that keeps packed documents apart, without proof.

    Args:
        model: A model with or without adapters, or its skeleton.
        any_attention: Whether attention by documents may replace the model's own.
        packed: Whether documents are to be packed.

    Returns:
        What is in use, and what undoes the changes to layers that carry a state.
    """
    states = use_document_states(model) if packed else None
    attention, why = model.config._attn_implementation, None
    if any_attention:
        attention, why = use_document_attention(model)
    isolation = Isolation(
        attention, why, None if states is None else states.ways, None if states is None else states.why, None
    )
    return isolation, states


def keep_apart(
    model: Any,
    first: TokenizedExample,
    second: TokenizedExample,
    *,
    any_attention: bool,
    packed: bool,
    loss_of_last: LossOfLast | None = None,
) -> Isolation:
    """Have a model compute packed documents apart, and prove that it does.

    Args:
        model: A model with or without adapters; it is left in evaluation mode.
        first: A document; repeated where layers compute longer chunks at a time, so that the proof crosses one.
        second: Another document, with supervised tokens.
        any_attention: Whether attention by documents may replace the model's own; it is used if it computes the same
            and keeps documents apart.
        packed: Whether documents are to be packed.
        loss_of_last: Computes a scalar from the last document of a batch; default: the supervised loss.
    """
    model.eval()
    own = model.config._attn_implementation
    times = longest_chunk(model) // len(first) + 1 if packed else 1
    if times > 1:
        first = make_example(list(first.input_ids) * times, list(first.weights) * times)
    expected = _hidden_states(model, [second], packed=False) if any_attention else None
    isolation, states = choose_ways(model, any_attention=any_attention, packed=packed)
    if expected is not None and model.config._attn_implementation != own:
        reason = _replaced_reason(model, first, second, expected, packed, loss_of_last)
        if reason is None:
            return isolation
        set_text_attention(model, own)
        isolation = replace(isolation, attention=f"{own}{OVER_ALL}", attention_why=reason)
    if not packed:
        return isolation
    try:
        mixed = mixed_reason(model, first, second, loss_of_last)
    except UNRUNNABLE as error:
        mixed = f"{type(model).__name__} can't be run on packed documents ({_first_line(error)})"
    if mixed is None:
        return isolation
    # What a run that was never to be packed uses, so that a continued run uses the same.
    if states is not None:
        states.remove()
    return replace(keep_apart(model, first, second, any_attention=any_attention, packed=False), mixed_reason=mixed)


def _replaced_reason(
    model: Any,
    first: TokenizedExample,
    second: TokenizedExample,
    expected: torch.Tensor,
    packed: bool,
    loss_of_last: LossOfLast | None,
) -> str | None:
    """Return why attention by documents can't be used; None if it computes the same and keeps documents apart."""
    try:
        if not _change(_hidden_states(model, [second]), expected) <= CHANGE:
            return "by documents, its results differ from those of its own attention"
        mixed = mixed_reason(model, first, second, loss_of_last) if packed else None
    except UNRUNNABLE as error:
        return f"by documents, the model can't be run ({_first_line(error)})"
    return None if mixed is None else f"by documents, {mixed}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def mixed_reason(
    model: Any, first: TokenizedExample, second: TokenizedExample, loss_of_last: LossOfLast | None = None
) -> str | None:
    """Return how documents packed into one sequence change each other; None if they don't.

    The loss of one has no gradient in another if they don't: without a leak it is exactly zero, while outputs also
    differ by rounding.

    Args:
        model: A model with or without adapters; it is left in evaluation mode.
        first: A document.
        second: Another document, with supervised tokens.
        loss_of_last: Computes a scalar from the last document of a batch; default: the supervised loss.
    """
    model.eval()
    embedded: list[torch.Tensor] = []

    def watch(output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some architectures scale it in place, which a leaf refuses

    context = make_example(first.input_ids, [False] * len(first))
    with changed_embeddings(model, watch):
        batch = collate([context, second], packed=True).to(model.device)
        loss = supervised_loss(model, batch) if loss_of_last is None else loss_of_last(model, batch)
    (grad,) = torch.autograd.grad(loss, embedded[0])
    before, own = grad[0].float().split([len(first), len(second)])
    leak = (before.norm() / own.norm()).item()
    # Positions may be wrong without any leak.
    change = _change(_hidden_states(model, [first, second])[len(first) :], _hidden_states(model, [second]))
    if leak <= LEAK and change <= CHANGE:
        return None
    return (
        f"{type(model).__name__} lets documents packed into one sequence change each other (gradient of one in "
        f"another: {leak:.2g} of its own; its states change by {change:.1%})"
    )


def check_causal(model: Any, document: TokenizedExample) -> None:
    """Check that no token sees a later one: the states of the first half have no gradient in the second half.

    Encoders see all tokens, and so do some models of images and text while they read a prompt. The loss of predicting
    the next token would then fall by copying it.

    Args:
        model: A model with or without adapters; it is left in evaluation mode.
        document: A document of two tokens or more; a shorter one is not checked.

    Raises:
        ModelError: A token sees later ones.
    """
    half = len(document) // 2
    if not half:
        return
    model.eval()
    embedded: list[torch.Tensor] = []

    def watch(output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()

    with changed_embeddings(model, watch):
        batch = collate([document]).to(model.device)
        states = text_model(model)(**model_inputs(model, batch)).last_hidden_state[0, :half].float()
        if embedded[0].shape[-2] != len(document):
            raise ModelError(
                f"{type(model).__name__} embeds {embedded[0].shape[-2]} tokens for a document of {len(document)}, so "
                "it can't be proven that tokens don't see later ones; use another decoder-only model."
            )
        # Random weights, because a norm makes plain sums or squares of the states constant.
        generator = torch.Generator().manual_seed(0)
        total = (states * torch.randn(states.shape, generator=generator).to(states.device)).sum()
    (grad,) = torch.autograd.grad(total, embedded[0])
    own, later = (part.float().norm().item() for part in grad[0].split([half, len(document) - half]))
    if not later <= LEAK * own:
        raise ModelError(
            f"{type(model).__name__} lets tokens see later ones (gradient of the first half in the second: "
            f"{later / max(own, 1e-30):.2g} of its own), so it would learn to copy the next token, not to predict "
            "it; use a decoder-only model, such as Llama, Mistral, Qwen or Gemma."
        )


@torch.no_grad()
def _hidden_states(model: Any, documents: Sequence[TokenizedExample], packed: bool = True) -> torch.Tensor:
    """Return the last hidden states of packed documents, or of a single one, (tokens, features)."""
    batch = collate(documents, packed=packed).to(model.device)
    states: torch.Tensor = text_model(model)(**model_inputs(model, batch)).last_hidden_state[0]
    return states


def _change(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).float().norm() / expected.float().norm()).item()
