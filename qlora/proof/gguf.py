"""Verify a GGUF file against the run: tensors, hyperparameters and vocabulary."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora.errors import ExportError
from qlora.export.gguf.vocabulary import Vocabulary, read_vocabulary
from qlora.proof.expected import ExpectedWeights
from qlora.proof.tensors import TensorCheck, check_tensors

# llama.cpp's names by those of transformers: a second list, independent of the package that wrote the file.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OUTER = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
KINDS = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q5_0": "Q5_0", "q4_0": "Q4_0"}
# llama.cpp mixes kinds in a file of K-quants: those that its matrices may have. The first ones are for rows that are a
# multiple of 256; Q5_0, Q5_1 and Q8_0 for other multiples of 32.
MIXED = {
    "q4_k_s": ("Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0", "F16"),
    "q4_k_m": ("Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0", "F16"),
    "q5_k_s": ("Q5_K", "Q6_K", "Q5_1", "Q8_0", "F16"),
    "q5_k_m": ("Q5_K", "Q6_K", "Q5_1", "Q8_0", "F16"),
    "q6_k": ("Q6_K", "Q8_0", "F16"),
}
# Dtypes that tensors of a plain kind are read as; others are dequantized to fp32.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Kinds that store blocks of 32 values as integers times a step: the largest value of a block in steps, and the largest
# integer on the other side of zero.
BLOCK_SIZE, LEVELS = 32, {"Q8_0": (127, 127), "Q5_0": (16, 15), "Q4_0": (8, 7)}


# Kinds with steps of their own for small blocks: values of a small block, steps between its smallest and largest value,
# or between zero and the largest in Q6_K; small blocks whose steps and smallest values are stored in a few bits of the
# largest among them; and what that may add to an error, in the largest step.
STEPPED = {"Q5_1": (32, 31, 1, 0.0), "Q4_K": (32, 15, 8, 0.25), "Q5_K": (32, 31, 8, 0.5), "Q6_K": (16, 32, 16, 0.13)}


class GGUFFile:
    """A GGUF file's tensors by their names in transformers' files, and its metadata.

    Args:
        path: Path of the file.
        names: Names of the expected tensors in a model of text alone, by their names in the base's files.
        dtype: Expected dtype of the matrices, one of `KINDS` or `MIXED`.
        config: Config of the model.

    Attributes:
        fields: Metadata by key.
        rope_factors: Divisors of the rotary frequencies; None if the file has none.
        names: Names of the file's tensors; unexpected ones under their names in the file.

    Raises:
        ExportError: `gguf` is not installed, or the file is damaged.
    """

    def __init__(self, path: Path, names: Mapping[str, str], dtype: str, config: Any) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ExportError("Reading GGUF needs the gguf package: pip install gguf.") from None
        try:
            reader = GGUFReader(path)
            self.fields = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise ExportError(f"{path.name} is truncated or damaged ({error}); merge again.") from None
        self._file_dtype, self._matrix_kind, self._head_dim = dtype, KINDS.get(dtype, ""), head_dim_of(config)
        self._has_pairs = ARCHITECTURES[config.model_type] == "llama"
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        own = {name: other for name, plain in names.items() if (other := name_in_file(plain)) in tensors}
        factors = tensors.pop("rope_freqs.weight", None)
        self.rope_factors = None if factors is None else factors.data.tolist()
        self._tensors = {name: tensors.pop(other) for name, other in own.items()}
        self._names, stored = names, {plain: name for name, plain in names.items()}
        head, embedding = stored.get(HEAD), stored.get(EMBEDDING)
        if head is not None and head not in self._tensors and embedding in self._tensors:
            self._tensors[head] = self._tensors[embedding]  # llama.cpp uses the embedding if there is no head
        self.names = [*self._tensors, *tensors]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(reversed(self._tensors[name].shape.tolist()))

    def read(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of a tensor in transformers' order; blocks are dequantized to fp32."""
        from gguf import quants

        tensor = self._tensors[name]
        order = self._order(name)
        values = tensor.data[rows] if order is None else tensor.data[order[rows].numpy()]
        kind = tensor.tensor_type.name
        if kind == "BF16":
            return torch.from_numpy(values.copy()).view(torch.bfloat16)
        is_plain = kind in ("F32", "F16")
        return torch.from_numpy(values.copy() if is_plain else quants.dequantize(values, tensor.tensor_type))

    def dtype(self, name: str) -> torch.dtype:
        """Return the expected dtype of a tensor.

        It is fp32 for vectors and the file's for matrices; with blocks, f16 for rows that are not a multiple of 32.
        Blocks are read as fp32.
        """
        return DTYPES.get(self._kind(name), torch.float32)

    def slack(self, name: str, values: torch.Tensor) -> torch.Tensor | None:
        """Return how far each value of a tensor of blocks may be from its own; None for other kinds."""
        kind = self._kind(name)
        if kind in STEPPED:
            return _stepped_slack(kind, values)
        if kind not in LEVELS:
            return None
        if self._file_dtype not in MIXED:
            return _nearest_slack(kind, values)
        return _nearest_slack(kind, _in_fp16(values)) + values.abs() * 2.0**-11 + 2.0**-25

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return values rounded as in the file, but those whose steps llama.cpp searches for only to fp16."""
        from gguf import GGMLQuantizationType, quants

        kind, is_mixed = self._kind(name), self._file_dtype in MIXED
        if is_mixed:
            values = _in_fp16(values)
        if kind not in LEVELS:
            return values if is_mixed else values.to(self.dtype(name)).to(values.dtype)
        stored = GGMLQuantizationType[kind]
        blocks = quants.quantize(values.float().contiguous().numpy(), stored)
        return torch.from_numpy(quants.dequantize(blocks, stored)).to(values.dtype)

    def _kind(self, name: str) -> str:
        shape = self.shape(name)
        if len(shape) == 1:
            return "F32"
        if self._file_dtype in MIXED:
            found = self._tensors[name].tensor_type.name
            return found if found in MIXED[self._file_dtype] else MIXED[self._file_dtype][0]
        if self._matrix_kind in LEVELS:
            is_outer = self._names.get(name) in (EMBEDDING, HEAD)
            return "F16" if shape[-1] % BLOCK_SIZE else "Q8_0" if is_outer else self._matrix_kind
        return self._matrix_kind

    def _order(self, name: str) -> torch.Tensor | None:
        """Return the file's row of each row in transformers' order; None if the orders are the same.

        llama.cpp interleaves the two halves of each head's rows of queries and keys in some architectures.
        """
        return row_order(self._names[name], self.shape(name)[0], self._head_dim) if self._has_pairs else None


def _in_fp16(values: torch.Tensor) -> torch.Tensor:
    """Return values rounded to fp16, which llama.cpp makes a file of K-quants from."""
    return values.half().to(values.dtype)


def _nearest_slack(kind: str, values: torch.Tensor) -> torch.Tensor:
    """Return how far the nearest value of a block may be.

    That is half a step, or the distance to the largest integer where that is short of the value, and the rounding of
    the step to fp16.
    """
    (most, opposite), blocks = LEVELS[kind], values.unflatten(-1, (-1, BLOCK_SIZE)).abs()
    steps = blocks.amax(-1, keepdim=True) / most
    rounding = most * torch.maximum(steps * 2.0**-11, torch.full_like(steps, 2.0**-25))
    short = (blocks - opposite * steps) * (opposite < most)
    return (torch.maximum(steps / 2, short) + rounding).flatten(-2)


def _stepped_slack(kind: str, values: torch.Tensor) -> torch.Tensor:
    """Return how far a value of a kind whose steps llama.cpp searches for may be: two steps, and the steps' rounding.

    The search looks for the smallest error of a whole block, for which it may leave its largest values short.
    """
    size, levels, num_small, share = STEPPED[kind]
    blocks = values.unflatten(-1, (-1, size))
    least, most = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
    steps = (torch.maximum(most, -least) if kind == "Q6_K" else most - least) / levels
    largest = steps.unflatten(-1, (-1, num_small)).amax(-1, keepdim=True).expand(-1, -1, num_small).flatten(-2)
    rounding = torch.maximum(most, -least) * 2.0**-9 + 2.0**-24
    return (2 * steps + share * largest + rounding).repeat_interleave(size, dim=-1)


def row_order(name: str, num_rows: int, head_dim: int) -> torch.Tensor | None:
    """Return the row in a file whose architecture has pairs of each row in transformers' order; None if it is the same.

    Args:
        name: Name of the tensor in a model of text alone.
        num_rows: Number of its rows.
        head_dim: Number of rows of a head.
    """
    match = LAYER.fullmatch(name)
    if match is None or match[2] not in ("self_attn.q_proj", "self_attn.k_proj"):
        return None
    in_head = torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])
    return (torch.arange(0, num_rows, head_dim)[:, None] + in_head).flatten()


def check_gguf(
    path: Path, expected: ExpectedWeights, dtype: str, config: Any, tokenizer: Any, ends: list[int]
) -> TensorCheck:
    """Compare a GGUF file with the file that merging should have written.

    Args:
        path: Path of the file.
        expected: Merged weights, computed a second time.
        dtype: Dtype that the merge report names; one of `KINDS` or `MIXED`.
        config: Config of the base, whose section for text counts.
        tokenizer: Tokenizer of the run.
        ends: Ids of the tokens that end an answer.

    Raises:
        ExportError: `gguf` is not installed, the file is damaged, or llama.cpp has no equivalent architecture or
            tokenizer.
    """
    config = config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"{path.name}: GGUF export supports {', '.join(ARCHITECTURES)}, not {config.model_type}; merge to a folder."
        )
    file = GGUFFile(path, expected.names_as_text, dtype, config)
    check = check_tensors(expected, file, expected.names_as_text)
    embedding = next(name for name, plain in expected.names_as_text.items() if plain == EMBEDDING)
    num_rows = expected.shape(embedding, None)[0]
    vocabulary = read_vocabulary(tokenizer, num_rows, ends, config.bos_token_id)
    wanted = _sizes(config, num_rows) | _vocabulary_fields(vocabulary)
    for key, value in wanted.items():
        found = file.fields.get(key)
        if not _is_same(found, value):
            check.problems.append(f"{path.name}: {key} is {found!r:.60}, not {value!r:.60}")
    if vocabulary.tokens[: len(tokenizer)] != tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
        check.problems.append(f"{path.name}: its tokens differ from the tokenizer's")
    if not _is_same(file.rope_factors, _rope_factors(config)):
        check.problems.append(f"{path.name}: rope_freqs.weight does not match the config's rope_parameters")
    return check


def name_in_file(name: str) -> str:
    """Return a tensor's name in the file; empty if it has none."""
    match = LAYER.fullmatch(name)
    if match is None:
        return OUTER.get(name, "")
    return f"blk.{match[1]}.{NAMES[match[2]]}.{match[3]}" if match[2] in NAMES else ""


