"""Translation of the base's settings: quantization, dtype, attention, activation checkpointing."""

from qlora.config.convert import values
from qlora.config.convert.draft import OFF, Draft


def translate_base(draft: Draft) -> None:
    """Translate how the base is loaded and computed."""
    _quantization(draft)
    _precision(draft)
    _attention(draft)
    _recompute(draft)


def _quantization(draft: Draft) -> None:
    bits_key, given = draft.take_named("quantization_bit", "bits")
    bits = values.number(given)
    four = {name: draft.take(name) for name in ("load_in_4bit", "use_4bit_quantization", "use_bnb_4bit_quantization")}
    eight = [draft.peek(name) for name in ("load_in_8bit", "load_in_fp8")]
    adapter = draft.take("adapter")
    asked = [name for name, value in four.items() if values.flag(value)]
    asked += [f"{bits_key}: 4"] * (bits == 4) + ["adapter: qlora"] * (adapter == "qlora")
    is_four = bool(asked)
    is_eight = bits == 8 or any(map(values.flag, eight))
    if bits not in (None, 4, 8, 16, 32):
        draft.warn(f"A base in {bits} bits is not available; model.quantization is nf4, 4 bits.")
        is_four = True
    kinds = values.mapping(draft.take("bnb_config_kwargs"))
    kind = draft.take("bnb_4bit_quant_type", "quant_type", "quantization_type") or kinds.get("bnb_4bit_quant_type")
    if is_four and kind not in (None, "nf4"):
        draft.warn(f"The 4-bit type {kind} is not available; model.quantization: nf4 is used.")
    if is_four:
        draft.set("model.quantization", "nf4", ", ".join(asked) or f"{bits_key}: {bits}, see above")
    elif is_eight:
        draft.set("model.quantization", "nf4", "instead of an 8-bit base, see above")
        draft.warn("It loads the base in 8 bits. Here it is in 4 bits (nf4); model.quantization: none keeps 16 bits.")
    else:
        draft.set("model.quantization", "none", "16-bit base; nf4 takes a quarter of the memory")
    if is_eight:
        for name in ("load_in_8bit", "load_in_fp8"):
            draft.take(name)  # the warning says how it was handled
    double = draft.take(
        "bnb_4bit_use_double_quant", "use_bnb_nested_quant", "use_nested_quant", "double_quantization", "double_quant"
    )
    double = kinds.get("bnb_4bit_use_double_quant", double)
    if is_four and values.flag(double) is not None:
        draft.set("model.double_quant", values.flag(double), "double quantization")
    method = draft.take("quantization_method")
    if method not in (None, "bnb", "bitsandbytes") and is_four:
        draft.warn(f"quantization_method: {method} is not available; model.quantization: nf4 is used.")


def _precision(draft: Draft) -> None:
    given = {name: draft.take(name) for name in ("bf16", "fp16", "bfloat16", "float16", "pure_bf16")}
    key, named = draft.take_named("torch_dtype", "dtype", "bnb_4bit_compute_dtype")
    on = {name for name, value in given.items() if values.flag(value)} | {"bf16"} & {
        name for name, value in given.items() if value == "full"
    }
    if on & {"fp16", "float16"}:
        draft.set("model.compute_dtype", "float16", ", ".join(sorted(on)))
    elif on:
        draft.set("model.compute_dtype", "bfloat16", ", ".join(sorted(on)))
    elif given["bf16"] == "auto" or named == "auto":
        draft.set("model.compute_dtype", "auto", "bf16: auto")
    elif (ours := values.dtype(named)) is not None:
        draft.set("model.compute_dtype", ours, f"{key}: {named}")


def _attention(draft: Draft) -> None:
    attention = [
        draft.take(name)
        for name in ("attn_implementation", "attention", "flash_attention", "flash_attn", "use_flash_attn",
                     "use_flash_attention_2", "xformers_attention", "sdp_attention", "eager_attention",
                     "flex_attention")
    ]  # fmt: skip
    named = next((values.ATTENTION[str(name)] for name in attention[:2] if str(name) in values.ATTENTION), None)
    if named is not None or any(value not in OFF for value in attention):
        draft.set("model.attention", named or "auto", "attention; auto takes the fastest that keeps documents apart")


def _recompute(draft: Draft) -> None:
    recompute = draft.take("gradient_checkpointing", "use_gradient_checkpointing", "activation_checkpointing")
    offloads = draft.take("activation_offloading")
    if isinstance(recompute, str) and recompute.startswith("offload") or values.flag(offloads):
        draft.set("model.recompute", "offload", "gradient checkpointing with offloading")
    elif recompute is not None:
        is_on = values.flag(recompute) or isinstance(recompute, str) and recompute == "unsloth"
        level = "auto" if is_on else "none"
        draft.set("model.recompute", level, "gradient checkpointing; auto recomputes only what memory requires")
    disabled = values.flag(draft.take("disable_gradient_checkpointing"))
    if disabled is not None:
        draft.set("model.recompute", "none" if disabled else "auto", "gradient checkpointing")
