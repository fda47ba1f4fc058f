"""Heads and log-probabilities in chunks: the same values and gradients, without all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.kernels import linear_log_probs
from tests.reference.held import saved_tensors
from tests.reference.log_probs import linear_log_probs as reference


def make_inputs(generator, rows, features, vocabulary, dtype=torch.float32):
    hidden = torch.randn(rows, features, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, features, generator=generator) * features**-0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden.requires_grad_(), weight, labels, torch.randn(rows, generator=generator)


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
    num_blocks=st.integers(1, 3),
)
def test_values_and_gradients_are_torchs(
    seed, rows, features, vocabulary, chunk_rows, with_bias, logit_scale, softcap, num_blocks
):
    """The last block of the head is trained."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, labels, grad = make_inputs(generator, rows, features, vocabulary)
    options = {"logit_scale": logit_scale, "softcap": softcap}
    options["bias"] = torch.randn(vocabulary, generator=generator) if with_bias else None
    blocks = [block.clone() for block in weight.tensor_split(min(num_blocks, vocabulary))]
    blocks[-1].requires_grad_()
    found = linear_log_probs(hidden, blocks, labels, chunk_elements=max(1, chunk_rows * vocabulary), **options)
    grads = torch.autograd.grad(found, (hidden, blocks[-1]), grad)
    wanted, wanted_grad, wanted_weight = reference(hidden, weight, labels, grad, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[0], wanted_grad, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(grads[1], wanted_weight[-len(blocks[-1]) :], rtol=1e-3, atol=2e-5)


def test_a_norm_that_is_left_is_applied_with_its_gradient(generator):
    hidden, weight, labels, grad = make_inputs(generator, 9, 16, 50)
    scale = torch.rand(16, generator=generator)

    def norm(states):
        return F.rms_norm(states, (16,), scale)

    found = linear_log_probs(hidden, [weight], labels, norm=norm, chunk_elements=4 * 50)
    (of_hidden,) = torch.autograd.grad(found, hidden, grad)
    normed = norm(hidden)
    wanted, wanted_grad, _ = reference(normed, weight, labels, grad)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_hidden, torch.autograd.grad(normed, hidden, wanted_grad)[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_within_their_rounding(dtype, generator):
    hidden, weight, labels, grad = make_inputs(generator, 64, 48, 300, dtype)
    found = linear_log_probs(hidden, [weight], labels, softcap=5.0, chunk_elements=7 * 300)
    (of_hidden,) = torch.autograd.grad(found, hidden, grad)
    wanted, wanted_grad, _ = reference(hidden, weight, labels, grad, softcap=5.0)
    torch.testing.assert_close(found.detach(), wanted, rtol=0.02, atol=0.02)
    assert (of_hidden.float() - wanted_grad).norm() < 2**-6 * wanted_grad.norm()


def test_no_logits_are_saved(generator):
    hidden, weight, labels, _ = make_inputs(generator, 33, 16, 700)
    _, saved = saved_tensors(lambda: linear_log_probs(hidden, [weight], labels))
    assert sum(tensor.numel() for tensor in saved) <= hidden.numel() + labels.numel() + weight.numel()


def test_without_rows_there_are_none(generator):
    hidden, weight, labels, _ = make_inputs(generator, 0, 16, 70)
    assert linear_log_probs(hidden, [weight], labels).shape == (0,)
