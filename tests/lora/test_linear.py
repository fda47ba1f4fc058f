"""LoraLinear: the base bit for bit at first, exact gradients, and only x saved."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora import kernels
from qlora.lora import AdapterSpec, LoraLinear, RecomputedWeights, function, linears_of
from qlora.lora.function import FOLD_FROM_TOKENS, FORMS, choose_form, dropout_mask
from qlora.nf4 import NF4Linear
from tests.reference.held import saved_tensors, tensors_on_ctx
from tests.reference.lora import lora_linear

IN, OUT, RANK = 50, 33, 4
DTYPES = [torch.float32, torch.bfloat16]
LEADS = [(6,), (2, 3)]

# Norm of the error over the norm of the result. fp32 sums of 50 products round a few times at 2^-24. In bf16, each
# of at most four products in a row rounds once, by 2^-9 at most: 2^-7 together.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


def normal(generator, *shape):
    return torch.randn(shape, generator=generator)


def make_base(kind, generator, dtype=torch.float32, bias=True):
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(normal(generator, *parameter.shape) * 0.1)
    linear.requires_grad_(False)
    return NF4Linear.from_linear(linear) if kind == "nf4" else linear


def make_layer(kind, generator, dtype=torch.float32, bias=True, factors=None, **kwargs):
    """Return an adapter as during training: B is not zero."""
    layer = LoraLinear(make_base(kind, generator, dtype, bias), AdapterSpec(RANK, 8, dtype=factors or dtype, **kwargs))
    layer.reset(generator)
    with torch.no_grad():
        layer.lora_B.copy_(normal(generator, OUT, RANK) * 0.1)
    return layer


def weight_of(layer, dtype):
    return layer.base.dequantize(dtype) if isinstance(layer.base, NF4Linear) else layer.base.weight.to(dtype)


def gradients(layer, x, grad_output, **kwargs):
    return torch.autograd.grad(layer(x), (x, layer.lora_A, layer.lora_B), grad_output, **kwargs)


def error(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "linear"])
def test_a_fresh_layer_gives_what_its_base_gives_bit_for_bit(kind, dtype, bias, lead, form, generator):
    base = make_base(kind, generator, dtype, bias)
    layer = LoraLinear(base, AdapterSpec(RANK, 32, form=form))
    layer.reset(generator)
    x = normal(generator, *lead, IN).to(dtype)
    y = layer(x)
    assert layer.lora_A.abs().max() > 0
    assert y.dtype == dtype
    assert torch.equal(y, base(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "linear"])
def test_output_and_gradients_are_the_references(kind, dtype, factors, bias, lead, form, generator):
    layer = make_layer(kind, generator, dtype, bias, factors, form=form)
    x = normal(generator, *lead, IN).to(dtype).requires_grad_()
    grad_output = normal(generator, *lead, OUT).to(dtype)
    # The weight rounded to the dtype of the product, as the layer uses it: rounding is not under test.
    wanted = lora_linear(
        x, weight_of(layer, dtype), layer.base.bias, layer.lora_A, layer.lora_B, layer.spec.scaling, grad_output
    )
    y = layer(x)
    y.backward(grad_output)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    tolerance = TOLERANCE[dtype]
    # A gradient has its parameter's dtype, which rounds once more.
    factor_tolerance = max(tolerance, TOLERANCE[factors])
    assert error(y, wanted.y) < tolerance
    assert error(x.grad, wanted.grad_x) < tolerance
    assert error(layer.lora_A.grad, wanted.grad_A) < factor_tolerance
    assert error(layer.lora_B.grad, wanted.grad_B) < factor_tolerance


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_inputs_of_any_memory_layout_are_taken(layout, generator):
    layer = make_layer("nf4", generator)
    x = {
        "transposed": normal(generator, 3, 2, IN).transpose(0, 1),
        "sliced": normal(generator, 2, 5, IN)[:, 1:4],
        "expanded": normal(generator, 1, 3, IN).expand(2, 3, IN),
    }[layout]
    grad_output = normal(generator, 3, 2, OUT).transpose(0, 1)
    found = gradients(layer, x.detach().requires_grad_(), grad_output)
    wanted = gradients(layer, x.contiguous().requires_grad_(), grad_output.contiguous())
    assert all(error(a, b) < 1e-6 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_pefts(bias, rslora, generator):
    peft = pytest.importorskip("peft")
    layer = make_layer("nf4", generator, bias=bias, rslora=rslora)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(IN, OUT, bias=bias)

    other = Model()
    with torch.no_grad():
        other.proj.weight.copy_(layer.base.dequantize(torch.float32))
        if bias:
            other.proj.bias.copy_(layer.base.bias)
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["proj"], use_rslora=rslora)
    other = peft.inject_adapter_in_model(config, other).proj
    their_A, their_B = other.lora_A["default"].weight, other.lora_B["default"].weight
    with torch.no_grad():
        their_A.copy_(layer.lora_A)
        their_B.copy_(layer.lora_B)

    x = normal(generator, 2, 3, IN).requires_grad_()
    grad_output = normal(generator, 2, 3, OUT)
    assert error(layer(x), other(x)) < 1e-6
    theirs = torch.autograd.grad(other(x), (x, their_A, their_B), grad_output)
    ours = gradients(layer, x, grad_output)
    assert all(error(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))
    assert error(layer.delta_weight(), other.get_delta_weight("default")) < 1e-6


@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B"])
def test_what_needs_no_gradient_gets_none_and_the_others_keep_theirs(frozen, generator):
    layer = make_layer("nf4", generator)
    x = normal(generator, 4, IN).requires_grad_()
    grad_output = normal(generator, 4, OUT)
    wanted = dict(zip(("x", "lora_A", "lora_B"), gradients(layer, x, grad_output), strict=True))
    tensors = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    tensors[frozen].requires_grad_(False)
    layer(x).backward(grad_output)
    assert tensors[frozen].grad is None
    assert all(torch.equal(tensors[name].grad, wanted[name]) for name in tensors if name != frozen)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["nf4", "linear"])
def test_x_and_the_factors_are_all_that_is_saved(kind, dropout, generator):
    layer = make_layer(kind, generator, torch.bfloat16, dropout=dropout)
    x = normal(generator, 16, IN).bfloat16().requires_grad_()
    y, saved = saved_tensors(lambda: layer(x))
    addresses = sorted(tensor.data_ptr() for tensor in saved)
    assert addresses == sorted(tensor.data_ptr() for tensor in (x, layer.lora_A, layer.lora_B))
    # Nothing bypasses the hooks, where recomputation and offloading could not see it: ctx refers to the base layer and
    # its own tensors only.
    own = {tensor.data_ptr() for tensor in tensors_on_ctx(layer.base)}
    (function, _), *_ = y.grad_fn.next_functions  # y is a view of what it gave
    others = [tensor for tensor in tensors_on_ctx(function) if tensor.data_ptr() not in own]
    assert others == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "linear"])
def test_folding_rounds_the_sum_of_weight_and_update_once(kind, dtype, generator):
    layer = make_layer(kind, generator, dtype, bias=False, form="folded")
    found = layer(torch.eye(IN, dtype=dtype)).T
    update = layer.spec.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    wanted = (weight_of(layer, dtype).double() + update).to(dtype)
    # They differ only if fp32 sums in another order round to the other neighbour.
    assert (found == wanted).double().mean() > (0.99 if dtype == torch.bfloat16 else 0.3)
    assert error(found, wanted) < torch.finfo(dtype).eps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cached_weight_changes_no_bit(dtype, form, generator):
    layer = make_layer("nf4", generator, dtype, form=form)
    x = normal(generator, 6, IN).to(dtype).requires_grad_()
    grad_output = normal(generator, 6, OUT).to(dtype)
    wanted = [layer(x).detach(), *gradients(layer, x, grad_output)]
    layer.base.cache_weight(dtype)
    assert all(map(torch.equal, wanted, [layer(x).detach(), *gradients(layer, x, grad_output)]))
    layer.base.uncache_weight()
    assert all(map(torch.equal, wanted, [layer(x).detach(), *gradients(layer, x, grad_output)]))


def test_the_form_follows_the_tokens_unless_one_is_asked_for():
    cpu = torch.device("cpu")
    assert choose_form("auto", FOLD_FROM_TOKENS["cpu"] - 1, cpu, 0.0) == "separate"
    assert choose_form("auto", FOLD_FROM_TOKENS["cpu"], cpu, 0.0) == "folded"
    assert choose_form("auto", 1 << 20, torch.device("meta"), 0.0) == "separate"
    assert choose_form("auto", 1, cpu, 0.0, needs_norms=True) == "folded"  # as its weight is computed anyway
    for form in ("separate", "folded"):
        assert choose_form(form, 1, cpu, 0.0) == choose_form(form, 1 << 20, cpu, 0.0) == form
        assert choose_form(form, 1 << 20, cpu, 0.1, needs_norms=True) == "separate"  # the base's inputs are not dropped


class Counted:
    """A base that counts the weights that it returns."""

    def __init__(self, base):
        self.base, self.bias, self.count = base, base.bias, 0

    def weight_for_product(self, *arguments, **named):
        self.count += 1
        return self.base.weight_for_product(*arguments, **named)


@pytest.mark.parametrize("form", FORMS)
def test_recomputation_stops_before_the_last_product_and_keeps_the_weights_before_it(form, generator):
    layers = [make_layer("nf4", generator, bias=False, form=form) for _ in range(2)]
    bases = [layer.base for layer in layers]

    def run(**options):
        for layer, base in zip(layers, bases, strict=True):
            layer.__dict__["_modules"].pop("base", None)
            layer.base = Counted(base)
        x = normal(torch.Generator().manual_seed(1), 4, IN).requires_grad_()
        y = checkpoint(lambda x: layers[1](layers[0](x) @ torch.ones(OUT, IN)), x, use_reentrant=False, **options)
        y.square().sum().backward()
        counts = [layer.base.count for layer in layers]
        results = [x.grad, *(factor.grad for layer in layers for factor in (layer.lora_A, layer.lora_B))]
        for layer in layers:
            layer.lora_A.grad = layer.lora_B.grad = None
        return counts, results

    # Forward and backward; the first is also recomputed, the second is not.
    counts, wanted = run()
    assert counts == [3, 2]
    counts, found = run(context_fn=lambda: (nullcontext(), RecomputedWeights()))
    assert counts == [2, 2]
    assert all(map(torch.equal, found, wanted))


def test_layers_on_the_same_x_save_it_once(generator):
    layers = [make_layer("nf4", generator) for _ in range(3)]
    x = normal(generator, 2, 8, IN).requires_grad_()
    _, saved = saved_tensors(lambda: [layer(x) for layer in layers])
    factors = {tensor.untyped_storage().data_ptr() for layer in layers for tensor in (layer.lora_A, layer.lora_B)}
    others = {tensor.untyped_storage().data_ptr() for tensor in saved} - factors
    assert others == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_second_backward_gives_the_same_gradients(dropout, generator):
    layer = make_layer("nf4", generator, dropout=dropout)
    x = normal(generator, 4, IN).requires_grad_()
    grad_output = normal(generator, 4, OUT)
    kept_x, kept_grad = x.detach().clone(), grad_output.clone()
    y = layer(x)
    first = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad_output, retain_graph=True)
    second = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad_output)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(x, kept_x)
    assert torch.equal(grad_output, kept_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_dropout_are_the_references_under_its_mask(dtype, generator, seed, monkeypatch):
    layer = make_layer("nf4", generator, dtype, dropout=0.3)
    masks = []

    def recorded(x, dropout, mask_seed):
        masks.append(dropout_mask(x, dropout, mask_seed))
        return masks[-1]

    monkeypatch.setattr("qlora.lora.function.dropout_mask", recorded)
    torch.manual_seed(seed)
    x = normal(generator, 2, 8, IN).to(dtype).requires_grad_()
    grad_output = normal(generator, 2, 8, OUT).to(dtype)
    y = layer(x)
    found = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad_output)
    assert len(masks) == 2
    assert torch.equal(masks[0], masks[1])
    wanted = lora_linear(
        x, weight_of(layer, dtype), layer.base.bias, layer.lora_A, layer.lora_B, layer.spec.scaling, grad_output,
        mask=masks[0].view(x.shape),
    )  # fmt: skip
    # The mask rounds x once more.
    tolerance = 2 * TOLERANCE[dtype]
    assert error(y, wanted.y) < tolerance
    for ours, reference in zip(found, (wanted.grad_x, wanted.grad_A, wanted.grad_B), strict=True):
        assert error(ours, reference) < tolerance


def test_dropout_keeps_the_expected_value_and_drops_its_share(generator, seed):
    dropout, size = 0.3, 200_000
    mask = dropout_mask(torch.empty(size), dropout, seed)
    kept = (mask != 0).double().mean().item()
    assert abs(kept - (1 - dropout)) < 6 * math.sqrt(dropout * (1 - dropout) / size)
    assert torch.equal(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - dropout)))
    assert torch.equal(dropout_mask(torch.empty(size), dropout, seed), mask)
    assert not torch.equal(dropout_mask(torch.empty(size), dropout, seed + 1), mask)


def test_dropout_differs_from_call_to_call_and_is_off_in_evaluation(generator):
    layer = make_layer("nf4", generator, dropout=0.5)
    x = normal(generator, 8, IN)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    plain = lora_linear(
        x, weight_of(layer, torch.float32), layer.base.bias, layer.lora_A, layer.lora_B, layer.spec.scaling,
        torch.zeros(8, OUT),
    )  # fmt: skip
    assert torch.equal(layer(x), layer(x))
    assert error(layer(x), plain.y) < 1e-6


def test_recomputation_drops_the_same_inputs(generator, seed):
    layers = nn.Sequential(make_layer("nf4", generator, dropout=0.5))
    head = nn.Linear(OUT, IN)
    x = normal(generator, 8, IN).requires_grad_()

    def block(x):
        return layers(torch.tanh(head(torch.tanh(layers(x)))))

    def run(call):
        torch.manual_seed(seed)
        layers.zero_grad()
        x.grad = None
        y = call(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, layers[0].lora_A.grad, layers[0].lora_B.grad]

    plain = run(block)
    recomputed = run(lambda x: checkpoint(block, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("factors", DTYPES)
def test_delta_weight_is_what_the_adapter_adds(factors, rslora, generator):
    layer = make_layer("nf4", generator, factors=factors, rslora=rslora)
    delta = layer.delta_weight()
    scaling = 8 / (math.sqrt(RANK) if rslora else RANK)
    assert delta.dtype == torch.float32
    assert not delta.requires_grad
    assert error(delta, scaling * layer.lora_B.float() @ layer.lora_A.float()) < 1e-6
    x = normal(generator, 5, IN)
    added = layer(x) - layer.base(x)
    assert error(added, F.linear(x, delta)) < 1e-5


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_first_values_depend_on_the_seed_alone(init, seed):
    def values(seed, dtype=torch.float32):
        layer = LoraLinear(nn.Linear(64, 16), AdapterSpec(32, 8, init=init, dtype=dtype))
        layer.reset(torch.Generator().manual_seed(seed))
        return layer.lora_A.detach()

    assert torch.equal(values(seed), values(seed))
    assert not torch.equal(values(seed), values(seed + 1))
    assert torch.equal(values(seed, torch.bfloat16), values(seed).bfloat16())


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_first_values_spread_as_pefts(init, generator):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(512, 16))
    config = peft.LoraConfig(r=64, target_modules=["0"], init_lora_weights=True if init == "kaiming" else "gaussian")
    theirs = peft.inject_adapter_in_model(config, model)[0].lora_A["default"].weight
    ours = LoraLinear(nn.Linear(512, 16), AdapterSpec(64, 8, init=init, dtype=torch.float32))
    ours.reset(generator)
    # Deviations of 32,768 values each: their own deviation is below 1/sqrt(2 n) = 0.4%.
    assert ours.lora_A.std().item() == pytest.approx(theirs.std().item(), rel=0.03)
    assert ours.lora_A.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.3)


@pytest.mark.parametrize("kind", ["nf4", "linear"])
def test_only_the_factors_get_gradients(kind, generator):
    layer = make_layer(kind, generator)
    layer(normal(generator, 4, IN)).sum().backward()
    with_grad = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert with_grad == {"lora_A", "lora_B"}


@pytest.mark.parametrize("lead", LEADS)
def test_an_output_may_be_added_to_in_place(lead, generator):
    layer = make_layer("nf4", generator)
    x = normal(generator, *lead, IN).requires_grad_()
    grad_output, other = normal(generator, *lead, OUT), normal(generator, *lead, OUT)
    y = layer(x)
    y += other
    found = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad_output)
    assert all(map(torch.equal, found, gradients(layer, x, grad_output)))


def test_a_forward_in_inference_mode_leaves_training_possible(generator):
    layer = make_layer("linear", generator, torch.bfloat16, form="folded")
    x = normal(generator, 6, IN).bfloat16()
    kernels.scratch.__globals__["_local"].__dict__.clear()
    with torch.inference_mode():
        expected = layer(x)
    assert torch.equal(layer(x.clone().requires_grad_()), expected)


def test_an_input_that_was_changed_in_place_is_saved_and_not_rebuilt(generator):
    layer = make_layer("nf4", generator)
    source, grad_output = normal(generator, 4, IN).requires_grad_(), normal(generator, 4, OUT)
    x = kernels.rebuilt(torch.tanh, source)
    x.mul_(3)
    found = torch.autograd.grad(layer(x), (layer.lora_A, layer.lora_B), grad_output)
    _, *wanted = gradients(layer, (3 * torch.tanh(source)).detach().requires_grad_(), grad_output)
    assert all(error(one, other) < 1e-6 for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["nf4", "linear"])
def test_a_frozen_term_counts_in_output_and_gradients_and_gets_none(kind, form, held, generator):
    base = make_base(kind, generator)
    terms = [
        kernels.LowRank(normal(generator, rank, IN) * 0.1, normal(generator, OUT, rank) * 0.1, scaling)
        for rank, scaling in ((3, -1.5), (RANK, 2.0))
    ]
    frozen, trained = terms
    x, grad_output = normal(generator, 6, IN).requires_grad_(), normal(generator, 6, OUT)
    weight = (base.dequantize(torch.float32) if kind == "nf4" else base.weight) + frozen.scaling * frozen.B @ frozen.A
    wanted = lora_linear(x, weight, base.bias, trained.A, trained.B, trained.scaling, grad_output)
    if held and kind == "nf4":
        base.cache_weight(torch.float32)
    for factor in (trained.A, trained.B):
        factor.requires_grad_()
    (y,) = function.lora_linears(x, [function.Product(base, terms, form)])
    y.backward(grad_output)
    assert error(y, wanted.y) < 2e-6
    for found, reference in ((x, wanted.grad_x), (trained.A, wanted.grad_A), (trained.B, wanted.grad_B)):
        assert error(found.grad, reference) < 2e-6
    assert frozen.A.grad is None
    assert frozen.B.grad is None


def test_backward_hooks_see_layers_of_the_same_input(generator):
    layers = [LoraLinear(nn.Linear(16, out).requires_grad_(False), AdapterSpec(rank=4)) for out in (16, 8)]
    seen = []
    layers[0].register_full_backward_pre_hook(lambda *_: seen.append("before"))
    layers[0].register_full_backward_hook(lambda *_: seen.append("after"))
    x = torch.randn(5, 16, generator=generator, requires_grad=True)
    sum(each.sum() for each in linears_of(x, layers)).backward()
    assert seen == ["before", "after"]
