"""Translation of the adapters: their layers and ranks, their kind and initial values, and the one they start from."""

import re
from typing import Any

from qlora.config.convert import values
from qlora.config.convert.draft import OFF, Draft

# Initial values by the names of PEFT, which may be followed by the number of iterations of an SVD.
INITS = {"gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa", "eva": "eva", "loftq": "reconstruct"}
# EVA's bound on a layer's rank, in multiples of the mean: PEFT's default, and the value here.
EVA_RHO = 2.0
ADAPTER_NAMES = ("lora_model_dir", "adapter_name_or_path", "adapter_folder", "adapter_path")


def translate_adapters(draft: Draft) -> None:
    """Translate everything about the adapters but their numbers, before the base: LoftQ decides its quantization."""
    _targets(draft)
    if values.flag(draft.take("use_dora", "peft_use_dora")):
        draft.set("lora.kind", "dora", "use_dora")
    _start_from(draft)
    _initial_values(draft)
    _ranks(draft)
    modules = values.names(draft.take("lora_modules_to_save", "modules_to_save", "additional_target"))
    if modules:
        draft.set("lora.modules_to_save", modules, "modules_to_save")
    bias = draft.peek("bias")
    if bias not in (None, "none", False):
        draft.warn(f"bias: {bias} trains biases; only the adapters are trained here.")


def _targets(draft: Draft) -> None:
    everything = values.flag(draft.take("lora_target_linear"))
    name, given = draft.take_named("lora_target_modules", "target_modules", "lora_target", "lora_modules")
    found = values.names(given)
    if everything:
        draft.set("lora.targets", "all-linear", "lora_target_linear")
    elif found in (["all"], ["all-linear"]):
        draft.set("lora.targets", "all-linear", f"{name}: {found[0]}")
    elif _is_regex(given):
        draft.set("lora.targets", given, f"{name}, a regular expression")
    elif found:
        draft.set("lora.targets", found, name)
    name, given = draft.take_named("exclude_modules")
    excluded = [given] if _is_regex(given) else values.names(given)
    if excluded:
        draft.set("lora.exclude", excluded, name)
    name, given = draft.take_named("layers_to_transform", "peft_layers_to_transform")
    found = [str(given)] if type(given) is int else values.names(given)
    layers = [int(each) for each in found if re.fullmatch(r"\d{1,4}", each)]
    if layers:
        draft.set("lora.layers", layers, name)


def _is_regex(given: Any) -> bool:
    return isinstance(given, str) and re.search(r"[\\*()\[\]|+?]", given) is not None


def _start_from(draft: Draft) -> None:
    name, given = draft.take_named(*ADAPTER_NAMES)
    adapters = [path.strip() for each in values.paths(given) for path in each.split(",") if path.strip()]
    if not adapters:
        return
    draft.set("lora.start_from", adapters[-1], name)
    if values.flag(draft.take("create_new_adapter")):
        draft.set("lora.stack", True, "create_new_adapter")
    else:
        draft.warn(
            f"{name}: there, the adapter keeps its rank, alpha and layers. Here, set lora.rank, "
            "lora.alpha and lora.targets to them: a higher rank adds components, and another scaling is made up for "
            "in factor B."
        )
    if len(adapters) > 1:
        draft.warn(
            f"{name} names {len(adapters)} adapters; lora.start_from takes one, {adapters[-1]}. Merge the others into "
            "the base first."
        )


def _initial_values(draft: Draft) -> None:
    found = _initial_name(draft)
    if found is None:
        return
    key, given = found
    ours = INITS.get(given.lower().partition("_niter_")[0])
    if ours is None:
        draft.warn(f"{key}: {given} is not available; factor A is kaiming, factor B is zero.")
    elif "lora.start_from" in draft.values and ours not in ("gaussian", "orthogonal"):
        draft.warn(f"{key}: {given} has no effect here, because lora.start_from gives the adapter its values.")
    else:
        draft.set("lora.init", ours, f"{key}: {given}")
        _compare_initial_values(draft, key, ours)


def _initial_name(draft: Draft) -> tuple[str, str] | None:
    """Return the key that sets initial values, and their name by PEFT; None for the default."""
    inside = values.mapping(draft.peek("peft")).get("loftq_config")  # axolotl's
    if inside not in OFF:
        draft.take("peft")
    loftq_key, loftq = draft.take_named("loftq_config", "loftq")
    key, named = draft.take_named("init_lora_weights", "peft_init_lora_weights")
    # Each of these is another trainer's, and decides alone.
    for name, method in (("pissa_init", "pissa"), ("use_loftq", "loftq")):
        if values.flag(draft.take(name)):
            key, named = name, method
    if inside not in OFF:
        key, named, loftq = "peft.loftq_config", "loftq", inside
    if named != "loftq" and loftq not in OFF:
        draft.drop(loftq_key, "it is for init_lora_weights: loftq, which is not set")
    bits = values.number(values.mapping(loftq).get("loftq_bits"))
    if named == "loftq" and bits not in (None, 4):
        draft.warn(f"loftq_bits: {bits} is not available; the base is quantized to 4 bits.")
    return None if isinstance(named, bool) or named in (*OFF, "true", "default") else (key, str(named))


def _compare_initial_values(draft: Draft, key: str, ours: str) -> None:
    """Say what differs from PEFT's initial values of the same name."""
    if ours == "reconstruct":
        draft.set("model.quantization", "nf4", f"{key} quantizes the base")
        draft.warn(
            "LoftQ becomes lora.init: reconstruct, which also chooses base and adapter together, from "
            "a better start. Its adapter fits the base that qlora quantize RUN writes."
        )
    elif ours == "orthogonal":
        draft.warn("lora.init: orthogonal makes the rows of factor A orthonormal, and factor B is zero.")
    rho = values.number(values.mapping(draft.peek("eva_config")).get("rho"))
    if ours == "eva" and rho not in (None, EVA_RHO):
        draft.warn(f"eva_config.rho: {rho}; here a layer's rank is at most {EVA_RHO:g} times the mean.")


def _ranks(draft: Draft) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = draft.peek(name, f"peft_{name}")
        if isinstance(patterns, dict) and patterns:
            draft.set(f"lora.{name}", patterns, draft.take_named(name, f"peft_{name}")[0])
    final, first = values.number(draft.peek("target_r")), values.number(draft.peek("init_r"))
    if final and first and final < first:
        for name, key in (("init_r", "lora.rank"), ("target_r", "lora.final_rank")):
            draft.set(key, values.number(draft.take(name)), name)
