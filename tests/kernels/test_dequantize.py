"""Dequantization in one pass: bitsandbytes' bits, and the LoRA term added before the one rounding."""

import sys
from types import ModuleType

import pytest
import torch
from bitsandbytes.functional import QuantState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora.kernels import HAS_TRITON, LowRank, dequantize_4bit_plain
from qlora.kernels.dequantize import tile_kind
from qlora.nf4 import dequantize, dequantize_path, quantize
from tests.interpreted import load_interpreted, needs_triton
from tests.reference import nf4 as reference
from tests.test_out_of_memory import RAN_OUT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (out, in): whole blocks; a small model's down and up projections; one and a half blocks a row; more than 256 blocks;
# an even width that is no multiple of a tile; an odd width; an odd number of weights; a single one.
SHAPES = [(64, 128), (64, 172), (172, 64), (64, 96), (130, 190), (33, 50), (12, 75), (7, 13), (1, 1)]
# The package exports the function under this name.
door = sys.modules["qlora.nf4.quantize"]


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """Return the kernel in Triton's interpreter, which runs on a CPU."""
    return load_interpreted("qlora.kernels.dequantize_triton")


def random_weight(shape, generator):
    """Return rows of different scales; if they are long enough, with a block and a half of zeros."""
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape[0], 1, generator=generator) + 0.1) * 0.02
    if weight.numel() > 512:
        weight.view(-1)[128:320] = 0
    return weight


def random_factors(shape, rank, dtype, generator):
    A, B = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return {"lora_A": (A * 0.1).to(dtype), "lora_B": (B * 0.1).to(dtype), "scaling": 0.3}


def arguments(packed, state, dtype):
    """Return the kernels' arguments from bitsandbytes' state."""
    positional = (packed, state.code, state.absmax, tuple(state.shape), dtype, state.blocksize)
    if not state.nested:
        return positional, {}
    nested = state.state2
    return positional, {
        "nested_code": nested.code,
        "nested_absmax": nested.absmax,
        "nested_offset": state.offset,
        "nested_block_size": nested.blocksize,
    }


