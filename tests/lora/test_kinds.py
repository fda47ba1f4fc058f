"""Each kind of adapter: the base bit for bit at first, outputs and gradients of a plain reference, the stored form."""

import pytest
import torch
from torch import nn

from qlora.errors import ModelError
from qlora.kernels import LowRank
from qlora.lora import AdapterSpec, LoraLinear, add_lora, lora_layers
from qlora.nf4 import NF4Linear
from tests.combinations import pairs
from tests.reference.lora import adapted_linear

IN, OUT, RANK = 48, 33, 4
KINDS = [{"kind": "lora"}, {"kind": "dora"}, {"kind": "rows"}, {"kind": "lora", "train": "B", "init": "orthogonal"},
         {"kind": "dora", "train": "B", "init": "orthogonal"}]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6}


def make_layer(generator, dtype, bias=True, quantized=True, frozen=False, null_space=False, factors=None, **settings):
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    spec = AdapterSpec(RANK, 8, dtype=factors or dtype, **settings)
    layer = LoraLinear(NF4Linear.from_linear(linear) if quantized else linear, spec)
    if frozen:
        A, B = torch.randn(3, IN, generator=generator), torch.randn(OUT, 3, generator=generator)
        layer.frozen = LowRank((A * 0.1).to(dtype), (B * 0.1).to(dtype), frozen)
    if null_space:
        layer.null_space = torch.linalg.qr(torch.randn(IN, 6, generator=generator)).Q
    layer.reset(generator)
    return layer


def train(layer, generator):
    """Change all trained parameters, as training does."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05)
    return layer


def reference(layer, x, mask=None):
    """Return the layer's output by plain autograd, with the leaves that it depends on."""
    leaves = {
        name: each.detach().float().requires_grad_() for name, each in layer.named_parameters() if each.requires_grad
    }
    value = leaves.get
    if layer.spec.kind == "rows":
        update = torch.zeros(OUT, IN).index_add(0, layer.row_index, leaves["lora_rows"])
    else:
        A = leaves["lora_A"] if "lora_A" in leaves else layer.lora_A.float()
        if layer.null_space is not None:
            A = A @ (torch.eye(IN) - layer.null_space @ layer.null_space.T)
        update = layer.spec.scaling * leaves["lora_B"] @ A
    if layer.frozen is not None:
        update = update + layer.frozen.scaling * layer.frozen.B.float() @ layer.frozen.A.float()
    magnitude = layer.first_magnitude + value("magnitude") if layer.spec.kind == "dora" else None
    base = layer.base
    weight = base.dequantize(x.dtype) if isinstance(base, NF4Linear) else base.weight
    return adapted_linear(x, weight, base.bias, update, magnitude, mask), leaves


