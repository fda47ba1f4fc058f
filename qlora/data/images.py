"""Images as documents: read from files, made ready by a model's own image processor, stored as pixels with a label."""

import base64
import io
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora.data.encode import Encoded, ExampleEncoder
from qlora.data.examples import Example, LabelledImage
from qlora.data.labels import LABEL, Labels
from qlora.data.store import Column
from qlora.data.tokens import PIXELS, TokenizedExample, make_example
from qlora.errors import DataError, ModelError

PROCESSOR_FILE = "preprocessor_config.json"
# Name of the column with factor, mean and standard deviation of each channel, (3, channels), fp32.
SCALING = "pixel_scaling"
CHANNELS = 3
# Largest difference from the processor's own values, in units of the normalized pixels.
TOLERANCE = 1e-6
# Width and height of the images that a processor is tried on.
TRIED = ((96, 64), (64, 96))
NUM_THREADS = 4
# Bytes of pixels that are prepared at a time.
BATCH_BYTES = 64 << 20
# An image is a document of this one token, which no model is given; its number of tokens is the number of images.
PLACEHOLDER = 0


class ImageProcessor:
    """A model's own image processor, on Pillow: it decides size, crop and scale.

    Resized pixels are stored as bytes where the processor rescales and normalizes them last, which :func:`normalize`
    does for a batch instead; that this gives the same values is checked on a few images. Otherwise its own values are
    stored.

    Args:
        processor: An image processor of transformers that runs on Pillow.
        file: Its `preprocessor_config.json`.

    Attributes:
        shape: Shape of an image's pixels, (channels, height, width).
        dtype: Their dtype, uint8 or float32.
        scaling: Factor, mean and standard deviation of each channel, (3, channels), fp32.

    Raises:
        ModelError: The processor gives images of different sizes, or can't be run.
    """

    def __init__(self, processor: Any, file: Path) -> None:
        self._processor, self.file = processor, file
        self.scaling = np.ones((3, CHANNELS), dtype=np.float32)
        self.scaling[1] = 0
        tried = [_random_image(size) for size in TRIED]
        try:
            own = [self._run(image) for image in tried]
        except Exception as error:  # a wrong value in its file can make a processor raise anything
            raise ModelError(f"{file}: the image processor can't be run: {error}; download it again.") from error
        if len({pixels.shape for pixels in own}) > 1:
            raise ModelError(
                f"{file}: the image processor gives images of different sizes ({own[0].shape[1:]} and "
                f"{own[1].shape[1:]} pixels), which can't be batched; set a size with height and width, or "
                "do_center_crop with a crop_size."
            )
        if own[0].ndim != 3 or own[0].shape[0] != CHANNELS:
            raise ModelError(
                f"{file}: the image processor gives values of shape {own[0].shape}, not (3, height, width)."
            )
        self._stores_bytes = self._can_store_bytes(tried, own)
        self.shape: tuple[int, ...] = own[0].shape
        self.dtype = np.dtype(np.uint8 if self._stores_bytes else np.float32)

    def pixels(self, image: Any) -> np.ndarray:
        """Return the pixels of a Pillow image in RGB, of :attr:`shape` and :attr:`dtype`."""
        return self._unscaled(image) if self._stores_bytes else self._run(image)

    @property
    def columns(self) -> tuple[Column, ...]:
        """Columns of a store of images."""
        shape = ",".join(map(str, self.shape))
        return (
            Column(PIXELS, f"({shape}){self.dtype}", "document"),
            Column(SCALING, f"(3,{CHANNELS})float32", "document"),
        )

    def made_up(self) -> dict[str, torch.Tensor]:
        """Return the values of a made-up image, by column."""
        values = {PIXELS: np.zeros(self.shape, self.dtype), SCALING: self.scaling}
        return {name: torch.from_numpy(value) for name, value in values.items()}

    def settings(self) -> Mapping[str, Any]:
        """Return all settings of the processor, on which the pixels depend."""
        return {"class": type(self._processor).__name__, **self._processor.to_dict()}

    def describe(self) -> str:
        """Return one line about what it does to images."""
        _, height, width = self.shape
        stored = "stored in 8 bits" if self._stores_bytes else "stored normalized in fp32"
        return f"{type(self._processor).__name__}: {height} × {width} pixels in RGB, {stored}"

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the processor's file into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.file, Path(folder) / PROCESSOR_FILE)

    def _can_store_bytes(self, tried: Sequence[Any], own: Sequence[np.ndarray]) -> bool:
        """Return whether rescaling and normalizing come last; then set the factors."""
        settings = self._processor
        factor = getattr(settings, "rescale_factor", None) if getattr(settings, "do_rescale", False) else 1.0
        has_mean = bool(getattr(settings, "do_normalize", False))
        mean, deviation = (getattr(settings, name, None) if has_mean else plain for name, plain in (
            ("image_mean", 0.0), ("image_std", 1.0)
        ))  # fmt: skip
        try:
            scaling = [np.broadcast_to(np.array(each, np.float32), CHANNELS) for each in (factor, mean, deviation)]
            self.scaling = np.stack(scaling)
            stored = [self._unscaled(image) for image in tried]
        except (TypeError, ValueError):
            return False
        return all(
            pixels.dtype == np.uint8
            and pixels.shape == wanted.shape
            and np.abs(_normalized(pixels, self.scaling) - wanted).max() <= TOLERANCE
            for pixels, wanted in zip(stored, own, strict=True)
        )

    def _run(self, image: Any, **settings: Any) -> np.ndarray:
        return self._processor(images=image, return_tensors="np", **settings)["pixel_values"][0]

    def _unscaled(self, image: Any) -> np.ndarray:
        return self._run(image, do_rescale=False, do_normalize=False)


