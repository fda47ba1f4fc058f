"""Heads and KL divergence in chunks: the same value and gradients, without all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.kernels import linear_kl_divergence
from qlora.kernels.head import bytes_per_logit
from qlora.kernels.simulated import simulating
from qlora.memory.probe import measure_peak
from tests.reference.held import saved_tensors
from tests.reference.kl_divergence import linear_kl_divergence as reference


def make_inputs(generator, rows, features, vocabulary, dtype=torch.float32):
    hidden, base_hidden = (torch.randn(rows, features, generator=generator).to(dtype) for _ in range(2))
    weight, base_weight = (
        (torch.randn(vocabulary, features, generator=generator) * features**-0.5).to(dtype) for _ in range(2)
    )
    return hidden.requires_grad_(), weight, base_hidden, base_weight


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    rows=st.integers(1, 40),
    features=st.integers(1, 24),
    vocabulary=st.integers(2, 70),
    chunk_rows=st.sampled_from([0, 1, 3, 7, 40]),
    with_bias=st.booleans(),
    logit_scale=st.sampled_from([1.0, 0.0625, 3.0]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    weighted=st.booleans(),
    num_blocks=st.integers(1, 3),
)
def test_value_and_gradients_are_torchs(
    seed, rows, features, vocabulary, chunk_rows, with_bias, logit_scale, softcap, weighted, num_blocks
):
    """The last block of the head is trained."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, base_hidden, base_weight = make_inputs(generator, rows, features, vocabulary)
    options = {"logit_scale": logit_scale, "softcap": softcap}
    options["bias"] = torch.randn(vocabulary, generator=generator) if with_bias else None
    options["row_weights"] = torch.rand(rows, generator=generator) * 3 if weighted else None
    blocks = [block.clone() for block in weight.tensor_split(min(num_blocks, vocabulary))]
    blocks[-1].requires_grad_()
    found = linear_kl_divergence(
        hidden, blocks, base_hidden, [base_weight], chunk_elements=max(1, chunk_rows * vocabulary), **options
    )
    grad, grad_block = torch.autograd.grad(found, (hidden, blocks[-1]))
    wanted, wanted_grad, wanted_weight = reference(hidden, weight, base_hidden, base_weight, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(grad_block, wanted_weight[-len(blocks[-1]) :], rtol=1e-3, atol=2e-5)


def test_a_norm_that_is_left_is_applied_with_its_gradient(generator):
    hidden, weight, base_hidden, base_weight = make_inputs(generator, 9, 16, 50)
    scale = torch.rand(16, generator=generator)

    def norm(states):
        return F.rms_norm(states, (16,), scale)

    found = linear_kl_divergence(hidden, [weight], base_hidden, [base_weight], norm=norm, chunk_elements=4 * 50)
    (grad,) = torch.autograd.grad(found, hidden)
    normed = norm(hidden)
    wanted, wanted_grad, _ = reference(normed, weight, base_hidden, base_weight)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, torch.autograd.grad(normed, hidden, wanted_grad)[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_within_their_rounding(dtype, generator):
    hidden, weight, base_hidden, base_weight = make_inputs(generator, 64, 48, 300, dtype)
    found = linear_kl_divergence(hidden, [weight], base_hidden, [base_weight], softcap=5.0, chunk_elements=7 * 300)
    (grad,) = torch.autograd.grad(found, hidden)
    wanted, wanted_grad, _ = reference(hidden, weight, base_hidden, base_weight, softcap=5.0)
    assert found.item() == pytest.approx(wanted.item(), rel=0.02)
    assert (grad.float() - wanted_grad).norm() < 2**-6 * wanted_grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_predictions_have_no_divergence_and_no_gradient(dtype, generator):
    hidden, weight, *_ = make_inputs(generator, 33, 16, 70, dtype)
    found = linear_kl_divergence(hidden, [weight], hidden.detach(), [weight], chunk_elements=5 * 70)
    assert found.item() == 0
    assert torch.autograd.grad(found, hidden)[0].count_nonzero() == 0


def test_only_hidden_states_are_saved(generator):
    hidden, weight, base_hidden, base_weight = make_inputs(generator, 33, 16, 700)
    found, saved = saved_tensors(lambda: linear_kl_divergence(hidden, [weight], base_hidden, [base_weight]))
    assert sum(tensor.numel() for tensor in saved) == hidden.numel()
    with torch.no_grad():
        assert torch.equal(linear_kl_divergence(hidden, [weight], base_hidden, [base_weight]), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_chunk_takes_as_many_bytes_as_one_of_the_cross_entropy_on_a_gpu(kind, softcap, dtype):
    vocabulary, features, device = 3_000, 1, torch.device(kind)
    of_logit = 4 + dtype.itemsize if kind == "cpu" else bytes_per_logit(device, dtype)
    of_cross_entropy = 521 * of_logit  # rows of a chunk
    weight = torch.empty(vocabulary, features, dtype=dtype, device="meta")

    def peak(rows):
        hidden = torch.empty(rows, features, dtype=dtype, device="meta", requires_grad=True)
        with simulating(device):
            return measure_peak(
                lambda: linear_kl_divergence(hidden, [weight], hidden.detach(), [weight], softcap=softcap),
                hidden.device,
            )

    assert peak(500) / vocabulary == pytest.approx(of_cross_entropy, rel=0.02)
    assert peak(20) / vocabulary < 0.2 * of_cross_entropy


def test_without_rows_it_is_zero(generator):
    hidden, weight, base_hidden, base_weight = make_inputs(generator, 0, 16, 70)
    assert linear_kl_divergence(hidden, [weight], base_hidden, [base_weight]).item() == 0
