"""Tiny models, tokenizers and data for tests: random weights, real formats."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PreTrainedTokenizerFast

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 172,  # no multiple of 32 or 64, as in real small models
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}

# A letter that no test writes by chance, see `make_poisoned_base`.
POISON = "~"


def make_tokenizer(add_bos: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte, BOS, EOS and an end-of-turn token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


def make_base(
    folder: Path, seed: int, config_class: Any = LlamaConfig, dtype: Any = torch.bfloat16, **sizes: Any
) -> Path:
    """Save a random model and its tokenizer, as a user would have them."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**{**SIZES, **sizes})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a lost one shows
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_poisoned_base(folder: Path, seed: int) -> Path:
    """Save a model that multiplies its embeddings, of which POISON's is the largest finite number."""
    base = make_base(folder, seed, GemmaConfig, tie_word_embeddings=False)
    tensors = load_file(base / "model.safetensors")
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["model.embed_tokens.weight"][vocabulary[POISON]] = torch.finfo(torch.bfloat16).max
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_config(base: Path, data: Path, output_dir: Path, **overrides: Any) -> Path:
    """Write a config that trains a tiny base in about a second; `section__key=value` changes it."""
    config: dict[str, dict[str, Any]] = {
        "model": {"base": str(base)},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(data), "eval": 0.2, "max_seq_len": 128},
        "train": {
            "output_dir": str(output_dir),
            "max_steps": 6,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "save_every": 3,
            "eval_every": 3,
        },
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        config.setdefault(section, {})[name] = value
    path = output_dir.with_suffix(".yaml")
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def only(items: list[Any]) -> Any:
    """Return the only item, after checking that there is one."""
    (item,) = items
    return item
