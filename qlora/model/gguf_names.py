"""The tensors of a GGUF file under transformers' names, by the tables that transformers loads such files with."""

from typing import Any

import numpy as np

from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.files.gguf_config import ROPE_FACTORS
from qlora.files.gguf_folder import read_table
from qlora.files.gguf_tensors import GGUFTensors, Place

# Tensors of a file that its config holds.
IN_CONFIG = {ROPE_FACTORS}


def open_gguf(files: BaseFiles) -> GGUFTensors:
    """Return a reader of a GGUF file's tensors.

    Raises:
        ModelError: The file has tensors without a place in transformers' model, or of another shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    assert files.gguf is not None
    table = read_table(files.folder)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    processor = TENSOR_PROCESSORS.get(table["architecture"], TensorProcessor)(config=table["config"])
    names = get_gguf_hf_weights_map(model, processor)
    names |= {f"{name}.weight": names[name] for name in names if name.endswith("_exps")}  # parameters, not modules
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    places = {
        name: Place(entry["kind"], tuple(entry["shape"]), entry["start"], entry["bytes"])
        for name, entry in table["tensors"].items()
        if name not in IN_CONFIG
    }
    unknown = [name for name in places if names.get(name) not in shapes]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ModelError(
            f"{files.name} holds {', '.join(unknown[:3])}{more}, which transformers has no place for in "
            f"{type(model).__name__}; use the same model in 16-bit safetensors."
        )
    sources: dict[str, list[str]] = {}
    for name in sorted(places, key=_gate_first):
        sources.setdefault(names[name], []).append(name)
    sources = {name: sources[name] for name in dict.fromkeys(names[name] for name in places)}

    for name, joined in sources.items():
        first, *others = [places[source].shape for source in joined]
        found = (first[0], first[1] + sum(shape[1] for shape in others), *first[2:]) if others else first
        if _without_ones(found) != _without_ones(shapes[name]):
            raise ModelError(
                f"{files.name}: {' and '.join(joined)} is {found}, but the file's metadata describes {shapes[name]}; "
                "download the base again."
            )

    def restore(name: str, values: np.ndarray) -> np.ndarray:
        restored: Any = processor.process(values, name, parsed_parameters={"tensors": {}}).weights
        return restored

    return GGUFTensors(files.gguf, places, sources, shapes, restore)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _gate_first(name: str) -> bool:
    """Sort experts' up projections after their gates, as transformers joins them."""
    return "_up_" in name
