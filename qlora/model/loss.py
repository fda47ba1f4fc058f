"""The supervised loss of a causal language model, without ever holding the logits of a batch."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from qlora.data import Batch, TokenizedExample, collate, make_example
from qlora.errors import ModelError
from qlora.kernels import linear_cross_entropy, recipe_of
from qlora.layers.attention import mask_arguments
from qlora.lora import head_blocks

# Relative difference above which the two ways to the loss are not the same; they share all but the head's product.
TOLERANCE = 0.01
# Share of a document's gradient that may lie in another one: none, but for a backend that masks by a large number.
LEAK = 1e-6
# Relative change of a document's states behind another one: rounding in 16 bits stays below, other positions do not.
CHANGE = 0.05


def supervised_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Sum over the batch of -log p(label), each by its weight, over supervised positions alone.

    Args:
        model: A causal language model of transformers.
        batch: On the model's device.

    Returns:
        A scalar, fp32, to be divided by the supervised tokens' weight of whatever is averaged over.
    """
    hidden = model.base_model(**_inputs(model, batch)).last_hidden_state
    recipe = recipe_of(hidden)  # of the last norm, whose input is all that is needed of it
    if recipe is not None:
        (hidden,) = recipe.inputs
    head = model.get_output_embeddings()
    scale, softcap = logit_transform(model.config)
    rows, labels = (tensor.flatten(0, 1).index_select(0, batch.supervised) for tensor in (hidden, batch.labels))
    norm = None if recipe is None else recipe.source.function
    return linear_cross_entropy(rows, head_blocks(head), labels, head.bias, scale, softcap, batch.weights, norm)


def _inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """A batch for a model; positions that begin anew in a row, and no mask, keep its documents apart."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        **mask_arguments(model, batch.attention_mask, batch.cu_seq_lens, batch.lengths),
    }


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Factor and soft cap that an architecture puts on its head's product, by its config's keys."""
    text_config = config.get_text_config()
    scale = getattr(text_config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(text_config, "logits_scaling", None) or 1.0  # Granite divides
    return scale, getattr(text_config, "final_logit_softcapping", None)


def check_isolation(model: Any, first: TokenizedExample, second: TokenizedExample) -> None:
    """Sees that documents packed into one row don't see each other: the loss of one has no gradient in another.

    A gradient is exactly zero where nothing flows; outputs would also differ by rounding.

    Args:
        model: With or without adapters; left in evaluation mode.
        first: A document.
        second: Another, with supervised tokens.

    Raises:
        ModelError: They do, as in architectures that carry a state from token to token.
    """
    model.eval()
    embedded: list[torch.Tensor] = []

    def watch(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    context = make_example(first.input_ids, [False] * len(first))
    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        loss = supervised_loss(model, collate([context, second], packed=True).to(model.device))
    finally:
        handle.remove()
    (grad,) = torch.autograd.grad(loss, embedded[0])
    before, own = grad[0].float().split([len(first), len(second)])
    leak = (before.norm() / own.norm()).item()
    with torch.no_grad():
        alone, behind = (
            model.base_model(**_inputs(model, collate(documents, packed=True).to(model.device))).last_hidden_state[0]
            for documents in ([second], [first, second])
        )
    # Without a leak, too, its positions may be others there.
    change = ((behind[len(first) :] - alone).float().norm() / alone.float().norm()).item()
    if not (leak <= LEAK and change <= CHANGE):
        raise ModelError(
            f"{type(model).__name__} lets documents packed into one row change each other (gradient of one in another: "
            f"{leak:.2g} of its own; its states change by {change:.1%}); set data.packing: false."
        )


@torch.no_grad()
def check_loss(model: Any, batch: Batch) -> None:
    """Holds the loss against the model's own logits: some architectures do more on the way to them.

    Args:
        model: With or without adapters; left in evaluation mode.
        batch: A small one, with supervised positions.

    Raises:
        ModelError: They differ or are not finite, or the model can't run with its layers replaced.
    """
    try:
        model.train()  # some architectures have another path there; what it gives may differ by their dropout
        supervised_loss(model, batch)
        model.eval()
        loss = supervised_loss(model, batch).item()
        logits = model(**_inputs(model, batch)).logits
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"{type(model).__name__} can't be run with its linear layers quantized and adapted: {error}. "
            "Some architectures use weights of layers directly; model.quantization=none or other lora.targets may help."
        ) from error
    expected = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), reduction="sum").item()
    if not math.isfinite(loss):
        raise ModelError(
            f"The loss of {type(model).__name__} is {loss} before any training: its weights or activations do not fit "
            f"{model.dtype}; set model.compute_dtype to bfloat16 or float32."
        )
    if not abs(loss - expected) <= TOLERANCE * abs(expected):
        raise ModelError(
            f"{type(model).__name__} does more between its hidden states and its logits than is known here (loss "
            f"{loss:.4f} in chunks, {expected:.4f} by its own logits), so it can't be trained rightly."
        )
