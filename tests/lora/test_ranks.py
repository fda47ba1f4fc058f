"""Adaptive rank: importance against a slow reference, the budget, and components that are removed for good."""

import itertools

import pytest
import torch
from torch import nn

from qlora.lora import AdapterSpec, LoraLinear, RankBudget
from qlora.lora.ranks import PRUNE_FROM, PRUNE_UNTIL, SMOOTHING, budget
from qlora.optim import OPTIMIZERS, FlatParameters, make_optimizer

# Shapes (out, in) and ranks of some layers.
LAYERS = [((24, 16), 5), ((8, 40), 3), ((16, 16), 4)]
NUM_COMPONENTS = 12


def make_layers(generator, dtype=torch.float32, kind="lora"):
    layers = []
    for (out_features, in_features), rank in LAYERS:
        layer = LoraLinear(nn.Linear(in_features, out_features), AdapterSpec(rank=rank, kind=kind, dtype=dtype))
        for factor in (layer.lora_A, layer.lora_B):
            factor.data.copy_(torch.randn(factor.shape, generator=generator))
        layers.append(layer)
    return layers


def set_gradients(layers, generator):
    for factor in (factor for layer in layers for factor in (layer.lora_A, layer.lora_B)):
        factor.grad_dtype = torch.float32
        factor.grad = torch.randn(factor.shape, generator=generator)


def flat_of(layers):
    trained = ((f"{i}.{name}", value) for i, layer in enumerate(layers) for name, value in layer.named_parameters())
    return FlatParameters((name, value) for name, value in trained if value.requires_grad and ".base." not in name)


def ranks_of(layers):
    return [len(layer.stored().A) for layer in layers]


def reference_importance(history, layer, component):
    """Return AdaLoRA's smoothed sensitivity of a component, element by element."""
    mean = 0.0
    for factors in history:
        A, A_grad, B, B_grad = factors[layer]
        row = [abs(w * g) for w, g in zip(A[component].tolist(), A_grad[component].tolist(), strict=True)]
        column = [abs(w * g) for w, g in zip(B[:, component].tolist(), B_grad[:, component].tolist(), strict=True)]
        mean = SMOOTHING * mean + (1 - SMOOTHING) * (sum(row) / len(row) + sum(column) / len(column))
    return mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_importance_is_the_running_mean_of_both_factors_sensitivity(dtype, generator):
    layers, history = make_layers(generator, dtype), []
    ranks = RankBudget(layers, 0.5, 10)
    for _ in range(4):
        set_gradients(layers, generator)
        factors = [(each.lora_A, each.lora_A.grad, each.lora_B, each.lora_B.grad) for each in layers]
        history.append([tuple(value.detach().clone() for value in each) for each in factors])
        ranks.observe()
        for layer in layers:
            layer.lora_A.data.mul_(1.25)
    for index, (_, rank) in enumerate(LAYERS):
        wanted = torch.tensor([reference_importance(history, index, component) for component in range(rank)])
        assert torch.allclose(ranks.importance[index, :rank], wanted, rtol=1e-5)
        assert not ranks.importance[index, rank:].any()


def test_the_budget_falls_by_a_cube_between_two_shares_of_the_run():
    first, last = 1600, 400
    numbers = [budget(done / 100, first, last) for done in range(101)]
    assert set(numbers[: round(100 * PRUNE_FROM) + 1]) == {first}
    assert set(numbers[round(100 * PRUNE_UNTIL) :]) == {last}
    assert all(one >= other for one, other in itertools.pairwise(numbers))
    middle = (PRUNE_FROM + PRUNE_UNTIL) / 2
    assert budget(middle, first, last) == last + (first - last) / 8


@pytest.mark.parametrize("total_steps", [1, 2, 7, 40])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_share_asked_for_is_left_whatever_the_number_of_steps(kind, total_steps, generator):
    layers = make_layers(generator, kind=kind)
    ranks = RankBudget(layers, 0.5, total_steps)
    for step in range(total_steps):
        set_gradients(layers, generator)
        ranks.observe()
        ranks.prune(step)
        assert sum(ranks_of(layers)) == ranks.num_components == int(ranks.kept.sum())
    assert ranks.num_components == NUM_COMPONENTS // 2
    assert ranks.mean_rank == NUM_COMPONENTS / 2 / len(LAYERS)


