"""Experts that were published in MXFP4: the same values in 4 bits, in the format of NF4."""

import pytest
import torch

from qlora.kernels import ExpertGroup, LowRank
from qlora.nf4 import MXFP4, NF4Experts
from tests.reference.encodings import from_mxfp4

EXPERTS, OUT, GROUPS = 2, 6, 3


@pytest.fixture
def decoded(generator):
    """Weights as they are decoded, (experts, in, out), with powers of two from one end of the range to the other."""
    blocks = torch.randint(0, 256, (EXPERTS, OUT, GROUPS, 16), generator=generator, dtype=torch.uint8)
    blocks[0, 0, 0] = 0  # a block of zeros
    blocks[0, 1, 0] = 17  # the least magnitude alone
    scales = torch.randint(110, 140, (EXPERTS, OUT, GROUPS), generator=generator, dtype=torch.uint8)
    scales[1, 0], scales[1, 1] = 0, 252
    return from_mxfp4(blocks, scales)


def encode(weight):
    return NF4Experts.from_weight(weight, quant_type=MXFP4, is_transposed=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_value_stays_the_same(dtype, decoded):
    experts = encode(decoded.to(dtype))
    for expert in range(EXPERTS):
        held = experts.dequantize(expert, dtype)
        assert torch.equal(held.T.float(), decoded[expert])
        assert torch.equal(held.T.signbit(), decoded[expert].signbit())


def test_every_value_stays_the_same_in_fp16_where_it_holds_them(generator):
    blocks = torch.randint(0, 256, (EXPERTS, OUT, GROUPS, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(127 - 14, 127 + 13, (EXPERTS, OUT, GROUPS), generator=generator, dtype=torch.uint8)
    scales[0, 0], scales[0, 1] = 127 - 14, 127 + 13
    decoded = from_mxfp4(blocks, scales)
    experts = encode(decoded.half())
    for expert in range(EXPERTS):
        assert torch.equal(experts.dequantize(expert, torch.float16).T.float(), decoded[expert].float())


def test_a_weight_takes_half_a_byte_and_a_quarter_of_a_bit():
    experts = encode(torch.zeros(2, 64, 256))
    assert experts.num_bytes / experts.numel == pytest.approx(0.5 + 1 / 32, abs=1e-3)


@pytest.mark.parametrize("experts", [[1], [0, 1]], ids=str)
def test_updates_are_added_as_to_other_experts(experts, decoded, generator):
    decoded = decoded.clamp(-8, 8)
    stack = encode(decoded)
    A = torch.randn(EXPERTS, 2, 32 * GROUPS, generator=generator)
    update = LowRank(A, torch.randn(EXPERTS, OUT, 2, generator=generator), 0.5)
    group = ExpertGroup(experts, [*range(len(experts) + 1)], torch.tensor(experts), torch.arange(EXPERTS + 1))
    found = stack.weights_for_product(group, torch.float32, update)
    expected = decoded[experts].mT + 0.5 * update.B[experts] @ A[experts]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("weight", "message"), [
    (torch.randn(1, 32, 4), "none that MXFP4 has"),
    (torch.zeros(1, 48, 4), "rows of 48 weights are no blocks of 32"),
], ids=["other values", "no blocks"])  # fmt: skip
def test_other_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        encode(weight)
    with pytest.raises(ValueError, match="quant_type='fp4' should be nf4 or mxfp4"):
        NF4Experts.from_weight(weight, quant_type="fp4")
