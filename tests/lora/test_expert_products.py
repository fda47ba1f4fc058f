"""A layer of experts against dense autograd token by token, in every way that it is computed."""

from collections import Counter
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from qlora.kernels import grouped
from qlora.layers.region import recomputed
from qlora.lora import expert_products as products
from qlora.lora.expert_products import ExpertProjection, expert_products
from qlora.lora.experts import PlainExperts
from qlora.nf4 import NF4Experts
from scripts.dev.bench import counts
from tests.interpreted import Launches, counted_kernel, load_interpreted, use_on_cpu
from tests.reference.experts import experts_layer

HIDDEN, INNER, RANK = 48, 20, 3


@pytest.fixture(scope="module")
def interpreted() -> dict[str, ModuleType]:
    """Return the kernels that experts are computed with on a GPU, in Triton's interpreter."""
    return {name: load_interpreted(f"qlora.kernels.{name}") for name in ("grouped_triton", "dequantize_triton")}


@pytest.fixture(params=["one at a time", "in groups", "kernels"])
def way(request, monkeypatch) -> str:
    """Compute a layer in each way; in groups that are full, by their experts or by their rows."""
    size = 1 if request.param == "one at a time" else 3
    monkeypatch.setattr(products, "experts_at_once", lambda *_, **__: size)
    monkeypatch.setattr(products, "FEW_ROWS", 20)
    if request.param == "kernels":
        use_on_cpu(monkeypatch, request.getfixturevalue("interpreted"))
    return request.param


def clamped_gate(first):
    """Return gpt-oss's gate: gate and up projection alternate."""
    gate, up = first[..., ::2].clamp(max=2.0), first[..., 1::2].clamp(-2.0, 2.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.7)


def silu_gate(first):
    """Return the gate of most families."""
    gate, up = first.chunk(2, dim=-1)
    return F.silu(gate) * up


class Layer:
    """A random layer of experts, with its dense twin."""

    def __init__(self, num_experts, generator, is_transposed=False, in_4bit=True, gate=silu_gate):
        def draw(*shape):
            return torch.randn(shape, generator=generator)

        self.gate, self.parts, self.factors, self.dense = gate, [], [], []
        for out_features, in_features in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
            weight = draw(num_experts, out_features, in_features) * 0.2
            weight = weight.mT.contiguous() if is_transposed else weight
            own = NF4Experts.from_weight(weight) if in_4bit else PlainExperts(torch.nn.Parameter(weight))
            if in_4bit:
                weight = torch.stack([own.dequantize(expert, torch.float32) for expert in range(num_experts)])
            bias = draw(num_experts, out_features) if is_transposed else None
            self.parts.append(ExpertProjection(own, bias, is_transposed, 0.7))
            self.dense.append(weight.mT if is_transposed else weight)
            A, B = draw(num_experts, RANK, in_features) * 0.3, draw(num_experts, out_features, RANK) * 0.3
            self.factors += [A.requires_grad_(), B.requires_grad_()]

    def products(self, x, index, scores):
        return expert_products(x, index, scores, *self.parts, self.gate, self.factors)

    def reference(self, x, index, scores):
        pairs = zip(self.dense, self.factors[::2], self.factors[1::2], strict=True)
        weights = [weight + 0.7 * B @ A for weight, A, B in pairs]
        zeros = torch.zeros(len(weights[0]), 1)
        biases = [zeros if part.bias is None else part.bias for part in self.parts]
        return experts_layer(x, index, scores, *weights, *biases, self.gate)


def routed(tokens, num_experts, top_k, generator):
    """Return random tokens, their experts, each once, and scores of them."""
    x = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    scores, index = torch.rand(tokens, num_experts, generator=generator).topk(top_k)
    return x, index, scores.requires_grad_()


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm() + 1e-7


@pytest.mark.parametrize("kind", ["4 bits", "transposed with biases", "16 bits"])
def test_output_and_gradients_are_those_of_dense_autograd(kind, way, generator):
    is_transposed = kind.startswith("transposed")
    gate = clamped_gate if is_transposed else silu_gate
    layer = Layer(9, generator, is_transposed, kind != "16 bits", gate)
    x, index, scores = routed(23, 9, 3, generator)
    index = torch.where(index == 4, 9, index)  # one expert without tokens, and places without an expert
    grad = torch.randn(23, HIDDEN, generator=generator)
    inputs = [x, scores, *layer.factors]
    expected = layer.reference(x, index, scores)
    found = layer.products(x, index, scores)
    gradients = torch.autograd.grad(found, inputs, grad)
    assert_same([found, *gradients], [expected, *torch.autograd.grad(expected, inputs, grad)])
    for each in gradients[2:]:
        assert (each[4] == 0).all()
    again = layer.products(x, index, scores)
    assert torch.equal(again, found)
    for one, other in zip(torch.autograd.grad(again, inputs, grad), gradients, strict=True):
        assert torch.equal(one, other)


def test_a_token_does_not_depend_on_others(way, generator):
    layer = Layer(5, generator)
    x, index, scores = routed(12, 5, 2, generator)
    with torch.no_grad():
        together, alone = layer.products(x, index, scores), layer.products(x[5:6], index[5:6], scores[5:6])
    assert torch.allclose(together[5:6], alone, rtol=0, atol=1e-5)


