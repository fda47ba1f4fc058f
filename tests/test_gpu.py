"""The main job on CUDA; what is special there, and the rest as on a CPU."""

from pathlib import Path

import pytest
import torch

import qlora
from qlora.lora import LoraLinear
from qlora.nf4 import NF4Linear, dequantize, quantize
from tests.tiny import run_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_dequantized_weights_are_those_of_the_cpu(generator: torch.Generator):
    weight = torch.randn(96, 172, generator=generator)
    packed, state = quantize(weight)
    on_cpu = dequantize(packed, state, torch.float32)
    state.to(torch.device("cuda"))
    assert torch.equal(dequantize(packed.cuda(), state, torch.float32).cpu(), on_cpu)


def test_gradients_match_a_plain_fp32_layer(generator: torch.Generator):
    linear = torch.nn.Linear(172, 96).cuda()
    layer = LoraLinear(NF4Linear.from_linear(linear), rank=8, alpha=16, dtype=torch.float32)
    layer.cuda().reset("kaiming", generator)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 172, generator=generator).cuda().requires_grad_()
    layer(x).square().sum().backward()
    got = [tensor.grad.clone() for tensor in (x, layer.lora_A, layer.lora_B)]
    for tensor in (x, layer.lora_A, layer.lora_B):
        tensor.grad = None
    weight = layer.base.dequantize(torch.float32)
    (x @ (weight + layer.scaling * layer.lora_B @ layer.lora_A).T + layer.base.bias).square().sum().backward()
    for found, tensor in zip(got, (x, layer.lora_A, layer.lora_B), strict=True):
        torch.testing.assert_close(found, tensor.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
def test_a_run_learns_merges_and_verifies(tmp_path: Path, tiny_base: Path, alpaca_file: Path, compute_dtype: str):
    config = run_config(tiny_base, alpaca_file, tmp_path / "run", model__compute_dtype=compute_dtype)
    result = qlora.train(qlora.load_config(config))
    assert result.eval_losses[6] < result.eval_losses[0]
    qlora.merge(result.run_dir, tmp_path / "merged")
    assert qlora.verify(result.run_dir, tmp_path / "merged").matches
