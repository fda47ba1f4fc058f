"""Verify a release for the families that people fine-tune, in the shapes that tend to break.

For each a small random base is trained on for a few steps, merged onto both kinds of base weights and verified, and
PEFT's logits on the original base are compared with those of the merged model, all in fp32. With peft installed:

    python -m scripts.dev.bench.proof_families --out docs/benchmarks/release.md
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tied and untied, with biases, norms of queries and keys, one or several heads to a key, widths that no block divides.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied, biases": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "mistral, odd sizes": (
        "MistralConfig",
        {"hidden_size": 88, "intermediate_size": 147, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "qwen3, tied, one key head": ("Qwen3Config", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 32, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 32, "sliding_window": 64}),
}
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
# Whose tokenizer a family's base gets; those of Llama's kind stand in for Gemma's.
TOKENIZERS = {"MistralConfig": "mistral7b_v01_hf", "Qwen2Config": "qwen3", "Qwen3Config": "qwen3"}
OTHER_TOKENIZER = "tinyllama_chat_hf"
RUN: dict[str, dict[str, Any]] = {
    "model": {"compute_dtype": "float32"},
    "lora": {"rank": 4, "alpha": 8, "dtype": "float32"},
    "data": {"eval": 0.1, "max_seq_len": 128},
    "train": {
        "max_steps": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
        "lr_scheduler": "constant", "eval_every": 8, "save_every": 8,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Proof:
    """Result for one family.

    Attributes:
        tensors: Number of tensors that were written and computed a second time.
        problems: Problems that verify found, by the base weights that were merged into.
        max_kl: Mean KL divergence of the model merged onto the weights it was trained on from the run's, nats.
        peft_difference: Largest difference of PEFT's logits from those of the merge onto the original base.
        update: Largest change of these logits by the adapter.
    """

    tensors: int
    problems: dict[str, list[str]]
    max_kl: float
    peft_difference: float
    update: float


def make_base(folder: Path, config_class: str, sizes: dict[str, Any], tokenizer: Path, seed: int) -> None:
    """Save a random model of a family in bf16, as a user would have it."""
    import torch
    import transformers

    token_ids = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = getattr(transformers, config_class)(
        **SIZES | {"vocab_size": len(token_ids), "pad_token_id": None} | sizes,
        bos_token_id=token_ids.bos_token_id,
        eos_token_id=token_ids.eos_token_id,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a lost one shows
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    token_ids.save_pretrained(folder)
    for path in tokenizer.glob("tokenizer.model"):
        shutil.copyfile(path, folder / path.name)


def train_run(base: Path, rows: Path, folder: Path, **sections: dict[str, Any]) -> Path:
    """Train a base for a few steps with `RUN` and the given sections; return the run's folder."""
    import qlora

    places = {"model": {"base": str(base)}, "data": {"train": str(rows)}, "train": {"output_dir": str(folder)}}
    config = {key: RUN[key] | sections.get(key, {}) | places.get(key, {}) for key in RUN}
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    qlora.train(qlora.load_config(path))
    return folder


def prove(base: Path, run: Path, folder: Path, auto_class: str = "AutoModelForCausalLM") -> Proof:
    """Merge a run both ways in fp32, verify both, and compare with PEFT.

    Args:
        base: The run's base.
        run: The run.
        folder: Where to merge.
        auto_class: Class of transformers that users load the base with.
    """
    import torch
    import transformers
    from peft import PeftModel

    from qlora import merge, verify

    reports = {}
    for onto in ("dequantized", "original"):
        merge(run, folder / onto, "float32", onto)
        reports[onto] = verify(run, folder / onto, "cpu")
    load = getattr(transformers, auto_class).from_pretrained
    original = load(base, dtype=torch.float32).eval()
    ids = torch.randint(
        original.config.get_text_config().vocab_size, (2, 64), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        plain = original(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(original, run / "adapter").eval()(input_ids=ids).logits
        merged = load(folder / "original", dtype=torch.float32).eval()(input_ids=ids).logits
    return Proof(
        reports["dequantized"].tensors_checked,
        {onto: report.problems for onto, report in reports.items()},
        reports["dequantized"].mean_kl,
        (adapted - merged).abs().max().item(),
        (plain - merged).abs().max().item(),
    )


def main() -> None:
    """Verify each family, print the table and append it to a page."""
    from scripts.dev.bench.common import REALDATA, append, heading

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page to append to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = REALDATA / "data" / "llama_factory_demo" / "alpaca_en_demo.json"
    lines = heading("trained, merged, verified, and read by PEFT", "torch", "transformers", "bitsandbytes", "peft") + [
        "| family | tensors | verify, onto dequantized | onto original | mean KL onto dequantized "
        "| PEFT's logits off by | adapter moves them by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (config_class, sizes) in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            base, run = Path(folder) / "base", Path(folder) / "run"
            tokenizer = REALDATA / "tokenizers" / TOKENIZERS.get(config_class, OTHER_TOKENIZER)
            make_base(base, config_class, sizes, tokenizer, arguments.seed)
            proof = prove(base, train_run(base, data, run), Path(folder))
        verdicts = [" ".join(proof.problems[onto]) or "same" for onto in ("dequantized", "original")]
        lines.append(
            f"| {name} | {proof.tensors} | {verdicts[0]} | {verdicts[1]} | {proof.max_kl:.1e} "
            f"| {proof.peft_difference:.1e} | {proof.update:.2g} |"
        )
        print(lines[-1], flush=True)
    if arguments.out:
        append(arguments.out, "# Release\n", lines)


if __name__ == "__main__":
    main()
