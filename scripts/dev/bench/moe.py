"""Estimated memory of mixtures of experts at their real shapes, of which no weights are needed.

python -m scripts.dev.bench.moe --out docs/benchmarks/moe.md
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

GIB = 2**30
INTRODUCTION = "# Mixtures of experts\n"
TOKENS = 2048
EXPERT_RANKS = (0, "auto", 16)
GPT_OSS: dict[str, Any] = {"num_local_experts": 32, "num_hidden_layers": 24}
# Sizes as published, of what decides the number of weights and the activations.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {
            "vocab_size": 151_936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "decoder_sparse_step": 1, "max_position_embeddings": 262_144,
        },
    ),
    "gpt-oss-20b in 16 bits": ("GptOssConfig", "GptOssForCausalLM", GPT_OSS),
    "gpt-oss-20b in MXFP4, as published": (
        "GptOssConfig", "GptOssForCausalLM", {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}},
    ),
    "GLM-4.7-Flash": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", {}),
    "OLMoE-1B-7B": ("OlmoeConfig", "OlmoeForCausalLM", {"intermediate_size": 1024}),
    "Mixtral-8x7B": ("MixtralConfig", "MixtralForCausalLM", {}),
}  # fmt: skip


def estimate_model(folder: Path, config_class: str, architecture: str, sizes: dict[str, Any], rank: Any) -> Any:
    """Return the estimate of a run of a model of these shapes."""
    import transformers

    from qlora.config import load_config
    from qlora.memory.estimate import estimate
    from qlora.model import SUPERVISED

    config = getattr(transformers, config_class)(**sizes)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    run = {
        "model": {"base": str(folder), "compute_dtype": "bfloat16"},
        "lora": {"rank": 16, "expert_rank": rank},
        "data": {"train": "none.jsonl", "max_seq_len": TOKENS},
        "train": {"output_dir": "none", "micro_batch_size": 1, "optimizer": "paged_adamw_8bit"},
    }
    (folder / "run.yaml").write_text(json.dumps(run), encoding="utf-8")  # JSON is YAML
    return estimate(load_config(folder / "run.yaml"), SUPERVISED, "cuda")


def main() -> None:
    """Estimate each model, print the table and append it to a page."""
    from scripts.dev.bench.common import append, heading

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page to append to")
    arguments = parser.parse_args()
    lines = heading(f"estimated, {TOKENS:,} tokens, rank 16, recompute: full", "torch", "transformers") + [
        "`python -m scripts.dev.bench.moe --out docs/benchmarks/moe.md`.",
        "Estimates from the shapes alone, as `qlora estimate` makes them.",
        "",
        "| model | expert rank | weights, GiB | adapters and gradients | optimizer | activations and loss | buffers "
        "| context | total |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        for rank in EXPERT_RANKS:
            with tempfile.TemporaryDirectory() as folder:
                found = estimate_model(Path(folder), *model, rank).bytes_by_kind("full", TOKENS)
            activations = found["activations"] + found["loss"]
            kinds = (found["weights"], found["adapters"], found["optimizer"], activations)
            kinds += (found["buffers"], found["context"], sum(found.values()))
            lines.append(f"| {name} | {rank} | " + " | ".join(f"{number / GIB:.2f}" for number in kinds) + " |")
            print(lines[-1], flush=True)
    if arguments.out:
        append(arguments.out, INTRODUCTION, lines)


if __name__ == "__main__":
    main()
