"""Rows of a layer's products are filled up to sizes that recur, which changes no result."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.lora import AdapterSpec, LoraLinear
from qlora.nf4 import NF4Linear


class Products(TorchDispatchMode):
    """Records the shapes of the operands of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = set[tuple[Any, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.add(tuple(tuple(each.shape) for each in args[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["lora", "nf4"])
def layer(request: Any, generator: torch.Generator) -> Any:
    linear = torch.nn.Linear(64, 96)
    linear.weight.data.normal_(std=0.1, generator=generator)
    base = NF4Linear.from_linear(linear)
    if request.param == "nf4":
        return base
    adapted = LoraLinear(base, AdapterSpec(rank=4, alpha=8, dtype=torch.float32))
    adapted.reset(generator)
    adapted.lora_B.data.normal_(generator=generator)
    return adapted


def step(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output, and the gradients of x and of what is trained."""
    x = x.clone().requires_grad_()
    trained = [each for each in layer.parameters() if each.requires_grad]
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


def evaluate(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output without a gradient."""
    with torch.no_grad():
        return [layer(x)]


@pytest.mark.parametrize("compute", [step, evaluate])
def test_numbers_of_rows_share_their_products(compute: Any, layer: Any, generator: torch.Generator) -> None:
    found = []
    for num_rows in (70, 81, 96):
        with Products() as products:
            compute(layer, torch.randn(num_rows, 64, generator=generator))
        assert products.shapes
        found.append(products.shapes)
    assert found[0] == found[1] == found[2]


def test_a_few_rows_are_not_filled_up(layer: Any, generator: torch.Generator) -> None:
    with Products() as products:
        evaluate(layer, torch.randn(1, 64, generator=generator))
    assert all(shapes[0][0] == 1 for shapes in products.shapes)


@pytest.mark.parametrize("shape", [(45, 64), (3, 17, 64), (31, 64), (64, 64)])
def test_outputs_and_gradients_are_those_of_a_dense_layer(
    layer: Any, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator)
    base = layer.base if isinstance(layer, LoraLinear) else layer
    weight, bias = base.dequantize(torch.float32), base.bias.detach()

    def dense(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        A, B = factors or (torch.zeros(1, 64), torch.zeros(96, 1))
        return x @ (weight + 2 * B @ A).T + bias

    factors = [each.detach().requires_grad_() for each in layer.parameters() if each.requires_grad]
    inputs = [x.clone().requires_grad_(), *factors]
    y = dense(*inputs)
    wanted = [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]
    assert torch.equal(evaluate(layer, x)[0], step(layer, x)[0])
    for own, expected in zip(step(layer, x), wanted, strict=True):
        assert own.shape == expected.shape
        assert (own - expected).abs().max() < 1e-5 * expected.abs().max()