def test_what_matters_most_is_left_over_all_layers_and_the_best_of_each(generator):
    layers = make_layers(generator)
    ranks = RankBudget(layers, 0.5, 1)
    ranks.importance[0, :5] = torch.tensor([9.0, 1.0, 8.0, 7.0, 6.0])
    ranks.importance[1, :3] = torch.tensor([0.1, 0.3, 0.2])  # less than any of the others, but one has to stay
    ranks.importance[2, :4] = torch.tensor([2.0, 5.0, 5.0, 5.0])  # of equal ones the earlier
    before = [(layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for layer in layers]
    ranks.prune(0)
    wanted = [[0, 2, 3, 4], [1], [1]]
    for layer, components, (A, B) in zip(layers, wanted, before, strict=True):
        assert layer.lora_A.any(1).nonzero().flatten().tolist() == components
        assert layer.lora_B.any(0).nonzero().flatten().tolist() == components
        assert layer.lora_A[components].equal(A[components])
        assert layer.lora_B[:, components].equal(B[:, components])


def test_every_layer_keeps_one_component_if_there_is_room_for_fewer(generator):
    layers = make_layers(generator)
    RankBudget(layers, 0.01, 1).prune(0)
    assert ranks_of(layers) == [1, 1, 1]


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_removed_components_stay_zero_although_momentum_moves_them(name, rounding, generator):
    layers = make_layers(generator, torch.bfloat16)
    flat = flat_of(layers)
    optimizer = make_optimizer(name, flat, rounding=rounding)
    ranks, moved = RankBudget(layers, 0.5, 10), 0
    for step in range(10):
        removed = ~ranks.kept
        for parameter in flat._parameters:
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        for gone, layer in zip(removed, layers, strict=True):  # as in training, where their gradient is zero
            layer.lora_A.grad[gone[: layer.spec.rank]] = 0
            layer.lora_B.grad[:, gone[: layer.spec.rank]] = 0
        ranks.observe()
        optimizer.step(1e-2)
        moved += sum(
            int(layer.lora_A[gone[: layer.spec.rank]].any()) for gone, layer in zip(removed, layers, strict=True)
        )
        ranks.prune(step)
        for kept, layer in zip(ranks.kept, layers, strict=True):
            kept = kept[: layer.spec.rank]
            assert layer.lora_A.any(1).equal(kept)
            assert layer.lora_B.any(0).equal(kept)
    assert moved > 0
    assert sum(ranks_of(layers)) == NUM_COMPONENTS // 2


def test_removed_components_never_return_even_if_the_budget_grows(generator):
    layers = make_layers(generator)
    ranks = RankBudget(layers, 0.5, 10)
    set_gradients(layers, generator)
    ranks.observe()
    ranks.prune(5)
    kept, left = ranks.kept.clone(), ranks.num_components
    assert left < NUM_COMPONENTS
    ranks.total_steps = 1000  # the run was extended
    set_gradients(layers, generator)
    ranks.observe()
    ranks.prune(6)
    assert ranks.kept.equal(kept)
    assert ranks.num_components == left


def test_a_restored_budget_continues_bit_for_bit(seed):
    def steps(ranks, generator, span):
        for step in span:
            set_gradients(ranks.layers, generator)
            ranks.observe()
            ranks.prune(step)

    generator = torch.Generator().manual_seed(seed)
    whole = RankBudget(make_layers(generator), 0.3, 12)
    steps(whole, generator, range(6))
    other = RankBudget(make_layers(torch.Generator()), 0.3, 12)
    other.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    assert other.num_components == whole.num_components < NUM_COMPONENTS
    for one, copy in zip(whole.layers, other.layers, strict=True):
        copy.load_state_dict(one.state_dict())
    drawn = generator.get_state()
    steps(whole, generator, range(6, 12))
    steps(other, torch.Generator().set_state(drawn), range(6, 12))
    assert other.kept.equal(whole.kept)
    assert other.importance.equal(whole.importance)


def test_the_state_of_other_layers_is_refused(generator):
    layers = make_layers(generator)
    state = RankBudget(layers[:2], 0.5, 10).state_dict()
    with pytest.raises(ValueError, match="adaptive ranks"):
        RankBudget(layers, 0.5, 10).load_state_dict(state)


@pytest.mark.parametrize("settings", [{"kind": "rows"}, {"train": "B", "init": "orthogonal"}])
def test_layers_without_two_trained_factors_are_refused(settings):
    layer = LoraLinear(nn.Linear(8, 8), AdapterSpec(rank=2, **settings))
    with pytest.raises(ValueError, match="judged by both factors"):
        RankBudget([layer], 0.5, 10)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share, generator):
    with pytest.raises(ValueError, match="share"):
        RankBudget(make_layers(generator), share, 10)
