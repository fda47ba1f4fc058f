"""What a GGUF file says besides its weights, as a folder of transformers: config, tokenizer, generation settings.

transformers converts them; the folder is cached by the file's contents, because that takes seconds for a large
vocabulary. The table of the tensors is cached with them, as places in the file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.files.atomic import atomic_folder
from qlora.files.json_files import read_object

TABLE_FILE = "gguf.json"
FORMAT = 1
# Kinds of rotary scaling that transformers has under the same name.
ROPE_SCALINGS = ("linear", "yarn")
# Llama 3's divisors of rotary frequencies are a tensor in GGUF; its config has the values that they follow from.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gguf_folder(path: Path, digest: str) -> Path:
    """Return a folder with the config.json, tokenizer and generation config of a GGUF file, and :data:`TABLE_FILE`.

    Args:
        path: The GGUF file.
        digest: Hash of its contents.

    Raises:
        ModelError: The gguf package is missing, the file is damaged, or transformers does not know its architecture.
    """
    import transformers

    key = hashlib.sha256(f"{digest} {transformers.__version__} {FORMAT}".encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora" / "gguf"
    folder = root / key
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_folder(folder, ModelError) as staging:
                _write(path, staging)
        except ModelError:
            if not folder.is_dir():  # otherwise another process has written it
                raise
    return folder


def read_table(folder: Path) -> dict[str, Any]:
    """Read the table of a GGUF file's tensors: `tensors` by name, and `config`, which transformers' tables need."""
    return read_object(folder / TABLE_FILE, ModelError, "delete the folder")


def _write(path: Path, folder: Path) -> None:
    try:
        import gguf
    except ImportError:
        raise ModelError(f"{path}: reading GGUF needs the gguf package: pip install gguf.") from None
    from transformers import AutoConfig, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        tensors = {
            tensor.name: {
                "kind": int(tensor.tensor_type),
                "shape": [int(size) for size in reversed(tensor.shape.tolist())],
                "start": int(tensor.data_offset),
                "bytes": int(tensor.n_bytes),
            }
            for tensor in reader.tensors
        }
    except Exception as error:  # a damaged file can make the reader raise anything
        raise ModelError(f"{path} is truncated or damaged ({error}); download it again.") from None
    architecture = fields.get("general.architecture")
    try:
        parsed = load_gguf_checkpoint(str(path))["config"]
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # a file can make the conversion raise anything
        raise ModelError(
            f"{path}: transformers can't read this GGUF file of {architecture}: {error}. Use the same model in 16-bit "
            "safetensors."
        ) from error
    if config.get_text_config().num_hidden_layers > len(tensors):
        raise ModelError(f"{path} has {len(tensors)} tensors, too few for its layers; download it again.")
    _complete(config, fields, tensors, path)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = [reader.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    ids = sorted({int(field.contents()) for field in ends if field is not None})
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ids}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    table = {"architecture": architecture, "config": parsed, "tensors": tensors}
    (folder / TABLE_FILE).write_text(json.dumps(table), encoding="utf-8")


def _complete(config: Any, fields: dict[str, Any], tensors: dict[str, Any], path: Path) -> None:
    """Set what transformers' conversion leaves out of a config: class, head size, biases and rotary scaling.

    Raises:
        ModelError: The file's rotary scaling has no counterpart.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    prefix = fields.get("general.architecture")
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = "float16"  # as GGUF's scales are
    if hasattr(config, "head_dim") and f"{prefix}.attention.key_length" in fields:
        config.head_dim = int(fields[f"{prefix}.attention.key_length"])
    for key, tensor in (("attention_bias", "blk.0.attn_output.bias"), ("mlp_bias", "blk.0.ffn_up.bias")):
        if hasattr(config, key) and config.model_type == "llama":
            setattr(config, key, tensor in tensors)
    scaling = fields.get(f"{prefix}.rope.scaling.type", "none")
    if scaling in ROPE_SCALINGS:
        rope = {"rope_type": scaling, "factor": float(fields[f"{prefix}.rope.scaling.factor"])}
        original = fields.get(f"{prefix}.rope.scaling.original_context_length")
        if original is not None:
            rope["original_max_position_embeddings"] = int(original)
        config.rope_parameters = {**config.rope_parameters, **rope}
    elif scaling != "none":
        raise ModelError(f"{path} has rotary scaling of the type {scaling}, which is not supported; use safetensors.")
    if ROPE_FACTORS in tensors:
        config.rope_parameters = {**config.rope_parameters, **_llama3_rope(config, tensors[ROPE_FACTORS], path)}


def _llama3_rope(config: Any, place: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the values of Llama 3's config that give a file's divisors of rotary frequencies.

    Raises:
        ModelError: They follow from other values.
    """
    import numpy as np
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = np.fromfile(path, dtype=np.float32, count=place["bytes"] // 4, offset=place["start"])
    rope = {"rope_type": "llama3", "factor": float(found.max()), **LLAMA3_ROPE}
    plain, config.rope_parameters = config.rope_parameters, {**config.rope_parameters, **rope}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(found)
    frequencies = 1.0 / plain["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if not np.allclose((frequencies / scaled).numpy(), found, rtol=1e-4):
        raise ModelError(f"{path} has rotary factors other than Llama 3's, which are not supported; use safetensors.")
    return rope
