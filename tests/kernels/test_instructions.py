"""The dequantization kernel compiled for each GPU: few instructions per weight, and all values in registers."""

import pytest

from scripts.dev.bench.instructions import dequantization
from scripts.dev.bench.launched import CAPABILITIES
from tests.interpreted import needs_compiler


# docs/benchmarks/instructions.md has the counts by version of Triton.
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("rank", "most"), [(0, 9), (8, 18), (16, 18), (32, 18)])
def test_a_weight_takes_few_instructions(rank, most, capability):
    found = dequantization(capability, rank)
    assert found.per_weight <= most
    assert found.spilled == 0
