"""Models that score whole documents: their head, the scores of a batch, and checks of both."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from qlora.data import Batch, ImageProcessor, TokenizedExample, collate, to_device
from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.lora import ScoreHead, head_blocks, output_head, reads_images, score_name, stored_head, text_model
from qlora.model.loss import model_inputs, rows_at
from qlora.model.names import names_in_files
from qlora.model.skeleton import build_skeleton, of_images

# Largest relative difference between the scores and those of the model's own class, from rounding.
TOLERANCE = 0.02
# Standard deviation of initial values for architectures whose config has none.
INITIALIZER_RANGE = 0.02


def replace_head(
    files: BaseFiles,
    skeleton: Any,
    head: ScoreHead,
    tensors: Mapping[str, Any],
    seed: int = 0,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], set[str]]:
    """Return a base's tensors with a head that scores documents, in place of the one over the vocabulary.

    The base's own head is taken if its files have one for the same scores. Otherwise its values are drawn from a normal
    distribution, on the CPU, and so alike everywhere.

    Args:
        files: Files of the base.
        skeleton: The model that scores documents, without weights.
        head: Its head.
        tensors: The files' tensors by name.
        seed: Seed of the values.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The tensors by name, and the names of those that were drawn.
    """
    left_out = vocabulary_head(files, tensors, trust_remote_code)
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    shapes = head_shapes(skeleton)
    stored = stored_head(files.config)
    if stored is not None and shapes.keys() <= kept.keys() and stored.scores_the_same(head):
        return kept, set()
    deviation = getattr(skeleton.config.get_text_config(), "initializer_range", None) or INITIALIZER_RANGE
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.zeros(shape)
        if name.endswith(".bias")
        else torch.empty(shape, device="cpu").normal_(std=deviation, generator=generator)
        for name, shape in shapes.items()
    }
    return {**kept, **drawn}, {*drawn}


def head_shapes(skeleton: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weight and, if there is one, the bias of a head that scores documents, by name.

    Args:
        skeleton: A model that scores documents.
    """
    name, head = score_name(skeleton), output_head(skeleton)
    values = {"weight": head.weight, "bias": head.bias}
    return {f"{name}.{own}": tuple(value.shape) for own, value in values.items() if value is not None}


def vocabulary_head(files: BaseFiles, stored: Iterable[str], trust_remote_code: bool = False) -> set[str]:
    """Return the names of the tensors of a base's head over the vocabulary, as far as its files hold any.

    Args:
        files: Files of the base.
        stored: Names of their tensors.
        trust_remote_code: Run code that comes with the model.
    """
    if stored_head(files.config) is not None or of_images(files.config):
        return set()
    causal = build_skeleton(files, trust_remote_code)
    layer = output_head(causal)
    one_to_one, _ = names_in_files(causal, stored)
    found = [name for name, module in causal.named_modules() if layer is not None and module is layer]
    names = {f"{name}.{own}" for name in found for own in ("weight", "bias")}
    return {tensor for parameter, tensor in one_to_one.items() if parameter in names}


def document_scores(model: Any, batch: Batch) -> torch.Tensor:
    """Compute the scores of each document: of a text at its last token, of an image from the features of its class.

    The head is applied to these alone, in fp32.

    Args:
        model: A model of transformers that scores documents.
        batch: A batch on the model's device.

    Returns:
        (documents, scores), fp32.
    """
    head = output_head(model)
    rows = _image_features(model, batch) if reads_images(model) else _last_states(model, batch)
    weight = torch.cat([block.float() for block in head_blocks(head)])
    return F.linear(rows.float(), weight, None if head.bias is None else head.bias.float())


def _last_states(model: Any, batch: Batch) -> torch.Tensor:
    """Return the hidden state of each text's last token, (documents, features)."""
    hidden = text_model(model)(**model_inputs(model, batch)).last_hidden_state
    rows, norm = rows_at(hidden, last_tokens(batch))
    return rows if norm is None else norm(rows)


