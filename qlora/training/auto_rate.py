"""The learning rate that `train.learning_rate: auto` stands for: a rule by model family and width."""

import math
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from qlora.config import RunConfig, TrainSection
from qlora.errors import ConfigError, plain_message
from qlora.model import adapter_spec

# The rule is for LoRA with Adam and a scaling of 32 / rank.
RULE_ALPHA = 32
RULE_RATE, RULE_WIDTH = 5e-4, 2000
# Exponents of the width by the beginning of a model's type.
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
# Other families: the geometric middle of both rules.
MIDDLE_EXPONENT = sum(EXPONENTS.values()) / len(EXPONENTS)
MOST = 0.1


@dataclass(frozen=True, slots=True)
class AutoRate:
    """A learning rate and its reason.

    Attributes:
        value: Peak learning rate, with three digits.
        why: How it was computed.
    """

    value: float
    why: str


def auto_rate(model_type: str, hidden_size: int, rank: int, scaling: float) -> AutoRate:
    """Return a good peak learning rate of AdamW for adapters.

    The rule is 5e-4 · (2000 / hidden size)^e, with e fitted for Llama and Qwen ("LoRA Without Regret", Thinking
    Machines, 2025). It was measured with a scaling of 32 / rank, for which the best rate hardly depends on the rank.

    Adam moves B by the rate, regardless of the gradient's scale, and B starts at zero. So the weight moves by
    rate · scaling · A at first, and another scaling s needs the rate times (32 / rank) / s: 32 / alpha for LoRA, and
    32 / (alpha · √rank) for rsLoRA, whose scaling is alpha / √rank.

    The length of the run is not taken into account: a higher rate for short runs, as the source has it, was worse on
    runs of 60 steps (docs/benchmarks/methods.md).

    Args:
        model_type: Architecture, as in the base's config.json.
        hidden_size: Number of features between layers.
        rank: Rank of the adapters.
        scaling: Factor on B A.
    """
    family = next((name for name in EXPONENTS if model_type.startswith(name)), None)
    exponent = MIDDLE_EXPONENT if family is None else EXPONENTS[family]
    adapter = RULE_ALPHA / rank / scaling
    computed = RULE_RATE * (RULE_WIDTH / hidden_size) ** exponent * adapter
    why = (
        f"auto: {RULE_RATE:g} · ({RULE_WIDTH} / {hidden_size})^{exponent:.3g} for {family or f'{model_type}, a middle'}"
    )
    if not math.isclose(adapter, 1):
        why += f", × {adapter:.3g} for a scaling of {scaling:.3g} at rank {rank}"
    if computed > MOST:
        why += f", at most {MOST:g}"
    return AutoRate(float(f"{min(computed, MOST):.3g}"), why)


def resolve_rate(config: RunConfig, model_config: Any) -> tuple[TrainSection, str | None]:
    """Return a config's training section with a number as learning rate, and how that was computed.

    The same base and adapters give the same rate, so that a continued run finds it again.

    Args:
        config: Config of the run.
        model_config: Config of the base.

    Returns:
        The section, and how `auto` was computed; None if the config gives a number.

    Raises:
        ConfigError: The base has no width, or other keys don't allow the rate.
    """
    if config.train.learning_rate != "auto":
        return config.train, None
    text_config = model_config.get_text_config()
    hidden_size = getattr(text_config, "hidden_size", None)
    if not isinstance(hidden_size, int):
        raise ConfigError(
            f"train.learning_rate: auto needs the base's hidden_size, which {text_config.model_type} has not; set a "
            "number, such as 2e-4."
        )
    spec = adapter_spec(config.lora)
    rate = auto_rate(text_config.model_type, hidden_size, spec.rank, spec.scaling)
    try:
        return config.train.with_learning_rate(rate.value), rate.why
    except ValidationError as error:
        problems = "; ".join(f"train.{each['loc'][0]} {plain_message(each['msg'])}" for each in error.errors())
        raise ConfigError(f"train.learning_rate is {rate.value:g} ({rate.why}), but {problems}.") from None
