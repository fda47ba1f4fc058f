"""liger-kernel's functions: why they are not used, and that on CUDA they equal plain torch."""

import pytest
import torch

from qlora.kernels import GatedProduct, RMSNorm, liger_twin, liger_unavailable_reason, liger_version, rebuilt
from tests.reference.activations import with_gradients

on_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(liger_version() is None, reason="needs liger-kernel"),
]


def test_it_is_for_cuda():
    assert liger_unavailable_reason(torch.device("cpu")) == "liger-kernel is for CUDA"


def test_a_missing_package_is_the_reason(monkeypatch):
    monkeypatch.setattr("qlora.kernels.liger.liger_version", lambda: None)
    assert liger_unavailable_reason(torch.device("cuda")) == "liger-kernel is not installed"
    monkeypatch.setattr("qlora.kernels.liger.liger_version", lambda: "0.8.5")
    assert liger_unavailable_reason(torch.device("cuda")) is None


def test_there_is_none_for_another_function():
    assert liger_twin(torch.nn.LayerNorm(4)) is None
    assert liger_twin(GatedProduct("gelu")) is None


def functions(weight):
    return [
        (RMSNorm(weight, 1e-5, rounds_first=True), 1),
        (RMSNorm(weight, 1e-5), 1),
        (RMSNorm(weight, 1e-5, offset=1.0), 1),
        (GatedProduct("silu"), 2),
        (GatedProduct("gelu_tanh"), 2),
    ]


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
class TestOnCuda:
    pytestmark = on_cuda

    def test_values_and_gradients_are_those_of_plain_torch(self, kind, dtype, generator):
        weight = torch.randn(172, generator=generator).to("cuda", dtype)
        function, num_inputs = functions(weight)[kind]
        *inputs, grad = (torch.randn(5, 33, 172, generator=generator).to("cuda", dtype) for _ in range(num_inputs + 1))
        liger = liger_twin(function)
        found, expected = (
            with_gradients(lambda *each, run=run: rebuilt(run, *each), inputs, grad, dtype) for run in (liger, function)
        )
        for one, other in zip(found, expected, strict=True):
            assert (one.float() - other.float()).norm() <= max(1e-5, torch.finfo(dtype).eps) * other.float().norm()

    def test_what_is_kept_for_others_is_left_as_it_was(self, kind, dtype, generator):
        weight = torch.randn(172, generator=generator).to("cuda", dtype)
        function, num_inputs = functions(weight)[kind]
        inputs = [
            torch.randn(7, 172, generator=generator).to("cuda", dtype).requires_grad_() for _ in range(num_inputs)
        ]
        before, grad = [each.detach().clone() for each in inputs], torch.ones_like(inputs[0])
        result = rebuilt(liger_twin(function), *inputs)
        first = torch.autograd.grad(result, inputs, grad, retain_graph=True)
        second = torch.autograd.grad(result, inputs, grad)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))
        assert torch.equal(grad, torch.ones_like(grad))
