"""Every objective with documents that it can learn from, for tests of what holds for all of them."""

from dataclasses import replace

import numpy as np
import torch

from qlora.config import TrainSection
from qlora.data.mismatched import BAD, GOOD, MISMATCHED, RATING
from qlora.objectives import objective_from_section
from tests.training.test_loop import random_examples

# Settings of the train section, by objective.
OBJECTIVES = {
    "sft": {},
    "dpo": {"preference": {"label_smoothing": 0.1, "sft_weight": 0.3}},
    "ipo": {},
    "orpo": {},
    "simpo": {"preference": {"gamma": 0.4, "label_smoothing": 0.2}},
    "cpo": {"preference": {"length_normalize": True}},
    "kto": {"preference": {"beta": 0.7, "desirable_weight": 1.3}},
}


def section_of(name, **settings):
    """Return a train section of the objective."""
    return TrainSection(**{"objective": name, "output_dir": "run"} | OBJECTIVES[name] | settings)


def loss_of(name, **settings):
    """Return the objective's loss."""
    return objective_from_section(section_of(name, **settings)).loss


def examples_of(name, generator, count):
    """Return groups of random documents that the objective can learn from, each with supervised tokens."""
    size = loss_of(name).group_size
    examples = [
        replace(example, weights=np.where(np.arange(len(example)) == len(example) - 1, 1, example.weights))
        for example in random_examples(generator, count * size)
    ]
    if name == "kto":
        ratings = torch.randint(2, (count,), generator=generator).tolist()
        ratings = [value for good in ratings for value in (GOOD if good else BAD, MISMATCHED)]
        examples = [
            replace(each, values={RATING: np.int8(rating)}) for each, rating in zip(examples, ratings, strict=True)
        ]
    return examples
