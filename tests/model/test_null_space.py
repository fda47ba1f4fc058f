"""Directions that are hidden from adapters: which ones, that nothing trained sees them, and that a run keeps them."""

import pytest
import torch

from qlora.config import load_config
from qlora.data import make_example
from qlora.lora import InputStatistics, lora_layers
from qlora.model import load_for_training, null_space
from tests.tiny import run_config


def statistics(generator, features, fall):
    """Return statistics of inputs whose standard deviations fall as 1 / i^fall, and their second moment in fp64."""
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    x = torch.randn(4 * features, features, generator=generator) * torch.arange(1, features + 1) ** -fall @ turn
    found = InputStatistics(features, 4 * null_space.MOST_DIRECTIONS)
    found.add(x)
    return found, x.double().T @ x.double() / len(x)


@pytest.mark.parametrize("fall", [3.0, 1.5, 1.0])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_the_fewest_directions_with_the_share_of_the_energy_are_hidden(fall, energy, generator, monkeypatch):
    monkeypatch.setattr(null_space, "ENERGY", energy)
    monkeypatch.setattr(null_space, "MOST_OF_FEATURES", 1.0)
    found, moment = statistics(generator, 40, fall)
    V = null_space.main_directions(found).double()
    shares = torch.linalg.eigvalsh(moment).flip(0) / moment.trace()
    assert (V.T @ moment @ V).trace() > (energy - 1e-5) * moment.trace()
    assert shares[: V.shape[1] - 1].sum() < energy + 1e-5
    assert abs((V.T @ moment @ V).trace() / moment.trace() - shares[: V.shape[1]].sum()) < 1e-5
    torch.testing.assert_close(V.T @ V, torch.eye(V.shape[1]).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", [1, 40, 300])
def test_no_more_than_a_share_of_the_features_and_a_fixed_number_are_hidden(features, generator):
    found, _ = statistics(generator, features, 0.0)
    most = min(null_space.MOST_DIRECTIONS, int(null_space.MOST_OF_FEATURES * features))
    assert null_space.main_directions(found).shape == (features, max(1, most))


@pytest.fixture(params=["kaiming", "eva"])
def config(request, tiny_base, tmp_path):
    """The config of a run in fp32, which starts from the seed or from data."""
    settings = {"model__compute_dtype": "float32", "lora__dtype": "float32", "lora__init": request.param}
    return load_config(run_config(tiny_base, tmp_path / "rows.jsonl", tmp_path / "run", **settings))


def examples(generator, count=3):
    ids = torch.randint(3, 256, (count, 50), generator=generator)
    return [make_example(row, [True] * len(row)) for row in ids]


def loaded(config, generator):
    return load_for_training(config, "cpu", examples=examples(generator), old_examples=examples(generator))


def test_trained_layers_map_hidden_inputs_as_the_base_does(config, generator):
    model, _ = loaded(config, generator)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    for name, layer in lora_layers(model):
        directions = layer.null_space.shape[1]
        hidden = torch.randn(20, directions, generator=generator) @ layer.null_space.T
        other = torch.randn(20, layer.in_features, generator=generator)
        change = layer(other) - layer.base(other)
        assert change.norm() > layer.base(other).norm(), name
        assert (layer(hidden) - layer.base(hidden)).norm() < 1e-5 * change.norm(), name


def test_layers_with_the_same_inputs_share_their_directions(config, generator):
    model, starts = loaded(config, generator)
    block = model.model.layers[1]
    for layers in (
        [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj],
        [block.mlp.gate_proj, block.mlp.up_proj],
    ):
        assert len({layer.null_space.data_ptr() for layer in layers}) == 1
    assert len({start.null_space.data_ptr() for start in starts.values()}) == 2 * 4


def test_a_run_that_is_continued_hides_the_same_directions(config, generator):
    model, starts = loaded(config, generator)
    again, kept = load_for_training(config, "cpu", starts=starts)
    assert kept.keys() == starts.keys() == dict(lora_layers(model)).keys()
    found = dict(lora_layers(again))
    for name, layer in lora_layers(model):
        assert torch.equal(starts[name].null_space, layer.null_space)
        assert torch.equal(found[name].null_space, layer.null_space)
        assert torch.equal(found[name].stored().A, layer.stored().A)
    layer, other = (each.model.layers[1].mlp.down_proj for each in (model, again))
    for each in (layer, other):
        each.lora_B.data.fill_(1.0)
    x = torch.randn(5, layer.in_features, generator=generator)
    assert torch.equal(layer(x), other(x))
