"""The distance between neighbouring numbers, which bounds the comparison of tensors."""

import pytest
import torch

from qlora.proof.tensors import spacing

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_spacing_is_the_distance_to_the_next_number(dtype, generator):
    """Compare with the number that has the next bits, which is the next one in magnitude."""
    exponents = torch.randint(-20, 15, (2000,), generator=generator)
    values = torch.ldexp(torch.randn(2000, generator=generator), exponents).to(dtype)
    info = torch.finfo(dtype)
    values = torch.cat([values, torch.tensor([0.0, 1.0, -1.0, info.tiny, info.tiny / 2, info.max / 2], dtype=dtype)])
    following = (values.view(INTEGERS[dtype]) + 1).view(dtype)
    expected = following.double().abs() - values.double().abs()
    assert torch.equal(spacing(values.double(), dtype), expected)
