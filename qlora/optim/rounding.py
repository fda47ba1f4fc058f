"""Rounding that loses no update on average."""

import torch

# Temporary bytes for rounding one element, besides the element itself.
TEMPORARY_BYTES = 14


def stochastic_round(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the expected value exact.

    A bf16 weight has 8 bits of precision: an update below 1/512 of it is lost whenever it is rounded to
    nearest, and is kept on average here.

    Args:
        values: fp32.
        generator: On the device of `values`; its state belongs in a checkpoint.

    Returns:
        bf16, of the same shape. Infinities, NaN and values that bf16 holds are unchanged.
    """
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    # bf16 is the upper half of fp32: noise below it carries into that half in proportion to what is cut off.
    bits = values.view(torch.int32).add(noise).bitwise_and_(-65536)
    # CUDA's NaN has all bits set, and would wrap around to -0.
    return torch.where(values.isnan(), values, bits.view(torch.float32)).to(torch.bfloat16)
