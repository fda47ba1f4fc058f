"""Whether adapters can be merged into a base's files, which is known before they are trained."""

from collections.abc import Collection, Iterable
from typing import Any

from qlora.files import BaseFiles
from qlora.model.base_weights import BaseWeights
from qlora.model.expert_files import expert_tensors
from qlora.model.names import tensors_of_layers


def check_mergeable(files: BaseFiles, skeleton: Any, layers: Iterable[str]) -> None:
    """Check that the files hold the weights of adapted layers and of all experts in a way that they can be merged in.

    Args:
        files: The base's files.
        skeleton: The base without weights.
        layers: Names of the adapted layers.

    Raises:
        ModelError: A layer is a part of another tensor, or experts can't be read one at a time.
    """
    stored = BaseWeights(files).shapes
    mergeable_tensors(skeleton, stored, layers, files.name)
    expert_tensors(skeleton, stored, files.name)


def mergeable_tensors(skeleton: Any, stored: Collection[str], layers: Iterable[str], base: str) -> dict[str, str]:
    """Return the stored tensor that each layer is merged into; see :func:`qlora.model.names.tensors_of_layers`."""
    remedy = (
        "so adapters of them can't be merged; leave them out of lora.targets, and merge --onto original if they are "
        "quantized."
    )
    return tensors_of_layers(skeleton, stored, layers, base, remedy)
