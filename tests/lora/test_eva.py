"""EVA: ranks against PEFT's rule, initial values against PEFT's on the same inputs."""

from collections import Counter

import pytest
import torch
from torch import nn

from qlora.lora.eva import eva_factors, num_directions, redistribute
from qlora.lora.statistics import InputObserver, InputStatistics


def peft_ranks(ratios, rank, rho):
    """Return the layers' counts among the rank · layers largest ratios, as PEFT computes them."""
    pairs = [(share, name) for name, shares in ratios.items() for share in shares[: round(rank * rho)]]
    return Counter(name for _, name in sorted(pairs, reverse=True)[: rank * len(ratios)])


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_pefts_where_it_leaves_no_layer_out(rho, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(7, 40, generator=generator) ** 4
    ratios = {f"layer{i}": shares.sort(descending=True).values.tolist() for i, shares in enumerate(draw)}
    wanted = peft_ranks(ratios, 6, rho)
    assert set(wanted) == set(ratios)
    found = redistribute(ratios, 6, rho)
    assert found == wanted
    assert sum(found.values()) == 6 * 7


def test_every_layer_gets_a_direction_and_equal_shares_count_in_order():
    ratios = {"weak": [0.001, 0.001], "one": [0.5, 0.3, 0.1], "other": [0.5, 0.3, 0.1]}
    assert redistribute(ratios, 2, 2.0) == {"weak": 1, "one": 3, "other": 2}


def test_a_layer_with_few_features_gets_no_more_than_it_has():
    assert redistribute({"narrow": [0.9, 0.1], "wide": [0.1] * 8}, 3, 2.0) == {"narrow": 2, "wide": 4}


@pytest.mark.parametrize(("rank", "rho", "message"), [(0, 2, "rank: 0 should be"), (4, 0.5, "rho: 0.5 should be")])
def test_wrong_ranks_are_reported(rank, rho, message):
    with pytest.raises(ValueError, match=message):
        redistribute({"layer": [1.0]}, rank, rho)


def test_layers_that_share_inputs_share_directions():
    statistics = InputStatistics(12, 12)
    statistics.add(torch.randn(100, 12, generator=torch.Generator().manual_seed(0)))
    factors = eva_factors({"q": statistics, "k": statistics}, 3, 1.0)
    assert torch.equal(factors["q"], factors["k"])
    torch.testing.assert_close(factors["q"] @ factors["q"].T, torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("features", [24, 400])  # all directions are kept, and a part
def test_initial_values_are_pefts_up_to_sign(features, rho):
    peft = pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.arange(1, features + 1).float() ** -1.5
    x = torch.randn(1000, features, generator=generator) * spectrum + 0.3
    model = nn.Sequential(nn.Linear(features, features, bias=False), nn.Tanh(), nn.Linear(features, 10, bias=False))
    model.requires_grad_(False)
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(torch.randn(features, features, generator=generator)).Q)
    names = ["0", "2"]
    with InputObserver(model, names, num_directions(3, rho, features)) as observer:
        model(x)
    found = eva_factors(observer.statistics, 3, rho)

    config = peft.LoraConfig(
        r=3, target_modules=names, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho, tau=0.9)
    )
    wanted = peft.get_eva_state_dict(
        model,
        [x],
        config,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    for name in names:
        assert found[name].shape == wanted[name].shape
        assert (found[name] * wanted[name]).sum(1).abs().min() > 0.98
