"""Check whether PEFT, vLLM and llama.cpp would load an adapter and compute the same update as training."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import read_adapter_config
from qlora.checkpoint.adapter_experts import (
    experts_problems,
    is_linear_parameter,
    linear_parameters,
    read_experts,
    stored_experts,
)
from qlora.checkpoint.adapter_rows import PREFIX
from qlora.checkpoint.peft_folder import CHANGING_INITS, config_rank, config_scaling, read_adapter_header
from qlora.lora import embedding_and_head, input_embedding, output_head, reads_images, scores_documents
from qlora.lora.mixture import DOWN, GATED, UNGATED
from qlora.lora.spec import scaling

# Values of vLLM's `--max-lora-rank`; the default is 16 (vllm/config/lora.py).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
# Copies of the base's weights that PEFT saves with an adapter of embedding or head; vLLM skips them.
VLLM_SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
FACTOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(slots=True)
class Verdict:
    """Whether one client can use an adapter.

    Attributes:
        loads: Whether the client would load the adapter, and scale it correctly.
        reasons: Reasons why not.
        needs: Options that the client needs, and properties that were not checked.
    """

    loads: bool = True
    reasons: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Add a reason why the client can't use the adapter."""
        self.loads = False
        self.reasons.append(reason)

    def __str__(self) -> str:
        verdict = "loads it" if self.loads else "does not load it: " + "; ".join(self.reasons)
        return verdict + "".join(f" ({need})" for need in self.needs)


def check_clients(
    adapter: Path, base: Any, is_for_published: bool = True, rope_scaling: Mapping[str, Any] | None = None
) -> dict[str, Verdict]:
    """Check an adapter's folder by the rules of the tools that load adapters, without running them.

    Rules: peft/tuners/lora; peft_helper.py, lora_model.py and model_manager.py in vllm/lora; convert_lora_to_gguf.py
    and src/llama-adapter.h of llama.cpp.

    Args:
        adapter: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: Skeleton of the base that the adapter is for.
        is_for_published: Whether the adapter is for the base as published, rather than one quantized for it.
        rope_scaling: Extension of the base's context in training: `type` and `factor`.

    Returns:
        A verdict for each of `peft`, `vllm` and `llama.cpp`.

    Raises:
        CheckpointError: The folder has no adapter, or a damaged one.
    """
    config = read_adapter_config(adapter)
    full_header = read_adapter_header(adapter)
    experts, problems = read_experts(config, full_header)
    of_experts = {key for keys in experts.values() for key in keys}
    header = {name: entry for name, entry in full_header.items() if name not in of_experts}
    matches = [match for name in header if (match := FACTOR.fullmatch(name))]
    ranks = {match["module"]: header[match[0]]["shape"][0] for match in matches if match["factor"] == "A"}
    others = sorted({*header} - {match[0] for match in matches})
    verdicts = {
        "peft": _check_peft(config, ranks, {name: header[name]["shape"] for name in others}, base),
        "vllm": _check_vllm(config, ranks, others, experts),
        "llama.cpp": _check_llama_cpp(config, ranks, others, base),
    }
    problems += _misfits(config, full_header, experts, base)
    _check_experts(verdicts, config, ranks, experts, problems, base)
    if rope_scaling is not None:
        for verdict in verdicts.values():
            verdict.needs.append(
                f"the base's config extended by model.rope_scaling (type {rope_scaling['type']}, factor "
                f"{rope_scaling['factor']:g}), which the adapter does not hold; merge, or pass it to the client"
            )
    if not is_for_published:
        for verdict in verdicts.values():
            verdict.refuse(
                "with lora.init: reconstruct it does not fit the published base, only the one that qlora quantize RUN "
                "-o DIR writes; or merge it"
            )
    return verdicts


