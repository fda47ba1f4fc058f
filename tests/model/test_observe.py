"""Statistics of layers' inputs from a few examples."""

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from qlora.data import make_example
from qlora.model import observe as module
from qlora.model.observe import observe
from tests.tiny_images import SMALL


def test_the_rows_of_images_are_counted(monkeypatch):
    monkeypatch.setattr(module, "CALIBRATION_ROWS", 40)
    model = ViTForImageClassification(ViTConfig(**SMALL)).eval()
    values = {"pixels": np.zeros((3, 16, 16), np.uint8), "pixel_scaling": np.ones((3, 3), np.float32)}
    names = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and "layer" in name]
    found = observe(model, names, "lora.init", [make_example([0], [0], values)] * 9)
    assert {int(each.count) for each in found.values()} == {3 * 17}  # of 16 patches and the class each
