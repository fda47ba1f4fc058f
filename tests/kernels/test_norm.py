"""RMSNorm: equal to models' own norms except for last bits, with gradients at least as exact as autograd's."""

from functools import partial

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qlora.kernels import RMSNorm, rebuilt
from tests.reference.activations import rms_norm, with_gradients

EPS = 1e-5
FORMS = {
    "llama": (LlamaRMSNorm, {"rounds_first": True}),
    "olmo2": (Olmo2RMSNorm, {}),
    "gemma2": (Gemma2RMSNorm, {"offset": 1.0}),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make(form, features, dtype, generator):
    norm_class, options = FORMS[form]
    own = norm_class(features, eps=EPS).requires_grad_(False)
    own.weight.add_(torch.randn(features, generator=generator) * 0.3)
    own.to(dtype)
    return own, RMSNorm(own.weight, EPS, **options)


def rows(features, dtype, generator, count=512):
    scales = torch.logspace(-3, 1, count)[:, None]
    return (torch.randn(count, features, generator=generator) * scales).to(dtype)


@pytest.mark.parametrize("features", [64, 172])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_it_gives_what_the_models_own_gives_but_for_last_bits(form, dtype, features, generator):
    own, norm = make(form, features, dtype, generator)
    x = rows(features, dtype, generator)
    before = x.clone()
    found, expected = norm(x), own(x)
    assert torch.equal(x, before)
    assert found.dtype == dtype
    # Neighbours in a dtype are at most its eps apart, as a share, and a product with the weight may double that.
    last_bit = torch.finfo(dtype).eps * expected.float().abs().clamp_min(torch.finfo(dtype).smallest_normal)
    assert ((found.float() - expected.float()).abs() <= (2 if dtype != torch.float32 else 8) * last_bit).all()
    if dtype != torch.float32:
        assert (found != expected).float().mean() <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_its_gradient_is_as_near_to_the_true_one_as_autograds(form, dtype, generator):
    own, norm = make(form, 172, dtype, generator)
    x, grad = rows(172, dtype, generator), rows(172, dtype, generator).flip(0)
    before = x.clone(), grad.clone()
    weight = own.weight.double() + norm.offset
    _, exact = with_gradients(partial(rms_norm, weight=weight, eps=EPS), [x], grad, torch.float64)
    _, found = with_gradients(partial(rebuilt, norm), [x], grad, dtype)
    _, eager = with_gradients(own, [x], grad, dtype)
    assert torch.equal(x, before[0])
    assert torch.equal(grad, before[1])
    sizes = exact.norm(dim=-1)
    error, eager_error = (((each.double() - exact).norm(dim=-1) / sizes).mean() for each in (found, eager))
    assert error <= 1.01 * eager_error + 1e-7  # the last is a few last bits of fp32


def test_forms_give_different_results(generator):
    x = rows(172, torch.bfloat16, generator)
    _, norm = make("llama", 172, torch.bfloat16, generator)
    assert (norm(x) != RMSNorm(norm.weight, EPS)(x)).float().mean() > 0.05


def test_batches_keep_their_shape(generator):
    _, norm = make("llama", 64, torch.bfloat16, generator)
    x = rows(64, torch.bfloat16, generator, count=24).view(2, 3, 4, 64)
    (gradient,) = norm.gradients(torch.ones_like(x), x)
    assert norm(x).shape == gradient.shape == x.shape
    assert torch.equal(norm(x).view(24, 64), norm(x.view(24, 64)))
