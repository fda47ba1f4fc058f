"""What a run's weights are judged by: its held-out examples, and the loss that a written model has on them."""

import gc
from pathlib import Path
from typing import Any

import torch

from qlora.config import RunConfig
from qlora.data import ExampleSet, eval_batches
from qlora.model import datasets_from_section, evaluate, load_base

# Training examples that stand in where a run held none out.
NUM_TRAIN_EXAMPLES = 64


def held_out_examples(config: RunConfig, tokenizer: Any) -> ExampleSet:
    """The examples that a run was evaluated on; without those, some that it was trained on.

    Args:
        config: Of the run.
        tokenizer: The run's own, with its template.

    Raises:
        DataError: The run's data can't be read.
    """
    datasets = datasets_from_section(config.data, tokenizer, config.train.seed, own_template=True)
    return datasets.eval or datasets.train[:NUM_TRAIN_EXAMPLES]


def written_loss(
    folder: Path, dtype: str, examples: ExampleSet, device: str | torch.device, trust_remote_code: bool = False
) -> float:
    """Loads a merged model and computes its loss.

    Args:
        folder: With weights, config and the run's tokenizer.
        dtype: Of the weights, and to compute in.
        examples: Of the run's data.
        device: To compute on.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ModelError: The model can't be loaded.
    """
    model, _ = load_base(str(folder), "none", compute_dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    loss = evaluate(model, eval_batches(examples, 1)).loss
    del model
    gc.collect()
    return loss