def _sizes(config: Any, num_rows: int) -> dict[str, Any]:
    """Return the expected metadata on the model, by key; None for a key that should be missing."""
    architecture, head_dim, rope = ARCHITECTURES[config.model_type], head_dim_of(config), config.rope_parameters
    is_scaled, is_yarn = rope["rope_type"] in ("linear", "yarn"), rope["rope_type"] == "yarn"
    values = {
        "vocab_size": num_rows,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope["rope_theta"],
        "rope.scaling.type": rope["rope_type"] if is_scaled else None,
        "rope.scaling.factor": rope["factor"] if is_scaled else None,
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"] if is_yarn else None,
        "rope.scaling.attn_factor": _yarn_factor(rope) if is_yarn else None,
    }
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in values.items()}


def head_dim_of(config: Any) -> int:
    """Return the number of features of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _vocabulary_fields(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the expected metadata on the tokenizer, by key; None for a key that should be missing."""
    names = {"unk": "unknown", "pad": "padding"}
    ids = {name: vocabulary.special.get(name) for name in ("bos", "eos", "eot", "eom", "unk", "pad")}
    template = vocabulary.template
    return {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.merges": vocabulary.merges or None,
        "tokenizer.ggml.scores": vocabulary.scores or None,
        **{f"tokenizer.ggml.{names.get(name, name)}_token_id": token_id for name, token_id in ids.items()},
        "tokenizer.ggml.add_bos_token": vocabulary.adds["bos"],
        "tokenizer.ggml.add_eos_token": vocabulary.adds["eos"],
        "tokenizer.ggml.add_space_prefix": vocabulary.adds["space"],
        "tokenizer.chat_template": template.get("default") if isinstance(template, dict) else template,
    }