def bits(tensor):
    """Return the bits as integers, in which -0 is not 0."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def as_interpreted(weight, dtype):
    """Cast an fp32 weight as Triton's interpreter does, which truncates to bf16 where every device rounds."""
    if dtype != torch.bfloat16:
        return weight.to(dtype)
    return (weight.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def assert_one_rounding(found, packed, state, factors):
    """Check that each weight is the result of fp32 arithmetic, within its error, rounded once to the dtype.

    The exact sum of products is computed in fp64. fp32 errs by 2^-24 of each product's and sum's magnitude, added up
    over the rank; the dtype then errs by half the distance of its numbers.
    """
    positional, nested = arguments(packed, state, found.dtype)
    weight = dequantize_4bit_plain(*positional, **nested).double()
    A, B = factors["lora_A"].double(), factors["lora_B"].double()
    exact = weight + factors["scaling"] * (B @ A)
    magnitude = weight.abs() + factors["scaling"] * (B.abs() @ A.abs())
    error_fp32 = magnitude * (len(A) + 4) * 2**-24
    info = torch.finfo(found.dtype)
    rounding = (exact.abs() + error_fp32) * info.eps / 2 + info.smallest_normal * info.eps
    assert ((found.double() - exact).abs() <= error_fp32 + rounding).all()


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_twin_gives_the_bits_of_bitsandbytes(shape, dtype, double_quant, block_size, generator):
    packed, state = quantize(random_weight(shape, generator), double_quant, block_size)
    positional, nested = arguments(packed, state, dtype)
    found = dequantize_4bit_plain(*positional, **nested)
    assert found.dtype == dtype
    assert torch.equal(bits(found), bits(dequantize(packed, state, dtype)))


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_twin_is_the_papers_definition(shape, block_size, generator):
    weight = random_weight(shape, generator)
    packed, state = quantize(weight, double_quant=False, block_size=block_size)
    codes = reference.unpack(packed, weight.numel())
    wanted = reference.dequantize(codes, reference.absmax_per_value(weight, block_size), weight.shape)
    assert torch.equal(dequantize_4bit_plain(*arguments(packed, state, torch.float32)[0]), wanted)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_gives_the_bits_of_the_twin(shape, dtype, double_quant, block_size, generator, interpreted):
    packed, state = quantize(random_weight(shape, generator), double_quant, block_size)
    positional, nested = arguments(packed, state, torch.float32)
    wanted = as_interpreted(dequantize_4bit_plain(*positional, **nested), dtype)
    positional, nested = arguments(packed, state, dtype)
    found = interpreted.dequantize_4bit_triton(*positional, **nested)
    assert found.dtype == dtype
    assert torch.equal(bits(found), bits(wanted))


# As a view of a buffer of bytes may begin.
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_codes_at_any_address_give_the_same_bits(offset, generator, interpreted):
    packed, state = quantize(random_weight((64, 128), generator))
    (_, *rest), nested = arguments(packed, state, torch.float32)
    moved = torch.zeros(packed.numel() + offset, dtype=torch.uint8)[offset:].copy_(packed.flatten())
    assert tile_kind(moved, (64, 128), 64, False) == (offset == 4, True)
    found = interpreted.dequantize_4bit_triton(moved, *rest, **nested)
    assert torch.equal(bits(found), bits(dequantize_4bit_plain(packed, *rest, **nested)))


@needs_triton
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    block_size=st.sampled_from([32, 64, 128, 256]),
    double_quant=st.booleans(),
    with_lora=st.booleans(),
)
def test_the_kernel_is_the_twin_for_any_shape(interpreted, seed, shape, block_size, double_quant, with_lora):
    generator = torch.Generator().manual_seed(seed)
    packed, state = quantize(random_weight(shape, generator), double_quant, block_size)
    positional, nested = arguments(packed, state, torch.float32)
    # Of rank 1, whose sums leave no choice of order.
    factors = random_factors(shape, 1, torch.float32, generator) if with_lora else {}
    found = interpreted.dequantize_4bit_triton(*positional, **nested, **factors)
    assert torch.equal(bits(found), bits(dequantize_4bit_plain(*positional, **nested, **factors)))


@pytest.mark.parametrize("rank", [1, 8, 16, 20, 256])
@pytest.mark.parametrize("factor_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 172), (7, 13)])
def test_the_twin_adds_the_lora_term_to_the_rounded_weight_and_rounds_once(shape, dtype, factor_dtype, rank, generator):
    packed, state = quantize(random_weight(shape, generator))
    factors = random_factors(shape, rank, factor_dtype, generator)
    positional, nested = arguments(packed, state, dtype)
    assert_one_rounding(dequantize_4bit_plain(*positional, **nested, **factors), packed, state, factors)


# Without bf16: the interpreter multiplies its bit patterns, and truncates instead of rounding.
@pytest.mark.parametrize("rank", [1, 8, 16, 20, 256])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(70, 128), (64, 172), (7, 13)])
def test_the_kernel_adds_the_lora_term_to_the_rounded_weight_and_rounds_once(
    shape, dtype, factor_dtype, rank, generator, interpreted
):
    packed, state = quantize(random_weight(shape, generator))
    factors = random_factors(shape, rank, factor_dtype, generator)
    positional, nested = arguments(packed, state, dtype)
    found = interpreted.dequantize_4bit_triton(*positional, **nested, **factors)
    assert_one_rounding(found, packed, state, factors)