def _check_peft(config: dict[str, Any], ranks: dict[str, int], others: dict[str, list[int]], base: Any) -> Verdict:
    verdict = Verdict()
    if reads_images(base):
        verdict.needs.append(f"on AutoModelForImageClassification with num_labels={base.config.num_labels}")
    elif scores_documents(base):
        verdict.needs.append(
            f"on AutoModelForSequenceClassification with num_labels={base.config.num_labels}, and the config's "
            "pad_token_id set to that of the adapter's tokenizer"
        )
    _check_rows(verdict, config, others, base)
    if config.get("peft_type") != "LORA":
        verdict.refuse(f"peft_type is {config.get('peft_type')!r}, not 'LORA'")
    foreign = [name for name in others if not name.startswith(PREFIX)]
    if foreign:
        verdict.refuse(f"it skips {foreign[0]}, whose name does not begin with {PREFIX}")
    modules = {name for name, module in base.named_modules() if hasattr(module, "weight")}
    absent = sorted({*ranks} - modules)
    if absent:
        verdict.refuse(f"the base has no layer {absent[0]}")
    wrong = [module for module, rank in ranks.items() if rank != config_rank(config, module)]
    if wrong:
        verdict.refuse(f"{wrong[0]} has rank {ranks[wrong[0]]}, the config says {config_rank(config, wrong[0])}")
    if renamed := _renamed_by_peft(base, ranks):
        module, found = next(iter(renamed.items()))
        verdict.refuse(f"it renames {module} to {found}, as a tensor of the published files, and drops it silently")
    selected = _selected(config, {name for name, _ in base.named_modules()})
    if selected is None:
        verdict.needs.append("the layers that target_modules selects were not checked")
    else:
        differing = selected ^ {name for name in ranks if not is_linear_parameter(config, name)}
        if differing and not absent:
            verdict.refuse(f"target_modules and the tensors differ in {sorted(differing)[0]}")
    return verdict


def _renamed_by_peft(base: Any, modules: Iterable[str]) -> dict[str, str]:
    """Return the names under which PEFT looks for layers, where they are others than the model's own.

    It renames an adapter's tensors by transformers' table for the base's files, and takes back only a lost prefix.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if get_checkpoint_conversion_mapping(getattr(base.config, "model_type", "")) is None:
        return {}
    renamings = [each for each in get_model_conversion_mapping(base) if isinstance(each, WeightRenaming)]
    ending = ".lora_A.default.weight"
    found = {module: rename_source_key(module + ending, renamings, [])[0].removesuffix(ending) for module in modules}
    return {module: name for module, name in found.items() if not module.endswith(name)}


def _misfits(
    config: dict[str, Any], header: dict[str, Any], experts: dict[str, tuple[str, str]], base: Any
) -> list[str]:
    """Return a line for each stack of experts whose factors do not fit the base."""
    stored = {
        name: stored_experts(A, B, rank, config_scaling(config, name))
        for name, keys in experts.items()
        if all(key in header for key in keys)
        for A, B in [[torch.empty(header[key]["shape"], device="meta") for key in keys]]
        if not len(A) % (rank := config_rank(config, name)) and len(A) == B.shape[1]
    }
    problems = [
        f"{name} has factors that are not of experts of rank {config_rank(config, name)}"
        for name, keys in experts.items()
        if name not in stored and all(key in header for key in keys)
    ]
    return problems + experts_problems(base, stored)


def _check_experts(
    verdicts: dict[str, Verdict],
    config: dict[str, Any],
    ranks: dict[str, int],
    experts: dict[str, tuple[str, str]],
    problems: list[str],
    base: Any,
) -> None:
    """Check adapters on the experts of a mixture, and on linear layers whose names PEFT takes for experts."""
    for problem in problems:
        verdicts["peft"].refuse(problem)
    taken = [name for name in linear_parameters(base, ranks) if not is_linear_parameter(config, name)]
    if taken:
        verdicts["peft"].needs.append(
            f"if the base's family is not one of which it takes {taken[0]} for experts and drops it silently; list "
            f"{taken[0]}.weight in target_parameters"
        )
    if config.get("target_parameters") and config.get("lora_dropout"):
        verdicts["peft"].refuse("it has no dropout on target_parameters; set lora_dropout to 0 in adapter_config.json")
    if experts:
        verdicts["llama.cpp"].refuse("its converter reads factors of numbered experts, not of all experts of a layer")


def _check_rows(verdict: Verdict, config: dict[str, Any], others: dict[str, list[int]], base: Any) -> None:
    """Check that PEFT can load rows trained in full, and computes the same with them."""
    embeddings = input_embedding(base)
    names = embedding_and_head(base)
    by_ids = config.get("trainable_token_indices") or {}
    ids = [id_ for given in (by_ids.values() if isinstance(by_ids, dict) else [by_ids]) for id_ in given]
    whole = [others[f"{PREFIX}{name}.weight"][0] for name in names if f"{PREFIX}{name}.weight" in others]
    size = max([*whole, *(id_ + 1 for id_ in ids)], default=0)
    if embeddings is not None and size > len(embeddings.weight):
        verdict.needs.append(f"after resize_token_embeddings({size}) of the base, and the adapter's tokenizer")
    biased = [name for name in by_ids if getattr(names.get(name), "bias", None) is not None]
    if biased:
        verdict.refuse(f"it omits the bias of {biased[0]} if only some of its rows are trained")


def _check_vllm(config: dict[str, Any], ranks: dict[str, int], others: list[str], experts: Collection[str]) -> Verdict:
    verdict = Verdict(needs=["its support of adapters for this architecture was not checked"])
    if not config.get("target_modules"):
        verdict.refuse("target_modules is not set")
    for key, feature in {
        "use_dora": "DoRA",
        "lora_bias": "biases of the factors",
        "layer_replication": "replicated layers",
        "modules_to_save": "modules trained in full",
        "trainable_token_indices": "embeddings of single tokens",
    }.items():
        if config.get(key):
            verdict.refuse(f"it refuses {feature} ({key})")
    if config.get("bias", "none") != "none":
        verdict.refuse(f"it refuses trained biases (bias: {config['bias']})")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGING_INITS):
        verdict.refuse(f"init_lora_weights: {config['init_lora_weights']} changed the base's weights in training")
    unknown = [name for name in others if not name.endswith(VLLM_SKIPPED)]
    if unknown:
        verdict.refuse(f"{unknown[0]} is not a LoRA factor")
    served = scaling(config["r"], config["lora_alpha"], bool(config.get("use_rslora")))  # one for all modules
    _check_scaling(verdict, config, dict.fromkeys([*ranks, *experts], served))
    if experts:
        verdict.needs.append(
            "vLLM 0.24 or newer with --enable-mixed-moe-lora-format, and is_3d_lora_weight: true where the adapter is "
            "named; it does not check either"
        )
    # It splits the first factors into those of gate and up projection, and reads them together with the second ones.
    gateless = [name for name in experts if name.endswith(f".{UNGATED}")]
    layers = {name.rpartition(".")[0] for name in gateless}
    single = [
        name for name in experts if name.rpartition(".")[0] not in layers and _other_projection(name) not in experts
    ]
    if gateless:
        verdict.refuse(f"it was not checked for experts without a gate, as those of {gateless[0]}")
    if single:
        verdict.refuse(f"it reads factors of gate_up_proj and down_proj together, but {single[0]} has them alone")
    rank = max([config["r"], *ranks.values(), *(config_rank(config, name) for name in experts)])
    if rank > VLLM_RANKS[-1]:
        verdict.refuse(f"rank {rank} is above {VLLM_RANKS[-1]}")
    elif rank > VLLM_DEFAULT_RANK:
        verdict.needs.append(f"--max-lora-rank {next(limit for limit in VLLM_RANKS if limit >= rank)}")
    return verdict


def _other_projection(stack: str) -> str:
    """Return the name of a layer's other stack of experts, if the experts have a gate."""
    layer, _, part = stack.rpartition(".")
    return f"{layer}.{DOWN if part == GATED else GATED}"


