"""Tiny models of images and images for tests: random weights, real formats."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

LABELS = ("red", "green", "blue")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
# Config and model classes of transformers, with the sizes of a tiny model.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTModel", SMALL | {"intermediate_size": 128}),
    "deit": ("DeiTConfig", "DeiTModel", SMALL | {"intermediate_size": 128}),
    "dinov2": ("Dinov2Config", "Dinov2Model", SMALL),
    # Drops no paths, so that equal steps are equal however they are batched.
    "swin": ("SwinConfig", "SwinModel", {
        "embed_dim": 64, "depths": [1, 2], "num_heads": [2, 4], "image_size": 16, "patch_size": 2, "window_size": 4,
        "drop_path_rate": 0.0,
    }),
    "convnext": ("ConvNextConfig", "ConvNextModel", {"hidden_sizes": [64, 128], "depths": [1, 1], "num_stages": 2}),
}  # fmt: skip


def make_image_base(folder: Path, family: str = "vit", seed: int = 1, **changes: Any) -> Path:
    """Write a tiny model of images without a head, with a processor that resizes to 16 × 16 pixels."""
    config_class, model_class, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**sizes, "initializer_range": 0.1, **changes})
    getattr(transformers, model_class)(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    mean, deviation = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    transformers.ViTImageProcessorPil(size=size, image_mean=mean, image_std=deviation).save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int, generator: np.random.Generator) -> Path:
    """Write images of 24 × 20 pixels, in which one color is stronger: a folder for each."""
    for channel, label in enumerate(LABELS):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 120, (20, 24, 3))
            pixels[..., channel] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


def image_config(base: Path, images: Path, output_dir: Path, **train: Any) -> dict[str, Any]:
    """Return a config that classifies images in a few steps, in fp32."""
    return {
        "model": {"base": str(base), "compute_dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(images), "eval": [{"path": str(images), "split": "test"}], "format": "images"},
        "train": {
            "objective": "classify", "output_dir": str(output_dir), "max_steps": 6, "micro_batch_size": 4,
            "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "eval_every": 3, "save_every": 3,
        } | train,
    }  # fmt: skip
