"""RMSNorm: equal to models' own norms except for last bits, with gradients at least as exact as autograd's."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qlora.kernels import RMSNorm, rebuilt
from tests.interpreted import interpret
from tests.reference.activations import rms_norm, with_gradients

EPS = 1e-5
FORMS = {
    "llama": (LlamaRMSNorm, {"rounds_first": True}),
    "olmo2": (Olmo2RMSNorm, {}),
    "gemma2": (Gemma2RMSNorm, {"offset": 1.0}),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Not bf16 for the kernel, which the interpreter rounds differently.
WAYS = [*(("plain", dtype) for dtype in DTYPES), *(("kernel", dtype) for dtype in DTYPES[1:])]


# The interpreter adds one number at a time.
COUNTS = {"plain": 512, "kernel": 24}


def make(form, features, dtype, generator):
    norm_class, options = FORMS[form]
    own = norm_class(features, eps=EPS).requires_grad_(False)
    own.weight.add_(torch.randn(features, generator=generator) * 0.3)
    own.to(dtype)
    return own, RMSNorm(own.weight, EPS, **options)


def rows(features, dtype, generator, count=512):
    scales = torch.logspace(-3, 1, count)[:, None]
    return (torch.randn(count, features, generator=generator) * scales).to(dtype)


@pytest.fixture
def use(monkeypatch):
    """Return a function that returns a norm in plain torch, or computed by the kernel in Triton's interpreter."""

    def choose(norm, way):
        if way == "kernel":
            interpret(monkeypatch, "norm_triton")
        return replace(norm, fused=way == "kernel")

    return choose


@pytest.mark.parametrize("features", [64, 172])
@pytest.mark.parametrize(("way", "dtype"), WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_it_gives_what_the_models_own_gives_but_for_last_bits(form, way, dtype, features, generator, use):
    own, norm = make(form, features, dtype, generator)
    norm = use(norm, way)
    x = rows(features, dtype, generator, COUNTS[way])
    before = x.clone()
    found, expected = norm(x), own(x)
    assert torch.equal(x, before)
    assert found.dtype == dtype
    # Neighbours in a dtype are at most its eps apart, as a share, and a product with the weight may double that.
    last_bit = torch.finfo(dtype).eps * expected.float().abs().clamp_min(torch.finfo(dtype).smallest_normal)
    assert ((found.float() - expected.float()).abs() <= (2 if dtype != torch.float32 else 8) * last_bit).all()
    if dtype != torch.float32:
        assert (found != expected).float().mean() <= 1e-3


@pytest.mark.parametrize(("way", "dtype"), WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_its_gradient_is_as_near_to_the_true_one_as_autograds(form, way, dtype, generator, use):
    own, norm = make(form, 172, dtype, generator)
    norm = use(norm, way)
    x, grad = (rows(172, dtype, generator, COUNTS[way]) for _ in range(2))
    grad = grad.flip(0)
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


@pytest.mark.parametrize("features", [9, 300])
def test_the_kernel_computes_rows_of_any_length_in_the_norms_dtype(features, generator, use):
    x, grad = (torch.randn(5, features, generator=generator).half() for _ in range(2))
    for options in ({}, {"rounds_first": True}):
        weight = torch.randn(features, generator=generator)  # in fp32, to which the first form promotes its result
        plain = RMSNorm(weight, EPS, **options)
        fused = use(plain, "kernel")
        assert fused(x).dtype == plain(x).dtype
        assert torch.allclose(fused(x), plain(x), rtol=2e-3)
        assert torch.allclose(fused.gradients(grad, x)[0], plain.gradients(grad, x)[0], rtol=2e-3, atol=1e-3)


def test_the_kernel_refuses_rows_that_do_not_fit_into_registers(use):
    with pytest.raises(ValueError, match="rows of up to 16,384 features, not 20,000"):
        use(RMSNorm(torch.ones(20_000), EPS), "kernel")(torch.ones(1, 20_000))


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