def _image_features(model: Any, batch: Batch) -> torch.Tensor:
    """Return what the model's own class gives its head, (documents, features): classes pool in different ways."""
    given: list[torch.Tensor] = []
    handle = output_head(model).register_forward_pre_hook(lambda _head, inputs: given.append(inputs[0]))
    try:
        model(**model_inputs(model, batch))
    finally:
        handle.remove()
    return given[0]


def last_scores(model: Any, batch: Batch) -> torch.Tensor:
    """Return the sum of the scores of a batch's last document, a scalar."""
    return document_scores(model, batch)[-1].sum()


def last_tokens(batch: Batch) -> torch.Tensor:
    """Return the index of each document's last token in the flattened batch, (documents,), int64."""
    if batch.cu_seq_lens is not None:
        return (batch.cu_seq_lens[1:].long() - 1).to(batch.input_ids.device)
    width = batch.input_ids.shape[1]
    ends = [number * width + length - 1 for number, length in enumerate(batch.lengths)]
    return to_device(torch.tensor(ends), batch.input_ids.device)


@torch.no_grad()
def check_image_size(files: BaseFiles, skeleton: Any, processor: ImageProcessor) -> None:
    """Check that a model of images takes the size that its image processor gives, without weights.

    Args:
        files: Files of the base.
        skeleton: The model, on the meta device.
        processor: Its image processor.

    Raises:
        ModelError: It takes another size, and does not interpolate the positions of its patches.
    """
    given, taken = processor.shape[1:], getattr(skeleton.config, "image_size", None)
    taken = (taken, taken) if isinstance(taken, int) else tuple(taken or given)
    if given == taken:
        return
    try:
        skeleton(pixel_values=torch.empty((1, *processor.shape), dtype=skeleton.dtype, device="meta"))
    except (ValueError, RuntimeError):
        (height, width), size = taken, str(taken[0]) if taken[0] == taken[1] else f"{taken[0]} × {taken[1]}"
        raise ModelError(
            f"{processor.file} gives {given[0]} × {given[1]} pixels, but {files.name} takes {height} × {width}; set "
            f"its size to {size}."
        ) from None


@torch.no_grad()
def check_scores(model: Any, example: TokenizedExample) -> None:
    """Check the scores of a document against those that the model's own class computes.

    Args:
        model: A model that scores documents; it is left in evaluation mode.
        example: A short document, which does not end with the padding token.

    Raises:
        ModelError: They differ or are not finite, or the model can't run with its layers replaced.
    """
    batch = collate([example]).to(model.device)
    try:
        model.train()  # runs the code that some architectures have for training only
        document_scores(model, batch)
        model.eval()
        scores = document_scores(model, batch)[0]
        own = model(**model_inputs(model, batch)).logits.float().flatten()
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"{type(model).__name__} can't be run with its linear layers quantized and adapted: {error}. "
            "Some architectures use weights of layers directly; model.quantization=none or other lora.targets may help."
        ) from error
    if not scores.isfinite().all():
        raise ModelError(
            f"The scores of {type(model).__name__} are {scores.tolist()} before any training: its weights or "
            f"activations do not fit {model.dtype}; set model.compute_dtype to bfloat16 or float32."
        )
    if own.shape != scores.shape or not (own - scores).norm() <= TOLERANCE * own.norm():
        where = (
            "computes the scores of an image from more than what its head is given first"
            if reads_images(model)
            else "reads the scores of a document elsewhere than at its last token"
        )
        raise ModelError(
            f"{type(model).__name__} {where} ({_shown(scores)} there, {_shown(own)} by its own class), so training "
            "would be wrong; use a base of another architecture."
        )


def _shown(scores: torch.Tensor) -> str:
    return ", ".join(f"{score:.4g}" for score in scores[:4].tolist()) + (" …" if len(scores) > 4 else "")