def normalize(values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the pixel values that a model takes, computed in fp32.

    Args:
        values: Values of a batch's documents, with `pixels` (images, channels, height, width) and `pixel_scaling`
            (images, 3, channels).
        dtype: Dtype of the model.

    Returns:
        (images, channels, height, width).
    """
    factor, mean, deviation = values[SCALING][..., None, None].unbind(dim=1)
    return ((values[PIXELS].float() * factor - mean) / deviation).to(dtype)


def open_image(image: Path | bytes) -> Any:
    """Decode an image to Pillow's RGB, turned as its EXIF orientation says; an alpha channel is dropped.

    Raises:
        DataError: The file is missing, damaged, no image, or has more than 8 bits per channel.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = f"its image of {len(image)} bytes" if isinstance(image, bytes) else f"its image {image}"
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
            if file.mode.startswith(("I", "F")):
                raise DataError(f"{name} has more than 8 bits per channel (mode {file.mode}); convert it to 8 bits.")
            upright = ImageOps.exif_transpose(file)
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")
            return upright.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; relative paths count from the data file's folder.") from None
    except DataError:
        raise
    except Exception as error:  # decoders of damaged files raise anything, such as struct.error or KeyError
        reason = "it is no image that Pillow reads" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise DataError(f"{name} can't be decoded: {reason}.") from None


def as_data_uri(example: TokenizedExample) -> str | None:
    """Return an image as a PNG in a data URI, as the model gets it; None for other documents."""
    if PIXELS not in example.values:
        return None
    from PIL import Image  # not installed where only texts are read

    pixels = np.asarray(example.values[PIXELS])
    if pixels.dtype != np.uint8:
        low, high = pixels.min(), pixels.max()
        pixels = ((pixels - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True, slots=True)
class PendingImages:
    """Images that are being decoded.

    Attributes:
        examples: The examples.
        pixels: The pixels of each, once they are there; None for an example that is no image.
    """

    examples: Sequence[Example]
    pixels: list[Future[np.ndarray] | None]


class ImageEncoder:
    """Turns labelled images into documents of one token with pixels and label; has the methods of `ExampleEncoder`.

    Args:
        processor: The model's image processor.
        labels: Labels of the images.

    Attributes:
        labels: The labels.
        template: What the report says in place of a chat template.
        batch_rows: Largest number of rows to encode at a time.
    """

    def __init__(self, processor: ImageProcessor, labels: Labels | None) -> None:
        self.processor, self.labels = processor, labels
        self.template = "none, as images have no text"
        size = int(np.prod(processor.shape)) * processor.dtype.itemsize
        self.batch_rows = max(NUM_THREADS, min(ExampleEncoder.batch_rows, BATCH_BYTES // size))
        self._executor = ThreadPoolExecutor(max_workers=NUM_THREADS)

    def encode(self, examples: Sequence[Example]) -> list[Encoded | DataError]:
        """Encode examples; an example that can't be encoded gives its error instead."""
        return self.finish(self.begin(examples))

    def begin(self, examples: Sequence[Example]) -> PendingImages:
        """Start decoding images in the background; see :meth:`finish`."""
        pixels = [
            self._executor.submit(self._pixels, example.image) if isinstance(example, LabelledImage) else None
            for example in examples
        ]
        return PendingImages(examples, pixels)

    def finish(self, pending: PendingImages) -> list[Encoded | DataError]:
        """Return the results of :meth:`encode` for examples that :meth:`begin` was given."""
        results: list[Encoded | DataError] = []
        for example, pixels in zip(pending.examples, pending.pixels, strict=True):
            try:
                if pixels is None or not isinstance(example, LabelledImage):
                    raise DataError("it has no image, which the base reads; set model.base to one of texts.")
                values = {PIXELS: pixels.result(), SCALING: self.processor.scaling}
                label = {} if self.labels is None else {LABEL: self.labels.value(example.labels)}
                results.append(Encoded([make_example([PLACEHOLDER], [0], values | label)]))
            except DataError as error:
                results.append(error)
        return results

    def columns(self, format: str) -> Sequence[Column]:
        """Return the columns of a format's stores, in addition to those of every store."""
        del format
        return (*self.processor.columns, *(() if self.labels is None else (self.labels.column(),)))

    def identity(self) -> list[Any]:
        """Return what the documents depend on besides the rows, as JSON values."""
        from PIL import __version__ as pillow

        return [dict(self.processor.settings()), pillow]

    def notes(self, format: str) -> list[str]:
        """Return lines on how documents are made."""
        del format
        return [f"images are prepared by {self.processor.describe()}; packing does not apply to them"]

    def _pixels(self, image: Path | bytes) -> np.ndarray:
        decoded = open_image(image)
        try:
            pixels = self.processor.pixels(decoded)
        except Exception as error:  # processors raise anything, such as for an aspect ratio that leaves no pixel
            raise DataError(f"its image can't be prepared: {_reason(error)}.") from None
        if pixels.shape != self.processor.shape:
            raise DataError(
                f"its image of {decoded.width} × {decoded.height} pixels is prepared as values of shape "
                f"{pixels.shape}, not {self.processor.shape}; crop or resize it."
            )
        return pixels


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _normalized(pixels: np.ndarray, scaling: np.ndarray) -> np.ndarray:
    values = {PIXELS: torch.from_numpy(pixels[None].copy()), SCALING: torch.from_numpy(scaling[None].copy())}
    return normalize(values, torch.float32)[0].numpy()


def _random_image(size: tuple[int, int]) -> Any:
    from PIL import Image

    width, height = size
    values = np.random.default_rng(0).integers(0, 256, (height, width, CHANNELS), dtype=np.uint8)
    return Image.fromarray(values)
