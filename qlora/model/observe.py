"""Statistics of the inputs that a model's layers get from a few examples."""

from collections.abc import Sequence
from typing import Any

import torch

from qlora.data import TokenizedExample, collate
from qlora.errors import ModelError
from qlora.lora import InputObserver, InputStatistics
from qlora.model.loss import model_inputs

# Tokens that statistics of inputs are taken from: enough for a few hundred directions, and a second's work on a GPU.
CALIBRATION_TOKENS = 16_384


def observe(
    model: Any, names: Sequence[str], examples: Sequence[TokenizedExample], directions: int = 0
) -> dict[str, InputStatistics]:
    """Run a model on the first examples, and return statistics of the inputs of its layers.

    Args:
        model: A causal language model, in evaluation mode.
        names: Names of linear layers.
        examples: Documents; up to `CALIBRATION_TOKENS` tokens of them are read.
        directions: See :class:`InputStatistics`.

    Raises:
        ModelError: There is no example.
    """
    if not len(examples):
        raise ModelError("lora.init: there are no examples to take statistics of the layers' inputs from.")
    left = CALIBRATION_TOKENS
    with InputObserver(model, names, directions) as observer, torch.no_grad():
        for example in examples:
            model.base_model(**model_inputs(model, collate([example]).to(model.device)))
            left -= len(example)
            if left <= 0:
                break
    return observer.statistics
