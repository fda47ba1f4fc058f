"""What a run's merges are judged by: its held-out examples, and the loss of a written model on them."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.data import ExampleSet, eval_batches
from qlora.model import SUPERVISED, Loss, datasets_from_section, evaluate, labels_from_config, load_frozen

# Number of training examples that replace held-out ones in a run without them.
NUM_TRAIN_EXAMPLES = 64


@dataclass(frozen=True, slots=True)
class Judge:
    """The loss that merges onto different base weights are compared by.

    Attributes:
        loss: A loss that a merged model has by itself: it needs neither adapters nor a reference model.
        note: What a user should know about it, in the merge report; None if it is the one that was trained.
    """

    loss: Loss = SUPERVISED
    note: str | None = None


def held_out_examples(run: RunDirectory, tokenizer: Any) -> ExampleSet:
    """Return the held-out examples of a run; if it has none, its first training examples.

    Args:
        run: The run.
        tokenizer: Tokenizer of the run, with its template.

    Raises:
        DataError: The run's data can't be read.
    """
    config = load_config(run.config)
    datasets = datasets_from_section(
        config.data, tokenizer, config.train.seed, own_template=True, labels=labels_from_config(config, run)
    )
    return datasets.eval or datasets.train[:NUM_TRAIN_EXAMPLES]


def written_loss(
    folder: Path,
    dtype: str,
    examples: ExampleSet,
    loss: Loss,
    device: str | torch.device,
    trust_remote_code: bool = False,
) -> float:
    """Load a merged model, and return its mean loss per unit.

    Args:
        folder: Folder with weights, config and the run's tokenizer.
        dtype: Dtype of the weights and of the computation.
        examples: Examples of the run's data.
        loss: Loss to compute.
        device: Device to compute on.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ModelError: The model can't be loaded.
    """
    model = load_frozen(
        str(folder), "none", compute_dtype=dtype, device=device, trust_remote_code=trust_remote_code, head=loss.head
    )
    mean = evaluate(model, eval_batches(examples, 1), loss=loss).loss
    del model
    gc.collect()
    return mean
