"""Names of dtypes: torch's, and their short forms."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def full_name(name: Any) -> Any:
    """Return torch's name of a dtype for its short form; anything else unchanged."""
    return SHORT_NAMES.get(name, name) if isinstance(name, str) else name


def as_dtype(value: Any, error: type[Exception]) -> "torch.dtype":
    """Return the dtype for a name or a dtype.

    Args:
        value: `torch.bfloat16`, `torch.float16` or `torch.float32`, or a name of one: `bfloat16`, `bf16`, ….
        error: Type of the exception raised for anything else.
    """
    import torch

    dtype = getattr(torch, full_name(value), None) if isinstance(value, str) else value
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise error(f"dtype: {value!r} should be one of bfloat16, float16 and float32, or bf16, fp16 and fp32.")
    return dtype
