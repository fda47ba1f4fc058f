"""Weights that were published in MXFP4, held in 4 bits without any further error.

MXFP4 has a number of 4 bits (E2M1) for each weight and a power of two for each 32 of them. In bitsandbytes' state
format these are the codes, with other values than NF4's, and absmax in 8 bits: a code of a table of powers of two. So
everything that dequantizes NF4 with double quantization takes them too, except bitsandbytes' own kernels.
"""

from typing import TYPE_CHECKING

import torch

from qlora.nf4.quantize import MXFP4, NESTED_BLOCK_SIZE

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

# Number of weights that share a power of two.
MXFP4_BLOCK_SIZE = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Code of the power 0.
BIAS = 127


def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, "QuantState"]:
    """Find the codes of a weight that was decoded from MXFP4; the powers of two are the least that represent a block.

    Args:
        weight: (out, in), as it was stored: blocks are along `in`. In fp32, bf16, or fp16 where that holds each value.

    Returns:
        The packed codes, (out * in / 2, 1) uint8, the first of each pair in the upper half, and the state needed to
        dequantize them.

    Raises:
        ValueError: Some values are none of MXFP4.
    """
    from bitsandbytes.functional import QuantState

    if weight.shape[-1] % MXFP4_BLOCK_SIZE:
        raise ValueError(
            f"rows of {weight.shape[-1]} weights are no blocks of {MXFP4_BLOCK_SIZE}, which MXFP4 has; use another base"
        )
    blocks = weight.float().contiguous().view(-1, MXFP4_BLOCK_SIZE)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    # The largest value of a block becomes 4 or 6. With the power that it was stored with it may be a half of that, and
    # so on, and each value of MXFP4 is one too after it was doubled, up to 6.
    exponents = (largest.frexp().exponent - 3).clamp(-BIAS, BIAS)
    scaled = torch.ldexp(blocks, -exponents)
    values = torch.tensor(MAGNITUDES, device=weight.device)
    codes = torch.searchsorted(values, scaled.abs()).clamp_(max=len(values) - 1)
    if not torch.equal(values[codes], scaled.abs()):
        in_bf16 = "set model.compute_dtype: bfloat16, which represents all that it has"
        remedy = in_bf16 if weight.dtype == torch.float16 else "use another base"
        raise ValueError(f"some values are none that MXFP4 has; {remedy}")
    codes = (codes + 8 * scaled.signbit()).to(torch.uint8).view(-1, 2)
    packed = (codes[:, :1] << 4) | codes[:, 1:]
    absmax = (exponents + BIAS).to(torch.uint8).flatten()
    device = weight.device
    # fp32 has no 2^128, which no block needs. The state format also has factors of the powers, 1, and an offset, 0.
    powers = torch.ldexp(torch.ones(2 * BIAS + 1, device=device), torch.arange(-BIAS, BIAS + 1, device=device))
    factors = torch.ones(-(-len(absmax) // NESTED_BLOCK_SIZE), device=device)
    nested = QuantState(factors, blocksize=NESTED_BLOCK_SIZE, code=powers, dtype=torch.float32)
    state = QuantState(
        absmax, weight.shape, torch.cat([values, -values]), blocksize=MXFP4_BLOCK_SIZE, quant_type=MXFP4,
        dtype=weight.dtype, offset=torch.zeros((), device=device), state2=nested,
    )  # fmt: skip
    return packed, state
