"""Make a tiny base of images: a small ViT pretrained on drawn letters, with its image processor.

It replaces a download from a model hub. The letters are drawn with Pillow's built-in font, turned, slanted, moved and
blurred at random; the base never sees a digit. On one core it takes about a minute.
"""

import argparse
import hashlib
import json
import shutil
import string
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

RECIPE_FILE = "tiny_recipe.json"
LETTERS = string.ascii_uppercase
# Letters are drawn at this size and scaled down as handwriting is scanned.
CANVAS, FONT_SIZE = 48, 34


@dataclass(frozen=True)
class Recipe:
    """Settings that determine the base."""

    image_size: int = 16
    patch_size: int = 4
    # Every width is a multiple of 64, NF4's block size.
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    drawings: int = 8_000
    batch_size: int = 100
    epochs: int = 5
    lr: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


def draw_letter(letter: str, random: np.random.Generator) -> Image.Image:
    """Draw a letter in white on black, 8 × 8 pixels in shades of grey."""
    image = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(image)
    width = int(random.integers(0, 3))
    size = FONT_SIZE + int(random.integers(-6, 7))
    draw.text((CANVAS / 2, CANVAS / 2), letter, 255, ImageFont.load_default(size), anchor="mm", stroke_width=width)
    slant, stretch = random.uniform(-0.4, 0.4), random.uniform(0.8, 1.25)
    shift = random.uniform(-3, 3, 2)
    centre = CANVAS / 2
    affine = (stretch, slant, centre * (1 - stretch - slant) + shift[0], 0, 1, shift[1])
    image = image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    image = image.rotate(random.uniform(-20, 20), Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.5)))
    box = image.getbbox() or (0, 0, CANVAS, CANVAS)  # as the digits, which fill the height
    middle, half = (box[0] + box[2]) / 2, max(box[3] - box[1], box[2] - box[0]) / 2
    top = (box[1] + box[3]) / 2 - half
    square = (round(middle - half), round(top), round(middle + half), round(top + 2 * half))
    return image.crop(square).resize((8, 8), Image.Resampling.BOX)


def make_model(recipe: Recipe) -> ViTForImageClassification:
    """Build a ViT with random weights and a score for each letter."""
    config = ViTConfig(
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        id2label=dict(enumerate(LETTERS)),
        label2id={letter: number for number, letter in enumerate(LETTERS)},
    )
    return ViTForImageClassification(config)


def pretrain(recipe: Recipe, processor: ViTImageProcessorPil) -> tuple[ViTForImageClassification, float]:
    """Train the model to tell drawn letters apart.

    Returns:
        The model, and its accuracy on letters that were not trained on.
    """
    random = np.random.default_rng(recipe.seed)
    numbers = random.integers(0, len(LETTERS), recipe.drawings)
    drawn = [draw_letter(LETTERS[number], random).convert("RGB") for number in numbers]
    pixels = processor(images=drawn, return_tensors="pt")["pixel_values"]
    labels = torch.from_numpy(numbers)
    held_out = recipe.drawings // 12
    torch.manual_seed(recipe.seed)
    model = make_model(recipe).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps_per_epoch = -(-(recipe.drawings - held_out) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * steps_per_epoch)
    for _ in range(recipe.epochs):
        order = held_out + torch.from_numpy(random.permutation(recipe.drawings - held_out))
        for chosen in order.split(recipe.batch_size):
            loss = model(pixel_values=pixels[chosen], labels=labels[chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        predicted = model(pixel_values=pixels[:held_out]).logits.argmax(-1)
    return model, (predicted == labels[:held_out]).float().mean().item()


def describe_recipe(recipe: Recipe) -> dict[str, object]:
    """Return everything that the base depends on: the settings, and a digest of this code."""
    return {**asdict(recipe), "code_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}


def main() -> None:
    """Make the base, unless the folder has it already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the base")
    out = parser.parse_args().out
    recipe = Recipe()
    file = out / RECIPE_FILE
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) == describe_recipe(recipe):
        print(f"  {out} is there already.")
        return
    started = time.perf_counter()
    size = {"height": recipe.image_size, "width": recipe.image_size}
    processor = ViTImageProcessorPil(size=size)
    model, accuracy = pretrain(recipe, processor)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent))
    model.save_pretrained(staging)
    processor.save_pretrained(staging)
    (staging / RECIPE_FILE).write_text(json.dumps(describe_recipe(recipe), indent=2), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"  {out}: {parameters:,} parameters, {accuracy:.1%} of held-out letters right, "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
