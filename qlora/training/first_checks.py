"""Checks of a run's data and model against each other, before its first step."""

from collections.abc import Sequence
from typing import Any

import torch

from qlora.config import DataSection, RunConfig
from qlora.data import Datasets, ExampleSet, TokenizedExample, choose_pad_token, collate, make_example
from qlora.errors import DataError, ModelError
from qlora.files import BaseFiles
from qlora.layers import rebuild_activations
from qlora.lora import ScoreHead, reads_images, scores_documents
from qlora.model import Isolation, check_loss, keep_apart, positions_of, supervised_loss
from qlora.model.isolation import check_causal
from qlora.model.score import check_scores, document_scores, last_scores
from qlora.out_of_memory import is_out_of_memory

# Number of tokens that the loss is checked on.
CHECKED_TOKENS = 16
# Largest relative difference of the loss and of its gradient's norm before and after modules are replaced, in units of
# the compute dtype's precision; in fp32, sums in another order differ by more than that.
ROUNDINGS, LEAST_TOLERANCE = 8, 1e-4


def check_loaded(
    config: RunConfig, model: Any, datasets: Datasets, head: ScoreHead | None, packed: bool
) -> tuple[Isolation, str]:
    """Check a model's loss and the isolation of packed documents on a few tokens, and have it rebuild activations.

    Returns:
        How the model keeps packed documents apart, and the activations in use.

    Raises:
        ModelError: The model can't be trained, or can't keep packed documents apart and `data.packing` is true.
    """
    first = datasets.train[0]
    # The last token of a text that is scored is not the padding token.
    span = slice(0, CHECKED_TOKENS) if head is None else slice(-CHECKED_TOKENS, None)
    ids = first.input_ids[span]
    example = make_example(ids, [True] * len(ids), first.values)
    _check_outputs(model, example)
    other = example
    if not reads_images(model):
        check_causal(model, example)
        other_ids = (ids + 1) % model.get_input_embeddings().num_embeddings  # a different token at every position
        other = make_example(other_ids, [True] * len(ids), first.values)
    isolation = keep_apart(
        model, example, other, packed=packed,
        any_attention=config.model.attention == "auto" and not reads_images(model),
        loss_of_last=None if head is None else last_scores,
    )  # fmt: skip
    check_packing(config.data, isolation.mixed_reason)
    activations = rebuild_checked(model, example)
    _check_outputs(model, example)  # again, with the modules that will be trained
    return isolation, activations


def _check_outputs(model: Any, example: TokenizedExample) -> None:
    """Check that the loss is computed from what the model's own class returns for a short example."""
    if scores_documents(model):
        check_scores(model, example)
    else:
        check_loss(model, collate([example]).to(model.device))


def rebuild_checked(model: Any, example: TokenizedExample) -> str:
    """Have a model rebuild activations, and give it its own modules back if its loss or gradient is then another.

    Args:
        model: A model with adapters, in evaluation mode.
        example: A short example.

    Returns:
        The activations in use.
    """
    own = [(parent, *named) for parent in model.modules() for named in parent.named_children()]
    before = _loss_and_gradient(model, example)
    activations = rebuild_activations(model)
    tolerance = max(LEAST_TOLERANCE, ROUNDINGS * torch.finfo(model.dtype).eps)
    try:
        after = _loss_and_gradient(model, example)
        if ((after - before).abs() <= tolerance * before.abs()).all():
            return activations
        reason = "loss and gradient norm of a few tokens go from {:.6g} and {:.6g} to {:.6g} and {:.6g}".format(
            *before.tolist(), *after.tolist()
        )
    except Exception as error:  # whatever a model's own code raises
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    for parent, name, child in own:
        setattr(parent, name, child)
    return f"the model's own modules: with faster ones, {reason}"


@torch.enable_grad()
def _loss_and_gradient(model: Any, example: TokenizedExample) -> torch.Tensor:
    """Return a loss of a short example, or the size of its scores, and its gradient's norm, (2,), fp32."""
    batch = collate([example]).to(model.device)
    loss = document_scores(model, batch).norm() if scores_documents(model) else supervised_loss(model, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    squares = sum(gradient.float().square().sum() for gradient in gradients if gradient is not None)
    return torch.tensor([loss.item(), float(squares) ** 0.5])


def check_packing(section: DataSection, reason: str | None) -> None:
    """Check that there is no reason against packing, if the config insists on it.

    Raises:
        ModelError: There is one, and `data.packing` is true.
    """
    if reason is not None and section.packing is True:
        raise ModelError(f"{reason}; set data.packing: auto, which then does not pack, or false.")


def check_fit(skeleton: Any, files: BaseFiles, num_embeddings: int, examples: Sequence[ExampleSet]) -> None:
    """Check that the model has an embedding for every id and enough positions; a GPU would abort on a missing one.

    Args:
        skeleton: The base without weights.
        files: The base's files.
        num_embeddings: Number of tokens that it embeds, with those that the config adds.
        examples: All examples that the model is run on.

    Raises:
        DataError: An embedding or a position is missing.
    """
    stores = [store for each in examples for store in each.stores]
    largest = max(store.largest_id() for store in stores)
    if largest >= num_embeddings:
        raise DataError(
            f"The tokenizer has id {largest}, but the model embeds {num_embeddings} tokens: they do not match, "
            "or tokens were added without rows for them; name those to add in data.new_tokens."
        )
    positions = positions_of(files, skeleton.config)
    longest = max(int(store.lengths.max()) for store in stores)
    if positions and longest > positions:
        raise DataError(
            f"The longest example has {longest} tokens, but the model's config has positions for {positions}; lower "
            "data.max_seq_len, or extend the context with model.rope_scaling."
        )


def pad_token_of(config: RunConfig, tokenizer: Any, datasets: Datasets, size: int) -> str:
    """Return the token that documents are padded with where they are scored.

    Args:
        config: Config of the run.
        tokenizer: Tokenizer, whose padding token is set.
        datasets: Examples of the run.
        size: Number of tokens that the model embeds.

    Raises:
        DataError: Documents end with every token that they could be padded with.
    """
    sets = (datasets.train, *datasets.held_out.values())
    last_ids = {id_ for examples in sets for store in examples.stores for id_ in store.last_ids()}
    return choose_pad_token(tokenizer, last_ids, size, is_given="pad_token" in config.data.special_tokens)
