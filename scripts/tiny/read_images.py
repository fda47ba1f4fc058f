"""Classify a folder of images by label with transformers alone, and count those that are right.

python scripts/tiny/read_images.py MODEL FOLDER [--at-least 0.97]
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

BATCH_SIZE = 64


@torch.no_grad()
def read_images(model_folder: Path, files: list[Path]) -> list[str]:
    """Return the labels that a merged model gives images."""
    model = AutoModelForImageClassification.from_pretrained(model_folder, dtype="auto").eval()
    processor = AutoImageProcessor.from_pretrained(model_folder, backend="pil")
    found = []
    for start in range(0, len(files), BATCH_SIZE):
        images = [Image.open(file).convert("RGB") for file in files[start : start + BATCH_SIZE]]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(model.dtype)
        found += [model.config.id2label[number] for number in model(pixel_values=pixels).logits.argmax(-1).tolist()]
    return found


def main() -> None:
    """Print the share of images that are right; exit with 1 if it is below --at-least."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the merged model")
    parser.add_argument("images", type=Path, help="folder with a folder of images for each label")
    parser.add_argument("--at-least", type=float, default=0.0, help="smallest share that must be right")
    arguments = parser.parse_args()
    files = sorted(arguments.images.glob("*/*.png"))
    found = read_images(arguments.model, files)
    share = sum(label == file.parent.name for label, file in zip(found, files, strict=True)) / len(files)
    print(f"  {share:.1%} of {len(files)} held-out images are right")
    if share < arguments.at_least:
        raise SystemExit(f"expected {arguments.at_least:.0%} or more")


if __name__ == "__main__":
    main()
