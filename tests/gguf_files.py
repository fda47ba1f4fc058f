"""GGUF files of tiny models of any architecture, as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.files.gguf_config import ARCHITECTURES, COMMON_KEYS
from tests.tiny import SIZES

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
LETTERS = [chr(code) for code in range(32, 127)]


def write_gguf_of(
    architecture: str, path: Path, seed: int, fields: dict[str, Any] | None = None, **sizes: Any
) -> tuple[Any, Path]:
    """Write a random model in F32 with a vocabulary of letters.

    Args:
        architecture: llama.cpp's name.
        path: The file to write.
        seed: Seed of the model.
        fields: Metadata besides that of the config, by key without the architecture, or with a slash before a whole
            key; None leaves one out.
        sizes: Values of the config.

    Returns:
        The model, and the path.
    """
    import gguf

    model_type, keys = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    sizes = {**SIZES, "vocab_size": len(SPECIAL) + len(LETTERS), "intermediate_size": 96, **sizes}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**sizes, **ids})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    own = {key: getattr(config, name) for key, name in {**COMMON_KEYS, **keys}.items() if hasattr(config, name)}
    own |= {"attention.key_length": sizes["head_dim"], "attention.value_length": sizes["head_dim"]}
    own["rope.freq_base"] = (config.rope_parameters.get("full_attention") or config.rope_parameters)["rope_theta"]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**own, **(fields or {})}.items():
        name = key.removeprefix("/") if key.startswith("/") else f"{architecture}.{key}"
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
            add[type(value)](name, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*SPECIAL, *LETTERS])
    writer.add_token_scores([0.0] * sizes["vocab_size"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(LETTERS))
    for kind, id_ in (("bos", 2), ("eos", 1), ("padding", 0), ("unknown", 3)):
        if f"/tokenizer.ggml.{kind}_token_id" not in (fields or {}):
            writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", id_)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = "lm_head.weight" if config.tie_word_embeddings else ""
    for name, tensor in model.state_dict().items():
        if name == tied:
            continue
        values = tensor.numpy()
        if name.endswith("gate_up_proj"):
            layer = name.split(".")[2]
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", np.ascontiguousarray(half))
            continue
        if name.endswith("shared_expert_gate.weight"):
            values = values[0]
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            pairs = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2)
            values = np.ascontiguousarray(pairs.reshape(values.shape))
        # Experts have no ending in transformers.
        found = names.get_name(name, try_suffixes=(".weight", ".bias")) or names.get_name(name)
        assert found is not None, name
        writer.add_tensor(found if found.endswith((".weight", ".bias")) else f"{found}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path