# Of rank 1, whose sums leave no choice of order; factors of weights that are stored (in, out) are transposed.
@pytest.mark.parametrize(("rank", "is_transposed"), [(None, False), (1, False), (1, True)])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(70, 128), (64, 172), (130, 190), (7, 13)])
@pytest.mark.parametrize("name", ["plain", "triton"])
def test_some_weights_of_a_stack_are_each_dequantized_with_their_own_statistics(
    name, shape, dtype, double_quant, rank, is_transposed, generator, request
):
    function = dequantize_4bit_plain
    if name == "triton":
        function = request.getfixturevalue("interpreted").dequantize_4bit_triton
    scales = 10.0 ** torch.arange(-2, 2)
    quantized = [quantize(random_weight(shape, generator) * scale, double_quant) for scale in scales]
    (single, alike), index = zip(*(arguments(*each, dtype) for each in quantized), strict=True), torch.tensor([3, 0, 2])
    factors = [random_factors(shape, rank, dtype, generator) if rank else {} for _ in quantized]
    expected = [dequantize_4bit_plain(*single[one], **alike[one], **factors[one]) for one in index.tolist()]

    def stack(values):
        is_own = values and isinstance(values[0], torch.Tensor)
        return torch.stack(values) if is_own else (values[0] if values else None)

    (packed, code, absmax, *rest) = single[0]
    packed, absmax = (torch.stack([each[place] for each in single]) for place in (0, 2))
    own = {key: stack([each[key] for each in alike]) for key in alike[0]}
    own |= {key: alike[0][key] for key in alike[0] if key == "nested_code"}
    own |= {key: stack([each[key] for each in factors]) for key in factors[0]}
    if rank and is_transposed:
        own |= {key: own[key].mT.contiguous().mT for key in ("lora_A", "lora_B")}
    out = torch.full((3, *shape), float("nan"), dtype=dtype)
    assert function(packed, code, absmax, *rest, **own, index=index, out=out) is out
    assert torch.equal(bits(out), bits(torch.stack(expected)))


def test_a_lora_term_of_zero_changes_no_bit(generator):
    packed, state = quantize(random_weight((64, 172), generator))
    factors = random_factors((64, 172), 8, torch.bfloat16, generator)
    factors["lora_B"].zero_()
    positional, nested = arguments(packed, state, torch.bfloat16)
    assert torch.equal(
        dequantize_4bit_plain(*positional, **nested, **factors), dequantize(packed, state, torch.bfloat16)
    )


@pytest.mark.parametrize("with_lora", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "triton"])
def test_out_is_written_in_place(name, dtype, with_lora, generator, request):
    function = dequantize_4bit_plain
    if name == "triton":
        function = request.getfixturevalue("interpreted").dequantize_4bit_triton
    shape = (33, 50)
    packed, state = quantize(random_weight(shape, generator))
    positional, nested = arguments(packed, state, dtype)
    factors = random_factors(shape, 8, torch.float32, generator) if with_lora else {}
    out = torch.full(shape, float("nan"), dtype=dtype)
    assert function(*positional, **nested, **factors, out=out) is out
    assert torch.equal(out, function(*positional, **nested, **factors))


def test_nothing_is_written_outside_of_out(generator, interpreted):
    shape = (33, 51)
    packed, state = quantize(random_weight(shape, generator))
    positional, nested = arguments(packed, state, torch.float32)
    around = torch.full((33 * 51 + 400,), 7.0)
    for factors in ({}, random_factors(shape, 8, torch.float32, generator)):
        interpreted.dequantize_4bit_triton(*positional, **nested, **factors, out=around[200:-200].view(shape))
        assert (around[:200] == 7).all()
        assert (around[-200:] == 7).all()


