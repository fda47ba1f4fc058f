"""Documents packed into one sequence: kept apart in a model, and proven to be by gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch

from qlora.data import Batch, TokenizedExample, collate, make_example
from qlora.errors import ModelError
from qlora.layers import use_document_attention, use_document_states
from qlora.layers.attention import set_text_attention
from qlora.layers.states import state_layers
from qlora.lora import text_model
from qlora.model.embeddings import changed_embeddings
from qlora.model.loss import model_inputs, supervised_loss

# Largest share of a document's gradient in another one; above zero only for backends that mask with a large number.
LEAK = 1e-6
# Largest relative change of a document's states after another one: rounding in 16 bits is below, wrong positions above.
CHANGE = 0.05

LossOfLast = Callable[[Any, Batch], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Isolation:
    """How a model keeps packed documents apart.

    Attributes:
        attention: Attention in use, and why.
        states: How layers that carry a state compute, and why; None if there are none.
        mixed_reason: Why documents can't be packed; None if they don't change each other, or were not to be packed.
    """

    attention: str
    states: str | None
    mixed_reason: str | None


def unpackable_reason(model: Any) -> str | None:
    """Return why an architecture can't keep packed documents apart, as far as that shows without weights.

    Args:
        model: A model, or its skeleton.
    """
    parameters = signature(type(model.base_model).forward).parameters
    takes_anything = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    if "position_ids" in parameters or takes_anything or state_layers(model):
        return None
    return f"{type(model).__name__} takes no positions, so a document can't begin in the middle of a sequence"


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
        first: A document.
        second: Another document, with supervised tokens.
        any_attention: Whether attention by documents may replace the model's own; it is used if it computes the same
            and keeps documents apart.
        packed: Whether documents are to be packed.
        loss_of_last: Computes a scalar from the last document of a batch; default: the supervised loss.
    """
    model.eval()
    own = model.config._attn_implementation
    states = use_document_states(model) if packed else None
    attention = own
    if any_attention:
        expected = _hidden_states(model, [second])
        attention = use_document_attention(model)
        reason = None
        if model.config._attn_implementation != own:
            reason = _replaced_reason(model, first, second, expected, packed, loss_of_last)
        if reason is not None:
            set_text_attention(model, own)
            attention = f"{own}, with a mask over all documents of a row: {reason}"
    mixed = mixed_reason(model, first, second, loss_of_last) if packed else None
    if mixed is None:
        return Isolation(attention, states, None)
    # What a run that was never to be packed uses, so that a continued run uses the same.
    set_text_attention(model, own)
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
            return "by documents, the model computes something else"
        mixed = mixed_reason(model, first, second, loss_of_last) if packed else None
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        return f"by documents, the model can't be run ({error})"
    return None if mixed is None else f"by documents, {mixed}"


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
def _hidden_states(model: Any, documents: Sequence[TokenizedExample]) -> torch.Tensor:
    """Return the last hidden states of packed documents, (tokens, features)."""
    batch = collate(documents, packed=True).to(model.device)
    states: torch.Tensor = text_model(model)(**model_inputs(model, batch)).last_hidden_state[0]
    return states


def _change(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).float().norm() / expected.float().norm()).item()
