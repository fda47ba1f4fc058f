"""Names of dtypes: torch's, and the short ones that people write."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def full_name(name: Any) -> Any:
    """torch's name of a dtype for a short one; anything else as it is."""
    return SHORT_NAMES.get(name, name) if isinstance(name, str) else name


def as_dtype(value: Any, error: type[Exception]) -> "torch.dtype":
    """The dtype that a name or a dtype stands for.

    Args:
        value: A floating-point `torch.dtype`, or its name: `bfloat16`, `bf16`, ….
        error: Raised for anything else.
    """
    import torch

    dtype = getattr(torch, full_name(value), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise error(f"dtype: {value!r} should be one of bfloat16, float16 and float32, or bf16, fp16 and fp32.")
    return dtype
