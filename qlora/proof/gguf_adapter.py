"""Verify an adapter in a GGUF file against the adapter that was trained: the change of every weight."""

from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import PeftAdapter
from qlora.errors import ExportError
from qlora.proof.gguf import ARCHITECTURES, head_dim_of, name_in_file, row_order
from qlora.proof.tensors import TensorCheck

# Largest difference of a value, relative to the largest value of the layer's change: of products in fp32.
MAX_DIFFERENCE = 1e-5


def check_gguf_adapter(path: Path, adapter: PeftAdapter, config: Any) -> TensorCheck:
    """Compare the change of every weight that llama.cpp computes from a file with the adapter's own.

    Args:
        path: Path of the file.
        adapter: The adapter that was trained.
        config: Config of the base.

    Raises:
        ExportError: `gguf` is not installed, the file is damaged, or llama.cpp has no equivalent architecture.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ExportError("Reading GGUF needs the gguf package: pip install gguf.") from None
    if config.model_type not in ARCHITECTURES:
        raise ExportError(f"{path.name}: adapters are for {', '.join(ARCHITECTURES)}, not {config.model_type}.")
    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ExportError(f"{path.name} is truncated or damaged ({error}); write it again.") from None
    architecture = ARCHITECTURES[config.model_type]
    wanted = {"general.type": "adapter", "general.architecture": architecture, "adapter.type": "lora"}
    check = TensorCheck(
        [f"{path.name}: {key} is {fields.get(key)!r:.60}, not {value!r}" for key, value in wanted.items()
         if fields.get(key) != value]
    )  # fmt: skip
    alpha = fields.get("adapter.lora.alpha")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, layer in adapter.layers.items():
        if not len(layer.A):
            continue
        own = name_in_file(f"{name}.weight")
        factors = [tensors.pop(f"{own}.lora_{factor}", None) for factor in "ab"]
        if any(factor is None for factor in factors) or not isinstance(alpha, float):
            check.problems.append(f"{path.name}: it lacks factors of {name}, or alpha")
            continue
        A, B = (torch.from_numpy(factor.copy()).float() for factor in factors)
        check.checked += 2
        shapes, expected_shapes = [tuple(A.shape), tuple(B.shape)], [tuple(layer.A.shape), tuple(layer.B.shape)]
        if shapes != expected_shapes:
            check.problems.append(f"{name}: its factors have the shapes {shapes}, not {expected_shapes}")
            continue
        order = row_order(f"{name}.weight", len(B), head_dim_of(config)) if architecture == "llama" else None
        found = alpha / len(A) * (B if order is None else B[order]) @ A
        expected = layer.scaling * (layer.B.float() @ layer.A.float())
        difference = (found - expected).abs().max().item()
        check.max_difference = max(check.max_difference, difference)
        if not difference <= MAX_DIFFERENCE * expected.abs().max().item():
            check.problems.append(f"{name} is not scaling·B·A: values differ by up to {difference:.3g}")
    if tensors:
        check.problems.append(
            f"{path.name}: it has {len(tensors)} tensors that the adapter lacks: {next(iter(tensors))}"
        )
    return check
