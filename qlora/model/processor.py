"""Loading what turns a base's documents into its inputs: a tokenizer, or the image processor of a model of images."""

from pathlib import Path
from typing import Any

from qlora.data.images import PROCESSOR_FILE, ImageProcessor
from qlora.errors import ModelError
from qlora.files.json_files import read_object
from qlora.model.skeleton import of_images, reason_for_users
from qlora.model.tokenizer import load_tokenizer


def load_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a base, a release or an adapter; or its image processor, if it reads images.

    Args:
        folder: The folder that holds it. Its config.json decides; an adapter's folder has none, and holds either.
        trust_remote_code: Run code that comes with a tokenizer.

    Raises:
        ModelError: It is missing, or can't be used.
    """
    config = folder / "config.json"
    is_for_images = (
        of_images(read_object(config, ModelError, "download it again"))
        if config.is_file()
        else (folder / PROCESSOR_FILE).is_file() and not (folder / "tokenizer_config.json").is_file()
    )
    return load_image_processor(folder) if is_for_images else load_tokenizer(folder, trust_remote_code)


def load_image_processor(folder: Path) -> ImageProcessor:
    """Load the image processor of a model.

    Raises:
        ModelError: The folder has none, Pillow is not installed, or it does not run on Pillow.
    """
    file = folder / PROCESSOR_FILE
    if not file.is_file():
        raise ModelError(
            f"{folder} has no {PROCESSOR_FILE}, which says how the model's images are prepared; copy it from where the "
            "model was published."
        )
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ModelError("Images are read by Pillow, which is not installed; run pip install -e '.[images]'.") from None
    from transformers import AutoImageProcessor

    try:
        # On Pillow also where torchvision is installed, whose resizing gives other pixels.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:  # a damaged file can raise anything
        raise ModelError(f"{file}: no image processor can be made of it: {reason_for_users(error, False)}") from error
    if getattr(processor, "backend", "pil") != "pil":
        raise ModelError(
            f"{file}: transformers has {type(processor).__name__} on {processor.backend} alone, not on Pillow, which "
            "is not supported; use a base with another image processor."
        )
    return ImageProcessor(processor, file)