def error(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("form", ["separate", "folded"])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_fresh_layer_gives_what_its_base_gives_bit_for_bit(settings, dtype, quantized, form, generator):
    layer = make_layer(generator, dtype, quantized=quantized, form=form, **settings)
    x = torch.randn(2, 5, IN, generator=generator).to(dtype)
    assert torch.equal(layer(x), layer.base(x))


def remove_initial_values(layer, generator):
    """Draw initial values that are subtracted again, as with PiSSA."""
    with torch.no_grad():
        layer.lora_A.normal_(generator=generator)
        layer.lora_B.normal_(generator=generator)
    layer.removed = LowRank(layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.spec.scaling)
    layer.start_magnitude()


@pytest.mark.parametrize("form", ["separate", "folded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_initial_values_that_are_subtracted_again_change_no_bit(kind, dtype, form, generator):
    layer = make_layer(generator, dtype, kind=kind, form=form)
    remove_initial_values(layer, generator)
    x = torch.randn(9, IN, generator=generator).to(dtype)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("form", ["separate", "folded"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_their_gradients_are_those_of_the_difference(kind, form, generator):
    layer = make_layer(generator, torch.float32, kind=kind, form=form, bias=False)
    remove_initial_values(layer, generator)
    first = layer.removed.scaling * layer.removed.B @ layer.removed.A
    train(layer, generator)
    x = torch.randn(7, IN, generator=generator)
    leaves = {name: each.detach().requires_grad_() for name, each in layer.named_parameters() if each.requires_grad}
    update = layer.spec.scaling * leaves["lora_B"] @ leaves["lora_A"] - first
    magnitude = layer.first_magnitude + leaves["magnitude"] if kind == "dora" else None
    wanted = adapted_linear(x, layer.base.dequantize(torch.float32), None, update, magnitude)
    wanted.square().sum().backward()
    y = layer(x)
    y.square().sum().backward()
    assert error(y, wanted) < 1e-5
    for name, leaf in leaves.items():
        assert error(layer.get_parameter(name).grad, leaf.grad) < 1e-5, name
    stored = layer.stored()
    assert error(stored.scaling * stored.B @ stored.A, update) < 1e-5


def test_rows_of_zeros_stay_as_they_are_with_dora(generator):
    layer = make_layer(generator, torch.float32, quantized=False, kind="dora")
    with torch.no_grad():
        layer.base.weight[3] = 0
    layer.start_magnitude()
    x = torch.randn(5, IN, generator=generator)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).sum().backward()
    assert all(each.grad.isfinite().all() for each in layer.parameters() if each.grad is not None)


@pytest.mark.parametrize(("settings", "form", "dtype", "bias", "frozen", "null_space"), [
    case for case in pairs(KINDS, ["separate", "folded"], DTYPES, [True, False], [0.0, 0.5, 2.0], [True, False])
    if not (case[0]["kind"] == "rows" and case[5])
], ids=str)  # fmt: skip
def test_output_and_gradients_are_the_references(settings, form, dtype, bias, frozen, null_space, generator):
    layer = train(
        make_layer(generator, dtype, bias, frozen=frozen, null_space=null_space, form=form, **settings), generator
    )
    x = torch.randn(2, 7, IN, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, 7, OUT, generator=generator).to(dtype)
    wanted, leaves = reference(layer, other := x.detach().clone().requires_grad_())
    wanted.backward(grad.float())
    y = layer(x)
    y.backward(grad)
    assert error(y, wanted) < TOLERANCE[dtype]
    assert error(x.grad, other.grad) < TOLERANCE[dtype]
    for name, leaf in leaves.items():
        assert error(layer.get_parameter(name).grad, leaf.grad) < TOLERANCE[dtype], name
    frozen_ones = [each for each in layer.parameters() if not each.requires_grad]
    assert all(parameter.grad is None for parameter in frozen_ones)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_dropout_drops_inputs_of_the_update_alone(settings, generator, monkeypatch):
    layer = train(make_layer(generator, torch.float32, dropout=0.4, **settings), generator)
    mask = torch.empty(6, IN).bernoulli_(0.6, generator=generator) / 0.6
    monkeypatch.setattr("qlora.lora.function.dropout_mask", lambda *_: mask)
    x = torch.randn(6, IN, generator=generator)
    wanted, leaves = reference(layer, x, mask)
    wanted.square().sum().backward()
    layer(x).square().sum().backward()
    for name, leaf in leaves.items():
        assert error(layer.get_parameter(name).grad, leaf.grad) < 1e-5, name


@pytest.mark.parametrize("null_space", [True, False])
@pytest.mark.parametrize("frozen", [0.0, 0.5, 2.0])  # its scaling; that of the trained term is 2
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_stored_form_has_the_same_effective_weight(settings, frozen, null_space, generator):
    if settings["kind"] == "rows" and null_space:
        pytest.skip("rows have no A to project")
    layer = make_layer(generator, torch.float32, frozen=frozen, null_space=null_space, bias=False, **settings)
    train(layer, generator)
    stored = layer.stored()
    weight = layer.base.dequantize(torch.float32) + stored.scaling * stored.B.float() @ stored.A.float()
    if stored.magnitude is not None:
        weight = weight * (stored.magnitude / weight.norm(dim=1))[:, None]
    assert error(layer(torch.eye(IN)).T, weight) < 2e-6


def test_components_that_are_zero_are_not_stored(generator):
    layer = train(make_layer(generator, torch.float32, kind="lora"), generator)
    assert layer.is_stored_exactly
    with torch.no_grad():
        layer.lora_A[1:3] = 0
        layer.lora_B[:, 1:3] = 0
    stored = layer.stored()
    assert stored.A.shape == (RANK - 2, IN)
    assert stored.B.shape == (OUT, RANK - 2)
    assert error(stored.scaling * stored.B @ stored.A, layer.delta_weight()) < 1e-6
    assert not layer.is_stored_exactly


def test_trained_rows_are_those_with_the_largest_norms_and_no_others_change(generator):
    layer = train(make_layer(generator, torch.float32, kind="rows"), generator)
    norms = layer.base.dequantize(torch.float32).norm(dim=1)
    assert set(layer.row_index.tolist()) == set(norms.topk(RANK).indices.tolist())
    changed = layer.delta_weight().any(dim=1)
    assert changed.nonzero().flatten().tolist() == layer.row_index.tolist()


def test_a_null_space_hides_its_inputs_from_the_update(generator):
    layer = train(make_layer(generator, torch.float32, kind="lora", null_space=True), generator)
    stored = layer.stored()
    product = stored.scaling * stored.B.float() @ (stored.A.float() @ layer.null_space)
    assert product.norm() <= 1e-6 * layer.delta_weight().norm()


@pytest.mark.parametrize(("values", "message"), [
    ({"kind": "ia3"}, "kind: 'ia3' should be one of lora, dora, rows"),
    ({"train": "A"}, "train: 'A' should be one of AB, B"),
    ({"kind": "rows", "train": "B"}, "train: 'B' needs factors"),
    ({"kind": "rows", "init": "orthogonal"}, "init: 'orthogonal' is for factors"),
    ({"kind": "rows", "rslora": True}, "rslora: kind 'rows' is not scaled"),
    ({"train": "B"}, "init: 'kaiming' draws an A that is not orthonormal, but train 'B' keeps it"),
    ({"init": "eva"}, "init: 'eva' is computed from weights or data"),
    ({"kind": "rows", "rank": 99}, "lora.rank: 0 has rank 99, but lora.kind: rows allows at most 33 there"),
    ({"init": "orthogonal", "rank": 49}, "lora.rank: 0 has rank 49, but lora.init: orthogonal allows at most 48 there"),
])  # fmt: skip
def test_settings_that_make_no_sense_together_are_refused(values, message):
    with pytest.raises(ModelError, match=message):
        add_lora(nn.Sequential(nn.Linear(IN, OUT)), **values)


def test_layers_and_exclude_choose_among_the_targets():
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}) for _ in range(3))}
    )
    names = add_lora(model, exclude=["down"], layers=[0, 2])
    assert names == ["layers.0.up", "layers.2.up"] == [name for name, _ in lora_layers(model)]


@pytest.mark.parametrize(("values", "message"), [
    ({"layers": [0, 7]}, r"lora.layers: ModuleList has layers 0 to 1, not 7"),
    ({"exclude": ["sideways"]}, "lora.exclude: 'sideways' matches no layer of lora.targets"),
    ({"targets": ["0"], "exclude": ["0"]}, "leave no layer to adapt"),
])  # fmt: skip
def test_layers_and_exclude_that_match_nothing_are_refused(values, message):
    with pytest.raises(ModelError, match=message):
        add_lora(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), **values)