def _check_llama_cpp(config: dict[str, Any], ranks: dict[str, int], others: list[str], base: Any) -> Verdict:
    verdict = Verdict(needs=["its converter's support of this architecture was not checked"])
    unknown = [
        name for name in others if not re.search(r"\.lora_embedding_[AB]|_layernorm|\.norm|\.base_layer\.weight", name)
    ]
    if unknown:
        verdict.refuse(f"its converter fails on {unknown[0]}, which is neither lora_A nor lora_B")
    modules = dict(base.named_modules())
    head, embeddings = output_head(base), input_embedding(base)
    for module in ranks:
        is_head = modules.get(module) is head and head is not None and embeddings is not None
        if is_head and head.weight is embeddings.weight:
            verdict.refuse(f"it can't update {module} separately from the embeddings that share its weight")
        if type(modules.get(module)).__name__ == "Conv1D":
            verdict.refuse(
                f"its converter transposes the weight of {module}, and with it the factors, which are not transposed"
            )
            break
    alpha = config["lora_alpha"]
    _check_scaling(verdict, config, {module: alpha / rank if alpha else 1.0 for module, rank in ranks.items()})
    return verdict


def _check_scaling(verdict: Verdict, config: dict[str, Any], scalings: dict[str, float]) -> None:
    """Check that a client scales every module as in training."""
    for module, served in scalings.items():
        trained = config_scaling(config, module)
        if not math.isclose(served, trained, rel_tol=1e-6):
            keys = [key for key in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
            because = f", as it does not read {' and '.join(keys)}" if keys else ""
            verdict.refuse(f"it would silently scale {module} by {served:g} instead of {trained:g}{because}")
            return


def _selected(config: dict[str, Any], modules: set[str]) -> set[str] | None:
    """Return the modules that target_modules selects; None if the selection depends on other keys."""
    targets = config.get("target_modules") or []
    if targets == "all-linear" or any(config.get(key) for key in ("layers_to_transform", "exclude_modules")):
        return None
    if isinstance(targets, str):
        return {name for name in modules if re.fullmatch(targets, name)}
    return {name for name in modules for target in targets if name == target or name.endswith(f".{target}")}
