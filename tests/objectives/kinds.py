"""Every objective with documents that it can learn from, for tests of what holds for all of them."""

from dataclasses import replace

import numpy as np
import torch

from qlora.config import TrainSection
from qlora.data import LABEL, Labels, make_example
from qlora.data.images import PLACEHOLDER, SCALING
from qlora.data.mismatched import BAD, GOOD, MISMATCHED, RATING
from qlora.data.ratings import MARGIN
from qlora.data.tokens import PIXELS
from qlora.objectives import objective_from_section
from qlora.objectives.classify import answer_loss
from qlora.objectives.classify_head import head_loss
from tests.training.test_loop import random_examples

# Settings of the train section, by objective.
OBJECTIVES = {
    "sft": {},
    "dpo": {"preference": {"label_smoothing": 0.1, "sft_weight": 0.3}},
    "ipo": {},
    "orpo": {},
    "simpo": {"preference": {"gamma": 0.4, "label_smoothing": 0.2}},
    "cpo": {"preference": {"length_normalize": True}},
    "reward": {"reward": {"center": 0.05}},
    "kto": {"preference": {"beta": 0.7, "desirable_weight": 1.3}},
    "classify": {},
    "classify by head": {"classify_by": "head"},
    "classify images": {"classify_by": "head"},
}
IMAGES = "classify images"
LABELS = Labels(("a", "b", "c"), "tokens", answers=((5, 9, 257), (5, 8, 257), (5, 7, 257)))


def section_of(name, **settings):
    """Return a train section of the objective."""
    return TrainSection(**{"objective": name.split()[0], "output_dir": "run"} | OBJECTIVES[name] | settings)


def loss_of(name, **settings):
    """Return the objective's loss."""
    if name == "classify":
        return answer_loss(LABELS, (0.5, 1.0, 2.0))
    if name in ("classify by head", IMAGES):
        return head_loss(LABELS.names, weights=(0.5, 1.0, 2.0))
    return objective_from_section(section_of(name, **settings)).loss


def examples_of(name, generator, count):
    """Return groups of random documents that the objective can learn from, each with supervised tokens."""
    if name == IMAGES:
        return [image_of(generator) for _ in range(count)]
    size = loss_of(name).group_size
    examples = [
        replace(example, weights=np.where(np.arange(len(example)) == len(example) - 1, 1, example.weights))
        for example in random_examples(generator, count * size)
    ]
    if name == "reward":
        margins = torch.rand(count, generator=generator).repeat_interleave(size).tolist()
        examples = [
            replace(each, values={MARGIN: np.float32(margin)}) for each, margin in zip(examples, margins, strict=True)
        ]
    if name == "kto":
        ratings = torch.randint(2, (count,), generator=generator).tolist()
        ratings = [value for good in ratings for value in (GOOD if good else BAD, MISMATCHED)]
        examples = [
            replace(each, values={RATING: np.int8(rating)}) for each, rating in zip(examples, ratings, strict=True)
        ]
    if name.startswith("classify"):
        numbers = torch.randint(len(LABELS.names), (count,), generator=generator).tolist()
        examples = [
            replace(
                make_example([*each.input_ids, *LABELS.answers[number]], [0] * len(each) + [1, 1, 1]),
                values={LABEL: np.int32(number)},
            )
            for each, number in zip(examples, numbers, strict=True)
        ]
    return examples


def image_of(generator):
    """Return a random image with a random label, as the tiny models of images take them."""
    values = {
        PIXELS: torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=generator).numpy(),
        SCALING: np.array([[1 / 255] * 3, [0.5] * 3, [0.25] * 3], dtype=np.float32),
        LABEL: np.int32(torch.randint(len(LABELS.names), (), generator=generator)),
    }
    return make_example([PLACEHOLDER], [0], values)
