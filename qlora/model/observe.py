"""Statistics of the inputs that a model's layers get from a few examples."""

from collections.abc import Sequence
from typing import Any

import torch

from qlora.data import TokenizedExample, collate
from qlora.errors import ModelError
from qlora.lora import InputObserver, InputStatistics, input_embedding, text_model
from qlora.model.loss import model_inputs

# Rows of a layer's inputs that statistics are taken from: enough for a few hundred directions, and a second's work on
# a GPU. They are tokens, or patches of images.
CALIBRATION_ROWS = 16_384


def observe(
    model: Any, names: Sequence[str], key: str, examples: Sequence[TokenizedExample], directions: int = 0
) -> dict[str, InputStatistics]:
    """Run a model on the first examples, and return statistics of the inputs of its layers.

    Args:
        model: A causal language model, in evaluation mode.
        names: Names of linear layers.
        key: Key of the config that asks for it, for errors.
        examples: Documents; they are read until half of the layers have seen `CALIBRATION_ROWS` rows: later stages of a
            model of images see fewer than the first, and a pooler one of each image.
        directions: See :class:`InputStatistics`.

    Raises:
        ModelError: There is no example, or a layer is never used.
    """
    if not len(examples):
        raise ModelError(f"{key}: there are no examples to take statistics of the layers' inputs from.")
    # New tokens, whose rows are added with the adapters, count as the base's last one.
    embedding = input_embedding(model)
    last = None if embedding is None else embedding.num_embeddings - 1
    with InputObserver(model, names, directions) as observer, torch.no_grad():
        for example in examples:
            batch = collate([example]).to(model.device)
            if last is not None:
                batch.input_ids.clamp_(max=last)
            text_model(model)(**model_inputs(model, batch))
            seen = [own.count for own in observer.statistics.values()]
            if seen and torch.stack(seen).median() >= CALIBRATION_ROWS:
                break
    if unused := [name for name in names if name not in observer.statistics]:
        raise ModelError(
            f"{key}: the model never used {', '.join(unused[:3])}, so nothing is known about the inputs; leave such "
            "layers out of lora.targets."
        )
    return observer.statistics