def _yarn_factor(rope: dict[str, Any]) -> float:
    """Return YaRN's attention factor relative to llama.cpp's default, which llama.cpp multiplies by it."""
    growth, mscale, all_dim = 0.1 * math.log(rope["factor"]), rope.get("mscale"), rope.get("mscale_all_dim")
    computed = (1 + mscale * growth) / (1 + all_dim * growth) if mscale and all_dim else 1 + growth
    return (rope.get("attention_factor") or computed) / (1 + growth)


def _rope_factors(config: Any) -> list[float] | None:
    """Return the divisors of Llama 3.1's frequencies: the factor for long waves, 1 for short ones, else a blend."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    head_dim, factors = head_dim_of(config), []
    for place in range(0, head_dim, 2):
        turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** (-place / head_dim) / (2 * math.pi)
        share = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        share = min(1.0, max(0.0, share))
        factors.append(1 / ((1 - share) / rope["factor"] + share))
    return factors


def _is_same(found: Any, wanted: Any) -> bool:
    """Return whether two values are equal in fp32; an empty list equals a missing one."""
    if isinstance(wanted, float) and isinstance(found, float):
        return math.isclose(found, wanted, rel_tol=1e-5)
    if isinstance(wanted, list) and isinstance(found, list):
        return len(found) == len(wanted) and all(map(_is_same, found, wanted))
    return (found or None) == (wanted or None)