# In each group, the backward multiplies twice before any gradient: for that of h, and the first product again.
@pytest.mark.parametrize(
    ("needed", "matmuls", "outers"),
    [
        (["x"], 3, 0),
        (["scores"], 2, 0),
        (["A of up"], 3, 1),
        (["B of up", "A of down"], 4, 2),
        (["x", "scores", "B of down"], 4, 1),
    ],
)
def test_only_the_gradients_that_are_needed_are_computed(needed, matmuls, outers, way, monkeypatch, generator):
    layer, calls = Layer(5, generator), {"grouped_matmul": Counter(), "grouped_outer": Counter()}
    x, index, scores = routed(12, 5, 2, generator)
    names = "x", "scores", "A of up", "B of up", "A of down", "B of down"
    tensors = dict(zip(names, [x, scores, *layer.factors], strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in needed)
    inputs = [tensors[name] for name in needed]
    expected = torch.autograd.grad(layer.reference(x, index, scores).sum(), inputs)
    y = layer.products(x, index, scores)

    def count(product):
        own = getattr(products, product)

        def call(left, right, group, *rest, **options):
            calls[product][group.starts[0]] += 1
            return own(left, right, group, *rest, **options)

        monkeypatch.setattr(products, product, call)

    for product in calls:
        count(product)
    assert_same(torch.autograd.grad(y.sum(), inputs), expected)
    assert {*calls["grouped_matmul"].values()} == {matmuls}
    assert {*calls["grouped_outer"].values()} == ({outers} if outers else set())


def test_frozen_experts_pass_gradients_on(way, generator):
    layer = Layer(5, generator)
    x, index, scores = routed(12, 5, 2, generator)
    for factor in layer.factors:
        factor.data.zero_()
    expected = torch.autograd.grad(layer.reference(x, index, scores).sum(), [x, scores])
    layer.parts, layer.factors = [replace(part, scaling=None) for part in layer.parts], []
    assert_same(torch.autograd.grad(layer.products(x, index, scores).sum(), [x, scores]), expected)


def test_a_recomputation_ends_before_the_products_and_their_read(generator):
    layer = Layer(5, generator)
    x, index, scores = routed(12, 5, 2, generator)
    inputs = [x, scores, *layer.factors]
    expected = torch.autograd.grad(layer.reference(x * scores.sum(), index, scores).sum(), inputs)
    with counts.Watch() as work:
        y = recomputed(lambda x, scores: layer.products(x * scores.sum(), index, scores), x, scores)
        torch.autograd.backward(y.sum())
    assert work.syncs == {"tolist": 1}
    assert_same([each.grad for each in inputs], expected)


def count_launches(layer, num_experts, generator) -> tuple[Launches, Launches]:
    """Return the launches of a layer's forward and backward in bf16, for 100 tokens with 8 experts each.

    The host waits for the device once, in the forward.
    """
    x, index, scores = routed(100, num_experts, 8, generator)
    x = x.detach().bfloat16().requires_grad_()
    layer.factors = [factor.detach().bfloat16().requires_grad_() for factor in layer.factors]
    forward, backward = Launches(), Launches()
    with counts.Watch() as work, forward:
        y = layer.products(x, index, scores)
    grad = torch.ones_like(y)
    assert work.syncs == {"tolist": 1}
    with counts.Watch() as work, backward:
        torch.autograd.backward(y, grad)
    assert not work.syncs
    return forward, backward


@pytest.mark.parametrize("family", ["gated", "gpt-oss"])
def test_launches_do_not_grow_with_the_number_of_experts(family, interpreted, monkeypatch, generator):
    use_on_cpu(monkeypatch, interpreted)
    for name, kernels in (("grouped", ("matmul", "outer")), ("dequantize", ("dequantize",))):
        for kernel in kernels:
            monkeypatch.setattr(interpreted[f"{name}_triton"], f"_{kernel}_kernel", counted_kernel(kernel))
    is_transposed = family == "gpt-oss"
    layer = Layer(128, generator, is_transposed, gate=clamped_gate if is_transposed else silu_gate)
    forward, backward = count_launches(layer, 128, generator)
    print(f"{family}: {forward.total} launches forward, {backward.total} backward")
    print(dict(forward.counts), dict(backward.counts), sep="\n")
    assert (forward.counts["dequantize"], forward.counts["matmul"]) == (2, 2)
    # The gradients of biases' scores are one more product.
    assert (backward.counts["dequantize"], backward.counts["matmul"]) == (2, 7 + is_transposed)
    assert backward.counts["outer"] == 4
    assert forward.total <= 30
    assert backward.total <= 60


def test_a_loop_launches_so_many_for_each_expert(monkeypatch, generator):
    layer = Layer(128, generator)
    # One launch, as on a GPU.
    zeros = lambda experts, expert, dtype, out=None: torch.zeros(experts.shape[1:], dtype=dtype)  # noqa: E731
    monkeypatch.setattr(NF4Experts, "dequantize", zeros)
    monkeypatch.setattr(products, "experts_at_once", lambda *_, **__: 1)
    forward, backward = count_launches(layer, 128, generator)
    print(f"loop: {forward.total} launches forward, {backward.total} backward")
    assert forward.total > 128 * 10


def test_weights_are_dequantized_in_groups_that_bound_their_memory(interpreted, monkeypatch, generator):
    use_on_cpu(monkeypatch, interpreted)
    layer, asked = Layer(16, generator), []
    own = NF4Experts.weights_for_product

    def ask(weights, group, *rest):
        found = own(weights, group, *rest)
        asked.append((weights, group.experts, found.nbytes))
        return found

    monkeypatch.setattr(NF4Experts, "weights_for_product", ask)
    monkeypatch.setattr(grouped, "GROUP_BYTES", 5 * 4 * 2 * INNER * HIDDEN + 7)
    x, index, scores = routed(40, 16, 4, generator)
    layer.products(x, index, scores).sum().backward()
    assert max(size for *_, size in asked) <= grouped.GROUP_BYTES
    for part in layer.parts:
        numbers = [expert for weights, experts, _ in asked if weights is part.weights for expert in experts]
        assert numbers == 2 * sorted({*index.flatten().tolist()})  # once forward, once backward
