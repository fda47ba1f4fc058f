"""A model as one GGUF file for llama.cpp, written tensor by tensor."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.errors import ExportError
from qlora.export.gguf.vocabulary import OTHER_WAY, read_vocabulary
from qlora.files.shards import TensorLayout
from qlora.model import end_token_ids, load_generation_config, load_tokenizer

# llama.cpp's architectures by transformers' model types.
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Types that store blocks of 32 values, with the bytes of a block.
BLOCK_SIZE, BLOCK_BYTES = 32, {"q8_0": 34, "q5_0": 22, "q4_0": 18}
DTYPES = ("f16", "bf16", *BLOCK_BYTES)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# llama.cpp computes YaRN with these values in these architectures, and ignores the file's.
YARN_CONSTANTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


@dataclass(frozen=True, slots=True)
class GGUFReport:
    """The result of :func:`write_gguf`.

    Attributes:
        tensors: Number of tensors in the file.
        num_bytes: Size of the file.
        notes: Where the file differs from the model.
    """

    tensors: int
    num_bytes: int
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor of the file, and the name of the model's tensor that it is made from."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: Any  # a gguf.GGMLQuantizationType
    num_bytes: int


def write_gguf(
    folder: Path,
    layout: Sequence[TensorLayout],
    read: Callable[[str], torch.Tensor],
    out_file: Path,
    dtype: str = "f16",
    name: str | None = None,
) -> GGUFReport:
    """Write a model of the Llama, Mistral or Qwen (2, 2.5, 3) families, with its tokenizer and chat template.

    Names are those of the `gguf` package. Values are those of llama.cpp's convert_hf_to_gguf.py: matrices in `dtype`,
    vectors and norms in fp32, and the rows of Llama's and Mistral's queries and keys reordered from halves to pairs.

    Args:
        folder: Folder with config.json, the tokenizer, and optionally generation_config.json.
        layout: The model's tensors, by their names in transformers' files.
        read: Returns a tensor in fp32 by its name.
        out_file: The file to write.
        dtype: `f16`, `bf16`, `q8_0`, `q5_0` or `q4_0`. With the last three, a matrix whose rows are not a multiple of
            32 is written in f16; with the last two, embedding and head are written in q8_0.
        name: Display name of the model.

    Raises:
        ExportError: `gguf` is not installed, the dtype, family or tokenizer is not supported, or a value does not fit.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype: {dtype!r} should be one of {', '.join(DTYPES)}.")
    gguf = import_gguf()
    config = read_config(folder)
    writer = gguf.GGUFWriter(out_file, FAMILIES[config.model_type])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name or out_file.stem)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{dtype.upper()}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_hyperparameters(writer, config)
    tokenizer = load_tokenizer(folder)
    ends = end_token_ids(load_generation_config(folder), tokenizer)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, ends, config.bos_token_id)
    vocabulary.add_to(writer)

    factors = _rope_factors(config)
    if config.tie_word_embeddings and _repeats_embedding(layout, read):
        layout = [entry for entry in layout if entry.name != HEAD]
    plan = _plan(layout, config, dtype)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.numpy().dtype, factors.nbytes)
    for tensor in plan:
        writer.add_tensor_info(
            tensor.name, tensor.shape, torch.empty(0).numpy().dtype, tensor.num_bytes, raw_dtype=tensor.kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for tensor in plan:
            writer.write_tensor_data(_encode(tensor, in_pairs(read(tensor.source), tensor.name, config)))
    finally:
        writer.close()
    return GGUFReport(
        tensors=len(plan) + (factors is not None),
        num_bytes=out_file.stat().st_size,
        notes=_notes(plan, config, dtype) + vocabulary.notes,
    )


def import_gguf() -> Any:
    """Return the gguf package.

    Raises:
        ExportError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ExportError("Writing GGUF needs the gguf package: pip install gguf.") from None
    return gguf


def read_config(folder: Path) -> Any:
    """Read a model's config; of a multimodal model, that of its text model.

    Raises:
        ExportError: llama.cpp would not compute what the config describes.
    """
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = whole.get_text_config()
    if config.model_type not in FAMILIES:
        raise ExportError(f"GGUF export supports {', '.join(FAMILIES)}, not {config.model_type}. {OTHER_WAY}")
    if whole is not config:
        config.tie_word_embeddings = whole.tie_word_embeddings
    rope = config.rope_parameters
    unknown = {
        "hidden_act": config.hidden_act if config.hidden_act != "silu" else None,
        "rope_type": rope["rope_type"] if rope["rope_type"] not in ROPE_TYPES else None,
        "rope_type in Qwen": rope["rope_type"] if rope["rope_type"] == "llama3" and not _has_pairs(config) else None,
        "partial_rotary_factor": rope["partial_rotary_factor"] if rope.get("partial_rotary_factor", 1) != 1 else None,
        "use_sliding_window": getattr(config, "use_sliding_window", False) or None,
    }
    if rope["rope_type"] == "yarn":
        unknown |= {key: rope[key] for key, value in YARN_CONSTANTS.items() if rope.get(key) not in (None, value)}
    for key, value in unknown.items():
        if value is not None:
            raise ExportError(f"A GGUF file of {config.model_type} can't express {key}: {value}. {OTHER_WAY}")
    return config


def _has_pairs(config: Any) -> bool:
    """Return whether llama.cpp rotates neighbouring rows of queries and keys, where transformers rotates halves."""
    return FAMILIES[config.model_type] == "llama"


def _add_hyperparameters(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    rope = config.rope_parameters
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(_yarn_attention_factor(config))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_factors(config: Any) -> torch.Tensor | None:
    """Return the divisors of Llama 3.1's rotary frequencies, (head_dim / 2,) fp32, which are a tensor in GGUF."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = _head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / scaled


def _yarn_attention_factor(config: Any) -> float:
    """Return YaRN's factor on sines and cosines, relative to llama.cpp's own: 1 + log(factor) / 10."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    return attention_factor / (1 + 0.1 * math.log(max(1.0, config.rope_parameters["factor"])))


def _repeats_embedding(layout: Sequence[TensorLayout], read: Callable[[str], torch.Tensor]) -> bool:
    """Return whether the files hold a head that equals the embedding; transformers uses one with other values."""
    names = {entry.name for entry in layout}
    return {EMBEDDING, HEAD} <= names and torch.equal(read(EMBEDDING), read(HEAD))


def _plan(layout: Sequence[TensorLayout], config: Any, dtype: str) -> list[_Planned]:
    """Plan the file's tensors in order.

    Raises:
        ExportError: A tensor has no name in GGUF.
    """
    from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    architecture = next(key for key, value in MODEL_ARCH_NAMES.items() if value == FAMILIES[config.model_type])
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    plan, unknown = [], []
    for entry in layout:
        if entry.name.endswith(".rotary_emb.inv_freq"):
            continue  # computed from the config
        name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            unknown.append(entry.name)
            continue
        kind = GGMLQuantizationType[kind_of(entry.name, dtype).upper()]
        if len(entry.shape) == 1:
            kind = GGMLQuantizationType.F32
        elif entry.shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = GGMLQuantizationType.F16
        block, size = GGML_QUANT_SIZES[kind]
        plan.append(_Planned(name, entry.name, entry.shape, kind, math.prod(entry.shape) // block * size))
    if unknown:
        raise ExportError(
            f"{len(unknown)} tensors have no name in a GGUF file of {config.model_type} "
            f"({', '.join(unknown[:3])}). {OTHER_WAY}"
        )
    return plan


def kind_of(name: str, dtype: str) -> str:
    """Return the type of a matrix, by its name in transformers' files, in a GGUF file of a type."""
    return "q8_0" if dtype in BLOCK_BYTES and name in (EMBEDDING, HEAD) else dtype


def in_pairs(tensor: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    """Interleave the rows of each head's halves if llama.cpp rotates pairs of rows."""
    if not _has_pairs(config) or name.split(".")[-2] not in ("attn_q", "attn_k"):
        return tensor
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _encode(tensor: _Planned, values: torch.Tensor) -> Any:
    """Encode a tensor as an array in its kind.

    Raises:
        ExportError: A value is not finite, or too large.
    """
    from gguf import GGMLQuantizationType, quants

    assert tuple(values.shape) == tensor.shape, f"{tensor.source}: {tuple(values.shape)} instead of {tensor.shape}"
    values = values.float().contiguous()
    cast = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}.get(tensor.kind)
    if cast is not None:
        values = values.to(cast)
    if not values.isfinite().all():
        raise ExportError(f"{tensor.source}: a value does not fit {tensor.kind.name}; write bf16.")
    if tensor.kind.name.lower() in BLOCK_BYTES:
        return quants.quantize(values.numpy(), tensor.kind)
    return (values.view(torch.int16) if cast == torch.bfloat16 else values).numpy()


def _notes(plan: list[_Planned], config: Any, dtype: str) -> list[str]:
    notes = []
    matrices = [tensor for tensor in plan if len(tensor.shape) > 1]
    other = [tensor.source for tensor in matrices if tensor.kind.name.lower() != kind_of(tensor.source, dtype)]
    if other:
        notes.append(f"{len(other)} of {len(matrices)} matrices are in f16, since their rows are not a multiple of 32")
    if getattr(config, "sliding_window", None):
        notes.append(f"llama.cpp attends to all previous tokens, the model to the last {config.sliding_window}")
    return notes