@pytest.fixture
def fused_on_cpu(monkeypatch: pytest.MonkeyPatch):
    """Make `dequantize` on a CPU use the twin as its fused kernel, with no kind of weight verified yet."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    monkeypatch.setattr(door, "_verified", set())
    monkeypatch.setattr(door, "_rejected", {})
    monkeypatch.setattr(door, "_unfused_reason", lambda device: None)
    calls = []

    def use(kernel):
        def counted(*args, **kwargs):
            calls.append(kernel)
            return kernel(*args, **kwargs)

        monkeypatch.setattr("qlora.kernels.dequantize_triton.dequantize_4bit_triton", counted)
        return calls

    return use


CPU = torch.device("cpu")


def path_of(dtype, device=CPU):
    return ": ".join(dequantize_path(device, dtype))


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_first_weight_of_a_kind_is_computed_by_both_and_then_by_the_kernel(
    double_quant, fused_on_cpu, monkeypatch, generator
):
    calls = fused_on_cpu(dequantize_4bit_plain)
    by_bitsandbytes = []
    inner = door._dequantize_bitsandbytes
    monkeypatch.setattr(door, "_dequantize_bitsandbytes", lambda *a: by_bitsandbytes.append(a) or inner(*a))
    packed, state = quantize(random_weight((64, 172), generator), double_quant)
    assert path_of(torch.bfloat16) == "fused kernel: if it gives bitsandbytes' bits for the first weight"
    first = dequantize(packed, state, torch.bfloat16)
    assert (len(calls), len(by_bitsandbytes)) == (1, 1)
    assert path_of(torch.bfloat16) == "fused kernel: it gave bitsandbytes' bits here"
    out = torch.empty(64, 172, dtype=torch.bfloat16)
    assert dequantize(packed, state, torch.bfloat16, out=out) is out
    assert torch.equal(out, first)
    assert (len(calls), len(by_bitsandbytes)) == (2, 1)
    # Another dtype is another kernel, compiled separately.
    dequantize(packed, state, torch.float32)
    assert (len(calls), len(by_bitsandbytes)) == (3, 2)


def test_one_different_bit_rejects_the_kernel_with_the_reason(fused_on_cpu, generator):
    def wrong(*args, **kwargs):
        weight = dequantize_4bit_plain(*args, **kwargs)
        weight.view(-1)[weight.flatten().eq(0).nonzero()[0]] = -0.0
        return weight

    calls = fused_on_cpu(wrong)
    packed, state = quantize(random_weight((64, 172), generator), double_quant=False)
    wanted = dequantize_4bit_plain(*arguments(packed, state, torch.bfloat16)[0])
    out = torch.empty(64, 172, dtype=torch.bfloat16)
    for _ in range(2):
        dequantize(packed, state, torch.bfloat16, out=out)
        assert torch.equal(bits(out), bits(wanted))
    assert len(calls) == 1
    assert path_of(torch.bfloat16) == (
        "bitsandbytes: the fused kernel gave other bits for a 64 × 172 weight in torch.bfloat16"
    )


def test_a_kernel_that_omits_the_lora_term_is_not_verified_by_a_term_of_zero(fused_on_cpu, generator):
    def forgetful(*arguments, lora_A=None, lora_B=None, scaling=1.0, **named):
        return dequantize_4bit_plain(*arguments, **named)

    fused_on_cpu(forgetful)
    packed, state = quantize(random_weight((64, 172), generator))
    delta = LowRank(torch.randn(4, 172, generator=generator), torch.zeros(64, 4), 2.0)
    dequantize(packed, state, torch.float32, delta=delta)
    (reason,) = door._rejected.values()
    assert "other bits" in reason


def test_a_kernel_that_fails_is_rejected_with_the_reason(fused_on_cpu, generator):
    def fail(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    calls = fused_on_cpu(fail)
    packed, state = quantize(random_weight((33, 50), generator))
    for _ in range(2):
        assert dequantize(packed, state, torch.float16).isfinite().all()
    assert len(calls) == 1
    assert path_of(torch.float16) == (
        "bitsandbytes: the fused kernel failed for a 33 × 50 weight in torch.float16: "
        "RuntimeError: Failed to find C compiler. Please specify via CC."
    )


def test_a_kernel_that_is_wrong_for_one_kind_is_used_for_the_others(fused_on_cpu, generator):
    def wrong_in_fp32(*given, **named):
        weight = dequantize_4bit_plain(*given, **named)
        return weight + 1 if weight.dtype == torch.float32 else weight

    calls = fused_on_cpu(wrong_in_fp32)
    packed, state = quantize(random_weight((64, 172), generator))
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        positional, nested = arguments(packed, state, dtype)
        assert torch.equal(dequantize(packed, state, dtype), dequantize_4bit_plain(*positional, **nested))
    assert len(calls) == 3  # in fp32 once, to compare
    assert path_of(torch.bfloat16) == "fused kernel: it gave bitsandbytes' bits here"
    assert path_of(torch.float32) == (
        "bitsandbytes: the fused kernel gave other bits for a 64 × 172 weight in torch.float32"
    )


@pytest.mark.parametrize("error", RAN_OUT.values(), ids=RAN_OUT)
def test_a_comparison_that_runs_out_of_memory_is_made_again(error, fused_on_cpu, generator):
    errors = [error]

    def run_out(*given, **named):
        if errors:
            raise errors.pop()
        return dequantize_4bit_plain(*given, **named)

    fused_on_cpu(run_out)
    packed, state = quantize(random_weight((33, 50), generator))
    with pytest.raises(type(error)):
        dequantize(packed, state, torch.float16)
    dequantize(packed, state, torch.float16)
    assert path_of(torch.float16) == "fused kernel: it gave bitsandbytes' bits here"


@pytest.mark.parametrize("has_out", [False, True])
def test_a_weight_that_is_only_traced_has_its_shape_and_decides_nothing(has_out, monkeypatch):
    monkeypatch.setattr(door, "_unfused_reason", lambda device: None)
    # A build of torch without CUDA can't copy tensors that are said to be there.
    monkeypatch.setattr(torch.Tensor, "copy_", lambda out, weight: out if out.shape == weight.shape else None)
    verdicts = set(door._verified), dict(door._rejected)
    with FakeTensorMode():
        packed, code = torch.empty(2048, 1, dtype=torch.uint8, device="cuda"), torch.empty(16, device="cuda")
        state = QuantState(torch.empty(64, device="cuda"), torch.Size((64, 64)), code, 64, "nf4", torch.bfloat16)
        out = torch.empty(64, 64, dtype=torch.bfloat16, device="cuda") if has_out else None
        weight = dequantize(packed, state, torch.bfloat16, out)
    assert weight is out or not has_out
    assert (weight.shape, weight.dtype, weight.device.type) == ((64, 64), torch.bfloat16, "cuda")
    assert (door._verified, door._rejected) == verdicts


def test_a_cpu_uses_bitsandbytes():
    assert path_of(torch.bfloat16) == "bitsandbytes: the fused kernel is for CUDA"


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and HAS_TRITON), reason="needs CUDA and Triton")
class TestOnADevice:
    @pytest.mark.parametrize("block_size", [64, 128])
    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [*SHAPES, (1024, 4096)])
    def test_the_kernel_gives_the_bits_of_bitsandbytes(self, shape, dtype, double_quant, block_size, generator):
        packed, state = quantize(random_weight(shape, generator).cuda(), double_quant, block_size)
        found = door._dequantize_fused(packed, state, dtype)
        assert torch.equal(bits(found), bits(door._dequantize_bitsandbytes(packed, state, dtype, None)))
        out = torch.full_like(found, float("nan"))
        door._dequantize_fused(packed, state, dtype, out)
        assert torch.equal(bits(out), bits(found))

    @pytest.mark.parametrize("rank", [1, 8, 16, 64, 256])
    @pytest.mark.parametrize("factor_dtype", DTYPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(512, 1024), (70, 128), (64, 172), (7, 13)])
    def test_the_kernel_adds_the_lora_term_to_the_rounded_weight_and_rounds_once(
        self, shape, dtype, factor_dtype, rank, generator
    ):
        from qlora.kernels.dequantize_triton import dequantize_4bit_triton

        packed, state = quantize(random_weight(shape, generator).cuda())
        factors = random_factors(shape, rank, factor_dtype, generator)
        factors |= {name: factors[name].cuda() for name in ("lora_A", "lora_B")}
        positional, nested = arguments(packed, state, dtype)
        found = dequantize_4bit_triton(*positional, **nested, **factors)
        assert_one_rounding(found, packed, state, factors)

    def test_dequantize_uses_the_kernel(self, generator):
        packed, state = quantize(random_weight((64, 172), generator).cuda())
        dequantize(packed, state, torch.bfloat16)
        assert path_of(torch.bfloat16, torch.device("cuda")) == "fused kernel: it gave bitsandbytes' bits here"
